"""The absolute part of an objective: terms on one side of a pair, or on texts beside it, each with a weight.

Where a term reads more than the pair, its docstring names the columns: `Scores` of a third text come as the policy's
(`gold`) and, where it is compared, the reference's (`gold_reference`). All return (P,). With rewards
a = beta chosen, b = beta rejected and s the sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from edgealign.objectives.pairs import Pairs
from edgealign.objectives.reduce import mean_tokens, sum_tokens
from edgealign.objectives.scores import Scores
from edgealign.objectives.terms import Part


def rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(P,) each: a and b."""
    return pairs.beta * pairs.chosen, pairs.beta * pairs.rejected


# --- on the rewards of both sides


def apo_zero(pairs: Pairs) -> Tensor:
    """(1 - s(a)) + s(b): chosen up, rejected down (anchored APO, eq. 7). a = b = 0: 1; a = 2 ln 3, b = ln 3: 0.85."""
    a, b = rewards(pairs)
    return 1 - torch.sigmoid(a) + torch.sigmoid(b)


def apo_down(pairs: Pairs) -> Tensor:
    """s(a) + (1 - s(a - b)): both down, rejected more (anchored APO, eq. 8). a = 2 ln 3, b = ln 3: 0.9 + 0.25."""
    a, b = rewards(pairs)
    return torch.sigmoid(a) + 1 - torch.sigmoid(a - b)


def lfm2_delta(pairs: Pairs) -> Tensor:
    """-(s(a) - s(b)), the absolute term that the LFM2 report is said to have; apo_zero minus 1.

    a = 2 ln 3, b = ln 3: -0.15.
    """
    a, b = rewards(pairs)
    return torch.sigmoid(b) - torch.sigmoid(a)


def nca(pairs: Pairs) -> Tensor:
    """-ls(a) - 0.5 ls(-a) - 0.5 ls(-b): noise contrast, one sample of two (NCA).

    a = b = 0: 2 ln 2; a = 2 ln 3, b = ln 3: ln 10/9 + 0.5 ln 10 + 0.5 ln 4.
    """
    a, b = rewards(pairs)
    return -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)


def bco(pairs: Pairs) -> Tensor:
    """-ls(a - d) - ls(d - b), d the running mean of the rewards (BCO, without its density ratio). d starts at 0.

    a = 2 ln 3, b = d = ln 3: ln 4/3 + ln 2.
    """
    a, b = rewards(pairs)
    shift = pairs.state.get("shift", torch.zeros(())).to(a)
    return -logsigmoid(a - shift) - logsigmoid(shift - b)


def kto(pairs: Pairs) -> Tensor:
    """1 - s(a - k) + 1 - s(k - b), weighted; k = beta KL, estimated on answers to other prompts (KTO).

    Columns `unrelated`, `unrelated_reference`: an answer to another prompt under the pair's own; the batch's mean of
    its summed log-ratios, at least 0 and detached, is the estimate. a = 2 ln 3, b = k = ln 3: 0.25 + 0.5.
    """
    a, b = rewards(pairs)
    ours, theirs = (pairs.column(name) for name in ("unrelated", "unrelated_reference"))
    ratios = sum_tokens(ours.values - theirs.values, ours.mask)
    k = pairs.beta * ratios.mean().clamp(min=0).detach()
    return pairs.settings["desirable"] * (1 - torch.sigmoid(a - k)) + pairs.settings["undesirable"] * (
        1 - torch.sigmoid(k - b)
    )


def sppo(pairs: Pairs) -> Tensor:
    """(chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2: win rates of 1 and 0 (SPPO, hard labels).

    beta 0.1, chosen 6, rejected -3: 1 + 4.
    """
    target = 0.5 / pairs.beta
    return (pairs.chosen - target) ** 2 + (pairs.rejected + target) ** 2


def gpo(pairs: Pairs) -> Tensor:
    """(chosen - g/beta)^2 + (rejected + g/beta)^2, g the preference model's score of the pair, `score` (GPO).

    beta 0.1, g 0.3, chosen 6, rejected -3: 9 + 0.
    """
    target: Tensor = pairs.column("score").to(pairs.chosen) / pairs.beta
    return (pairs.chosen - target) ** 2 + (pairs.rejected + target) ** 2


# --- likelihood of a text


def nll_chosen_sum(pairs: Pairs) -> Tensor:
    """-log pi(chosen)."""
    return -sum_tokens(pairs.policy.values, pairs.policy.mask)[0::2]


def nll_chosen(pairs: Pairs) -> Tensor:
    """-log pi(chosen) per token."""
    return -mean_tokens(pairs.policy.values, pairs.policy.mask)[0::2]


def nll_gold(pairs: Pairs) -> Tensor:
    """-log pi(gold) per token; column `gold`, the best answer."""
    return _nll(pairs, "gold")


def nll_rationale(pairs: Pairs) -> Tensor:
    """-log pi(rationale) per token; column `rationale`, why the chosen answer is better, after both answers."""
    return _nll(pairs, "rationale")


def value(pairs: Pairs) -> Tensor:
    """log pi(calibration) of a text that the reference would say, `calibration`: added it is optimism, taken away
    (the offline form) pessimism (VPO)."""
    texts: Scores = pairs.column("calibration")
    return pairs.settings["sign"] * pairs.beta * sum_tokens(texts.values, texts.mask)


def advantage(pairs: Pairs) -> Tensor:
    """-(exp(A_w / alpha) log pi(chosen) + exp(A_l / alpha) log pi(rejected)) / 2 per token; columns `advantage` and
    `advantage_rejected`, a designer's reward minus its expectation (UPO)."""
    logp = mean_tokens(pairs.policy.values, pairs.policy.mask)
    columns: list[Tensor] = [pairs.column(name).to(logp) for name in ("advantage", "advantage_rejected")]
    a, b = (torch.exp(each / pairs.settings["alpha"]).detach() for each in columns)
    return -0.5 * (a * logp[0::2] + b * logp[1::2])


# --- staying near the reference


def base_anchor(pairs: Pairs) -> Tensor:
    """max(0, log ref - log pi) of what the base model itself answers, per token; columns `base`, `base_reference`."""
    ours, theirs = (pairs.column(name) for name in ("base", "base_reference"))
    return torch.relu(mean_tokens(theirs.values.detach(), theirs.mask) - mean_tokens(ours.values, ours.mask))


def token_kl_chosen(pairs: Pairs) -> Tensor:
    """KL(ref || pi) over the whole vocabulary, summed over the chosen side's tokens; column `token_kl` (S, L)."""
    return sum_tokens(pairs.column("token_kl"), pairs.policy.mask)[0::2]


def online_kl(pairs: Pairs) -> Tensor:
    """A score-function estimate of KL(pi || ref) on the policy's own samples, k for each pair (RLOO; HyPO).

    Columns `online` and `online_reference`, (P k, L) each. Its gradient is that of the KL divergence, its value is
    (r - mean of the others' r) log pi, whose mean is not the KL.
    """
    ours, theirs = (pairs.column(name) for name in ("online", "online_reference"))
    logp = sum_tokens(ours.values, ours.mask).view(len(pairs.chosen), -1)  # (P, k)
    ratio = (logp - sum_tokens(theirs.values, theirs.mask).view_as(logp)).detach()
    others = (ratio.sum(-1, keepdim=True) - ratio) / max(ratio.shape[1] - 1, 1)
    return ((ratio - others) * logp).mean(-1)


def _nll(pairs: Pairs, name: str) -> Tensor:
    texts: Scores = pairs.column(name)
    return -mean_tokens(texts.values, texts.mask)


ABSOLUTE: Mapping[str, Part] = MappingProxyType(
    {
        "apo_zero": apo_zero, "apo_down": apo_down, "lfm2_delta": lfm2_delta, "nca": nca, "bco": bco, "kto": kto,
        "sppo": sppo, "gpo": gpo, "nll_chosen": nll_chosen, "nll_chosen_sum": nll_chosen_sum, "nll_gold": nll_gold,
        "nll_rationale": nll_rationale, "value": value, "advantage": advantage, "base_anchor": base_anchor,
        "token_kl_chosen": token_kl_chosen, "online_kl": online_kl,
    }
)  # fmt: skip
