"""benchmarks/neighbour.py: every combination is measured in a process of its own, with its threads and its spin."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest


@pytest.fixture
def program(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("neighbour")


@pytest.mark.runtime
def test_each_combination_is_measured_and_stands_in_the_table(
    program: ModuleType, tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    command = [str(tiny_bundle("f32")), "--threads", "1", "--rounds", "1", "--seconds", "0.05", "--out", str(tmp_path)]
    assert program.main(command) == 0
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert [(cell["spin"], cell["neighbours"]) for cell in cells] == [("1000", 0), ("1000", 1), ("own", 0), ("own", 1)]
    assert all(len(cell["samples"]) == 1 and cell["samples"][0] > 1 for cell in cells)
    table = (tmp_path / "table.md").read_text()
    assert table.count("| 1 | 1000 |") == table.count("| 1 | own |") == 1


@pytest.mark.parametrize(("spin", "told"), [("1000", "1000"), ("own", None)])
def test_the_process_of_a_sample_is_told_how_long_to_spin(
    spin: str, told: str | None, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def ran(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        environment = options["env"]
        assert isinstance(environment, dict)
        seen.append(environment)
        return subprocess.CompletedProcess(command, 0, stdout="12.5\n")

    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setattr(program.subprocess, "run", ran)
    assert program.sample(Path("bundle"), 2, spin, 1.0) == 12.5
    assert seen[0].get("GOMP_SPINCOUNT") == told
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_the_neighbour_is_busy_and_leaves(program: ModuleType) -> None:
    mine = psutil.Process()
    with program.neighbours(2):
        assert len([child for child in mine.children() if "while True" in " ".join(child.cmdline())]) == 2
    assert not [child for child in mine.children() if "while True" in " ".join(child.cmdline())]


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--threads", "0"], ["--seconds", "0"]])
def test_bad_counts_are_one_line(
    wrong: list[str], program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([str(tmp_path), *wrong, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_no_bundle_is_one_line(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
