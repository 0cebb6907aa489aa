"""Model directory in, GGUF bundle out: converted, compared with torch, then published.

    python export/to_gguf.py --model MODEL --out BUNDLE --quant q4_0
    python export/to_gguf.py --model MODEL --out BUNDLE --recipe export/recipes/gguf-q4_0.toml \\
        --adapter ana=ADAPTER --adapter ben=ADAPTER --calibration train.txt

Two gates stand before publishing. A file of 32-bit floats must agree with torch number for number: that proves the
tensor map, the metadata and the adapters. Then the quantised file must agree as a distribution. If a check fails,
nothing is published and the exit status is 1. `edgealign export --target gguf` runs this program in its own process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgealign import recipe as recipes
from edgealign.artifact import (
    Artifact,
    Check,
    Draft,
    Input,
    open_artifact,
    open_model,
    publish,
    refuse_existing,
    sha256_file,
)
from edgealign.errors import CheckFailed, EdgealignError, InputError, OutputError, ToolMissing, UsageError
from edgealign.export_recipes import ExportRecipe
from edgealign.models.lint import lint
from edgealign.models.load import check_safetensors, load_model, load_tokenizer, read_config
from edgealign.parity_recipes import VerifyRecipe
from edgealign.progress import say
from edgealign.runtimes.gguf_adapter import write_lora_gguf
from edgealign.runtimes.gguf_header import check_gguf
from edgealign.runtimes.gguf_names import Architecture, architecture
from edgealign.runtimes.lora_weights import require_base
from edgealign.runtimes.session import Bundle

MODEL_FILE = "model.gguf"
USER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TEMPLATE = "chat_template.jinja"
# Size of what stands beside the 32-bit file, per byte of it, rounded up; for the disk check.
SHARE = {"f32": 0.0, "f16": 0.51, "q8_0": 0.28, "q4_0": 0.18, "q4_k_m": 0.2}


@dataclass(frozen=True)
class _Job:
    """What one export works on."""

    recipe: ExportRecipe
    gate: VerifyRecipe
    base: Artifact
    adapters: Mapping[str, Path]  # user -> directory in PEFT's layout
    calibration: Path | None


def export(
    recipe: ExportRecipe, *, model: str | Path, adapters: Mapping[str, Path], out: Path, calibration: Path | None
) -> Artifact:
    """Convert, verify, publish.

    Raises:
        ArtifactError, InputError: the model, an adapter or the text cannot be used.
        CheckFailed: the result does not behave like the torch model; nothing is published.
        OutputError: `out` exists, cannot be written, or the disk is too small.
    """
    _require_tools()
    refuse_existing(out)
    base = open_model(model)
    table = architecture(str(read_config(base.path).get("model_type", "")))
    job = _Job(recipe, verify_recipe(recipe, table), base, adapters, calibration)
    inputs = [job.base.as_input("model"), *(_check_user(job, name) for name in adapters)]
    if calibration is not None:
        inputs.append(Input("calibration", "file", sha256_file(calibration), str(calibration.resolve())))
    checks = _lint(job.base)
    with publish(
        out, kind="bundle", format="gguf", stage="export", recipe=recipe, inputs=inputs,
        template_hash=_template_hash(job.base), licences=job.base.manifest.licences,
    ) as draft:
        draft.checks.extend(checks)
        _require_space(job, draft.dir)
        _fill(job, draft)
    return open_artifact(out)


def verify_recipe(recipe: ExportRecipe, table: Architecture) -> VerifyRecipe:
    """The gate's recipe: its defaults, what the architecture forces, then the export recipe's `verify` entries."""
    values: dict[str, object] = {} if table.exact_tolerance is None else {"exact_tolerance": table.exact_tolerance}
    for entry in recipe.verify:
        name, equals, value = entry.partition("=")
        if not equals:
            raise UsageError(entry, "is not name=value", "for example: verify = ['kl_4bit=0.55']")
        values[name.strip()] = value.strip()
    return recipes.build(VerifyRecipe, values, where="verify")


def _fill(job: _Job, draft: Draft) -> None:
    """Write and verify the 32-bit files beside the draft, then what was asked for inside it."""
    from gguf_model import write_model
    from gguf_quantize import measure_importance, quantize

    recipe = job.recipe
    scratch = draft.dir / ".float32"
    scratch.mkdir()
    whole, final = scratch / MODEL_FILE, draft.dir / MODEL_FILE
    write_model(job.base.path, whole, digest=job.base.digest, context=recipe.context)
    importance = None
    if recipe.quant == "f32":
        os.replace(whole, final)
    else:
        if recipe.exact_gate:
            exact = replace(recipe, quant="f32", adapter_type="f32")
            _gate(job, "float32 ", _lay_out(job, exact, scratch), draft)
        if job.calibration is not None:
            importance = measure_importance(
                load_model(job.base.path), load_tokenizer(job.base.path), job.calibration,
                tokens=recipe.calibration_tokens, window=recipe.calibration_window,
            )
            say(f"importance matrix from {importance.tokens:,} tokens in {importance.windows} windows")
        quantize(whole, final, recipe.quant, importance=importance, threads=recipe.threads)
    shutil.rmtree(scratch)
    bundle = _lay_out(job, recipe, draft.dir)
    _gate(job, "", bundle, draft)
    draft.meta.update(_facts(job, bundle))
    if importance is not None:
        draft.meta["calibration"] = {"tokens": importance.tokens, "digest": importance.text_digest}


def _lay_out(job: _Job, recipe: ExportRecipe, folder: Path) -> Bundle:
    """Put the adapters and the tokenizer beside a model file; returns the bundle as a runtime would see it."""
    config = read_config(job.base.path)
    files = {}
    for name, adapter in job.adapters.items():
        files[name] = folder / "adapters" / f"{name}.gguf"
        write_lora_gguf(adapter, files[name], base_config=config, dtype=_adapter_type(recipe))
    for copied in (*COPIED, *(file.name for file in job.base.path.glob("LICENSE*"))):
        if (job.base.path / copied).is_file():
            shutil.copyfile(job.base.path / copied, folder / copied)
    template = load_tokenizer(job.base.path).chat_template
    if isinstance(template, str):
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    return Bundle(folder, "gguf", recipe.quant, folder / MODEL_FILE, files)


def _facts(job: _Job, bundle: Bundle) -> dict[str, Any]:
    """The manifest's facts: what a runtime, a session or a report wants to know without opening the file."""
    info = check_gguf(bundle.model_file)
    return {
        "target": bundle.target,
        "quant": bundle.quant,
        "model_file": MODEL_FILE,
        "model_bytes": bundle.model_file.stat().st_size,
        "model_digest": job.base.digest,
        "architecture": info.arch,
        "parameters": sum(math.prod(t.shape) for t in info.tensors if t.name != "rope_freqs.weight"),
        "context": int(info.metadata[f"{info.arch}.context_length"]),
        "adapters": {
            name: {
                "file": file.relative_to(bundle.path).as_posix(),
                "digest": open_artifact(job.adapters[name], check_digests=False).digest,
                "dtype": _adapter_type(job.recipe),
                "bytes": file.stat().st_size,
            }
            for name, file in bundle.adapters.items()
        },
    }


def _adapter_type(recipe: ExportRecipe) -> str:
    if recipe.adapter_type != "auto":
        return recipe.adapter_type
    return "f32" if recipe.quant == "f32" else "f16"


def _gate(job: _Job, prefix: str, bundle: Bundle, draft: Draft) -> None:
    """Run the parity checks on a candidate; the first gate that fails ends the export."""
    from edgealign.parity import verify

    say(f"comparing the {prefix or 'exported '}file with torch")
    found = [
        replace(check, name=prefix + check.name)
        for check in verify(bundle, model=job.base.path, adapters=job.adapters, recipe=job.gate)
    ]
    draft.checks.extend(found)
    failed = [check for check in found if not check.passed]
    if failed:
        worst = failed[0]
        measured = "" if worst.value is None else f" = {worst.value:.4g}"
        allowed = "" if worst.tolerance is None else f", allowed {worst.tolerance:.4g}"
        raise CheckFailed(
            worst.name + measured,
            f"the export does not behave like the torch model ({len(failed)} of {len(found)} checks failed: "
            f"{', '.join(check.name for check in failed)}{allowed}); nothing was published",
            "for the tolerances see: edgealign config schema",
        )


def _lint(base: Artifact) -> list[Check]:
    """The end of a turn must be one token everywhere, or the exported chat would not stop. Base models have no turn."""
    if not load_tokenizer(base.path).chat_template:
        return []
    checks = lint(base.path)
    for check in checks:
        if not check.passed:
            raise CheckFailed(
                base.path, f"{check.name}: {check.note}", "set eos_token_id alike in config.json, "
                "generation_config.json and the tokenizer",
            )
    return checks


def _check_user(job: _Job, name: str) -> Input:
    if not USER_NAME.fullmatch(name):
        raise UsageError(name, "is no user name", "use letters, digits, dot, dash and underscore")
    adapter = open_artifact(job.adapters[name], kind="adapter")
    require_base(adapter.path, job.base)
    return adapter.as_input(f"adapter {name}")


def _template_hash(base: Artifact) -> str | None:
    if base.manifest.template_hash is not None:
        return base.manifest.template_hash
    from edgealign.data.template import template_hash

    tokenizer = load_tokenizer(base.path)
    return template_hash(tokenizer) if tokenizer.chat_template else None


def _require_tools() -> None:
    for module, package in (("gguf", "gguf"), ("llama_cpp", "llama-cpp-python")):
        if find_spec(module) is None:
            raise ToolMissing(package, "is not installed in this Python", "pip install 'edgealign[gguf]'")


def _require_space(job: _Job, folder: Path) -> None:
    """The 32-bit file and the result stand side by side for a moment."""
    headers = [check_safetensors(file) for file in job.base.path.glob("*.safetensors")]
    weights = sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
    needed = int(4 * weights * (1.02 + SHARE[job.recipe.quant]))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            folder.parent, f"the export needs {needed / 1e9:.1f} GB for a while, {free / 1e9:.1f} GB are free",
            "free some space or choose another --out",
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--out", required=True, type=Path, help="bundle directory to make")
    parser.add_argument("--quant", help="f32, f16, q8_0, q4_0 or q4_k_m; overrides the recipe")
    parser.add_argument("--recipe", type=Path, help="TOML file; see export/recipes/")
    parser.add_argument("--adapter", action="append", default=[], metavar="USER=DIR", help="a user's LoRA; repeatable")
    parser.add_argument("--calibration", type=Path, help="text or JSONL for an importance matrix")
    parser.add_argument("--json", action="store_true", help="print the result, or the error, as one JSON line")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status: 0 done, 1 a check failed, 2 wrong use, 3 a tool is missing."""
    arguments = _parse(argv)
    try:
        adapters = {}
        for entry in arguments.adapter:
            name, equals, folder = entry.partition("=")
            if not equals or name in adapters:
                raise UsageError(entry, "is not USER=DIR, or the user is named twice", "for example: --adapter ana=DIR")
            adapters[name] = Path(folder)
        if arguments.calibration is not None and not arguments.calibration.is_file():
            raise InputError(arguments.calibration, "no such file", "give a file of plain text or JSONL")
        recipe = recipes.load(ExportRecipe, arguments.recipe, {"quant": arguments.quant})
        artifact = export(
            recipe, model=arguments.model, adapters=adapters, out=arguments.out, calibration=arguments.calibration
        )
    except EdgealignError as error:
        if arguments.json:
            print(json.dumps({"error": [error.value, error.reason, error.fix], "status": error.exit_code}))
        else:
            say(f"error: {error.line()}")
        return error.exit_code
    if arguments.json:
        print(json.dumps({"path": str(artifact.path), "digest": artifact.digest}))
    else:
        say(f"published {artifact.path} ({artifact.meta['model_bytes'] / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
