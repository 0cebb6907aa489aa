"""Objectives on ranked lists: K answers to one prompt with a grade each.

    list_loss(find("lipo_lambda"), policy, grades, reference)     policy (G K, L), grades (G, K)

Shape legend: G lists, K answers in each, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from edgealign.objectives.reduce import REDUCERS, REFERENCES, Settings, sum_tokens
from edgealign.objectives.scores import Scores
from edgealign.objectives.settings import read_settings
from edgealign.objectives.table import Objective, check_beta

ListTerm = Callable[[Tensor, Tensor, Scores, float, Settings], Tensor]


def pro_ranking(values: Tensor, grades: Tensor, policy: Scores, beta: float, settings: Settings) -> Tensor:
    """Best against all worse, then the next against all worse, ...; the gaps of the grades scale the scores (PRO).

    sum over k of log(exp(P_k T_k) + sum over worse i of exp(P_i T_ik)) - P_k T_k, with T_ik = grade_k - grade_i and
    T_k the largest of them; plus sft (K - 1)^2 times the best answer's negative log-likelihood, as in the code.
    """
    order = grades.argsort(dim=-1, descending=True, stable=True)
    sorted_values, sorted_grades = values.gather(-1, order), grades.gather(-1, order).to(values)
    count = values.shape[-1]
    loss = values.new_zeros(len(values))
    for k in range(count - 1):
        gaps = sorted_grades[:, k, None] - sorted_grades[:, k + 1 :]
        own = sorted_values[:, k] * gaps.max(-1).values
        others = sorted_values[:, k + 1 :] * gaps
        loss = loss + torch.logsumexp(torch.cat([own[:, None], others], -1), -1) - own
    likelihood = sum_tokens(policy.values, policy.mask).view_as(values).gather(-1, order)[:, 0]
    return loss - settings["sft"] * (count - 1) ** 2 * likelihood


def lipo_lambda(values: Tensor, grades: Tensor, policy: Scores, beta: float, settings: Settings) -> Tensor:
    """Logistic loss of every ordered pair, weighted by what swapping the two would cost in DCG (LiPO-lambda).

    Gains 2^grade - 1, discounts log(1 + rank), ranks by the current scores. A list of two with weight 1 is DPO.
    """
    scores = beta * values
    ahead = (grades[:, :, None] > grades[:, None, :]).to(scores)
    return (ahead * dcg_weights(scores.detach(), grades) * -logsigmoid(_gaps(scores))).sum((-1, -2))


def dcg_weights(scores: Tensor, grades: Tensor) -> Tensor:
    """(G, K, K) |gain_i - gain_j| |1/D(rank_i) - 1/D(rank_j)|, D(rank) = log(1 + rank)."""
    gains = 2.0 ** grades.to(scores) - 1
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1
    discount = 1 / torch.log1p(rank.to(scores))
    return _gaps(gains).abs() * _gaps(discount).abs()


def exo_lists(values: Tensor, grades: Tensor, policy: Scores, beta: float, settings: Settings) -> Tensor:
    """KL(softmax(beta values) || softmax(grades / beta_reward)) over the list (EXO-rw)."""
    ours = torch.log_softmax(beta * values, -1)
    theirs = torch.log_softmax(grades.to(values) / settings["beta_reward"], -1)
    return (ours.exp() * (ours - theirs)).sum(-1)


def irpo_ranking(values: Tensor, grades: Tensor, policy: Scores, beta: float, settings: Settings) -> Tensor:
    """Each answer against all worse ones, weighted 1 / log2(1 + its rank by grade). The sums' form is unverified."""
    rank = grades.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1
    weight = 1 / torch.log2(1 + rank.to(values))
    ahead = (grades[:, :, None] > grades[:, None, :]).to(values)
    return (weight[:, :, None] * ahead * -logsigmoid(beta * _gaps(values))).sum((-1, -2))


def list_loss(
    objective: Objective,
    policy: Scores,
    grades: Tensor,
    reference: Scores | None = None,
    *,
    beta: float | None = None,
    settings: Settings | None = None,
) -> Tensor:
    """(G,) loss of each list.

    Args:
        policy: (G K, L), the answers of a list one after the other.
        grades: (G, K), more is better; equal grades are not compared.

    Raises:
        RecipeError: the objective is not one of lists, or its settings cannot be.
    """
    beta = check_beta(objective, beta)
    assert objective.list_term is not None, objective.key
    wanted = read_settings(objective, settings)
    ratios = Scores(REFERENCES[objective.reference](policy, reference, {}, wanted), policy.mask)
    values = REDUCERS[objective.reduction](ratios, {}, wanted).view(grades.shape)
    return LIST_TERMS[objective.list_term](values, grades, policy, beta, wanted)


def _gaps(values: Tensor) -> Tensor:
    """(G, K, K): value of i minus value of j."""
    return values[:, :, None] - values[:, None, :]


LIST_TERMS: Mapping[str, ListTerm] = MappingProxyType(
    {"pro_ranking": pro_ranking, "lipo_lambda": lipo_lambda, "exo_lists": exo_lists, "irpo_ranking": irpo_ranking}
)
