"""The report on held-out text: equal text for all, known numbers, honest intervals, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edgealign.artifact import open_artifact, publish
from edgealign.errors import InputError
from edgealign.evaluate import language
from edgealign.evaluate.language_report import at_tokens, short_number, spread
from edgealign.evaluate.learning_curve import learning_curve
from edgealign.evaluate.recipes import LanguageRecipe

WORDS = ("the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "it", "slept")


def write_texts(file, n, seed, words=40):
    rng = np.random.default_rng(seed)
    rows = [{"text": " ".join(rng.choice(WORDS, words)) + f" {seed} {i}."} for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return write_texts(folder / "train.jsonl", 60, 1), write_texts(folder / "valid.jsonl", 40, 2)


@pytest.fixture(scope="module")
def uniform(tiny_model, tmp_path_factory):
    """The tiny model with an embedding of zeros: every token has the same probability."""
    import shutil

    from safetensors.torch import load_file, save_file

    out = tmp_path_factory.mktemp("uniform") / "model"
    with publish(out, kind="model", format="huggingface", stage="test", recipe={}) as draft:
        for file in tiny_model.iterdir():
            if file.is_file() and file.name != "manifest.json":
                shutil.copy(file, draft.dir / file.name)
        weights = load_file(draft.dir / "model.safetensors")
        (name,) = [name for name in weights if "embed_tokens" in name]
        weights[name].zero_()
        save_file(weights, draft.dir / "model.safetensors", metadata={"format": "pt"})
        rows = [{"tokens": 0, "loss": 6.5, "seconds": 0}, {"tokens": 500, "loss": 6.3, "seconds": 1}]
        (draft.dir / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def report(uniform, tiny_model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    train, valid = texts
    recipe = LanguageRecipe(max_tokens=32, points=3, bootstrap=200, threads=1, must_beat="nothing")
    language.run(recipe, models={"uniform": uniform, "random": tiny_model}, data=[train], valid=[valid], out=out)
    return out


@pytest.fixture(scope="module")
def result(report):
    return json.loads((report / "result.json").read_text(encoding="utf-8"))


def test_a_model_without_knowledge_has_the_perplexity_of_its_vocabulary(result):
    row = result["models"]["uniform"]
    assert row["nats_per_token"] == pytest.approx(math.log(512), abs=1e-5)
    assert row["perplexity"] == pytest.approx(512, rel=1e-4)
    bits = result["held_out"]["tokens"] * 9 / result["held_out"]["bytes"]
    assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_all_of_a_whole_held_out_file_is_predicted(result, texts, tiny_model):
    from edgealign.models.load import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    rows = [json.loads(line)["text"] for line in texts[1].read_text(encoding="utf-8").splitlines()]
    assert result["held_out"]["documents"] == 40
    assert result["held_out"]["bytes"] == sum(len(row.encode()) for row in rows)
    ids = tokenizer(rows, add_special_tokens=False)["input_ids"]
    assert result["held_out"]["tokens"] == sum(map(len, ids))


def test_a_likelihood_is_that_of_the_model_s_own_forward_pass(tiny_model, texts):
    import torch

    from edgealign.data.read import read
    from edgealign.models.load import load_model, load_tokenizer

    recipe = LanguageRecipe(max_tokens=32, threads=1, valid_tokens=100)
    held = language._hold([row.text for row in read(texts[1]).rows], load_tokenizer(tiny_model), recipe)
    assert held.tokens == 100
    found, parameters = language._score(tiny_model, held, recipe)
    model = load_model(tiny_model)
    expected = []
    for ids in held.pieces:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids.tolist()])).logits[0].log_softmax(-1)
        expected += [-float(logits[i, token]) for i, token in enumerate(ids[1:].tolist())]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert parameters == sum(parameter.numel() for parameter in model.parameters())


def test_more_text_and_more_context_make_a_better_baseline(result):
    assert set(result["baselines"]) == {"unigram", "5-gram"}
    curve = result["baselines"]["5-gram"]["curve"]
    assert [point["tokens"] for point in curve] == [result["training"]["tokens"] >> n for n in (2, 1, 0)]
    assert curve[0]["nats_per_token"] > curve[-1]["nats_per_token"]
    loss = {name: row["nats_per_token"] for name, row in result["baselines"].items()}
    assert loss["5-gram"] < loss["unigram"] < math.log(512)


def test_differences_are_paired_and_their_intervals_hold_them(result):
    found = {(row["model"], row["other"]): row for row in result["differences"]}
    against = {(model, other) for model in ("uniform", "random") for other in ("unigram", "5-gram")}
    assert set(found) == {("uniform", "random"), *against}
    losses = {name: row["nats_per_token"] for part in ("models", "baselines") for name, row in result[part].items()}
    for (model, other), row in found.items():
        assert row["nats"] == pytest.approx(losses[other] - losses[model], abs=1e-9)
        assert row["low"] <= row["nats"] <= row["high"]


def test_the_report_is_an_artifact_with_table_and_picture(report, texts):
    artifact = open_artifact(report, kind="report")
    assert artifact.manifest.stage == "eval_language"
    assert {entry.role for entry in artifact.manifest.inputs} == {"model uniform", "model random", "data", "valid"}
    assert (report / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    table = (report / "table.md").read_text(encoding="utf-8")
    assert "| uniform | 1," in table
    assert "measured during training, on other held-out rows" in table  # the history names no held-out file
    assert "| random | 1," in table
    assert "not recorded" in table


@pytest.mark.parametrize(("must_beat", "wanted"), [("unigram", "unigram"), ("ngram", "5-gram")])
def test_a_model_that_knows_nothing_fails_against_the_baseline(tiny_model, texts, tmp_path, must_beat, wanted):
    recipe = LanguageRecipe(max_tokens=64, points=1, bootstrap=100, threads=1, must_beat=must_beat, valid_tokens=500)
    train, valid = texts
    artifact = language.run(recipe, models={"m": tiny_model}, data=[train], valid=[valid], out=tmp_path / "out")
    (check,) = artifact.manifest.checks
    assert check.name == f"m beats the {wanted}"
    assert not check.passed


def test_a_model_that_knows_the_text_passes():
    rows = [{"model": "m", "other": "5-gram", "nats": 0.2, "low": 0.1, "high": 0.3}]
    (check,) = language._checks({"differences": rows, "training": {"order": 5}}, LanguageRecipe())
    assert check.passed
    rows[0]["low"] = -0.001
    (check,) = language._checks({"differences": rows, "training": {"order": 5}}, LanguageRecipe())
    assert not check.passed


def test_a_curve_counts_as_this_text_s_only_if_its_model_names_the_same_file(tiny_model):
    from dataclasses import replace

    from edgealign.artifact import Input, open_model

    model = open_model(tiny_model)
    named = replace(model, manifest=replace(model.manifest, inputs=(Input("valid valid.jsonl", "dataset", "d1", "x"),)))
    assert learning_curve(named, {"d1"})["curve_on_this_text"]
    assert not learning_curve(named, {"d2"})["curve_on_this_text"]
    assert not learning_curve(model, set())["curve_on_this_text"]


def test_a_curve_goes_on_from_the_model_that_training_started_from(tmp_path):
    from edgealign.artifact import Input, publish

    def trained(name, rows, *parents, valid="d1"):
        inputs = [Input("valid valid.jsonl", "dataset", valid, "x"), *(parent.as_input("model") for parent in parents)]
        with publish(tmp_path / name, kind="model", format="hf", stage="pretrain", recipe={}, inputs=inputs) as draft:
            text = "".join(json.dumps({"tokens": tokens, "loss": loss}) + "\n" for tokens, loss in rows)
            (draft.dir / "history.jsonl").write_text(text, encoding="utf-8")
        return open_artifact(tmp_path / name)

    first = trained("first", [(0, 8.0), (100, 5.0)])
    second = trained("second", [(0, 5.1), (50, 4.5)], first)
    points = [(point["tokens"], point["nats_per_token"]) for point in learning_curve(second, {"d1"})["curve"]]
    assert points == [(0, 8.0), (100, 5.0), (150, 4.5)]
    elsewhere = trained("elsewhere", [(0, 5.1), (50, 4.5)], first, valid="d2")  # another held-out text: not one curve
    assert [point["tokens"] for point in learning_curve(elsewhere, {"d2"})["curve"]] == [0, 50]
    (tmp_path / "first").rename(tmp_path / "moved")
    assert [point["tokens"] for point in learning_curve(second, {"d1"})["curve"]] == [0, 50]


def test_few_documents_are_resampled_in_pieces(tiny_model, texts):
    from edgealign.data.read import read
    from edgealign.models.load import load_tokenizer

    rows = [row.text for row in read(texts[1]).rows]
    tokenizer = load_tokenizer(tiny_model)
    few = language._hold(rows[:5], tokenizer, LanguageRecipe(max_tokens=16))
    many = language._hold(rows, tokenizer, LanguageRecipe(max_tokens=16))
    assert few.resampled == "pieces of 16 tokens"
    assert len(set(few.unit.tolist())) == len(few.pieces)
    assert many.resampled == "documents"
    assert len(set(many.unit.tolist())) == 40
    sums = many.per_unit(np.ones(many.tokens))
    assert sums.sum() == many.tokens


def test_unusable_input_is_refused_with_its_reason(tiny_model, texts, tmp_path):
    train, valid = texts
    run = {"models": {"m": tiny_model}, "data": [train], "valid": [valid], "out": tmp_path / "out"}
    with pytest.raises(InputError, match="60 of 60 held-out documents are in --data"):
        language.run(LanguageRecipe(), **{**run, "valid": [train]})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="holds rows of the form pair, not text"):
        language.run(LanguageRecipe(), **{**run, "valid": [pairs]})
    with pytest.raises(InputError, match="give --model, --data and --valid"):
        language.run(LanguageRecipe(), **{**run, "models": {}})
    assert not (tmp_path / "out").exists()


def test_two_tokenizers_are_not_compared(tiny_model, texts, tmp_path):
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    other = tmp_path / "other"
    create.run(InitRecipe(shape="tiny", vocab_size=400, context=128), text=[], out=other)
    train, valid = texts
    with pytest.raises(InputError, match="another tokenizer"):
        language.run(
            LanguageRecipe(threads=1, valid_tokens=100), models={"a": tiny_model, "b": other}, data=[train],
            valid=[valid], out=tmp_path / "out",
        )  # fmt: skip


def test_a_damaged_history_is_an_error_that_names_it(uniform, tmp_path):
    import shutil

    from edgealign.artifact import open_model

    damaged = tmp_path / "damaged"
    shutil.copytree(uniform, damaged)
    (damaged / "manifest.json").unlink()
    for content in ('{"tokens": 1', "[]\n", '{"tokens": "many", "loss": 1}\n'):
        (damaged / "history.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=r"history\.jsonl: is damaged"):
            learning_curve(open_model(damaged), set())


def test_labels_keep_their_distance_and_their_order():
    assert spread([1.0, 1.01, 5.0], gap=0.5) == [1.0, 1.5, 5.0]
    assert spread([3.0, 1.0], gap=0.5) == [3.0, 1.0]


def test_a_curve_is_read_between_its_points_on_a_logarithmic_axis():
    curve = [{"tokens": 0, "nats_per_token": 9.0}, {"tokens": 100, "nats_per_token": 5.0},
             {"tokens": 10_000, "nats_per_token": 3.0}]  # fmt: skip
    assert at_tokens(curve, 1000) == pytest.approx(4.0)
    assert at_tokens(curve, 50) is None
    assert at_tokens(curve, 20_000) is None


def test_large_numbers_are_shortened():
    assert [short_number(value) for value in (950, 1500, 20e6, 2e9)] == ["950", "1.5k", "20M", "2B"]
