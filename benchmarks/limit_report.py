"""What benchmarks/decode_limit.py found, as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = {"memory": "0.35", "kernels": "tab:orange", "context": "tab:blue", "fixed": "tab:red"}
# Kernels whose speed from the cache is within this of their speed from memory do not wait for memory.
SAME_SPEED = 1.15


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    heads = ("target", "threads", "ms a token", "memory", "kernels", "context", "fixed", "share of bandwidth",
             "weights GB/s", "from the cache GB/s", "machine GB/s", "limit")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for part in result["parts"]:
        parts = [f"{part[name]:.2f}" for name in PARTS]
        speeds = [f"{part[name] / 1e9:.1f}" for name in ("read_per_s", "cached_per_s", "bandwidth")]
        total = f"{part['ms']:.2f} [{part['low']:.2f}, {part['high']:.2f}]"
        cells = [part["variant"], str(part["threads"]), total, *parts, f"{part['share']:.0%}", *speeds, limit(part)]
        lines.append(f"| {' | '.join(cells)} |")
    settings, card = result["settings"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    lines += ["", (
        f"{settings['shape']}'s shape, random weights; a token after {settings['long']} others, in ms: median over "
        f"{settings['rounds']} rounds [least, most], {settings['repetitions']} repetitions in a fresh process each. "
        "Memory: the weights' bytes over the machine's read bandwidth with as many threads. Kernels: what reading and "
        "multiplying the weights takes beyond that. Context: what the longer prompt adds. Fixed: the same graph with "
        "64 channels. Weights GB/s: bytes over memory and kernels together; from the cache: the same kernels on a "
        "model that fits the last cache. Limit: arithmetic where those two are alike, and memory where the cache is "
        f"at least {SAME_SPEED:g} times as fast."
    ), "", *(f"**{caveat}**" for caveat in result["caveats"]),
        f"{card['cpu']}, {card['cores_usable']} cores, {card['os']}; {versions}."]  # fmt: skip
    return "\n".join(lines)


def limit(part: Mapping[str, Any]) -> str:
    """What the weights' part of a token waits for."""
    return "memory" if part["cached_per_s"] > SAME_SPEED * part["read_per_s"] else "arithmetic"


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Stacked bars of a token's milliseconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = result["parts"]
    figure = Figure(figsize=(11, 1.4 + 0.36 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, part in enumerate(found):
        left = 0.0
        for name, colour in PARTS.items():
            width = max(part[name], 0.0)
            axis.barh(place, width, left=left, color=colour, height=0.7, label=name if place == 0 else None)
            left += width
        axis.text(left, place, f" {1e3 / part['ms']:.0f} tok/s, {part['share']:.0%}", va="center", fontsize=8)
    names = [f"{part['variant']}, {part['threads']} thread{'s' * (part['threads'] > 1)}" for part in found]
    axis.set_yticks(range(len(found)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("ms for one token after 500 others; grey is what reading the weights takes at full bandwidth")
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title(f"{result['settings']['shape']}, {result['machine']['cpu']}", fontsize=10)
    figure.savefig(file, dpi=110, metadata={"Software": None})
