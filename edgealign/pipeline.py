"""Run a preset: its stages in order, skipping what is already published for the same inputs.

A preset is a TOML file. Each `[[stage]]` has an `id` (its directory below the run's), `run` (a name in
`edgealign.stages`), `recipe` (fields to override), `inputs` (argument = path or list or table of paths) and
`args` (argument = plain value). A path starts with the id of an earlier stage, with `data:` for a file below
`--data`, or is `edgealign:starter`, the model that comes with edgealign; `reward:` before it is a judge, the reward
head that a stage has published. An `optional` stage whose check fails does
not end the run: tables of inputs leave it out (a user whose adapter did not beat the population simply keeps the
population's model).

What was published is remembered in `state.json` as id -> (key, digest): the key covers stage, recipe,
arguments and the digests of all inputs, so a changed input runs everything that depends on it again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from edgealign import __version__, recipe, stages
from edgealign.artifact import MANIFEST, digest_files, hash_json, list_files, open_artifact, sha256_file, write_atomic
from edgealign.errors import ArtifactError, CheckFailed, InputError, RecipeError, writing
from edgealign.models import builtin
from edgealign.plan import plan_stage
from edgealign.progress import say
from edgealign.registry import suggest

STATE = "state.json"
JUDGE = "reward:"
STAGE_KEYS = {"id", "run", "recipe", "inputs", "args", "optional"}


@dataclass(frozen=True)
class Step:
    """One stage of a preset. `inputs` and `args` are keyword arguments of the stage's function."""

    id: str
    run: str
    recipe: Any
    inputs: Mapping[str, Any]
    args: Mapping[str, Any]
    optional: bool = False


@dataclass(frozen=True)
class Preset:
    """`final`: the id whose report is the result; `cost`: measured time and memory, in words."""

    name: str
    title: str
    steps: tuple[Step, ...]
    final: str
    cost: str

    @property
    def needs_data(self) -> bool:
        return any("data:" in json.dumps(step.inputs) for step in self.steps)


def preset_names() -> tuple[str, ...]:
    """The presets that come with edgealign."""
    folder = resources.files("edgealign") / "presets"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_preset(name: str) -> Preset:
    """A preset by name, or by the path of a TOML file.

    Raises:
        RecipeError: unknown preset, stage, key or value; all mistakes of all stages in one line.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if name not in preset_names():
            raise RecipeError(
                name,
                f"is not a preset{suggest(name, preset_names())}",
                f"choose one of: {', '.join(preset_names())}, or give a .toml file",
            )
        path = Path(str(resources.files("edgealign") / "presets" / f"{name}.toml"))
    raw = recipe.read_toml(path)
    mistakes: list[str] = []
    steps: list[Step] = []
    known: set[str] = set()
    for entry in raw.get("stage", []):
        try:
            steps.append(_step(entry, known=known))
        except RecipeError as error:
            mistakes.append(f"{error.value}: {error.reason}")
        known.add(str(entry.get("id")))
    if not steps and not mistakes:
        mistakes.append("has no [[stage]]")
    if mistakes:
        raise RecipeError(path, "; ".join(mistakes), "see: edgealign config schema")
    return Preset(
        path.stem,
        str(raw.get("title", path.stem)),
        tuple(steps),
        str(raw.get("final", steps[-1].id)),
        str(raw.get("cost", "")),
    )


def run_preset(preset: Preset, *, out: Path, data: Path | None, force: bool) -> dict[str, Any]:
    """Run what is not yet published below `out`; returns a summary of ids, digests, seconds.

    Raises:
        InputError: the preset needs `--data`.
        CheckFailed: a stage's check failed; later runs take up there.
    """
    if preset.needs_data and (data is None or not data.is_dir()):
        raise InputError(
            data or preset.name, "needs a directory of real data", f"edgealign run {preset.name} --data DIR"
        )
    if force and out.exists():
        shutil.rmtree(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    state = _read_state(out)
    done: list[dict[str, Any]] = []
    absent: set[str] = set()
    for number, step in enumerate(preset.steps, start=1):
        target = out / step.id
        inputs = _without(step.inputs, absent)
        key = step_key(replace(step, inputs=inputs), out=out, data=data)
        head = f"[{number}/{len(preset.steps)}] {step.id}"
        known = state.get(step.id, {})
        entry: dict[str, Any] = {"id": step.id, "digest": known.get("digest"), "seconds": 0.0, "skipped": True}
        done.append(entry)
        if known.get("key") == key and "refused" in known:
            say(f"{head}: {known['refused']}")
            entry["refused"] = known["refused"]
            absent.add(step.id)
            continue
        if is_published(target, known, key):
            say(f"{head}: published already")
            _refuse_failed(target)
            continue
        say(f"{head}: {stages.STAGES[step.run].help}")
        if target.exists():
            shutil.rmtree(target)
        start_s = time.monotonic()
        entry["skipped"] = False
        try:
            run = stages.RUNNERS.load(step.run)
            artifact = run(step.recipe, **_resolve(inputs, out, data), **step.args, out=target)
        except CheckFailed as error:
            if not step.optional:
                raise
            state[step.id] = {"key": key, "refused": error.line()}
            entry |= {"refused": error.line(), "digest": None}
            absent.add(step.id)
            say(f"{head}: {error.line()}")
        else:
            state[step.id] = {"key": key, "digest": artifact.digest}
            entry["digest"] = artifact.digest
        entry["seconds"] = round(time.monotonic() - start_s, 1)
        write_atomic(out / STATE, json.dumps(state, indent=2, sort_keys=True))
        say(f"{head}: done in {entry['seconds']:.0f} s")
        if step.id not in absent:
            _refuse_failed(target)
    return {
        "preset": preset.name,
        "seconds": round(sum(entry["seconds"] for entry in done), 1),
        "result": str(out / preset.final),
        "stages": done,
    }


def plan_preset(preset: Preset, *, out: Path, data: Path | None) -> list[dict[str, Any]]:
    """What `run_preset` would do: each stage's id, what it runs, whether it is published already, and its cost.

    A stage can be estimated once its inputs are there; for the whole preset see `Preset.cost`, which was measured.
    """
    state = _read_state(out)
    planned: list[dict[str, Any]] = []
    fresh = True
    for step in preset.steps:
        if fresh:
            try:
                fresh = is_published(out / step.id, state.get(step.id), step_key(step, out=out, data=data))
            except (InputError, ArtifactError):
                fresh = False
        entry = {"id": step.id, "run": step.run, "published": fresh, "recipe": recipe.to_dict(step.recipe)}
        if not fresh:
            arguments = {**_resolve(step.inputs, out, data), **step.args}
            entry["estimate"] = plan_stage(step.run, step.recipe, arguments)["estimate"]
        planned.append(entry)
    return planned


def step_key(step: Step, *, out: Path, data: Path | None) -> str:
    """The digest of everything that shapes the stage's result."""
    digests = {name: _digests(value) for name, value in _resolve(step.inputs, out, data).items()}
    return hash_json([__version__, step.run, recipe.to_dict(step.recipe), dict(step.args), digests])


def is_published(target: Path, known: Mapping[str, str] | None, key: str) -> bool:
    """Whether `target` is what an earlier run published for the same key, undamaged."""
    if known is None or known.get("key") != key:
        return False
    try:
        return open_artifact(target).digest == known.get("digest")
    except ArtifactError:
        return False


def _refuse_failed(target: Path) -> None:
    """A report is published whatever its verdict; a failed one ends the run, also when it is met again."""
    checks = open_artifact(target, check_digests=False).manifest.checks
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise CheckFailed(target, f"failed: {', '.join(failed)}", f"read: edgealign show {target}")


def _step(entry: Mapping[str, Any], *, known: set[str]) -> Step:
    where = str(entry.get("id", "a stage without id"))
    unknown = set(entry) - STAGE_KEYS
    if unknown or "id" not in entry or "run" not in entry:
        keys = ", ".join(f"unknown key {key}{suggest(key, STAGE_KEYS)}" for key in sorted(unknown))
        raise RecipeError(where, keys or "needs id and run")
    if where in known:
        raise RecipeError(where, "is the id of two stages")
    for path in _paths(entry.get("inputs", {})):
        if path.startswith(builtin.PREFIX):
            if path.removeprefix(builtin.PREFIX) not in builtin.NAMES:
                known_names = ", ".join(builtin.PREFIX + name for name in builtin.NAMES)
                raise RecipeError(where, f"input {path} is no model that comes with edgealign ({known_names})")
        elif not path.startswith("data:") and path.split("/")[0] not in known:
            raise RecipeError(where, f"input {path} is not below an earlier stage")
    built = recipe.build(stages.recipe_class(entry["run"]), entry.get("recipe", {}), where=where)
    return Step(where, entry["run"], built, entry.get("inputs", {}), entry.get("args", {}), bool(entry.get("optional")))


def _paths(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.removeprefix(JUDGE)]
    items = value.values() if isinstance(value, Mapping) else value
    return [path for item in items for path in _paths(item)]


def _resolve(value: Any, out: Path, data: Path | None) -> Any:
    if isinstance(value, str):
        if value.startswith(JUDGE):
            return f"{JUDGE}{_resolve(value.removeprefix(JUDGE), out, data)}"
        if value.startswith("data:"):
            if data is None:
                raise InputError(value, "needs a directory of real data", "add --data DIR")
            return data / value.removeprefix("data:")
        return builtin.built_in(value) if value.startswith(builtin.PREFIX) else out / value
    if isinstance(value, Mapping):
        return {name: _resolve(item, out, data) for name, item in value.items()}
    return [_resolve(item, out, data) for item in value]


def _without(value: Any, absent: set[str]) -> Any:
    """Tables of inputs without the entries of optional stages that published nothing."""
    if isinstance(value, Mapping):
        paths = {name: item.removeprefix(JUDGE) for name, item in value.items() if isinstance(item, str)}
        gone = {name for name, path in paths.items() if path.split("/")[0] in absent}
        return {name: _without(item, absent) for name, item in value.items() if name not in gone}
    return value


def _digests(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _digests(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_digests(item) for item in value]
    if isinstance(value, str):
        value = Path(value.removeprefix(JUDGE))
    if (value / MANIFEST).is_file():
        return open_artifact(value, check_digests=False).digest
    if not value.exists():
        raise InputError(value, "no such file", "check --data, or run the earlier stage")
    return sha256_file(value) if value.is_file() else digest_files(tuple(list_files(value)))


def _read_state(out: Path) -> dict[str, dict[str, str]]:
    try:
        loaded = json.loads((out / STATE).read_text(encoding="utf-8"))
        return loaded if isinstance(loaded, dict) else {}
    except (OSError, ValueError):
        return {}
