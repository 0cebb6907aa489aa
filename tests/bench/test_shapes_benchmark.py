"""benchmarks/shapes.py: what stands against what, ratios within rounds, and one run on tiny shapes that is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgealign.models.shapes import SHAPES, parameter_count

SETTING = {"group": "g", "target": "gguf", "prompt": 512, "threads": 1}
TINY = {"small": ("tiny", "starter-llama")}


@pytest.fixture
def program(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("shapes")


def cell(shape: str, number: int, prefill: float | None, decode: float | None) -> dict[str, Any]:
    error = None if prefill else "its process died of SIGKILL"
    return {**SETTING, "shape": shape, "round": number, "prefill": prefill, "decode": decode, "error": error,
            "peak_bytes": 2**20}  # fmt: skip


def test_lfm2_stands_against_shapes_of_its_size(program: ModuleType) -> None:
    assert set(program.GROUPS["small"]) == {"lfm2-350m", "qwen3-0.6b", "smollm2-360m"}
    assert set(program.GROUPS["large"]) == {"lfm2-1.2b", "llama-3.2-1b", "gemma-3-1b"}
    for first, *others in program.GROUPS.values():
        assert SHAPES[first].model_type == "lfm2"
        assert "lfm2" not in {SHAPES[name].model_type for name in others}
        assert all(0.5 < parameter_count(name) / parameter_count(first) < 2 for name in others)


def test_a_ratio_is_taken_within_a_round_and_its_spread_is_over_rounds(program: ModuleType) -> None:
    cells = [
        cell("a", 0, 200.0, 30.0), cell("b", 0, 100.0, 40.0), cell("a", 1, 300.0, 50.0), cell("b", 1, 200.0, 55.0),
        cell("a", 2, 100.0, 40.0), cell("b", 2, 80.0, 80.0),
    ]  # fmt: skip
    sizes = {"a-gguf": {"token_bytes": 50}, "b-gguf": {"token_bytes": 100}}
    (found,) = program.ratios({"g": ("a", "b")}, cells, sizes)
    assert (found["shape"], found["other"], found["bytes_ratio"]) == ("a", "b", 0.5)
    assert found["prefill"] == {"n": 3, "median": 1.5, "low": 1.25, "high": 2.0, "verdict": "LFM2 is faster"}
    assert found["decode"]["verdict"] == "LFM2 loses"
    assert found["decode"]["median"] == pytest.approx(0.75)


def test_rounds_that_disagree_show_no_difference_and_a_lost_process_leaves_no_ratio(program: ModuleType) -> None:
    mixed = [cell("a", 0, 90.0, 10.0), cell("b", 0, 100.0, 10.0), cell("a", 1, 110.0, 11.0), cell("b", 1, 100.0, 10.0)]
    (found,) = program.ratios({"g": ("a", "b")}, mixed, {})
    assert found["prefill"]["verdict"] == "no difference shown"
    lost = [cell("a", 0, 90.0, 10.0), cell("b", 0, None, None)]
    (found,) = program.ratios({"g": ("a", "b")}, lost, {})
    assert (found["prefill"], found["decode"], found["bytes_ratio"]) == (None, None, None)
    result = {
        "ratios": [found], "cells": lost, "sizes": {}, "exports": [], "caveats": [], "machine": {
            "cpu": "A CPU", "cores_usable": 2, "os": "An OS", "versions": {},
        }, "settings": {"rounds": 1, "repetitions": 3, "gen": 64},
    }  # fmt: skip
    assert "not measured: its process died of SIGKILL" in program.render(result)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pairs", "medium"], "choose from: small, large"), (["--targets", "coreml"], "choose from: gguf, onnx"),
        (["--prompts", "512,x"], "--prompts"), (["--threads", "0"], "--threads"), (["--repetitions", "1"], "at least"),
        (["--prompts", "40000"], "positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_in_one_line(
    arguments: list[str], words: str, program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([*arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_found_out_before_the_export(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    work, out = str(tmp_path / "work"), str(tmp_path / "out")
    assert program.main(["--pairs", "large", "--work", work, "--out", out]) == 2
    assert "has 1.0 GiB free, exporting takes" in capsys.readouterr().err
    assert not (tmp_path / "work" / "models").exists()


@pytest.mark.runtime
def test_tiny_shapes_go_the_whole_way_and_nothing_is_done_twice(
    program: ModuleType, onnx_tools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(program, "GROUPS", TINY)
    work, out = tmp_path / "work", tmp_path / "out"
    arguments = ["--work", str(work), "--out", str(out), "--prompts", "16", "--threads", "1", "--gen", "4"]
    arguments += ["--repetitions", "2"]
    assert program.main([*arguments, "--rounds", "1"]) == 0
    assert not any((work / "models").iterdir()), "the models' weights are removed"
    made = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}
    assert program.main([*arguments, "--rounds", "2"]) == 0
    assert {file: file.stat().st_mtime_ns for file in made} == made
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert {(entry["target"], entry["decode"]["n"]) for entry in result["ratios"]} == {("gguf", 2), ("onnx", 2)}
    assert all(entry["decode"]["median"] > 0 and entry["bytes_ratio"] < 0.5 for entry in result["ratios"])
    assert all(entry["seconds"] > 0 and entry["peak_bytes"] > 2**24 for entry in result["exports"])
    assert len(result["exports"]) == 4
    order = json.loads(next((work / "cells").glob("*gguf*-r1.json")).read_text(encoding="utf-8"))
    assert [entry["bundle"] for entry in order["bundles"]] == ["starter-llama", "tiny"], "turns change with the round"
    table = (out / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip().endswith(table.strip())
    assert "no parity gate was run" in table
    assert "LFM2 loses" in table
    assert (out / "shapes.png").read_bytes()[:4] == b"\x89PNG"
    assert str(tmp_path) not in (out / "result.json").read_text(encoding="utf-8")
    card = json.loads((work / "machine.json").read_text(encoding="utf-8"))
    (work / "machine.json").write_text(json.dumps({**card, "cpu": "Another"}), encoding="utf-8")
    assert program.main([*arguments, "--rounds", "2"]) == 2
    assert "another machine" in capsys.readouterr().err
