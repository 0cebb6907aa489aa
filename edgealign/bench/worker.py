"""One cell of the benchmark, in a process of its own: a job on standard input, its samples on standard output.

    echo '{"kind": "speed", ...}' | python -m edgealign.bench.worker

Kinds: `speed` feeds a prompt and then single tokens, `load` opens the model again and again, `swap` changes users,
`bandwidth` reads memory and needs no model.
Tokens are random and drawn beforehand, so no tokenising and no sampling is timed, as in llama-bench.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.bench.machine import last_cache_bytes, peak_bytes
from edgealign.bench.timing import timed
from edgealign.errors import EdgealignError
from edgealign.runtimes.session import open_session

SWAP_PROMPT = 8
# A buffer this many times the last cache, and at least so large: what the cache still holds of it hardly counts.
CACHES, LEAST_BUFFER = 4, 256 * 2**20
READS_PER_REPETITION = 3


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job; times in ns, one list entry per repetition (the warm-up is not among them)."""
    before = peak_bytes()
    result = KINDS[job["kind"]](job)
    return {**result, "peak_bytes": peak_bytes(), "interpreter_bytes": before}


def time_speed(job: dict[str, Any]) -> dict[str, Any]:
    """Prefill, first token and decode of one shape, in a fresh state each time."""
    samples: dict[str, list[int]] = {"prefill_ns": [], "ttft_ns": [], "decode_ns": []}
    with closing(_open(job)) as session:
        facts = session.info()
        prompt, following = _tokens(job, facts, job["n_prompt"]), _tokens(job, facts, job["n_gen"])
        if job["adapter"]:
            session.set_user(Path(job["adapter"]))
        for repetition in range(job["repetitions"] + 1):
            session.reset()
            logits, prefill_ns = timed(session.prefill, prompt)
            _, choice_ns = timed(np.argmax, logits)
            _, decode_ns = timed(_feed, session, following)
            if repetition > 0:
                samples["prefill_ns"].append(prefill_ns)
                samples["ttft_ns"].append(prefill_ns + choice_ns)
                samples["decode_ns"].append(decode_ns)
    return {**samples, "facts": facts}


def time_load(job: dict[str, Any]) -> dict[str, Any]:
    """Opening the model until it can take a prompt; the file is in the page cache (a cold start is slower)."""
    samples: list[int] = []
    for repetition in range(job["repetitions"] + 1):
        session, load_ns = timed(_open, job)
        facts = session.info()
        session.close()
        if repetition > 0:
            samples.append(load_ns)
    return {"load_ns": samples, "facts": facts}


def time_swap(job: dict[str, Any]) -> dict[str, Any]:
    """Reading an adapter, changing to one that is in memory, and the first prompt after the change."""
    names = ("adapter_load_ns", "swap_ns", "prompt_after_swap_ns", "prompt_ns")
    samples: dict[str, list[int]] = {name: [] for name in names}
    user, *others = (Path(path) for path in job["adapters"])
    with closing(_open(job)) as session:
        facts = session.info()
        prompt = _tokens(job, facts, SWAP_PROMPT)
        for repetition in range(job["repetitions"] + 1):
            session.unload_adapters()
            _, load_ns = timed(session.set_user, user)
            session.set_user(others[0] if others else None)
            session.prefill(prompt)
            _, swap_ns = timed(session.set_user, user)
            _, after_ns = timed(session.prefill, prompt)
            session.reset()
            _, again_ns = timed(session.prefill, prompt)
            if repetition > 0:
                for name, value in zip(names, (load_ns, swap_ns, after_ns, again_ns), strict=True):
                    samples[name].append(value)
    return {**samples, "prompt_tokens": SWAP_PROMPT, "facts": facts}


def time_bandwidth(job: dict[str, Any]) -> dict[str, Any]:
    """Reading memory once from end to end by the wanted number of threads: a roof for decoding.

    A sum of 64-bit integers and the norm of floats take turns, because on some machines one of them reads faster than
    the other; the fastest read of all is the limit, so each repetition is the best of its reads.
    """
    import torch

    torch.set_num_threads(job["threads"])
    size = max(CACHES * (last_cache_bytes() or 0), LEAST_BUFFER)
    # Written before it is read: untouched pages would all be the same zeros.
    floats = torch.ones(size // 4)
    numbers = floats.view(torch.int64)
    samples = []
    for repetition in range(job["repetitions"] + 1):
        reads_ns = [timed(read)[1] for _ in range(READS_PER_REPETITION) for read in (numbers.sum, floats.norm)]
        if repetition > 0:
            samples.append(min(reads_ns))
    return {"read_ns": samples, "read_bytes": size}


def _open(job: dict[str, Any]) -> Any:
    return open_session(job["model_file"], runtime=job["runtime"], **job["options"])


def _feed(session: Any, tokens: Sequence[int]) -> None:
    step = session.step
    for token in tokens:
        step(token)


def _tokens(job: dict[str, Any], facts: dict[str, Any], count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(job["seed"]).integers(0, facts["vocab"], count)]


KINDS = {"speed": time_speed, "load": time_load, "swap": time_swap, "bandwidth": time_bandwidth}


def main() -> int:
    """Answer one job with one JSON line; whatever native code prints goes to standard error."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        result = work(json.load(sys.stdin))
    except EdgealignError as error:
        result = {"error": error.line()}
    answer.write(json.dumps(result) + "\n")
    answer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
