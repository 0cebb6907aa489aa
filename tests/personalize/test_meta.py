"""MRM: the step is a step of descent, and where nobody may move everybody stays at the start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgealign.personalize.heads import Choices
from edgealign.personalize.meta import SATURATION, Meta

RNG = np.random.default_rng(0)
HEAD = Meta(RNG.normal(size=(5, 3)), RNG.normal(size=3), np.ones(5))
OWN = Choices(*RNG.normal(size=(2, 7, 5)), np.zeros(7, dtype=np.int64))


def test_a_fit_is_one_gradient_step_of_the_users_loss():
    start = torch.from_numpy(HEAD.start).clone().requires_grad_()
    margins = torch.from_numpy(OWN.gaps @ HEAD.directions) @ start
    torch.nn.functional.softplus(-margins).sum().backward()
    expected = HEAD.start - start.grad.numpy() / (SATURATION + len(OWN))
    assert HEAD.fit(OWN) == pytest.approx(expected, rel=1e-5)


def test_without_choices_or_without_reach_a_user_is_the_start():
    assert HEAD.fit(OWN.take(slice(0))) == pytest.approx(HEAD.start)
    assert replace(HEAD, reach=1e-12).fit(OWN) == pytest.approx(HEAD.start)
