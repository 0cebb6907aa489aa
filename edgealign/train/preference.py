"""Preference training: model and pairs in, model out; length-normalised DPO unless the recipe says otherwise.

    edgealign dpo --model M --data pairs.jsonl --out N

The reference is the input model itself. Its log-probabilities are computed once and cached, and the prompt that
chosen and rejected share is computed once per pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edgealign.artifact import Artifact, open_model
from edgealign.data.forms import PAIR_NUMBERS
from edgealign.data.template import end_of_turn_id
from edgealign.errors import InputError, UsageError
from edgealign.models.load import load_model, load_tokenizer
from edgealign.objectives.settings import configure
from edgealign.objectives.table import NUMBER_RANGES, PAIR_FACTS, Objective, check_beta, find
from edgealign.progress import say
from edgealign.train import processes, sharding
from edgealign.train.anchors import Anchors
from edgealign.train.curves import PREFERENCE_PANELS
from edgealign.train.examples import Examples, load_pairs
from edgealign.train.layout import Tree
from edgealign.train.online import OnlineAnswers
from edgealign.train.preference_task import PreferenceTask
from edgealign.train.recipes import PreferenceRecipe
from edgealign.train.reference import reference_scores
from edgealign.train.stage import Base, Plan, run_stage
from edgealign.train.tasks import PerToken
from edgealign.train.trainer import Fit

ALARM_NATS = 0.5  # per token: the chosen answers' tokens have become exp(-0.5) = 0.6 times as likely
ALARM_STEPS = 10  # averaged over this many steps, so that one odd batch raises nothing


def run(
    recipe: PreferenceRecipe,
    *,
    model: str | Path,
    data: Sequence[str],
    out: Path,
    valid: Sequence[str] = (),
    second: str | Path | None = None,
) -> Artifact:
    """Train `model` on the pairs in `data` and publish the result at `out`.

    Args:
        valid: files to evaluate on; none holds back `recipe.valid_fraction` of the prompts in `data`.
        second: the other model of an objective that reads two: a second reference (mrpo), or the reference where
            `model` is the iterate to go on from (inpo_nash).

    Raises:
        UsageError: a second model is missing, or not asked for.
        RecipeError: beta is on the scale of another reduction, or a setting cannot be.
        InputError: data or model cannot be used; the objective reads a column that rows lack.
        CheckFailed: the loss stopped being a number.
        OutputError: `out` exists or cannot be written.
    """
    objective, settings = configure(find(recipe.objective), recipe.settings)
    beta = check_beta(objective, recipe.beta)
    if "online" in objective.columns and sharding.wanted(recipe):
        reason = "draws answers while it trains, which needs whole weights in every process"
        raise UsageError(objective.key, reason, f"unset {sharding.SWITCH}")
    other = _second_model(objective, second)
    state: dict[str, Tensor] = {}  # one for training and evaluation
    train: list[Sequence[Tree]] = []
    users: dict[str, None] = {}

    def make_task(base: Base, trees: Sequence[Tree]) -> PreferenceTask:
        users.update(dict.fromkeys(str(tree.facts["user"]) for tree in trees if "user" in objective.columns))
        reference = _scores(base, base.artifact, base.model, trees) if objective.needs_reference else None
        beside = None
        if other is not None:
            beside = _scores(base, other, load_beside(base, other), trees)
            if objective.second_model == "previous":
                reference, beside = beside, reference
        online, loss, numbers = None, objective, settings
        if "online" in objective.columns:
            if trees is train[0]:
                trees = list(trees)
                online = _online(base, trees, recipe)
            else:  # held-out pairs are compared without drawing
                loss = replace(objective, columns=())
                numbers = {**settings, **{f"weight_{name}": 0.0 for name, _ in objective.absolute}}
        anchors = Anchors.of(objective, base.model, trees, base.passes, head_learns=not recipe.lora)
        return PreferenceTask(
            trees, loss, beta, reference, numbers, tuple(users), state, second=beside, anchors=anchors, online=online
        )

    def load_examples(tokenizer: Any) -> Examples:
        examples = load_pairs(
            list(data), tokenizer, recipe, valid=list(valid), columns=objective.columns, texts=objective.texts,
            thumbs=objective.of_sides,
        )  # fmt: skip
        _require_facts(objective, [*examples.train, *examples.held_out])
        train.append(examples.train)
        return examples

    plan = Plan(
        name="dpo",
        load_examples=load_examples,
        make_task=make_task,
        panels=PREFERENCE_PANELS,
        facts={"objective": objective.key, "beta": beta, "citation": objective.citation,
               "formula": f"{objective.formula} ({objective.confidence})"},
        review=warn_falling_chosen,
        inputs=[other.as_input("second model")] if other else [],
    )
    return run_stage(plan, recipe, model=model, out=out)


def _require_facts(objective: Objective, trees: Sequence[Tree]) -> None:
    """Rows must say what the objective reads, and numbers must be such as it can use."""
    for name in (each for each in objective.columns if each in PAIR_FACTS):
        column = {"user": "user_id", "base_reference": "base"}.get(name, name)
        values = [tree.facts.get(name) for tree in trees]
        missing = sum(value is None for value in values)
        if missing:
            kind = " (or no finite number)" if name in PAIR_NUMBERS else ""
            reason = f"is missing{kind} in {missing} of {len(trees)} pairs, and {objective.key} reads it"
            raise InputError(column, reason, "add the column, or map it: --map THEIRS=" + column)
        low, high = NUMBER_RANGES.get(name, (-math.inf, math.inf))
        wrong = [value for value in values if name in NUMBER_RANGES and not low <= float(value or 0) < high]
        if wrong:
            reason = f"{objective.key} takes {name} from {low:g} and below {high:g}; {len(wrong)} pairs have others"
            raise InputError(f"{name} {float(wrong[0] or 0):g}", reason, "mend the column")


def _second_model(objective: Objective, second: str | Path | None) -> Artifact | None:
    """The second model where the objective reads one."""
    if objective.second_model is None:
        if second is not None:
            raise UsageError("--second", f"{objective.key} compares with one model", "leave it out")
        return None
    if second is None:
        what = "the reference" if objective.second_model == "previous" else "a second reference"
        raise UsageError(objective.key, "reads the scores of two models", f"give {what}: --second MODEL")
    return open_model(second)


def load_beside(base: Base, other: Artifact) -> Any:
    """A second model in the arithmetic of the first; both must cut texts into the same tokens.

    Raises:
        InputError: they do not.
    """
    if load_tokenizer(other.path).get_vocab() != base.tokenizer.get_vocab():
        raise InputError(other.path, "has another vocabulary than --model", "give a model of the same family")
    return load_model(other.path, dtype=base.passes.precision.weights).to(processes.device())


def _online(base: Base, trees: list[Tree], recipe: PreferenceRecipe) -> OnlineAnswers:
    """Draws answers while training; the reference stands still beside, where it is not the model without its LoRA."""
    still = None
    if not recipe.lora:
        still = load_model(base.artifact.path, dtype=base.passes.precision.weights).to(processes.device()).eval()
    return OnlineAnswers(
        trees, still, base.passes, end=end_of_turn_id(base.tokenizer), samples=recipe.online_samples,
        max_new_tokens=recipe.online_tokens, max_tokens=recipe.max_tokens, seed=recipe.seed,
    )  # fmt: skip


def _scores(base: Base, source: Artifact, model: Any, trees: Sequence[Tree]) -> PerToken:
    return reference_scores(
        model, trees, base.passes, model_digest=source.digest, template_hash=base.template_hash
    )


def warn_falling_chosen(result: Fit) -> list[str]:
    """The alarm for a run that makes the *chosen* answers unlikely: margins can grow while both sides fall."""
    values = [row["ratio_chosen"] for row in result.rows if "ratio_chosen" in row]
    window = min(ALARM_STEPS, len(values))
    for end in range(window, len(values) + 1):
        mean = sum(values[end - window : end]) / window if window else 0.0
        if mean < -ALARM_NATS:
            message = (
                f"by step {result.rows[end - 1]['step']} the chosen answers were {-mean:.2f} nats per token "
                "less likely than before training"
            )
            say(f"warning: {message} (a lower --learning-rate, a higher --beta or fewer --epochs hold them)")
            return [message]
    return []
