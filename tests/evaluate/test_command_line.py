"""`edgealign eval` is a group of three reports; wrong use is one line."""

from __future__ import annotations

import subprocess
import sys

import pytest


def edgealign(*arguments, cwd):
    command = [sys.executable, "-m", "edgealign", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_group_lists_its_three_reports(tmp_path):
    done = edgealign("eval", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("personalization", "language", "chat"):
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["language", "--model", "m", "--data", "d", "--valid", "v", "--out", "x"], "NAME=DIR"),
        (["language", "--model", "a=m", "--data", "d", "--out", "x"], "--valid"),
        (["language", "--model", "a=m", "--data", "d", "--valid", "v", "--out", "x", "--must-beat", "me"], "must_beat"),
        (["chat", "--model", "nowhere", "--out", "x"], "no such model directory"),
        (["chat", "--model", "m", "--out", "x", "--follows", "1.5"], "follows"),
        (["--bundle", "b", "--model", "m"], "--bundle"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(tmp_path, arguments, part):
    done = edgealign("eval", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert part in done.stderr
    assert list(tmp_path.iterdir()) == []
