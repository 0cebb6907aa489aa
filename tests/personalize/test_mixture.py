"""MiCRo: one head is Bradley-Terry, labels re-weight heads, a router reads the prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgealign.errors import UsageError
from edgealign.personalize.heads import Choices
from edgealign.personalize.lore import fit_population
from edgealign.personalize.mixture import RIDGE, Mixture, hedge
from edgealign.personalize.planted import Population, curve


@pytest.fixture(scope="module")
def seen():
    return Population("groups", attributes=4, features=10).draw(66, 20, part=0)


def test_one_head_is_plain_bradley_terry(seen):
    head = Mixture.learn(seen, heads=1)
    plain = fit_population(torch.from_numpy(seen.gaps / head.scale), RIDGE).numpy()
    assert head.heads[0] == pytest.approx(plain, abs=1e-3)
    state = head.fit(seen.take(slice(9)))
    assert head.margins(state, seen) == pytest.approx(seen.gaps / head.scale @ plain, abs=0.02)


def test_with_an_infinite_tau_labels_are_not_heard(seen):
    head = replace(Mixture.learn(seen, heads=3), tau=1e12)
    nobody, own = head.fit(seen.take(slice(0))), head.fit(seen.take(slice(16)))
    assert not nobody.any()
    assert head.margins(own, seen) == pytest.approx(head.margins(nobody, seen), abs=1e-6)


def test_hedge_weighs_heads_by_the_exponential_of_their_losses():
    margins = np.array([[2.0, -1.0], [0.5, 0.0]])
    losses = np.log1p(np.exp(-margins)).sum(0)
    state = hedge(margins, 2.0).astype(np.float64)
    assert np.exp(state[0] - state[1]) == pytest.approx(np.exp((losses[1] - losses[0]) / 2))


def test_heads_find_opposite_groups_and_eight_choices_tell_which(seen):
    head = Mixture.learn(seen, heads=4)
    people = Population("groups", attributes=4, features=10).people(44, part=1, choices=8, held_out=200)
    found = curve(head, people, [0, 8])
    few = np.arange(44) % 11 == 10
    assert found[0][few].mean() < 0.6
    assert found[8][few].mean() > found[0][few].mean() + 0.1
    assert found[8][~few].mean() > found[0][~few].mean() - 0.02


def contexts(count: int, seed: int) -> Choices:
    """The prompt says which of two features counts, in either direction."""
    rng = np.random.default_rng(seed)
    prompts = rng.choice([-1.0, 1.0], (count, 1))
    first, second = rng.normal(size=(2, count, 3))
    gap = first - second
    likes_first = np.where(prompts[:, 0] > 0, gap[:, 0], -gap[:, 1]) > 0
    return Choices(first, second, rng.integers(0, 20, count), prompts).turned(~likes_first)


def test_a_router_reads_the_prompt_and_labels_come_on_top():
    head = Mixture.learn(contexts(2000, 0), heads=2)
    asked = contexts(500, 1)
    nobody = head.fit(asked.take(slice(0)))
    plain = fit_population(torch.from_numpy(contexts(2000, 0).gaps), RIDGE).numpy()
    assert np.mean(head.margins(nobody, asked) > 0) > np.mean(asked.gaps @ plain > 0) + 0.1
    blind = Choices(asked.chosen, asked.rejected, asked.users)
    with pytest.raises(UsageError, match="learned with 1 prompt features"):
        head.margins(nobody, blind)
