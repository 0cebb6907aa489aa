"""The fit itself: a small loop over a few pairs, exact and without a trainer's start-up.

A choice is one tree: a prompt with the chosen, the rejected and (for the anchor) the base's own answer, so that the
prompt is computed once. The addition starts at zero, so the first forward pass over a choice *is* the reference
pass; only choices that are first seen after the first step are scored beforehand.

Shape legend: C choices of a pass, S = 2 C or 3 C sequences, L longest sequence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from edgealign.errors import CheckFailed
from edgealign.objectives.loss import pair_loss
from edgealign.objectives.reduce import mean_tokens
from edgealign.objectives.scores import Ragged, pad_ragged
from edgealign.objectives.table import Objective
from edgealign.personalize.anchor import anchor_loss
from edgealign.personalize.recipes import LoraFitRecipe
from edgealign.progress import bar
from edgealign.train.layout import Batch, Tree, lay_out
from edgealign.train.logprobs import token_logprobs
from edgealign.train.scoring import tokens_of_pass
from edgealign.train.shortconv import kernel_width, tree_rows

ATTENTION_TOKENS = 6000.0  # tokens of a row at which attention costs as much as the layers' products, roughly


@dataclass(frozen=True)
class Step:
    """One optimizer step: mean values over its choices."""

    loss: float
    preference: float
    anchor: float
    chosen: float  # nats per token of the chosen answers
    margin: float  # what the pair term saw, before beta


def fit(
    model: Any,
    parameters: Sequence[Tensor],
    trees: Sequence[Tree],
    recipe: LoraFitRecipe,
    *,
    objective: Objective,
    beta: float,
) -> list[Step]:
    """Learn `parameters` (all at zero effect) from the choices; returns one row per step.

    Raises:
        CheckFailed: the loss stopped being a number.
    """
    order = random.Random(recipe.seed)
    batches = [
        [shuffled[i : i + recipe.batch_pairs] for i in range(0, len(trees), recipe.batch_pairs)]
        for shuffled in (order.sample(range(len(trees)), len(trees)) for _ in range(recipe.epochs))
    ]
    steps = [batch for epoch in batches for batch in epoch]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    width, tokens = kernel_width(model), tokens_of_pass(model, lora=True)
    device = parameters[0].device
    rows: list[Step] = []
    with tree_rows(model), bar(total=len(steps), label="fitting") as advance:
        reference = _score([i for i in range(len(trees)) if i not in steps[0]], model, trees, width, tokens)
        for chosen in steps:
            row = torch.zeros(len(fields(Step)), dtype=torch.float64)
            for group in passes([trees[i].n_tokens for i in chosen], tokens):
                indices = [chosen[i] for i in group.examples]
                batch = _batch(trees, indices, group.rows, width).to(device)
                logps = token_logprobs(model, batch)
                for i, part in zip(indices, _per_tree(logps.detach(), trees, indices), strict=True):
                    reference.setdefault(i, part)
                before = torch.cat([reference[i] for i in indices])
                leaves = len(trees[indices[0]].leaves)
                loss, parts = _loss(logps, before, batch, leaves, objective, beta, recipe)
                (loss / len(chosen)).backward()  # type: ignore[no-untyped-call]
                row += torch.tensor([float(loss.detach()), *parts], dtype=torch.float64)
            if not bool(row.isfinite().all()):
                raise CheckFailed("fit", "the loss is not a number any more", "use a lower --learning-rate")
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            rows.append(Step(*(row / len(chosen)).tolist()))
            advance(1, f"loss {rows[-1].loss:.3f}")
    return rows


@dataclass(frozen=True)
class Pass:
    """`examples` in the order of their trees in the batch; `rows` says which of them share a row."""

    examples: list[int]
    rows: list[list[int]]


def passes(n_tokens: Sequence[int], budget: int) -> list[Pass]:
    """Split examples into forward passes, and each pass into the rows that cost least.

    One long row has no padding but attention over everything; a row each has the least attention but padding up to
    the longest. Both are priced, with everything between.
    """
    by_length = sorted(range(len(n_tokens)), key=lambda i: (-n_tokens[i], i))
    groups: list[list[int]] = [[]]
    for i in by_length:
        if groups[-1] and sum(n_tokens[k] for k in groups[-1]) + n_tokens[i] > budget:
            groups.append([])
        groups[-1].append(i)
    made = []
    for group in groups:
        rows = min(_row_choices(group, n_tokens), key=lambda rows: (_cost(rows, n_tokens), len(rows)))
        made.append(Pass([i for row in rows for i in row], rows))
    return made


def _row_choices(group: Sequence[int], n_tokens: Sequence[int]) -> list[list[list[int]]]:
    """For each number of rows: the longest first, each into the row that is shortest so far."""
    choices = []
    for count in range(1, len(group) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        for i in group:
            min(rows, key=lambda row: sum(n_tokens[k] for k in row)).append(i)
        choices.append(rows)
    return choices


def _cost(rows: Sequence[Sequence[int]], n_tokens: Sequence[int]) -> float:
    longest = max(sum(n_tokens[i] for i in row) for row in rows)
    return len(rows) * longest * (1 + longest / ATTENTION_TOKENS)


def _batch(trees: Sequence[Tree], indices: Sequence[int], rows: Sequence[Sequence[int]], width: int) -> Batch:
    """The trees of `indices`, which stand row after row."""
    left = list(indices)
    laid: list[list[Tree]] = []
    for row in rows:
        laid.append([trees[i] for i in left[: len(row)]])
        left = left[len(row) :]
    return lay_out(laid, kernel=width)


def _score(
    indices: Sequence[int], model: Any, trees: Sequence[Tree], width: int, tokens: int
) -> dict[int, Tensor]:
    """Log-probabilities of the learned tokens, per example, before anything was learned."""
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for group in passes([trees[i].n_tokens for i in indices], tokens) if indices else []:
            members = [indices[i] for i in group.examples]
            batch = _batch(trees, members, group.rows, width).to(next(model.parameters()).device)
            logps = token_logprobs(model, batch)
            found.update(zip(members, _per_tree(logps, trees, members), strict=True))
    return found


def _per_tree(values: Tensor, trees: Sequence[Tree], indices: Sequence[int]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.split(values, [trees[i].n_learned for i in indices])
    return parts


def _loss(
    logps: Tensor, before: Tensor, batch: Batch, leaves: int, objective: Objective, beta: float, recipe: LoraFitRecipe
) -> tuple[Tensor, list[float]]:
    """Summed loss over the choices, and the sums of preference loss, anchor, chosen loss and margin."""
    policy, reference = (pad_ragged(Ragged(values, batch.sequence, batch.lengths)) for values in (logps, before))
    pairs = torch.arange(batch.n_sequences, device=logps.device) % leaves < 2
    result = pair_loss(objective, policy.select(pairs), reference.select(pairs), beta=beta)
    preference = result.loss.sum()
    anchor = preference.new_zeros(())
    if leaves > 2:
        own = ~pairs
        anchor = anchor_loss(policy.select(own), reference.select(own)).sum()
    liked = policy.select(torch.arange(batch.n_sequences, device=logps.device) % leaves == 0)
    chosen = -mean_tokens(liked.values, liked.mask).sum()
    parts = (preference, anchor, chosen, result.delta.sum())
    total = preference + recipe.anchor * anchor + recipe.chosen_nll * chosen
    return total, [float(part.detach()) for part in parts]
