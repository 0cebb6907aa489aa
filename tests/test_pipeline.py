"""A preset runs what is missing, skips what is published, and notices changed inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgealign import pipeline
from edgealign.artifact import Artifact, open_artifact
from edgealign.data.recipes import PrepareRecipe
from edgealign.errors import CheckFailed, InputError, RecipeError

PRESET = """
final = "small"
[[stage]]
id = "data"
run = "synth"
recipe = { conversations = 20, pairs = 8, choices = 4 }
[[stage]]
id = "small"
run = "prepare"
inputs = { sources = ["data/train.jsonl"] }
recipe = { limit = 10 }
"""


@pytest.fixture
def preset(tmp_path: Path) -> pipeline.Preset:
    return written(tmp_path, PRESET)


def written(folder: Path, text: str) -> pipeline.Preset:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return pipeline.load_preset(str(file))


def skipped(result: dict[str, object]) -> list[bool]:
    return [entry["skipped"] for entry in result["stages"]]  # type: ignore[index,attr-defined]


def test_a_second_run_skips_everything_and_force_starts_over(tmp_path: Path, preset: pipeline.Preset) -> None:
    out = tmp_path / "run"
    first = pipeline.run_preset(preset, out=out, data=None, force=False)
    assert skipped(first) == [False, False]
    assert skipped(pipeline.run_preset(preset, out=out, data=None, force=False)) == [True, True]
    assert skipped(pipeline.run_preset(preset, out=out, data=None, force=True)) == [False, False]
    assert open_artifact(out / "small").manifest.meta["rows"]["train.jsonl"] > 0


def test_a_damaged_or_missing_artifact_is_made_again_with_what_depends_on_it(
    tmp_path: Path, preset: pipeline.Preset
) -> None:
    out = tmp_path / "run"
    pipeline.run_preset(preset, out=out, data=None, force=False)
    (out / "small" / "train.jsonl").write_text("{}", encoding="utf-8")
    assert skipped(pipeline.run_preset(preset, out=out, data=None, force=False)) == [True, False]
    changed = written(tmp_path, PRESET.replace("conversations = 20", "conversations = 21"))
    assert [entry["published"] for entry in pipeline.plan_preset(changed, out=out, data=None)] == [False, False]
    assert skipped(pipeline.run_preset(changed, out=out, data=None, force=False)) == [False, False]


def test_a_changed_recipe_downstream_leaves_upstream_alone(tmp_path: Path, preset: pipeline.Preset) -> None:
    out = tmp_path / "run"
    pipeline.run_preset(preset, out=out, data=None, force=False)
    changed = written(tmp_path, PRESET.replace("limit = 10", "limit = 9"))
    assert skipped(pipeline.run_preset(changed, out=out, data=None, force=False)) == [True, False]


def test_a_failed_report_fails_the_run_again_when_it_is_met_again(tmp_path: Path, preset: pipeline.Preset) -> None:
    from edgealign.artifact import Check, publish

    with publish(tmp_path / "bad", kind="report", format="x", stage="t", recipe={}) as draft:
        draft.add_check(Check("moves", 0.0, 1.0, False))
    with pytest.raises(CheckFailed, match="moves"):
        pipeline._refuse_failed(tmp_path / "bad")


def test_all_mistakes_of_a_preset_come_in_one_line(tmp_path: Path) -> None:
    text = PRESET.replace("limit = 10", "limt = 10").replace('run = "synth"', 'run = "sinth"')
    with pytest.raises(RecipeError) as caught:
        written(tmp_path, text)
    assert "sinth" in str(caught.value)
    assert "did you mean limit?" in str(caught.value)
    assert "is not below an earlier stage" not in str(caught.value) or "small" in str(caught.value)


def test_a_preset_that_needs_real_data_says_so(tmp_path: Path) -> None:
    preset = written(tmp_path, PRESET.replace("data/train.jsonl", "data:x/train.jsonl"))
    with pytest.raises(InputError, match="--data"):
        pipeline.run_preset(preset, out=tmp_path / "run", data=None, force=False)


@pytest.mark.parametrize("name", pipeline.preset_names())
def test_every_shipped_preset_loads(name: str) -> None:
    assert pipeline.load_preset(name).steps


def test_an_unknown_preset_suggests_one() -> None:
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        pipeline.load_preset("quikstart")


def test_an_optional_stage_that_fails_its_check_is_left_out_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgealign.data import prepare

    calls: list[int | None] = []
    real = prepare.run

    def picky(recipe: PrepareRecipe, **arguments: Any) -> Artifact:
        calls.append(recipe.limit)
        if recipe.limit == 1:
            raise CheckFailed("user bo", "no better than the population", "collect more choices")
        return real(recipe, **arguments)

    monkeypatch.setattr(prepare, "run", picky)
    text = PRESET + (
        '[[stage]]\nid = "bo"\nrun = "prepare"\noptional = true\n'
        'inputs = { sources = ["data/train.jsonl"] }\nrecipe = { limit = 1 }\n'
    )
    preset = written(tmp_path, text)
    first = pipeline.run_preset(preset, out=tmp_path / "run", data=None, force=False)
    assert "no better than the population" in first["stages"][-1]["refused"]
    pipeline.run_preset(preset, out=tmp_path / "run", data=None, force=False)
    assert calls == [10, 1]
    with pytest.raises(CheckFailed):
        pipeline.run_preset(
            written(tmp_path, text.replace("optional = true\n", "")), out=tmp_path / "other", data=None, force=False
        )


def test_tables_of_inputs_leave_out_what_was_not_published() -> None:
    inputs = {"model": "merged", "adapters": {"ada": "ada", "bo": "bo"}, "data": ["pairs/x"]}
    expected = {"model": "merged", "adapters": {"ada": "ada"}, "data": ["pairs/x"]}
    assert pipeline._without(inputs, {"bo"}) == expected


def test_a_judge_is_the_reward_head_of_a_stage_and_part_of_what_depends_on_it(tmp_path: Path) -> None:
    text = PRESET + (
        '[[stage]]\nid = "later"\nrun = "pairs_filter"\n'
        'inputs = { data = ["data/pairs.jsonl"], judges = ["reward:small"] }\n'
    )
    preset = written(tmp_path, text)
    out = tmp_path / "run"
    assert pipeline._resolve(preset.steps[-1].inputs, out, None)["judges"] == [f"reward:{out / 'small'}"]
    pipeline.run_preset(written(tmp_path, PRESET), out=out, data=None, force=False)
    before = pipeline.step_key(preset.steps[-1], out=out, data=None)
    pipeline.run_preset(
        written(tmp_path, PRESET.replace("limit = 10", "limit = 9")), out=out, data=None, force=False
    )
    assert pipeline.step_key(preset.steps[-1], out=out, data=None) != before
    with pytest.raises(RecipeError, match="input head is not below an earlier stage"):
        written(tmp_path, text.replace("reward:small", "reward:head"))


@pytest.mark.slow
def test_the_accelerated_preset_runs_on_a_tiny_model_and_takes_the_scale_its_judge_likes(tmp_path: Path) -> None:
    """As shipped, with a random tiny model in place of the starter, and less of everything."""
    source = (Path(pipeline.__file__).parent / "presets" / "accelerated.toml").read_text(encoding="utf-8")
    source = source.replace('run = "synth"', 'run = "synth"\nrecipe = { conversations = 40, pairs = 40, choices = 4 }')
    source = source.replace('"edgealign:starter"', '"base"').replace("judge_prompts = 48", "judge_prompts = 3")
    source = source.replace("max_new_tokens = 96", "max_new_tokens = 8").replace("prompts = 48", "prompts = 3")
    source = source.replace("[1.3, 1.6, 2.0, 3.0]", "[1.3, 3.0]").replace("limit = 1400", "limit = 32")
    first, rest = source.split("\n\n[[stage]]\n", 2)[0], source.split("\n\n[[stage]]\n", 2)[1:]
    init = 'id = "base"\nrun = "init"\ninputs = { text = ["data/train.jsonl"] }\nrecipe = { shape = "tiny" }'
    preset = written(tmp_path, "\n\n[[stage]]\n".join([first, rest[0], init, *rest[1:]]))
    result = pipeline.run_preset(preset, out=tmp_path / "run", data=None, force=False)
    assert not any("refused" in entry for entry in result["stages"])
    for stage in ("further1", "further2"):
        meta = open_artifact(tmp_path / "run" / stage).manifest.meta
        grades = {row["name"]: row["grade"] for row in meta["candidates"]}
        assert set(grades) == {
            "base", "model 1", "task_arithmetic w=1 scale=1.3", "task_arithmetic w=1 scale=3",
        }  # fmt: skip
        assert grades[meta["best"]] == max(grades.values())
    again = pipeline.run_preset(preset, out=tmp_path / "run", data=None, force=False)
    assert all(skipped(again))
