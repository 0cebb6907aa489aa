"""Model directory in, GGUF bundle out: converted, compared with torch, then published.

    python export/to_gguf.py --model MODEL --out BUNDLE --quant q4_0
    python export/to_gguf.py --model MODEL --out BUNDLE --quant auto
    python export/to_gguf.py --model MODEL --out BUNDLE --recipe export/recipes/gguf-q4_0.toml \\
        --adapter ana=ADAPTER --adapter ben=ADAPTER --calibration train.txt
    python export/to_gguf.py --model MODEL --out BUNDLE --adapter ana=ADAPTER --kit android

Two gates stand before publishing. A file of 32-bit floats must agree with torch number for number: that proves the
tensor map, the metadata and the adapters. Then the quantised file must agree as a distribution. If a check fails,
nothing is published and the exit status is 1. `edgealign export --target gguf` runs this program in its own process.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import export_program as program
from export_program import Job

from edgealign.artifact import Artifact, Draft, open_artifact, publish, refuse_existing
from edgealign.errors import ToolMissing, UsageError
from edgealign.export_recipes import AUTO, ExportRecipe, mixture_of
from edgealign.models.load import load_model, load_tokenizer, read_config
from edgealign.parity_recipes import VerifyRecipe
from edgealign.progress import say
from edgealign.runtimes.control_vector import find_control_vector
from edgealign.runtimes.gguf_adapter import write_lora_gguf
from edgealign.runtimes.gguf_header import check_gguf
from edgealign.runtimes.gguf_names import Architecture, architecture
from edgealign.runtimes.session import Bundle
from edgealign.tensor_types import count_types

if TYPE_CHECKING:
    from gguf_quantize import Importance
    from quant_timing import Timer

MODEL_FILE = "model.gguf"
# Size of what stands beside the 32-bit file, per byte of it, rounded up; for the disk check.
SHARE = {
    "f32": 0.0, "f16": 0.51, "q8_0": 0.28, "q6_k": 0.24, "q5_k_m": 0.22, "q4_0": 0.18, "q4_k_s": 0.19, "q4_k_m": 0.2,
}  # fmt: skip
MIXED_SHARE = 0.51  # a group may be f16


def export(
    recipe: ExportRecipe,
    *,
    model: str | Path,
    adapters: Mapping[str, Path],
    out: Path,
    calibration: Path | None,
    kit: str | None = None,
    device: str | None = None,
    timer: Timer | None = None,
) -> Artifact:
    """Search where the quantisation is `auto`, then convert, verify, publish.

    Args:
        device: for `auto`, another machine that the speed is predicted for; see `quant_timing.read_device`.
        timer: for `auto`, replaces this machine's clock.
        kit: `android` adds the scripts for a phone and the tokens it must draw.

    Raises:
        ArtifactError, InputError: the model, an adapter or the text cannot be used.
        CheckFailed: the result does not behave like the torch model; nothing is published.
        OutputError: `out` exists, cannot be written, or the disk is too small.
    """
    _require_tools()
    refuse_existing(out)
    job = program.open_job(
        "gguf", recipe, model=model, adapters=adapters, calibration=calibration,
        exact_tolerance=lambda base: _table(base).exact_tolerance,
    )
    inputs = job.inputs()
    steered = [name for name, adapter in adapters.items() if program.is_direction(adapter)]
    if kit is not None and steered:
        raise UsageError(steered[0], "is a direction, which the kit's scripts do not switch on", "leave one out")
    checks = program.check_turns(job.base)
    found = None
    if job.recipe.quant == AUTO:
        from quant_search import search
        from quant_timing import read_device

        opened = read_device(device, threads=recipe.threads) if device else None
        found = search(job, out=out, weigh=lambda: _measure_importance(job), device=opened, timer=timer)
        job = replace(job, recipe=found.recipe)
        inputs += [opened.source] if opened else []
    with publish(
        out, kind="bundle", format="gguf", stage="export", recipe=job.recipe, inputs=inputs,
        template_hash=program.template_hash_of(job.base), licences=job.base.manifest.licences,
    ) as draft:
        draft.checks.extend(checks)
        share = SHARE[job.recipe.quant] if job.recipe.quant == mixture_of(job.recipe).label else MIXED_SHARE
        # The 32-bit file and the result stand side by side for a moment.
        program.require_space(job.base, draft.dir, per_weight=4 * (1.02 + share))
        bundle = _fill(job, draft, found.importance if found else _measure_importance(job))
        if kit is not None:
            from android_kit import add_kit

            add_kit(job, bundle, draft)
        if found is not None:
            from quant_report import write_search

            write_search(found, draft)
    return open_artifact(out)


def verify_recipe(recipe: ExportRecipe, table: Architecture) -> VerifyRecipe:
    """The gate's recipe: its defaults, what the architecture forces, then the export recipe's `verify` entries."""
    return program.gate_recipe(recipe, table.exact_tolerance)


def _fill(job: Job, draft: Draft, importance: Importance | None) -> Bundle:
    """Write and verify the 32-bit files beside the draft, then what was asked for inside it."""
    from gguf_model import write_model
    from gguf_quantize import quantize

    recipe = job.recipe
    scratch = draft.dir / ".float32"
    scratch.mkdir()
    whole, final = scratch / MODEL_FILE, draft.dir / MODEL_FILE
    write_model(job.base.path, whole, digest=job.base.digest, context=recipe.context)
    if recipe.quant == "f32":
        os.replace(whole, final)
    else:
        if recipe.exact_gate:
            exact = replace(recipe, quant="f32", head_type=None, tensor_types=(), adapter_type="f32")
            program.gate(job, "float32 ", _lay_out(job, exact, scratch), draft)
        quantize(whole, final, mixture_of(recipe), importance=importance, threads=recipe.threads)
    shutil.rmtree(scratch)
    bundle = _lay_out(job, recipe, draft.dir)
    program.gate(job, "", bundle, draft)
    draft.meta.update(_facts(job, bundle))
    if importance is not None:
        draft.meta["calibration"] = {"tokens": importance.tokens, "digest": importance.text_digest}
    return bundle


def _measure_importance(job: Job) -> Importance | None:
    """The importance matrix, where there is a text for it and something to weigh."""
    from gguf_quantize import measure_importance

    recipe = job.recipe
    if job.calibration is None or recipe.quant == "f32":
        return None
    importance = measure_importance(
        load_model(job.base.path), load_tokenizer(job.base.path), job.calibration,
        tokens=recipe.calibration_tokens, window=recipe.calibration_window,
    )
    say(f"importance matrix from {importance.tokens:,} tokens in {importance.windows} windows")
    return importance


def _lay_out(job: Job, recipe: ExportRecipe, folder: Path) -> Bundle:
    """Put the adapters and the tokenizer beside a model file; returns the bundle as a runtime would see it."""
    config = read_config(job.base.path)
    files = {}
    for name, adapter in job.adapters.items():
        files[name] = folder / "adapters" / f"{name}.gguf"
        vector = find_control_vector(adapter)
        if vector is None:
            write_lora_gguf(adapter, files[name], base_config=config, dtype=_adapter_type(recipe))
        else:  # llama.cpp's own format already
            files[name].parent.mkdir(exist_ok=True)
            shutil.copyfile(vector, files[name])
    program.copy_texts(job.base, folder)
    return Bundle(folder, "gguf", mixture_of(recipe).label, folder / MODEL_FILE, files)


def _facts(job: Job, bundle: Bundle) -> dict[str, Any]:
    """The manifest's facts: what a runtime, a session or a report wants to know without opening the file."""
    info = check_gguf(bundle.model_file)
    return {
        **program.facts(job, bundle, adapter_type=_adapter_type(job.recipe)),
        "model_bytes": bundle.model_file.stat().st_size,
        "architecture": info.arch,
        "tensor_types": count_types((tensor.name, tensor.type, len(tensor.shape)) for tensor in info.tensors),
        "parameters": sum(math.prod(t.shape) for t in info.tensors if t.name != "rope_freqs.weight"),
        "context": int(info.metadata[f"{info.arch}.context_length"]),
    }


def _adapter_type(recipe: ExportRecipe) -> str:
    if recipe.adapter_type != "auto":
        return recipe.adapter_type
    return "f32" if recipe.quant == "f32" else "f16"


def _table(base: Artifact) -> Architecture:
    return architecture(str(read_config(base.path).get("model_type", "")))


def _require_tools() -> None:
    for module, package in (("gguf", "gguf"), ("llama_cpp", "llama-cpp-python")):
        if find_spec(module) is None:
            raise ToolMissing(package, "is not installed in this Python", "pip install 'edgealign[gguf]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return program.main(argv, target="gguf", what=(__doc__ or "").splitlines()[0], export=export)


if __name__ == "__main__":
    sys.exit(main())
