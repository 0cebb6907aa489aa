"""Held-out prediction as people read it: `table.md` and `perplexity.png`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgealign.evaluate.recipes import LanguageRecipe

BASELINE_STYLES = (("0.35", ":"), ("black", "--"))
ROOM_FOR_LABELS = 4.0  # the axis ends at this many times the largest token count


def write_report(folder: Path, result: Mapping[str, Any], recipe: LanguageRecipe) -> None:
    """Write the report's files into `folder`."""
    draw(folder / "perplexity.png", result)
    (folder / "table.md").write_text(render(result, recipe), encoding="utf-8")


def render(result: Mapping[str, Any], recipe: LanguageRecipe) -> str:
    """Markdown: what was predicted, everybody's loss, the differences with their intervals, the baselines by size."""
    held, training = result["held_out"], result["training"]
    lines = [
        f"{held['tokens']:,} held-out tokens of {held['documents']:,} documents ({held['bytes']:,} bytes), in pieces "
        f"of at most {recipe.max_tokens} tokens. Baselines: {training['tokens']:,} training tokens of "
        f"{training['documents']:,} documents, the models' own vocabulary of {training['vocabulary']:,}; "
        f"the {training['order']}-gram is interpolated modified Kneser-Ney.",
        "",
        "| predicts | parameters | training tokens seen | nats per token | perplexity | bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["models"].items():
        seen = f"{row['curve'][-1]['tokens']:,}" if row["curve"] else "not recorded"
        lines.append(f"| {name} | {row['parameters']:,} | {seen} | {_numbers(row)} |")
    for name, row in result["baselines"].items():
        lines.append(f"| {name} | - | {row['curve'][-1]['tokens']:,} | {_numbers(row)} |")
    lines += [
        "",
        f"Differences in nats per token, 95 % bootstrap intervals over {held['resampled']}, paired:",
        "",
        "| model | against | saves | 95 % interval |",
        "|---|---|---|---|",
    ]
    for row in result["differences"]:
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
        lines.append(f"| {row['model']} | {row['other']} | {row['nats']:+.3f} | {interval} |")
    lines += ["", "Perplexity after equal numbers of training tokens (models: from their own curves):", ""]
    lines += _equal_tokens(result)
    elsewhere = [name for name, row in result["models"].items() if row["curve"] and not row["curve_on_this_text"]]
    if elsewhere:
        lines += [
            "",
            f"The curve of {', '.join(elsewhere)} was measured during training, on other held-out rows. The point at "
            "its end and the first table are of the text above.",
        ]
    return "\n".join(lines) + "\n"


def draw(file: Path, result: Mapping[str, Any]) -> None:
    """Held-out perplexity against training tokens, both logarithmic: a line per model and per baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    curves = {name: trained(row["curve"]) for name, row in result["models"].items()}
    baselines = {name: row["curve"] for name, row in result["baselines"].items()}
    right = max(point["tokens"] for curve in [*curves.values(), *baselines.values()] for point in curve)
    left = min(point["tokens"] for curve in [*curves.values(), *baselines.values()] for point in curve)
    labels: list[tuple[float, str, str]] = []
    for (name, curve), (colour, dashes) in zip(baselines.items(), BASELINE_STYLES, strict=False):
        last = _perplexity(curve[-1])
        axis.plot(_tokens(curve), [*map(_perplexity, curve)], color=colour, linestyle=dashes, marker="s", markersize=4)
        axis.plot([curve[-1]["tokens"], right], [last, last], color=colour, linestyle=dashes, linewidth=0.8)
        labels.append((last, f"{name} {last:.1f}", colour))
    for number, (name, row) in enumerate(result["models"].items()):
        colour, now = f"C{number}", row["perplexity"]
        labels.append((now, f"{name} {now:.1f}", colour))
        if not curves[name]:
            axis.plot([left, right], [now, now], color=colour, linewidth=1.2, linestyle="-.")
            continue
        axis.plot(_tokens(curves[name]), [*map(_perplexity, curves[name])], color=colour, linewidth=1.6)
        axis.plot(curves[name][-1]["tokens"], now, color=colour, marker="o", markersize=7)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left / 1.3, right * ROOM_FOR_LABELS)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.grid(alpha=0.25)
    axis.set_xlabel("training tokens")
    axis.set_ylabel("perplexity on held-out text (lower is better)")
    axis.set_title(f"{result['held_out']['tokens']:,} held-out tokens, vocabulary {result['training']['vocabulary']:,}")
    low, high = axis.get_ylim()
    heights = spread([math.log(value) for value, _, _ in labels], gap=0.035 * math.log(high / low))
    for (_, text, colour), height in zip(labels, heights, strict=True):
        axis.text(right * 1.12, math.exp(height), text, color=colour, va="center", fontsize=9)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def trained(curve: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The points that a logarithmic axis can show: the untrained model has seen no token."""
    return [point for point in curve if point["tokens"] > 0]


def spread(values: Sequence[float], *, gap: float) -> list[float]:
    """Heights for labels at `values`, pushed up where two would be nearer than `gap`."""
    placed = [0.0] * len(values)
    floor = -math.inf
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        placed[i] = floor = max(values[i], floor + gap)
    return placed


def at_tokens(curve: Sequence[Mapping[str, float]], tokens: float) -> float | None:
    """Nats per token after `tokens`, on a straight line in the logarithm between two points; None outside of them."""
    points = trained(curve)
    for before, after in pairwise(points):
        if before["tokens"] <= tokens <= after["tokens"]:
            share = math.log(tokens / before["tokens"]) / math.log(after["tokens"] / before["tokens"])
            return before["nats_per_token"] + share * (after["nats_per_token"] - before["nats_per_token"])
    return None


def short_number(value: float) -> str:
    """1,500,000 as 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _equal_tokens(result: Mapping[str, Any]) -> list[str]:
    systems = result["baselines"] | {name: row for name, row in result["models"].items() if row["curve"]}
    lines = [f"| training tokens | {' | '.join(systems)} |", "|---" * (len(systems) + 1) + "|"]
    sizes = [point["tokens"] for point in next(iter(result["baselines"].values()))["curve"]]
    for size in sizes:
        losses = [
            next((point["nats_per_token"] for point in row["curve"] if point["tokens"] == size), None)
            or at_tokens(row["curve"], size)
            for row in systems.values()
        ]
        cells = ["-" if loss is None else f"{math.exp(loss):.1f}" for loss in losses]
        lines.append(f"| {size:,} | {' | '.join(cells)} |")
    return lines


def _numbers(row: Mapping[str, float]) -> str:
    return f"{row['nats_per_token']:.3f} | {row['perplexity']:.1f} | {row['bits_per_byte']:.3f}"


def _tokens(curve: Sequence[Mapping[str, float]]) -> list[float]:
    return [point["tokens"] for point in curve]


def _perplexity(point: Mapping[str, float]) -> float:
    return math.exp(point["nats_per_token"])
