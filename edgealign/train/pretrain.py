"""Pre-training: next-token training of a model on plain text, from random weights or from any model.

    edgealign pretrain --model M --data books.jsonl --data leads.jsonl --out N
    torchrun --nproc-per-node 4 -m edgealign pretrain ...          several GPUs, or several processes on a CPU

Documents are packed into rows of one length without leaking into one another (`rows.py`); the engine is the one of
`sft` and `dpo`, so runs resume exactly and log loss, tokens per second and the share of the machine's measured peak.
Held-out loss against tokens lies in `history.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgealign.artifact import Artifact
from edgealign.train.curves import PRETRAIN_PANELS
from edgealign.train.recipes import PretrainRecipe
from edgealign.train.rows import PretrainTask, load_rows
from edgealign.train.stage import Plan, run_stage


def run(
    recipe: PretrainRecipe, *, model: str | Path, data: Sequence[str], out: Path, valid: Sequence[str] = ()
) -> Artifact:
    """Train `model` on `data` and publish the result at `out`.

    Args:
        data: files of texts, or of conversations (every token of which is learned here, the user's too).
        valid: files to evaluate on; none holds back `recipe.valid_fraction` of the tokens of `data`.

    Raises:
        InputError: data or model cannot be used.
        CheckFailed: the loss stopped being a number.
        OutputError: `out` exists or cannot be written.
    """
    plan = Plan(
        name="pretrain",
        load_examples=lambda tokenizer: load_rows(list(data), tokenizer, recipe, valid=list(valid)),
        make_task=lambda base, rows: PretrainTask(rows),
        panels=PRETRAIN_PANELS,
        facts={"loss": "negative log-likelihood per token"},
        review=lambda result: [],
    )
    return run_stage(plan, recipe, model=model, out=out)
