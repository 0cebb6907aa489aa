"""`edgealign eval preferences` as people read it: `table.md` and `preferences.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "sum_free": "summed", "mean_free": "per token", "sum": "summed, against the first",
    "mean": "per token, against the first",
}  # fmt: skip


def write_report(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the report's files into `folder`."""
    (folder / "table.md").write_text(render(result) + "\n", encoding="utf-8")
    draw(result, folder / "preferences.png")


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    heads = ["model", *(f"ranking {name}" for name in NAMES.values()), "log p chosen", "log p rejected",
             "displacement", "KL on data"]  # fmt: skip
    lines = [f"{result['pairs']:,} held-out pairs; shares with 95 % bootstrap intervals, nats per token.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in result["ranking"].items():
        shares = [_share(row["accuracy"].get(key)) for key in NAMES]
        numbers = [_number(row[key]) for key in ("logp_chosen", "logp_rejected", "displacement", "kl_on_data")]
        lines.append(f"| {' | '.join([name, *shares, *numbers])} |")
    if result["writing"]:
        lines += ["", (
            f"Greedy answers to {result['prompts']} prompts, judged by {result['judge']}. Length-controlled: what the "
            "win rate would be at equal lengths (arXiv 2404.04475, without its instruction term). Slope above 0: the "
            "judge likes length."
        ), ""]  # fmt: skip
        heads = ["model", "grade", "wins", "wins, length-controlled", "slope", "tokens", "ended", "doom loops"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, row in result["writing"].items():
            won = row["win_rate"]
            wins = ["-"] * 3 if won is None else [
                f"{won['raw']:.0%} {_interval(won['raw_interval'])}",
                f"{won['controlled']:.0%} {_interval(won['controlled_interval'])}", f"{won['slope']:+.2f}",
            ]  # fmt: skip
            tokens = f"{row['tokens']['value']:.1f}"
            cells = [name, f"{row['grade']:.3g}", *wins, tokens, f"{row['ended']:.0%}", f"{row['doom_loops']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Ranking accuracy with intervals; beside it win rates, where there was a judge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(result["ranking"])
    panels = 2 if result["writing"] else 1
    figure = Figure(figsize=(6 * panels, 1.6 + 0.5 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for place, name in enumerate(names):
        for shift, (key, colour) in enumerate((("mean_free", "tab:blue"), ("mean", "tab:orange"))):
            share = result["ranking"][name]["accuracy"].get(key)
            if share:
                height = place + 0.2 * shift
                axes[0].plot([share["low"], share["high"]], [height] * 2, color=colour)
                axes[0].plot(share["value"], height, "o", color=colour, label=NAMES[key] if place == 1 else None)
    axes[0].axvline(0.5, color="0.6", linewidth=1)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("share of held-out pairs ranked as people did")
    if len(names) > 1:
        axes[0].legend(fontsize=8)
    if result["writing"]:
        for place, name in enumerate(names):
            won = result["writing"][name]["win_rate"]
            for shift, (key, colour) in enumerate((("raw", "tab:blue"), ("controlled", "tab:orange"))):
                if won:
                    height = place + 0.2 * shift
                    axes[1].plot(won[f"{key}_interval"], [height] * 2, color=colour)
                    label = {"raw": "raw", "controlled": "length-controlled"}[key] if place == 1 else None
                    axes[1].plot(won[key], height, "o", color=colour, label=label)
        axes[1].axvline(0.5, color="0.6", linewidth=1)
        axes[1].set_xlabel(f"share of answers preferred to those of {names[0]} by {result['judge']}")
        if len(names) > 1:
            axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _share(value: Mapping[str, float] | None) -> str:
    return "-" if value is None else f"{value['value']:.1%} {_interval((value['low'], value['high']))}"


def _interval(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.0%}, {ends[1]:.0%}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
