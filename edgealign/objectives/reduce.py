"""From tokens to sequences: what a log-ratio is taken against, and how a sequence's tokens become one number.

Every reducer takes (S, L) values with their mask and returns (S,). Shape legend: P pairs, S = 2 P sequences in the
order chosen, rejected; L longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from edgealign.errors import RecipeError
from edgealign.objectives.scores import Scores

Columns = Mapping[str, Any]
Settings = Mapping[str, float]
Reducer = Callable[[Scores, Columns, Settings], Tensor]
Reference = Callable[[Scores, "Scores | None", Columns, Settings], Tensor]


def sum_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(S, L) -> (S,): summed over the tokens of a sequence."""
    return (values * mask).sum(-1)


def mean_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(S, L) -> (S,): averaged over the tokens of a sequence; an empty sequence has value 0."""
    return sum_tokens(values, mask) / mask.sum(-1).clamp(min=1)


def desensitised_weights(mask: Tensor, alpha: float) -> Tensor:
    """(S, L) 1 for the tokens that both sides of a pair have, `alpha` for the longer side's tail (LD-DPO, eq. 8).

    Lengths 3 and 5 with alpha 0.5: the second sequence's weights are 1, 1, 1, 0.5, 0.5. Lengths 2 and 3: of
    ratios 4, 4, 4 the sum is 10.
    """
    common = mask.sum(-1).view(-1, 2).min(-1).values.repeat_interleave(2)  # (S,)
    place = mask.long().cumsum(-1)  # 1 for a sequence's first learned token
    return torch.where(place <= common[:, None], 1.0, alpha).to(torch.get_default_dtype())


def _sum(scores: Scores, columns: Columns, settings: Settings) -> Tensor:
    return sum_tokens(scores.values, scores.mask)


def _mean(scores: Scores, columns: Columns, settings: Settings) -> Tensor:
    return mean_tokens(scores.values, scores.mask)


def _desensitised(scores: Scores, columns: Columns, settings: Settings) -> Tensor:
    weights = desensitised_weights(scores.mask, settings["alpha"]).to(scores.values)
    return sum_tokens(scores.values * weights, scores.mask)


def _masked(scores: Scores, columns: Columns, settings: Settings) -> Tensor:
    return sum_tokens(scores.values * column(columns, "token_weights").to(scores.values), scores.mask)


def _spans(scores: Scores, columns: Columns, settings: Settings) -> Tensor:
    return sum_tokens(scores.values, scores.mask & column(columns, "spans"))


def no_reference(policy: Scores, reference: Scores | None, columns: Columns, settings: Settings) -> Tensor:
    """(S, L) log-probabilities of the policy alone."""
    return policy.values


def frozen_reference(
    policy: Scores, reference: Scores | None, columns: Columns | None = None, settings: Settings | None = None
) -> Tensor:
    """(S, L) log pi/pi_ref per token, against scores taken before training (or with the adapter off)."""
    return policy.values - same_tokens(policy, reference).values.detach()


def several_references(policy: Scores, reference: Scores | None, columns: Columns, settings: Settings) -> Tensor:
    """(S, L) log pi minus the two references' closed form (MRPO), which is of whole sequences.

    With u, v the sequences' log-probabilities under the first and the second reference, u kept within v (1 +- eta):
    log ref = u + v - log(a exp(u) + (1 - a) exp(v)). Equal references give back one of them. `a` below 0 is adaptive:
    |d1| / (|d1| + |d2|), d the pair's gap under each. The correction is spread evenly over a sequence's tokens, so that
    any reducer that sums them sees it whole. The released code splits eta by side; here one eta serves both.
    """
    first = same_tokens(policy, reference)
    second = same_tokens(policy, column(columns, "second_reference"))
    u, v = (sum_tokens(each.values.detach(), each.mask) for each in (first, second))
    bounds = torch.stack([v * (1 - settings["eta"]), v * (1 + settings["eta"])])
    u = torch.minimum(torch.maximum(u, bounds.min(0).values), bounds.max(0).values)
    share = torch.full_like(u, settings["a"])
    if settings["a"] < 0:
        gaps = torch.stack([(side[0::2] - side[1::2]).abs() for side in (u, v)])  # (2, P)
        share = (gaps[0] / gaps.sum(0).clamp(min=1e-12)).repeat_interleave(2)
    log_share, log_rest = share.clamp(1e-12).log(), (1 - share).clamp(1e-12).log()
    effective = u + v - torch.logaddexp(log_share + u, log_rest + v)  # (S,)
    lengths = policy.mask.sum(-1).clamp(min=1)
    return (policy.values - (effective / lengths)[:, None]) * policy.mask


def previous_iterate(policy: Scores, reference: Scores | None, columns: Columns, settings: Settings) -> Tensor:
    """(S, L) log pi - share log ref - (1 - share) log previous (INPO, where the share is t/e): two anchors."""
    share = settings["share"]
    first = same_tokens(policy, reference).values.detach()
    last = same_tokens(policy, column(columns, "previous")).values.detach()
    return policy.values - share * first - (1 - share) * last


def column(columns: Columns, name: str) -> Any:
    """A column of the batch.

    Raises:
        RecipeError: the data have none of that name.
    """
    if columns.get(name) is None:
        raise RecipeError(name, "this objective reads that column and the data have none", f"give rows with {name}")
    return columns[name]


def same_tokens(policy: Scores, reference: Scores | None) -> Scores:
    """The reference's scores, which must be there and of the same tokens."""
    if reference is None:
        raise RecipeError("reference", "this objective compares with a reference model", "give its log-probabilities")
    if reference.values.shape != policy.values.shape or not bool((reference.mask == policy.mask).all()):
        raise ValueError("policy and reference scores belong to different tokens")
    return reference


REDUCERS: Mapping[str, Reducer] = MappingProxyType(
    {"sum": _sum, "mean": _mean, "ld": _desensitised, "masked": _masked, "spans": _spans}
)
REFERENCES: Mapping[str, Reference] = MappingProxyType(
    {
        "none": no_reference, "frozen": frozen_reference, "several": several_references,
        "previous": previous_iterate,
    }
)  # fmt: skip
