"""Choices in the prompt of a model that nobody trained to read them: the baseline that costs no fit.

Answers to a question are ranked by their mean log-probability per token behind the person's choices (shots.py). What
does not fit in the model's context is left out, oldest choices first. All questions of a person are one tree, so that
the prefix is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgealign.data.forms import Pair
from edgealign.personalize.shots import fit_shots, prefix_ids, with_shots

if TYPE_CHECKING:
    from torch import Tensor

    from edgealign.train.layout import Tree
    from edgealign.train.scoring import Passes


def ranked_right(
    network: Any, tok: Any, passes: Passes, people: Sequence[tuple[Sequence[Pair], Sequence[Pair]]], k: int
) -> list[float]:
    """For each person with (choices, pairs asked): the share of pairs ranked as they did with k choices shown; a tie
    counts half."""
    from edgealign.train.scoring import score

    trees = []
    for own, asked in people:
        room = int(network.config.max_position_embeddings) - max(_longest(tok, row) for row in asked)
        shots = fit_shots(own[:k], partial(_fits, tok, room))
        trees.append(questions(tok, shots, asked))
    found = margins(score(network, trees, passes, label=f"ranking with {k} choices in the prompt"), trees)
    return [sum((m > 0) + 0.5 * (m == 0) for m in row) / len(row) for row in found]


def questions(tok: Any, shots: Sequence[Pair], asked: Sequence[Pair], said: Sequence[str] = ()) -> Tree:
    """One tree: the choices once, below them every question, below that both answers; `said` stands before these."""
    from edgealign.data.encode import encode_pair
    from edgealign.train.layout import Segment, Tree

    prefix = prefix_ids(tok, shots) if shots else ()
    segments = [Segment(prefix, (False,) * len(prefix))]
    for row, words in zip(asked, said or [""] * len(asked), strict=True):
        opening = f"{words}\n\n" if words else ""
        shown = replace(
            row, prompt=with_shots(row.prompt, shots), chosen=opening + row.chosen, rejected=opening + row.rejected
        )
        prompt, chosen, rejected = encode_pair(tok, shown)
        rest = prompt[len(prefix) :]
        segments.append(Segment(rest, (False,) * len(rest), 0))
        parent = len(segments) - 1
        segments += [Segment(ids, (True,) * len(ids), parent) for ids in (chosen, rejected)]
    return Tree(tuple(segments))


def _fits(tok: Any, room: int, shots: Sequence[Pair]) -> bool:
    return len(prefix_ids(tok, shots)) <= room


def _longest(tok: Any, row: Pair) -> int:
    """Tokens of a question with its longer answer."""
    from edgealign.data.encode import encode_pair

    prompt, chosen, rejected = encode_pair(tok, row)
    return len(prompt) + max(len(chosen), len(rejected))


def margins(values: Tensor, trees: Sequence[Tree], *, per_token: bool = True) -> list[list[float]]:
    """Of every question of each tree, how much better the chosen answer is: by mean log-probability, or by sum.

    Args:
        values: (sum of learned tokens,) log-probabilities or log-ratios, as `score` returns them.
    """
    import torch

    counts = [len(tree.segments[leaf].ids) for tree in trees for leaf in tree.leaves]
    sides = [float(part.mean() if per_token else part.sum()) for part in torch.split(values.double(), counts)]
    found, place = [], 0
    for tree in trees:
        n = len(tree.leaves)
        found.append([sides[place + i] - sides[place + i + 1] for i in range(0, n, 2)])
        place += n
    return found
