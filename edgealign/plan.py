"""Time and memory estimates for `--dry-run`, from file sizes and a short measurement of this machine.

Rules of thumb, stated as such: training costs 6 floating-point operations per parameter and token, a forward
pass 2; AdamW holds weights, gradients and two moments (16 bytes per trained fp32 parameter); English text has
about four bytes per token. No torch is imported.
"""

from __future__ import annotations

import gzip
import json
import struct
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from edgealign import recipe as recipes
from edgealign.models.builtin import built_in
from edgealign.objectives.settings import configure
from edgealign.objectives.table import check_beta, find

FLOPS_PER_PARAMETER_TOKEN = {
    "pretrain": 6, "distill": 6, "sft": 6, "dpo": 8, "personalize": 8, "verify": 2, "export": 2, "eval": 2,
}
BYTES_PER_TOKEN_OF_TEXT = 4
TRAINED_STATE_BYTES = 16
# Of a search over quantisations: rules of thumb from a server's cores.
QUANTISE_CORE_S = 6e-8  # per weight, between Q4_0 and the K types
PROBE_TOKENS = 512
DECODE_S = 6e-11  # per weight and token
LOAD_S = 2.0  # per process


def plan_stage(stage: str, recipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage would read, do and need; nothing is written.

    Raises:
        UsageError, RecipeError: the stage would refuse its objective, a setting of it, or its beta.
    """
    if hasattr(recipe, "objective"):
        check_beta(configure(find(recipe.objective), getattr(recipe, "settings", ()))[0], recipe.beta)
    inputs = {name: _shown(value) for name, value in arguments.items() if value not in (None, [], {})}
    return {
        "run": stage,
        "published": False,
        "inputs": inputs,
        "estimate": _estimate(stage, recipe, arguments),
        "recipe": recipes.to_dict(recipe),
    }


def count_parameters(model: Path) -> int:
    """Parameters in a model directory, read from the safetensors headers."""
    return sum(_tensor_elements(file) for file in sorted(Path(model).glob("*.safetensors")))


def measure_gflops(size: int = 1024, seconds: float = 0.3) -> float:
    """Float32 matrix-multiply speed of this machine now, in 1e9 operations per second."""
    import numpy as np

    left = np.ones((size, size), dtype=np.float32)
    left @ left
    runs, start_s = 0, time.perf_counter()
    while time.perf_counter() - start_s < seconds:
        left @ left
        runs += 1
    return 2 * size**3 * runs / (time.perf_counter() - start_s) / 1e9


def _estimate(stage: str, recipe: Any, arguments: Mapping[str, Any]) -> dict[str, str]:
    model = arguments.get("model")
    if stage not in FLOPS_PER_PARAMETER_TOKEN:
        return {"time and memory": "not estimated for this stage"}
    folder = None if model is None else built_in(model) or Path(str(model))
    if folder is None or not folder.is_dir():
        return {"time and memory": "once its model is there"}
    parameters = count_parameters(folder)
    values = recipes.to_dict(recipe)
    adapts = bool(values.get("lora")) or stage == "personalize"
    trains = stage in ("pretrain", "distill", "sft", "dpo")
    memory = parameters * (TRAINED_STATE_BYTES if trains and not adapts else 4)
    found = {"parameters": f"{parameters:,}", "memory": f"about {memory / 2**30:.1f} GiB for the weights' state"}
    if stage == "export" and values["quant"] == "auto":
        found["search"] = _searching(values, parameters, predicted=bool(arguments.get("device")))
    tokens = sum(_text_bytes(item) for item in _sources(arguments)) / BYTES_PER_TOKEN_OF_TEXT
    if tokens:
        seen = float(values.get("total_tokens") or tokens * float(values.get("epochs", 1) or 1))
        work = FLOPS_PER_PARAMETER_TOKEN[stage] * parameters * seen
        speed = measure_gflops() * 1e9
        if stage == "distill":
            found["teacher"] = _teaching(arguments.get("teacher"), int(values["top_k"]), min(seen, tokens), speed)
        found["time"] = f"about {work / speed:.0f} s at this machine's fp32 matrix speed, if all data is used"
        if values.get("order", "shuffled") != "shuffled":
            found["difficulty"] = _scoring(arguments.get("judges") or [], folder, tokens, speed)
    return found


def _searching(values: Mapping[str, Any], parameters: int, *, predicted: bool) -> str:
    """`--quant auto`: every mixture quantised and compared with torch, then processes in three rounds that halve."""
    from edgealign.runtimes.probe import usable_cores
    from edgealign.tensor_types import SEARCHED

    mixtures = sum(map(len, SEARCHED.values()))
    speed, cores = measure_gflops() * 1e9, int(values["threads"]) or usable_cores()
    compare_s = parameters * (QUANTISE_CORE_S / cores + 2 * PROBE_TOKENS / speed) + LOAD_S
    disk = f"{parameters * 4 / 1e9:.1f} GB for the 32-bit file and more for mixtures, beside --out"
    if predicted:
        return f"about {mixtures * compare_s / 60:.0f} min: {mixtures} mixtures or more compared, none timed; {disk}"
    once_s = parameters * (2 * values["search_prompt"] / speed + values["search_gen"] * DECODE_S)
    rounds = ((mixtures, 2), (mixtures, 3), (mixtures // 4 * 3, int(values["search_repetitions"])))
    timed_s = sum(count * (LOAD_S + (repetitions + 1) * once_s) for count, repetitions in rounds)
    return (
        f"about {(mixtures * compare_s + timed_s) / 60:.0f} min: {mixtures} mixtures or more compared with torch, "
        f"up to {sum(count for count, _ in rounds)} processes timed; {disk}"
    )


def _teaching(teacher: Any, top_k: int, tokens: float, speed: float) -> str:
    """The forward passes and the cache that `distill` needs before it trains; every token once, whatever the epochs."""
    cache = f"about {top_k * 4 * tokens / 2**20:,.0f} MiB of cache"  # two bytes for an id, two for a log-probability
    folder = built_in(teacher) or Path(str(teacher))
    if not folder.is_dir():
        return f"{cache}; one forward pass over the data, once it is there"
    return f"{cache}; one forward pass over the data, about {2 * tokens * count_parameters(folder) / speed:.0f} s"


def _scoring(judges: list[Any], model: Path, tokens: float, speed: float) -> str:
    """The forward passes that `sft --order` needs before it trains."""
    folders = [built_in(entry) or Path(str(entry)) for entry in judges or [model]]
    here = [folder for folder in folders if folder.is_dir()]
    if len(here) < max(1, len(judges)):
        return f"one forward pass over the data by each of {len(judges)} judges, once they are there"
    seconds = 2 * tokens * sum(count_parameters(entry) for entry in here) / speed
    by = f"each of {len(judges)} judges" if judges else "the model itself"
    return f"one forward pass over the data by {by}, about {seconds:.0f} s; kept in the cache"


def _sources(arguments: Mapping[str, Any]) -> list[Path]:
    named = [arguments.get("data") or [], arguments.get("choices") or []]
    items = [item for entry in named for item in (entry if isinstance(entry, list) else [entry])]
    return [Path(str(item)) for item in items if Path(str(item)).is_file()]


def _text_bytes(file: Path) -> int:
    if file.suffix != ".gz":
        return file.stat().st_size
    with gzip.open(file, "rb") as stream:
        return sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))


def _tensor_elements(file: Path) -> int:
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            return 0
        raw = stream.read(min(struct.unpack("<Q", head)[0], 100_000_000))
    try:
        header = json.loads(raw)
        return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError):
        return 0


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
