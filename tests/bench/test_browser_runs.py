"""benchmarks/browser_runs.py: what pytest says is counted, every run must be clean, quick and whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SUITE = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_good(number): pass

def test_bad(): raise ValueError

@pytest.fixture
def broken():
    yield
    raise ValueError

def test_torn(broken): pass

def test_left_out(): pytest.skip("no")
"""
CARD = {"cpu": "A CPU", "cores_usable": 2, "os": "An OS", "cpu_busy_before": 0.0}


@pytest.fixture
def program(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("browser_runs")


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"machine": CARD, "browser": "Chromium 1", "runs": list(runs)}


def ran(seconds: float = 200.0, passed: int = 80, failed: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"seconds": seconds, "passed": passed, "failed": dict.fromkeys(failed, "why"), "skipped": 0}


def test_a_run_is_counted(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    monkeypatch.setattr(program, "TESTS", str(suite))
    found = program.run([], tmp_path)
    assert (found["passed"], sorted(found["failed"]), found["skipped"]) == (3, ["test_bad", "test_torn"], 1)
    assert found["failed"]["test_bad"] == "ValueError"
    assert found["seconds"] > 0
    suite.write_text("import nothing_of_that_name")
    with pytest.raises(program.InputError, match="status 2"):
        program.run([], tmp_path)


def test_the_table_names_what_failed_and_the_spread(program: ModuleType) -> None:
    text = program.render(result(ran(), ran(260.0, 79, ("test_a",)), ran(220.0)))
    assert "| 2 | 260 | 79 | 1 | 0 |" in text
    assert "2 of 3 runs without a failure; 220 s median, 200 to 260" in text
    assert "Failed at least once: test_a." in text


@pytest.mark.parametrize(
    ("last", "met"), [(ran(), True), (ran(301.0), False), (ran(passed=39), False), (ran(failed=("test_a",)), False)]
)
def test_every_run_has_to_meet_the_goal(program: ModuleType, last: dict[str, Any], met: bool) -> None:
    assert program.met(result(ran(), last)) is met
