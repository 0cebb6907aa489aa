"""What benchmarks/shapes.py found, as ratios, a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.bench.result import MIB, number

MEASURES = ("prefill", "decode")
COLOURS = {"gguf": "tab:blue", "onnx": "tab:orange"}


def ratios(
    groups: Mapping[str, Sequence[str]], cells: Sequence[Mapping[str, Any]], sizes: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The first shape of a group over each other one: the median of the rounds' ratios, and between which they lie."""
    found = []
    settings = dict.fromkeys((cell["group"], cell["target"], cell["prompt"], cell["threads"]) for cell in cells)
    for group, target, prompt, threads in settings:
        first, *others = groups[group]
        own = [
            cell for cell in cells
            if (cell["group"], cell["target"], cell["prompt"], cell["threads"]) == (group, target, prompt, threads)
        ]  # fmt: skip
        by_round = {(cell["shape"], cell["round"]): cell for cell in own}
        for other in others:
            entry: dict[str, Any] = {
                "group": group, "target": target, "prompt": prompt, "threads": threads, "shape": first, "other": other,
                "bytes_ratio": _ratio_of_bytes(sizes, f"{first}-{target}", f"{other}-{target}"),
            }  # fmt: skip
            for which in MEASURES:
                values = [
                    cell[which] / by_round[other, cell["round"]][which] for cell in own
                    if cell["shape"] == first and cell[which] and by_round.get((other, cell["round"]), {}).get(which)
                ]  # fmt: skip
                entry[which] = _describe(values)
            found.append(entry)
    return found


def render(result: Mapping[str, Any]) -> str:
    """Markdown: ratios, speeds, exports, and where LFM2 loses."""
    lines = [
        "| target | threads | prompt | LFM2's shape | against | bytes a token | prefill | decode | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["ratios"]:
        size = f"{entry['bytes_ratio']:.2f}x" if entry["bytes_ratio"] else "not counted"
        verdicts = ", ".join(f"{which}: {entry[which]['verdict']}" for which in MEASURES if entry[which])
        cells = [entry["target"], str(entry["threads"]), str(entry["prompt"]), entry["shape"], entry["other"], size]
        lines.append(f"| {' | '.join([*cells, *(_ratio_cell(entry[which]) for which in MEASURES), verdicts])} |")
    settings = result["settings"]
    lines += ["", (
        f"LFM2 / other: median over {settings['rounds']} rounds [least, most] of the ratio within a round; more than "
        f"1: LFM2 is faster. A round: a fresh process each, {settings['repetitions']} repetitions after a warm-up, "
        f"decoding {settings['gen']} tokens after the prompt. Random weights; no parity gate was run on them. Sizes "
        "differ: the bytes of weights read for a token say by how much."
    ), "", _losses(result)]  # fmt: skip
    lines += ["", *(f"**{caveat}**" for caveat in result["caveats"])]
    lines += ["", "| shape | target | threads | prompt | prefill tok/s | decode tok/s | peak MiB |", "|---" * 7 + "|"]
    lines += list(_speed_lines(result["cells"]))
    heads = ("shape", "target", "weights", "export s", "export peak MiB", "file MiB", "MiB a token")
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for entry in result["exports"]:
        size = result["sizes"].get(f"{entry['shape']}-{entry['target']}", {})
        sizes = [number(size[key] / MIB) if size.get(key) else "-" for key in ("file_bytes", "token_bytes")]
        cost = [f"{entry['seconds']:.0f}", number(entry["peak_bytes"] / MIB)]
        head = [entry["shape"], f"{entry['target']} {entry['quant']}", f"{entry['parameters']:,}"]
        lines.append(f"| {' | '.join([*head, *cost, *sizes])} |")
    card = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    return "\n".join([*lines, "", f"{card['cpu']}, {card['cores_usable']} cores, {card['os']}; {versions}."])


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Every ratio with its spread over rounds; right of the line LFM2's shape is faster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = result["ratios"]
    figure = Figure(figsize=(12, 1.6 + 0.28 * max(len(entries), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    labels = [
        f"{entry['shape']} / {entry['other']}, {entry['target']}, prompt {entry['prompt']}, threads {entry['threads']}"
        for entry in entries
    ]  # fmt: skip
    for axis, which in zip(axes, MEASURES, strict=True):
        for place, entry in enumerate(entries):
            found = entry[which]
            if found is None:
                axis.text(1.0, place, "not measured", fontsize=7, va="center")
                continue
            colour = COLOURS[entry["target"]]
            axis.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.5)
            axis.plot(found["median"], place, "o", color=colour, markersize=5)
            axis.plot(1 / entry["bytes_ratio"] if entry["bytes_ratio"] else 1.0, place, "|", color="0.5", markersize=10)
        axis.axvline(1.0, color="0.3", linewidth=1)
        axis.set_title(f"{which}: LFM2 / other (right of 1 LFM2 is faster)", fontsize=10)
        axis.grid(alpha=0.25, axis="x")
    axes[0].set_yticks(range(len(entries)), labels, fontsize=7)
    axes[0].invert_yaxis()
    figure.suptitle(f"{result['machine']['cpu']}; grey tick: what the bytes of weights alone would give", fontsize=9)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _describe(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    low, high = min(values), max(values)
    verdict = "LFM2 is faster" if low > 1 else "LFM2 loses" if high < 1 else "no difference shown"
    if len(values) == 1:
        verdict += " (one round)"
    return {"n": len(values), "median": statistics.median(values), "low": low, "high": high, "verdict": verdict}


def _ratio_of_bytes(sizes: Mapping[str, Mapping[str, Any]], first: str, other: str) -> float | None:
    mine, theirs = (sizes.get(name, {}).get("token_bytes") for name in (first, other))
    return mine / theirs if mine and theirs else None


def _losses(result: Mapping[str, Any]) -> str:
    lost = [
        f"{which} against {entry['other']} ({entry['target']}, prompt {entry['prompt']}, threads {entry['threads']}, "
        f"{entry[which]['median']:.2f}x)"
        for entry in result["ratios"] for which in MEASURES
        if entry[which] and entry[which]["verdict"].startswith("LFM2 loses")
    ]  # fmt: skip
    return f"LFM2 loses: {'; '.join(lost)}." if lost else "LFM2 loses nowhere in this table."


def _speed_lines(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    keys = dict.fromkeys((cell["shape"], cell["target"], cell["threads"], cell["prompt"]) for cell in cells)
    for key in keys:
        own = [cell for cell in cells if (cell["shape"], cell["target"], cell["threads"], cell["prompt"]) == key]
        speeds = []
        for which in MEASURES:
            values = [cell[which] for cell in own if cell[which]]
            spread = f" [{number(min(values))}, {number(max(values))}]" if values else ""
            speed = number(statistics.median(values)) if values else f"not measured: {own[0]['error']}"
            speeds.append(f"{speed}{spread}")
        peak = max((cell["peak_bytes"] or 0 for cell in own), default=0)
        yield f"| {' | '.join([*map(str, key), *speeds, number(peak / MIB) if peak else 'not measured'])} |"


def _ratio_cell(found: Mapping[str, Any] | None) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else "not measured"
