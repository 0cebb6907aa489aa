"""What benchmarks/objectives.py found: tables, the papers' claims beside what was seen, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
MEASURES: Mapping[str, Callable[[Row], float]] = {
    "ranking accuracy": lambda row: row["ranking"]["accuracy"]["mean"]["value"],
    "wins, length-controlled": lambda row: row["writing"]["win_rate"]["controlled"],
    "wins": lambda row: row["writing"]["win_rate"]["raw"],
    "tokens": lambda row: row["writing"]["tokens"]["value"],
    "doom loops": lambda row: row["writing"]["doom_loops"],
    "KL on data": lambda row: row["ranking"]["kl_on_data"],
    "displacement": lambda row: row["ranking"]["displacement"],
    "perplexity": lambda row: row["perplexity"],
}
# What the papers say, as: words, ours, others, flipped share, measure, direction.
CLAIMS = (
    ("LN-DPO writes shorter than DPO (2407.15229)", "ln_dpo", "dpo", 0.0, "tokens", -1),
    ("LD-DPO writes shorter than DPO (2409.06411)", "ld_dpo", "dpo", 0.0, "tokens", -1),
    ("R-DPO writes shorter than DPO (2403.19159)", "rdpo_length", "dpo", 0.0, "tokens", -1),
    ("robust DPO ranks better than DPO where labels are flipped (2403.00409)", "rdpo_robust", "dpo", 0.2,
     "ranking accuracy", 1),
    ("EM reliability ranks better than DPO where labels are flipped (2509.24159)", "lcpo_latent", "dpo", 0.2,
     "ranking accuracy", 1),
    ("APO-zero keeps the chosen answers likelier than DPO does (2408.06266)", "apo_anchored_zero", "dpo", 0.0,
     "displacement", 1),
)  # fmt: skip


def values(rows: Sequence[Row], objective: str, flipped: float, measure: str) -> dict[int, float]:
    """By seed, of the runs that did not fail."""
    return {
        row["seed"]: MEASURES[measure](row) for row in rows
        if (row["objective"], row["flipped"], row["failed"]) == (objective, flipped, None)
    }  # fmt: skip


def judge_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each claim with the difference over shared seeds: confirmed where every seed agrees, against where all differ."""
    found = []
    for words, ours, other, flipped, measure, direction in CLAIMS:
        mine, theirs = (values(rows, name, flipped, measure) for name in (ours, other))
        gaps = [mine[seed] - theirs[seed] for seed in sorted(set(mine) & set(theirs))]
        if not gaps:
            continue
        agree = sum(gap * direction > 0 for gap in gaps)
        verdict = "seen in every seed" if agree == len(gaps) else "not seen in any seed" if agree == 0 else "mixed"
        found.append({"claim": words, "measure": measure, "gaps": gaps, "verdict": verdict})
    return found


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    rows, settings, start = result["runs"], result["settings"], result["start"]
    keys = list(dict.fromkeys(row["objective"] for row in rows))
    lines = [(
        f"{settings['pairs']} pairs a run at learning rate {settings['learning_rate']:g}, {settings['seeds']} seeds; "
        f"{settings['held_out']} held-out pairs, {settings['prompts']} prompts. Medians over seeds [least, most]. The "
        f"judge is a reward head that ranks {result['judge']['held_out_accuracy']:.0%} of its held-out pairs as people "
        "did: a weak judge, so read its win rates as directions. Win rates are over the starting model, which answers "
        f"with {start['tokens']:.1f} tokens, loops in {start['doom_loops']:.0%}, and has perplexity "
        f"{start['perplexity']:.1f}."
    )]  # fmt: skip
    for flipped in sorted({row["flipped"] for row in rows}):
        title = "Clean labels" if flipped == 0 else f"{flipped:.0%} of the labels flipped"
        lines += ["", f"## {title}", "", f"| objective | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
        lines += [_line(rows, key, flipped) for key in keys]
    lines += ["", "## What the papers say, and what was found", "", "| claim | measured | differences by seed | |",
              "|---|---|---|---|"]  # fmt: skip
    for found in judge_claims(rows):
        gaps = ", ".join(f"{gap:+.3f}" for gap in found["gaps"])
        lines.append(f"| {found['claim']} | {found['measure']} | {gaps} | {found['verdict']} |")
    card = result["machine"]
    return "\n".join([*lines, "", f"{card['cpu']}, {card['cores_usable']} cores, {card['os']}."])


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Dots: each seed; filled for clean labels, open for flipped ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["runs"]
    keys = list(dict.fromkeys(row["objective"] for row in rows))
    shown = ("ranking accuracy", "wins, length-controlled", "tokens", "displacement")
    figure = Figure(figsize=(15, 1.5 + 0.3 * len(keys)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, measure in zip(axes, shown, strict=True):
        for place, key in enumerate(keys):
            for flipped, fill, shift in ((0.0, "tab:blue", -0.15), (0.2, "none", 0.15)):
                found = list(values(rows, key, flipped, measure).values())
                axis.plot(found, [place + shift] * len(found), "o", markersize=4, markeredgecolor="tab:blue",
                          markerfacecolor=fill, linestyle="none")  # fmt: skip
        axis.set_title(measure, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].set_yticks(range(len(keys)), keys, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].axvline(0.5, color="0.5", linewidth=1)
    axes[1].axvline(0.5, color="0.5", linewidth=1)
    axes[2].axvline(result["start"]["tokens"], color="0.5", linewidth=1)
    axes[3].axvline(0.0, color="0.5", linewidth=1)
    figure.suptitle("filled: clean labels, open: 20 % flipped; a dot is a seed; grey: chance, or the starting model",
                    fontsize=9)  # fmt: skip
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _line(rows: Sequence[Row], key: str, flipped: float) -> str:
    cells = []
    for measure in MEASURES:
        found = sorted(values(rows, key, flipped, measure).values())
        if not found:
            cells.append("failed")
            continue
        style = ".0%" if measure in ("ranking accuracy", "wins, length-controlled", "wins", "doom loops") else ".3g"
        low, middle, high = found[0], statistics.median(found), found[-1]
        cells.append(f"{middle:{style}} [{low:{style}}, {high:{style}}]")
    return f"| {key} | {' | '.join(cells)} |"
