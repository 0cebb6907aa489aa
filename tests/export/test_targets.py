"""Finding an export program, running it in its own process, and passing its verdict on."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgealign import recipe, targets
from edgealign.errors import CheckFailed, EdgealignError, InputError, OutputError, RecipeError, ToolMissing, UsageError
from edgealign.export_recipes import ExportRecipe

Stand = Callable[[str], None]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Replace the export program by a few lines."""

    def write(code: str) -> None:
        script = tmp_path / "program.py"
        script.write_text("import json, os, signal, sys\n" + code, encoding="utf-8")
        monkeypatch.setattr(targets, "program", lambda target: script)

    return write


def run(tmp_path: Path, **options: object) -> object:
    return targets.run(ExportRecipe(), target="gguf", model="m", out=tmp_path / "out", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_target_has_its_program(target: str) -> None:
    assert targets.program(target).name == targets.TARGETS[target].program


def test_a_wheel_carries_the_programs_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "edgealign/_export").mkdir(parents=True)
    script = tmp_path / "edgealign/_export/to_gguf.py"
    script.touch()
    monkeypatch.setattr(targets, "PACKAGE", tmp_path / "edgealign")
    assert targets.program("gguf") == script
    script.unlink()
    with pytest.raises(ToolMissing, match=r"to_gguf\.py: is missing from this installation"):
        targets.program("gguf")


def test_an_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"ggfu: is not a target \(did you mean gguf\?\)"):
        targets.program("ggfu")


@pytest.mark.parametrize(("status", "kind"), [(1, CheckFailed), (2, UsageError), (3, ToolMissing)])
def test_the_programs_own_error_arrives_with_its_kind(
    stand_in: Stand, tmp_path: Path, status: int, kind: type[EdgealignError]
) -> None:
    stand_in(f"print('talk'); print(json.dumps({{'error': ['what', 'why', 'how']}})); sys.exit({status})")
    with pytest.raises(kind, match=r"^what: why; how$") as caught:
        run(tmp_path)
    assert caught.value.exit_code == status


def test_a_program_that_is_killed_names_the_signal(stand_in: Stand, tmp_path: Path) -> None:
    stand_in("os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(EdgealignError, match=r"to_gguf\.py: was ended by SIGSEGV; out of memory\?"):
        run(tmp_path)


def test_a_program_that_breaks_says_how_to_install_its_tools(
    stand_in: Stand, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in("import no_such_module")
    with pytest.raises(InputError, match=r"ended with status 1 and no result .* pip install 'edgealign\[gguf\]'"):
        run(tmp_path)
    assert "no_such_module" in capfd.readouterr().err


def test_the_program_gets_every_argument_and_this_package_only(stand_in: Stand, tmp_path: Path) -> None:
    stand_in(
        "import edgealign, pathlib\n"
        "recipe = pathlib.Path(sys.argv[sys.argv.index('--recipe') + 1]).read_text()\n"
        "path = os.environ['PYTHONPATH'].split(os.pathsep)[0]\n"
        "seen = [sys.argv[1:], recipe, os.listdir(path), edgealign.__file__ is not None]\n"
        "print(json.dumps({'error': ['saw', json.dumps(seen), '']})); sys.exit(2)"
    )
    users = {"ana": Path("a"), "ben": Path("b")}
    with pytest.raises(UsageError) as caught:
        run(tmp_path, adapters=users, calibration=Path("text.txt"), python=sys.executable)
    arguments, recipe_text, beside, importable = json.loads(caught.value.reason)
    given = list(itertools.pairwise(arguments))
    for pair in (("--adapter", "ana=a"), ("--adapter", "ben=b"), ("--calibration", "text.txt"), ("--model", "m")):
        assert pair in given
    assert 'quant = "q4_0"' in recipe_text
    assert sorted(beside) == ["edgealign", "recipe.toml"]
    assert importable


def test_a_device_reaches_the_search_and_is_refused_without_one(stand_in: Stand, tmp_path: Path) -> None:
    stand_in("print(json.dumps({'error': ['saw', ' '.join(sys.argv[1:]), '']})); sys.exit(2)")
    sent = {"target": "gguf", "model": "m", "out": tmp_path / "out", "device": "bandwidth_gb_s=30"}
    with pytest.raises(UsageError, match="--device bandwidth_gb_s=30"):
        targets.run(ExportRecipe(quant="auto"), **sent)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="is a device, and quant q4_0 searches nothing; add --quant auto"):
        targets.run(ExportRecipe(), **sent)  # type: ignore[arg-type]


def test_another_python_that_does_not_exist_is_a_missing_tool(stand_in: Stand, tmp_path: Path) -> None:
    stand_in("")
    with pytest.raises(ToolMissing, match="/no/such/python: is no Python that can be run"):
        run(tmp_path, python="/no/such/python")


def test_an_existing_output_is_refused_before_the_program_starts(stand_in: Stand, tmp_path: Path) -> None:
    stand_in("raise SystemExit('started')")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        run(tmp_path)


def test_a_recipe_survives_the_trip_through_toml(tmp_path: Path) -> None:
    from dataclasses import asdict

    sent = ExportRecipe(quant="q8_0", context=None, exact_gate=False, verify=("kl_8bit=0.1", 'odd="x\\y"'))
    file = tmp_path / "recipe.toml"
    file.write_text(targets.to_toml(asdict(sent)), encoding="utf-8")
    assert recipe.load(ExportRecipe, file, {}) == sent


def test_the_export_recipe_and_the_targets_load_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, edgealign.targets, edgealign.export_recipes, edgealign.models.recipes, edgealign.models.shapes\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'llama_cpp'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.runtime
@pytest.mark.slow
def test_the_real_program_publishes_a_bundle_from_its_own_process(tiny_model: Path, tmp_path: Path) -> None:
    quick = ("prompt_lengths=1,2,9", "steps=2", "windows=1", "window_tokens=16", "threads=1")
    bundle = targets.export(
        "gguf", model=tiny_model, adapters={}, out=tmp_path / "bundle", options=ExportRecipe(quant="q8_0", verify=quick)
    )
    assert bundle.kind == "bundle"
    assert bundle.meta["quant"] == "q8_0"
