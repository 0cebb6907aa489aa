"""Measure bundles: every cell in a fresh process, the bundles taking turns, the result as data.

    result = run(BenchRecipe(prompt_tokens=(512,)), bundles=[Path("a"), Path("b")], out=Path("report"))

A cell whose process fails is in the result with its reason and no numbers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, Check, Draft, open_artifact, publish, refuse_existing
from edgealign.bench import rows
from edgealign.bench.cells import Cell as Cell
from edgealign.bench.cells import plan as plan
from edgealign.bench.machine import busy, machine_card
from edgealign.bench.recipes import BenchRecipe
from edgealign.errors import UsageError
from edgealign.progress import track
from edgealign.runtimes.session import TARGET_RUNTIMES, Bundle, read_bundle

SCHEMA = 2
SOURCE = "edgealign bench"


def run(recipe: BenchRecipe, *, bundles: Sequence[Path], out: Path | None = None) -> Artifact | dict[str, Any]:
    """Measure, and publish `result.json`, `table.md`, `speed.png` and `front.png` when `out` is given.

    Raises:
        UsageError: no bundle given, or a damaged one.
        ToolMissing: the runtime is not installed.
    """
    from edgealign.bench.report import render

    if not bundles:
        raise UsageError("bench", "got no bundle", "give at least one exported bundle")
    if out is not None:
        refuse_existing(Path(out))
    opened = {name: read_bundle(path) for name, path in _names(bundles).items()}
    result = measure(recipe, opened)
    result["text"] = render(result)
    checks = _checks(result)
    if out is None:
        return {**result, "checks": [vars(check) for check in checks]}
    inputs = [open_artifact(path, check_digests=False).as_input(name) for name, path in _names(bundles).items()]
    with publish(Path(out), kind="report", format="bench", stage="bench", recipe=recipe, inputs=inputs) as draft:
        write_report(draft, result)
        for check in checks:
            draft.add_check(check)
    return open_artifact(out)


def write_report(draft: Draft, result: Mapping[str, Any]) -> None:
    """The files of a report: the result as data, as a table and as pictures."""
    from edgealign.bench.picture import draw, draw_front

    text = json.dumps(result, indent=2, allow_nan=False)
    (draft.dir / "result.json").write_text(text + "\n", encoding="utf-8")
    (draft.dir / "table.md").write_text(result["text"] + "\n", encoding="utf-8")
    draw(result, draft.dir / "speed.png")
    draw_front(result, draft.dir / "front.png")


def measure(recipe: BenchRecipe, bundles: Mapping[str, Bundle]) -> dict[str, Any]:
    """All cells of all bundles; the result is JSON-able."""
    card = machine_card()
    extra_bufts = _extra_bufts(bundles)
    cells = plan(recipe, bundles)
    taken: list[rows.Taken] = []
    for cell in track(cells, total=len(cells), label="bench"):
        time.sleep(recipe.pause_s)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        taken.append((cell, started, measure_cell(recipe, cell, extra_bufts)))
    caveats = []
    if not extra_bufts:
        caveats.append("llama.cpp ran with its extra buffers off, slower than a good build: compare nothing with this")
    if busy(card):
        caveats.append(f"the machine was busy: {card['cpu_busy_before']:.0%} of its cores in use before the first cell")
    return {
        "schema": SCHEMA,
        "source": SOURCE,
        "comparable": not caveats,
        "caveats": caveats,
        "machine": card,
        "recipe": asdict(recipe),
        "results": [
            row for number, (cell, started, found) in enumerate(taken)
            for row in rows.speed_rows(cell, number, started, found, card)
        ],
        "bundles": [rows.describe_bundle(name, bundle, taken) for name, bundle in bundles.items()],
        "bandwidth": rows.describe_bandwidth(taken),
    }


def measure_cell(recipe: BenchRecipe, cell: Cell, extra_bufts: bool) -> dict[str, Any]:
    job = {"kind": cell.kind, "threads": cell.threads, "repetitions": recipe.repetitions, "seed": recipe.seed}
    if cell.bundle is not None:
        job |= _bundle_job(cell, cell.bundle, extra_bufts)
    root = str(Path(__file__).resolve().parents[2])
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}  # the runtime's default
    environment = {**own, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgealign.bench.worker"], input=json.dumps(job), capture_output=True, text=True,
            timeout=recipe.timeout_s, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {recipe.timeout_s:g} s"}
    if done.returncode < 0:
        return {"error": f"its process died of {signal.Signals(-done.returncode).name}"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        words = done.stderr.strip().splitlines()
        return {"error": f"ended with status {done.returncode} ({words[-1][:200] if words else 'no message'})"}
    return answer


def _bundle_job(cell: Cell, bundle: Bundle, extra_bufts: bool) -> dict[str, Any]:
    # Room for the shape and no more, as llama-bench does: a longer cache costs memory.
    options: dict[str, Any] = {"threads": cell.threads, "context": max(cell.n_prompt + cell.n_gen, 64)}
    if bundle.target == "gguf":
        options["extra_bufts"] = extra_bufts
    return {
        "model_file": str(bundle.model_file), "runtime": TARGET_RUNTIMES[bundle.target], "options": options,
        "n_prompt": cell.n_prompt, "n_gen": cell.n_gen,
        "adapter": str(bundle.adapters[cell.user]) if cell.user is not None else None,
        "adapters": [str(path) for path in bundle.adapters.values()],
    }  # fmt: skip


def _checks(result: dict[str, Any]) -> list[Check]:
    errors = [row["error"] for row in result["results"] if row["error"]]
    errors += [error for bundle in result["bundles"] for error in bundle["errors"]]
    errors += [f"bandwidth: {entry['error']}" for entry in result["bandwidth"] if entry["error"]]
    note = errors[0] if errors else "every cell was measured"
    comparable = "; ".join(result["caveats"]) or "nothing speaks against it"
    return [
        Check("bench.measured", float(len(errors)), 0.0, not errors, note),
        Check("bench.comparable", None, None, True, comparable),
    ]


def _extra_bufts(bundles: Mapping[str, Bundle]) -> bool:
    """Ask the probe once, here, where its message reaches the terminal."""
    from edgealign.runtimes.probe import extra_buffers_work

    return extra_buffers_work() if any(bundle.target == "gguf" for bundle in bundles.values()) else True


def _names(bundles: Sequence[Path]) -> dict[str, Path]:
    """A short name for each directory: its own, numbered where two have the same."""
    named: dict[str, Path] = {}
    for path in map(Path, bundles):
        base = path.resolve().name
        name = base if base not in named else f"{base}-{sum(key.startswith(base) for key in named) + 1}"
        named[name] = path
    return named
