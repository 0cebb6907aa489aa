"""Distillation: a student learns from a larger teacher's top K tokens and from the text itself.

    edgealign distill --teacher T --model STUDENT --data books.jsonl --out N

The student is any model with the teacher's vocabulary, trained on rows of text as in `pretrain` (conversations too:
every token is learned). The teacher runs once over the rows that the run will use; what it said is cached
(`teacher_cache.py`), so a second student or another temperature costs no teacher. The loss is LFM2's decoupled,
tempered top-K objective beside cross-entropy (`objectives/distill.py`). Held-out numbers are plain cross-entropy, so
that a student with a teacher and one without compare directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edgealign.artifact import Artifact, open_model
from edgealign.errors import InputError, RecipeError
from edgealign.models.load import load_model, load_tokenizer
from edgealign.objectives.distill import topk_distillation
from edgealign.plan import count_parameters
from edgealign.train import processes
from edgealign.train.curves import DISTILL_PANELS
from edgealign.train.layout import Batch
from edgealign.train.logprobs import check_layout
from edgealign.train.precision import choose_precision
from edgealign.train.recipes import DistillRecipe
from edgealign.train.rows import PretrainTask, Rows, load_rows
from edgealign.train.schedule import wanted_steps
from edgealign.train.scoring import Passes
from edgealign.train.stage import Base, Plan, run_stage
from edgealign.train.teacher_cache import teach


@dataclass(frozen=True)
class DistillTask(PretrainTask):
    """Top-K distillation per token; the rows bring what the teacher said."""

    temperature: float
    ce_weight: float

    def loss(self, logps: Tensor, batch: Batch, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """logps (N, 1 + K): of the token that came, then of the teacher's K."""
        assert batch.teacher is not None
        parts = topk_distillation(
            batch.teacher, logps[:, 1:], logps[:, 0], temperature=self.temperature, ce_weight=self.ce_weight
        )
        named = {"ce": parts.cross_entropy, "kl_membership": parts.membership, "kl_inside": parts.inside}
        return parts.loss.sum(), {name: float(value.detach().sum()) for name, value in named.items()}


def run(
    recipe: DistillRecipe,
    *,
    model: str | Path,
    teacher: str | Path,
    data: Sequence[str],
    out: Path,
    valid: Sequence[str] = (),
) -> Artifact:
    """Distil `teacher` into `model` on `data` and publish the student at `out`.

    Raises:
        RecipeError: K is larger than the vocabulary.
        InputError: data, student or teacher cannot be used, or their vocabularies differ.
        CheckFailed: the loss stopped being a number.
        OutputError: `out` exists or cannot be written.
    """
    source = open_model(teacher)
    facts: dict[str, Any] = {"loss": "decoupled tempered top-K KL and cross-entropy, per token"}
    train: list[Rows] = []

    def load_examples(tokenizer: Any) -> Any:
        _same_vocabulary(tokenizer, load_tokenizer(source.path), model, teacher)
        if recipe.top_k > (n := len(tokenizer)):
            raise RecipeError(f"top_k {recipe.top_k}", f"is more than the {n:,} tokens there are", "lower --top-k")
        found = load_rows(list(data), tokenizer, recipe, valid=list(valid))
        train.append(found.train)
        return found

    def make_task(base: Base, rows: Any) -> PretrainTask:
        if rows is not train[0]:
            return PretrainTask(rows)
        # As exact as the teacher's own size calls for: a student of another size finds the same cache.
        precision = choose_precision(recipe.precision, lora=True, n_parameters=count_parameters(source.path))
        passes = replace(base.passes, precision=precision)
        taught, known = teach(
            _needed(rows, recipe), lambda: _load_teacher(source, passes), teacher_digest=source.digest,
            vocab_size=len(base.tokenizer), k=recipe.top_k, passes=passes,
        )
        facts.update(known)
        return DistillTask(taught, recipe.temperature, recipe.ce_weight)

    plan = Plan(
        name="distill", load_examples=load_examples, make_task=make_task, panels=DISTILL_PANELS, facts=facts,
        review=lambda result: [], inputs=[source.as_input("teacher")],
    )
    return run_stage(plan, recipe, model=model, out=out)


def _needed(rows: Rows, recipe: DistillRecipe) -> Rows:
    """The rows that a run of so many steps sees: a teacher is not asked about the rest."""
    steps = wanted_steps(recipe)
    return rows.head(steps * recipe.batch_size) if steps else rows


def _load_teacher(source: Artifact, passes: Passes) -> Any:
    model: Any = load_model(source.path, dtype=passes.precision.weights)
    model.to(processes.device()).eval()
    check_layout(model)
    return model


def _same_vocabulary(student: Any, teacher: Any, model: str | Path, other: str | Path) -> None:
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        shared = sum(theirs.get(token) == number for token, number in mine.items())
        raise InputError(
            str(other),
            f"has another vocabulary ({len(theirs):,} tokens) than {model} ({len(mine):,}; {shared:,} alike)",
            "make the student from the same tokenizer: edgealign init ... --text the same files",
        )


