"""Thumbs as examples: an answer that was liked beside one that was not, each under its own prompt.

Objectives whose loss is a sum over the two sides (`Objective.of_sides`: KTO, BCO, APO-zero, NCA, SPPO) do not mind
which answers meet. Where there are more of one kind the other comes again in turn, so that both weigh the same; that is
the balance that KTO's authors advise (arXiv 2402.01306, section 4.2: weights times counts about alike).

Answers meet within blocks of prompts, so that whole blocks can be held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from edgealign.data.encode import EncodedThumb, Ids
from edgealign.errors import InputError
from edgealign.train.layout import NO_PARENT, Segment, Tree

BLOCKS = 40  # at most: a block is 2.5 % of the data
SMALLEST_BLOCK = 8  # thumbs


def pair_thumbs(thumbs: Sequence[EncodedThumb], labels: Sequence[bool], name: str) -> list[tuple[Tree, int]]:
    """Pairs of a liked and a disliked answer, and the place of the liked one.

    Raises:
        InputError: all answers of the source called `name` are of one kind.
    """
    kinds = {True: "liked", False: "disliked"}
    missing = [word for label, word in kinds.items() if label not in labels]
    if missing:
        raise InputError(name, f"has no {missing[0]} answer among {len(labels)}", "give thumbs of both kinds")
    found = []
    for block in _blocks(thumbs, labels):
        up, down = ([i for i in block if labels[i] is label] for label in (True, False))
        for turn in range(max(len(up), len(down))):
            liked, disliked = up[turn % len(up)], down[turn % len(down)]
            found.append((_tree(thumbs[liked], thumbs[disliked]), liked))
    return found


def prompts_of(tree: Tree) -> tuple[Ids, ...]:
    """The prompts that may not be on both sides of a split: a pair's own; both of two thumbs."""
    if tree.facts.get("thumbs"):
        return tree.segments[0].ids, tree.segments[2].ids
    return (tree.segments[0].ids,)


def digest(ids: Ids, seed: int) -> str:
    """A prompt's place in the order that a seed draws."""
    return hashlib.sha256(str(seed).encode() + b"/" + np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()


def _blocks(thumbs: Sequence[EncodedThumb], labels: Sequence[bool]) -> list[list[int]]:
    """Places in blocks that share no prompt and have both kinds; prompts in the order of their hash."""
    by_prompt: dict[Ids, list[int]] = {}
    for i, (prompt, _) in enumerate(thumbs):
        by_prompt.setdefault(prompt, []).append(i)
    size = max(SMALLEST_BLOCK, len(thumbs) / BLOCKS)
    blocks: list[list[int]] = [[]]
    for prompt in sorted(by_prompt, key=lambda ids: digest(ids, 0)):
        if len(blocks[-1]) >= size and len({labels[i] for i in blocks[-1]}) == 2:
            blocks.append([])
        blocks[-1] += by_prompt[prompt]
    if len(blocks) > 1 and len({labels[i] for i in blocks[-1]}) < 2:
        blocks[-2] += blocks.pop()
    return blocks


def _tree(liked: EncodedThumb, disliked: EncodedThumb) -> Tree:
    segments = [
        segment
        for place, (prompt, answer) in ((0, liked), (2, disliked))
        for segment in (
            Segment(tuple(prompt), (False,) * len(prompt), NO_PARENT),
            Segment(tuple(answer), (True,) * len(answer), place),
        )
    ]
    return Tree(tuple(segments), {"thumbs": True})
