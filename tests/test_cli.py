"""The command line as a stranger meets it: light start, one-line errors, exit codes, data on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "fastapi", "numpy", "datasets", "peft", "llama_cpp", "matplotlib", "rich.progress")


def edgealign(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgealign", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["sft", "--help"], ["chat", "--help"], ["app", "--help"], ["config", "schema"], ["objectives"]],
)
def test_help_and_schema_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, edgealign, edgealign.cli\n"
        f"sys.argv = ['edgealign', *{arguments!r}]\n"
        "try:\n    edgealign.cli.main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert "sft" in done.stdout + done.stderr or arguments in (["chat", "--help"], ["app", "--help"], ["objectives"])


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["frobnicate"], 2, ["frobnicate"]),
        (["show", "nowhere"], 2, ["nowhere", "no such directory"]),
        (["run", "quikstart"], 2, ["did you mean quickstart?"]),
        (["init", "tiny", "--out", "x", "--seed", "many"], 2, ["seed", "int"]),
        (["sft", "--model", "m", "--data", "d", "--out", "x", "--learning-rate", "-1"], 2, ["learning_rate"]),
        (["export", "--target", "gguf", "--model", "m", "--out", "x", "--adapter", "ada"], 2, ["NAME", "ada"]),
        (
            ["personalize", "--method", "magic", "--model", "m", "--choices", "c", "--user", "u", "--out", "x"],
            2,
            ["lora"],
        ),
        (["sft"], 2, ["--model"]),
        (["chat", "hello", "--temperature", "hot"], 2, ["temperature", "float"]),
        (["chat", "hello", "--model", "nowhere"], 2, ["nowhere", "no such model directory"]),
        (["show", "edgealign:strater"], 2, ["did you mean starter?"]),
        (["objectives", "rpo"], 2, ["short name of 4 methods", "rpo_regularized"]),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str], code: int, parts: list[str], tmp_path: Path
) -> None:
    done = edgealign(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stage_publishes_and_show_prints_json(tmp_path: Path) -> None:
    small = ["--conversations", "12", "--pairs", "4", "--choices", "4"]
    made = edgealign("data", "synth", "--out", "data", *small, "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    shown = edgealign("show", "data", "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["digest"] == json.loads(made.stdout)["digest"]
    again = edgealign("data", "synth", "--out", "data", *small, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_objectives_are_listed_and_told_in_full(tmp_path: Path) -> None:
    listed = edgealign("objectives", "--json", cwd=tmp_path)
    keys = {each["key"] for each in json.loads(listed.stdout)["objectives"]}
    assert {"ln_dpo", "kto", "lipo_lambda"} <= keys
    table = edgealign("objectives", cwd=tmp_path).stdout
    assert all(f"\n{key} " in table for key in keys)
    told = edgealign("objectives", "lfm2", cwd=tmp_path).stdout
    for words in (
        "needs     a reference", "beta      5, from 1 to 10", "gamma 0, from 0 (in the loss: m)",
        "weight_lfm2_delta 0, from 0 (in the loss: lambda)", "f logistic, one of logistic, hinge",
        "how sure  third party: as others have", "2511.23404", "edgealign dpo --objective lfm2",
    ):  # fmt: skip
        assert words in told
    told = edgealign("objectives", "KTO").stdout
    assert "unrelated (made while training)" in told
    assert "the column" not in told
    assert "the column score" in edgealign("objectives", "gpo").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--objective", "ln_dpo", "--beta", "0.1"), "ln_dpo takes log-ratios per token"),
        (("--objective", "rpo"), "is the short name of 4 methods"),
        (("--objective", "lfm2", "--settings", "f=none"), "f"),
    ],
)
def test_a_dry_run_refuses_the_objective_that_the_run_would_refuse(
    options: tuple[str, ...], words: str, command: Callable[..., int], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ("dpo", "--model", "starter", "--data", tmp_path / "absent.jsonl", "--out", tmp_path / "out", *options)
    assert command(*given, "--dry-run") == 2
    said = capfd.readouterr()
    assert words in said.err
    assert not said.out
    assert command(*given[:7], "--dry-run") == 0


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 50, encoding="utf-8")
    done = edgealign(
        "sft", "--model", str(tiny_model), "--data", str(rows), "--out", "out", "--dry-run", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["stages"][0]
    assert "GiB" in plan["estimate"]["memory"]
    assert "about" in plan["estimate"]["time"]
    assert not (tmp_path / "out").exists()
