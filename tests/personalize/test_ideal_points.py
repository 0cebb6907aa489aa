"""PAL: tastes that are points, prompts that turn directions, and a prior that few choices cannot run away from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgealign.errors import UsageError
from edgealign.personalize.heads import Choices
from edgealign.personalize.ideal_points import PalA, PalB, _linearise, _margins_of
from edgealign.personalize.lore_head import Lore
from edgealign.personalize.planted import Population, band, curve


def test_a_point_is_learned_where_a_direction_is_no_taste():
    targets = Population("targets", attributes=3, features=12)
    seen, people = targets.draw(150, 24, part=0), targets.people(80, part=1, choices=16, held_out=150)
    points, directions = (curve(kind.learn(seen), people, [0, 16]) for kind in (PalA, Lore))
    assert band(points[16] - directions[16])[0] > 0
    assert band(points[16] - points[0])[0] > 0


def _both(pairs: int = 12) -> list:
    rng = np.random.default_rng(0)
    features, prototypes = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    mean, scale = rng.normal(size=3), np.ones(5)
    choices = Choices(*rng.normal(size=(2, pairs, 5)), np.zeros(pairs, dtype=np.int64), rng.normal(size=(pairs, 2)))
    turned = PalB(features, prototypes, rng.normal(size=(2, 3, 4)), mean, scale, 3.0)
    return [(PalA(features, prototypes, mean, scale), choices), (turned, choices)]


@pytest.mark.parametrize("place", [0, 1], ids=["pal-a", "pal-b"])
def test_a_user_is_where_the_gradient_vanishes(place):
    head, choices = _both()[place]
    state = torch.from_numpy(head.fit(choices).astype(np.float64)).requires_grad_()
    weights = torch.softmax(torch.from_numpy(head.mean) + state, -1)
    margins = _margins_of(head._parts(choices), weights.expand(len(choices), 3))
    (torch.nn.functional.softplus(-margins).sum() + 0.5 * (state**2).sum()).backward()
    assert state.grad.numpy() == pytest.approx(np.zeros(3), abs=1e-2)
    assert state.detach().abs().max() > 0.1


@pytest.mark.parametrize("place", [0, 1], ids=["pal-a", "pal-b"])
def test_slopes_are_the_margins_derivatives(place):
    head, choices = _both()[place]
    parts, logits = head._parts(choices), torch.from_numpy(head.mean)
    expected = torch.func.jacrev(lambda raw: _margins_of(parts, torch.softmax(raw, -1).expand(len(choices), 3)))(logits)
    assert _linearise(parts, torch.softmax(logits, -1))[1].numpy() == pytest.approx(expected.numpy())


@pytest.mark.parametrize("place", [0, 1], ids=["pal-a", "pal-b"])
def test_a_tight_prior_or_no_choices_leave_everybodys_mix(place):
    head, choices = _both()[place]
    assert not head.fit(choices.take(slice(0))).any()
    assert np.abs(replace(head, precision=1e9).fit(choices)).max() < 1e-6


def test_one_prototype_is_the_same_for_everybody():
    seen = Population("signed-1", attributes=3, features=6).draw(20, 10, part=0)
    head = PalA.learn(seen, prototypes=1)
    own = head.fit(seen.take(slice(10)))
    assert np.array_equal(head.margins(own, seen), head.margins(np.zeros(1, dtype=np.float32), seen))


def test_prompts_turn_what_is_liked():
    rng = np.random.default_rng(0)

    def draw(count: int) -> Choices:
        prompts = rng.choice([-1.0, 1.0], (count, 1))
        first, second = rng.normal(size=(2, count, 3))
        likes_first = prompts[:, 0] * (first - second)[:, 0] > 0
        return Choices(first, second, np.arange(count) % 20, prompts).turned(~likes_first)

    seen, asked = draw(1000), draw(400)
    head = PalB.learn(seen, prototypes=2)
    nobody = np.zeros(2, dtype=np.float32)
    assert np.mean(head.margins(nobody, asked) > 0) > 0.75
    with pytest.raises(UsageError, match="learned with 1 prompt features"):
        head.fit(Choices(asked.chosen, asked.rejected, asked.users))
    blind = PalB.learn(Choices(seen.chosen, seen.rejected, seen.users), prototypes=2)
    assert np.mean(blind.margins(nobody, asked) > 0) < 0.6
