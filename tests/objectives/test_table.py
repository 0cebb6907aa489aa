from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgealign.errors import RecipeError
from edgealign.objectives import absolute, contrast, lists, reduce, states, terms
from edgealign.objectives.entries import OBJECTIVES
from edgealign.objectives.loss import pair_loss
from edgealign.objectives.names import AMBIGUOUS, NOT_HERE
from edgealign.objectives.page import numbers_of, render
from edgealign.objectives.settings import PARTS, Setting, configure, read_settings, settings_of
from edgealign.objectives.table import CONFIDENCE, check_beta, find, names
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
    low, high = entry.band
    assert 0 < low <= entry.beta <= high
    assert check_beta(entry, None) == entry.beta
    assert read_settings(entry, None)["omega"] == 1.0
    assert all(setting.allows(setting.default) for setting in settings_of(entry).values())
    for letter, name in entry.letters.items():
        assert letter in entry.formula
        assert name in numbers_of(entry)
    for name, offered in entry.parts.items():
        table = terms.PAIR_TERMS if PARTS[name] == "pair_term" else absolute.ABSOLUTE
        assert set(offered) <= set(table)
        assert offered[0] == (entry.pair_term if PARTS[name] == "pair_term" else entry.absolute[0][0])


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
    every = [name for entry in OBJECTIVES.values() for name in (entry.key, *entry.aliases)]
    every += [*AMBIGUOUS, *NOT_HERE]
    assert len(every) == len(set(every))


def test_length_normalised_dpo_with_beta_5_is_there_under_all_its_names():
    assert find("ln_dpo") is find("dpo_norm") is find("sigmoid_norm")
    assert find("ln_dpo").beta == 5.0
    assert find("ln_dpo").needs_reference
    assert "dpo" in names()


def test_an_unknown_objective_gets_a_suggestion():
    with pytest.raises(RecipeError, match=r"lndpo.*no such objective \(did you mean ln_dpo\?\)"):
        find("lndpo")


@pytest.mark.parametrize(("short", "meant"), AMBIGUOUS.items())
def test_a_short_name_that_several_methods_have_is_refused_with_what_they_are(short, meant):
    count = len(meant.keys) + len(meant.others)
    with pytest.raises(RecipeError, match=f"{short}: is the short name of {count} methods") as caught:
        find(short)
    assert count > 1
    assert all(each in str(caught.value) for each in (*meant.keys, *meant.others))
    assert all(find(key).key == key for key in meant.keys)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("apo", "edgealign run accelerated"), ("TPO", "say tpo_triple: .*; or preference trees"),
        ("upo", "edgealign pairs filter --drop-unsure"), ("pro", "pro_ranking"), ("spo", "self-play"),
        ("lcpo", "lcpo_latent: .*; or length-controlled"), ("orpo", "is not here; use simpo"),
        ("cpo", "is not here; use simpo"), ("aot", "is not here; use TRL"), ("WPO", "is not here; use TRL"),
        ("grpo", "is not here; learns from rewards of answers drawn while training"),
    ],
)  # fmt: skip
def test_other_methods_are_refused_with_what_to_use_and_no_likeness_of_letters(name, words):
    with pytest.raises(RecipeError, match=words) as caught:
        find(name)
    assert "did you mean" not in str(caught.value)


def test_capitals_and_hyphens_do_not_matter_and_trls_names_are_known():
    assert find("LN-DPO").key == "ln_dpo"
    assert find("R-DPO").key == "rdpo_length"
    assert (find("sigmoid").key, find("nca_pair").key) == ("dpo", "nca")


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 0.99])
def test_a_summed_beta_with_length_normalisation_is_refused(beta):
    with pytest.raises(RecipeError, match="ln_dpo takes log-ratios per token, where beta is between 1 and 10; use"):
        check_beta(find("ln_dpo"), beta)


@pytest.mark.parametrize("beta", [0.6, 1.0, 5.0])
def test_a_per_token_beta_with_summed_log_ratios_is_refused(beta):
    with pytest.raises(RecipeError, match="dpo takes log-ratios summed over tokens, where beta is between 0"):
        check_beta(find("dpo"), beta)


def test_the_band_follows_the_reduction_also_of_an_objective_of_ones_own():
    averaged = replace(find("dpo"), reduction="mean")
    for beta in (0.1, None):
        with pytest.raises(RecipeError, match=r"beta 0.1: dpo takes .* per token, where beta is between 1 and 10; use "
                           "beta between 1 and 10, or use dpo, whose log-ratios are on that scale"):
            check_beta(averaged, beta)
    assert check_beta(averaged, 5.0) == 5.0
    summed = replace(find("ln_dpo"), reduction="sum")
    assert check_beta(summed, 0.1) == 0.1
    with pytest.raises(RecipeError, match=r"summed over tokens, where beta is between 0\.01 and 0\.5; use"):
        check_beta(summed, None)
    assert check_beta(find("tpo_triple"), 0.01) == 0.01  # its own band, as its source has it


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


@pytest.mark.parametrize("key", ["sppo_hard", "gpo"])
def test_absolute_squares_of_means_refuse_such_a_target_too(key):
    averaged = replace(find(key), reduction="mean")
    for beta in (0.01, 0.2):
        with pytest.raises(RecipeError, match=f"asks for log-ratios up and down of 1/.2 beta. = {0.5 / beta:.3g} nats "
                           "per token; a mean log-ratio moves by less than 2; use beta 0.25 or more, or sppo_hard"):
            check_beta(averaged, beta)
    assert check_beta(averaged, 0.25) == 0.25
    with pytest.raises(RecipeError, match=r"asks for a gap of 1/\(2 beta\) = 66.7 nats"):
        check_beta(replace(find("inpo_nash"), reduction="mean", beta_band=(0.001, 10.0)), None)


@pytest.mark.parametrize(
    ("key", "given", "words"),
    [
        ("exo_pair", {"epsilon": 0.0}, "epsilon 0: exo_pair takes a number above 0 and below 0.5; its default is"),
        ("rdpo_robust", {"epsilon": 0.5}, "epsilon 0.5: rdpo_robust takes a number from 0 and below 0.5"),
        ("discopop", {"tau": 0.0}, "tau 0: discopop takes a number above 0; its default is 0.05"),
        ("simpo", {"gama": 0.3}, r"gama: is no setting of simpo \(did you mean gamma\?\)"),
        ("simpo", {"gamma": math.nan}, "gamma nan: simpo takes a number from 0;"),
        ("simpo", {"gamma": math.inf}, "gamma inf: simpo takes a number from 0;"),
        ("lcpo_latent", {"eta": 2.0}, "eta 2: lcpo_latent takes a number above 0 and at most 1"),
        ("mrpo", {"eta": 2.0}, "eta 2: mrpo takes a number from 0 and below 1"),
        ("ld_dpo", {"alpha": -3.0}, "alpha -3: ld_dpo takes a number from 0 and at most 1"),
        ("rdpo_length", {"alpha": -3.0}, "alpha -3: rdpo_length takes a number from 0"),
        ("lfm2", {"omega": -1.0}, "omega -1: lfm2 takes a number from 0"),
        ("lfm2", {"weight_lfm2_delta": -0.2}, "weight_lfm2_delta -0.2: lfm2 takes a number from 0"),
        ("inpo_nash", {"share": 9.0}, "share 9: inpo_nash takes a number from 0 and at most 1"),
        ("ada_dpo", {"least": 2.0, "most": 1.0}, "most 1: is below least 2"),
        ("modpo", {"w": 1.5}, "w 1.5: modpo takes a number above 0 and at most 1"),
        ("apo_anchored_zero", {"omega": 0.5}, "omega: is no setting of apo_anchored_zero"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_one_line(key, given, words):
    with pytest.raises(RecipeError, match=words) as caught:
        read_settings(find(key), given)
    assert "\n" not in str(caught.value)


def test_the_ends_of_a_range_are_in_it_where_they_make_sense():
    setting = Setting(0.1, high=0.5, ends="[)")
    assert [setting.allows(value) for value in (0.0, 0.4999, 0.5, -1e-9, math.nan)] == [True, True, False, False, False]
    assert Setting(0.1, ends="(]").range == "above 0"
    assert read_settings(find("lcpo_latent"), {"eta": 1.0})["eta"] == 1.0


def test_lfm2s_parts_are_settings_and_no_other_objectives(scores):
    objective, numbers = configure(find("lfm2"), ["f=hinge", "gamma=0.5", "delta=apo_down", "weight_apo_down=0.2"])
    found = pair_loss(objective, scores(seed=1), scores(seed=2), settings=numbers)
    ratios = scores(seed=1).values - scores(seed=2).values
    means = 5.0 * ratios.sum(-1) / scores().lengths
    a, b = means[0::2], means[1::2]
    expected = torch.relu(1.5 - (a - b)) + 0.2 * (torch.sigmoid(a) + 1 - torch.sigmoid(a - b))
    assert torch.allclose(found.loss, expected)
    assert configure(find("lfm2"), []) == (find("lfm2"), {})
    for items, words in (
        (["f=hing"], r"f=hing: is none of what lfm2 offers \(did you mean hinge\?\); choose one of: logistic, hinge"),
        (["delta=kto"], "delta=kto: is none of what lfm2 offers; choose one of: lfm2_delta, apo_down"),
        (["gamma=much"], "gamma=much: is not NAME=NUMBER"),
        (["weight_lfm2_delta=1", "delta=apo_down"], "weight_lfm2_delta: is no setting of lfm2"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            configure(find("lfm2"), items)
    with pytest.raises(RecipeError, match="f=hinge: is not NAME=NUMBER"):
        configure(find("dpo"), ["f=hinge"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rpo", "is the short name of 4 methods; say rpo_regularized"), ("lndpo", r"did you mean ln_dpo\?"),
    ],
)  # fmt: skip
def test_a_recipe_takes_aliases_and_says_what_is_wrong_with_a_name(name, words):
    assert build(PreferenceRecipe, {"objective": "sigmoid_norm"}, where="w").objective == "ln_dpo"
    with pytest.raises(RecipeError, match=words):
        build(PreferenceRecipe, {"objective": name}, where="w")


def test_the_table_and_the_recipes_load_without_torch():
    code = (
        "import sys, edgealign.train.recipes; from edgealign.objectives import OBJECTIVES, find, read_settings; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_has_the_public_names_and_no_others():
    import edgealign.objectives as package

    assert {name: getattr(package, name).__name__ for name in package.__all__ if name != "OBJECTIVES"} == {
        name: name for name in package.__all__ if name != "OBJECTIVES"
    }
    assert package.OBJECTIVES is OBJECTIVES
    assert package.pair_loss is pair_loss
    with pytest.raises(AttributeError, match="has no attribute 'par_loss'"):
        package.par_loss  # noqa: B018


def test_the_page_is_what_the_table_says():
    page = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"
    assert page.read_text(encoding="utf-8") == render(), "python -m edgealign.objectives.page > docs/objectives.md"
