"""The sweep over strengths as people read it: `table.md`, `answers.md`, `steering.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Check
from edgealign.personalize.steering_recipe import SteeringRecipe

HEADS = (
    "strength", "moved sd", "gain sd", "follows", "KL to prompted", "KL to base", "perplexity", "distinct-1",
    "distinct-2", "loops", "ended", "words", "passes a token",
)  # fmt: skip
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3")


def write_report(folder: Path, result: Mapping[str, Any], recipe: SteeringRecipe, checks: Sequence[Check]) -> None:
    """Write the report's files into `folder`."""
    (folder / "table.md").write_text(render(result, recipe, checks), encoding="utf-8")
    (folder / "answers.md").write_text(render_answers(result, recipe), encoding="utf-8")
    draw_steering(folder / "steering.png", result)


def render(result: Mapping[str, Any], recipe: SteeringRecipe, checks: Sequence[Check]) -> str:
    """Markdown: the check, all styles together, the verdict in words, each style, REAR."""
    lines = [f"- {check.name}: {'passed' if check.passed else '**failed**'} ({check.value:.3f})" for check in checks]
    lines += [
        "",
        f"{result['runtime']} ({result['streams']}), {len(result['prompts'])} prompts, {len(result['styles'])} styles, "
        f"greedy, at most {recipe.max_new_tokens} tokens; plausible: {recipe.plausible:g} at temperature "
        f"{recipe.mask_temperature:g}. Moved: against the answer without the preference. Gain: against strength 0, "
        "which is prompting with it. Both in standard deviations of the style's mark, 95 % intervals over prompts.",
        "",
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
    ]
    for strength, row in result["all"].items():
        cells = [
            strength, f"{row['moved_sd']:+.2f}", _interval(row["gain_sd"]), f"{row['follows']:.0%}",
            f"{row['kl_prompted']:.3f}", f"{row['kl_base']:.3f}", f"{row['perplexity']:.1f}",
            f"{row['distinct_1']:.2f}", f"{row['distinct_2']:.2f}", f"{row['loops']:.1%}", f"{row['ended']:.0%}",
            f"{row['words']:.1f}", f"{row['passes']:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", verdict(result), "", *_styles(result), *_rear(result, recipe)]
    return "\n".join(lines) + "\n"


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence for each strength above 0: further than prompting, not further, or not to be told."""
    said = []
    for strength, row in result["all"].items():
        gain = row["gain_sd"]
        if strength != "0":
            word = "further" if gain["low"] > 0 else "less far" if gain["high"] < 0 else "not surely further"
            said.append(f"strength {strength} moves answers {word} than prompting")
    return f"Over all styles: {'; '.join(said) or 'only prompting was asked'}."


def render_answers(result: Mapping[str, Any], recipe: SteeringRecipe) -> str:
    """Markdown: the first of evenly spread prompts, in every style at every strength. Nothing is picked."""
    step = max(1, len(result["prompts"]) // max(1, recipe.examples))
    lines = ["Evenly spread prompts, every style, every strength; greedy. `-`: without the preference."]
    for number in range(0, len(result["prompts"]), step)[: recipe.examples]:
        asked = " / ".join(result["prompts"][number].split("\n"))
        lines += ["", f"**{asked}**", "", *_quote("-", result["bare"][number])]
        for name, rows in result["answers"].items():
            lines += ["", f"{name}", ""]
            for strength, row in rows.items():
                lines += _quote(strength, row[number]["text"])
    return "\n".join(lines) + "\n"


def draw_steering(file: Path, result: Mapping[str, Any]) -> None:
    """Left: how far answers moved against KL, a line per style and their mean; right: what the text pays."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplot_mosaic([["moved", "perplexity"], ["moved", "distinct"]], width_ratios=[1.7, 1])
    moved = axes["moved"]
    for (name, rows), colour in zip(result["styles"].items(), COLOURS, strict=False):
        points = [(row["kl_prompted"], row["moved_sd"]["mean"]) for row in rows.values()]
        moved.plot(*zip(*points, strict=True), "o-", color=colour, lw=1, ms=3, label=name)
    everything = result["all"]
    places = [row["kl_prompted"] for row in everything.values()]
    means = [row["moved_sd"] for row in everything.values()]
    errors = [
        [row["gain_sd"]["mean"] - row["gain_sd"]["low"] for row in everything.values()],
        [row["gain_sd"]["high"] - row["gain_sd"]["mean"] for row in everything.values()],
    ]
    label = "mean, 95 % of its gain"
    moved.errorbar(places, means, errors, color="black", fmt="s-", lw=2, ms=5, capsize=3, label=label)
    for strength, place, mean in zip(everything, places, means, strict=True):
        moved.annotate(strength, (place, mean), xytext=(4, -14), textcoords="offset points", fontsize=9, weight="bold")
    moved.set_xlabel("KL per token to the prompted model, nat")
    moved.set_ylabel("style's mark against no preference, sd")
    moved.set_title(f"{result['runtime']}: strength (numbers) against KL; 0 is prompting", fontsize=10)
    moved.legend(fontsize=8, frameon=False, ncols=2)
    strengths = [float(strength) for strength in everything]
    for key, axis, label in (
        ("perplexity", axes["perplexity"], "perplexity under the base"),
        ("distinct_2", axes["distinct"], "distinct pairs of words"),
    ):
        for rows, colour in zip(result["styles"].values(), COLOURS, strict=False):
            axis.plot(strengths, [row[key] for row in rows.values()], color=colour, lw=0.8)
        axis.plot(strengths, [row[key] for row in everything.values()], "s-", color="black", lw=2, ms=4)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes["distinct"].set_xlabel("strength")
    figure.savefig(file, dpi=120, metadata={"Software": None})


def _styles(result: Mapping[str, Any]) -> list[str]:
    strengths = list(result["all"])
    lines = [f"| style: gain sd at strength | {' | '.join(strengths[1:])} |", "|---" * len(strengths) + "|"]
    for name, rows in result["styles"].items():
        cells = [_interval(rows[strength]["gain_sd"]) for strength in strengths[1:]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| style: mark at strength | {' | '.join(strengths)} |", "|---" * (len(strengths) + 1) + "|"]
    for name, rows in result["styles"].items():
        lines.append(f"| {name} | {' | '.join(format(rows[strength]['mark'], '.2f') for strength in strengths)} |")
    return lines


def _rear(result: Mapping[str, Any], recipe: SteeringRecipe) -> list[str]:
    if "rear" not in result:
        return []
    lines = [
        "",
        f"REAR: the best of {recipe.candidates} answers drawn at temperature {recipe.temperature:g} with the preference"
        f" in the prompt, weight {recipe.weight:g}. Each answer costs its decoding and two scoring passes.",
        "",
        "| style | mean candidate's mark | best candidate's | gain sd |",
        "|---|---|---|---|",
    ]
    for name, row in result["rear"].items():
        lines.append(f"| {name} | {row['mean_mark']:.2f} | {row['mark']:.2f} | {_interval(row['gain_sd'])} |")
    return lines


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})"


def _quote(label: str, text: str) -> list[str]:
    return [f"> `{label}` {' / '.join(line for line in text.splitlines() if line.strip())}  "]
