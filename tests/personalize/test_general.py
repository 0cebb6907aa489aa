"""GPM: circles that no reward can express, and nothing lost where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from edgealign.personalize.general import General
from edgealign.personalize.heads import Choices
from edgealign.personalize.lore_head import Lore
from edgealign.personalize.planted import Population, band, curve


def rock_paper_scissors(users: int, each: int, way: int = 1, seed: int = 0) -> Choices:
    """Three answers as one-hot features; each beats the next, always."""
    first = np.random.default_rng(seed).integers(0, 3, users * each)
    items = np.eye(3)
    return Choices(items[first], items[(first + way) % 3], np.repeat(np.arange(users), each))


def test_no_reward_gets_more_than_two_thirds_of_a_circle_and_planes_get_all():
    seen, asked = rock_paper_scissors(20, 12), rock_paper_scissors(1, 300, seed=1)
    assert len(np.unique(asked.chosen, axis=0)) == 3
    linear = Lore.learn(seen, rank=2)
    best = max(np.mean(asked.gaps @ weights > 0) for weights in np.random.default_rng(0).normal(size=(500, 3)))
    nobody = linear.fit(asked.take(slice(0)))
    assert max(np.mean(linear.margins(nobody, asked) > 0), best) <= 2 / 3 + 0.05
    head = General.learn(seen, planes=2)
    assert np.mean(head.margins(head.fit(asked.take(slice(0))), asked) > 0) == 1.0


def test_a_user_who_goes_round_the_other_way_is_found_in_four_choices():
    both = [rock_paper_scissors(15, 12), rock_paper_scissors(15, 12, way=2, seed=1)]
    seen = Choices(*(np.concatenate([getattr(part, side) for part in both]) for side in ("chosen", "rejected")),
                   np.repeat(np.arange(30), 12))  # fmt: skip
    head = General.learn(seen, planes=2)
    for way in (1, 2):
        own = rock_paper_scissors(1, 60, way=way, seed=2)
        assert np.mean(head.margins(head.fit(own.take(slice(4))), own) > 0) > 0.95


def test_a_new_users_circle_is_learned_where_a_linear_head_learns_nothing():
    circle = Population("circle", attributes=3, features=12)
    seen, people = circle.draw(120, 24, part=0), circle.people(80, part=1, choices=8, held_out=100)
    found = curve(General.learn(seen), people, [0, 8])
    assert found[0].mean() > 0.65
    assert band(found[8] - found[0])[0] > 0
    assert abs(curve(Lore.learn(seen, rank=4), people, [8])[8].mean() - 0.5) < 0.03


def test_planes_lose_little_to_a_linear_head_where_rewards_are_planted():
    """Nothing before the first choice, 1.2 points after 8 (mean of three seeds)."""
    linear = Population("positive-0.1", seed=4, attributes=6, features=24)
    seen, people = linear.draw(150, 24, part=0), linear.people(100, part=1, choices=8, held_out=200)
    ours, theirs = (curve(kind.learn(seen), people, [0, 8]) for kind in (General, Lore))
    assert ours[0].mean() > theirs[0].mean() - 0.01
    assert ours[8].mean() > theirs[8].mean() - 0.03


def test_one_plane_of_a_direction_and_a_constant_is_bradley_terry():
    rng = np.random.default_rng(0)
    weights, pairs = rng.normal(size=5), Choices(*rng.normal(size=(2, 40, 5)), np.zeros(40, dtype=np.int64))
    zero = np.zeros((5, 1))
    head = General(weights[:, None], zero, np.zeros(1), np.ones(1), np.ones(1), np.eye(1), np.ones(5))
    assert head.margins(np.zeros(1, dtype=np.float32), pairs) == pytest.approx(pairs.gaps @ weights)
