"""NP-BTL: the context and what is asked never meet, and padding is not read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgealign.personalize.heads import Choices
from edgealign.personalize.neural_process import (
    NeuralProcess,
    _encode,
    _start,
    pick_choices,
    split_context,
    stack_users,
)
from edgealign.personalize.planted import Population


@given(st.integers(1, 60), st.integers(0, 40), st.integers(1, 20), st.integers(0, 2**32))
def test_no_choice_is_context_and_target_at_once(count, longest, targets, seed):
    context, asked = split_context(np.random.default_rng(seed), count, longest, targets)
    assert not set(context) & set(asked)
    assert 0 <= len(context) <= longest
    assert 1 <= len(asked) <= targets
    assert set(context) | set(asked) <= set(range(count))


def test_contexts_of_every_length_are_drawn_none_included():
    rng = np.random.default_rng(0)
    assert {len(split_context(rng, 12, longest=10)[0]) for _ in range(500)} == set(range(11))


def test_padding_and_users_beside_one_are_not_read():
    rng = np.random.default_rng(0)
    weights, sizes = _start(6, seed=0), (9, 5, 3)
    people = [Choices(*rng.normal(size=(2, size, 6)), np.full(size, user)) for user, size in enumerate(sizes)]
    sides = [side.float() for side in stack_users(people, np.ones(6))]
    rows = [np.arange(9), np.array([4, 2]), np.arange(0)]
    together = _encode(weights, *pick_choices(sides, np.arange(3), rows))
    for user, own in enumerate(rows):
        picked = people[user].take(own)
        chosen, rejected = (torch.from_numpy(side).float()[None] for side in (picked.chosen, picked.rejected))
        alone = _encode(weights, chosen, rejected, torch.ones(1, len(own), dtype=torch.bool))
        assert together[user].numpy() == pytest.approx(alone[0].numpy(), abs=1e-5)


def test_labels_by_coin_teach_nothing_not_even_about_the_choices_that_were_read():
    """Were targets in the context, the encoder would learn to look them up: then these would be ranked right."""
    rng = np.random.default_rng(0)
    seen = Population("signed-1", attributes=4, features=8).draw(80, 20, part=0)
    seen = seen.turned(rng.random(len(seen)) < 0.5)
    head = NeuralProcess.learn(seen, steps=300)
    right = []
    for own in seen.by_user():
        state = head.fit(own.take(slice(4)))
        right.append(np.mean(head.margins(state, own.take(slice(4))) > 0))
    assert np.mean(right) < 0.6


def test_without_choices_everybody_is_the_same():
    seen = Population("positive-1", attributes=3, features=6).draw(20, 10, part=0)
    head = NeuralProcess.learn(seen, steps=50)
    empty = Choices(np.zeros((0, 6)), np.zeros((0, 6)), np.zeros(0, dtype=np.int64))
    assert np.array_equal(head.fit(empty), head.fit(seen.take(slice(0))))
    assert np.isfinite(head.fit(empty)).all()
