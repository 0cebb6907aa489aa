"""Every kind of bad input through the command line: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgealign import cli

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the command line in this process; returns the exit code and the last line on stderr."""

    def call(*arguments: object) -> tuple[int, str]:
        before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["edgealign", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        lines = capsys.readouterr().err.strip().splitlines()
        after = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if not path.name.endswith(".lock"))
        assert [path for path in after if path not in before] == []
        errors = [line for line in lines if line.startswith("edgealign: ")]
        assert len(errors) == (1 if code else 0), lines
        return code, errors[-1] if errors else ""

    return call


def written(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_an_empty_file(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    data = written(tmp_path / "empty.jsonl")
    code, line = run("sft", "--model", tiny_model, "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert "empty.jsonl" in line


def test_wrong_columns(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    data = written(tmp_path / "odd.jsonl", {"colour": "red"}, {"colour": "blue"})
    code, line = run("dpo", "--model", tiny_model, "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert "colour" in line


def test_bad_rows_are_refused_until_their_number_is_said(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    data = written(tmp_path / "rows.jsonl", good, {"prompt": "a"}, good)
    code, line = run("sft", "--model", tiny_model, "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert "line 2" in line
    assert "--skip-bad" in line


def test_truncated_safetensors(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("manifest.json"))
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    data = written(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    code, line = run("sft", "--model", model, "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert "truncated" in line


def test_a_model_of_another_architecture(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))
    data = written(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    code, line = run("sft", "--model", model, "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert "bert" in line.lower()


@pytest.mark.runtime
def test_an_adapter_of_another_base(run: Run, tmp_path: Path, tiny_model: Path, tiny_lora: Callable[..., Path]) -> None:
    foreign = tiny_lora(seed=3, base_digest="0" * 64)
    code, line = run(
        "export", "--target", "gguf", "--model", tiny_model, "--adapter", f"ada={foreign}", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "0000000" in line
    assert "edgealign personalize" in line


def test_an_output_that_exists(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "out").mkdir()
    data = written(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    code, line = run("sft", "--model", tiny_model, "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert "exists already" in line


def test_an_unknown_recipe_key(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("learning_rat = 1e-4\nepoch = 2\n", encoding="utf-8")
    data = written(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    code, line = run("sft", "--model", tiny_model, "--data", data, "--out", tmp_path / "out", "--config", config)
    assert code == 2
    assert "did you mean learning_rate?" in line
    assert "did you mean epochs?" in line


def test_a_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    code, line = run("sft", "--model", tmp_path / "nowhere", "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert "nowhere" in line


@pytest.mark.runtime
def test_a_missing_tool_is_exit_code_3_with_its_install_line(
    run: Run, tmp_path: Path, tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("f32")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    code, line = run("bench", bundle, "--out", tmp_path / "out")
    assert code == 3
    assert "pip install" in line
