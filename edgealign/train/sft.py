"""Supervised fine-tuning: model and conversations (or plain text) in, model out.

    edgealign sft --model M --data train.jsonl --out N

Only what the assistant says is learned. Examples are packed without padding and without leaking into one another
(`layout.py`); the loss is the mean over the learned tokens of an optimizer step.

With `--order easy_to_hard` an epoch starts with what is easy for the judges (`difficulty.py`, `curriculum.py`):

    edgealign sft --model M --data train.jsonl --order easy_to_hard --judge A --judge B --out N
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgealign.artifact import Artifact
from edgealign.errors import RecipeError
from edgealign.train.curriculum import Curriculum, remembered
from edgealign.train.curves import SFT_PANELS
from edgealign.train.difficulty import Difficulty, judge, open_judges
from edgealign.train.examples import Examples, load_documents
from edgealign.train.layout import Tree
from edgealign.train.recipes import SftRecipe
from edgealign.train.stage import Base, Plan, run_stage
from edgealign.train.tasks import SftTask

SCORED = "difficulty.json"  # beside the checkpoints


def run(
    recipe: SftRecipe,
    *,
    model: str | Path,
    data: Sequence[str],
    out: Path,
    valid: Sequence[str] = (),
    judges: Sequence[str | Path] = (),
) -> Artifact:
    """Train `model` on `data` and publish the result at `out`.

    Args:
        valid: files to evaluate on; none holds back `recipe.valid_fraction` of `data`.
        judges: models that say how difficult an example is, where `recipe.order` asks; none: `model` itself.

    Raises:
        RecipeError: judges, but an order that needs none.
        InputError: data, model or a judge cannot be used.
        CheckFailed: the loss stopped being a number.
        OutputError: `out` exists or cannot be written.
    """

    ordered = recipe.order != "shuffled"
    if judges and not ordered:
        raise RecipeError("--judge", "judges nothing while the order is shuffled", "add --order easy_to_hard")
    opened = open_judges(judges)

    def make_task(base: Base, trees: Sequence[Tree]) -> SftTask:
        return SftTask(trees)

    def make_curriculum(base: Base, examples: Examples, work: Path) -> Curriculum:
        def compute() -> Difficulty:
            return judge(
                opened, examples.train, examples.origins, base=(base.artifact, base.model, base.tokenizer),
                passes=base.passes, max_tokens=recipe.max_tokens, precision=recipe.precision,
                success_accuracy=recipe.success_accuracy,
            )

        difficulty = remembered(work / SCORED, len(examples.train), compute)
        return Curriculum.of(difficulty, examples.origins, recipe, [tree.n_learned for tree in examples.train])

    plan = Plan(
        name="sft",
        load_examples=lambda tokenizer: load_documents(
            list(data), tokenizer, recipe, valid=list(valid), origins=ordered
        ),
        make_task=make_task,
        panels=SFT_PANELS,
        facts={"loss": "negative log-likelihood per assistant token"},
        review=lambda result: [],
        inputs=[entry.as_input("judge") for entry in opened],
        curriculum=make_curriculum if ordered else None,
    )
    return run_stage(plan, recipe, model=model, out=out)
