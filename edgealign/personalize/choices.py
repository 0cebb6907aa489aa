"""One user's choices: read, freed of repetitions, split into those that are learned and those that check the result.

The split depends on the choices' texts alone (the smallest hashes are held out), so a retry keeps it and the
check is never learned from. Choices on the same prompt go to the same side where the numbers allow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgealign.artifact import Input, file_input
from edgealign.data.forms import Pair
from edgealign.data.mapping import parse_mapping
from edgealign.data.read import Loaded, read
from edgealign.errors import InputError
from edgealign.personalize.recipes import MAX_CHOICES, MIN_CHOICES
from edgealign.progress import say
from edgealign.registry import suggest


class ReadRecipe(Protocol):
    """What a method's recipe says about reading choices."""

    @property
    def map(self) -> tuple[str, ...]: ...
    @property
    def skip_bad(self) -> int | None: ...
    @property
    def max_tokens(self) -> int: ...


class ChoicesRecipe(ReadRecipe, Protocol):
    """And about those that check the result."""

    @property
    def held_out(self) -> float: ...


@dataclass(frozen=True)
class Choices:
    """`facts` are counts for the manifest; no text and no user id among them."""

    fitted: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    facts: dict[str, int]
    source: Input

    @property
    def total(self) -> int:
        return len(self.fitted) + len(self.held_out)


def load_choices(source: str | Path, user: str, tokenizer: Any, recipe: ChoicesRecipe) -> Choices:
    """The newest 4 to 64 usable choices of one user, and which of them are held out.

    Raises:
        InputError: no pairs, no such user, fewer than four choices left.
    """
    own, facts, provenance = read_choices(source, user, tokenizer, recipe, least=MIN_CHOICES)
    fitted, held_out = split(own, share=recipe.held_out)
    facts |= {"fitted": len(fitted), "held_out": len(held_out)}
    return Choices(tuple(fitted), tuple(held_out), facts, provenance)


def read_choices(
    source: str | Path, user: str, tokenizer: Any, recipe: ReadRecipe, *, least: int
) -> tuple[list[Pair], dict[str, int], Input]:
    """The newest usable choices of one user, at most 64; later rows are newer. With counts and the file's digest.

    Raises:
        InputError: no pairs, no such user, fewer than `least` choices left.
    """
    loaded = read(source, form="pair", mapping=parse_mapping(recipe.map), skip_bad=recipe.skip_bad)
    rows = [row for row in loaded.rows if isinstance(row, Pair)]
    own = [row for row in rows if row.user_id == user]
    if not own:
        raise _no_such_user(source, user, rows)
    facts = {"rows": len(own)}
    own, facts["repeated"], facts["overridden"] = drop_repetitions(own)
    own, facts["unusable"] = _usable(own, tokenizer, recipe.max_tokens, source)
    if len(own) < least:
        left_out = facts["repeated"] + facts["overridden"] + facts["unusable"]
        why = f" that can be used ({left_out} left out: repeated, contradicted later or too long)" if left_out else ""
        raise InputError(
            f"user {user}", f"has {len(own)} choice{'s' * (len(own) != 1)}{why}, a fit needs at least {least}",
            "collect more, or use the model as it is until then",
        )
    if len(own) > MAX_CHOICES:
        say(f"user {user}: {len(own)} choices, the newest {MAX_CHOICES} are used")
    return own[-MAX_CHOICES:], facts, _provenance(loaded)


def drop_repetitions(rows: Sequence[Pair]) -> tuple[list[Pair], int, int]:
    """Keep the last word on each question: (rows, how many were repeated, how many were contradicted later).

    The same answers to the same prompt are one question, whichever was chosen.
    """
    last: dict[str, Pair] = {}
    repeated = overridden = 0
    for row in rows:
        key = question_key(row)
        earlier = last.pop(key, None)  # pop, so that the newest stands last
        if earlier is not None:
            repeated += earlier.chosen == row.chosen
            overridden += earlier.chosen != row.chosen
        last[key] = row
    return list(last.values()), repeated, overridden


def split(rows: Sequence[Pair], *, share: float) -> tuple[list[Pair], list[Pair]]:
    """(fitted, held out): at least one is held out, and at least half are fitted; both in the order of `rows`."""
    count = min(max(1, round(share * len(rows))), len(rows) // 2)
    ranked = sorted(range(len(rows)), key=lambda i: (_hash(_prompt(rows[i])), question_key(rows[i])))
    held = set(ranked[:count])
    return (
        [row for i, row in enumerate(rows) if i not in held],
        [row for i, row in enumerate(rows) if i in held],
    )


def question_key(row: Pair) -> str:
    """Identifies what was asked, not what was answered."""
    return _hash([_prompt(row), sorted((row.chosen, row.rejected))])


def _prompt(row: Pair) -> list[Any]:
    return [message.as_dict() for message in row.prompt]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _usable(
    rows: Sequence[Pair], tokenizer: Any, max_tokens: int, source: str | Path
) -> tuple[list[Pair], int]:
    from edgealign.data.encode import encode_pairs

    encoded = encode_pairs(tokenizer, rows, max_tokens=max_tokens)
    if encoded.refused:
        say(f"{source}: {len(encoded.refused)} choices cannot be used, the first: {encoded.refused[0][1]}")
    if encoded.cut:
        say(f"{source}: {encoded.cut} choices were cut to {max_tokens} tokens")
    return [rows[i] for i in encoded.kept], len(encoded.refused)


def _no_such_user(source: str | Path, user: str, rows: Sequence[Pair]) -> InputError:
    users = sorted({row.user_id for row in rows if row.user_id})
    if not users:
        return InputError(source, "has no user_id column, so nobody's choices", "name it with: --map THEIRS=user_id")
    fix = f"users and their choices are listed by: edgealign data check {source}"
    return InputError(f"user {user}", f"made no choice in {source}{suggest(user, users)}", fix)


def _provenance(loaded: Loaded) -> Input:
    return file_input("choices", loaded.source, loaded.digest)
