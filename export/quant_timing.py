"""How fast a quantised file decodes: timed here in fresh processes, or predicted for a device from its bandwidth.

A prediction knows how many bytes of weights a token reads and how fast the device reads them, nothing of its kernels:
it is a roof, and two mixtures of one size look alike to it though their types need not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgealign.artifact import Input, file_input, hash_json, open_artifact, sha256_file
from edgealign.bench.cells import Cell
from edgealign.bench.imports import read_card
from edgealign.bench.machine import busy, machine_card
from edgealign.bench.published import read_report
from edgealign.bench.recipes import BenchRecipe
from edgealign.bench.run import measure_cell
from edgealign.bench.timing import rates
from edgealign.errors import InputError, UsageError
from edgealign.export_recipes import ExportRecipe
from edgealign.runtimes.probe import default_threads
from edgealign.runtimes.session import Bundle
from edgealign.tensor_types import Mixture

PAUSE_S = 0.5


@dataclass(frozen=True)
class Timing:
    """One process: samples in tokens per second, or why there are none."""

    prefill: tuple[float, ...] = ()
    decode: tuple[float, ...] = ()
    error: str | None = None


# Takes the mixture, its file and the number of repetitions.
Timer = Callable[[Mixture, Path, int], Timing]


@dataclass(frozen=True)
class Device:
    """Another machine by its card: bytes per second that it reads, and where that is from, for the manifest."""

    card: dict[str, Any]
    bytes_per_s: float
    threads: int | None
    source: Input


def make_timer(recipe: ExportRecipe) -> tuple[Timer, dict[str, Any], list[str]]:
    """The timer of this machine, its card, and what speaks against comparing the numbers."""
    from edgealign.runtimes.probe import extra_buffers_work

    card = machine_card()
    extra_bufts = extra_buffers_work()
    threads = recipe.threads or default_threads()
    caveats = [] if extra_bufts else ["llama.cpp ran with its extra buffers off, slower than a good build"]
    if busy(card):
        caveats.append(f"the machine was busy: {card['cpu_busy_before']:.0%} of its cores in use at the start")

    def timer(mixture: Mixture, file: Path, repetitions: int) -> Timing:
        time.sleep(PAUSE_S)
        bundle = Bundle(file.parent, "gguf", mixture.label, file, {})
        cell = Cell("speed", mixture.label, bundle, threads, recipe.search_prompt, recipe.search_gen)
        found = measure_cell(BenchRecipe(repetitions=repetitions), cell, extra_bufts)
        if "error" in found:
            return Timing(error=str(found["error"]))
        prefill = rates(found["prefill_ns"], recipe.search_prompt)
        return Timing(tuple(prefill), tuple(rates(found["decode_ns"], recipe.search_gen)))

    return timer, card, caveats


def read_device(given: str, *, threads: int) -> Device:
    """A device from a benchmark report's directory, from a machine card as JSON, or from `bandwidth_gb_s=N`.

    Args:
        threads: which of a report's bandwidths is taken; 0, or one that it does not have, takes the most threads.

    Raises:
        UsageError, InputError, ArtifactError: it cannot be read, or says nothing of the bandwidth.
    """
    place = Path(given)
    if place.is_dir():
        report = read_report(place)
        measured = [entry for entry in report.result.get("bandwidth") or () if _is_bandwidth(entry)]
        if not measured:
            raise InputError(given, "is a report without a bandwidth", "measure it on the device: edgealign bench")
        # None where the device's maker states it: for all threads.
        entry = max(measured, key=lambda item: (item["threads"] == threads and threads > 0, item["threads"] or 0))
        source = open_artifact(place, check_digests=False).as_input("device")
        return Device(dict(report.result["machine"]), float(entry["bytes_per_s"]), entry["threads"], source)
    card = read_card([given])
    stated = card.pop("bandwidth_gb_s", None)
    if not stated:
        raise UsageError(given, "says nothing of the bandwidth", "add bandwidth_gb_s to the card, in GB/s")
    if place.is_file():
        source = file_input("device", place, sha256_file(place))
    else:
        source = Input("device", "stated", hash_json(given), given)
    return Device(card, float(stated) * 1e9, None, source)


def _is_bandwidth(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("threads"), (int, type(None))):
        return False
    speed = entry.get("bytes_per_s")
    return isinstance(speed, (int, float)) and not isinstance(speed, bool) and 0 < speed < 1e18
