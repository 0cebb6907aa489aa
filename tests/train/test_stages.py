"""`sft.run` and `preference.run` end to end on a tiny model: what is published, and that it learned."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from edgealign.artifact import open_artifact
from edgealign.data.encode import template_hash
from edgealign.errors import InputError, RecipeError
from edgealign.models.load import load_model, load_tokenizer
from edgealign.train import preference, reference, sft, stage
from edgealign.train.recipes import PreferenceRecipe, SftRecipe

SMALL = {"threads": 1, "batch_size": 8, "tokens_per_pass": 256, "valid_fraction": 0.15}


@pytest.fixture
def real_picture():
    """Ask for this to have the curves drawn."""


@pytest.fixture(autouse=True)
def _quick_picture(request, monkeypatch):
    """Drawing takes longer than these runs."""
    if "real_picture" not in request.fixturenames:
        monkeypatch.setattr(stage, "draw_curves", lambda rows, panels, file, title: file.write_bytes(b""))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def turns(tmp_path):
    return write(tmp_path / "turns.jsonl", [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(24)])


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No {i}, no!"} for i in range(24)]
    return write(tmp_path / "pairs.jsonl", rows)


def test_sft_publishes_a_complete_model_that_learned(tiny_model, turns, tmp_path, real_picture):
    recipe = SftRecipe(**SMALL, epochs=4, learning_rate=5e-3)
    made = sft.run(recipe, model=tiny_model, data=[turns], out=tmp_path / "out")
    assert made.kind == "model"
    assert made.meta["after"]["loss"] < 0.6 * made.meta["before"]["loss"]
    assert made.meta["examples"]["train_examples"] == 21
    assert made.meta["examples"]["held_out_examples"] == 3
    assert made.meta["steps"] == 12
    assert made.meta["warnings"] == ["only 12 optimizer steps: fewer than 50 rarely change a model visibly"]
    tokenizer = load_tokenizer(made.path)
    assert made.manifest.template_hash == template_hash(tokenizer) == open_artifact(tiny_model).manifest.template_hash
    assert {entry.role: entry.digest for entry in made.manifest.inputs}["model"] == open_artifact(tiny_model).digest
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (made.path / name).read_bytes() == (tiny_model / name).read_bytes()
    assert load_model(made.path).config.use_cache is not False
    assert (made.path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    logged = [json.loads(line) for line in (made.path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(1, 13))
    names = {entry.path for entry in made.manifest.files}
    assert "tensorboard/events.out.tfevents.0.edgealign" in names
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_manifest_and_log_name_no_path_and_hold_no_text(tiny_model, pairs, tmp_path):
    made = preference.run(
        PreferenceRecipe(**SMALL, lora=True, save_adapter=True), model=tiny_model, data=[pairs], out=tmp_path / "out"
    )
    for file in made.path.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".jsonl", ".edgealign", ".png"):
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content, file
            assert str(tiny_model).encode() not in content, file
            if file.parts[-1] != "tokenizer.json":
                assert b"Say 3." not in content, file


@pytest.mark.parametrize(
    ("objective", "lora"),
    [
        ("ln_dpo", True),
        ("dpo", False),
        pytest.param("ln_dpo", False, marks=pytest.mark.slow),
        pytest.param("dpo", True, marks=pytest.mark.slow),
    ],
)
def test_preference_training_ranks_held_out_pairs_better(objective, lora, tiny_model, pairs, tmp_path):
    recipe = PreferenceRecipe(**SMALL, epochs=4, objective=objective, lora=lora, learning_rate=5e-3 if lora else 5e-4)
    made = preference.run(recipe, model=tiny_model, data=[pairs], out=tmp_path / "out")
    before, after = made.meta["before"], made.meta["after"]
    assert before["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert before["hit"] == 0.5
    assert after["loss"] < 0.5
    assert after["hit"] == 1.0
    assert after["margin_mean"] > 0
    assert made.meta["objective"] == objective
    assert made.meta["beta"] == {"ln_dpo": 5.0, "dpo": 0.1}[objective]
    assert (made.meta["trained_parameters"] < made.meta["parameters"]) == lora


@pytest.mark.parametrize(
    ("objective", "columns", "settings", "start"),
    [
        ("lcpo_latent", {"user_id": "ann"}, ("eta=0.8",), None), ("modpo", {"margin": 0.5}, ("w=0.7",), None),
        ("simpo", {}, (), None), ("lfm2", {}, ("f=hinge", "delta=apo_down", "weight_apo_down=0.5"), 1.5),
    ],
)  # fmt: skip
def test_objectives_read_the_columns_of_pairs_and_take_settings(
    objective, columns, settings, start, tiny_model, tmp_path
):
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No {i}, no!", **columns} for i in range(24)]
    recipe = PreferenceRecipe(**SMALL, epochs=2, objective=objective, settings=settings, learning_rate=5e-4)
    made = preference.run(recipe, model=tiny_model, data=[write(tmp_path / "p.jsonl", rows)], out=tmp_path / "out")
    assert made.meta["objective"] == objective
    assert made.meta["after"]["hit_free"] > made.meta["before"]["hit_free"] - 1e-9
    assert made.meta["after"]["loss"] < made.meta["before"]["loss"]
    assert start is None or made.meta["before"]["loss"] == pytest.approx(start, abs=1e-3)


def test_a_column_that_an_objective_reads_must_be_in_every_row(tiny_model, tmp_path):
    rows = [{"prompt": f"Say {i}.", "chosen": "Yes.", "rejected": "No!", **({"margin": 1.0} if i else {})}
            for i in range(24)]  # fmt: skip
    data = [write(tmp_path / "p.jsonl", rows)]
    recipe = PreferenceRecipe(**{**SMALL, "valid_fraction": 0.0}, objective="modpo")
    with pytest.raises(InputError, match=r"margin: is missing in 1 of .* pairs, and modpo reads it; add the column"):
        preference.run(recipe, model=tiny_model, data=data, out=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"gamma: is no setting of modpo"):
        preference.run(PreferenceRecipe(**SMALL, objective="modpo", settings=("gamma=1",)), model=tiny_model,
                       data=data, out=tmp_path / "out")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name != "p.jsonl"] == []


def test_a_lora_is_merged_into_the_published_weights(tiny_model, pairs, tmp_path):
    """Base + LoRA, put together by peft from the saved adapter, gives the published model's logits."""
    from peft import PeftModel

    recipe = PreferenceRecipe(**SMALL, lora=True, save_adapter=True, learning_rate=5e-3)
    made = preference.run(recipe, model=tiny_model, data=[pairs], out=tmp_path / "out")
    ids = torch.tensor([load_tokenizer(made.path)("It is 3, no?")["input_ids"]])
    adapted = PeftModel.from_pretrained(load_model(tiny_model), made.path / "lora")
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        base = load_model(tiny_model)(input_ids=ids).logits
        got = load_model(made.path)(input_ids=ids).logits
    assert (got - wanted).abs().max() < 1e-4
    assert (got - base).abs().max() > 0.01
    assert set(load_file(made.path / "model.safetensors")) == set(load_file(tiny_model / "model.safetensors"))


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(tiny_model, turns, tmp_path):
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = sft.run(SftRecipe(**SMALL, seed=seed), model=tiny_model, data=[turns], out=tmp_path / name)
        digests.append(next(e.sha256 for e in made.manifest.files if e.path == "model.safetensors"))
    assert digests[0] == digests[1] != digests[2]


def test_bfloat16_training_publishes_float32_weights_that_learned(tiny_model, pairs, turns, tmp_path):
    made = sft.run(
        SftRecipe(**SMALL, precision="bfloat16", learning_rate=5e-3), model=tiny_model, data=[turns], out=tmp_path / "s"
    )
    tuned = preference.run(
        PreferenceRecipe(**SMALL, precision="bfloat16", lora=True, learning_rate=5e-3), model=made.path, data=[pairs],
        out=tmp_path / "p",
    )
    assert made.meta["precision"] == tuned.meta["precision"] == "bfloat16"
    assert made.meta["after"]["loss"] < made.meta["before"]["loss"]
    assert tuned.meta["after"]["hit"] > 0.9
    base, merged = load_file(made.path / "model.safetensors"), load_file(tuned.path / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.float32}
    untouched = [name for name in base if "norm" in name or "embed" in name]
    assert untouched
    assert all(torch.equal(base[name], merged[name]) for name in untouched), "the base was rounded"


def test_weights_are_saved_in_the_type_of_the_input_or_the_one_asked_for(tiny_model, turns, tmp_path):
    made = sft.run(SftRecipe(**SMALL, save_dtype="bfloat16"), model=tiny_model, data=[turns], out=tmp_path / "a")
    assert {value.dtype for value in load_file(made.path / "model.safetensors").values()} == {torch.bfloat16}
    again = sft.run(SftRecipe(**SMALL), model=made.path, data=[turns], out=tmp_path / "b")
    assert {value.dtype for value in load_file(again.path / "model.safetensors").values()} == {torch.bfloat16}


def test_plain_text_trains_too_and_files_can_be_mixed(tiny_model, turns, tmp_path):
    text = write(tmp_path / "text.jsonl", [{"text": "once upon a time " * 40} for _ in range(3)])
    recipe = SftRecipe(**SMALL, max_tokens=64)
    made = sft.run(recipe, model=tiny_model, data=[text, turns], out=tmp_path / "out")
    assert made.meta["examples"]["rows"] == 27
    assert made.meta["examples"]["train_examples"] > 30


def test_validation_files_are_used_instead_of_a_share(tiny_model, turns, pairs, tmp_path):
    made = preference.run(
        PreferenceRecipe(**SMALL), model=tiny_model, data=[pairs], valid=[pairs], out=tmp_path / "out"
    )
    assert made.meta["examples"]["train_examples"] == made.meta["examples"]["held_out_examples"] == 24
    assert [entry.role for entry in made.manifest.inputs] == ["model", "data", "valid"]
    assert made.manifest.recipe["learning_rate"] == 2e-5  # a small model's own, as it was used


def test_a_small_model_has_its_own_learning_rate_unless_told_otherwise():
    plain = PreferenceRecipe()
    assert plain.for_model(6_000_000).peak_learning_rate == 2e-5
    assert plain.for_model(350_000_000).peak_learning_rate == plain.for_model(0).peak_learning_rate == 8e-7
    assert PreferenceRecipe(learning_rate=1e-6).for_model(6_000_000).peak_learning_rate == 1e-6
    assert PreferenceRecipe(lora=True).for_model(6_000_000).peak_learning_rate == 5e-5
    assert SftRecipe().for_model(6_000_000).peak_learning_rate == 3e-5


def test_columns_are_mapped_and_bad_rows_counted(tiny_model, tmp_path):
    rows = [{"q": f"Say {i}.", "good": f"It is {i}.", "bad": "No!"} for i in range(20)] + [{"q": "x", "good": "y"}]
    data = write(tmp_path / "odd.jsonl", rows)
    recipe = PreferenceRecipe(**SMALL, map=("q=prompt", "good=chosen", "bad=rejected"), skip_bad=1)
    made = preference.run(recipe, model=tiny_model, data=[data], out=tmp_path / "out")
    assert made.meta["examples"]["bad_rows"] == 1


def test_the_reference_is_computed_once_for_all_runs_on_the_same_data(tiny_model, pairs, tmp_path, monkeypatch):
    calls = []
    original = reference.score
    monkeypatch.setattr(reference, "score", lambda *a, **k: calls.append(1) or original(*a, **k))
    for name, rate in (("a", 1e-4), ("b", 1e-3)):
        recipe = PreferenceRecipe(**SMALL, learning_rate=rate)
        preference.run(recipe, model=tiny_model, data=[pairs], out=tmp_path / name)
    assert len(calls) == 2  # once for the training pairs, once for those held out


def test_the_alarm_goes_off_when_the_chosen_answers_fall(capsys):
    from edgealign.train.trainer import Fit

    falling = tuple({"step": i + 1, "ratio_chosen": -0.1 * i} for i in range(30))
    steady = tuple({"step": i + 1, "ratio_chosen": -0.01 * i} for i in range(30))
    (message,) = preference.warn_falling_chosen(Fit(falling, 30, 0, None))
    assert "by step 11 the chosen answers were 0.55 nats per token less likely" in message
    assert "warning: by step 11" in capsys.readouterr().err
    assert preference.warn_falling_chosen(Fit(steady, 30, 0, None)) == []
    assert preference.warn_falling_chosen(Fit((), 0, 0, None)) == []


def test_a_dataset_artifact_brings_its_licences(tiny_model, tmp_path):
    from edgealign.artifact import publish

    with publish(
        tmp_path / "set", kind="dataset", format="jsonl", stage="test", recipe={}, licences={"poems": "CC-BY-4.0"}
    ) as draft:
        write(draft.dir / "train.jsonl", [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(20)])
    data = [str(tmp_path / "set" / "train.jsonl")]
    made = sft.run(SftRecipe(**SMALL), model=tiny_model, data=data, out=tmp_path / "out")
    assert made.manifest.licences["poems"] == "CC-BY-4.0"
