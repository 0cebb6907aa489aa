"""What `--quant auto` leaves in the bundle: the choice as a recipe, every mixture as data and as a table, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import quant_candidates as candidates
from quant_candidates import Trial
from quant_search import Found

from edgealign.artifact import Check, Draft
from edgealign.bench.result import MIB, number
from edgealign.export_recipes import ExportRecipe
from edgealign.targets import to_toml

SCHEMA = 1
FOLDER = "search"
# Knobs of the search and of this machine: the recipe of the choice does without.
UNSAID = ("kl_budget", "search_prompt", "search_gen", "search_repetitions", "threads")
COLOURS = {"q4_0": "tab:blue", "q4_k_s": "tab:green", "q4_k_m": "tab:olive", "q5_k_m": "tab:orange",
           "q6_k": "tab:red", "q8_0": "tab:purple"}  # fmt: skip
REST_COLOUR = "tab:gray"


def write_search(found: Found, draft: Draft) -> None:
    """Write `search/` into the bundle, and the choice into the manifest."""
    folder = draft.dir / FOLDER
    folder.mkdir()
    (folder / "recipe.toml").write_text(render_recipe(found), encoding="utf-8")
    text = json.dumps(describe(found), indent=2, allow_nan=False)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text(render_table(found) + "\n", encoding="utf-8")
    draw_search(found, folder / "front.png")
    chosen = found.chosen
    draft.meta["quant_search"] = {
        "chosen": chosen.label, "why": found.why, "kl": chosen.kl, "kl_budget": found.facts["kl_budget"],
        "decode_ts": chosen.speed()["median"], "predicted": found.facts["predicted"], "tried": len(found.trials),
        "recipe": f"{FOLDER}/recipe.toml",
    }  # fmt: skip
    note = f"nat, {chosen.label}, the best of {len(found.trials)} mixtures; at most"
    draft.add_check(Check("auto.kl", chosen.kl, found.facts["kl_budget"], True, note))


def render_recipe(found: Found) -> str:
    """The choice as a recipe for `edgealign export --config`; what is as by default is left out."""
    recipe = found.recipe
    said = {
        entry.name: getattr(recipe, entry.name) for entry in fields(ExportRecipe)
        if entry.name not in UNSAID and (entry.name == "quant" or getattr(recipe, entry.name) != entry.default)
    }  # fmt: skip
    lines = [
        "# Chosen by --quant auto. Use it: edgealign export --target gguf --config recipe.toml --model MODEL --out DIR",
        f"# {found.chosen.kl:.4f} nat of {found.facts['kl_budget']:g} allowed; {_speed_words(found)}.",
        f"# {_machine_words(found)}",
    ]
    lines += [f"# Caveat: {caveat}." for caveat in found.facts["caveats"]]
    if found.facts["calibrated"]:
        lines.append("# Measured with an importance matrix: give the same --calibration text for the same file.")
    return "\n".join([*lines, to_toml(said)])


def describe(found: Found) -> dict[str, Any]:
    """The whole search as data."""
    gate = found.gate
    return {
        "schema": SCHEMA, "source": "edgealign export --quant auto", **found.facts,
        "chosen": found.chosen.label, "why": found.why,
        "front": [trial.label for trial in candidates.front(found.trials)],
        "mixtures": [
            {
                "label": trial.label, "quant": trial.mixture.base, "head_type": trial.mixture.head,
                "tensor_types": list(trial.mixture.groups), "types": trial.types,
                "file_bytes": trial.file_bytes or None, "token_bytes": trial.token_bytes or None,
                "kl": trial.kl, "correlation": trial.correlation, "top1": trial.top1,
                "feeding": trial.feeding,
                "skipped": trial.error, "verdict": _verdict(found, trial),
                "decode": {**trial.speed(), "samples": trial.decode, "predicted": trial.predicted is not None},
                "prefill": {**trial.speed("prefill"), "samples": trial.prefill},
                "excess": candidates.excess(trial, gate, found.facts["kl_budget"]) if trial.measured else None,
            }
            for trial in found.trials
        ],
    }  # fmt: skip


def render_table(found: Found) -> str:
    """Every mixture, the fastest first, then those that were not timed by their KL."""
    facts = found.facts
    decode = "decode, predicted tok/s" if facts["predicted"] else f"decode {facts['gen_tokens']}, tok/s"
    prefill = f"prefill {facts['prompt_tokens']}, tok/s"
    lines = [
        f"| | mixture | {decode} | {prefill} | KL, nat | MiB | MiB read per token | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for place, trial in enumerate(_ranked(found.trials), start=1):
        kl = f"{trial.kl:.4f}" if trial.kl is not None else ""
        sizes = [f"{size / MIB:.1f}" if size else "" for size in (trial.file_bytes, trial.token_bytes)]
        lines.append(
            f"| {place} | {trial.label} | {_interval(trial, 'decode')} | {_interval(trial, 'prefill')} | {kl} | "
            f"{sizes[0]} | {sizes[1]} | {_verdict(found, trial)} |"
        )
    lines += [
        "", f"Chosen: {found.chosen.label}: {found.why}.", "",
        f"KL(torch || file) is the mean over {facts['positions']} tokens of the built-in text; the budget is "
        f"{facts['kl_budget']:g} nat. {_machine_words(found)}",
    ]
    if facts["predicted"]:
        lines += ["", "Speeds are PREDICTED: bandwidth over the bytes of weights that a token reads. Kernels are not "
                  "in it: measure the choice on the device."]  # fmt: skip
    else:
        lines += ["", "Medians with their 95 % interval (below six samples their range), adapter off, fresh "
                  "processes in turns; each round leaves the slower half out."]  # fmt: skip
    return "\n".join([*lines, *(f"\nCaveat: {caveat}." for caveat in facts["caveats"])])


def draw_search(found: Found, file: Path) -> None:
    """KL against decode speed: the front, the budget, the choice; right and low is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    facts, ranked = found.facts, _ranked(found.trials)
    shown = [trial for trial in ranked if trial.measured and trial.speed()["median"]]
    figure, (axis, side) = plt.subplots(
        1, 2, figsize=(11, max(4.6, 1.4 + 0.24 * len(shown))), width_ratios=(1.9, 1), layout="constrained"
    )
    for place, trial in enumerate(ranked, start=1):
        if trial in shown:
            _point(axis, trial, str(place), chosen=trial is found.chosen)
    front = candidates.front(found.trials)
    axis.step(
        [trial.speed()["median"] for trial in front], [trial.kl for trial in front], where="pre", color="0.6",
        linewidth=1, zorder=1, label="front",
    )  # fmt: skip
    budget = facts["kl_budget"]
    values = [trial.kl or 0.0 for trial in shown]
    if min(values) > 0 and max([*values, budget]) > 4 * min(values):
        axis.set_yscale("log")
    axis.axhline(budget, color="tab:red", linewidth=1, linestyle="--")
    axis.annotate(
        f"budget {budget:g} nat", (0.01, budget), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", fontsize=8, color="tab:red",
    )  # fmt: skip
    axis.margins(0.08)
    axis.grid(alpha=0.3, linewidth=0.5)
    how = "PREDICTED from the bandwidth" if facts["predicted"] else "median and interval"
    axis.set_xlabel(f"decode, tokens per second ({how})")
    axis.set_ylabel("KL(torch || file), nat")
    axis.set_title("What a decode speed costs (right and low is better)", fontsize=10)
    _legend(side, found, ranked, shown)
    caveat = f" NOT COMPARABLE: {facts['caveats'][0]}" if facts["caveats"] else ""
    figure.suptitle(_machine_words(found) + caveat, fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _point(axis: Any, trial: Trial, name: str, *, chosen: bool) -> None:
    speed = trial.speed()
    colour = COLOURS.get(trial.mixture.base, REST_COLOUR)
    if speed["low"] is not None:
        error = [[speed["median"] - speed["low"]], [speed["high"] - speed["median"]]]
        axis.errorbar(speed["median"], trial.kl, xerr=error, color=colour, alpha=0.5, linewidth=1, capsize=2)
    marker, size = ("*", 17) if chosen else ("o", 6)
    edge = "black" if chosen else colour
    axis.plot(speed["median"], trial.kl, marker, color=colour, markersize=size, markeredgecolor=edge, zorder=3)
    axis.annotate(
        name, (speed["median"], trial.kl), xytext=(5, 5), textcoords="offset points", fontsize=8,
        weight="bold" if chosen else "normal",
    )  # fmt: skip


def _legend(side: Any, found: Found, ranked: Sequence[Trial], shown: Sequence[Trial]) -> None:
    """The points' names beside the picture: mixtures lie too close for names inside it."""
    side.axis("off")
    step = min(0.05, 0.9 / (len(shown) + 2))
    for line, trial in enumerate(shown):
        words = f"{ranked.index(trial) + 1}  {trial.label}  {number(trial.speed()['median'])} tok/s, {trial.kl:.3g} nat"
        side.text(
            0, 0.97 - step * line, words + ("  (chosen)" if trial is found.chosen else ""), fontsize=8, va="top",
            color=COLOURS.get(trial.mixture.base, REST_COLOUR), transform=side.transAxes,
            weight="bold" if trial is found.chosen else "normal",
        )  # fmt: skip
    if left_out := len(ranked) - len(shown):
        words = f"{left_out} more were not timed: over the budget, or skipped"
        at = 0.97 - step * (len(shown) + 1)
        side.text(0, at, words, fontsize=8, va="top", color="0.35", transform=side.transAxes)


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    def key(trial: Trial) -> tuple[bool, float, float, str]:
        speed = trial.speed()["median"] if trial.measured else None
        return (speed is None, -(speed or 0.0), trial.kl if trial.kl is not None else 1e9, trial.label)

    return sorted(trials, key=key)


def _verdict(found: Found, trial: Trial) -> str:
    if trial is found.chosen:
        return "chosen"
    if trial.error is not None:
        return f"skipped: {trial.error}"
    return candidates.excess(trial, found.gate, found.facts["kl_budget"]) or "within the budget"


def _interval(trial: Trial, which: str) -> str:
    speed = trial.speed(which)
    if trial.error is not None or not speed["median"]:
        return ""
    if speed["low"] is None:
        return number(speed["median"])
    return f"{number(speed['median'])} [{number(speed['low'])}, {number(speed['high'])}]"


def _speed_words(found: Found) -> str:
    speed = found.chosen.speed()["median"]
    if found.facts["predicted"]:
        return f"decode is predicted, not measured: at most {number(speed)} tok/s"
    return f"decode {number(speed)} tok/s, prefill {number(found.chosen.speed('prefill')['median'])} tok/s"


def _machine_words(found: Found) -> str:
    card: Mapping[str, Any] = found.facts["machine"]
    threads = found.facts["threads"]
    used = f"{threads} thread{'s' if threads > 1 else ''}" if threads else None
    known = [card.get("device"), card.get("cpu"), used, card.get("os")]
    words = ", ".join(str(part) for part in known if part) or "an unknown device"
    speed = found.facts["bytes_per_s"]
    return f"On {words}" + (f", reading {speed / 1e9:.1f} GB/s." if speed else ".")
