"""Bad input to training: one line with the value, the reason and the next step, and nothing half-written."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import SafetensorError

from edgealign.errors import ArtifactError, CheckFailed, EdgealignError, InputError, OutputError, RecipeError
from edgealign.recipe import build
from edgealign.train import preference, sft
from edgealign.train.recipes import PreferenceRecipe, SftRecipe
from edgealign.train.trainer import AlignTrainer

PAIR = {"prompt": "Say 1.", "chosen": "It is 1.", "rejected": "No!"}
TURN = {"prompt": "Say 1.", "completion": "It is 1."}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEALIGN_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refused(error, kind, match, *, run, tmp_path):
    """Run it; the error is one line of its kind, and nothing is left beside the output."""
    before = {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(error, match=match) as caught:
        run()
    assert "\n" not in caught.value.line()
    assert caught.value.exit_code == kind
    left = {entry.name for entry in tmp_path.iterdir()} - before - {"cache"}
    assert not left, f"left behind: {left}"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "is empty"),
        ([TURN, {"prompt": "x"}], "1 of 2 rows is bad; the first is line 2"),
        ([{"colour": "red"}], "colour"),
        ([PAIR], "holds rows of the form pair, not conversation or text; see: edgealign dpo --help"),
    ],
)
def test_sft_refuses_unusable_data(rows, match, tiny_model, tmp_path):
    data = write(tmp_path / "data.jsonl", rows)

    def run():
        sft.run(SftRecipe(), model=tiny_model, data=[data], out=tmp_path / "out")

    refused(InputError, 2, match, run=run, tmp_path=tmp_path)


def test_dpo_refuses_rows_without_a_rejected_answer_and_other_forms(tiny_model, tmp_path):
    data = write(tmp_path / "data.jsonl", [PAIR, {**PAIR, "rejected": None}])
    turns = write(tmp_path / "turns.jsonl", [TURN])
    for source, match in (
        (data, "1 of 2 rows is bad; the first is line 2"),
        (turns, "form conversation, not pair; see: edgealign sft --help"),
    ):

        def run(source=source):
            preference.run(PreferenceRecipe(), model=tiny_model, data=[source], out=tmp_path / "out")

        refused(InputError, 2, match, run=run, tmp_path=tmp_path)


def test_rows_that_all_exceed_the_context_are_refused(tiny_model, tmp_path):
    data = write(tmp_path / "data.jsonl", [{**PAIR, "prompt": "word " * 99}])

    def run():
        preference.run(PreferenceRecipe(max_tokens=16), model=tiny_model, data=[data], out=tmp_path / "out")

    refused(InputError, 2, "none of its 1 rows can be used; line 1", run=run, tmp_path=tmp_path)


def test_no_data_at_all_is_refused(tiny_model, tmp_path):
    def run():
        sft.run(SftRecipe(), model=tiny_model, data=[], out=tmp_path / "out")

    refused(InputError, 2, "--data: names no file", run=run, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"objective": "dpo", "beta": 5.0}, "beta 5: dpo takes log-ratios summed over tokens.*or use ln_dpo"),
        ({"beta": 0.1}, "beta 0.1: ln_dpo takes log-ratios per token.*use beta 5, or use dpo"),
        ({"lora": True, "targets": ("o_proj",)}, "o_proj.*out_proj instead of o_proj"),
        ({"map": ("prompt",)}, "prompt: is not of the form THEIRS=OURS"),
    ],
)
def test_recipes_that_cannot_work_are_refused_with_the_fix(values, match, tiny_model, tmp_path):
    data = write(tmp_path / "data.jsonl", [PAIR] * 4)

    def run():
        preference.run(PreferenceRecipe(**values), model=tiny_model, data=[data], out=tmp_path / "out")

    refused(EdgealignError, 2, match, run=run, tmp_path=tmp_path)


def test_all_mistakes_of_a_recipe_come_at_once():
    with pytest.raises(RecipeError) as caught:
        build(SftRecipe, {"epoch": 3, "batch_size": 0, "precision": "fp8", "learning_rate": "1e-4"}, where="sft.toml")
    line = caught.value.line()
    for part in ("unknown key epoch (did you mean epochs?)", "batch_size = 0 must be at least 1", "precision = 'fp8'"):
        assert part in line
    assert build(SftRecipe, {"learning_rate": "1e-4"}, where="x").peak_learning_rate == 1e-4


def test_an_output_that_exists_is_refused_before_any_work(tiny_model, tmp_path):
    (tmp_path / "out").mkdir()

    def run():
        sft.run(SftRecipe(), model="nowhere", data=["missing.jsonl"], out=tmp_path / "out")

    refused(OutputError, 2, "exists already", run=run, tmp_path=tmp_path)


def test_a_truncated_model_is_refused(tiny_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    data = write(tmp_path / "data.jsonl", [TURN] * 4)

    def run():
        sft.run(SftRecipe(), model=broken, data=[data], out=tmp_path / "out")

    refused(ArtifactError, 2, "model.safetensors is not the file that was published", run=run, tmp_path=tmp_path)
    (broken / "manifest.json").unlink()
    refused(InputError, 2, "model.safetensors: is truncated or damaged", run=run, tmp_path=tmp_path)


def test_a_diverging_run_fails_with_exit_code_1_and_publishes_nothing(tiny_model, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", [TURN] * 8)
    original = AlignTrainer._loss
    monkeypatch.setattr(AlignTrainer, "_loss", lambda *args: (part * float("inf") for part in original(*args)))
    with pytest.raises(CheckFailed, match="stopped being a number at step 1") as caught:
        sft.run(SftRecipe(threads=1), model=tiny_model, data=[data], out=tmp_path / "out")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_no_artifact(tiny_model, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", [TURN] * 8)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgealign.train.stage.draw_curves", full)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        sft.run(SftRecipe(threads=1), model=tiny_model, data=[data], out=tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.tmp-*"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
    ids=["system", "safetensors", "torch"],
)
def test_a_full_disk_during_a_checkpoint_is_one_line_too(error, tiny_model, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", [TURN] * 8)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("edgealign.train.checkpoints.write_atomic", full)
    recipe = SftRecipe(threads=1, save_every_steps=1, batch_size=2)
    with pytest.raises(OutputError, match="the disk is full"):
        sft.run(recipe, model=tiny_model, data=[data], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
