"""What every export program does alike: arguments, inputs, the checks before and after the conversion, its answer.

A program hands `main` its own `export` function, which opens a `Job`, fills a draft, and lets `gate` compare it with
torch. If a check fails, nothing is published and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgealign import recipe as recipes
from edgealign.artifact import Artifact, Check, Draft, Input, open_artifact, open_model, sha256_file
from edgealign.errors import CheckFailed, EdgealignError, InputError, OutputError, UsageError
from edgealign.export_recipes import KITS, QUANTS, ExportRecipe, check_device, check_kit, resolve
from edgealign.models.lint import lint
from edgealign.models.load import check_safetensors, load_tokenizer
from edgealign.parity_recipes import VerifyRecipe
from edgealign.progress import hush_libraries, say
from edgealign.runtimes.control_vector import find_control_vector
from edgealign.runtimes.lora_weights import require_base
from edgealign.runtimes.session import Bundle

USER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TEMPLATE = "chat_template.jinja"
DIRECTION = "direction"  # the formats of `edgealign personalize`
NOT_WEIGHTS = {"preference": "an embedding", "shots": "choices in the prompt", "linear": "a stated preference"}


@dataclass(frozen=True)
class Job:
    """What one export works on."""

    target: str
    recipe: ExportRecipe
    gate: VerifyRecipe
    base: Artifact
    adapters: Mapping[str, Path]  # user -> directory in PEFT's layout, or with a control vector
    calibration: Path | None

    def inputs(self) -> list[Input]:
        """The manifest's inputs; each adapter must have been fitted on the base."""
        found = [self.base.as_input("model"), *(_check_user(self, name) for name in self.adapters)]
        if self.calibration is not None:
            digest = sha256_file(self.calibration)
            found.append(Input("calibration", "file", digest, str(self.calibration.resolve())))
        return found


def open_job(
    target: str,
    recipe: ExportRecipe,
    *,
    model: str | Path,
    adapters: Mapping[str, Path],
    calibration: Path | None,
    exact_tolerance: Callable[[Artifact], float | None] = lambda base: None,
) -> Job:
    """Open the model and settle the recipe.

    Args:
        exact_tolerance: what the model's architecture forces upon the 32-bit gate; None leaves its default.
    """
    recipe = resolve(recipe, target)
    base = open_model(model)
    return Job(target, recipe, gate_recipe(recipe, exact_tolerance(base)), base, adapters, calibration)


def gate_recipe(recipe: ExportRecipe, exact_tolerance: float | None = None) -> VerifyRecipe:
    """The gate's recipe: its defaults, what the architecture forces, then the export recipe's `verify` entries."""
    values: dict[str, object] = {} if exact_tolerance is None else {"exact_tolerance": exact_tolerance}
    for entry in recipe.verify:
        name, equals, value = entry.partition("=")
        if not equals:
            raise UsageError(entry, "is not name=value", "for example: verify = ['kl_4bit=0.55']")
        values[name.strip()] = value.strip()
    return recipes.build(VerifyRecipe, values, where="verify")


def gate(job: Job, prefix: str, bundle: Bundle, draft: Draft) -> None:
    """Run the parity checks on a candidate; the first gate that fails ends the export."""
    from edgealign.parity import verify

    say(f"comparing the {prefix or 'exported '}file with torch")
    found = [
        replace(check, name=prefix + check.name)
        for check in verify(bundle, model=job.base.path, adapters=job.adapters, recipe=job.gate)
    ]
    draft.checks.extend(found)
    require(found)


def require(found: Sequence[Check]) -> None:
    """Refuse a candidate whose checks did not all pass.

    Raises:
        CheckFailed: with the first failure's number and the names of all.
    """
    failed = [check for check in found if not check.passed]
    if failed:
        worst = failed[0]
        measured = "" if worst.value is None else f" = {worst.value:.4g}"
        allowed = "" if worst.tolerance is None else f", allowed {worst.tolerance:.4g}"
        raise CheckFailed(
            worst.name + measured,
            f"the export does not behave like the torch model ({len(failed)} of {len(found)} checks failed: "
            f"{', '.join(check.name for check in failed)}{allowed}); nothing was published",
            _way_out(worst.name),
        )


def _way_out(name: str) -> str:
    if name.startswith(("survival.", "strength.", "quant.")):
        return "take more bits, or train on the 4-bit grid: edgealign sft --qat q4_0 (or see: edgealign config schema)"
    return "for the tolerances see: edgealign config schema"


def check_turns(base: Artifact) -> list[Check]:
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


def copy_texts(base: Artifact, folder: Path) -> None:
    """Put the tokenizer, the chat template and the licences beside a model file."""
    for copied in (*COPIED, *(file.name for file in base.path.glob("LICENSE*"))):
        if (base.path / copied).is_file():
            shutil.copyfile(base.path / copied, folder / copied)
    template = load_tokenizer(base.path).chat_template
    if isinstance(template, str):
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def facts(job: Job, bundle: Bundle, *, adapter_type: str) -> dict[str, Any]:
    """The manifest's facts that every target has; sizes in bytes."""
    return {
        "target": bundle.target,
        "quant": bundle.quant,
        "model_file": bundle.model_file.name,
        "model_digest": job.base.digest,
        "adapters": {
            name: {
                "file": file.relative_to(bundle.path).as_posix(),
                "digest": open_artifact(job.adapters[name], check_digests=False).digest,
                "kind": "direction" if is_direction(job.adapters[name]) else "lora",
                "dtype": "f32" if is_direction(job.adapters[name]) else adapter_type,
                "bytes": file.stat().st_size,
            }
            for name, file in bundle.adapters.items()
        },
    }


def is_direction(adapter: Path) -> bool:
    """Whether an adapter directory holds a control vector, not a LoRA."""
    return find_control_vector(adapter) is not None


def template_hash_of(base: Artifact) -> str | None:
    """The chat template's hash: as the model's manifest has it, or computed."""
    if base.manifest.template_hash is not None:
        return base.manifest.template_hash
    from edgealign.data.template import template_hash

    tokenizer = load_tokenizer(base.path)
    return template_hash(tokenizer) if tokenizer.chat_template else None


def require_space(base: Artifact, folder: Path, *, per_weight: float) -> None:
    """Refuse to start where the disk would run full.

    Args:
        per_weight: bytes that stand on the disk for a moment, per weight of the model.
    """
    headers = [check_safetensors(file) for file in base.path.glob("*.safetensors")]
    weights = sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
    needed = int(per_weight * weights)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            folder.parent, f"the export needs {needed / 1e9:.1f} GB for a while, {free / 1e9:.1f} GB are free",
            "free some space or choose another --out",
        )


def main(argv: Sequence[str] | None, *, target: str, what: str, export: Callable[..., Artifact]) -> int:
    """Run a program; returns the exit status: 0 done, 1 a check failed, 2 wrong use, 3 a tool is missing."""
    arguments = _parse(argv, target, what)
    hush_libraries()
    try:
        adapters = {}
        for entry in arguments.adapter:
            name, equals, folder = entry.partition("=")
            if not equals or name in adapters:
                raise UsageError(entry, "is not USER=DIR, or the user is named twice", "for example: --adapter ana=DIR")
            adapters[name] = Path(folder)
        if arguments.calibration is not None and not arguments.calibration.is_file():
            raise InputError(arguments.calibration, "no such file", "give a file of plain text or JSONL")
        overrides = {"quant": arguments.quant, "kl_budget": arguments.kl_budget}
        recipe = recipes.load(ExportRecipe, arguments.recipe, overrides)
        check_kit(arguments.kit, target)
        more = {} if arguments.kit is None else {"kit": arguments.kit}
        if arguments.device is not None:
            check_device(resolve(recipe, target), arguments.device)
            more["device"] = arguments.device
        artifact = export(
            recipe, model=arguments.model, adapters=adapters, out=arguments.out, calibration=arguments.calibration,
            **more,
        )  # fmt: skip
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


def _check_user(job: Job, name: str) -> Input:
    if not USER_NAME.fullmatch(name):
        raise UsageError(name, "is no user name", "use letters, digits, dot, dash and underscore")
    adapter = open_artifact(job.adapters[name], kind="adapter")
    require_base(adapter.path, job.base)
    kind = adapter.manifest.format
    if kind in NOT_WEIGHTS:
        reason = f"is {NOT_WEIGHTS[kind]} and no weights: a bundle needs nothing of it"
        raise UsageError(adapter.path, reason, "use it with any bundle: edgealign users add, then chat --bundle --user")
    if kind == DIRECTION and job.target != "gguf":
        reason = f"is a direction, and an exported {job.target} program has no place behind a layer to add it"
        raise UsageError(adapter.path, reason, "export to GGUF, or fit a LoRA: edgealign personalize --method lora")
    return adapter.as_input(f"adapter {name}")


def _parse(argv: Sequence[str] | None, target: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--out", required=True, type=Path, help="bundle directory to make")
    parser.add_argument("--quant", help=f"{', '.join(QUANTS[target])}, auto (gguf); overrides the recipe")
    parser.add_argument("--kl-budget", help="nat that auto may lose; overrides the recipe")
    parser.add_argument("--device", help="predict auto's speeds for this: a report, a machine card, bandwidth_gb_s=N")
    parser.add_argument("--recipe", type=Path, help="TOML file; see export/recipes/")
    what = "a user's LoRA, or for gguf a direction; repeatable"
    parser.add_argument("--adapter", action="append", default=[], metavar="USER=DIR", help=what)
    parser.add_argument("--calibration", type=Path, help="text or JSONL for an importance matrix (gguf)")
    parser.add_argument("--kit", help=f"add scripts for another device: {', '.join(KITS)} (gguf)")
    parser.add_argument("--json", action="store_true", help="print the result, or the error, as one JSON line")
    return parser.parse_args(argv)
