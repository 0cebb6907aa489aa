"""Find the export programs and run one in its own process.

An exporter's toolchain is heavy and may crash, and a user may keep it in another environment (`--python`). The program
is told everything by arguments and a recipe file, and answers with an exit status, one JSON line on its standard
output and, when it worked, a published directory. In a checkout the programs lie in `export/`; a wheel carries them
as `edgealign/_export`. `program` is the one place that knows which.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edgealign
from edgealign.artifact import Artifact, open_artifact, refuse_existing
from edgealign.errors import CheckFailed, EdgealignError, InputError, RecipeError, ToolMissing, UsageError
from edgealign.export_recipes import ExportRecipe, check_device, check_kit, resolve
from edgealign.registry import suggest


@dataclass(frozen=True)
class Target:
    """One kind of bundle: the program that makes it and the extra that it needs."""

    program: str
    extra: str
    help: str


TARGETS: dict[str, Target] = {
    "gguf": Target("to_gguf.py", "gguf", "llama.cpp and everything built on it"),
    "onnx": Target("to_onnx.py", "onnx", "onnxruntime and onnxruntime-genai"),
    "executorch": Target("to_executorch.py", "executorch", "phones: XNNPACK on their CPUs"),
}
PACKAGE = Path(edgealign.__file__).resolve().parent


def run(
    recipe: ExportRecipe,
    *,
    target: str,
    model: str | Path,
    out: Path,
    adapters: Mapping[str, Path] | None = None,
    calibration: Path | None = None,
    python: str | None = None,
    kit: str | None = None,
    device: str | None = None,
) -> Artifact:
    """Export a model and its users' adapters; returns the published bundle.

    Args:
        device: for `quant = "auto"`, another machine: a benchmark report, a machine card, or `bandwidth_gb_s=N`.

    Raises:
        RecipeError: no such target, or a quantisation or a kit that it does not have.
        CheckFailed: the bundle does not behave like the torch model.
        UsageError: the input or the output cannot be used; the program's own message.
        ToolMissing: the program's tools, or the other Python, are not there.
        EdgealignError: the program died.
    """
    script = program(target)
    recipe = resolve(recipe, target)
    check_kit(kit, target)
    if device is not None:
        check_device(recipe, device)
    out = Path(out)
    refuse_existing(out)
    with tempfile.TemporaryDirectory(prefix="edgealign-export-") as scratch:
        recipe_file = Path(scratch, "recipe.toml")
        recipe_file.write_text(to_toml(asdict(recipe)), encoding="utf-8")
        place = str(model.absolute()) if isinstance(model, Path) else model  # as text a path must not become a name
        command = [interpreter(python), str(script), "--json", "--model", place, "--out", str(out)]
        command += ["--recipe", str(recipe_file)]
        for name, folder in (adapters or {}).items():
            command += ["--adapter", f"{name}={folder}"]
        if calibration is not None:
            command += ["--calibration", str(calibration)]
        if kit is not None:
            command += ["--kit", kit]
        if device is not None:
            command += ["--device", device]
        os.symlink(PACKAGE, Path(scratch, "edgealign"))  # this package for the other Python, and none of its neighbours
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([scratch, os.environ.get("PYTHONPATH", "")])}
        answer = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if answer.returncode != 0:
        raise _error(target, answer.returncode, answer.stdout.decode("utf-8", errors="replace"))
    return open_artifact(out, kind="bundle")


def export(
    target: str,
    *,
    model: str | Path,
    adapters: Mapping[str, Path],
    out: Path,
    options: ExportRecipe,
    python: str | None = None,
    calibration: Path | None = None,
) -> Artifact:
    """`run` with the target first, for callers that have it at hand."""
    return run(
        options, target=target, model=model, out=out, adapters=adapters, calibration=calibration, python=python
    )


def program(target: str) -> Path:
    """The file of a target's export program, in the wheel or in the checkout.

    Raises:
        RecipeError: no such target.
        ToolMissing: this installation came without its programs.
    """
    if target not in TARGETS:
        raise RecipeError(
            target, f"is not a target{suggest(target, TARGETS)}", f"choose one of: {', '.join(TARGETS)}"
        )
    for folder in (PACKAGE / "_export", PACKAGE.parent / "export"):
        script = folder / TARGETS[target].program
        if script.is_file():
            return script
    name = TARGETS[target].program
    raise ToolMissing(name, "is missing from this installation", "pip install --force-reinstall edgealign")


def interpreter(python: str | None) -> str:
    """The Python that runs the program: this one, or the one that was asked for.

    Raises:
        ToolMissing: there is no such program.
    """
    if python is None:
        return sys.executable
    found = shutil.which(python)
    if found is None:
        raise ToolMissing(python, "is no Python that can be run", "give the path of a python executable")
    return found


def to_toml(values: Mapping[str, Any]) -> str:
    """A flat recipe as TOML; None is left out, because TOML has none."""
    lines = []
    for key, value in values.items():
        if isinstance(value, (list, tuple)):
            lines.append(f"{key} = [{', '.join(json.dumps(item) for item in value)}]")
        elif value is not None:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _error(target: str, status: int, stdout: str) -> EdgealignError:
    """The program's own error, or the reason why it has none."""
    kinds: dict[int, type[EdgealignError]] = {1: CheckFailed, 2: UsageError, 3: ToolMissing}
    last = stdout.strip().splitlines()[-1:] or [""]
    try:
        value, reason, fix = json.loads(last[0])["error"]
        return kinds.get(status, EdgealignError)(value, reason, fix)
    except (ValueError, KeyError, TypeError):
        pass
    name = TARGETS[target].program
    if status < 0:
        reason = f"was ended by {signal.Signals(-status).name}"
        return EdgealignError(name, reason, "out of memory? try a smaller model, or look at the messages above")
    fix = f"pip install 'edgealign[{TARGETS[target].extra}]' into the Python that runs it"
    return InputError(name, f"ended with status {status} and no result (its messages are above)", fix)
