"""benchmarks/curriculum.py: equal runs from one start, intervals by hand, nothing trained twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgealign.errors import CheckFailed
from edgealign.train import curriculum, stage


@pytest.fixture
def program(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("curriculum")


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(stage, "draw_curves", lambda rows, panels, file, title: file.write_bytes(b""))
    monkeypatch.setattr(curriculum, "draw", lambda made, rows, file: file.write_bytes(b""))
    files = []
    for name, numbers in (("train", range(16)), ("valid", range(16, 25))):
        rows = [{"prompt": f"Say {i}.", "completion": "It is " + "so " * (i % 4) + f"{i}."} for i in numbers]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files.append(str(file))
    return [
        "--model", str(tiny_model), "--data", files[0], "--valid", files[1], "--runs", str(tmp_path / "runs"),
        "--out", str(tmp_path / "out"), "--set", "batch_size=4", "--set", "mixing=0.5", "--set", "threads=1",
        "--set", "learning_rate=5e-3",
    ]  # fmt: skip


def run(order: str, seed: int, nats: list[float], steps: int = 2) -> dict[str, object]:
    return {"order": order, "seed": seed, "steps": steps, "nats": nats}


def test_every_order_is_trained_once_and_compared_on_the_same_examples(
    program: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained: list[tuple[str, int]] = []
    original = program.sft.run

    def counted(recipe, **inputs):  # type: ignore[no-untyped-def]
        trained.append((recipe.order, recipe.seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return original(recipe, **inputs)

    monkeypatch.setattr(program.sft, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        program.main([*arguments, "--seeds", "2"])
    assert program.main([*arguments, "--seeds", "2"]) == 0
    wanted = [(order, seed) for seed in (0, 1) for order in program.ORDERS]
    assert trained == [*wanted[:3], *wanted[2:]], "the interrupted run again, the finished ones not"
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == table.strip()
    assert "| easy to hard | hard |" in table
    assert "2 seeds, 4 steps each from the same weights; 9 held-out examples" in table
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["held_out"] == {"all": 9, "easy": 3, "middle": 3, "hard": 3}
    assert result["before"]["easy"] < result["before"]["middle"] < result["before"]["hard"]
    assert len({loss for order in program.ORDERS for loss in result["orders"][order]["all"]["losses"]}) == 6
    assert all(entry["all"]["mean"] < result["before"]["all"] for entry in result["orders"].values())
    assert "cpu" in result["machine"]
    assert str(tmp_path) not in json.dumps(result)
    assert (tmp_path / "out" / "curriculum.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "runs").glob("*/*/model.safetensors")), "models are kept only with --keep"


def test_the_intervals_are_those_of_the_textbook(program: ModuleType) -> None:
    low, high = program.over_seeds([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    assert program.over_seeds([1.0]) is None
    gaps = np.random.default_rng(0).normal(1.0, 2.0, 400)
    low, high = program.over_examples(gaps, np.ones(400))
    assert (high - low) / 2 == pytest.approx(1.96 * gaps.std() / 20, rel=0.1)
    assert low < gaps.mean() < high


def test_differences_are_paired_by_seed_and_weighted_by_tokens(program: ModuleType) -> None:
    runs = [
        run("shuffled", 0, [10.0, 40.0]), run("easy_to_hard", 0, [9.0, 39.0]), run("hard_to_easy", 0, [10.0, 40.0]),
        run("shuffled", 1, [20.0, 60.0]), run("easy_to_hard", 1, [19.0, 59.0]), run("hard_to_easy", 1, [22.0, 62.0]),
    ]  # fmt: skip
    found = program.summarise(runs, np.asarray([50.0, 50.0]), np.asarray([5.0, 15.0]), {"all": [0, 1], "easy": [0]})
    easy_first = found["orders"]["easy_to_hard"]
    assert easy_first["all"]["difference"] == pytest.approx(-2 / 20)
    assert easy_first["easy"]["difference"] == pytest.approx(-1 / 5)
    assert easy_first["all"]["over_seeds"] == pytest.approx([-0.1, -0.1])
    assert found["orders"]["shuffled"]["all"]["losses"] == pytest.approx([2.5, 4.0])
    assert found["orders"]["shuffled"]["all"]["sd"] == pytest.approx(1.5 / 2**0.5)
    low, high = found["orders"]["hard_to_easy"]["all"]["over_seeds"]
    assert low < 0 < high


def test_runs_of_unequal_length_are_not_compared(program: ModuleType) -> None:
    runs = [run("shuffled", 0, [1.0], steps=3), run("easy_to_hard", 0, [1.0]), run("hard_to_easy", 0, [1.0])]
    with pytest.raises(CheckFailed, match="the runs are not equally long"):
        program.summarise(runs, np.asarray([1.0]), np.asarray([1.0]), {"all": [0]})


@pytest.mark.parametrize("setting", ["order=easy_to_hard", "seed=3", "epochs", "epoch=3"])
def test_what_the_comparison_varies_cannot_be_set(
    setting: str, program: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([*arguments, "--set", setting]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
