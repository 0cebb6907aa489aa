"""The evaluation as people read it: report.md with tables and answers, table.md, movement.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Check
from edgealign.personalize.evaluate_recipe import EvaluateRecipe

WAYS = {
    "length": ("longer", "shorter"),
    "bullets": ("more bullets", "more prose"),
    "formality": ("more formal", "more casual"),
}
COLOURS = ("#4c72b0", "#dd8452")


def write_report(folder: Path, result: Mapping[str, Any], recipe: EvaluateRecipe, checks: Sequence[Check]) -> None:
    """Write the report's files into `folder`."""
    tables = [_ranking_table(result)]
    parts = ["# Do the adapters move answers in their users' direction?", ""]
    if "movement" in result:
        tables.insert(0, _movement_table(result))
        draw_movement(folder / "movement.png", result)
        tastes = "; ".join(f"{name}: {known['words']}" for name, known in result["users"].items())
        parts += [
            f"{len(result['users'])} generated users with known tastes ({tastes}), "
            f"{len(result['prompts'])} unseen prompts, {recipe.samples} sampled answers each.",
            "",
            "![Movement of each user's answers](movement.png)",
            "",
        ]
    verdict = "all checks passed" if all(check.passed for check in checks) else "NOT all checks passed"
    parts += [*tables, f"Verdict: {verdict if checks else 'reported, not gated: real people have no known taste'}.", ""]
    parts += _examples(result, recipe)
    (folder / "table.md").write_text("\n".join(tables), encoding="utf-8")
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")


def draw_movement(file: Path, result: Mapping[str, Any]) -> None:
    """A panel per user: how far each attribute moved from the base, in standard deviations, wanted side shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    users, runtimes = list(result["users"]), list(result["movement"])
    figure, axes = pyplot.subplots(1, len(users), figsize=(4.2 * len(users), 3.8), sharey=True, squeeze=False)
    for axis, user in zip(axes[0], users, strict=True):
        rows = result["movement"][runtimes[0]][user]["attributes"]
        for place, (name, row) in enumerate(rows.items()):
            side = 1 if row["wanted"] > 0 else -1
            axis.barh(place, side * 9, height=0.9, color="#e8f3e4", zorder=0)
            axis.text(
                0, place + 0.36, f"wants {WAYS[name][0 if side > 0 else 1]}", ha="center", fontsize=8, color="#3b6e2f"
            )
        for number, runtime in enumerate(runtimes):
            shifts = [row["shift_sd"] for row in result["movement"][runtime][user]["attributes"].values()]
            means = [shift["mean"] for shift in shifts]
            errors = [
                [shift["mean"] - shift["low"] for shift in shifts],
                [shift["high"] - shift["mean"] for shift in shifts],
            ]
            places = [place - 0.22 + 0.26 * number for place in range(len(shifts))]
            axis.barh(
                places,
                means,
                height=0.24,
                xerr=errors,
                color=COLOURS[number % 2],
                label=runtime,
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set_xlim(-2.6, 2.6)
        axis.set_title(user)
        axis.set_xlabel("shift from the base, sd")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, fontsize=9, frameon=False)
    figure.suptitle("Answers to unseen prompts, green: the user's side", x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _movement_table(result: Mapping[str, Any]) -> str:
    heads = ("user", "runtime", "reward, base", "own adapter", "others'", "gain in sd (95 %)", "shift in sd (wanted)")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for user in result["users"]:
        for runtime, rows in result["movement"].items():
            row = rows[user]
            gain = row["gain_sd"]
            shifts = ", ".join(
                f"{name} {entry['shift_sd']['mean']:+.2f} ({'+' if entry['wanted'] > 0 else '-'})"
                for name, entry in row["attributes"].items()
            )
            rewards = [row["reward_base"], row["reward_own"], row["reward_others"]]
            cells = [user, runtime, *("-" if value is None else f"{value:+.2f}" for value in rewards)]
            cells += [f"{gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})", shifts]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ranking_table(result: Mapping[str, Any]) -> str:
    lines = [
        "| user | runtime | unseen choices | ranked as the user did: base | own adapter | others' adapters |",
        "|---|---|---|---|---|---|",
    ]
    users = {user for rows in result["ranking"].values() for user in rows}
    for user in sorted(users):
        for runtime, rows in result["ranking"].items():
            row = rows[user]
            own = "none published" if row["own"] is None else f"{row['own']:.1%}"
            others = "-" if row["others"] is None else f"{row['others']:.1%}"
            lines.append(f"| {user} | {runtime} | {row['choices']} | {row['base']:.1%} | {own} | {others} |")
    return "\n".join(lines) + "\n"


def _examples(result: Mapping[str, Any], recipe: EvaluateRecipe) -> list[str]:
    if not result["prompts"]:
        return []
    runtime = list(result["runtimes"])[-1]
    lines = [f"## Answers as shipped ({runtime})", ""]
    for number, prompt in enumerate(result["prompts"][: recipe.examples]):
        lines += [f"**{prompt}**", ""]
        for name, groups in result["runtimes"][runtime]["answers"].items():
            wants = f" ({result['users'][name]['words']})" if name in result.get("users", {}) else ""
            quoted = "\n".join(f"> {line}  " for line in groups[number][0].splitlines())
            lines += [f"{name}{wants}", "", quoted or "> (nothing)", ""]
    return lines
