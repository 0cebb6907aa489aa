"""The relative part of an objective: a margin, a function of the margin's excess, and a weight on each pair.

    x = beta (chosen - rejected) - margin,      loss = weight(pair_term(x))

All take and return (P,). Nothing learns through a margin or a weight: what they read is detached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from edgealign.objectives.pairs import Pairs
from edgealign.objectives.reduce import mean_tokens

Part = Callable[[Pairs], Tensor]
PairTerm = Callable[[Tensor, Pairs], Tensor]
Weight = Callable[[PairTerm, Tensor, Pairs], Tensor]

NEWTON_STEPS, SMALLEST_TAU, LARGEST_TAU = 5, 0.1, 5.0


# --- x: what the pair term is given


def scaled(pairs: Pairs) -> Tensor:
    """beta (chosen - rejected)."""
    return pairs.beta * pairs.delta


def unscaled(pairs: Pairs) -> Tensor:
    """chosen - rejected: the square terms have beta in their target."""
    return pairs.delta


def clamped_rejected(pairs: Pairs) -> Tensor:
    """beta (chosen - max(0, rejected)): below its reference the rejected side is pushed no further (MinorDPO).

    beta 0.1, chosen 10 ln 3, rejected -5: ln 3.
    """
    return pairs.beta * (pairs.chosen - pairs.rejected.clamp(min=0))


def two_betas(pairs: Pairs) -> Tensor:
    """beta chosen - beta_rejected rejected (3D-properties)."""
    return pairs.beta * pairs.chosen - pairs.settings["beta_rejected"] * pairs.rejected


def weighted(pairs: Pairs) -> Tensor:
    """beta (chosen - rejected) / w, w the weight of this objective among several (MODPO).

    w 0.5, beta (chosen - rejected) = ln 3 and the others' margin ln 3: 2 ln 3 - ln 3.
    """
    return pairs.beta * pairs.delta / pairs.settings["w"]


# --- margins, in units of x


def no_margin(pairs: Pairs) -> Tensor:
    return torch.zeros_like(pairs.chosen)


def constant(pairs: Pairs) -> Tensor:
    """gamma for every pair (SimPO). beta 2 and a gap of (ln 3 + 0.5) / 2 nats per token less gamma 0.5: ln 3."""
    return torch.full_like(pairs.chosen, pairs.settings["gamma"])


def shorter(pairs: Pairs) -> Tensor:
    """alpha for every token by which the chosen side is shorter (R-DPO): 0.05 x (8 - 12) = -0.2.

    Whoever maximises r - alpha n - beta KL has r = beta S + alpha n + const, so P(w > l) is s(beta D + alpha (n_w -
    n_l)): a choice that its length explains asks for less.
    """
    chosen, rejected = pairs.lengths
    return pairs.settings["alpha"] * (rejected - chosen)


def adaptive(pairs: Pairs) -> Tensor:
    """beta alpha z + gamma: z is how far the policy's gap exceeds the reference's, in deviations (alpha-DPO).

    z-scores are taken with mean and deviation of all earlier batches; the first has z = 0.
    """
    gap = reference_gap(pairs)
    count = pairs.state.get("count", torch.zeros(()))
    z = torch.zeros_like(gap)
    if float(count) > 1:
        z = (gap - pairs.state["mean"]) / (pairs.state["squares"] / count).sqrt().clamp(min=1e-8)
    return pairs.beta * pairs.settings["alpha"] * z + pairs.settings["gamma"]


def reference_gap(pairs: Pairs) -> Tensor:
    """(P,) detached: (chosen - rejected) of the policy minus that of the reference, per token."""
    assert pairs.reference is not None
    ours, theirs = (mean_tokens(each.values.detach(), each.mask) for each in (pairs.policy, pairs.reference))
    return (ours[0::2] - ours[1::2]) - (theirs[0::2] - theirs[1::2])


def by_judge(pairs: Pairs) -> Tensor:
    """The rows' own `margin`: by how much a judge prefers the chosen side."""
    margin: Tensor = pairs.column("margin").to(pairs.chosen)
    return margin


def other_objectives(pairs: Pairs) -> Tensor:
    """(1 - w) / w times the rows' `margin`, by which the other rewards prefer the chosen side (MODPO)."""
    w = pairs.settings["w"]
    return (1 - w) / w * by_judge(pairs)


# --- pair terms: (x) -> loss


def logistic(x: Tensor, pairs: Pairs) -> Tensor:
    """-log sigmoid(x), the Bradley-Terry negative log-likelihood (DPO, eq. 7). x = 0: ln 2; x = ln 3: ln 4/3."""
    return -logsigmoid(x)


def hinge(x: Tensor, pairs: Pairs) -> Tensor:
    """max(0, 1 - x) (SLiC). x = 0.4: 0.6; from x = 1 on: 0."""
    return torch.relu(1 - x)


def square(x: Tensor, pairs: Pairs) -> Tensor:
    """(x - 1/(2 beta))^2 (IPO, eq. 17). beta 0.01 asks for a gap of 50 nats: x = 10 costs 1600."""
    return (x - 0.5 / pairs.beta) ** 2


def exo(x: Tensor, pairs: Pairs) -> Tensor:
    """KL([s(x), s(-x)] || [1 - e, e]) (EXO, eq. 16). x = ln 3, e = 0.1: 0.75 ln (0.75/0.9) + 0.25 ln (0.25/0.1)."""
    epsilon = torch.as_tensor(pairs.settings["epsilon"], dtype=x.dtype, device=x.device)
    ahead, behind = logsigmoid(x), logsigmoid(-x)
    return ahead.exp() * (ahead - torch.log1p(-epsilon)) + behind.exp() * (behind - epsilon.log())


def discopop(x: Tensor, pairs: Pairs) -> Tensor:
    """Logistic and exponential loss, mixed by sigmoid(x / tau) (DiscoPOP, eq. 5). x = 0: (ln 2 + 1) / 2."""
    share = torch.sigmoid(x / pairs.settings["tau"])
    return -logsigmoid(x) * (1 - share) + torch.exp(-x) * share


# --- weights: how much of a pair's loss counts, and for which side


def whole(term: PairTerm, x: Tensor, pairs: Pairs) -> Tensor:
    return term(x, pairs)


def smoothed(term: PairTerm, x: Tensor, pairs: Pairs) -> Tensor:
    """(1 - e) f(x) + e f(-x): a share e of the labels is taken for flipped (cDPO).

    e = 0.1, f logistic, x = ln 3: 0.9 ln 4/3 + 0.1 ln 4.
    """
    epsilon = pairs.settings["epsilon"]
    return (1 - epsilon) * term(x, pairs) + epsilon * term(-x, pairs)


def smoothed_by_row(term: PairTerm, x: Tensor, pairs: Pairs) -> Tensor:
    """As `smoothed`, with the rows' own `epsilon` (RosePO)."""
    epsilon: Tensor = pairs.column("epsilon").to(x)
    return (1 - epsilon) * term(x, pairs) + epsilon * term(-x, pairs)


def unbiased(term: PairTerm, x: Tensor, pairs: Pairs) -> Tensor:
    """[(1 - e) f(x) - e f(-x)] / (1 - 2 e): its mean over flips of a share e is f(x) (rDPO).

    e = 0.1, f logistic, x = ln 3: (0.9 ln 4/3 - 0.1 ln 4) / 0.8.
    """
    epsilon = pairs.settings["epsilon"]
    return ((1 - epsilon) * term(x, pairs) - epsilon * term(-x, pairs)) / (1 - 2 * epsilon)


def adaptive_scale(term: PairTerm, x: Tensor, pairs: Pairs) -> Tensor:
    """tau f(x / tau) with each pair's own tau, the minimiser of tau f(x/tau) + (rho - ln 2) tau (Ada-DPO).

    Clear pairs get a large tau, unclear ones a small one. Five Newton steps within [0.1, 5]; tau is detached. Derived
    for the logistic loss.
    """
    tau = best_tau(x.detach(), pairs.settings["rho"], pairs.settings["least"], pairs.settings["most"])
    return tau * term(x / tau, pairs)


def best_tau(x: Tensor, rho: float, least: float = SMALLEST_TAU, most: float = LARGEST_TAU) -> Tensor:
    """(P,) by Newton's method from 1. With u = x / tau: h' = softplus(-u) + u s(-u) + rho - ln 2, h'' = u^2 s s' / tau.
    """
    tau: Tensor = torch.ones_like(x).clamp(least, most)
    for _ in range(NEWTON_STEPS):
        u = x / tau
        slope = -logsigmoid(u) + u * torch.sigmoid(-u) + rho - torch.log(torch.tensor(2.0, dtype=x.dtype))
        curvature = u**2 * torch.sigmoid(u) * torch.sigmoid(-u) / tau
        tau = (tau - slope / curvature.clamp(min=1e-8)).clamp(least, most)
    return tau


def by_reliability(term: PairTerm, x: Tensor, pairs: Pairs) -> Tensor:
    """w f(x) + (1 - w) f(-x), w the posterior that the label is right, given its annotator's reliability (RE-PO)."""
    w = label_posterior(term, x, pairs)
    return w * term(x, pairs) + (1 - w) * term(-x, pairs)


def label_posterior(term: PairTerm, x: Tensor, pairs: Pairs) -> Tensor:
    """(P,) detached: eta p / (eta p + (1 - eta)(1 - p)), p the model's probability of the label.

    eta 0.9 and p 0.5 give 0.9; eta 1 gives 1.
    """
    with torch.no_grad():
        right, wrong = torch.exp(-term(x, pairs)), torch.exp(-term(-x, pairs))
        p = right / (right + wrong)
        eta = reliability(pairs).to(p)
        return eta * p / (eta * p + (1 - eta) * (1 - p))


def reliability(pairs: Pairs) -> Tensor:
    """(P,) the reliability of each pair's annotator, as earlier batches have left it."""
    users = pairs.column("user").long()
    known = pairs.state.get("eta", torch.zeros(0))
    first = torch.full((max(int(users.max()) + 1 - len(known), 0),), pairs.settings["eta"])
    return torch.cat([known, first.to(known)]).to(users.device)[users]


INPUTS: Mapping[str, Part] = MappingProxyType(
    {
        "scaled": scaled, "unscaled": unscaled, "clamped_rejected": clamped_rejected, "two_betas": two_betas,
        "weighted": weighted,
    }
)  # fmt: skip
MARGINS: Mapping[str, Part] = MappingProxyType(
    {
        "none": no_margin, "constant": constant, "length": shorter, "adaptive": adaptive, "column": by_judge,
        "other_objectives": other_objectives,
    }
)  # fmt: skip
PAIR_TERMS: Mapping[str, PairTerm] = MappingProxyType(
    {"logistic": logistic, "hinge": hinge, "square": square, "exo": exo, "discopop": discopop}
)
WEIGHTS: Mapping[str, Weight] = MappingProxyType(
    {
        "none": whole, "smoothing": smoothed, "row_smoothing": smoothed_by_row, "robust": unbiased,
        "adaptive_scale": adaptive_scale, "reliability": by_reliability,
    }
)  # fmt: skip
