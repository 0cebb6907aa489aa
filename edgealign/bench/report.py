"""A benchmark result as a table and a picture. A cell that was not measured says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MIB = 2**20
ABSENT = "not measured"


def render(result: Mapping[str, Any]) -> str:
    """Markdown: a summary of medians, every measure with its spread, what each bundle weighs, the machine."""
    lines = [*_summary(result), "", *_measures(result), "", *_bundles(result), "", *_machine(result)]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Bars of the medians with the standard deviation, one colour per bundle; prefill, decode and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pairs = [(prompt, decode) for prompt, decode in _pairs(result) if prompt["median_ts"] and decode["median_ts"]]
    names = list(dict.fromkeys(prompt["bundle"] for prompt, _ in pairs))
    colours = {name: plt.get_cmap("tab10")(place % 10) for place, name in enumerate(names)}
    labels = [_label(prompt, decode, threads=len({p["n_threads"] for p, _ in pairs}) > 1) for prompt, decode in pairs]
    places = range(len(pairs))
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.8 + 0.5 * max(len(pairs), 2)), sharey=True, layout="constrained")
    for axis, which, title in ((axes[0], 0, "Prefill"), (axes[1], 1, "Decode")):
        rows = [pair[which] for pair in pairs]
        values, deviations = [row["median_ts"] for row in rows], [row["stddev_ts"] for row in rows]
        below = [min(value, deviation) for value, deviation in zip(values, deviations, strict=True)]
        shades = [colours[row["bundle"]] for row in rows]
        axis.barh(places, values, xerr=[below, deviations], color=shades, ecolor="0.2", capsize=3)
        ends = [value + deviation for value, deviation in zip(values, deviations, strict=True)]
        for place, value, end in zip(places, values, ends, strict=True):
            axis.text(end, place, f"  {_number(value)}", ha="left", va="center")
        axis.set_xlim(0, max([*ends, 1.0]) * 1.25)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("tokens per second, median ± sd")
        axis.set_title(f"{title} (longer is better)")
    sizes = {bundle["bundle"]: bundle["file_bytes"] / MIB for bundle in result["bundles"]}
    peaks = [(prompt["peak_bytes"] or 0) / MIB for prompt, _ in pairs]
    axes[2].barh(places, peaks, color=[colours[prompt["bundle"]] for prompt, _ in pairs])
    for place, ((prompt, _), peak) in enumerate(zip(pairs, peaks, strict=True)):
        size = sizes[prompt["bundle"]]
        axes[2].plot([size, size], [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes[2].text(peak, place, f" {_number(peak)}", ha="left", va="center")
    axes[2].set_xlim(0, max([*peaks, *sizes.values(), 1.0]) * 1.2)
    axes[2].set_xlabel("MiB of the process; black line: model file")
    axes[2].set_title("Peak memory (shorter is better)")
    axes[0].set_yticks(list(places), labels)
    axes[0].invert_yaxis()
    figure.suptitle(_machine_line(result), fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _summary(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "| bundle | quant | user | threads | prompt + new | prefill tok/s | first token ms | decode tok/s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for prompt, decode in _pairs(result):
        first = prompt["ttft_s"]
        cells = [
            prompt["bundle"], prompt["quant"], prompt["user"] or "none", str(prompt["n_threads"]),
            f"{prompt['n_prompt']} + {decode['n_gen']}", _with_sd(prompt),
            f"{first['median'] * 1e3:.1f}" if first else ABSENT, _with_sd(decode),
            _number(prompt["peak_bytes"] / MIB) if prompt["peak_bytes"] else ABSENT,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
        if prompt["error"]:
            lines.append(f"| {prompt['bundle']} | {ABSENT}: {prompt['error']} | | | | | | | |")
    repetitions = result["recipe"]["repetitions"]
    lines += [
        "",
        f"Medians of {repetitions} repetitions after one warm-up, ± standard deviation; a fresh process for each row. "
        "Decode follows the prompt. First token: from token ids to the choice of the next one, no tokenising.",
    ]
    return [*lines, *(f"\n**{caveat}**" for caveat in result["caveats"])]


def _measures(result: Mapping[str, Any]) -> list[str]:
    lines = ["| bundle | user | threads | measure | median | mean | sd | p90 |", "|---|---|---|---|---|---|---|---|"]
    for prompt, decode in _pairs(result):
        if not prompt["samples_ns"]:
            continue
        head = f"| {prompt['bundle']} | {prompt['user'] or 'none'} | {prompt['n_threads']} |"
        after = f"decode {decode['n_gen']} after {decode['n_depth']}"
        for row, what in ((prompt, f"prefill {prompt['n_prompt']}"), (decode, after)):
            values = (row[name] for name in ("median_ts", "avg_ts", "stddev_ts", "p90_ts"))
            lines.append(f"{head} {what}, tok/s | " + " | ".join(map(_number, values)) + " |")
        lines.append(f"{head} first token after {prompt['n_prompt']}, ms | {_milliseconds(prompt['ttft_s'])} |")
    return [*lines, "", "p90 is the slow end: nine of ten repetitions were at least this fast."]


def _bundles(result: Mapping[str, Any]) -> list[str]:
    lines = ["| bundle | measure | median | mean | sd | p90 |", "|---|---|---|---|---|---|"]
    for bundle in result["bundles"]:
        head = f"| {bundle['bundle']} |"
        lines.append(f"{head} model file, MiB | {_number(bundle['file_bytes'] / MIB)} | | | |")
        for user, size in bundle["adapter_bytes"].items():
            lines.append(f"{head} adapter of {user}, MiB | {_number(size / MIB)} | | | |")
        measures = [(f"load, {bundle['loaded_from']}, ms", "load_s")]
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
    ram = f"{card['ram_bytes'] / 2**30:.1f} GiB" if card["ram_bytes"] else "unknown"
    facts = {
        "CPU": f"{card['cpu']} ({card['architecture']}{', virtual machine' if card['virtual_machine'] else ''})",
        "instruction sets": " ".join(card["flags"]) or "unknown",
        "cores": f"{card['cores_usable']} usable of {card['cores_logical']}",
        "memory": ram,
        "frequency governor": card["governor"] or "not readable",
        "system": f"{card['os']}, kernel {card['kernel']}, {card['libc'] or 'unknown libc'}, Python {card['python']}",
        "versions": ", ".join(f"{name} {number}" for name, number in card["versions"].items()),
        "cores in use before": f"{card['cpu_busy_before']:.0%}",
        "load average before": " ".join(map(str, card["load_average_before"] or ["not readable"])),
        "extra buffers": "on" if all(row["extra_bufts"] is not False for row in result["results"]) else "OFF",
    }
    return [f"- {name}: {fact}" for name, fact in facts.items()]


def _machine_line(result: Mapping[str, Any]) -> str:
    card = result["machine"]
    threads = sorted({row["n_threads"] for row in result["results"]})
    line = f"{card['cpu']}, threads: {', '.join(map(str, threads))}, {card['os']}"
    return line if result["comparable"] else f"{line}. NOT COMPARABLE: {result['caveats'][0]}"


def _pairs(result: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    rows = result["results"]
    return list(zip(rows[::2], rows[1::2], strict=True))


def _label(prompt: Mapping[str, Any], decode: Mapping[str, Any], *, threads: bool) -> str:
    parts = [prompt["bundle"], f"{prompt['n_prompt']}+{decode['n_gen']} tokens"]
    parts += [f"{prompt['n_threads']} threads"] if threads else []
    return ", ".join(parts) + (f"\nadapter {prompt['user']}" if prompt["user"] else "\nno adapter")


def _with_sd(row: Mapping[str, Any]) -> str:
    return f"{_number(row['median_ts'])} ± {_number(row['stddev_ts'])}" if row["median_ts"] else ABSENT


def _milliseconds(described: Mapping[str, float] | None) -> str:
    if described is None:
        return f"{ABSENT} | | |"
    return " | ".join(f"{described[name] * 1e3:.3g}" for name in ("median", "mean", "sd", "p90"))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
