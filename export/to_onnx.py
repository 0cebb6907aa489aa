"""Model directory in, ONNX bundle out: built, compared with torch, then published.

    python export/to_onnx.py --model MODEL --out BUNDLE --quant int4
    python export/to_onnx.py --model MODEL --out BUNDLE --recipe export/recipes/onnx-int4.toml \\
        --adapter ana=ADAPTER --adapter ben=ADAPTER

One graph serves everybody: a user's LoRA is a file of graph inputs. onnxruntime-genai's builder makes the graph where
it knows the architecture: then the folder opens in onnxruntime-genai as it is, and in plain onnxruntime through
`edgealign.runtimes.onnx_session`. Any other architecture is written from the torch model (`general_model`), and only
our session opens it. Two gates stand before publishing: a graph of 32-bit floats must agree with torch number for
number, then the quantised graph as a distribution; and onnxruntime-genai must say what our session says, where it can
open the folder. `edgealign export --target onnx` runs this program in its own process.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import export_program as program
from export_program import Job

from edgealign.artifact import Artifact, Check, Draft, open_artifact, publish, refuse_existing
from edgealign.errors import RecipeError, ToolMissing, UsageError
from edgealign.export_recipes import ExportRecipe
from edgealign.models.load import read_config
from edgealign.runtimes.lora_inputs import read_inputs
from edgealign.runtimes.onnx_adapter import write_lora_onnx
from edgealign.runtimes.onnx_names import ARCHITECTURES
from edgealign.runtimes.onnx_states import read_description
from edgealign.runtimes.session import Bundle

MODEL_FILE = "model.onnx"
# Bytes per weight: the builder's graph and ours stand side by side, in 32 bits or beside a 32-bit pair.
PER_WEIGHT = {"fp32": 8.2, "int8": 10.5, "int4": 9.5, "int4_k": 9.5}


def export(
    recipe: ExportRecipe, *, model: str | Path, adapters: Mapping[str, Path], out: Path, calibration: Path | None
) -> Artifact:
    """Build, verify, publish.

    Raises:
        ArtifactError, InputError: the model or an adapter cannot be used.
        CheckFailed: the result does not behave like the torch model; nothing is published.
        OutputError: `out` exists, cannot be written, or the disk is too small.
    """
    _require_tools()
    refuse_existing(out)
    if calibration is not None:
        raise UsageError(calibration, "onnx quantises without a calibration text", "leave --calibration out")
    if recipe.adapter_type == "f16":
        raise RecipeError("f16", "the graph computes adapters in 32 bits", "leave adapter_type out")
    job = program.open_job("onnx", recipe, model=model, adapters=adapters, calibration=calibration)
    inputs = job.inputs()
    checks = program.check_turns(job.base)
    with publish(
        out, kind="bundle", format="onnx", stage="export", recipe=job.recipe, inputs=inputs,
        template_hash=program.template_hash_of(job.base), licences=job.base.manifest.licences,
    ) as draft:
        draft.checks.extend(checks)
        program.require_space(job.base, draft.dir, per_weight=PER_WEIGHT[job.recipe.quant])
        _fill(job, draft)
    return open_artifact(out)


def _fill(job: Job, draft: Draft) -> None:
    """Make and verify the 32-bit bundle beside the draft, then what was asked for inside it."""
    if job.recipe.quant != "fp32" and job.recipe.exact_gate:
        scratch = draft.dir / ".float32"
        scratch.mkdir()
        program.gate(job, "float32 ", _make(job, replace(job.recipe, quant="fp32"), scratch), draft)
        shutil.rmtree(scratch)
    bundle = _make(job, job.recipe, draft.dir)
    program.gate(job, "", bundle, draft)
    found = _check_elsewhere(job, bundle)
    draft.checks.extend(found)
    program.require(found)
    draft.meta.update(_facts(job, bundle))


def _make(job: Job, recipe: ExportRecipe, folder: Path) -> Bundle:
    """The graph, the tokenizer and the adapters in a folder; returns the bundle as a runtime would see it."""
    if _is_builders(job):
        from genai_model import write_model
    else:
        from general_model import write_model
    inputs = write_model(
        job.base.path, folder, quant=recipe.quant, digest=job.base.digest, context=recipe.context
    )
    program.copy_texts(job.base, folder)
    files = {}
    for name, adapter in job.adapters.items():
        files[name] = folder / "adapters" / f"{name}.onnx_adapter"
        write_lora_onnx(adapter, files[name], inputs=inputs)
    return Bundle(folder, "onnx", recipe.quant, folder / MODEL_FILE, files)


def _is_builders(job: Job) -> bool:
    """Does onnxruntime-genai's builder know this architecture?"""
    return str(read_config(job.base.path).get("model_type", "")) in ARCHITECTURES


def _check_elsewhere(job: Job, bundle: Bundle) -> list[Check]:
    """What onnxruntime-genai says of the folder; a graph of our own it cannot open, and the manifest says so."""
    if _is_builders(job):
        from genai_check import check_genai

        return check_genai(bundle, seed=job.gate.seed)
    note = "not asked: onnxruntime-genai has no pipeline for this architecture; graph.json is for edgealign's session"
    return [Check("genai", None, None, True, note)]


def _facts(job: Job, bundle: Bundle) -> dict[str, Any]:
    """The manifest's facts: what a runtime, a session or a report wants to know without opening the graph."""
    config = read_description(bundle.path)
    return {
        **program.facts(job, bundle, adapter_type="f32"),
        "model_bytes": bundle.model_bytes,
        "architecture": str(config["model"]["type"]),
        "parameters": int(job.base.meta.get("parameters", 0)) or None,
        "context": int(config["model"]["context_length"]),
        "adapter_inputs": len(read_inputs(bundle.path)),
    }


def _require_tools() -> None:
    for module in ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir", "onnxscript"):
        if find_spec(module) is None:
            package = module.replace("_", "-")
            raise ToolMissing(package, "is not installed in this Python", "pip install 'edgealign[onnx]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the builder asks the hub for what it has on the disk
    return program.main(argv, target="onnx", what=(__doc__ or "").splitlines()[0], export=export)


if __name__ == "__main__":
    sys.exit(main())
