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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, Check, open_artifact, publish, refuse_existing
from edgealign.bench.machine import busy, machine_card
from edgealign.bench.recipes import BenchRecipe
from edgealign.bench.timing import rates, spread
from edgealign.errors import UsageError
from edgealign.progress import track
from edgealign.runtimes.probe import usable_cores
from edgealign.runtimes.session import TARGET_RUNTIMES, Bundle, read_bundle

SCHEMA = 1


@dataclass(frozen=True)
class Cell:
    """One process: what it does (`speed`, `load` or `swap`), to which bundle, in which shape."""

    kind: str
    name: str
    bundle: Bundle
    threads: int
    n_prompt: int = 0
    n_gen: int = 0
    user: str | None = None


def run(recipe: BenchRecipe, *, bundles: Sequence[Path], out: Path | None = None) -> Artifact | dict[str, Any]:
    """Measure, and publish `result.json`, `table.md` and `speed.png` when `out` is given.

    Raises:
        UsageError: no bundle given, or a damaged one.
        ToolMissing: the runtime is not installed.
    """
    from edgealign.bench.report import draw, render

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
        (draft.dir / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (draft.dir / "table.md").write_text(result["text"] + "\n", encoding="utf-8")
        draw(result, draft.dir / "speed.png")
        for check in checks:
            draft.add_check(check)
    return open_artifact(out)


def measure(recipe: BenchRecipe, bundles: dict[str, Bundle]) -> dict[str, Any]:
    """All cells of all bundles; the result is JSON-able."""
    card = machine_card()
    extra_bufts = _extra_bufts(bundles)
    cells = plan(recipe, bundles)
    taken: list[tuple[Cell, str, dict[str, Any]]] = []
    for cell in track(cells, total=len(cells), label="bench"):
        time.sleep(recipe.pause_s)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        taken.append((cell, started, _measure_cell(recipe, cell, extra_bufts)))
    caveats = []
    if not extra_bufts:
        caveats.append("llama.cpp ran with its extra buffers off, slower than a good build: compare nothing with this")
    if busy(card):
        caveats.append(f"the machine was busy: {card['cpu_busy_before']:.0%} of its cores in use before the first cell")
    return {
        "schema": SCHEMA,
        "comparable": not caveats,
        "caveats": caveats,
        "machine": card,
        "recipe": asdict(recipe),
        "results": [row for cell, started, found in taken for row in _rows(cell, started, found, card)],
        "bundles": [_describe(name, bundle, taken) for name, bundle in bundles.items()],
    }


def plan(recipe: BenchRecipe, bundles: dict[str, Bundle]) -> list[Cell]:
    """The cells in the order they run: for each shape the bundles take turns, so that drift hits them alike."""
    cells = []
    counts = [threads or usable_cores() for threads in recipe.threads]
    for n_prompt in recipe.prompt_tokens:
        for n_gen in recipe.gen_tokens:
            for threads in counts:
                for with_user in (False, True):
                    for name, bundle in bundles.items():
                        user = next(iter(bundle.adapters), None) if with_user else None
                        if with_user and (user is None or not recipe.adapter):
                            continue
                        cells.append(Cell("speed", name, bundle, threads, n_prompt, n_gen, user))
    cells += [Cell("load", name, bundle, counts[0]) for name, bundle in bundles.items()]
    if recipe.adapter:
        cells += [Cell("swap", name, bundle, counts[0]) for name, bundle in bundles.items() if bundle.adapters]
    return cells


def _measure_cell(recipe: BenchRecipe, cell: Cell, extra_bufts: bool) -> dict[str, Any]:
    adapters = [str(path) for path in cell.bundle.adapters.values()]
    job = {
        "kind": cell.kind,
        "model_file": str(cell.bundle.model_file),
        "runtime": TARGET_RUNTIMES[cell.bundle.target],
        # Room for the shape and no more, as llama-bench does: a longer cache costs memory.
        "options": {
            "threads": cell.threads, "context": max(cell.n_prompt + cell.n_gen, 64), "extra_bufts": extra_bufts,
        },
        "n_prompt": cell.n_prompt, "n_gen": cell.n_gen, "repetitions": recipe.repetitions, "seed": recipe.seed,
        "adapter": str(cell.bundle.adapters[cell.user]) if cell.user is not None else None, "adapters": adapters,
    }  # fmt: skip
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


def _rows(cell: Cell, started: str, found: dict[str, Any], card: dict[str, Any]) -> list[dict[str, Any]]:
    """The cell as rows with llama-bench's field names: one for the prompt, one for the tokens after it."""
    if cell.kind != "speed":
        return []
    facts = found.get("facts", {})
    common = {
        "bundle": cell.name, "quant": cell.bundle.quant, "user": cell.user,
        "build_commit": None, "build_number": None, "build_version": facts.get("version"),
        "cpu_info": card["cpu"], "gpu_info": "", "backends": "CPU",
        "model_filename": cell.bundle.model_file.name, "model_type": facts.get("model_type"),
        "model_size": facts.get("model_size"), "model_n_params": facts.get("model_n_params"),
        "n_batch": facts.get("n_batch"), "n_ubatch": facts.get("n_ubatch"), "n_threads": cell.threads,
        "cpu_mask": None, "poll": None, "type_k": facts.get("type_k"), "type_v": facts.get("type_v"),
        "flash_attn": facts.get("flash_attn"), "load_mode": "auto", "extra_bufts": facts.get("extra_bufts"),
        "test_time": started, "error": found.get("error"),
    }  # fmt: skip
    prompt = {**common, "n_prompt": cell.n_prompt, "n_gen": 0, "n_depth": 0}
    prompt.update(_times(found.get("prefill_ns"), cell.n_prompt))
    prompt["ttft_ns"] = found.get("ttft_ns")
    prompt["ttft_s"] = _seconds(found.get("ttft_ns"))
    decode = {**common, "n_prompt": 0, "n_gen": cell.n_gen, "n_depth": cell.n_prompt}
    decode.update(_times(found.get("decode_ns"), cell.n_gen))
    for row in (prompt, decode):
        row["peak_bytes"] = found.get("peak_bytes")
        row["interpreter_bytes"] = found.get("interpreter_bytes")
    return [prompt, decode]


def _times(samples_ns: list[int] | None, tokens: int) -> dict[str, Any]:
    """llama-bench's numbers (mean and deviation), and the median and the slow end beside them."""
    if not samples_ns:
        names = ("samples_ns", "samples_ts", "avg_ns", "stddev_ns", "median_ns", "p90_ns", "avg_ts", "stddev_ts",
                 "median_ts", "p90_ts")  # fmt: skip
        return dict.fromkeys(names)
    speeds = rates(samples_ns, tokens)
    times, speed = spread(samples_ns), spread(speeds)
    return {
        "samples_ns": samples_ns, "samples_ts": speeds,
        "avg_ns": times.mean, "stddev_ns": times.sd, "median_ns": times.median, "p90_ns": times.p90,
        "avg_ts": speed.mean, "stddev_ts": speed.sd, "median_ts": speed.median,
        # The slow end of a speed is the speed at the 90th percentile of the time.
        "p90_ts": tokens * 1e9 / times.p90,
    }  # fmt: skip


def _describe(name: str, bundle: Bundle, taken: list[tuple[Cell, str, dict[str, Any]]]) -> dict[str, Any]:
    """What is known of a bundle besides its speeds: sizes, loading, swapping."""
    own = {cell.kind: found for cell, _, found in taken if cell.name == name and cell.kind != "speed"}
    load, swap = own.get("load", {}), own.get("swap", {})
    return {
        "bundle": name,
        "quant": bundle.quant,
        "digest": open_artifact(bundle.path, check_digests=False).digest,
        "file_bytes": bundle.model_bytes,
        "adapter_bytes": {user: path.stat().st_size for user, path in bundle.adapters.items()},
        "model_n_params": load.get("facts", {}).get("model_n_params"),
        "system_info": load.get("facts", {}).get("system_info"),
        "load_s": _seconds(load.get("load_ns")),
        "loaded_from": "page cache (warm)",
        "adapter_load_s": _seconds(swap.get("adapter_load_ns")),
        "swap_s": _seconds(swap.get("swap_ns")),
        "prompt_after_swap_s": _seconds(swap.get("prompt_after_swap_ns")),
        "prompt_s": _seconds(swap.get("prompt_ns")),
        "errors": [found["error"] for found in own.values() if "error" in found],
    }


def _seconds(samples_ns: list[int] | None) -> dict[str, float] | None:
    return asdict(spread([sample / 1e9 for sample in samples_ns])) if samples_ns else None


def _checks(result: dict[str, Any]) -> list[Check]:
    errors = [row["error"] for row in result["results"] if row["error"]]
    errors += [error for bundle in result["bundles"] for error in bundle["errors"]]
    note = errors[0] if errors else "every cell was measured"
    comparable = "; ".join(result["caveats"]) or "machine quiet, extra buffers on"
    return [
        Check("bench.measured", float(len(errors)), 0.0, not errors, note),
        Check("bench.comparable", None, None, True, comparable),
    ]


def _extra_bufts(bundles: dict[str, Bundle]) -> bool:
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
