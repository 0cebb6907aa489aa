"""The parts of a preference objective, as pure functions of log-probabilities, and how they make a loss.

    delta = reduce(policy chosen - ref chosen) - reduce(policy rejected - ref rejected)
    loss  = pair_term(delta, beta)

The tables below hold the parts; `table.OBJECTIVES` holds the combinations that have a name.
Shape legend: P pairs, S = 2 P sequences in the order chosen, rejected; L longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from edgealign.errors import RecipeError
from edgealign.objectives.scores import Scores, split_pairs
from edgealign.objectives.table import Objective, check_beta

TIE_NATS = 1e-4  # less than this is rounding: the same model in forward passes of another size differs by as much

Reducer = Callable[[Tensor, Tensor], Tensor]
Reference = Callable[[Scores, "Scores | None"], Tensor]
PairTerm = Callable[[Tensor, float], Tensor]


def sum_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(S, L) -> (S,): summed over the tokens of a sequence."""
    return (values * mask).sum(-1)


def mean_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(S, L) -> (S,): averaged over the tokens of a sequence; an empty sequence has value 0."""
    return sum_tokens(values, mask) / mask.sum(-1).clamp(min=1)


def no_reference(policy: Scores, reference: Scores | None) -> Tensor:
    """(S, L) log-probabilities of the policy alone."""
    del reference
    return policy.values


def frozen_reference(policy: Scores, reference: Scores | None) -> Tensor:
    """(S, L) log pi/pi_ref per token, against scores taken before training."""
    if reference is None:
        raise RecipeError("reference", "this objective compares with a reference model", "give its log-probabilities")
    if reference.values.shape != policy.values.shape or not bool((reference.mask == policy.mask).all()):
        raise ValueError("policy and reference scores belong to different tokens")
    return policy.values - reference.values.detach()


def logistic(delta: Tensor, beta: float) -> Tensor:
    """(P,) -log sigmoid(beta delta), the Bradley-Terry negative log-likelihood (DPO eq. 7)."""
    return -torch.nn.functional.logsigmoid(beta * delta)


REDUCERS: Mapping[str, Reducer] = MappingProxyType({"sum": sum_tokens, "mean": mean_tokens})
REFERENCES: Mapping[str, Reference] = MappingProxyType({"none": no_reference, "frozen": frozen_reference})
PAIR_TERMS: Mapping[str, PairTerm] = MappingProxyType({"logistic": logistic})


@dataclass(frozen=True)
class PairLoss:
    """Per-pair values of one batch."""

    loss: Tensor  # (P,) differentiable
    delta: Tensor  # (P,) differentiable: what the pair term saw, before beta


def pair_loss(
    objective: Objective, policy: Scores, reference: Scores | None = None, *, beta: float | None = None
) -> PairLoss:
    """Loss per pair; `policy` and `reference` hold S = 2 P sequences, chosen before rejected, pair after pair."""
    beta = check_beta(objective, beta)
    if policy.values.shape[0] % 2:
        raise ValueError(f"{policy.values.shape[0]} sequences do not make pairs")
    ratios = Scores(REFERENCES[objective.reference](policy, reference), policy.mask)
    chosen, rejected = split_pairs(ratios)
    reduce = REDUCERS[objective.reduction]
    delta = reduce(chosen.values, chosen.mask) - reduce(rejected.values, rejected.mask)
    return PairLoss(PAIR_TERMS[objective.pair_term](delta, beta), delta)


def pair_metrics(objective: Objective, policy: Scores, reference: Scores | None) -> dict[str, Tensor]:
    """What a run logs, each (P,) and detached: margins, hits, lengths and a KL estimate.

    Margins come both summed and per token, because they can disagree: a longer completion has larger sums.
    `hit` ranks by log-ratios against the reference, `hit_free` by the policy alone, both in the objective's own
    reduction (a margin below TIE_NATS is half a hit, so that an untrained model scores one half). `kl` is the k3
    estimator, mean over tokens of exp(-r) - 1 + r with r = log pi/pi_ref (Schulman 2020). It is unbiased for
    tokens drawn from pi; these come from the data, so read it as a gauge of drift.
    """
    policy = policy.detach()
    reduce = REDUCERS[objective.reduction]
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
        metrics["hit"] = _hits(metrics[f"margin_{objective.reduction}"])
        metrics["ratio_chosen"] = mean_tokens(ratio_w.values, ratio_w.mask)
        k3 = torch.expm1(-ratios.values) + ratios.values
        both = mean_tokens(k3, ratios.mask)
        metrics["kl"] = 0.5 * (both[0::2] + both[1::2])
    return metrics


def _hits(margin: Tensor) -> Tensor:
    """(P,) 1 where the chosen side is ahead, 0 where it is behind, one half where neither is."""
    return 0.5 * (1.0 + torch.sign(margin) * (margin.abs() > TIE_NATS))
