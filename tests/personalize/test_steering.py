"""The sweep over strengths: its numbers by hand, its verdict both ways, and the whole on a tiny model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign import cli
from edgealign.errors import InputError, RecipeError
from edgealign.personalize import steering
from edgealign.personalize.steering import Steered, summarize
from edgealign.personalize.steering_recipe import SteeringRecipe
from edgealign.personalize.steering_report import draw_steering, render, verdict

SMALL = SteeringRecipe(
    strengths=(2.0,), styles=("short", "cheerful"), prompts=3, max_new_tokens=8, threads=1, bootstrap=100, candidates=2
)


def answer(text: str, *, kl: float = 0.0, nats: float = 1.0, tokens: int = 4) -> Steered:
    return Steered(text, tuple(range(tokens)), True, kl, 2 * kl, nats, 2 * tokens)


def result(*, mixed: str, prompted: str = "Yay!", bare: str = "Yes.", prompts: int = 8) -> dict[str, Any]:
    rows = {"0": [answer(f"{prompted} {i}") for i in range(prompts)],
            "2": [answer(f"{mixed} {i}", kl=0.3) for i in range(prompts)]}  # fmt: skip
    found = summarize({"cheerful": rows}, [f"{bare} {i}" for i in range(prompts)], SMALL)
    return found | {
        "runtime": "torch", "streams": "TwoSessions", "prompts": ["Hi"] * prompts, "bare": [bare] * prompts,
        "answers": {"cheerful": {strength: [{"text": a.text} for a in row] for strength, row in rows.items()}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mixed", "word"), [("Yay! Hooray! Wonderful!", "further"), ("Yay!", "not surely further"), ("Yes.", "less far")]
)
def test_the_verdict_says_what_was_found(mixed: str, word: str) -> None:
    assert verdict(result(mixed=mixed)) == f"Over all styles: strength 2 moves answers {word} than prompting."


def test_a_gain_is_against_prompting_and_a_movement_against_no_preference() -> None:
    found = result(mixed="Yay! Hooray!")
    row = found["styles"]["cheerful"]["2"]
    sd = float(np.std([0.0] * 8 + [2.0] * 8 + [4.0] * 8))  # an exclamation mark and a cheerful word each
    assert found["sd"]["cheerful"] == pytest.approx(sd)
    assert row["gain_sd"]["mean"] == pytest.approx(2 / sd)
    assert row["moved_sd"]["mean"] == pytest.approx(4 / sd)
    assert row["follows"] == 1.0
    assert row["passes"] == 2.0
    assert row["perplexity"] == pytest.approx(math.e)
    assert (row["kl_prompted"], row["kl_base"]) == (pytest.approx(0.3), pytest.approx(0.6))
    assert found["styles"]["cheerful"]["0"]["gain_sd"]["mean"] == 0.0


def test_nats_are_per_token_over_all_answers() -> None:
    rows = {"0": [answer("a b a b", nats=1.0, tokens=9), answer("c", nats=3.0, tokens=29)]}
    row = summarize({"short": rows}, ["x", "y"], SMALL)["styles"]["short"]["0"]
    assert row["perplexity"] == pytest.approx(math.exp((10 * 1.0 + 30 * 3.0) / 40))
    assert row["distinct_2"] == pytest.approx(2 / 3)  # a b, b a, a b
    assert row["distinct_1"] == pytest.approx(3 / 5)


def test_divergence_by_hand() -> None:
    with np.errstate(divide="ignore"):
        own, other = np.log(np.array([[0.5, 0.5, 0.0]])), np.log(np.array([[0.25, 0.25, 0.5]]))
    assert steering._divergence(own, other) == pytest.approx(math.log(2))
    assert steering._divergence(own, own) == 0.0


def test_the_sweep_on_a_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    artifact = steering.run(SMALL, model=tiny_model, out=out)
    assert [(check.name, check.passed) for check in artifact.manifest.checks] == [(steering.SAME, True)]
    found = json.loads((out / "result.json").read_text())
    assert found["same"] == 1.0
    assert list(found["all"]) == ["0", "2"]
    assert (found["all"]["0"]["kl_prompted"], found["all"]["0"]["passes"]) == (0.0, pytest.approx(1.0))
    assert found["all"]["2"]["kl_prompted"] > 0
    assert found["all"]["2"]["passes"] == pytest.approx(2.0)
    assert found["all"]["0"]["kl_base"] > 0
    assert set(found["rear"]) == {"short", "cheerful"}
    table = (out / "table.md").read_text()
    assert "strength 0 says what prompting says: passed" in table
    assert "REAR: the best of 2 answers" in table
    assert (out / "steering.png").stat().st_size > 10_000
    assert "`2`" in (out / "answers.md").read_text()


def test_a_session_that_does_not_say_what_prompting_says_fails_the_check(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def astray(self: Any, preferred: Any, plain: Any) -> Any:
        return -preferred

    monkeypatch.setattr("edgealign.personalize.linear.MixedSession._mix", astray)
    artifact = steering.run(replace(SMALL, candidates=0), model=tiny_model, out=tmp_path / "report")
    assert [check.passed for check in artifact.manifest.checks] == [False]
    assert "**failed**" in (tmp_path / "report/table.md").read_text()


@pytest.mark.runtime
def test_the_sweep_on_a_bundle(tiny_model: Path, tiny_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = replace(SMALL, candidates=0, styles=("short",))
    artifact = steering.run(recipe, model=tiny_model, bundle=tiny_bundle("q8_0"), out=tmp_path / "report")
    assert all(check.passed for check in artifact.manifest.checks)
    found = json.loads((tmp_path / "report/result.json").read_text())
    assert (found["runtime"], found["streams"]) == ("gguf q8_0", "LlamaPair")


def test_a_bundle_of_another_model_is_refused(
    short_model: Path, tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="was exported from the model"):
        steering.run(SMALL, model=short_model, bundle=tiny_bundle("f32"), out=tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_unknown_style_is_refused_with_a_suggestion(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cheerfull: is no style.*cheerful"):
        steering.run(replace(SMALL, styles=("cheerfull",)), model=tiny_model, out=tmp_path / "report")


@pytest.mark.parametrize("strengths", ["-1", "nan", "2,inf", "a"])
def test_strengths_that_are_none_are_one_line(
    strengths: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["eval", "steering", "--model", str(tiny_model), "--out", str(tmp_path / "r"), "--strengths", strengths]
    monkeypatch.setattr(sys, "argv", ["edgealign", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edgealign: ")]
    assert len(lines) == 1
    assert "strengths" in lines[0]
    assert not (tmp_path / "r").exists()


def test_a_picture_of_one_style_and_of_prompting_alone(tmp_path: Path) -> None:
    found = result(mixed="Yay! Hooray!")
    draw_steering(tmp_path / "one.png", found)
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert "further than prompting" in render(found, SMALL, [])
