"""LoRe behind the heads' interface says what lore.py says."""

from __future__ import annotations

import numpy as np
import pytest

from edgealign.personalize.lore import fit_users, learn_basis
from edgealign.personalize.lore_head import Lore, LoreReleased
from edgealign.personalize.planted import Population

SEEN = Population("signed-1", attributes=3, features=8).draw(40, 12, part=0)


def test_the_head_is_the_basis_and_its_map_fit():
    basis, head = learn_basis(SEEN.gaps, SEEN.users, rank=3), Lore.learn(SEEN, rank=3)
    own = SEEN.take(slice(12))
    weights = fit_users(basis.project(own.gaps)[None]).weights[0]
    assert head.fit(own) == pytest.approx(weights, rel=1e-5)
    expected = basis.reward(own.chosen, weights) - basis.reward(own.rejected, weights)
    assert head.margins(head.fit(own), own) == pytest.approx(expected, abs=1e-5)


def test_released_weights_are_a_softmax_and_nobody_has_the_usual_ones():
    head = LoreReleased.learn(SEEN, rank=3, steps=200)
    state = head.fit(SEEN.take(slice(12)))
    assert state.sum() == pytest.approx(1)
    assert (state > 0).all()
    assert np.array_equal(head.fit(SEEN.take(slice(0))), head.usual.astype(np.float32))
