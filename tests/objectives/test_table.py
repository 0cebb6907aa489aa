from __future__ import annotations

import subprocess
import sys

import pytest

from edgealign.errors import RecipeError
from edgealign.objectives import loss
from edgealign.objectives.table import OBJECTIVES, check_beta, find, names


@pytest.mark.parametrize("key", OBJECTIVES)
def test_every_entry_is_complete_and_its_parts_exist(key):
    entry = OBJECTIVES[key]
    assert entry.key == key
    assert entry.reduction in loss.REDUCERS
    assert entry.reference in loss.REFERENCES
    assert entry.pair_term in loss.PAIR_TERMS
    assert "arXiv" in entry.citation
    assert entry.summary
    low, high = entry.beta_band
    assert 0 < low <= entry.beta <= high
    assert check_beta(entry, None) == entry.beta


def test_no_two_entries_share_a_name():
    every = [name for entry in OBJECTIVES.values() for name in (entry.key, *entry.aliases)]
    assert len(every) == len(set(every))


def test_length_normalised_dpo_with_beta_5_is_there_under_all_its_names():
    assert find("ln_dpo") is find("dpo_norm") is find("sigmoid_norm")
    assert find("ln_dpo").beta == 5.0
    assert find("ln_dpo").needs_reference
    assert "dpo" in names()


def test_an_unknown_objective_gets_a_suggestion():
    with pytest.raises(RecipeError, match=r"lndpo.*no such objective.*did you mean ln_dpo\?"):
        find("lndpo")


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 0.99])
def test_a_summed_beta_with_length_normalisation_is_refused(beta):
    with pytest.raises(RecipeError, match="ln_dpo takes log-ratios per token, where beta is between 1 and 10; use"):
        check_beta(find("ln_dpo"), beta)


@pytest.mark.parametrize("beta", [0.6, 1.0, 5.0])
def test_a_per_token_beta_with_summed_log_ratios_is_refused(beta):
    with pytest.raises(RecipeError, match="dpo takes log-ratios summed over tokens, where beta is between 0"):
        check_beta(find("dpo"), beta)


def test_the_refusal_names_the_objective_that_the_beta_fits():
    with pytest.raises(RecipeError, match="or use ln_dpo, whose log-ratios are on that scale"):
        check_beta(find("dpo"), 5.0)


@pytest.mark.parametrize(("key", "beta"), [("dpo", 0.01), ("dpo", 0.5), ("ln_dpo", 1.0), ("ln_dpo", 10.0)])
def test_the_ends_of_the_band_are_allowed(key, beta):
    assert check_beta(find(key), beta) == beta


def test_the_table_and_the_recipes_load_without_torch():
    code = (
        "import sys, edgealign.objectives.table, edgealign.train.recipes; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
