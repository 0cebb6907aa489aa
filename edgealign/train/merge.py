"""`edgealign merge`: a LoRA into its base, or models of one base into one.

A LoRA is merged in float32, and the published weights are loaded again and must give the logits that base plus
adapter gave. Models are merged by mergekit (`mergekit_merge.py`); they must share tokenizer, chat template, tensors
and a base, and the result must have exactly their tensors. `search` makes several candidates and keeps the best on
held-out rows (`merge_search.py`), as the LFM2 report does (arXiv 2511.23404, appendix B).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.artifact import Artifact, Check, Draft, open_artifact, open_model, publish, refuse_existing
from edgealign.errors import CheckFailed, InputError, UsageError
from edgealign.progress import say
from edgealign.train.merge_family import Family, first_difference, open_family, stored_dtype, tensor_shapes
from edgealign.train.merge_recipe import MergeRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from edgealign.train.mergekit_merge import Merge

COMPANIONS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
NOT_COMPANIONS = ("manifest.json", "*.safetensors.index.json", "candidates.json")
PROBE = "Name one colour, then say why you like it."


def run(
    recipe: MergeRecipe,
    *,
    models: Sequence[Path | str],
    out: Path,
    base: Path | str | None = None,
    data: Sequence[str] = (),
    adapter: Path | None = None,
    judge: str | None = None,
) -> Artifact:
    """Merge and publish a model at `out`.

    Args:
        models: one model with `adapter`; otherwise the models to merge, or one model to scale against `base`.
        base: what the models were trained from; task arithmetic and its relatives need it.
        data: held-out pairs or conversations, for `search`.
        judge: what `judges.judge.open_judge` reads, for `search` with `select` judge.

    Raises:
        UsageError: a judge without a search that asks it, or none where one is asked.
        InputError: models that do not belong together, an adapter of another model, a base that is missing.
        CheckFailed: the merged model does not compute what it should.
    """
    out = Path(out)
    refuse_existing(out)
    if adapter is not None:
        if len(models) != 1 or base is not None:
            raise InputError(adapter, "a LoRA is merged into one model", "give one --model and no --base")
        return _merge_adapter(recipe, open_model(models[0]), Path(adapter), out)
    family = open_family(models, base)
    if recipe.search:
        from edgealign.train.merge_search import run_search

        return run_search(recipe, family, data, out, judge=judge)
    if judge is not None or recipe.select == "judge":
        raise UsageError("a judge", "chooses between candidates", "add --search")
    return _merge_models(recipe, family, out)


def merge_into(folder: Path, merge: Merge, family: Family, *, dtype: str, seed: int) -> Check:
    """Write a complete model directory; the check says that it has its parents' tensors, all finite.

    Raises:
        CheckFailed: it has not.
    """
    from edgealign.train.mergekit_merge import check_merge, merge_weights

    check_merge(merge, models=len(family.models), base=family.base is not None)
    merge_weights(
        merge, [model.path for model in family.models], family.base.path if family.base else None, folder,
        model_type=str(family.config["model_type"]), dtype=dtype, seed=seed,
    )
    copy_companions(family.donor.path, folder, dtype=dtype)
    difference = first_difference(tensor_shapes(family.models[0].path), tensor_shapes(folder))
    if difference:
        raise CheckFailed(merge.name, f"has other tensors than its parents: {difference}", "use another method")
    if broken := _not_finite(folder):
        raise CheckFailed(merge.name, f"tensor {broken} is not finite", "use smaller weights or another method")
    return Check("same tensors", 0.0, 0.0, True, "tensors missing from or added to the parents' set; all are finite")


def copy_companions(source: Path, folder: Path, *, dtype: str) -> None:
    """Everything of a model directory but its weights; `config.json` says which type the new weights have."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not any(file.match(name) for name in NOT_COMPANIONS):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish_files(draft: Draft, folder: Path, *, move: bool) -> None:
    """Put a finished model directory's files into the draft."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != "manifest.json":
            if move:
                os.replace(file, draft.dir / file.name)
            else:
                shutil.copyfile(file, draft.dir / file.name)


def licences_of(models: Sequence[Artifact]) -> dict[str, str]:
    """What the parents' manifests say about data and base."""
    return {key: value for model in models for key, value in model.manifest.licences.items()}


def _merge_models(recipe: MergeRecipe, family: Family, out: Path) -> Artifact:
    from edgealign.train.mergekit_merge import Merge

    count = len(family.models)
    merge = Merge(
        recipe.method, recipe.weights or (1 / count,) * count, recipe.density, recipe.epsilon, recipe.t, recipe.scale
    )
    dtype = stored_dtype(family.config, recipe.dtype)
    with publish(
        out, kind="model", format="huggingface", stage="merge", recipe=recipe, inputs=family.inputs,
        template_hash=family.template_hash, licences=licences_of(family.models),
    ) as draft:
        draft.add_check(merge_into(draft.dir, merge, family, dtype=dtype, seed=recipe.seed))
        draft.meta.update({"merge": merge.name, "dtype": dtype})
    say(f"{out}: {merge.name} of {count} model{'s' if count > 1 else ''}")
    return open_artifact(out)


def _merge_adapter(recipe: MergeRecipe, model: Artifact, adapter_dir: Path, out: Path) -> Artifact:
    import torch
    from peft import PeftModel

    from edgealign.data.encode import template_hash
    from edgealign.models.load import check_model, load_model, load_tokenizer
    from edgealign.personalize.adapter import check_adapter_base
    from edgealign.train.adapt import merge_lora

    adapter = check_adapter_base(adapter_dir, model)
    config = check_model(model.path)
    if config.get("quantization_config"):
        raise InputError(
            model.path, "is quantised, and a LoRA merged into 4-bit weights is mostly rounded away",
            "merge into the full-precision model and quantise the result",
        )
    tokenizer = load_tokenizer(model.path)
    dtype = stored_dtype(config, recipe.dtype)
    tokens = torch.tensor([_probe_ids(tokenizer)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by an old name
        adapted = PeftModel.from_pretrained(load_model(model.path), str(adapter.path)).eval()
    attached = _logits(adapted, tokens)
    with adapted.disable_adapter():
        moved = float((attached - _logits(adapted, tokens)).abs().max())
    if moved == 0.0:
        raise CheckFailed(adapter.path, "the adapter changes no logit at all", "fit it again: edgealign personalize")
    with publish(
        out, kind="model", format="huggingface", stage="merge", recipe=recipe,
        inputs=[model.as_input("base"), adapter.as_input("adapter")], template_hash=template_hash(tokenizer),
        licences=licences_of([model]),
    ) as draft:
        merged = merge_lora(adapted).to(getattr(torch, dtype))
        _save_weights(merged, draft.dir)
        del adapted, merged
        copy_companions(model.path, draft.dir, dtype=dtype)
        check = _logit_check(attached, _logits(load_model(draft.dir), tokens), dtype, recipe.tolerance)
        if not check.passed:
            apart = f"merged logits are {check.value:.2g} from base plus adapter (tolerance {check.tolerance:.2g})"
            raise CheckFailed(out, apart, "use --dtype float32")
        draft.add_check(check)
        draft.meta.update({"merge": "lora", "dtype": dtype, "adapter_moves_logits_by": moved})
    say(f"{out}: adapter merged, logits agree to {check.value:.1e} (the adapter moves them by {moved:.2g})")
    return open_artifact(out)


def _save_weights(model: Any, folder: Path) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()


def _logit_check(attached: Tensor, merged: Tensor, dtype: str, tolerance: float) -> Check:
    """max |dlogit|; storage in 16 bits rounds every weight, so there the tolerance is in units of its step."""
    value = float((attached - merged).abs().max())
    if dtype != "float32":
        step = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
        tolerance = 16 * step * float(attached.abs().max())
    note = f"largest logit difference, adapter attached (float32) against merged (stored as {dtype})"
    return Check("merged equals attached", value, tolerance, value <= tolerance, note)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """tokens (1, T) -> (T, V) float32"""
    import torch

    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens).logits[0].float()
    return logits


def _probe_ids(tokenizer: Any) -> list[int]:
    from edgealign.data.encode import encode_prompt
    from edgealign.data.forms import Message

    return list(encode_prompt(tokenizer, (Message("user", PROBE),)))


def _not_finite(folder: Path) -> str:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if not bool(tensors.get_tensor(name).isfinite().all()):
                    return str(name)
    return ""
