"""What does our session cost over llama.cpp itself? Decode speed of both loops, on one model in one process.

    python benchmarks/session_overhead.py BUNDLE_OR_GGUF --threads 2 --tokens 128 --rounds 15 --json result.json

The raw loop is llama-bench's: `llama_decode` with one token and `llama_synchronize`, nothing read. Ours is
`LlamaSession.step`, which also checks the token and returns a copy of the logits. Both use the same model, context,
threads and prompt; rounds alternate, and which one goes first alternates too, so that drift hits both. Exit status 1
when our median speed is below 95 % of the raw loop's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.bench.machine import busy, machine_card
from edgealign.bench.timing import Spread, rates, spread, timed
from edgealign.errors import EdgealignError
from edgealign.progress import track
from edgealign.runtimes.llamacpp import LlamaSession, load_library

GOAL = 0.95


def measure(
    path: Path, *, threads: int | None, prompt_tokens: int, tokens: int, rounds: int, seed: int = 0
) -> dict[str, Any]:
    """Alternate the two loops; speeds in tokens per second, and the ratio of each round's pair."""
    card = machine_card()
    with closing(LlamaSession(path, threads=threads, context=prompt_tokens + tokens)) as session:
        rng = np.random.default_rng(seed)
        prompt, following = (
            [int(token) for token in rng.integers(0, session.vocab, count)] for count in (prompt_tokens, tokens)
        )
        loops = {"session": _through_session, "raw": _raw}
        samples_ns: dict[str, list[int]] = {name: [] for name in loops}
        for number in track(range(rounds + 1), total=rounds + 1, label="session against raw loop"):
            for name in list(loops) if number % 2 else list(loops)[::-1]:
                session.reset()
                session.prefill(prompt)
                _, taken_ns = timed(loops[name], session, following)
                if number > 0:
                    samples_ns[name].append(taken_ns)
        facts = session.info()
    facts.pop("chat_template", None)
    pairs = zip(samples_ns["raw"], samples_ns["session"], strict=True)
    ratio = spread([raw / ours for raw, ours in pairs])
    return {
        "model": path.name, "facts": facts, "machine": card, "quiet": not busy(card),
        "n_threads": facts["n_threads"], "n_depth": prompt_tokens, "n_gen": tokens, "rounds": rounds,
        "samples_ns": samples_ns,
        "speeds": {name: _speed(samples, tokens) for name, samples in samples_ns.items()},
        "ratio": vars(ratio), "goal": GOAL, "reached": ratio.median >= GOAL,
        "overhead_us_per_token": (
            spread(samples_ns["session"]).median - spread(samples_ns["raw"]).median
        ) / tokens / 1e3,
    }  # fmt: skip


def render(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| loop | median tok/s | mean | sd | p90 |", "|---|---|---|---|---|"]
    for name, speed in result["speeds"].items():
        cells = [f"{speed[key]:,.2f}" for key in ("median", "mean", "sd", "p90")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratio = Spread(**result["ratio"])
    verdict = "reached" if result["reached"] else "MISSED"
    lines += [
        "",
        f"{result['model']}, {result['facts']['model_type']}, {result['n_threads']} threads, {result['n_gen']} tokens "
        f"after {result['n_depth']}, {result['rounds']} rounds each, alternating, after one warm-up; "
        f"{result['machine']['cpu']}, llama-cpp-python {result['facts']['version']}.",
        f"Session / raw loop: median {ratio.median:.1%}, sd {ratio.sd:.1%} (goal {GOAL:.0%}: {verdict}); "
        f"{result['overhead_us_per_token']:.1f} µs per token.",
    ]
    if not result["quiet"]:
        lines.append("The machine was busy before the measurement: measure again.")
    return "\n".join(lines)


def _speed(samples_ns: Sequence[int], tokens: int) -> dict[str, float]:
    """Tokens per second; p90 is the slow end, the speed at the 90th percentile of the time."""
    return {**vars(spread(rates(samples_ns, tokens))), "p90": tokens * 1e9 / spread(samples_ns).p90}


def _through_session(session: LlamaSession, tokens: Sequence[int]) -> None:
    for token in tokens:
        session.step(token)


def _raw(session: LlamaSession, tokens: Sequence[int]) -> None:
    """llama_decode on the session's own context, past the session."""
    lib = load_library()
    context, batch, buffer = session._context, session._batch, session._tokens
    decode, synchronize = lib.llama_decode, lib.llama_synchronize
    batch.n_tokens = 1
    for token in tokens:
        buffer[0] = token
        decode(context, batch)
        synchronize(context)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a bundle directory or a .gguf file")
    parser.add_argument("--threads", type=int, default=None, help="default: the usable cores")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    given = parser.parse_args()
    try:
        result = measure(
            given.model, threads=given.threads, prompt_tokens=given.prompt_tokens, tokens=given.tokens,
            rounds=given.rounds,
        )  # fmt: skip
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(render(result))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
