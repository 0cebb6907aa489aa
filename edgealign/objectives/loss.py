"""A named objective on a batch of pairs: its parts put together, and what a run logs.

    found = pair_loss(find("ln_dpo"), policy, reference)
    found.loss                # (P,)
    pair_loss(find("lcpo_latent"), policy, reference, columns={"user": users}, state=found.state)

Shape legend: P pairs, S = 2 P sequences in the order chosen, rejected; L longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgealign.objectives.absolute import ABSOLUTE
from edgealign.objectives.contrast import CONTRASTS
from edgealign.objectives.pairs import Pairs, State
from edgealign.objectives.reduce import (
    REDUCERS,
    REFERENCES,
    Columns,
    Settings,
    column,
    frozen_reference,
    mean_tokens,
    same_tokens,
    sum_tokens,
)  # fmt: skip
from edgealign.objectives.scores import Scores, split_pairs
from edgealign.objectives.settings import read_settings
from edgealign.objectives.states import STATES, Seen, remember
from edgealign.objectives.table import Objective, check_beta
from edgealign.objectives.terms import INPUTS, MARGINS, PAIR_TERMS, WEIGHTS

TIE_NATS = 1e-4  # less than this is rounding: the same model in forward passes of another size differs by as much


@dataclass(frozen=True)
class PairLoss:
    """Per-pair values of one batch."""

    loss: Tensor  # (P,) differentiable
    delta: Tensor  # (P,) differentiable: chosen minus rejected in the objective's reduction, before beta
    state: State  # for the next batch; empty for most objectives
    seen: Seen  # of this batch, where several make a step: `states.remember`


def pair_loss(
    objective: Objective,
    policy: Scores,
    reference: Scores | None = None,
    *,
    beta: float | None = None,
    settings: Settings | None = None,
    columns: Columns | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> PairLoss:
    """Loss per pair; `policy` and `reference` hold S = 2 P sequences, chosen before rejected, pair after pair.

    Args:
        settings: numbers of the objective that are to be other ones than its defaults.
        columns: what else the rows hold, as the objective's `columns` say.
        state: what `pair_loss` returned for the batch before.

    Raises:
        RecipeError: a number cannot be, or the reference or a column is missing.
    """
    beta = check_beta(objective, beta)
    if objective.is_list:
        raise ValueError(f"{objective.key} is an objective of lists: lists.list_loss")
    if policy.values.shape[0] % 2:
        raise ValueError(f"{policy.values.shape[0]} sequences do not make pairs")
    numbers, given = read_settings(objective, settings), columns or {}
    for name in objective.columns:
        if name != "rejected_prompt":  # that one is in the tokens already
            column(given, name)
    if objective.needs_reference:
        same_tokens(policy, reference)
    ratios = Scores(REFERENCES[objective.reference](policy, reference, given, numbers), policy.mask)
    values = REDUCERS[objective.reduction](ratios, given, numbers)
    pairs = Pairs(values[0::2], values[1::2], policy, reference, given, beta, numbers, dict(state or {}))
    x = INPUTS[objective.input](pairs) - MARGINS[objective.margin](pairs).detach()
    loss = torch.zeros_like(pairs.chosen)
    if objective.pair_term is not None:
        loss = loss + numbers["omega"] * WEIGHTS[objective.weight](PAIR_TERMS[objective.pair_term], x, pairs)
    if objective.contrast is not None:
        loss = loss + numbers["omega"] * CONTRASTS[objective.contrast](pairs)
    for name, _ in objective.absolute:
        if numbers[f"weight_{name}"]:
            loss = loss + numbers[f"weight_{name}"] * ABSOLUTE[name](pairs)
    seen = _see(objective, pairs, x)
    return PairLoss(loss, pairs.delta, remember(objective, pairs.state, [seen], settings) if seen else {}, seen)


def _see(objective: Objective, pairs: Pairs, x: Tensor) -> Seen:
    if objective.state is None:
        return {}
    return STATES[objective.state].see(pairs, objective.pair_term or "logistic", x.detach())


def pair_metrics(objective: Objective, policy: Scores, reference: Scores | None) -> dict[str, Tensor]:
    """What a run logs, each (P,) and detached: margins, hits, lengths and a KL estimate.

    Margins come both summed and per token, because they can disagree: a longer completion has larger sums.
    `hit` ranks by log-ratios against the reference, `hit_free` by the policy alone, averaged where the objective
    averages and summed else (a margin below TIE_NATS is half a hit, so that an untrained model scores one half).
    `kl` is the k3 estimator, mean over tokens of exp(-r) - 1 + r with r = log pi/pi_ref (Schulman 2020). It is
    unbiased for tokens drawn from pi; these come from the data, so read it as a gauge of drift.
    """
    policy = policy.detach()
    reduce = mean_tokens if objective.per_token else sum_tokens
    chosen, rejected = split_pairs(policy)
    metrics = {
        "hit_free": _hits(reduce(chosen.values, chosen.mask) - reduce(rejected.values, rejected.mask)),
        "logp_chosen": mean_tokens(chosen.values, chosen.mask),
        "logp_rejected": mean_tokens(rejected.values, rejected.mask),
        "tokens_chosen": chosen.lengths,
        "tokens_rejected": rejected.lengths,
    }
    if reference is not None:
        ratios = Scores(frozen_reference(policy, reference), policy.mask)
        ratio_w, ratio_l = split_pairs(ratios)
        for name, part in (("sum", sum_tokens), ("mean", mean_tokens)):
            metrics[f"margin_{name}"] = part(ratio_w.values, ratio_w.mask) - part(ratio_l.values, ratio_l.mask)
        metrics["hit"] = _hits(metrics["margin_mean" if objective.per_token else "margin_sum"])
        metrics["ratio_chosen"] = mean_tokens(ratio_w.values, ratio_w.mask)
        k3 = torch.expm1(-ratios.values) + ratios.values
        both = mean_tokens(k3, ratios.mask)
        metrics["kl"] = 0.5 * (both[0::2] + both[1::2])
    return metrics


def _hits(margin: Tensor) -> Tensor:
    """(P,) 1 where the chosen side is ahead, 0 where it is behind, one half where neither is."""
    return 0.5 * (1.0 + torch.sign(margin) * (margin.abs() > TIE_NATS))
