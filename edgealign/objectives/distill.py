"""LFM2's distillation objective: decoupled, tempered, on the teacher's top K tokens (arXiv 2511.23404).

With T the teacher's K likeliest tokens at a position, P_T(T) the teacher's mass on them and P_S(T) the student's:

    L = KL( Bern(P_T(T)) || Bern(P_S(T)) )                       membership: no temperature
        + P_T(T) * KL( P_T(. | T)^(1/tau) || P_S(. | T)^(1/tau) )    inside T: tempered, both renormalised

and cross-entropy on the right token beside it. At tau = 1 this is the chain rule of the exact KL divergence between
teacher and student over {every member of T, the rest}. Only the part inside T is tempered, so the student is never
asked to spread mass over tokens of which the teacher's logits were not stored.

How sure: the form is what secondary sources report of the LFM2 report (checked against no PDF). They give K = 32 and
no value of tau, of the weights, nor of a tau^2 factor on the tempered part; tau = 1 and equal weights are our defaults.
Here there is no such factor, so that the loss is the formula as it is reported; the gradients of the tempered part then
shrink about as 1/tau^2 (arXiv 1503.02531, section 2), which a smaller `ce_weight` balances.

Shape legend: N positions, K tokens of the teacher's top.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEARLY_ALL = 1e-6  # mass outside T is at least this: a rounded sum of K probabilities may exceed 1


@dataclass(frozen=True)
class Distillation:
    """Per position, all (N,) and in nats: `loss` is what to minimise, the rest its parts."""

    loss: Tensor
    membership: Tensor
    inside: Tensor
    cross_entropy: Tensor


def topk_distillation(
    teacher: Tensor, student: Tensor, target: Tensor, *, temperature: float = 1.0, ce_weight: float = 0.5
) -> Distillation:
    """The loss of every position.

    Args:
        teacher: (N, K) the teacher's log-probabilities of its K likeliest tokens, normalised over all tokens.
        student: (N, K) the student's log-probabilities of the same tokens, normalised over all tokens.
        target: (N,) the student's log-probability of the token that came.
        temperature: tau; above 1 the teacher's preferences among unlikely tokens weigh more.
        ce_weight: share of cross-entropy; the distillation terms have the rest.
    """
    log_in_teacher, log_out_teacher = _membership(teacher)
    log_in_student, log_out_student = _membership(student)
    mass = log_in_teacher.exp()
    membership = mass * (log_in_teacher - log_in_student) + log_out_teacher.exp() * (log_out_teacher - log_out_student)
    inner_teacher = torch.log_softmax(teacher / temperature, -1)
    inner_student = torch.log_softmax(student / temperature, -1)
    inside = mass * (inner_teacher.exp() * (inner_teacher - inner_student)).sum(-1)
    cross_entropy = -target
    loss = (1.0 - ce_weight) * (membership + inside) + ce_weight * cross_entropy
    return Distillation(loss, membership, inside, cross_entropy)


def _membership(logps: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> log mass of the K tokens and of all others, (N,) each."""
    inside = torch.logsumexp(logps, -1)
    outside = (1.0 - inside.exp()).clamp(min=NEARLY_ALL)
    return inside, outside.log()
