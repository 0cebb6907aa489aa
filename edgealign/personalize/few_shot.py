"""How well do a few choices tell a user? For users with planted tastes, on a model's own answers and frozen states.

    edgealign eval personalization --model M --candidates DIR [--bundle B ...] --out REPORT

Seen users' choices on seen prompts teach what users have in common; a new user gives 0 to 32 choices on seen prompts
and is asked about unseen ones (the headline), and about seen ones. Beside each head: the population (0 choices), the
model's own likelihood, choices in the prompt of the model as it is, a fit without what others taught, another user's
choices and shuffled labels (which must not help), and a probe that sees nothing but format. Intervals are 95 %
bootstrap intervals over users. What choices are worth for the text that is said is in best_of.py; both are in one
report.

Shape legend: U users, A answers, F features, C components.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import Artifact, Check, open_artifact, open_model, publish, refuse_existing
from edgealign.errors import UsageError
from edgealign.personalize import baselines
from edgealign.personalize.candidates import read_candidates
from edgealign.personalize.few_shot_material import Material, read_material
from edgealign.personalize.heads import HEADS, Choices, Head
from edgealign.personalize.planted import KINDS, KS, Person, accuracy, curve, exchanged, shuffled
from edgealign.personalize.recipes import FewShotRecipe
from edgealign.personalize.text_users import TextUsers, format_probe, mean_of_worst, paired_gain
from edgealign.progress import bar, say
from edgealign.runtimes.session import read_bundle

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

CHANCE_POINTS = 0.01  # of accuracy: what a control may gain, and what a fit may lose where users are alike
PROBE_LIMIT = 0.52
SAME = 0.005  # of accuracy: a bundle against torch
SEEN, NEW = 0, 1  # parts of a population
CONTROLLED = (8, 32)  # numbers of choices that the controls are given
CONTROLS = 4  # of each kind for every user: one is luck where the next user happens to be alike
BASELINE = "lore-released"


def run(
    recipe: FewShotRecipe,
    *,
    model: str | Path,
    candidates: str | Path,
    out: Path,
    bundles: Sequence[Path] = (),
    cache: Path | None = None,
) -> Artifact:
    """Evaluate and publish a report.

    Args:
        bundles: exports of `model`; answers are drawn and read in each, beside torch.
        cache: a directory for features, so that answers are read once.

    Raises:
        UsageError: an unknown population or head.
        InputError: too few candidates.
    """
    from edgealign.models.load import load_tokenizer
    from edgealign.personalize.best_of import best_of_report
    from edgealign.personalize.few_shot_report import write_report

    refuse_existing(Path(out))
    for kind in recipe.populations:
        if kind not in KINDS:
            raise UsageError(kind, "is no population", f"choose from: {', '.join(KINDS)}")
    for head in recipe.heads:
        HEADS.load(head)
    source = open_model(model)
    answers, rows = read_candidates(candidates)
    tokenizer = load_tokenizer(source.path)
    sessions = {"torch": source.path, **{read_bundle(each).target: Path(each) for each in bundles}}
    material = read_material(recipe, source, rows, tokenizer, cache)
    result: dict[str, Any] = {"traits": material.whitening.names, "answers": len(material.texts), "prompts": len(rows)}
    result["populations"] = {kind: study(recipe, material, kind) for kind in recipe.populations}
    result["said"] = best_of_report(recipe, material, sessions, tokenizer)
    inputs = [source.as_input("model"), answers.as_input("candidates")]
    inputs += [open_artifact(each, check_digests=False).as_input("bundle") for each in bundles]
    with publish(out, kind="report", format="few-shot", stage="eval_few_shot", recipe=recipe, inputs=inputs) as draft:
        for check in checks(result):
            draft.add_check(check)
        (draft.dir / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        write_report(draft.dir, result, recipe, draft.checks)
    say(f"read {Path(out) / 'report.md'}")
    return open_artifact(out)


def study(recipe: FewShotRecipe, material: Material, kind: str) -> dict[str, Any]:
    """All heads and controls on one population, over all seeds; accuracies are of single users, one after another."""
    found: dict[str, Any] = {
        "heads": {}, "likelihood": [], "scratch": {k: [] for k in KS}, "prompted": {}, "probe": [],
    }  # fmt: skip
    with bar(total=recipe.seeds * len(recipe.heads), label=f"users {kind}") as advance:
        for seed in range(recipe.seed, recipe.seed + recipe.seeds):
            seen_prompts, new_prompts = material.pool.split(recipe.seen_prompts, seed)
            seen = TextUsers.draw(material.pool, kind, recipe.users, seed=seed, part=SEEN)
            new = TextUsers.draw(material.pool, kind, recipe.new_users, seed=seed, part=NEW)
            taught, shown = seen.choose(seen_prompts, recipe.pairs, seed=seed, flips=recipe.flips)
            found["probe"].append(format_probe(material.texts, shown))
            people = {
                "unseen users, unseen prompts": _people(recipe, new, seen_prompts, new_prompts, seed),
                "unseen users, seen prompts": _people(recipe, new, seen_prompts, seen_prompts, seed),
                "seen users, unseen prompts": _people(recipe, seen, seen_prompts, new_prompts, seed),
                "seen users, seen prompts": _people(recipe, seen, seen_prompts, seen_prompts, seed),
            }
            headline = next(iter(people.values()))
            found["likelihood"] += baselines.likelihood(material, new, new_prompts, recipe, seed)
            for k, values in baselines.prompted(material, new, seen_prompts, new_prompts, recipe, seed).items():
                found["prompted"].setdefault(k, []).extend(values)
            for k, values in baselines.scratch(headline, taught).items():
                found["scratch"][k] += values
            for name in recipe.heads:
                _add(found["heads"].setdefault(name, {}), HEADS.load(name), taught, people, recipe, seed)
                advance(1, name)
    return summarize(found, recipe)


def _people(recipe: FewShotRecipe, users: TextUsers, own: Any, asked: Any, seed: int) -> list[Person]:
    return users.people(own, asked, asked=recipe.asked, flips=recipe.flips, seed=seed)


def _add(
    row: dict[str, Any], kind: Any, taught: Choices, people: dict[str, list[Person]], recipe: FewShotRecipe, seed: int
) -> None:
    """One head's accuracies for one seed."""
    started = time.perf_counter()
    head = learn(kind, taught, recipe, seed)
    row.setdefault("learn_s", []).append(time.perf_counter() - started)
    row["bytes"] = 4 * head.state_size
    headline = next(iter(people.values()))
    for k, values in curve(head, headline).items():
        row.setdefault("curve", {}).setdefault(k, []).extend(values.tolist())
    count = CONTROLS if kind is HEADS.load(recipe.heads[0]) else 1  # what is recommended is held to more
    controls = {
        "another user's": [exchanged(headline, step) for step in range(1, count + 1)],
        "shuffled": [shuffled(headline, seed * CONTROLS + number) for number in range(count)],
    }
    for control, groups in controls.items():
        curves = [curve(head, group, CONTROLLED) for group in groups]
        for k in CONTROLLED:
            row.setdefault(control, {}).setdefault(k, []).extend(np.mean([each[k] for each in curves], 0).tolist())
    for cell, group in list(people.items())[1:] if kind is HEADS.load(recipe.heads[0]) else ():
        states = [head.fit(each.own) for each in group]
        scores = [accuracy(head, state, each.held_out) for state, each in zip(states, group, strict=True)]
        row.setdefault("cells", {}).setdefault(cell, []).extend(scores)
    started = time.perf_counter()
    for person in headline:
        head.fit(person.own.take(slice(8)))
    row.setdefault("fit_ms", []).append(1000 * (time.perf_counter() - started) / len(headline))


def learn(kind: Any, taught: Choices, recipe: FewShotRecipe, seed: int) -> Head:
    import inspect

    options = {"rank": recipe.rank} if "rank" in inspect.signature(kind.learn).parameters else {}
    head: Head = kind.learn(taught, seed=seed, **options)
    return head


def summarize(found: dict[str, Any], recipe: FewShotRecipe) -> dict[str, Any]:
    """Means, intervals, gains over the same head's 0 choices, regret, worst decile."""
    heads = {}
    for name, row in found["heads"].items():
        by_k = {k: np.array(values) for k, values in row["curve"].items()}
        start = by_k[0]
        means = {k: float(values.mean()) for k, values in by_k.items()}
        heads[name] = {
            "accuracy": means,
            "gain": {k: paired_gain(values, start, resamples=recipe.bootstrap) for k, values in by_k.items()},
            "recovered": {k: (mean - means[0]) / max(1 - means[0], 1e-9) for k, mean in means.items()},
            "regret": float(sum(1 - mean for mean in means.values())),
            "worst decile": {k: mean_of_worst(values) for k, values in by_k.items()},
            "cells": {cell: float(np.mean(values)) for cell, values in row.get("cells", {}).items()},
            "fit_ms": float(np.median(row["fit_ms"])), "learn_s": float(np.median(row["learn_s"])),
            "bytes": row["bytes"], "ahead": _ahead(by_k, found["heads"].get(BASELINE), recipe),
            **{
                control: {
                    k: paired_gain(np.array(values), start, resamples=recipe.bootstrap)
                    for k, values in row[control].items()
                }
                for control in ("another user's", "shuffled")
            },
        }  # fmt: skip
    return {
        "heads": heads, "likelihood": float(np.mean(found["likelihood"])), "probe": float(np.mean(found["probe"])),
        "scratch": {k: float(np.mean(values)) for k, values in found["scratch"].items()},
        "prompted": {k: float(np.mean(values)) for k, values in found["prompted"].items()},
    }  # fmt: skip


def _ahead(by_k: dict[int, Floats], baseline: dict[str, Any] | None, recipe: FewShotRecipe) -> dict[int, Any]:
    """Paired gain over LoRe's released few-shot step, user by user, with its standard error."""
    if baseline is None:
        return {}
    theirs = {k: np.array(values) for k, values in baseline["curve"].items()}
    return {
        k: {
            **paired_gain(values, theirs[k], resamples=recipe.bootstrap),
            "error": float((values - theirs[k]).std(ddof=1) / len(values) ** 0.5),
        }
        for k, values in by_k.items()
    }  # fmt: skip


def checks(result: dict[str, Any]) -> list[Check]:
    """The recommended head is held to its promises; the others are reported."""
    found: list[Check] = []
    for kind, row in result["populations"].items():
        lore = row["heads"].get("lore")
        if lore is None:
            continue
        if kind == "signed-0.1":
            low = lore["gain"][8]["low"]
            found.append(Check(f"{kind}: 8 choices beat 0", low, 0.0, low > 0, "lower end of the gain's interval"))
            probe = row["probe"]
            note = "accuracy of a classifier that sees nothing but format"
            found.append(Check(f"{kind}: no leak of format", probe, PROBE_LIMIT, probe <= PROBE_LIMIT, note))
        worst = min(gain["mean"] for gain in lore["gain"].values())
        note = "lowest gain at any number of choices"
        found.append(Check(f"{kind}: no harm", worst, -CHANCE_POINTS, worst >= -CHANCE_POINTS, note))
        for control in ("another user's", "shuffled"):
            most = max(gain["mean"] for gain in lore[control].values())
            name = f"{kind}: {control} choices do not help"
            found.append(Check(name, most, CHANCE_POINTS, most <= CHANCE_POINTS, "highest mean gain"))
        if ahead := {k: gap for k, gap in lore["ahead"].items() if k}:
            least = min(gap["mean"] + gap["error"] for gap in ahead.values())
            note = "lowest gap from 1 to 32 choices, plus its standard error"
            found.append(Check(f"{kind}: never behind the released step", least, 0.0, least >= 0, note))
    return found + said_checks(result["said"])


def said_checks(said: dict[str, Any]) -> list[Check]:
    """What is said must move too, in every runtime, and a bundle must rank as torch does."""
    found = []
    for label, row in said["runtimes"].items():
        low = row["lore"]["gain"][8]["low"]
        found.append(Check(f"{label}: 8 choices move what is said", low, 0.0, low > 0, "reward over best of as many"))
        if label != "torch":
            gap = abs(row["accuracy"] - said["runtimes"]["torch"]["accuracy"])
            found.append(Check(f"{label}: ranks as torch does", gap, SAME, gap <= SAME, "gap of mean accuracy"))
    return found
