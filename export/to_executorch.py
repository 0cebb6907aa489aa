"""Model directory in, ExecuTorch bundle out: lowered for XNNPACK, compared with torch, then published.

    python export/to_executorch.py --model MODEL --out BUNDLE --quant 8da4w
    python export/to_executorch.py --model MODEL --out BUNDLE --recipe export/recipes/executorch-8da4w.toml \\
        --adapter ana=ADAPTER --adapter ben=ADAPTER

One program serves everybody: a user's LoRA is a file of inputs. Two gates stand before publishing: a program of 32-bit
floats must agree with torch number for number, then the quantised one as a distribution; and ExecuTorch's own runner
must say what our session says. An architecture that ExecuTorch has no definition of is recorded from the torch model
(`executorch_general`), and that runner is not asked. `edgealign export --target executorch` runs this program in its
own process.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import export_program as program
from export_program import Job

from edgealign.artifact import Artifact, Check, Draft, open_artifact, publish, refuse_existing
from edgealign.errors import EdgealignError, RecipeError, ToolMissing, UsageError
from edgealign.export_recipes import ExportRecipe
from edgealign.models.load import read_config
from edgealign.progress import say
from edgealign.runtimes.executorch_adapter import write_lora_executorch
from edgealign.runtimes.executorch_names import ARCHITECTURES, MODEL_FILE
from edgealign.runtimes.session import Bundle

if TYPE_CHECKING:
    from executorch_lower import Lowered

# Bytes per weight for a while: the program's constants in memory are written once, in 32 bits or beside a 32-bit pair.
OWN_PROCESS_BYTES = 200_000_000  # of weights
PER_WEIGHT = {"fp32": 9.0, "8da4w": 10.5}


def export(
    recipe: ExportRecipe, *, model: str | Path, adapters: Mapping[str, Path], out: Path, calibration: Path | None
) -> Artifact:
    """Lower, verify, publish.

    Raises:
        ArtifactError, InputError: the model or an adapter cannot be used.
        CheckFailed: the result does not behave like the torch model; nothing is published.
        OutputError: `out` exists, cannot be written, or the disk is too small.
    """
    if find_spec("executorch") is None:
        raise ToolMissing("executorch", "is not installed in this Python", "pip install 'edgealign[executorch]'")
    refuse_existing(out)
    if calibration is not None:
        raise UsageError(calibration, "executorch quantises without a calibration text", "leave --calibration out")
    if recipe.adapter_type == "f16":
        raise RecipeError("f16", "the program computes adapters in 32 bits", "leave adapter_type out")
    job = program.open_job("executorch", recipe, model=model, adapters=adapters, calibration=calibration)
    inputs = job.inputs()
    checks = program.check_turns(job.base)
    with publish(
        out, kind="bundle", format="executorch", stage="export", recipe=job.recipe, inputs=inputs,
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
        program.gate(job, "float32 ", _make(job, replace(job.recipe, quant="fp32"), scratch, draft), draft)
        shutil.rmtree(scratch)
    bundle = _make(job, job.recipe, draft.dir, draft)
    program.gate(job, "", bundle, draft)
    found = _check_elsewhere(job, bundle)
    draft.checks.extend(found)
    program.require(found)
    draft.meta.update(program.facts(job, bundle, adapter_type="f32"), model_bytes=bundle.model_bytes)


def _make(job: Job, recipe: ExportRecipe, folder: Path, draft: Draft) -> Bundle:
    """The program, the tokenizer and the adapters in a folder; returns the bundle as a runtime would see it."""
    say(f"lowering the model as {recipe.quant}: minutes for a large one")
    file = folder / MODEL_FILE
    lowered = _lower(_is_defined(job), job.base.path, file, recipe.quant, job.base.digest, recipe.context)
    program.copy_texts(job.base, folder)
    files = {}
    for name, adapter in job.adapters.items():
        files[name] = folder / "adapters" / f"{name}.safetensors"
        write_lora_executorch(adapter, files[name], inputs=lowered.inputs)
    draft.meta.update(
        architecture=str(read_config(job.base.path)["model_type"]), adapter_inputs=len(lowered.inputs),
        parameters=int(job.base.meta.get("parameters", 0)) or None, context=lowered.context,
    )  # fmt: skip
    return Bundle(folder, "executorch", recipe.quant, file, files)


def _lower(defined: bool, model: Path, file: Path, quant: str, digest: str, context: int | None) -> Lowered:
    """Lowering a large model takes several times its program; a process of its own gives that back before the gate."""
    if sum(part.stat().st_size for part in model.glob("*.safetensors")) < OWN_PROCESS_BYTES:
        return _lower_here(defined, model, file, quant, digest, context)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            return child.submit(_lower_here, defined, model, file, quant, digest, context).result()
    except BrokenProcessPool as error:
        reason = "the process that lowered it ended without a word (out of memory?)"
        raise EdgealignError(model, reason, "free some memory, or take a smaller model") from error


def _lower_here(defined: bool, model: Path, file: Path, quant: str, digest: str, context: int | None) -> Lowered:
    if defined:
        from executorch_lower import write_program
    else:
        from executorch_general import write_program
    return write_program(model, file, quant=quant, digest=digest, context=context)


def _is_defined(job: Job) -> bool:
    """Has ExecuTorch a definition of this architecture?"""
    return str(read_config(job.base.path).get("model_type", "")) in ARCHITECTURES


def _check_elsewhere(job: Job, bundle: Bundle) -> list[Check]:
    """What ExecuTorch's own runner says of the folder; a program with states for inputs it cannot drive."""
    if _is_defined(job):
        from runner_check import check_runner

        return check_runner(bundle, threads=job.gate.threads)
    note = "not asked: TextLLMRunner gives a program tokens and a position, this one has its states for inputs too"
    return [Check("runner", None, None, True, note)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return program.main(argv, target="executorch", what=(__doc__ or "").splitlines()[0], export=export)


if __name__ == "__main__":
    sys.exit(main())
