"""What benchmarks/fspo.py found: curves over the number of shots, paired differences, what did not work, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgealign.artifact import write_atomic
from edgealign.errors import writing

RESAMPLES = 4000
MEASURES = {"accuracy": "ranking accuracy", "reward": "planted reward of answers, sd"}
Floats = npt.NDArray[np.float64]


def summarise(
    found: Mapping[str, Any], labels: Mapping[str, str], ks: Sequence[int], control_k: int, controls: Sequence[str]
) -> dict[str, Any]:
    """Means with intervals by model, k and control, and the paired differences that answer the questions."""
    cells: dict[str, dict[str, dict[str, Floats]]] = {
        arm: {
            name: {measure: np.asarray(cell[measure]) for measure in MEASURES if measure in cell}
            for name, cell in row["cells"].items()
        }
        for arm, row in found.items()
    }
    curves = {
        arm: {name: {measure: interval(values) for measure, values in cell.items()} for name, cell in row.items()}
        for arm, row in cells.items()
    }
    asked: list[tuple[str, tuple[str, str], tuple[str, str]]] = []
    most = max(ks)
    for arm, label in labels.items():
        for k in ks:
            if k:
                asked.append((f"{label}: {k} shots against none", (arm, f"{k} own"), (arm, "0 own")))
        for control in controls:
            mine, theirs = (arm, f"{control_k} own"), (arm, f"{control_k} {control}")
            asked.append((f"{label}: {control_k} own shots against {control}", mine, theirs))
            asked.append((f"{label}: {control_k} shots, {control}, against none", theirs, (arm, "0 own")))
    for arm in ("fspo", "fspo_ln"):
        for other in ("plain", "few", "base"):
            if arm in labels and other in labels:
                for k in dict.fromkeys((0, control_k, most)):
                    what = f"{labels[arm]} against {labels[other]}, {k} shots"
                    asked.append((what, (arm, f"{k} own"), (other, f"{k} own")))
    for arm, other in (("fspo_said", "fspo"), ("fspo_told", "fspo_said"), ("few_told", "few_said")):
        if {arm, other} <= set(labels):
            asked += [
                (f"{labels[arm]} against {labels[other]}, {k} shots", (arm, f"{k} own"), (other, f"{k} own"))
                for k in ks if k or other == "fspo"
            ]  # fmt: skip
    differences = []
    for what, (arm, name), (other, its) in asked:
        for measure in MEASURES:
            one, two = cells[arm].get(name, {}).get(measure), cells[other].get(its, {}).get(measure)
            if one is not None and two is not None:
                differences.append({"what": what, "measure": measure, **interval(one - two)})
    worst = {arm: worst_tenth(row[f"{most} own"]["accuracy"]) for arm, row in cells.items() if f"{most} own" in row}
    return {
        "labels": dict(labels), "curves": curves, "differences": differences, "worst_tenth": worst,
        "control_k": control_k, "controls": list(controls),
        "shots_left_out": {arm: row["shots_left_out"] for arm, row in found.items()},
        "said": found.get("fspo_said", {}).get("cells", {}).get(f"{most} own", {}).get("said", []),
    }


def interval(values: Floats) -> dict[str, float]:
    """Mean over people and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def worst_tenth(values: Floats) -> float:
    return float(np.sort(values)[: -(-len(values) // 10)].mean())


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    facts, ks = result["facts"], result["facts"]["k"]
    users = facts["users"]
    lines = [
        f"{facts['people']} new people with planted tastes ({'signed' if users['signed'] else 'all of one sign'}, "
        f"alpha {users['alpha']:g}), {facts['asked']} unseen questions each for ranking, {facts['prompts']} for "
        "answers. Mean over people with the 95 % bootstrap interval.",
    ]
    for measure, words in MEASURES.items():
        rows = [arm for arm in result["curves"] if measure in result["curves"][arm].get(f"{ks[0]} own", {})]
        if not rows:
            continue
        kept = [control for control in result["controls"]
                if any(measure in result["curves"][arm][f"{result['control_k']} {control}"] for arm in rows)]
        head = [*(f"k={k}" for k in ks), *(f"{control}, k={result['control_k']}" for control in kept)]
        lines += ["", f"## {words}", "", f"| model | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
        for arm in rows:
            names = [*(f"{k} own" for k in ks), *(f"{result['control_k']} {control}" for control in kept)]
            shown = [_cell(result["curves"][arm].get(name, {}).get(measure)) for name in names]
            lines.append(f"| {result['labels'][arm]} | {' | '.join(shown)} |")
        if measure == "accuracy" and "told" in facts:
            shown = [f"{facts['told'][str(k)]:.3f}" for k in ks] + [""] * len(kept)
            lines.append(f"| a fit on the planted attributes | {' | '.join(shown)} |")
    lines += ["", "## Paired differences", "", "| what | measure | difference | |", "|---|---|---|---|"]
    for row in result["differences"]:
        verdict = "shown" if row["low"] > 0 or row["high"] < 0 else "**no difference shown**"
        lines.append(f"| {row['what']} | {MEASURES[row['measure']]} | {_cell(row, sign=True)} | {verdict} |")
    worst = ", ".join(f"{result['labels'][arm]} {value:.2f}" for arm, value in result["worst_tenth"].items())
    left_out = ", ".join(f"{result['labels'][arm]} {n}" for arm, n in result["shots_left_out"].items() if n) or "none"
    lines += [
        "", f"Worst tenth of the people at k={max(ks)}: {worst}.",
        f"Shots left out to fit {facts['prefix_tokens']} tokens, over all cells: {left_out}.",
        *([f"Descriptions, for example: {'; '.join(result['said'])}"] if any(result["said"]) else []),
        "", f"`{facts['command']}`; {result['machine']['cpu']}, {facts['threads']} threads.",
    ]
    return "\n".join(lines) + "\n"


def draw(result: Mapping[str, Any], file: Path) -> None:
    """A line a model: open, no shots; filled with its interval, most own shots; crosses, controls; grey, at best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    facts, most, at = result["facts"], max(result["facts"]["k"]), result["control_k"]
    marks = {f"{at} {control}": mark for control, mark in zip(result["controls"], "x+", strict=False)}
    figure = Figure(figsize=(11, 1.6 + 0.35 * len(result["curves"])), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    for axis, (measure, words) in zip(axes, MEASURES.items(), strict=True):
        for place, cells in enumerate(result["curves"].values()):
            own = cells[f"{most} own"].get(measure)
            if own:
                axis.plot([own["low"], own["high"]], [place, place], color="C0", linewidth=1.5)
                axis.plot(own["mean"], place, "o", color="C0")
            for name, mark, color in (("0 own", "o", "C0"), *((name, mark, "C3") for name, mark in marks.items())):
                if row := cells.get(name, {}).get(measure):
                    fill = "white" if mark == "o" else color
                    axis.plot(row["mean"], place, mark, color=color, markerfacecolor=fill, markersize=7)
        if measure == "accuracy":
            axis.axvline(0.5, color="0.6", linewidth=1)
            if "told" in facts:
                axis.axvline(facts["told"][str(most)], color="0.6", linewidth=1, linestyle="--")
        axis.set_title(words, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].set_yticks(range(len(result["curves"])), [result["labels"][arm] for arm in result["curves"]], fontsize=8)
    axes[0].invert_yaxis()
    controls = "; ".join(f"{mark}: {name}" for name, mark in marks.items())
    figure.suptitle(
        f"new people, unseen questions; filled: {most} own shots, 95 %; open: none; {controls}; grey: chance, and "
        "(dashed) a fit on the planted attributes", fontsize=9,
    )  # fmt: skip
    figure.savefig(file, dpi=110, metadata={"Software": None})


def write(result: dict[str, Any], out: Path) -> None:
    """table.md, result.json and fspo.png; the table is added to the result."""
    result["table"] = render(result)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "table.md", result["table"])
        kept = {name: value for name, value in result.items() if name != "table"}
        write_atomic(out / "result.json", json.dumps(kept, indent=1) + "\n")
        draw(result, out / "fspo.png")


def _cell(row: Mapping[str, float] | None, *, sign: bool = False) -> str:
    if row is None:
        return "not measured"
    form = "+.3f" if sign else ".3f"
    return f"{row['mean']:{form}} ({row['low']:{form}} to {row['high']:{form}})"
