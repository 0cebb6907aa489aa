"""Preference training: model and pairs in, model out; length-normalised DPO unless the recipe says otherwise.

    edgealign dpo --model M --data pairs.jsonl --out N

The reference is the input model itself. Its log-probabilities are computed once and cached, and the prompt that
chosen and rejected share is computed once per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from edgealign.artifact import Artifact
from edgealign.errors import InputError
from edgealign.objectives.table import Objective, check_beta, find, parse_settings, read_settings
from edgealign.progress import say
from edgealign.train.curves import PREFERENCE_PANELS
from edgealign.train.examples import Examples, load_pairs
from edgealign.train.layout import Tree
from edgealign.train.recipes import PreferenceRecipe
from edgealign.train.reference import reference_scores
from edgealign.train.stage import Base, Plan, run_stage
from edgealign.train.tasks import PreferenceTask
from edgealign.train.trainer import Fit

ALARM_NATS = 0.5  # per token: the chosen answers' tokens have become exp(-0.5) = 0.6 times as likely
ALARM_STEPS = 10  # averaged over this many steps, so that one odd batch raises nothing


def run(
    recipe: PreferenceRecipe, *, model: str | Path, data: Sequence[str], out: Path, valid: Sequence[str] = ()
) -> Artifact:
    """Train `model` on the pairs in `data` and publish the result at `out`.

    Args:
        valid: files to evaluate on; none holds back `recipe.valid_fraction` of the prompts in `data`.

    Raises:
        RecipeError: beta is on the scale of another reduction, or a setting cannot be.
        InputError: data or model cannot be used; the objective reads a column that rows lack.
        CheckFailed: the loss stopped being a number.
        OutputError: `out` exists or cannot be written.
    """
    objective = find(recipe.objective)
    beta = check_beta(objective, recipe.beta)
    settings = parse_settings(recipe.settings)
    read_settings(objective, settings)
    state: dict[str, Tensor] = {}  # one for training and evaluation
    users: dict[str, None] = {}

    def make_task(base: Base, trees: Sequence[Tree]) -> PreferenceTask:
        reference = None
        users.update(dict.fromkeys(str(tree.facts["user"]) for tree in trees if "user" in objective.columns))
        if objective.needs_reference:
            reference = reference_scores(
                base.model, trees, base.passes, model_digest=base.artifact.digest, template_hash=base.template_hash
            )
        return PreferenceTask(trees, objective, beta, reference, settings, tuple(users), state)

    def load_examples(tokenizer: Any) -> Examples:
        examples = load_pairs(list(data), tokenizer, recipe, valid=list(valid))
        _require_facts(objective, [*examples.train, *examples.held_out])
        return examples

    plan = Plan(
        name="dpo",
        load_examples=load_examples,
        make_task=make_task,
        panels=PREFERENCE_PANELS,
        facts={"objective": objective.key, "beta": beta, "citation": objective.citation,
               "formula": f"{objective.formula} ({objective.confidence})"},
        review=warn_falling_chosen,
    )
    return run_stage(plan, recipe, model=model, out=out)


def _require_facts(objective: Objective, trees: Sequence[Tree]) -> None:
    """Rows must say what the objective reads."""
    for name in objective.columns:
        missing = sum(tree.facts.get(name) is None for tree in trees)
        if missing:
            column = {"user": "user_id"}.get(name, name)
            reason = f"is missing in {missing} of {len(trees)} pairs, and {objective.key} reads it"
            raise InputError(column, reason, "add the column, or map it: --map THEIRS=" + column)


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
