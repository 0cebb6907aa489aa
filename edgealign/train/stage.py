"""What SFT and preference training have in common: load, train, compare, publish.

    examples -> evaluate before -> fit (resumed if a checkpoint is there) -> merge the LoRA -> evaluate after -> publish

The published directory is a complete Hugging Face model. Its tokenizer, chat template and generation config are the
input's own files, byte for byte. Beside them lie `log.jsonl`, `tensorboard/` and `curves.png`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgealign.artifact import (
    Artifact,
    Input,
    hash_json,
    open_artifact,
    open_model,
    publish,
    refuse_existing,
    workdir,
    write_atomic,
)
from edgealign.data.encode import template_hash
from edgealign.errors import InputError, RecipeError, writing
from edgealign.models.lint import describe, lora_targets
from edgealign.models.load import load_model, load_tokenizer
from edgealign.progress import is_first_process, quiet_transformers, say
from edgealign.train import processes, sharding
from edgealign.train.adapt import add_lora, merge_lora, restore, save_lora, trainable
from edgealign.train.checkpoints import full_disk
from edgealign.train.curriculum import Curriculum
from edgealign.train.curves import Panel, draw_curves
from edgealign.train.examples import Examples
from edgealign.train.history import HISTORY_FILE, read_history
from edgealign.train.layout import Tree
from edgealign.train.logprobs import check_layout
from edgealign.train.precision import choose_precision, count_parameters, fixed_threads
from edgealign.train.qat import keep_on_grid, put_on_grid
from edgealign.train.recipes import PretrainRecipe, TrainRecipe
from edgealign.train.schedule import wanted_steps, warn_few_steps
from edgealign.train.scoring import Passes, evaluate
from edgealign.train.tasks import Task
from edgealign.train.trainer import Fit, fit

TEXT_FILES = (
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja",
    "generation_config.json", "LICENSE*",
)
LORA_FOLDER = "lora"


@dataclass(frozen=True)
class Base:
    """The model that a stage starts from."""

    artifact: Artifact
    model: Any
    tokenizer: Any
    passes: Passes
    template_hash: str | None


@dataclass(frozen=True)
class Plan:
    """What makes a stage the one it is. `make_task` may score the untouched base (the reference)."""

    name: str
    load_examples: Callable[[Any], Examples]
    make_task: Callable[[Base, Sequence[Tree]], Task]
    panels: Sequence[Panel]
    facts: dict[str, Any]
    review: Callable[[Fit], list[str]]  # warnings from the log
    inputs: Sequence[Input] = ()  # more of them than model and data
    curriculum: Callable[[Base, Examples, Path], Curriculum] | None = None  # the order of the data; none: shuffled


def run_stage(plan: Plan, recipe: TrainRecipe, *, model: str | Path, out: Path) -> Artifact:
    """Train and publish; see the module's text for the order."""
    out = Path(out)
    refuse_existing(out)
    sharding.wanted(recipe)  # refuses early what cannot be sharded
    if recipe.lora and recipe.qat != "none":
        raise RecipeError("qat", "rounds the weights that a LoRA leaves alone", "choose --qat or --lora")
    source = open_model(model)
    recipe = recipe.for_model(_stored_parameters(source.path))
    with fixed_threads(recipe.threads) as threads:
        tokenizer = load_tokenizer(source.path)
        examples = plan.load_examples(tokenizer)
        if not examples.train:
            raise InputError("--data", "leaves no example to train on", "give more rows or a smaller --valid-fraction")
        base = _load_base(source, tokenizer, recipe)
        inputs = [source.as_input("model"), *plan.inputs, *examples.inputs]
        facts = _sizes(base, recipe)
        key = hash_json(
            {
                "stage": plan.name, "recipe": _plain(recipe), "inputs": [entry.digest for entry in inputs],
                "threads": threads, "precision": base.passes.precision.name, "torch": torch.__version__,
            }
        )
        work = processes.first_then_all(lambda: workdir(out, key))
        started_s = time.monotonic()
        task = plan.make_task(base, examples.train)
        held_out = plan.make_task(base, examples.held_out) if examples.held_out else None
        warnings = [message for message in (warn_few_steps(_n_steps(recipe, len(examples.train))),) if message]
        with writing(out), full_disk(out):
            before = _remembered(work / "before.json", lambda: _evaluate(base, held_out))
            curriculum = plan.curriculum(base, examples, work) if plan.curriculum else None
            trained = _with_lora(base.model, recipe) if recipe.lora else base.model
            if recipe.qat != "none":
                say(f"{recipe.qat}: {put_on_grid(trained)} linear layers are rounded in the forward pass")
            result = fit(
                trained, task, recipe, passes=base.passes, work=work, held_out=held_out,
                order=curriculum.order if curriculum else None,
            )
        if recipe.qat != "none":
            keep_on_grid(trained)
        if not is_first_process():
            processes.wait()
            return open_artifact(out)
        warnings += [*(curriculum.warnings if curriculum else ()), *plan.review(result)]
        after = evaluate(trained, held_out, base.passes, label="evaluating the result") if held_out else {}
        _say_outcome(plan.name, before, after)
        with full_disk(out), publish(
            out, kind="model", format="huggingface", stage=plan.name, recipe=recipe, inputs=inputs,
            template_hash=base.template_hash, licences={**source.manifest.licences, **examples.licences},
        ) as draft:
            if recipe.lora and recipe.save_adapter:
                save_lora(trained, draft.dir / LORA_FOLDER, base_name=source.digest)
            final = _final_model(trained, base, recipe)
            save_model(final, source.path, draft.dir, dtype=_save_dtype(recipe, source.path))
            result.log.copy_to(draft.dir)
            title = f"{plan.name}: {result.n_steps} optimizer steps"
            if (work / HISTORY_FILE).is_file():
                shutil.copyfile(work / HISTORY_FILE, draft.dir / HISTORY_FILE)
            draw_curves(_with_history(result.rows, work), plan.panels, draft.dir / "curves.png", title=title)
            if curriculum:
                curriculum.write(draft.dir, result.rows)
                draft.meta["difficulty"] = curriculum.facts()
            draft.meta.update(
                {
                    **plan.facts, **facts, "examples": examples.facts, "steps": result.n_steps,
                    "resumed_at_step": result.resumed_at, "precision": base.passes.precision.name, "threads": threads,
                    "seconds": round(time.monotonic() - started_s, 1), "before": before, "after": after,
                    "warnings": warnings,
                }
            )
    processes.wait()
    return open_artifact(out)


def save_model(model: Any, source: Path, folder: Path, *, dtype: torch.dtype) -> None:
    """A complete Hugging Face directory: new weights and config, everything about text copied from `source`."""
    with quiet_transformers():
        model.to(dtype).save_pretrained(folder, max_shard_size="50GB")
    for pattern in TEXT_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _load_base(source: Artifact, tokenizer: Any, recipe: TrainRecipe) -> Base:
    precision = choose_precision(recipe.precision, lora=recipe.lora, n_parameters=_stored_parameters(source.path))
    model: Any = load_model(source.path, dtype=precision.weights)
    model.to(processes.device())
    check_layout(model)
    passes = Passes.for_training(
        model, precision, lora=recipe.lora, tokens_per_pass=recipe.tokens_per_pass,
        pad_id=int(tokenizer.pad_token_id or 0),
    )  # fmt: skip
    return Base(source, model, tokenizer, passes, template_hash(tokenizer) if tokenizer.chat_template else None)


def _sizes(base: Base, recipe: TrainRecipe) -> dict[str, Any]:
    """How much will learn; refuses LoRA targets that match nothing."""
    total = count_parameters(base.model)
    if not recipe.lora:
        return {"parameters": total, "trained_parameters": total}
    coverage = lora_targets(base.model, list(recipe.targets))
    say(describe(coverage))
    shapes = [base.model.get_submodule(name).weight.shape for name in coverage.modules]
    learned = sum(recipe.rank * sum(shape) for shape in shapes)
    return {"parameters": total, "trained_parameters": learned, "lora_share": round(coverage.share, 4)}


def _with_lora(model: Any, recipe: TrainRecipe) -> Any:
    return add_lora(
        model, rank=recipe.rank, alpha=recipe.alpha, targets=recipe.targets, dropout=recipe.lora_dropout,
        seed=recipe.seed,
    )


def _final_model(trained: Any, base: Base, recipe: TrainRecipe) -> Any:
    """Full weights; a LoRA is merged in float32, into the weights as stored and not as rounded for training."""
    if not recipe.lora:
        return trained
    if base.passes.precision.weights == "float32":
        return merge_lora(trained)
    values = trainable(trained)
    exact = _with_lora(load_model(base.artifact.path, dtype="float32"), recipe)
    restore(exact, values)
    return merge_lora(exact)


def _evaluate(base: Base, task: Task | None) -> dict[str, float]:
    return evaluate(base.model, task, base.passes, label="evaluating the base") if task else {}


def _remembered(file: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A small result that a resumed run need not compute again."""
    if file.is_file():
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return found
    result = compute()
    write_atomic(file, json.dumps(result))
    return result


def _with_history(rows: Sequence[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """The log's rows with the held-out loss on those steps that have one."""
    held_out = {int(row["step"]): row["loss"] for row in read_history(work / HISTORY_FILE)}
    return [{**row, "held_out": held_out[row["step"]]} if row["step"] in held_out else row for row in rows]


def _save_dtype(recipe: TrainRecipe, source: Path) -> torch.dtype:
    if recipe.save_dtype != "auto":
        name = recipe.save_dtype
    else:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _stored_parameters(folder: Path) -> int:
    from edgealign.plan import count_parameters as stored

    return stored(folder)


def _n_steps(recipe: TrainRecipe, n_examples: int) -> int:
    steps = recipe.epochs * -(-n_examples // recipe.batch_size)
    wanted = wanted_steps(recipe)
    return min(steps, wanted) if wanted and not isinstance(recipe, PretrainRecipe) else wanted or steps


def _plain(recipe: TrainRecipe) -> dict[str, Any]:
    from edgealign.recipe import to_dict

    return to_dict(recipe)


def _say_outcome(name: str, before: dict[str, float], after: dict[str, float]) -> None:
    if "loss" not in after:
        say(f"{name}: nothing was held out, so nothing is compared (see --valid-fraction)")
        return
    ranking = f", ranking accuracy {before['hit_free']:.1%} -> {after['hit_free']:.1%}" if "hit_free" in after else ""
    say(f"{name}: held-out loss {before['loss']:.4f} -> {after['loss']:.4f}{ranking}")
