"""What benchmarks/heads.py found: a table per population, what did not work, a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

POINT = 0.01


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    rows, settings, card = result["rows"], result["settings"], result["machine"]
    ks = list(rows[0]["accuracy"])
    lines = [
        f"{settings['seen']} seen users of {settings['choices']} choices, {settings['unseen']} new users x "
        f"{settings['seeds']} seeds, 200 unseen pairs each. Accuracy, mean over users; ± half the 95 % bootstrap "
        "interval.",
    ]  # fmt: skip
    for kind in dict.fromkeys(row["population"] for row in rows):
        head = " | ".join(f"k={k}" for k in ks)
        lines += [
            "", f"## {kind}", "",
            f"| head | {head} | another user's, k={result['control_k']} | by coin | worst tenth, k={ks[-1]} |",
            "|---" * (len(ks) + 4) + "|",
        ]  # fmt: skip
        for row in (row for row in rows if row["population"] == kind):
            cells = [f"{row['accuracy'][k]:.3f} ± {(row['band'][k][1] - row['band'][k][0]) / 2:.3f}" for k in ks]
            controls = [f"{value:.3f}" for value in row["controls"].values()]
            lines.append(f"| {row['head']} | {' | '.join([*cells, *controls])} | {row['worst_decile'][ks[-1]]:.3f} |")
    lines += ["", "## What did not work", "", *(f"- {line}" for line in complaints(rows, result["control_k"]))]
    lines += ["", "## Cost", "", "| head | bytes a user | fit, ms (k=8) | shared part, core-s |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["head"] for row in rows):
        own = [row for row in rows if row["head"] == name]
        fits, learned = (sorted(row[key] for row in own) for key in ("fit_ms", "learn_s"))
        cost = f"{fits[0]:.2f} to {fits[-1]:.2f} | {learned[0]:.1f} to {learned[-1]:.1f}"
        lines.append(f"| {name} | {own[0]['bytes_per_user']} | {cost} |")
    quiet = "" if result["quiet"] else " The machine was busy: times are no more than orders of magnitude."
    return "\n".join([*lines, "", f"{card['cpu']}, one thread.{quiet}"])


def complaints(rows: Any, control_k: int) -> list[str]:
    """Where few choices did not help for sure, where they did harm, and where a control helped."""
    found = []
    for row in rows:
        where, before = f"{row['head']}, {row['population']}", row["accuracy"][_first(row)]
        harm = {k: gain for k, gain in row["gain"].items() if gain < -POINT}
        if harm:
            worst = min(harm, key=lambda k: harm[k])
            found.append(f"{where}: choices do harm, {100 * harm[worst]:+.1f} points at k={worst}")
        elif row["gain_band"][_at(row, control_k)][0] <= 0:
            gain = 100 * row["gain"][_at(row, control_k)]
            found.append(f"{where}: {control_k} choices do not help for sure ({gain:+.1f} points)")
        for control, value in row["controls"].items():
            if value > before + POINT:
                found.append(f"{where}: labels {control} help, {100 * (value - before):+.1f} points")
    return found or ["Nothing: eight choices helped everywhere, and no control did."]


def draw(result: Mapping[str, Any], file: Path) -> None:
    """A panel per population, a line with its band per head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["rows"]
    kinds, heads = (list(dict.fromkeys(row[key] for row in rows)) for key in ("population", "head"))
    columns = min(4, len(kinds))
    height = -(-len(kinds) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * height + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, columns, squeeze=False)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for kind, axis in zip(kinds, axes.flat, strict=False):
        for row in (row for row in rows if row["population"] == kind):
            places = range(len(row["accuracy"]))
            color = f"C{heads.index(row['head'])}"
            style = "--" if row["head"] == "lore-released" else "-"
            axis.plot(places, list(row["accuracy"].values()), style, color=color, label=row["head"], linewidth=1.5)
            low, high = zip(*row["band"].values(), strict=True)
            axis.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)
            axis.set_xticks(places, [str(k) for k in row["accuracy"]])
        axis.set_title(kind, fontsize=10)
        axis.grid(alpha=0.25)
    figure.supxlabel("choices of a new user", fontsize=10)
    figure.supylabel("accuracy on unseen pairs", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(heads), fontsize=9, frameon=False)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _first(row: Any) -> Any:
    return next(iter(row["accuracy"]))


def _at(row: Any, k: int) -> Any:
    """The key of k: a number, or its text after a trip through JSON."""
    return k if k in row["gain"] else str(k)
