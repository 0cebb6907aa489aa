"""Does LFM2's shape prefill and decode faster than attention-only shapes of its size on a CPU?

    python benchmarks/shapes.py --pairs small --work runs/shapes --out docs/results/shapes
    python benchmarks/shapes.py --pairs all --targets gguf,onnx --prompts 512,2048 --threads 1,2 --rounds 3

Named shapes with random weights (`edgealign init`), at Q4_0 in llama.cpp and int4 in onnxruntime. Speed does not depend
on what weights say, so none of them is trained, and no parity gate is run: the export functions are called themselves,
in a process whose time and peak memory are reported (benchmarks/random_bundle.py). The shapes take turns: a round gives
each of them one fresh process (`edgealign bench`), the next round goes through them in the opposite order. A ratio is
taken within a round, and its spread is over rounds.

Every step is kept in `--work`; the same command goes on where an earlier one stopped. A model's weights are deleted as
soon as its bundles are there. `--out` gets result.json, table.md and shapes.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_files import write_results
from shapes_report import draw, ratios, render

from edgealign.artifact import write_atomic
from edgealign.bench.machine import machine_card
from edgealign.bench.recipes import BenchRecipe
from edgealign.bench.run import measure
from edgealign.errors import EdgealignError, InputError, OutputError, UsageError, writing
from edgealign.models.shapes import parameter_count, shape
from edgealign.progress import say
from edgealign.runtimes.session import read_bundle

# LFM2's shape first, then what it is held against.
GROUPS: dict[str, tuple[str, ...]] = {
    "small": ("lfm2-350m", "qwen3-0.6b", "smollm2-360m"),
    "large": ("lfm2-1.2b", "llama-3.2-1b", "gemma-3-1b"),
}
# Positions of an ONNX graph, unless the prompts need more.
LEAST_CONTEXT = 4096
QUANT = {"gguf": "q4_0", "onnx": "int4"}
# Bytes of disk per weight while an export runs: the model in 16 bits, and what its exporter writes on the way.
DISK_PER_WEIGHT = {"gguf": 2 + 5.0, "onnx": 2 + 9.5}
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "random_bundle.py"


@dataclass(frozen=True)
class Block:
    """What one round measures at once: all shapes of a group in one setting."""

    group: str
    target: str
    prompt: int
    threads: int
    round: int

    def file(self, args: argparse.Namespace) -> Path:
        shape_of_cell = f"p{self.prompt}-g{args.gen}-n{args.repetitions}-t{self.threads}"
        return Path(args.work) / "cells" / f"{self.group}-{self.target}-{shape_of_cell}-r{self.round}.json"


def prepare(name: str, args: argparse.Namespace) -> dict[str, Path]:
    """The bundles of one shape by target, made where they are missing."""
    work = Path(args.work)
    context = min(max(LEAST_CONTEXT, *(prompt + args.gen for prompt in args.prompts)), _positions(name))
    bundles = {target: work / "bundles" / f"{name}-{target}-{context}" for target in args.targets}
    costs = {target: work / "exports" / f"{name}-{target}.json" for target in args.targets}
    missing = [target for target, place in bundles.items() if not (place.is_dir() and costs[target].is_file())]
    if not missing:
        return bundles
    count = parameter_count(name)
    _require_space(work, count, missing)
    model = work / "models" / name
    if not model.is_dir():
        say(f"{name}: {count:,} random weights")
        make("--init", name, "--model", str(model))
    for target in missing:
        say(f"{name}: exporting to {target}")
        shutil.rmtree(bundles[target], ignore_errors=True)  # of a run that was stopped before it wrote the cost down
        made = make(
            "--model", str(model), "--target", target, "--quant", QUANT[target], "--context", str(context),
            "--out", str(bundles[target]),
        )  # fmt: skip
        cost = {"shape": name, "target": target, "quant": QUANT[target], "parameters": count, **made}
        _write(costs[target], cost)
    shutil.rmtree(model)
    return bundles


def measure_block(block: Block, bundles: Mapping[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """One round of one setting, or what is remembered of it; a cell that failed is measured again."""
    file = block.file(args)
    if file.is_file():
        known = _read(file)
        if not any(row["error"] for row in known["results"]):
            return known
    names = list(bundles) if block.round % 2 == 0 else list(bundles)[::-1]
    recipe = BenchRecipe(
        prompt_tokens=(block.prompt,), gen_tokens=(args.gen,), threads=(block.threads,), repetitions=args.repetitions,
        adapter=False, bandwidth=False, timeout_s=args.timeout_s,
    )  # fmt: skip
    result = measure(recipe, {name: read_bundle(bundles[name], check_digests=False) for name in names})
    _write(file, result)
    return result


def blocks(args: argparse.Namespace, group: str) -> Iterator[Block]:
    """Round by round, so that a run that is stopped has every setting about equally often."""
    for number_of_round in range(args.rounds):
        for target in args.targets:
            for prompt in args.prompts:
                for threads in args.threads:
                    yield Block(group, target, prompt, threads, number_of_round)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Everything: exports, rounds, ratios; written to `args.out`."""
    _check_machine(args)
    cells: list[dict[str, Any]] = []
    sizes: dict[str, dict[str, Any]] = {}
    caveats: set[str] = set()
    for group in args.pairs:
        made = {name: prepare(name, args) for name in GROUPS[group]}
        todo = list(blocks(args, group))
        for place, block in enumerate(todo, start=1):
            say(f"{group}: {block.target}, prompt {block.prompt}, threads {block.threads}, round {block.round + 1} "
                f"({place} of {len(todo)})")  # fmt: skip
            found = measure_block(block, {name: made[name][block.target] for name in GROUPS[group]}, args)
            caveats.update(found["caveats"])
            cells += _cells(block, found)
            for entry in found["bundles"]:
                sizes[f"{entry['bundle']}-{block.target}"] = {
                    "file_bytes": entry["file_bytes"], "token_bytes": entry["token_bytes"]["bytes"],
                }  # fmt: skip
    exports = [_read(file) for file in sorted((Path(args.work) / "exports").glob("*.json"))]
    wanted = {name for group in args.pairs for name in GROUPS[group]}
    result = {
        "schema": 1, "machine": _read(Path(args.work) / "machine.json"),
        "settings": {
            "pairs": args.pairs, "targets": args.targets, "prompts": args.prompts, "threads": args.threads,
            "gen": args.gen, "rounds": args.rounds, "repetitions": args.repetitions,
        },
        "exports": [entry for entry in exports if entry["shape"] in wanted and entry["target"] in args.targets],
        "sizes": sizes, "caveats": sorted(caveats), "cells": cells, "ratios": ratios(GROUPS, cells, sizes),
    }  # fmt: skip
    write_results(args.out, result, render(result), pictures={"shapes.png": lambda file: draw(result, file)})
    return result


def _cells(block: Block, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each shape: medians of its fresh process in tokens per second, and the error if there was one."""
    entries: dict[str, dict[str, Any]] = {}
    for row in found["results"]:
        name = row["bundle"]
        entry = entries.setdefault(name, {
            "group": block.group, "target": block.target, "prompt": block.prompt, "threads": block.threads,
            "round": block.round, "shape": name, "prefill": None, "decode": None, "peak_bytes": row["peak_bytes"],
            "error": row["error"],
        })  # fmt: skip
        entry["prefill" if row["n_prompt"] else "decode"] = row["median_ts"]
    return list(entries.values())


def make(*arguments: str) -> dict[str, Any]:
    """benchmarks/random_bundle.py in a process of its own, whose time and peak memory are its answer."""
    command = [sys.executable, str(PROGRAM), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        reason = f"ended with status {done.returncode} (its messages are above)"
        raise EdgealignError(" ".join([PROGRAM.name, *arguments]), reason, "out of memory? leave it out") from error
    if done.returncode != 0:
        raise EdgealignError(*answer["error"])
    return answer


def _positions(name: str) -> int:
    return int(str(shape(name).facts["max_position_embeddings"]))


def _require_space(work: Path, count: int, targets: Sequence[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    needed = round(count * max(DISK_PER_WEIGHT[target] for target in targets))
    free = shutil.disk_usage(work).free
    if free < needed:
        reason = f"has {free / 2**30:.1f} GiB free, exporting takes {needed / 2**30:.1f} for a while"
        raise OutputError(work, reason, "free some space or choose another --work")


def _check_machine(args: argparse.Namespace) -> None:
    """What is kept in a work directory is of one machine with one set of runtimes."""
    file, card = Path(args.work) / "machine.json", machine_card()
    if not file.is_file():
        _write(file, card)
        return
    known = _read(file)
    for part in ("cpu", "cores_usable", "versions"):
        if known.get(part) != card[part]:
            reason = f"holds measurements of another machine or installation ({part})"
            raise InputError(args.work, reason, "choose another --work")


def _write(file: Path, value: Mapping[str, Any]) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(value))


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(file, "is damaged", "remove it and run the command again") from error
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="small", help="small, large or all")
    parser.add_argument("--targets", default="gguf,onnx")
    parser.add_argument("--prompts", default="512,2048", help="tokens")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--gen", type=int, default=64, help="tokens decoded after the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3, help="in each fresh process, after a warm-up")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="give up on a process after this long")
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"), help="bundles and cells are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/results/shapes"))
    args = parser.parse_args(argv)
    args.pairs = list(GROUPS) if args.pairs == "all" else args.pairs.split(",")
    args.targets = args.targets.split(",")
    args.prompts, args.threads = (_counts(item) for item in (args.prompts, args.threads))
    return args


def _counts(text: str) -> list[int]:
    return [int(item) if item.isdigit() else 0 for item in text.split(",")]


def _check(args: argparse.Namespace) -> None:
    for items, known in ((args.pairs, GROUPS), (args.targets, QUANT)):
        for item in items:
            if item not in known:
                raise UsageError(item, "is not known here", f"choose from: {', '.join(known)}")
    for name in ("prompts", "threads"):
        if not all(count > 0 for count in getattr(args, name)):
            raise UsageError(f"--{name}", "takes numbers above zero, with commas", "see --help")
    if args.rounds < 1 or args.repetitions < 2 or args.gen < 1:
        raise UsageError("--rounds, --repetitions, --gen", "are at least 1, 2 and 1", "see --help")
    for name in (name for group in args.pairs for name in GROUPS[group]):
        if (longest := max(args.prompts) + args.gen) > _positions(name):
            raise UsageError(name, f"has {_positions(name)} positions, {longest} are asked for", "shorten --prompts")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        _check(args)
        result = compare(args)
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
