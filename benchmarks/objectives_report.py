"""What benchmarks/objectives.py found: tables, the papers' claims beside what was seen, a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import write_atomic
from edgealign.errors import InputError, writing
from edgealign.objectives.table import find

Row = Mapping[str, Any]
# Ranking by four scales, as edgealign.evaluate.preferences names them: an objective moves its own most.
SCALES: Mapping[str, str] = {
    "ranking by sums": "sum", "by means": "mean", "sums, no reference": "sum_free", "means, no reference": "mean_free",
}  # fmt: skip


def _accuracy(scale: str) -> Callable[[Row], float]:
    return lambda row: float(row["ranking"]["accuracy"][scale]["value"])


MEASURES: Mapping[str, Callable[[Row], float]] = {
    **{name: _accuracy(scale) for name, scale in SCALES.items()},
    "wins, length-controlled": lambda row: row["writing"]["win_rate"]["controlled"],
    "wins": lambda row: row["writing"]["win_rate"]["raw"],
    "tokens": lambda row: row["writing"]["tokens"]["value"],
    "ended": lambda row: row["writing"]["ended"],
    "doom loops": lambda row: row["writing"]["doom_loops"],
    "KL on data": lambda row: row["ranking"]["kl_on_data"],
    "displacement": lambda row: row["ranking"]["displacement"],
    "perplexity": lambda row: row["perplexity"],
}
WRITING = tuple(name for name in MEASURES if name not in SCALES)
SHARES = (*SCALES, "wins, length-controlled", "wins", "ended", "doom loops")
# What the papers say, as: words, ours, others, flipped share, measures, direction.
CLAIMS = (
    ("LN-DPO writes shorter than DPO (2407.15229)", "ln_dpo", "dpo", 0.0, ("tokens",), -1),
    ("LD-DPO writes shorter than DPO (2409.06411)", "ld_dpo", "dpo", 0.0, ("tokens",), -1),
    ("R-DPO writes shorter than DPO (2403.19159)", "rdpo_length", "dpo", 0.0, ("tokens",), -1),
    ("robust DPO ranks better than DPO where labels are flipped (2403.00409)", "rdpo_robust", "dpo", 0.2,
     ("ranking by sums", "by means"), 1),
    ("EM reliability ranks better than DPO where labels are flipped (2509.24159)", "lcpo_latent", "dpo", 0.2,
     ("ranking by sums", "by means"), 1),
    ("APO-zero keeps the chosen answers likelier than DPO does (2408.06266)", "apo_anchored_zero", "dpo", 0.0,
     ("displacement",), 1),
    ("iterative RPO's likelihood term keeps the chosen answers likelier than DPO does (2404.19733)",
     "iterative_reasoning_rpo", "dpo", 0.0, ("displacement",), 1),
    ("decoupled betas and SFT keep the chosen answers likelier than DPO does (2406.07327)",
     "decoupled_betas", "dpo", 0.0, ("displacement",), 1),
    ("APO-down makes the chosen answers less likely than DPO does (2408.06266)", "apo_anchored_down", "dpo", 0.0,
     ("displacement",), -1),
    ("BAPO stays nearer to the starting model than DPO does (2407.00693)", "bapo_base_anchor", "dpo", 0.0,
     ("KL on data",), -1),
    ("MRPO ranks better than DPO (2405.16388)", "mrpo", "dpo", 0.0, ("ranking by sums", "by means"), 1),
    ("RosePO ranks better than DPO where labels are flipped (2410.12519)", "rosepo", "dpo", 0.2,
     ("ranking by sums", "by means"), 1),
    ("KTO wins more often than DPO (2402.01306: it matches or exceeds it)", "kto", "dpo", 0.0,
     ("wins, length-controlled",), 1),
    ("HyPO stays nearer to the starting model than DPO does (2406.01462)", "hypo_online_kl", "dpo", 0.0,
     ("KL on data",), -1),
    ("HyPO wins more often than DPO (2406.01462)", "hypo_online_kl", "dpo", 0.0, ("wins, length-controlled",), 1),
    ("RRPO stays nearer to the starting model than DPO does (2504.12083)", "rrpo", "dpo", 0.0, ("KL on data",), -1),
    ("SparsePO wins more often than DPO (2410.05102)", "sparse_po", "dpo", 0.0, ("wins, length-controlled",), 1),
    ("relative PO wins more often than DPO (2402.10958)", "rpo_relative", "dpo", 0.0,
     ("wins, length-controlled",), 1),
)  # fmt: skip


def merge(files: Sequence[Path]) -> dict[str, Any]:
    """One result of several, whose runs were made alike: the first one's, with the others' runs behind its own.

    Raises:
        InputError: a file is no result, or was made with other settings, another start, judge or machine.
    """
    results = []
    for file in files:
        try:
            result = json.loads(Path(file).read_text(encoding="utf-8"))
            result["runs"], result["settings"], result["start"], result["judge"], result["machine"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(file, "is no result.json of this program", "give one that --out got") from error
        results.append(result)
    whole: dict[str, Any] = results[0]
    known = {_name(row) for row in whole["runs"]}
    for file, result in zip(files[1:], results[1:], strict=True):
        for part in ("settings", "start", "judge"):
            if result[part] != whole[part]:
                raise InputError(file, f"has another {part} than {files[0]}", "give results that were made alike")
        if any(result["machine"].get(part) != whole["machine"].get(part) for part in ("cpu", "versions")):
            raise InputError(file, f"is of another machine or versions than {files[0]}", "keep the two apart")
        twice = [_name(row) for row in result["runs"] if _name(row) in known]
        if twice:
            raise InputError(file, f"has the run {twice[0]}, which {files[0]} has too", "give each run once")
        known |= {_name(row) for row in result["runs"]}
        whole["runs"] += result["runs"]
    return whole


def write(result: Mapping[str, Any], out: Path) -> None:
    """result.json, table.md and objectives.png in a directory."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "result.json", json.dumps(result, indent=1) + "\n")
        write_atomic(out / "table.md", render(result) + "\n")
        draw(result, out / "objectives.png")


def values(rows: Sequence[Row], objective: str, flipped: float, measure: str) -> dict[int, float]:
    """By seed, of the runs that did not fail."""
    return {
        row["seed"]: MEASURES[measure](row) for row in rows
        if (row["objective"], row["flipped"], row["failed"]) == (objective, flipped, None)
    }  # fmt: skip


def own_scale(objective: str) -> str:
    """The way of ranking that an objective is trained on: what it averages or sums, and whether against a reference."""
    entry = find(objective)
    scale = ("mean" if entry.per_token else "sum") + ("_free" if entry.reference == "none" else "")
    return next(name for name, known in SCALES.items() if known == scale)


def judge_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each claim with the difference over shared seeds: confirmed where every seed agrees, against where all differ."""
    found = []
    for words, ours, other, flipped, measures, direction in CLAIMS:
        for measure in measures:
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
    lines = [(
        f"{settings['pairs']} pairs a run at learning rate {settings['learning_rate']:g}, {settings['seeds']} seeds; "
        f"{settings['held_out']} held-out pairs, {settings['prompts']} prompts. Medians over seeds [least, most]. The "
        f"judge is a reward head that ranks {result['judge']['held_out_accuracy']:.0%} of its held-out pairs as people "
        "did: a weak judge, so read its win rates as directions. Win rates are over the starting model, which answers "
        f"with {start['tokens']:.1f} tokens, loops in {start['doom_loops']:.0%}, and has perplexity "
        f"{start['perplexity']:.1f}. Answers stop after 64 tokens, so mean lengths are too small where few have ended."
    )]  # fmt: skip
    for flipped in sorted({row["flipped"] for row in rows}):
        title = "Clean labels" if flipped == 0 else f"{flipped:.0%} of the labels flipped"
        lines += ["", f"## {title}: held-out pairs ranked as people did", "", (
            "Bold: the objective's own scale. The longer answer is the chosen one in "
            f"{start['longer_is_chosen']:.1%} of these pairs. The starting model, which has no log-ratios, ranks "
            f"{start['accuracy']['sum_free']:.1%} right by sums and {start['accuracy']['mean_free']:.1%} by means."
        )]  # fmt: skip
        lines += _table(rows, flipped, tuple(SCALES))
        lines += ["", f"## {title}: what is written, and how far the model has gone", *_table(rows, flipped, WRITING)]
    lines += ["", "## What the papers say, and what was found", "", "| claim | measured | differences by seed | |",
              "|---|---|---|---|"]  # fmt: skip
    for found in judge_claims(rows):
        gaps = ", ".join(f"{gap:+.3f}" for gap in found["gaps"])
        lines.append(f"| {found['claim']} | {found['measure']} | {gaps} | {found['verdict']} |")
    card = result["machine"]
    return "\n".join([*lines, "", f"{card['cpu']}, {card['cores_usable']} cores, {card['os']}."])


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Dots: each seed; filled for clean labels, open for flipped ones; orange in the objective's own scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["runs"]
    keys = list(dict.fromkeys(row["objective"] for row in rows))
    shown = ("ranking by sums", "by means", "means, no reference", "wins, length-controlled", "tokens", "displacement")
    start = result["start"]
    grey = {"tokens": start["tokens"], "displacement": 0.0, "means, no reference": start["accuracy"]["mean_free"]}
    figure = Figure(figsize=(18, 1.5 + 0.3 * len(keys)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, measure in zip(axes, shown, strict=True):
        axis.axvline(grey.get(measure, 0.5), color="0.5", linewidth=1)
        if measure == "ranking by sums":
            axis.axvline(start["longer_is_chosen"], color="0.5", linewidth=1, linestyle=":")
        for place, key in enumerate(keys):
            color = "tab:orange" if measure == own_scale(key) else "tab:blue"
            for flipped, fill, shift in ((0.0, color, -0.15), (0.2, "none", 0.15)):
                found = list(values(rows, key, flipped, measure).values())
                axis.plot(found, [place + shift] * len(found), "o", markersize=4, markeredgecolor=color,
                          markerfacecolor=fill, linestyle="none")  # fmt: skip
        if measure in SCALES:
            low, high = axis.get_xlim()
            axis.set_xlim(min(0.38, low), max(0.69, high))
        axis.set_title(measure, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].set_yticks(range(len(keys)), keys, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(
        "filled: clean labels, open: 20 % flipped; a dot is a seed; orange: the scale that the objective is trained "
        "on; grey: chance, or the starting model; dotted: taking the longer answer", fontsize=9,
    )  # fmt: skip
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _table(rows: Sequence[Row], flipped: float, measures: Sequence[str]) -> list[str]:
    keys = dict.fromkeys(row["objective"] for row in rows)
    head = ["", f"| objective | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
    return [*head, *(f"| {key} | {' | '.join(_cells(rows, key, flipped, measures))} |" for key in keys)]


def _cells(rows: Sequence[Row], key: str, flipped: float, measures: Sequence[str]) -> list[str]:
    cells = []
    for measure in measures:
        found = sorted(values(rows, key, flipped, measure).values())
        if not found:
            cells.append("failed")
            continue
        style = ".1%" if measure in SCALES else ".0%" if measure in SHARES else ".3g"
        low, middle, high = found[0], statistics.median(found), found[-1]
        cell = f"{middle:{style}} [{low:{style}}, {high:{style}}]"
        cells.append(f"**{cell}**" if measure == own_scale(key) else cell)
    return cells


def _name(row: Row) -> str:
    return f"{row['objective']}-{row['flipped']:g}-{row['seed']}"
