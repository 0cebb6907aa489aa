"""Texts beside a pair that an objective reads, as further branches of the pair's tree.

    gold, base, calibration    another answer to the same prompt: one more branch
    rationale                  why the chosen answer is better: the answer to a question that quotes both, a tree of its
                               own in the same example
    others                     further answers of a ranked list, each with its grade: as many branches
    rejected_prompt            the rejected answer has a prompt of its own (DOVE)

    unrelated                  an answer to another prompt under this one (KTO), made of the pairs themselves

Sequences stay in the order chosen, rejected, then `Objective.texts`. Beside texts, `spans` are the tokens in which the
two answers differ (RRPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

from edgealign.data.encode import encode_answer, encode_prompt
from edgealign.data.forms import PAIR_NUMBERS, Message, Pair
from edgealign.errors import InputError
from edgealign.train.layout import NO_PARENT, Segment, Tree, pair

# The paper's own wording (arXiv 2407.14477) depends on its data; any fixed question serves.
WHY = "{prompt}\n\nAnswer 1: {chosen}\n\nAnswer 2: {rejected}\n\nWhy is answer 1 better than answer 2?"


def tree_of(
    tok: Any, row: Pair, ids: tuple[Sequence[int], ...], columns: Sequence[str], texts: Sequence[str], max_tokens: int
) -> Tree:
    """The tree of a pair whose prompt and answers are `ids`, with what `columns` and `texts` ask of its row.

    What the row lacks stays absent, in `facts` too.

    Raises:
        InputError: a text cannot be encoded, or its prompt leaves no room for it.
    """
    facts: dict[str, Any] = {"margin": row.margin, "user": row.user_id}
    facts |= {name: row.facts[name] for name in PAIR_NUMBERS if name in row.facts}
    tree = pair(*ids)
    if "rejected_prompt" in columns and "rejected_prompt" in row.facts:
        other = (Message("user", str(row.facts["rejected_prompt"])),)
        prompt = encode_prompt(tok, other)
        answer = encode_answer(tok, other, row.rejected, max_tokens=max_tokens)
        tree = Tree((*tree.segments[:2], *_asked(prompt, answer, place=2)))
        facts["rejected_prompt"] = True
    for name in texts:
        if name in row.facts:
            tree = Tree((*tree.segments, *_segments(tok, row, name, len(tree.segments), max_tokens)))
            facts[name] = True
    if "spans" in columns:
        facts["spans"] = differing(*(segment.ids for segment in tree.segments[1:3]))
    if "grades" in columns and "grades" in row.facts:
        tree = Tree((*tree.segments, *_others(tok, row, max_tokens)))
        facts["grades"] = row.facts["grades"]
    if "base" in facts:
        facts["base_reference"] = True
    return replace(tree, facts=facts)


def differing(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[bool, ...]:
    """For each token of the chosen, then of the rejected answer: is it outside of the blocks that both have in common?

    RRPO's data name the phrases that were altered; here a difference of the two finds them (`difflib`).
    """
    flags = [[True] * len(chosen), [True] * len(rejected)]
    for block in SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        for side, start in zip(flags, (block.a, block.b), strict=True):
            side[start : start + block.size] = [False] * block.size
    return (*flags[0], *flags[1])


def with_unrelated(trees: Sequence[Tree], max_tokens: int) -> list[Tree]:
    """Each pair with an answer to the next pair's prompt that is another one: its chosen and its rejected in turn.

    So the answers that estimate KTO's divergence are of the kind that it learns from (its code shifts the answers of a
    batch by one; here the neighbours are those of the file, whatever the batch).

    Raises:
        InputError: all pairs have the same prompt.
    """
    prompts = [tree.segments[0].ids for tree in trees]
    first_other = next((i for i, prompt in enumerate(prompts) if prompt != prompts[-1]), None)
    if first_other is None:
        reason = "have one prompt, and the objective compares with answers to another one"
        raise InputError(f"{len(trees)} pairs", reason, "give pairs of several prompts")
    following, found = first_other, []  # the next place with another prompt, from the last one backwards
    for i in reversed(range(len(trees))):
        following = following if i + 1 == len(trees) or prompts[i] == prompts[i + 1] else i + 1
        other = trees[following]
        ids = other.segments[other.leaves[i % 2]].ids[: max(1, max_tokens - len(prompts[i]))]
        found.append(Tree((*trees[i].segments, Segment(ids, (True,) * len(ids), 0)), trees[i].facts))
    return found[::-1]


def _segments(tok: Any, row: Pair, name: str, place: int, max_tokens: int) -> tuple[Segment, ...]:
    text = str(row.facts[name])
    if name != "rationale":
        answer = encode_answer(tok, row.prompt, text, max_tokens=max_tokens)
        return (Segment(answer, (True,) * len(answer), 0),)
    question = WHY.format(prompt=row.prompt[-1].content, chosen=row.chosen, rejected=row.rejected)
    asked = (*row.prompt[:-1], replace(row.prompt[-1], content=question))
    return _asked(encode_prompt(tok, asked), encode_answer(tok, asked, text, max_tokens=max_tokens), place=place)


def _others(tok: Any, row: Pair, max_tokens: int) -> tuple[Segment, ...]:
    """The answers of a ranked list that are neither chosen nor rejected.

    Raises:
        InputError: there is not one grade for each answer.
    """
    others, grades = row.facts.get("others", ()), row.facts["grades"]
    assert isinstance(others, tuple)
    assert isinstance(grades, tuple)
    if len(grades) != 2 + len(others):
        reason = f"{len(grades)} numbers for chosen, rejected and {len(others)} others"
        raise InputError("grades", reason, "give one for each answer, in this order")
    answers = [encode_answer(tok, row.prompt, str(text), max_tokens=max_tokens) for text in others]
    return tuple(Segment(answer, (True,) * len(answer), 0) for answer in answers)


def _asked(prompt: Sequence[int], answer: Sequence[int], *, place: int) -> tuple[Segment, Segment]:
    """A prompt that continues nothing, and its answer."""
    root = Segment(tuple(prompt), (False,) * len(prompt), NO_PARENT)
    return root, Segment(tuple(answer), (True,) * len(answer), place)
