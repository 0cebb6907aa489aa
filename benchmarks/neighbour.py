"""What does a busy neighbour cost a runtime? Decode speed by threads and by how long they spin, alone and beside one.

    python benchmarks/neighbour.py BUNDLE [BUNDLE ...] --threads 1 2 --rounds 5 --out docs/results/neighbour

Threads of llama.cpp wait for one another after every operation, spinning for a while and then asleep. A neighbour (a
process that never rests) takes a core from one of them, and all others wait for it. `GOMP_SPINCOUNT` sets how long
OpenMP's threads spin: 1000 is what `edgealign` sets, `own` leaves the runtime its default; ONNX Runtime and ExecuTorch
bring threads of their own, which it does not reach. Every sample is a process of its own; rounds go through all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from result_files import write_results

from edgealign.bench.machine import busy, machine_card
from edgealign.errors import EdgealignError, InputError, UsageError
from edgealign.progress import track
from edgealign.runtimes.session import open_session, read_bundle

SPINS = ("1000", "own")
PROMPT, AGAIN = 32, 256  # tokens before the first that is timed, and after how many it begins anew
NEIGHBOUR = "while True: pass"


def decode(path: Path, threads: int, seconds: float) -> float:
    """Tokens per second, one at a time, of one session in this process."""
    with closing(open_session(path, threads=threads)) as session:
        prompt = list(range(3, 3 + PROMPT))
        session.prefill(prompt)
        count, spent_s = 0, 0.0
        while spent_s < seconds:
            session.reset()
            session.prefill(prompt)
            begun = time.perf_counter()
            for token in range(3, 3 + AGAIN):
                session.step(token)
                count += 1
                if spent_s + time.perf_counter() - begun >= seconds:
                    break
            spent_s += time.perf_counter() - begun
    return count / spent_s


def sample(path: Path, threads: int, spin: str, seconds: float) -> float:
    """`decode` in a process of its own, whose OpenMP threads spin as `spin` says.

    Raises:
        InputError: it broke off.
    """
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {} if spin == "own" else {"GOMP_SPINCOUNT": spin}
    command = [sys.executable, __file__, "--child", str(path), str(threads), str(seconds)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise InputError(path, "its session broke off", (ended.stderr.strip().splitlines() or ["no message"])[-1])
    return float(json.loads(ended.stdout.splitlines()[-1]))


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """This many processes that never rest."""
    running = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def measure(bundles: Sequence[Path], threads: Sequence[int], rounds: int, seconds: float) -> dict[str, Any]:
    """Samples of every combination, in tokens per second."""
    opened = [read_bundle(path) for path in bundles]
    cells: list[dict[str, Any]] = [
        {"bundle": bundle.path.name, "target": bundle.target, "bytes": bundle.model_file.stat().st_size,
         "threads": count, "spin": spin, "neighbours": beside, "samples": []}
        for bundle in opened for count in threads
        for spin in (SPINS if bundle.target == "gguf" else SPINS[:1]) for beside in (0, 1)
    ]  # fmt: skip
    places = {bundle.path.name: bundle.path for bundle in opened}
    result = {"schema": 1, "machine": machine_card(), "rounds": rounds, "seconds": seconds, "cells": cells}
    for number in track(range(rounds * len(cells)), total=rounds * len(cells), label="samples"):
        cell = cells[number % len(cells)]
        with neighbours(cell["neighbours"]):
            cell["samples"].append(sample(places[cell["bundle"]], cell["threads"], cell["spin"], seconds))
    return result


def render(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each bundle, threads and spin."""
    lines = ["| bundle | MB | threads | spin | alone, tok/s | beside a busy process |", "|---|---|---|---|---|---|"]
    cells = result["cells"]
    for alone, beside in zip(cells[::2], cells[1::2], strict=True):
        said = [
            f"{statistics.median(cell['samples']):.0f} ({min(cell['samples']):.0f} to {max(cell['samples']):.0f})"
            for cell in (alone, beside)
        ]
        spin = alone["spin"] if alone["target"] == "gguf" else "-"
        size = f"{alone['bytes'] / 1e6:.1f}"
        lines.append(f"| {alone['bundle']} | {size} | {alone['threads']} | {spin} | {' | '.join(said)} |")
    card = result["machine"]
    lines += [
        "",
        f"Medians of {result['rounds']} processes of {result['seconds']:g} s each, with their range, in turn; "
        f"{card['cpu']}, {card['cores_usable']} cores, {card['os']}.",
    ]
    lines += ["**Others used the machine when this began.**"] if busy(card) else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="bundle directories, each of another name")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one sample")
    parser.add_argument("--out", type=Path, default=Path("docs/results/neighbour"))
    args = parser.parse_args(argv)
    try:
        if min(*args.threads, args.rounds, 1) < 1 or args.seconds <= 0:
            given = f"threads {args.threads}, rounds {args.rounds}, seconds {args.seconds:g}"
            said = "give 1 or more, seconds above 0"
            raise UsageError("--threads, --rounds, --seconds", f"{given}: one is too small", said)
        if len({path.resolve().name for path in args.bundles}) < len(args.bundles):
            raise UsageError("bundles", "two have one name", "copy one under another name")
        result = measure(args.bundles, args.threads, args.rounds, args.seconds)
        write_results(args.out, result, render(result))
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(render(result))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(decode(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
        sys.exit(0)
    sys.exit(main())
