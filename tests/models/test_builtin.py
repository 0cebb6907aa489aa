"""A model by name: which spelling is the built-in one, and what is said when it is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgealign.artifact import open_artifact, open_model
from edgealign.chat.conversation import open_conversation
from edgealign.chat.recipes import ChatRecipe
from edgealign.cli_options import run_stage
from edgealign.errors import InputError, RecipeError, ToolMissing
from edgealign.models import builtin
from edgealign.models.load import check_safetensors, load_tokenizer, resolve_model
from edgealign.pipeline import load_preset, plan_preset, step_key
from edgealign.runtimes.session import open_session, runtime_of

LIMIT_BYTES = 24 * 2**20


@pytest.fixture
def starter(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in at the place where the built-in models lie."""
    home = tmp_path / "home"
    shutil.copytree(tiny_model, home / "starter")
    monkeypatch.setattr(builtin, "home", lambda: home)
    return home / "starter"


@pytest.mark.parametrize("name", ["starter", "edgealign:starter"])
def test_a_built_in_name_is_a_model_everywhere(starter: Path, name: str) -> None:
    assert resolve_model(name) == starter
    assert open_model(name).digest == open_artifact(starter).digest
    assert len(load_tokenizer(name)) == 512
    assert runtime_of(name) == "torch"
    session = open_session(name)
    assert session.prefill([1, 5]).shape == (512,)
    session.close()


def test_the_name_wins_over_a_folder_of_that_name_which_a_path_still_reaches(
    starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here" / "starter"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    assert resolve_model("starter") == starter
    assert resolve_model("./starter").resolve() == folder
    assert resolve_model(str(folder)) == folder
    assert resolve_model(Path("./starter")).resolve() == folder


def test_an_unknown_built_in_name_suggests_one(starter: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean starter\?"):
        resolve_model("edgealign:startr")
    with pytest.raises(InputError, match="no such model directory"):
        resolve_model("startr")


def test_a_missing_starter_is_one_line_with_exit_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "home", lambda: tmp_path)
    with pytest.raises(ToolMissing) as caught:
        open_model("starter")
    assert caught.value.exit_code == 3
    assert "pip install" in caught.value.line()
    assert "edgealign run starter" in caught.value.line()


def test_a_plan_counts_the_starters_parameters(
    starter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 20, encoding="utf-8")
    run_stage("sft", {}, None, True, True, model="starter", data=[str(rows)], out=tmp_path / "x")
    estimate = json.loads(capsys.readouterr().out)["stages"][0]["estimate"]
    count = sum(parameter.numel() for parameter in _network(starter).parameters())
    assert estimate["parameters"] == f"{count:,}"


PRESET = """
[[stage]]
id = "data"
run = "synth"
[[stage]]
id = "mine"
run = "sft"
inputs = { model = "edgealign:starter", data = ["data/train.jsonl"] }
"""


def test_a_preset_starts_from_the_starter_and_notices_another_one(starter: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(PRESET, encoding="utf-8")
    preset = load_preset(str(file))
    out = tmp_path / "run"
    (out / "data").mkdir(parents=True)
    (out / "data" / "train.jsonl").write_text("{}\n", encoding="utf-8")
    step = preset.steps[1]
    before = step_key(step, out=out, data=None)
    assert "about" in plan_preset(preset, out=out, data=None)[1]["estimate"]["memory"]
    manifest = json.loads((starter / "manifest.json").read_text(encoding="utf-8"))
    manifest["digest"] = "0" * 64
    (starter / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert step_key(step, out=out, data=None) != before


@pytest.mark.parametrize("wrong", ["edgealign:strater", "starter"])
def test_a_preset_with_another_spelling_is_refused(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(PRESET.replace("edgealign:starter", wrong), encoding="utf-8")
    with pytest.raises(RecipeError, match=wrong):
        load_preset(str(file))


def test_the_packaged_starter_is_whole_small_and_says_where_it_comes_from() -> None:
    model = open_model("starter")
    assert model.path == builtin.home() / "starter"
    assert sum(file.stat().st_size for file in model.path.rglob("*")) <= LIMIT_BYTES
    card = (model.path / "README.md").read_text(encoding="utf-8")
    for word in ("licence", "CC-BY", "cannot"):
        assert word in card
    header = check_safetensors(model.path / "model.safetensors")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}


def test_the_packaged_starter_answers_the_same_twice() -> None:
    recipe = ChatRecipe(temperature=0.0, max_tokens=24)
    answers = []
    for _ in range(2):
        conversation = open_conversation(recipe)
        assert conversation.context >= 1024
        answers.append(conversation.ask("Hello!", lambda text: None).text)
        conversation.session.close()
    assert answers[0] == answers[1]
    assert any(letter.isalpha() for letter in answers[0])


def _network(folder: Path):  # type: ignore[no-untyped-def]
    from edgealign.models.load import load_model

    return load_model(folder)


def test_a_package_seen_through_a_link_names_the_folder_that_stays(tmp_path):
    import os
    import subprocess
    import sys

    import edgealign

    package = Path(edgealign.__file__).resolve().parent
    (tmp_path / "edgealign").symlink_to(package)
    code = "import edgealign; from edgealign.models.builtin import home; print(edgealign.__file__, home(), sep='|')"
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    through, found = said.stdout.strip().split("|")
    assert through.startswith(str(tmp_path))  # or this would prove nothing
    assert found == str(package)
