"""The distillation objective: exact where it must be, tempered where it may be, stable where mass is all."""

from __future__ import annotations

import math

import pytest
import torch

from edgealign.objectives.distill import topk_distillation


def logps_of(seed, n=6, v=9):
    return torch.log_softmax(torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), -1)


def both(k, **options):
    teacher, student = logps_of(0), logps_of(1)
    ids = teacher.topk(k, -1).indices
    target = student[:, 3]
    return teacher, student, topk_distillation(teacher.gather(1, ids), student.gather(1, ids), target, **options)


def test_at_temperature_one_it_is_the_exact_divergence_over_the_top_k_and_the_rest():
    for k in (1, 3, 8):
        teacher, student, found = both(k, ce_weight=0.0)
        ids = teacher.topk(k, -1).indices
        expected = []
        for row in range(teacher.shape[0]):
            kept = ids[row].tolist()
            rest = [i for i in range(9) if i not in kept]
            p = [*teacher[row, kept].exp().tolist(), float(teacher[row, rest].exp().sum())]
            q = [*student[row, kept].exp().tolist(), float(student[row, rest].exp().sum())]
            expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        torch.testing.assert_close(found.loss, torch.tensor(expected, dtype=torch.float64))


def test_a_worked_example():
    """Teacher (1/2, 1/4 | 1/4), student (1/4, 1/4 | 1/2), tau 1: membership 3/4 ln(3/2) + 1/4 ln(1/2); inside
    3/4 (2/3 ln((2/3)/(1/2)) + 1/3 ln((1/3)/(1/2)))."""
    found = topk_distillation(
        torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log(), torch.tensor([0.25]).log(),
        ce_weight=0.25,
    )
    membership = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    inside = 0.75 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert float(found.membership) == pytest.approx(membership, abs=1e-6)
    assert float(found.inside) == pytest.approx(inside, abs=1e-6)
    assert float(found.loss) == pytest.approx(0.75 * (membership + inside) + 0.25 * math.log(4), abs=1e-6)


def test_temperature_changes_what_is_inside_and_never_the_membership():
    _, _, cold = both(4)
    _, _, warm = both(4, temperature=3.0)
    assert torch.equal(cold.membership, warm.membership)
    assert torch.equal(cold.cross_entropy, warm.cross_entropy)
    assert not torch.allclose(cold.inside, warm.inside, atol=1e-3)


def test_a_student_that_says_what_the_teacher_says_has_no_divergence():
    teacher = logps_of(0)
    ids = teacher.topk(4, -1).indices
    top = teacher.gather(1, ids)
    found = topk_distillation(top, top, teacher[:, 0], temperature=2.0, ce_weight=0.0)
    assert float(found.loss.abs().max()) < 1e-12
    other = top - torch.tensor([0.3, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert float(topk_distillation(top, other, teacher[:, 0], ce_weight=0.0).loss.min()) > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_agree_with_finite_differences(temperature):
    teacher = logps_of(0)
    ids = teacher.topk(4, -1).indices
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)

    def loss(values):
        student = torch.log_softmax(values, -1)
        return topk_distillation(
            teacher.gather(1, ids), student.gather(1, ids), student[:, 3], temperature=temperature, ce_weight=0.3
        ).loss.sum()

    assert torch.autograd.gradcheck(loss, (logits,))


def test_a_teacher_or_a_student_that_is_sure_gives_finite_numbers_and_gradients():
    sure = torch.tensor([[0.0, -40.0], [-1e-8, -17.0]])
    logits = torch.tensor([[60.0, 0.0, 0.0], [0.0, 60.0, 0.0]], requires_grad=True)
    student = torch.log_softmax(logits, -1)
    found = topk_distillation(sure, student[:, :2], student[:, 2], temperature=2.0)
    found.loss.sum().backward()
    assert torch.isfinite(found.loss).all()
    assert torch.isfinite(logits.grad).all()
