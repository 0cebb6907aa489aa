"""A benchmark result as a table. A cell that was not measured says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgealign.bench.picture import draw as draw
from edgealign.bench.result import ABSENT, MIB, UNKNOWN, Row, number, pairs, shape
from edgealign.bench.roofline import bandwidth_share

COLUMNS = (
    "target", "quant", "bundle", "adapter", "threads", "prompt + new", "prefill tok/s", "first token ms",
    "decode tok/s", "share of bandwidth", "load ms", "swap ms", "peak MiB", "size MiB", "KL nat",
)  # fmt: skip


def render(result: Mapping[str, Any]) -> str:
    """Markdown: one table of medians, every measure with its spread, what each bundle weighs, the machine."""
    parts = [_summary(result), _measures(result), _bundles(result), _machine(result)]
    return "\n".join(line for part in parts for line in [*part, ""]).rstrip("\n")


def _summary(result: Mapping[str, Any]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    bundles = {bundle["bundle"]: bundle for bundle in result["bundles"]}
    for prompt, decode in pairs(result):
        row = prompt or decode
        assert row is not None
        lines.append("| " + " | ".join(_cells(result, bundles[row["bundle"]], prompt, decode, row)) + " |")
        if row["error"]:
            lines.append(f"| | | {row['bundle']} | {ABSENT}: {row['error']} {'| ' * (len(COLUMNS) - 4)}|")
    lines += ["", *_legend(result)]
    lines += [f"\n{note}." for note in result.get("notes", [])]
    return [*lines, *(f"\n**{caveat}**" for caveat in result["caveats"])]


def _cells(
    result: Mapping[str, Any], bundle: Mapping[str, Any], prompt: Row | None, decode: Row | None, row: Row
) -> list[str]:
    user, first = row["user"], prompt and prompt["ttft_s"]
    share = bandwidth_share(result, decode) if decode else None
    at_load, at_swap = (row["n_threads"] == bundle[f"{kind}_threads"] for kind in ("load", "swap"))
    load = bundle["adapter_load_s"] if user and at_swap else bundle["load_s"] if not user and at_load else None
    size = bundle["adapter_bytes"].get(user) if user else bundle["file_bytes"]
    return [
        row["target"], row["quant"] or UNKNOWN, row["bundle"], f"on: {user}" if user else "off",
        str(row["n_threads"] or UNKNOWN), shape(prompt, decode), _with_sd(prompt),
        f"{first['median'] * 1e3:.1f}" if first else ABSENT, _with_sd(decode),
        _share(result, bundle, share), _median_ms(load),
        (_median_ms(bundle["swap_s"]) if at_swap else ABSENT) if user else "-",
        number(row["peak_bytes"] / MIB) if row["peak_bytes"] else ABSENT,
        number(size / MIB) if size else ABSENT, _fidelity(bundle, user),
    ]  # fmt: skip


def _share(result: Mapping[str, Any], bundle: Mapping[str, Any], share: float | None) -> str:
    """Weights that fit the last cache are not read from memory: such a share may be above one, and limits nothing."""
    if not share:
        return ABSENT
    cached = bundle["token_bytes"]["bytes"] <= (result["machine"].get("cache_bytes") or 0)
    return f"{share:.0%}" + (" (cached)" if cached else "")


def _legend(result: Mapping[str, Any]) -> list[str]:
    repetitions = result["recipe"].get("repetitions")
    samples = f"Medians of {repetitions} repetitions" if repetitions else "Medians"
    how = " after one warm-up, ± standard deviation; a fresh process for each row" if repetitions else ", ± deviation"
    origins = {bundle["fidelity"]["origin"] for bundle in result["bundles"]} - {None}
    return [
        f"{samples}{how}. Decode follows the prompt. First token: from token ids to the choice of the next one, no "
        "tokenising. Load and size are the model's where the adapter is off, and the adapter's own where it is on; "
        "swap is to an adapter that is in memory.",
        "",
        "Share of bandwidth: bytes of weights read for a token x decode speed / the machine's read bandwidth with as "
        "many threads; the KV cache is not counted. Cached: the weights fit the last cache, and memory limits nothing. "
        "KL: mean divergence from torch in 32 bits, adapter off, by "
        + ("; ".join(sorted(origins)) or "nothing: no bundle was verified")
        + ". A bundle of 32-bit weights shows its largest difference of a logit instead.",
    ]


def _fidelity(bundle: Mapping[str, Any], user: str | None) -> str:
    found = bundle["fidelity"]
    if user is not None or (found["kl"] is None and found["largest_logit_gap"] is None):
        return ABSENT
    return f"{found['kl']:.3g}" if found["kl"] is not None else f"logits ± {found['largest_logit_gap']:.1e}"


def _measures(result: Mapping[str, Any]) -> list[str]:
    lines = ["| bundle | adapter | threads | measure | median | mean | sd | p90 |", "|---|---|---|---|---|---|---|---|"]
    for prompt, decode in pairs(result):
        after = f"decode {decode['n_gen']} after {decode['n_depth']}" if decode else ""
        for row, what in ((prompt, f"prefill {prompt['n_prompt']}" if prompt else ""), (decode, after)):
            if row is None or not row["samples_ns"]:
                continue
            values = (row[name] for name in ("median_ts", "avg_ts", "stddev_ts", "p90_ts"))
            head = f"| {row['bundle']} | {row['user'] or 'off'} | {row['n_threads'] or UNKNOWN} |"
            lines.append(f"{head} {what}, tok/s | " + " | ".join(map(number, values)) + " |")
            if row is prompt and row["ttft_s"]:
                lines.append(f"{head} first token after {row['n_prompt']}, ms | {_milliseconds(row['ttft_s'])} |")
    return [*lines, "", "p90 is the slow end: nine of ten repetitions were at least this fast."]


def _bundles(result: Mapping[str, Any]) -> list[str]:
    lines = ["| bundle | measure | median | mean | sd | p90 |", "|---|---|---|---|---|---|"]
    for bundle in result["bundles"]:
        head = f"| {bundle['bundle']} |"
        size, read = bundle["file_bytes"], bundle["token_bytes"]
        lines.append(f"{head} model file, MiB | {number(size / MIB) if size else ABSENT} | | | |")
        count = number(read["bytes"] / MIB) if read["bytes"] else ABSENT
        lines.append(f"{head} read for a token, MiB ({read['how']}) | {count} | | | |")
        for user, size in bundle["adapter_bytes"].items():
            lines.append(f"{head} adapter of {user}, MiB | {number(size / MIB)} | | | |")
        for user, kept in bundle["fidelity"]["change_kept"].items():
            lines.append(f"{head} what {user}'s adapter changes, correlation with torch | {kept:.3f} | | | |")
        at = bundle["load_threads"]
        measures = [(f"load, {bundle['loaded_from']}, {at} threads, ms" if at else "load, ms", "load_s")]
        if bundle["adapter_bytes"]:
            measures += [
                ("adapter from its file, ms", "adapter_load_s"), ("swap to an adapter in memory, ms", "swap_s"),
                ("8-token prompt after a swap, ms", "prompt_after_swap_s"),
                ("8-token prompt otherwise, ms", "prompt_s"),
            ]  # fmt: skip
        lines += [f"{head} {what} | {_milliseconds(bundle[key])} |" for what, key in measures]
        lines += [f"{head} {ABSENT}: {error} | | | | |" for error in bundle["errors"]]
    return lines


def _machine(result: Mapping[str, Any]) -> list[str]:
    card = result["machine"]
    unknown = UNKNOWN
    inside = f"{card['architecture'] or unknown}{', virtual machine' if card['virtual_machine'] else ''}"
    system = f"{card['os'] or unknown}, kernel {card['kernel'] or unknown}, {card['libc'] or 'unknown libc'}"
    python = f", Python {card['python']}" if card["python"] else ""
    busy = card["cpu_busy_before"]
    facts = {
        "measured by": result["source"],
        **({"device": card["device"]} if card.get("device") else {}),
        "CPU": f"{card['cpu'] or unknown} ({inside})",
        "instruction sets": " ".join(card["flags"] or []) or unknown,
        "cores": f"{card['cores_usable'] or '?'} usable of {card['cores_logical'] or '?'}",
        "memory": f"{card['ram_bytes'] / 2**30:.1f} GiB" if card["ram_bytes"] else unknown,
        "last cache": f"{card['cache_bytes'] / MIB:.0f} MiB" if card.get("cache_bytes") else unknown,
        "read bandwidth": _bandwidth(result),
        "frequency governor": card["governor"] or "not readable",
        "system": system + python,
        "versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()) or unknown,
        "cores in use before": unknown if busy is None else f"{busy:.0%}",
        "load average before": " ".join(map(str, card["load_average_before"] or ["not readable"])),
    }
    asked = [row["extra_bufts"] for row in result["results"] if row.get("extra_bufts") is not None]
    if asked:  # llama.cpp's word; no other runtime has such buffers
        facts["llama.cpp's extra buffers"] = "on" if all(asked) else "OFF"
    return [f"- {name}: {fact}" for name, fact in facts.items()]


def _bandwidth(result: Mapping[str, Any]) -> str:
    found = []
    for entry in result["bandwidth"]:
        speed = f"{entry['bytes_per_s'] / 1e9:.1f} GB/s" if entry["bytes_per_s"] else entry["error"] or ABSENT
        found.append(f"{speed} with {entry['threads']} threads" if entry["threads"] else f"{speed} as stated")
    return ", ".join(found) or ABSENT


def _with_sd(row: Row | None) -> str:
    if not row or not row["median_ts"]:
        return ABSENT
    spread = f"± {number(row['stddev_ts'])}" if len(row["samples_ns"]) > 1 else "(one sample)"
    return f"{number(row['median_ts'])} {spread}"


def _median_ms(described: Mapping[str, float] | None) -> str:
    return f"{described['median'] * 1e3:.3g}" if described else ABSENT


def _milliseconds(described: Mapping[str, float] | None) -> str:
    if described is None:
        return f"{ABSENT} | | |"
    return " | ".join(f"{described[name] * 1e3:.3g}" for name in ("median", "mean", "sd", "p90"))
