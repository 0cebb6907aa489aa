"""What a finished cell becomes in the result: rows with llama-bench's field names, facts of each bundle, bandwidth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from edgealign.artifact import Artifact, open_artifact
from edgealign.bench.cells import Cell
from edgealign.bench.roofline import count_token_bytes
from edgealign.bench.timing import rates, spread
from edgealign.runtimes.session import Bundle

Taken = tuple[Cell, str, dict[str, Any]]  # a cell, when it began, what its process found
UNTIMED = ("samples_ns", "samples_ts", "avg_ns", "stddev_ns", "median_ns", "p90_ns", "avg_ts", "stddev_ts",
           "median_ts", "p90_ts")  # fmt: skip


def speed_rows(
    cell: Cell, number: int, started: str, found: Mapping[str, Any], card: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A speed cell as two rows of one `cell` number: the prompt, and the tokens after it."""
    if cell.kind != "speed":
        return []
    assert cell.bundle is not None
    facts = found.get("facts", {})
    common = {
        "cell": number, "bundle": cell.name, "target": cell.bundle.target, "quant": cell.bundle.quant,
        "user": cell.user,
        "build_commit": None, "build_number": None, "build_version": facts.get("version"),
        "cpu_info": card["cpu"], "gpu_info": "", "backends": "CPU",
        "model_filename": cell.bundle.model_file.name, "model_type": facts.get("model_type"),
        "model_size": facts.get("model_size"), "model_n_params": facts.get("model_n_params"),
        "n_batch": facts.get("n_batch"), "n_ubatch": facts.get("n_ubatch"), "n_threads": cell.threads,
        "cpu_mask": None, "poll": None, "type_k": facts.get("type_k"), "type_v": facts.get("type_v"),
        "flash_attn": facts.get("flash_attn"), "load_mode": "auto", "extra_bufts": facts.get("extra_bufts"),
        "test_time": started, "error": found.get("error"),
        "peak_bytes": found.get("peak_bytes"), "interpreter_bytes": found.get("interpreter_bytes"),
    }  # fmt: skip
    prompt = {**common, "n_prompt": cell.n_prompt, "n_gen": 0, "n_depth": 0}
    prompt.update(describe_times(found.get("prefill_ns"), cell.n_prompt))
    prompt["ttft_ns"] = found.get("ttft_ns")
    prompt["ttft_s"] = describe_seconds(found.get("ttft_ns"))
    decode = {**common, "n_prompt": 0, "n_gen": cell.n_gen, "n_depth": cell.n_prompt}
    decode.update(describe_times(found.get("decode_ns"), cell.n_gen))
    return [prompt, decode]


def describe_times(samples_ns: Sequence[int] | None, tokens: int) -> dict[str, Any]:
    """llama-bench's numbers (mean and deviation), and the median and the slow end beside them."""
    if not samples_ns:
        return dict.fromkeys(UNTIMED)
    speeds = rates(samples_ns, tokens)
    times, speed = spread(samples_ns), spread(speeds)
    return {
        "samples_ns": list(samples_ns), "samples_ts": speeds,
        "avg_ns": times.mean, "stddev_ns": times.sd, "median_ns": times.median, "p90_ns": times.p90,
        "avg_ts": speed.mean, "stddev_ts": speed.sd, "median_ts": speed.median,
        # The slow end of a speed is the speed at the 90th percentile of the time.
        "p90_ts": tokens * 1e9 / times.p90,
    }  # fmt: skip


def describe_seconds(samples_ns: Sequence[int] | None) -> dict[str, float] | None:
    return asdict(spread([sample / 1e9 for sample in samples_ns])) if samples_ns else None


def describe_bundle(name: str, bundle: Bundle, taken: Sequence[Taken]) -> dict[str, Any]:
    """What is known of a bundle besides its speeds: sizes, loading, swapping, fidelity, bytes read for a token."""
    own = {cell.kind: (cell, found) for cell, _, found in taken if cell.name == name and cell.kind != "speed"}
    load, swap = (own[kind][1] if kind in own else {} for kind in ("load", "swap"))
    artifact = open_artifact(bundle.path, check_digests=False)
    return {
        **describe_model(name, bundle, artifact),
        "model_n_params": load.get("facts", {}).get("model_n_params"),
        "system_info": load.get("facts", {}).get("system_info"),
        "load_s": describe_seconds(load.get("load_ns")),
        "load_threads": own["load"][0].threads if "load" in own else None,
        "loaded_from": "page cache (warm)",
        "adapter_load_s": describe_seconds(swap.get("adapter_load_ns")),
        "swap_s": describe_seconds(swap.get("swap_ns")),
        "swap_threads": own["swap"][0].threads if "swap" in own else None,
        "prompt_after_swap_s": describe_seconds(swap.get("prompt_after_swap_ns")),
        "prompt_s": describe_seconds(swap.get("prompt_ns")),
        "errors": [found["error"] for _, found in own.values() if "error" in found],
    }


def describe_model(name: str, bundle: Bundle, artifact: Artifact) -> dict[str, Any]:
    """The part of a bundle's description that its files and its manifest tell."""
    digest = artifact.meta.get("model_digest")
    return {
        "bundle": name,
        "target": bundle.target,
        "quant": bundle.quant,
        "digest": artifact.digest,
        "model_digest": str(digest) if digest else None,
        "file_bytes": bundle.model_bytes,
        "adapter_bytes": {user: path.stat().st_size for user, path in bundle.adapters.items()},
        "fidelity": read_fidelity(artifact),
        "token_bytes": count_token_bytes(bundle),
    }


def read_fidelity(artifact: Artifact) -> dict[str, Any]:
    """How far the bundle is from the torch reference, by the verdicts that its manifest holds.

    A quantised bundle has a mean KL divergence; one of 32-bit weights has the largest difference of a logit, of which
    the KL is less than twice. A bundle that was published unverified has neither.
    """
    values = {
        check.name: check.value
        for check in artifact.manifest.checks
        if isinstance(check.value, (int, float)) and math.isfinite(check.value)
    }
    kept = {name.removeprefix("survival."): value for name, value in values.items() if name.startswith("survival.")}
    known = "quant.kl" in values or "logits.base" in values
    return {
        "kl": values.get("quant.kl"),
        "largest_logit_gap": values.get("logits.base"),
        "change_kept": kept,
        "origin": f"the parity gate, when the bundle was published ({artifact.manifest.stage})" if known else None,
    }


def describe_bandwidth(taken: Sequence[Taken]) -> list[dict[str, Any]]:
    """Read bandwidth in bytes per second for each number of threads; the best read counts."""
    found = []
    for cell, _, answer in taken:
        if cell.kind != "bandwidth":
            continue
        samples = [answer["read_bytes"] * 1e9 / sample for sample in answer.get("read_ns", [])]
        found.append({
            "threads": cell.threads,
            "bytes_per_s": max(samples, default=None),
            "samples": samples,
            "buffer_bytes": answer.get("read_bytes"),
            "error": answer.get("error"),
        })
    return found
