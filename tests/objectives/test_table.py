from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgealign.errors import RecipeError
from edgealign.objectives import absolute, contrast, lists, reduce, states, terms
from edgealign.objectives.entries import AMBIGUOUS, OBJECTIVES
from edgealign.objectives.page import render
from edgealign.objectives.table import CONFIDENCE, check_beta, find, names, read_settings, trainable
from edgealign.recipe import build
from edgealign.train.recipes import PreferenceRecipe


@pytest.mark.parametrize("key", OBJECTIVES)
def test_every_entry_is_complete_and_its_parts_exist(key):
    entry = OBJECTIVES[key]
    assert entry.key == key
    assert entry.reduction in reduce.REDUCERS
    assert entry.reference in reduce.REFERENCES
    assert entry.input in terms.INPUTS
    assert entry.margin in terms.MARGINS
    assert entry.weight in terms.WEIGHTS
    assert entry.confidence in CONFIDENCE
    assert entry.pair_term is None or entry.pair_term in terms.PAIR_TERMS
    assert entry.contrast is None or entry.contrast in contrast.CONTRASTS
    assert entry.state is None or entry.state in states.STATES
    assert entry.list_term is None or entry.list_term in lists.LIST_TERMS
    assert all(name in absolute.ABSOLUTE for name, _ in entry.absolute)
    assert entry.pair_term or entry.contrast or entry.absolute or entry.list_term
    assert "arXiv" in entry.citation
    assert entry.summary
    assert entry.formula
    low, high = entry.beta_band
    assert 0 < low <= entry.beta <= high
    assert check_beta(entry, None) == entry.beta
    assert read_settings(entry, None)["omega"] == 1.0


def test_every_part_is_used_by_an_entry():
    every = list(OBJECTIVES.values())
    used = {
        "reduce.REDUCERS": (reduce.REDUCERS, {entry.reduction for entry in every}),
        "reduce.REFERENCES": (reduce.REFERENCES, {entry.reference for entry in every}),
        "terms.INPUTS": (terms.INPUTS, {entry.input for entry in every}),
        "terms.MARGINS": (terms.MARGINS, {entry.margin for entry in every}),
        "terms.WEIGHTS": (terms.WEIGHTS, {entry.weight for entry in every}),
        "terms.PAIR_TERMS": (terms.PAIR_TERMS, {entry.pair_term for entry in every} - {None}),
        "contrast": (contrast.CONTRASTS, {entry.contrast for entry in every} - {None}),
        "states": (states.STATES, {entry.state for entry in every} - {None}),
        "lists": (lists.LIST_TERMS, {entry.list_term for entry in every} - {None}),
        "absolute": (absolute.ABSOLUTE, {name for entry in every for name, _ in entry.absolute}),
    }
    for name, (table, found) in used.items():
        assert set(table) == found, name


def test_no_two_entries_share_a_name():
    every = [name for entry in OBJECTIVES.values() for name in (entry.key, *entry.aliases)] + list(AMBIGUOUS)
    assert len(every) == len(set(every))


def test_length_normalised_dpo_with_beta_5_is_there_under_all_its_names():
    assert find("ln_dpo") is find("dpo_norm") is find("sigmoid_norm")
    assert find("ln_dpo").beta == 5.0
    assert find("ln_dpo").needs_reference
    assert "dpo" in names()


def test_an_unknown_objective_gets_a_suggestion():
    with pytest.raises(RecipeError, match=r"lndpo.*no such objective \(did you mean ln_dpo\?\)"):
        find("lndpo")


@pytest.mark.parametrize(("short", "keys"), AMBIGUOUS.items())
def test_a_short_name_that_several_methods_have_is_refused_with_their_keys(short, keys):
    with pytest.raises(RecipeError, match=f"{short}: is the short name of {len(keys)} methods") as caught:
        find(short)
    assert all(key in str(caught.value) for key in keys)
    assert all(find(key).key == key for key in keys)


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
    with pytest.raises(RecipeError, match="or use dpo, whose log-ratios are on that scale"):
        check_beta(find("ln_dpo"), 0.1)


@pytest.mark.parametrize(("key", "beta"), [("dpo", 0.01), ("dpo", 0.5), ("ln_dpo", 1.0), ("ln_dpo", 10.0)])
def test_the_ends_of_the_band_are_allowed(key, beta):
    assert check_beta(find(key), beta) == beta


def test_a_square_loss_of_means_refuses_a_target_that_no_model_reaches():
    with pytest.raises(RecipeError, match=r"asks for a gap of 1/\(2 beta\) = 50 nats per token.*use beta 0.25 or more"):
        check_beta(find("ipo_mean"), 0.01)
    assert check_beta(find("ipo_mean"), 0.25) == 0.25
    assert check_beta(find("ipo_sum"), 0.01) == 0.01


@pytest.mark.parametrize(
    ("key", "given", "words"),
    [
        ("exo_pair", {"epsilon": 0.0}, "epsilon 0: exo_pair takes a share of flipped labels, above 0 and below 0.5"),
        ("rdpo_robust", {"epsilon": 0.5}, "epsilon 0.5: rdpo_robust takes a share of flipped labels, from 0 and below"),
        ("discopop", {"tau": 0.0}, "tau 0: discopop divides by it"),
        ("simpo", {"gama": 0.3}, r"gama: is no setting of simpo \(did you mean gamma\?\)"),
    ],
)
def test_numbers_that_cannot_be_are_refused(key, given, words):
    with pytest.raises(RecipeError, match=words):
        read_settings(find(key), given)


def test_a_recipe_can_name_what_rows_of_pairs_are_enough_for():
    assert {"ln_dpo", "simpo", "modpo", "lcpo_latent", "tpo_triple", "mrpo", "lipo_lambda"} <= set(trainable())
    assert not {"kto", "rpo_relative", "sparse_po", "rrpo", "hypo_online_kl"} & set(trainable())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rpo", "is the short name of 4 methods; say rpo_regularized"), ("lndpo", r"did you mean ln_dpo\?"),
        ("kto", "reads kl, which rows of pairs do not hold"), ("rrpo", "reads spans, token_kl, which rows of pairs"),
    ],
)  # fmt: skip
def test_a_recipe_takes_aliases_and_says_what_is_wrong_with_a_name(name, words):
    assert build(PreferenceRecipe, {"objective": "sigmoid_norm"}, where="w").objective == "ln_dpo"
    with pytest.raises(RecipeError, match=words):
        build(PreferenceRecipe, {"objective": name}, where="w")


def test_the_table_and_the_recipes_load_without_torch():
    code = (
        "import sys, edgealign.objectives.entries, edgealign.train.recipes; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_is_what_the_table_says():
    page = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"
    assert page.read_text(encoding="utf-8") == render(), "python -m edgealign.objectives.page > docs/objectives.md"
