"""The numbers that the parts' docstrings work out: one pair, its ratios such that sigmoids are 1/2, 3/4 and 9/10."""

from __future__ import annotations

from math import log

import pytest
import torch

from edgealign.objectives import absolute, reduce, terms
from edgealign.objectives.loss import pair_loss
from edgealign.objectives.scores import Scores
from edgealign.objectives.table import find

L = log(3)  # its sigmoid is 3/4, that of 2 L 9/10
STILL, GOOD = ([0.0], [0.0]), ([20 * L], [10 * L])  # with beta 0.1: a = b = 0; a = 2 L, b = L
LN43 = log(4 / 3)  # what logistic(L) costs


def _sums(values):
    """One token a text."""
    return Scores(torch.tensor(values)[:, None], torch.ones(len(values), 1, dtype=torch.bool))



# key, log-ratios of the chosen and the rejected answer's tokens, what else is given, loss, docstring, its words
WORKED = [
    ("dpo", STILL, {}, log(2), terms.logistic, "x = 0: ln 2"),
    ("dpo", GOOD, {}, LN43, terms.logistic, "x = ln 3: ln 4/3"),
    ("hinge", ([6.0], [2.0]), {}, 0.6, terms.hinge, "x = 0.4: 0.6"),
    ("hinge", ([9.0, 3.0], [2.0]), {}, 0.0, terms.hinge, "from x = 1 on: 0"),
    ("ipo_sum", ([4.0, 8.0], [1.0, 1.0]), {"beta": 0.01}, 1600.0, terms.square, "x = 10 costs 1600"),
    ("ipo_mean", ([2.0, 4.0], [2.0]), {"beta": 0.25}, 1.0, None, ""),
    ("exo_pair", GOOD, {"settings": {"epsilon": 0.1}}, 0.75 * log(0.75 / 0.9) + 0.25 * log(0.25 / 0.1), terms.exo,
     "0.75 ln (0.75/0.9) + 0.25 ln (0.25/0.1)"),
    ("discopop", STILL, {}, (log(2) + 1) / 2, terms.discopop, "x = 0: (ln 2 + 1) / 2"),
    ("cdpo", GOOD, {}, 0.9 * LN43 + 0.1 * log(4), terms.smoothed, "0.9 ln 4/3 + 0.1 ln 4"),
    ("rdpo_robust", GOOD, {}, (0.9 * LN43 - 0.1 * log(4)) / 0.8, terms.unbiased, "(0.9 ln 4/3 - 0.1 ln 4) / 0.8"),
    ("minor_dpo", ([10 * L], [-5.0]), {}, LN43, terms.clamped_rejected, "chosen 10 ln 3, rejected -5: ln 3"),
    ("modpo", ([10 * L], [0.0]), {"columns": {"margin": torch.tensor([L])}}, LN43, terms.weighted, "2 ln 3 - ln 3"),
    ("simpo", ([-1.0], [-1.0 - (L + 0.5) / 2] * 2), {}, LN43, terms.constant, "less gamma 0.5: ln 3"),
    ("ln_dpo", ([2 * L / 5] * 2, [L / 5] * 7), {}, LN43, None, ""),
    ("rdpo_length", ([10 * L, 0.0, 0.0, 0.0], [2.0, 0.0]), {"settings": {"alpha": 0.1}}, LN43, None, ""),
    ("ld_dpo", ([20 * L, 0.0], [4 * L] * 3), {}, LN43, reduce.desensitised_weights, "of ratios 4, 4, 4 the sum is 10"),
    ("lfm2", ([2 * L / 5], [L / 5]), {"settings": {"weight_lfm2_delta": 0.2}}, LN43 - 0.2 * 0.15, absolute.lfm2_delta,
     "a = 2 ln 3, b = ln 3: -0.15"),
    ("apo_anchored_zero", STILL, {}, 1.0, absolute.apo_zero, "a = b = 0: 1"),
    ("apo_anchored_zero", GOOD, {}, 0.85, absolute.apo_zero, "a = 2 ln 3, b = ln 3: 0.85"),
    ("apo_anchored_down", GOOD, {}, 1.15, absolute.apo_down, "0.9 + 0.25"),
    ("nca", STILL, {"beta": 0.1}, 2 * log(2), absolute.nca, "a = b = 0: 2 ln 2"),
    ("nca", GOOD, {"beta": 0.1}, log(10 / 9) + 0.5 * log(10) + 0.5 * log(4), absolute.nca, "ln 10/9 + 0.5 ln 10"),
    ("bco", GOOD, {"state": {"shift": torch.tensor(L), "count": torch.tensor(2.0)}}, LN43 + log(2), absolute.bco,
     "b = d = ln 3: ln 4/3 + ln 2"),
    ("kto", GOOD, {"columns": {"unrelated": _sums([10 * L]), "unrelated_reference": _sums([0.0])}}, 0.75, absolute.kto,
     "b = k = ln 3: 0.25 + 0.5"),
    ("sppo_hard", ([6.0], [-3.0]), {"beta": 0.1}, 5.0, absolute.sppo, "chosen 6, rejected -3: 1 + 4"),
    ("gpo", ([6.0], [-3.0]), {"beta": 0.1, "columns": {"score": torch.tensor([0.3])}}, 9.0, absolute.gpo,
     "chosen 6, rejected -3: 9 + 0"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "ratios", "given", "loss", "part", "words"), WORKED)
def test_the_loss_is_the_number_that_the_docstring_works_out(key, ratios, given, loss, part, words):
    longest = max(map(len, ratios))
    values = torch.tensor([[*side, *[0.0] * (longest - len(side))] for side in ratios], dtype=torch.float64)
    mask = torch.arange(longest)[None, :] < torch.tensor([len(side) for side in ratios])[:, None]
    nothing = Scores(torch.zeros_like(values), mask)
    found = pair_loss(find(key), Scores(values, mask), nothing, **given).loss
    assert found.item() == pytest.approx(loss, abs=1e-6)
    if part is not None:
        assert words in " ".join(part.__doc__.split())
