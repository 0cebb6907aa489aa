"""The few-shot evaluation as people read it: report.md with tables, table.md, curves.png, said.png, kl.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Check
from edgealign.personalize.baselines import PROMPTED_PAIRS
from edgealign.personalize.planted import KS
from edgealign.personalize.recipes import FewShotRecipe

NO_HEADS = ("accuracy", "tilt")
COLOURS = ("#2a6f4e", "#c44e52", "#4c72b0", "#dd8452", "#8172b3", "#937860", "#da8bc3", "#64b5cd")
WORDS = {
    "signed-0.1": "distinct users, likes and dislikes", "signed-1": "mixed users, likes and dislikes",
    "positive-0.1": "distinct users, likes only", "positive-1": "mixed users, likes only",
    "positive-10": "users alike", "targets": "users with a point to be near to", "groups": "ten to one",
    "circle": "cyclic tastes",
}  # fmt: skip


def write_report(folder: Path, result: Mapping[str, Any], recipe: FewShotRecipe, checks: Sequence[Check]) -> None:
    """Write the report's files into `folder`."""
    draw_curves(folder / "curves.png", result)
    draw_said(folder / "said.png", result["said"])
    draw_kl(folder / "kl.png", result["said"])
    tables = [curve_table(kind, row) for kind, row in result["populations"].items()]
    said = said_table(result["said"])
    failed = [check for check in checks if not check.passed]
    parts = [
        "# What a few choices tell", "",
        f"Planted users choose between {result['answers']} answers of the model to {result['prompts']} prompts, by "
        f"{len(result['traits'])} attributes of the text, freed of each other ({', '.join(result['traits'])}); "
        f"{recipe.flips:.0%} of the choices are the wrong way round. {recipe.users} seen users with {recipe.pairs} "
        f"choices each, {recipe.new_users} new ones, {recipe.seeds} seeds. Choices in the prompt: no training, "
        f"{min(recipe.prompted, recipe.new_users)} of the new ones, {PROMPTED_PAIRS} pairs each. Unseen users, unseen "
        "prompts:", "",
        "![Accuracy by number of choices](curves.png)", "", *tables,
        "## What is said", "",
        f"Best of {result['said']['n']} answers by the fitted reward, {result['said']['prompts']} unseen prompts, "
        f"against a blind pick of the same answers; every runtime draws and reads its own. Reward in standard "
        f"deviations of the true taste; at most {result['said']['kl_nats']:.2f} nats of KL an answer.", "",
        "![Reward of what is said](said.png)", "", said,
        "![Reward of what is said against what it costs in KL](kl.png)", "",
        f"Reward accuracy and reward of what is said, over the heads (torch, 8 choices): {order(result)}.", "",
        "## Checks", "",
        *[f"- {'passed' if check.passed else 'FAILED'}: {check.name} ({check.value:+.4f}; {check.note})"
          for check in checks if check.value is not None], "",
        f"Verdict: {'all checks passed' if not failed else f'{len(failed)} checks FAILED'}.", "",
    ]  # fmt: skip
    (folder / "table.md").write_text("\n".join([*tables, said]), encoding="utf-8")
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")


def curve_table(kind: str, row: Mapping[str, Any]) -> str:
    """One population: a line a head, accuracies by the number of choices."""
    heads = ("learned by", *map(str, KS), "gain at 8 (95 %)", "another's at 8", "shuffled at 8", "worst decile at 8",
             "gap closed at 16", "regret", "bytes", "fit, ms")  # fmt: skip
    lines = [f"**{WORDS.get(kind, kind)}** (`{kind}`)", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in row["heads"].items():
        gain = found["gain"][8]
        cells = [name, *(f"{found['accuracy'][k]:.3f}" for k in KS)]
        cells += [f"{100 * gain['mean']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"]
        cells += [f"{100 * found[control][8]['mean']:+.1f}" for control in ("another user's", "shuffled")]
        cells += [f"{found['worst decile'][8]:.3f}", f"{found['recovered'][16]:.0%}"]
        cells += [f"{found['regret']:.2f}", str(found["bytes"])]
        cells += [f"{found['fit_ms']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for name, found in (("own choices alone", row["scratch"]), ("choices in the prompt", row["prompted"])):
        cells = [name, *(f"{found[k]:.3f}" if k in found else "" for k in KS)]
        if found:
            lines.append(f"| {' | '.join(cells)} |{' |' * (len(heads) - len(cells))}")
    name, found = next(iter(row["heads"].items()))
    others = ", ".join(f"{cell} {value:.3f}" for cell, value in found["cells"].items())
    lines += ["", f"The model's own likelihood: {row['likelihood']:.3f}. A probe that sees only format: "
              f"{row['probe']:.3f}. {name} with all choices: {others}.", *_ahead(name, found), ""]  # fmt: skip
    return "\n".join(lines)


def _ahead(name: str, found: Mapping[str, Any]) -> list[str]:
    """A head against LoRe's released step, in points with their standard errors."""
    gaps = [f"{k}: {100 * gap['mean']:+.1f} ± {100 * gap['error']:.1f}" for k, gap in found["ahead"].items() if k]
    return ["", f"{name} ahead of lore-released, user by user, in points: {', '.join(gaps)}."] if gaps else []


def said_table(said: Mapping[str, Any]) -> str:
    """Gain of the picks by runtime, head and number of choices."""
    columns = ("runtime", "head", "0", "1", "2", "4", "8", "16", "32", "another's at 8", "oracle")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for label, row in said["runtimes"].items():
        for name, found in row.items():
            if name in NO_HEADS:
                continue
            cells = [f"{gain['mean']:+.2f}" for gain in found["gain"].values()]
            wide = found["gain"][8]
            cells[4] += f" ({wide['low']:+.2f} to {wide['high']:+.2f})"
            cells += [f"{found['wrong'][8]:+.2f}", f"{found['oracle']:+.2f}"]
            lines.append(f"| {' | '.join([label, name, *cells])} |")
    accuracies = ", ".join(f"{label} {row['accuracy']:.4f}" for label, row in said["runtimes"].items())
    lines += ["", f"Accuracy on held-out pairs, answers read in each runtime: {accuracies}.", ""]
    return "\n".join([*lines, *tilt_table(said)])


def tilt_table(said: Mapping[str, Any]) -> list[str]:
    """The next token tilted by what it is worth to the user: gain, price, time."""
    columns = ("runtime", "strength", "gain, sd (95 %)", "KL, nats a token", "ms a token", "empty answers")
    lines = ["**One answer, the next token tilted** (lore, 8 choices)", "", f"| {' | '.join(columns)} |"]
    lines.append("|---" * len(columns) + "|")
    for label, row in said["runtimes"].items():
        for strength, found in row["tilt"].items():
            gain = found["gain"]
            cells = [label, strength, f"{gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})"]
            cells += [f"{found['kl_nats']:.3f}", f"{found['token_ms']:.2f}", f"{found['empty']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def draw_kl(file: Path, said: Mapping[str, Any]) -> None:
    """Gain of the tilted answers against the KL they pay: a line a runtime, a point a strength."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    for number, (label, row) in enumerate(said["runtimes"].items()):
        colour, points = COLOURS[number % len(COLOURS)], list(row["tilt"].items())
        gains = [found["gain"] for _, found in points]
        paid = [found["kl_nats"] for _, found in points]
        means = [gain["mean"] for gain in gains]
        reach = [[gain["mean"] - gain["low"] for gain in gains], [gain["high"] - gain["mean"] for gain in gains]]
        apart = [x + 0.012 * number for x in paid]  # two runtimes may say the same, token by token
        axis.errorbar(apart, means, yerr=reach, color=colour, marker="o", markersize=4, capsize=2, label=label)
    for (strength, _), x, y in list(zip(points, apart, means, strict=True))[1:]:
        axis.annotate(f"strength {strength}", (x, y), textcoords="offset points", xytext=(8, -12), fontsize=7)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xlabel("KL to the model's own answers, nats a token")
    axis.set_ylabel("reward of the tilted answer, sd over its own")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def order(result: Mapping[str, Any]) -> str:
    """Do heads that rank better also say better? Spearman's rank correlation over heads."""
    import numpy as np

    kind, heads = result["said"]["kind"], result["said"]["runtimes"]["torch"]
    known = result["populations"].get(kind, {}).get("heads", {})
    names = [name for name in known if name in heads]
    if len(names) < 3:
        return "too few heads to say"
    values = [[known[name]["accuracy"][8] for name in names], [heads[name]["gain"][8]["mean"] for name in names]]
    ranks = [np.argsort(np.argsort(each)) for each in values]
    return f"Spearman {float(np.corrcoef(ranks[0], ranks[1])[0, 1]):+.2f} over {len(names)} heads"


def draw_curves(file: Path, result: Mapping[str, Any]) -> None:
    """A panel per population: accuracy by number of choices, with bands; controls dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(result["populations"])
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4.4 * len(kinds), 4.2), squeeze=False)
    places = list(range(len(KS)))
    for axis, kind in zip(axes[0], kinds, strict=True):
        row = result["populations"][kind]
        for colour, (name, found) in zip(COLOURS, row["heads"].items(), strict=False):
            means = [found["accuracy"][k] for k in KS]
            axis.plot(places, means, color=colour, marker="o", markersize=3, label=name)
            low = [means[0] + found["gain"][k]["low"] for k in KS]
            high = [means[0] + found["gain"][k]["high"] for k in KS]
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        first = next(iter(row["heads"].values()))
        others = {k: first["accuracy"][0] + gain["mean"] for k, gain in first["another user's"].items()}
        axis.plot([KS.index(k) for k in others], list(others.values()), ":", color="black", label="another's choices")
        axis.plot(places, [row["scratch"][k] for k in KS], "--", color="grey", linewidth=1, label="own choices alone")
        axis.axhline(row["likelihood"], color="grey", linewidth=0.8, label="the model's likelihood")
        axis.set_xticks(places, [str(k) for k in KS])
        axis.set_xlabel("choices of a new user")
        axis.set_title(WORDS.get(kind, kind), fontsize=10)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("accuracy, unseen prompts")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def draw_said(file: Path, said: Mapping[str, Any]) -> None:
    """Reward of the picks by number of choices: a panel per runtime, a line per head."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runtimes = said["runtimes"]
    figure, axes = pyplot.subplots(1, len(runtimes), figsize=(3.4 * len(runtimes), 3.8), squeeze=False, sharey=True)
    for axis, (label, row) in zip(axes[0], runtimes.items(), strict=True):
        heads = {name: found for name, found in row.items() if name not in NO_HEADS}
        for colour, (name, found) in zip(COLOURS, heads.items(), strict=False):
            places = range(len(found["gain"]))
            gains = list(found["gain"].values())
            axis.plot(places, [gain["mean"] for gain in gains], marker="o", color=colour, markersize=3, label=name)
            low, high = ([gain[end] for gain in gains] for end in ("low", "high"))
            axis.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set_xticks(places, [str(k) for k in found["gain"]])
        axis.axhline(next(iter(heads.values()))["oracle"], color="black", linewidth=0.8, label="oracle")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("choices of a new user")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(f"reward of the best of {said['n']}, sd over a blind pick")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=8, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
