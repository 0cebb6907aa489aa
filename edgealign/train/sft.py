"""Supervised fine-tuning: model and conversations (or plain text) in, model out.

    edgealign sft --model M --data train.jsonl --out N

Only what the assistant says is learned. Examples are packed without padding and without leaking into one another
(`layout.py`); the loss is the mean over the learned tokens of an optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgealign.artifact import Artifact
from edgealign.train.curves import SFT_PANELS
from edgealign.train.examples import load_documents
from edgealign.train.layout import Tree
from edgealign.train.recipes import SftRecipe
from edgealign.train.stage import Base, Plan, run_stage
from edgealign.train.tasks import SftTask


def run(
    recipe: SftRecipe, *, model: str | Path, data: Sequence[str], out: Path, valid: Sequence[str] = ()
) -> Artifact:
    """Train `model` on `data` and publish the result at `out`.

    Args:
        valid: files to evaluate on; none holds back `recipe.valid_fraction` of `data`.

    Raises:
        InputError: data or model cannot be used.
        CheckFailed: the loss stopped being a number.
        OutputError: `out` exists or cannot be written.
    """

    def make_task(base: Base, trees: Sequence[Tree]) -> SftTask:
        return SftTask(trees)

    plan = Plan(
        name="sft",
        load_examples=lambda tokenizer: load_documents(list(data), tokenizer, recipe, valid=list(valid)),
        make_task=make_task,
        panels=SFT_PANELS,
        facts={"loss": "negative log-likelihood per assistant token"},
        review=lambda result: [],
    )
    return run_stage(plan, recipe, model=model, out=out)
