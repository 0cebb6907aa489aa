"""What does a decoded token's time consist of, and what keeps it above the time that reading the weights takes?

    python benchmarks/decode_limit.py --work runs/limit --out docs/results/decode_limit

Three models of LFM2-350M's shape with random weights, exported to every target, decode side by side, interleaved:

- full: the shape as it is, after a short and after a long prompt;
- thin: as many layers, so as many operations, of 64 channels: what is left is the cost of running a graph at all;
- cached: two layers of full width, small enough for the last cache: the kernels' speed when memory is no limit.

The time after a long prompt is then four parts: `fixed` (thin), `context` (long minus short), `memory` (the weights'
bytes over the measured bandwidth, which no runtime can avoid) and `kernels`, the rest of the weights' time. The cached
model's bytes per second say whether that rest is arithmetic: where they are no more than the full model's, the cores
are busy unpacking weights, and not waiting for them. No parity gate is run; a bundle here is for speed only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limit_report import draw, render
from result_files import write_results
from shapes import make

from edgealign.bench.machine import machine_card
from edgealign.bench.recipes import BenchRecipe
from edgealign.bench.run import measure
from edgealign.errors import EdgealignError
from edgealign.progress import say
from edgealign.runtimes.session import read_bundle

SHAPE, CONTEXT = "lfm2-350m", 1024
SHORT, LONG = 8, 500
PROBES: dict[str, dict[str, object]] = {
    "full": {},
    "thin": {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
             "vocab_size": 512},
    "cached": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "intermediate_size": 2304,
               "vocab_size": 4096},
}  # fmt: skip
# Name -> target, quantisation, how the head is stored.
VARIANTS: dict[str, tuple[str, str, str | None]] = {
    "gguf q4_0": ("gguf", "q4_0", None),
    "gguf q4_0, head q8_0": ("gguf", "q4_0", "q8_0"),
    "gguf q4_k_s": ("gguf", "q4_k_s", None),
    "gguf q8_0": ("gguf", "q8_0", None),
    "onnx int4": ("onnx", "int4", None),
    "executorch 8da4w": ("executorch", "8da4w", None),
}


def prepare(work: Path, names: list[str]) -> dict[tuple[str, str], Path]:
    """The bundles by variant and probe, made where they are missing."""
    bundles = {}
    for probe, changed in PROBES.items():
        model = work / "models" / probe
        for name in names:
            target, quant, head = VARIANTS[name]
            place = bundles[name, probe] = work / "bundles" / f"{target}-{quant}-{head or 'own'}-{probe}"
            if place.is_dir():
                continue
            if not model.is_dir():
                changes = [word for key, value in changed.items() for word in ("--set", f"{key}={json.dumps(value)}")]
                make("--init", SHAPE, *changes, "--model", str(model))
            say(f"{probe}: exporting to {name}")
            more = ["--head", head] if head else []
            make("--model", str(model), "--target", target, "--quant", quant, "--context", str(CONTEXT),
                 "--out", str(place), *more)  # fmt: skip
    return bundles


def measure_round(bundles: Mapping[tuple[str, str], Path], args: argparse.Namespace) -> dict[str, Any]:
    """Every variant and probe once in a fresh process, the full models after both prompts."""
    opened = {f"{name}/{probe}": read_bundle(path, check_digests=False) for (name, probe), path in bundles.items()}
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for prompt, kept in ((LONG, "full"), (SHORT, "")):
        chosen = {key: bundle for key, bundle in opened.items() if key.endswith(kept)}
        recipe = BenchRecipe(
            prompt_tokens=(prompt,), gen_tokens=(args.gen,), threads=args.threads, repetitions=args.repetitions,
            adapter=False, bandwidth=prompt == LONG, timeout_s=args.timeout_s,
        )  # fmt: skip
        part = measure(recipe, chosen)
        rows += [row for row in part["results"] if row["n_gen"]]
        found = {**part, **{key: found[key] for key in ("bandwidth",) if found}}
    return {
        "rows": [{key: row[key] for key in ("bundle", "n_threads", "n_depth", "median_ns", "n_gen", "error")}
                 for row in rows],
        "bandwidth": {str(entry["threads"]): entry["bytes_per_s"] for entry in found["bandwidth"]},
        "bytes": {entry["bundle"]: entry["token_bytes"]["bytes"] for entry in found["bundles"]},
        "caveats": found["caveats"],
    }  # fmt: skip


def split(rounds: list[dict[str, Any]], name: str, threads: int) -> dict[str, Any]:
    """One variant's token after a long prompt, in ms and parts; medians over rounds."""

    def ms(probe: str, depth: int) -> list[float]:
        return [
            row["median_ns"] / row["n_gen"] / 1e6 for found in rounds for row in found["rows"]
            if (row["bundle"], row["n_threads"], row["n_depth"]) == (f"{name}/{probe}", threads, depth)
        ]  # fmt: skip

    samples = {"long": ms("full", LONG), "short": ms("full", SHORT), "thin": ms("thin", SHORT),
               "cached": ms("cached", SHORT)}  # fmt: skip
    long, short, thin, cached = (statistics.median(values) for values in samples.values())
    sizes = rounds[0]["bytes"]
    bandwidth = statistics.median(found["bandwidth"][str(threads)] for found in rounds)
    memory = sizes[f"{name}/full"] / bandwidth * 1e3
    layers = 16  # of the shape; the cached model has two
    few = thin * 2 / layers
    return {
        "variant": name, "threads": threads, "ms": long, "low": min(samples["long"]), "high": max(samples["long"]),
        "fixed": thin, "context": long - short, "memory": memory, "kernels": short - thin - memory,
        "share": memory / long, "bandwidth": bandwidth, "token_bytes": sizes[f"{name}/full"],
        "read_per_s": sizes[f"{name}/full"] / (short - thin) * 1e3,
        "cached_per_s": sizes[f"{name}/cached"] / (cached - few) * 1e3, "samples_ms": samples,
    }  # fmt: skip


def compare(args: argparse.Namespace) -> dict[str, Any]:
    card = machine_card()
    bundles = prepare(args.work, args.variants)
    shutil.rmtree(args.work / "models", ignore_errors=True)
    rounds = []
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        rounds.append(measure_round(bundles, args))
    result = {
        "schema": 1, "machine": card,
        "settings": {"shape": SHAPE, "short": SHORT, "long": LONG, "gen": args.gen, "rounds": args.rounds,
                     "repetitions": args.repetitions},
        "caveats": sorted({caveat for found in rounds for caveat in found["caveats"]}),
        "parts": [split(rounds, name, threads) for name in args.variants for threads in args.threads],
        "rounds": rounds,
    }  # fmt: skip
    write_results(args.out, result, render(result), pictures={"decode_limit.png": lambda file: draw(result, file)})
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--gen", type=int, default=64, help="tokens decoded after each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=5, help="in each fresh process, after a warm-up")
    parser.add_argument("--timeout-s", type=float, default=900.0)
    parser.add_argument("--work", type=Path, default=Path("runs/limit"), help="bundles are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/results/decode_limit"))
    args = parser.parse_args()
    args.threads = tuple(args.threads)
    try:
        print(render(compare(args)))
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
