"""The quickstart, once, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgealign.artifact import open_artifact

pytestmark = [pytest.mark.slow, pytest.mark.runtime]


def quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgealign", "run", "quickstart", "--json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_quickstart_ends_with_three_users_moved_in_the_shipped_gguf(tmp_path: Path) -> None:
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = open_artifact(tmp_path / "runs" / "quickstart" / "report")
    moved = {check.name: check.passed for check in report.manifest.checks}
    assert {"gguf q8_0: ada moves", "gguf q8_0: bo moves", "gguf q8_0: cleo moves"} <= set(moved)
    assert all(moved.values())
    result = json.loads((report.path / "result.json").read_text(encoding="utf-8"))
    for user, row in result["movement"]["gguf q8_0"].items():
        assert row["reward_own"] > row["reward_others"], f"the control helped {user}"
    text = (report.path / "report.md").read_text(encoding="utf-8")
    assert "movement.png" in text
    assert (report.path / "movement.png").stat().st_size > 10_000

    again = json.loads(quickstart(tmp_path).stdout)
    assert all(stage["skipped"] for stage in again["stages"])
