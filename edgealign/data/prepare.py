"""Collect rows from several sources into one data set, with a count of everything that was left out.

train.jsonl, valid.jsonl      the rows, split by prompt so that no prompt is in both
choices.jsonl                 with `top_users`: the kept users' choices, by `user_id`
unseen_choices.jsonl          with `top_users`: their other choices, on other prompts
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgealign.artifact import Artifact, file_input, open_artifact, publish, refuse_existing
from edgealign.data.forms import Conversation, Message, Pair, Row, Thumb, texts, to_json, user_of
from edgealign.data.mend import mend
from edgealign.data.read import read_all
from edgealign.data.recipes import PrepareRecipe
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import InputError, RecipeError


def run(
    recipe: PrepareRecipe, *, sources: Sequence[str | Path], out: Path, mapping: Mapping[str, str] | None = None
) -> Artifact:
    """Publish the data set.

    Raises:
        InputError: a source cannot be read or has bad rows that `skip_bad` does not allow, or nothing is left.
        RecipeError: `leave_out` is not a regular expression.
    """
    refuse_existing(Path(out))
    rng = random.Random(recipe.seed)
    pattern = _compile(recipe.leave_out)
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    inputs = []
    for loaded in read_all(sources, form=recipe.form, mapping=mapping or {}, skip_bad=recipe.skip_bad):
        left_out["bad rows"] += len(loaded.bad)
        left_out["ties"] += loaded.ties
        kept = [row for row in (_fit(row, recipe, pattern, left_out) for row in loaded.rows) if row is not None]
        if recipe.limit is not None and recipe.top_users is None and len(kept) > recipe.limit:
            left_out["over the limit"] += len(kept) - recipe.limit
            kept = rng.sample(kept, recipe.limit)
        rows += kept
        inputs.append(file_input("data", loaded.source, loaded.digest))
    files = _by_user(rows, recipe, rng, left_out) if recipe.top_users else _by_prompt(rows, recipe, rng)
    if not any(files.values()):
        raise InputError(", ".join(map(str, sources)), "has no row left after filtering", "loosen the filters")
    with publish(out, kind="dataset", format="jsonl", stage="prepare", recipe=recipe, inputs=inputs) as draft:
        for name, chosen in files.items():
            write_jsonl(draft.dir / name, [to_json(row) for row in chosen])
        draft.meta["rows"] = {name: len(chosen) for name, chosen in files.items()}
        draft.meta["left_out"] = {reason: count for reason, count in left_out.items() if count}
    return open_artifact(out)


def prompt_of(row: Row) -> str:
    """The text that decides on which side of a split a row falls: of a conversation, what the user says first.

    A system turn decides nothing there: one request may stand over many prompts, and one prompt under many requests.
    """
    if isinstance(row, (Pair, Thumb)):
        return "\n".join(message.content for message in row.prompt)
    if isinstance(row, Conversation):
        asked = next((message.content for message in row.messages if message.role == "user"), None)
        if asked is not None:
            return asked
    return next(texts(row), "")


def in_valid(prompt: str, seed: int, share: float) -> bool:
    """Whether a prompt belongs to the validation part; the same for every row that has this prompt."""
    return int(hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:8], 16) / 2**32 < share


def _compile(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise RecipeError(f"leave_out = {pattern!r}", f"is not a regular expression ({error})", "mend it") from error


def _fit(row: Row, recipe: PrepareRecipe, pattern: re.Pattern[str] | None, left_out: Counter[str]) -> Row | None:
    if isinstance(row, Conversation) and recipe.max_turns is not None:
        row = _cut_turns(row, recipe.max_turns)
        if not any(message.role == "assistant" for message in row.messages):
            left_out["no answer within max_turns"] += 1
            return None
    if isinstance(row, Conversation) and recipe.mend:
        row = mend(row)
    parts = list(texts(row))
    if recipe.min_chars is not None and _said(row) < recipe.min_chars:
        left_out["shorter than min_chars"] += 1
        return None
    if recipe.max_chars is not None and sum(map(len, parts)) > recipe.max_chars:
        left_out["longer than max_chars"] += 1
        return None
    if pattern is not None and any(pattern.search(part) for part in parts):
        left_out["matches leave_out"] += 1
        return None
    return row


def _said(row: Row) -> int:
    """Characters of the shortest answer, or of a plain text."""
    if isinstance(row, Conversation):
        return min((len(message.content) for message in row.messages if message.role == "assistant"), default=0)
    if isinstance(row, Pair):
        return min(len(row.chosen), len(row.rejected))
    return len(row.completion if isinstance(row, Thumb) else row.text)


def _cut_turns(row: Conversation, turns: int) -> Conversation:
    """The first turns; a cut never leaves a question without its answer at the end."""
    messages: list[Message] = list(row.messages[:turns])
    while messages and messages[-1].role != "assistant":
        messages.pop()
    return Conversation(tuple(messages), row.user_id)


def _by_prompt(rows: list[Row], recipe: PrepareRecipe, rng: random.Random) -> dict[str, list[Row]]:
    rng.shuffle(rows)
    files: dict[str, list[Row]] = {"train.jsonl": [], "valid.jsonl": []}
    for row in rows:
        side = "valid.jsonl" if in_valid(prompt_of(row), recipe.seed, recipe.valid) else "train.jsonl"
        files[side].append(row)
    return files


def _by_user(
    rows: list[Row], recipe: PrepareRecipe, rng: random.Random, left_out: Counter[str]
) -> dict[str, list[Row]]:
    """Each kept user's choices in two parts that share no prompt: as few prompts as fill `max_choices`, the rest."""
    users: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if (user := user_of(row)) is not None:
            users[user].append(row)
    assert recipe.top_users is not None
    ranked = sorted(users, key=lambda user: (-len(users[user]), user))[: recipe.top_users]
    files: dict[str, list[Row]] = {"choices.jsonl": [], "unseen_choices.jsonl": []}
    for user in ranked:
        prompts: dict[str, list[Row]] = defaultdict(list)
        for row in users[user]:
            prompts[prompt_of(row)].append(row)
        order = list(prompts)
        rng.shuffle(order)
        taken: list[Row] = []
        for place, prompt in enumerate(order):
            last = place == len(order) - 1
            if len(taken) < recipe.max_choices and not (last and len(order) > 1):
                room = recipe.max_choices - len(taken)
                left_out["over max_choices"] += max(0, len(prompts[prompt]) - room)
                taken += prompts[prompt][:room]
            else:
                files["unseen_choices.jsonl"] += prompts[prompt]
        files["choices.jsonl"] += taken
    left_out["other users' choices"] += sum(len(users[user]) for user in users if user not in ranked)
    return files
