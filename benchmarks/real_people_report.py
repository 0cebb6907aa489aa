"""What benchmarks/real_people.py found: tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.personalize.planted import KS, band

WORDS = {
    "voters": "Voters on arguments (real people, real texts)",
    "opinions": "Opinions on statements (drawn people, real texts)",
}


def render(result: Mapping[str, Any]) -> str:
    """Markdown: accuracy and log loss by number of choices, and the verdicts."""
    lines = [
        f"The starter's frozen states, LoRe of rank {result['rank']}, {result['splits']} splits; accuracy and log loss "
        "on what nobody was taught, mean over new people; in brackets the gain over no choice, 95 % bootstrap interval "
        "over people.", "",
    ]  # fmt: skip
    for kind, found in result["kinds"].items():
        lines += [f"## {WORDS[kind]}", "", f"{found['texts']:,} texts, {found['people']} new people in all splits.", ""]
        lines += ["| choices | accuracy | log loss | another's: accuracy, log loss | by coin |"]
        lines += ["|---|---|---|---|---|"]
        own = found["groups"]["own"]
        for k in KS:
            other, coin = (found["groups"][name][str(k)] for name in ("another's", "by coin"))
            lines.append(
                f"| {k} | {_cell(own, k, 'accuracy', 100)} | {_cell(own, k, 'log_loss', 1)} "
                f"| {100 * np.mean(other['accuracy']):.1f}, {np.mean(other['log_loss']):.4f} "
                f"| {100 * np.mean(coin['accuracy']):.1f}, {np.mean(coin['log_loss']):.4f} |"
            )
        lines += ["", *(f"- {name}: {100 * value:.1f}" for name, value in found["without"].items())]
        lines += [f"- {verdict}" for verdict in verdicts(found)] + [""]
    return "\n".join([*lines, f"{result['machine']['cpu']}."]) + "\n"


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """Does it help, does it harm, does another's help less: at the most choices."""
    most = str(max(KS))
    own, other = (found["groups"][name] for name in ("own", "another's"))
    said = []
    for name, better, words in (("accuracy", 1, "accuracy"), ("log_loss", -1, "log loss")):
        gaps = better * (np.array(own[most][name]) - np.array(own["0"][name]))
        low, high = band(gaps)
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference that shows"
        said.append(f"{most} choices against none, {words}: {verdict} ({better * gaps.mean():+.4f})")
        gaps = better * (np.array(own[most][name]) - np.array(other[most][name]))
        low, high = band(gaps)
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference that shows"
        said.append(f"own choices against another's, {words}: {verdict} ({better * gaps.mean():+.4f})")
    return said


def _cell(own: Mapping[str, Any], k: int, name: str, scale: float) -> str:
    values, start = (np.array(own[str(each)][name]) for each in (k, 0))
    style = ".1f" if scale == 100 else ".4f"
    middle = f"{scale * values.mean():{style}}"
    if k == 0:
        return middle
    low, high = band(values - start)
    return f"{middle} ({scale * low:+{style}} to {scale * high:+{style}})"


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Accuracy and log loss by number of choices: own, another's, by coin; bands of the gain over no choice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = result["kinds"]
    figure = Figure(figsize=(11, 4 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for row, (kind, found) in zip(axes, kinds.items(), strict=True):
        for axis, name, scale in zip(row, ("accuracy", "log_loss"), (100, 1), strict=True):
            for group, colour in (("own", "C0"), ("another's", "C3"), ("by coin", "0.5")):
                values = [scale * np.array(found["groups"][group][str(k)][name]) for k in KS]
                bands = np.array([band(each - values[0]) for each in values]).T + values[0].mean()  # of the gain
                axis.plot(range(len(KS)), [each.mean() for each in values], "o-", color=colour, label=group)
                axis.fill_between(range(len(KS)), *bands, color=colour, alpha=0.12)
            axis.set_xticks(range(len(KS)), KS)
            axis.set_xlabel("choices")
            axis.set_ylabel("accuracy, %" if name == "accuracy" else "log loss, nats")
            axis.set_title(WORDS[kind], fontsize=9)
            axis.grid(alpha=0.25)
        row[0].legend(fontsize=8)
    figure.suptitle("bands: 95 % intervals over people of the gain over no choice", fontsize=9)
    figure.savefig(file, dpi=110, metadata={"Software": None})
