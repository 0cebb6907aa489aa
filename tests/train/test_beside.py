"""Columns beside a pair: each objective that reads one trains with it, and is another objective with another column."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from edgealign.artifact import open_artifact
from edgealign.data.encode import encode_answer, encode_prompt
from edgealign.data.forms import Message
from edgealign.errors import InputError, RecipeError, UsageError
from edgealign.models.load import load_model, load_tokenizer
from edgealign.objectives.table import find, trainable, trainable_name
from edgealign.train import preference, sft, stage
from edgealign.train.beside import WHY
from edgealign.train.examples import load_pairs
from edgealign.train.recipes import PreferenceRecipe, SftRecipe
from edgealign.train.scoring import Passes, score
from edgealign.train.tasks import PerToken

SMALL = {"threads": 1, "batch_size": 8, "tokens_per_pass": 512, "valid_fraction": 0.15, "precision": "float32"}
# objective -> the columns that it reads, and other values of one of them
COLUMNS = {
    "rosepo": ({"epsilon": 0.1}, {"epsilon": 0.4}),
    "gpo": ({"score": 0.4}, {"score": -0.4}),
    "upo_unified": ({"advantage": 0.5, "advantage_rejected": -0.5}, {"advantage": -0.5}),
    "tpo_triple": ({"gold": "It is surely so."}, {"gold": "Nobody knows."}),
    "bapo_base_anchor": ({"base": "It may be."}, {"base": "Nobody knows."}),
    "vpo": ({"calibration": "It may be."}, {"calibration": "Nobody knows."}),
    "rationale_dpo": ({"rationale": "It says what it is."}, {"rationale": "It does not shout."}),
    "dove": ({"rejected_prompt": "Tell me."}, {"rejected_prompt": "What is it, then?"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_picture(monkeypatch):
    monkeypatch.setattr(stage, "draw_curves", lambda rows, panels, file, title: file.write_bytes(b""))


def rows(**columns):
    return [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No {i}, no!", **columns} for i in range(24)]


def write(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return str(path)


def train(objective, model, given, out, **options):
    recipe = PreferenceRecipe(**{**SMALL, "epochs": 2, "learning_rate": 3e-4, "objective": objective, **options})
    data = write(out.with_suffix(".jsonl"), given)
    made = preference.run(recipe, model=model, data=[data], out=out)
    return made.meta, load_file(made.path / "model.safetensors")


@pytest.mark.parametrize("objective", COLUMNS)
def test_an_objective_learns_from_its_column_and_otherwise_from_another(objective, tiny_model, tmp_path):
    columns, other = COLUMNS[objective]
    meta, weights = train(objective, tiny_model, rows(**columns), tmp_path / "a")
    assert meta["steps"] == 6
    assert meta["after"]["loss"] < meta["before"]["loss"]
    _, again = train(objective, tiny_model, rows(**columns, unread="x"), tmp_path / "b")
    assert all(torch.equal(value, weights[name]) for name, value in again.items())
    _, changed = train(objective, tiny_model, rows(**{**columns, **other}), tmp_path / "c")
    assert any(not torch.equal(value, weights[name]) for name, value in changed.items())


RANKED = {"others": ["It may be.", "Who knows?"], "grades": [4, 1, 3, 2]}


@pytest.mark.parametrize("objective", ["pro_ranking", "lipo_lambda", "exo_lists", "irpo_ranking"])
def test_lists_of_several_lengths_are_learned_by_their_grades(objective, tiny_model, tmp_path):
    given = rows(**RANKED)
    given[::3] = [{**row, "others": ["It may be."], "grades": [3, 1, 2]} for row in given[::3]]
    meta, weights = train(objective, tiny_model, given, tmp_path / "a")
    assert meta["after"]["loss"] < meta["before"]["loss"]
    assert meta["after"]["hit_free"] >= meta["before"]["hit_free"]
    turned = [{**row, "grades": row["grades"][::-1]} for row in given]
    _, other = train(objective, tiny_model, turned, tmp_path / "b")
    assert any(not torch.equal(value, weights[name]) for name, value in other.items())
    with pytest.raises(InputError, match="grades: 3 numbers for chosen, rejected and 2 others; give one for each"):
        train(objective, tiny_model, rows(**{**RANKED, "grades": [1, 2, 3]}), tmp_path / "out")
    with pytest.raises(InputError, match=rf"grades: is missing in 24 of 24 pairs, and {objective} reads it"):
        train(objective, tiny_model, rows(), tmp_path / "out", valid_fraction=0.0)


def test_a_list_of_two_is_the_pair_that_it_is(tiny_model, tmp_path):
    """irpo_ranking of two answers is DPO: the best answer's weight is 1 / log2(1 + 1) = 1."""
    beta = find("irpo_ranking").beta
    _, listed = train("irpo_ranking", tiny_model, rows(grades=[1, 0]), tmp_path / "a")
    _, paired = train("dpo", tiny_model, rows(), tmp_path / "b", beta=beta)
    for name, value in listed.items():
        torch.testing.assert_close(value, paired[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("objective", COLUMNS)
def test_a_row_without_the_column_is_refused_before_anything_is_made(objective, tiny_model, tmp_path):
    columns, _ = COLUMNS[objective]
    given = rows(**columns)
    name = next(iter(columns))
    del given[0][name]
    expected = rf"{name}: is missing.* in 1 of \d+ pairs, and {objective} reads it; add the column"
    with pytest.raises(InputError, match=expected):
        train(objective, tiny_model, given, tmp_path / "out", valid_fraction=0.0)
    given[0][name] = ["no number", "no text"]
    with pytest.raises(InputError, match=expected):
        train(objective, tiny_model, given, tmp_path / "out", valid_fraction=0.0)
    assert not (tmp_path / "out").exists()


def test_a_share_of_flips_of_a_half_or_more_is_refused(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"epsilon 0.5: rosepo takes epsilon from 0 and below 0.5; 24 pairs"):
        train("rosepo", tiny_model, rows(epsilon=0.5), tmp_path / "out", valid_fraction=0.0)


def test_texts_are_scored_under_their_own_prompts_behind_the_pair(tiny_model, tmp_path, plain):
    model, tok = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    columns = {name: value for given, _ in COLUMNS.values() for name, value in given.items()}
    data = write(tmp_path / "p.jsonl", rows(**columns)[:2])
    texts = ("gold", "rationale")
    recipe = PreferenceRecipe(**{**SMALL, "valid_fraction": 0.0})
    (tree, _) = load_pairs([data], tok, recipe, columns=("rejected_prompt", *texts), texts=texts).train
    prompt, tell = (Message("user", "Say 0."),), (Message("user", "Tell me."),)
    question = WHY.format(prompt="Say 0.", chosen="It is 0.", rejected="No 0, no!")
    wanted = [
        (prompt, "It is 0."), (tell, "No 0, no!"), (prompt, "It is surely so."),
        ((Message("user", question),), "It says what it is."),
    ]  # fmt: skip
    passes = Passes.of(model, preference_precision(), tokens_per_pass=512)
    found = PerToken.of(score(model, [tree], passes), [tree]).values
    with torch.no_grad():
        apart = [plain(model, encode_prompt(tok, asked), encode_answer(tok, asked, said)) for asked, said in wanted]
    assert [len(tree.segments[leaf].ids) for leaf in tree.leaves] == [len(part) for part in apart]
    torch.testing.assert_close(found, torch.cat(apart), atol=2e-4, rtol=1e-4)


def preference_precision():
    from edgealign.train.precision import Precision

    return Precision("float32", "float32", False)


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    data = write(folder / "t.jsonl", [{"prompt": f"Say {i}.", "completion": f"Well, {i}."} for i in range(24)])
    made = sft.run(SftRecipe(**SMALL, learning_rate=5e-3), model=tiny_model, data=[data], out=folder / "model")
    return made.path


@pytest.mark.parametrize("objective", ["mrpo", "inpo_nash"])
def test_a_second_model_is_compared_with_too(objective, tiny_model, other_model, tmp_path):
    recipe = PreferenceRecipe(**SMALL, epochs=2, learning_rate=3e-4, objective=objective)
    data = [write(tmp_path / "p.jsonl", rows())]
    weights = {}
    for name, second in (("other", other_model), ("same", tiny_model)):
        made = preference.run(recipe, model=tiny_model, data=data, second=second, out=tmp_path / name)
        assert made.meta["after"]["loss"] < made.meta["before"]["loss"]
        assert open_artifact(second).digest in {each.digest for each in made.manifest.inputs}
        weights[name] = load_file(made.path / "model.safetensors")
    assert any(not torch.equal(value, weights["other"][name]) for name, value in weights["same"].items())
    plain = {"mrpo": "dpo", "inpo_nash": "ipo_sum"}[objective]  # what it is where both references are the same
    beta = find(objective).beta
    _, alone = train(plain, tiny_model, rows(), tmp_path / "plain", beta=beta)
    for name, value in alone.items():
        torch.testing.assert_close(weights["same"][name], value, atol=2e-5, rtol=1e-3)
    with pytest.raises(UsageError, match=f"{objective}: reads the scores of two models; give .*--second MODEL"):
        preference.run(recipe, model=tiny_model, data=data, out=tmp_path / "none")
    with pytest.raises(UsageError, match="--second: dpo compares with one model"):
        preference.run(
            PreferenceRecipe(**SMALL, objective="dpo"), model=tiny_model, data=data, second=tiny_model,
            out=tmp_path / "none",
        )  # fmt: skip


def test_a_second_model_of_another_vocabulary_is_refused(tiny_model, tmp_path):
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    text = write(tmp_path / "t.jsonl", [{"text": "Quick foxes jump over lazy dogs, again and again and again. " * 9}])
    stranger = create.run(InitRecipe(shape="tiny"), text=[text], out=tmp_path / "stranger").path
    recipe = PreferenceRecipe(**SMALL, objective="mrpo")
    with pytest.raises(InputError, match="has another vocabulary than --model"):
        preference.run(
            recipe, model=tiny_model, data=[write(tmp_path / "p.jsonl", rows())], second=stranger, out=tmp_path / "out"
        )


def test_what_cannot_be_trained_says_what_it_reads(monkeypatch):
    from types import MappingProxyType

    from edgealign.objectives import entries

    assert set(trainable()) == set(entries.OBJECTIVES)
    strange = replace(find("dpo"), key="strange", aliases=(), columns=("margin", "horoscope"))
    monkeypatch.setattr(entries, "OBJECTIVES", MappingProxyType({**entries.OBJECTIVES, "strange": strange}))
    with pytest.raises(RecipeError, match=r"objective strange: reads horoscope, which the trainer does not have"):
        trainable_name("strange")


MADE_HERE = ("kto", "rpo_relative", "sparse_po", "rrpo", "hypo_online_kl")


def altered(count=24):
    """Pairs whose answers differ in a word."""
    words = ("red", "old", "cold", "near", "loud")
    return [
        {"prompt": f"Say {i}.", "chosen": f"It is a {words[i % 5]} house.", "rejected": f"It is a {i} house."}
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("objective", MADE_HERE)
def test_what_the_trainer_makes_itself_is_learned_from(objective, lora, tiny_model, tmp_path):
    options = {"lora": lora, "learning_rate": 1e-2 if lora else 3e-4, "online_tokens": 8}
    meta, weights = train(objective, tiny_model, altered(), tmp_path / "a", **options)
    assert meta["after"]["loss"] < meta["before"]["loss"]
    _, again = train(objective, tiny_model, altered(), tmp_path / "b", **options)
    assert all(torch.equal(value, weights[name]) for name, value in again.items())
    _, other = train("dpo", tiny_model, altered(), tmp_path / "c", **options)
    assert any(not torch.equal(value, weights[name]) for name, value in other.items())
