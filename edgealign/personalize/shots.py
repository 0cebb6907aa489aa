"""A user's choices as the beginning of a prompt: how they are written, and which tokens they become.

The choices stand in the system turn, in order, oldest first, both answers of each written by the same rule, so that
nothing but the words "preferred" and "not preferred" tells them apart. Where a conversation has a system turn of its
own, that follows in the same turn.

    What this person chose before:

    Question: How do I clean a kettle?
    Preferred: ...
    Not preferred: ...

    Answer the next question in the way that this person would prefer.

A prefix is what all of a user's prompts begin with, up to the special token that opens the next turn, so that it has
the same tokens whatever is asked. The optional description is a sentence in front of the answer.

Source: FSPO, arXiv 2502.19312; the wording is ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from edgealign.data.forms import Message, Pair
from edgealign.personalize.attributes import ATTRIBUTES

OPENING = "What this person chose before:"
REQUEST = "Answer the next question in the way that this person would prefer."
# What more and less of an attribute is called.
WORDS = {"length": ("long", "short"), "bullets": ("in bullets", "in prose"), "formality": ("formal", "casual")}
CLEAR = 0.5  # of the choices in which an attribute differs, three in four go one way
_PROBES = ("What is this?", "Why")  # two questions that begin differently


def with_shots(prompt: Sequence[Message], shots: Sequence[Pair]) -> tuple[Message, ...]:
    """The prompt after the user's choices; without choices it is as it was."""
    if not shots:
        return tuple(prompt)
    said = "\n\n".join((OPENING, *(write_shot(shot) for shot in shots), REQUEST))
    if prompt and prompt[0].role == "system":
        return (Message("system", f"{said}\n\n{prompt[0].content}"), *prompt[1:])
    return (Message("system", said), *prompt)


def write_shot(shot: Pair) -> str:
    """One choice; what is preferred and what is not are written alike."""
    asked = shot.prompt[0].content if len(shot.prompt) == 1 else "\n".join(
        f"{message.role}: {message.content}" for message in shot.prompt
    )
    sides = (("Preferred", shot.chosen), ("Not preferred", shot.rejected))
    return "\n".join((f"Question: {asked}", *(f"{label}: {text}" for label, text in sides)))


def prefix_ids(tok: Any, shots: Sequence[Pair]) -> tuple[int, ...]:
    """The tokens that every prompt of this user begins with.

    Raises:
        InputError: a choice's text contains a control token.
    """
    from edgealign.data.encode import encode_prompt

    one, other = (encode_prompt(tok, with_shots((Message("user", probe),), shots)) for probe in _PROBES)
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    special = set(tok.all_special_ids) | {number for number, token in tok.added_tokens_decoder.items() if token.special}
    # A tokenizer never joins text over a special token, so the cut after one holds for every question.
    return one[: max((i + 1 for i in range(same) if one[i] in special), default=0)]


def fit_shots(shots: Sequence[Pair], fits: Callable[[Sequence[Pair]], bool]) -> tuple[Pair, ...]:
    """The newest shots for which `fits` holds: the oldest are left out one by one."""
    kept = tuple(shots)
    while kept and not fits(kept):
        kept = kept[1:]
    return kept


def digest_ids(ids: Sequence[int]) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def describe(choices: Sequence[Pair]) -> str:
    """What a user's choices say of their taste, as one sentence: the attributes that clearly go one way."""
    liked = []
    for name, attribute in ATTRIBUTES.items():
        gaps = [attribute(row.chosen) - attribute(row.rejected) for row in choices]
        more, less = (sum(sign * gap > 1e-9 for gap in gaps) for sign in (1, -1))
        if abs(more - less) > CLEAR * (more + less):
            liked.append(WORDS[name][more < less])
    if not liked:
        return "This person has no clear taste."
    return f"This person likes answers that are {', '.join(liked)}."


def without_description(text: str) -> str:
    """An answer without the sentence that `describe` put in front of it."""
    first, found, rest = text.partition("\n\n")
    return rest if found and first.startswith("This person ") else text
