"""MaxMin: the smaller of two groups is heard, whatever its size, and rewards of any size do not overflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgealign.personalize.lore import fit_population
from edgealign.personalize.max_min import MaxMin, find_groups, softmax, weigh_groups
from edgealign.personalize.planted import Population, curve

PLANTED = Population("groups", attributes=4, features=10)
FEW = np.arange(44) % 11 == 10


@pytest.fixture(scope="module")
def seen():
    return PLANTED.draw(110, 24, part=0)


def test_the_worst_group_gains_by_max_min_and_the_majority_pays(seen):
    head = MaxMin.learn(seen, groups=2)
    people = PLANTED.people(44, part=1, choices=8, held_out=300)
    before = curve(head, people, [0])[0]
    plain = fit_population(torch.from_numpy(seen.gaps), 1e-2).numpy()
    single = np.array([np.mean(person.held_out.gaps @ plain > 0) for person in people])
    assert single[FEW].mean() < 0.4 < 0.85 < single[~FEW].mean()  # ten to one: the few are outvoted
    assert before[FEW].mean() > single[FEW].mean() + 0.1
    assert before[~FEW].mean() < single[~FEW].mean() - 0.1
    assert abs(before[FEW].mean() - before[~FEW].mean()) < 0.12
    own = curve(head, people, [8])[8]
    assert own[FEW].mean() > before[FEW].mean() + 0.1
    assert own[~FEW].mean() > before[~FEW].mean() + 0.1


def test_planted_groups_are_found_by_hard_em(seen):
    gaps, who = torch.from_numpy(seen.gaps), torch.from_numpy(seen.users)
    _, member = find_groups(gaps, who, 110, 2, torch.Generator().manual_seed(0))
    few = torch.arange(110) % 11 == 10
    other = member != member[0]
    assert (other == few).float().mean() > 0.97


def test_two_rewards_at_a_right_angle_are_worth_the_same_and_their_size_does_not_count():
    pairs = np.random.default_rng(0).normal(size=(4000, 2))
    for size in (1.0, 1e-6, 1e300):
        heads = np.diag([1.0, size])
        shared = softmax(weigh_groups(heads, pairs)) @ heads
        assert shared[1] / shared[0] == pytest.approx(1.0, abs=0.15)


def test_a_group_that_the_shared_reward_serves_anyway_has_no_weight():
    pairs = np.random.default_rng(0).normal(size=(4000, 3))
    heads = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])  # the third is between the others
    weights = softmax(weigh_groups(heads, pairs))
    shared = weights @ heads
    gains = (np.sign(pairs @ shared)[:, None] * (pairs @ heads.T)).mean(0) / (pairs @ heads.T).std(0)
    assert gains[2] > gains[0] == pytest.approx(gains[1], abs=0.05)
    assert gains[0] == pytest.approx(np.sqrt(2 / np.pi) * np.sqrt(0.5), abs=0.05)


def test_one_group_is_plain_bradley_terry(seen):
    head = MaxMin.learn(seen, groups=1)
    plain = fit_population(torch.from_numpy(seen.gaps / head.scale), 1e-2).numpy()
    assert head.margins(head.fit(seen.take(slice(5))), seen) == pytest.approx(seen.gaps / head.scale @ plain)
