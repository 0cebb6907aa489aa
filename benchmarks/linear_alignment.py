"""What does linear alignment cost? Decode speed of one stream, of two sessions, and of two sequences in one batch.

    python benchmarks/linear_alignment.py starter runs/q8 runs/onnx runs/pte --out docs/results/linear_alignment

Each model directory or bundle gets a process of its own. `base` is one session's step; `two sessions` and, where the
runtime has it, `one batch` are a `MixedSession`'s step at strength 2, with the mixing and its mask. All are fed the
same random tokens after the same prompt; rounds take turns, and so does which one begins. The first round is not
counted. Before anything is timed both ways of mixing must give the same logits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from result_files import write_results

from edgealign.bench.machine import busy, machine_card
from edgealign.bench.timing import rates, spread, timed
from edgealign.errors import CheckFailed, EdgealignError, UsageError
from edgealign.personalize.linear import Lead, MixedSession, Mixing, mix
from edgealign.progress import track
from edgealign.runtimes.session import Session, open_session
from edgealign.runtimes.streams import TwoSessions, open_streams

BASE, TWO, BATCH = "base", "two sessions", "one batch"
LEAD = 12  # tokens that state the preference
GAP = 1e-2  # of logits, where caches are in 16 bits and a batch of two adds in another order


def measure(path: str, *, threads: int | None, prompt_tokens: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Alternate the loops on one model; speeds in tokens per second."""
    card = machine_card()
    options: dict[str, Any] = {"threads": threads}
    with ExitStack() as stack:
        base = stack.enter_context(closing(open_session(path, **options)))
        facts = json.loads(json.dumps(base.info(), default=str))  # type: ignore[attr-defined]
        rng = np.random.default_rng(0)
        prompt, following = (
            [int(token) for token in rng.integers(3, facts["vocab"], count)] for count in (prompt_tokens, tokens)
        )
        lead = Lead(tuple(prompt[:LEAD]), tuple(prompt[:1]))
        sessions: dict[str, Session] = {BASE: base}
        for name, one_batch in ((TWO, False), (BATCH, True)):
            streams = open_streams(path, one_batch=one_batch, **options)
            stack.callback(streams.close)
            if name == TWO or not isinstance(streams, TwoSessions):
                sessions[name] = MixedSession(streams, lead, Mixing())
        gap = _gap(sessions, prompt, following[:8])
        if gap > GAP:
            raise CheckFailed(path, f"one batch and two sessions differ by {gap:.3g} in a logit", "nothing was timed")
        samples_ns: dict[str, list[int]] = {name: [] for name in sessions}
        for number in track(range(rounds + 1), total=rounds + 1, label=str(facts["runtime"])):
            for name in list(sessions) if number % 2 else list(sessions)[::-1]:
                sessions[name].reset()
                sessions[name].prefill(prompt)
                _, taken_ns = timed(_decode, sessions[name], following)
                if number > 0:
                    samples_ns[name].append(taken_ns)
        left, right = base.step(following[0]), base.step(following[1])
    _, mixing_ns = timed(lambda: [mix(left, right, Mixing()) for _ in range(200)])
    facts.pop("chat_template", None)
    medians = {name: spread(samples).median for name, samples in samples_ns.items()}
    return {
        "model": Path(path).name, "facts": facts, "machine": card, "quiet": not busy(card), "rounds": rounds,
        "n_depth": prompt_tokens, "n_gen": tokens, "samples_ns": samples_ns, "gap": gap,
        "tok_per_s": {name: vars(spread(rates(samples, tokens))) for name, samples in samples_ns.items()},
        "cost": {name: medians[name] / medians[BASE] for name in medians},
        "mixing_us_per_token": mixing_ns / 200 / 1e3,
    }  # fmt: skip


def render(results: Sequence[dict[str, Any]]) -> str:
    """All models in one Markdown table."""
    lines = [
        "| runtime | model | vocabulary | streams | median tok/s | sd | time of one stream | mixing µs a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        facts = result["facts"]
        for name, speed in result["tok_per_s"].items():
            mixing = "-" if name == BASE else f"{result['mixing_us_per_token']:.0f}"
            lines.append(
                f"| {facts['runtime']} | {result['model']} | {facts['vocab']:,} | {name} | {speed['median']:,.1f} | "
                f"{speed['sd']:,.1f} | {result['cost'][name]:.2f} | {mixing} |"
            )
    first = results[0]
    lines += [
        "",
        f"{first['n_gen']} tokens after {first['n_depth']}, {first['facts']['n_threads']} threads, {first['rounds']} "
        f"rounds taking turns after one warm-up; {first['machine']['cpu']}.",
    ]
    if not all(result["quiet"] for result in results):
        lines.append("The machine was busy before the measurement: measure again.")
    return "\n".join(lines)


def _gap(sessions: dict[str, Session], prompt: Sequence[int], following: Sequence[int]) -> float:
    """Largest difference of a finite logit between the ways to mix, over some steps; 0 where there is one way."""
    if BATCH not in sessions:
        return 0.0
    rows = {}
    for name in (TWO, BATCH):
        sessions[name].reset()
        logits = [sessions[name].prefill(prompt), *(sessions[name].step(token) for token in following)]
        rows[name] = np.stack(logits)
        sessions[name].reset()
    both = np.isfinite(rows[TWO]) & np.isfinite(rows[BATCH])
    return float(np.abs(rows[TWO][both] - rows[BATCH][both]).max())


def _decode(session: Session, tokens: Sequence[int]) -> None:
    for token in tokens:
        session.step(token)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="starter, a model directory, or a bundle; repeatable")
    parser.add_argument("--threads", type=int, default=None, help="default: the usable cores")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="table.md and result.json go here")
    given = parser.parse_args()
    try:
        if min(given.rounds, given.tokens) < 1 or given.prompt_tokens < LEAD:
            raise UsageError("the counts", "leave nothing to measure", f"give 1 or more, {LEAD} tokens of a prompt")
        if len(given.model) == 1:
            results = [
                measure(
                    given.model[0], threads=given.threads, prompt_tokens=given.prompt_tokens, tokens=given.tokens,
                    rounds=given.rounds,
                )
            ]  # fmt: skip
        else:
            results = [_apart(model, given) for model in given.model]
        if given.out is not None:
            write_results(given.out, {"models": results}, render(results))
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(render(results))
    return 0


def _apart(model: str, given: argparse.Namespace) -> dict[str, Any]:
    """One model in a process of its own: runtimes bring thread pools that outlive their sessions."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = ("threads", "prompt_tokens", "tokens", "rounds")
        options = [
            part for name in numbers if (value := getattr(given, name)) is not None
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]  # fmt: skip
        command = [sys.executable, __file__, model, "--out", folder, *options]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise CheckFailed(model, f"was not measured ({done.stderr.strip().splitlines()[-1:]})", "see above")
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))["models"][0]
        return result


if __name__ == "__main__":
    sys.exit(main())
