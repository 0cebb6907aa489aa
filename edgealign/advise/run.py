"""Advice for a device: which target, quantisation and adapter carrier fit, and what each of them costs.

    run(AdviceRecipe(decode_tok_s=20), model="starter", adapters={"ada": Path("runs/ada")},
        reports=[Path("runs/bench")], bundles=[], device=["ram_gb=6", "bandwidth_gb_s=30"], out=Path("runs/advice"))

Measured numbers come from published reports of edgealign bench, fidelity from the manifests of bundles, what is left is
predicted by the roofline; each says which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgealign.advise import candidates as making
from edgealign.advise import choose as choosing
from edgealign.advise.candidates import FAILS, Adapter, Candidate, Question
from edgealign.advise.device import Device, read_device
from edgealign.advise.evidence import caveats, read_cells, read_known
from edgealign.advise.recipes import AdviceRecipe
from edgealign.advise.sizes import ModelFacts, adapter_bytes, read_facts, supports
from edgealign.advise.text import command, missing, render
from edgealign.artifact import MANIFEST, Artifact, Check, open_artifact, open_model, publish, refuse_existing
from edgealign.bench.published import Report, read_report
from edgealign.errors import InputError, UsageError
from edgealign.export_recipes import QUANTS
from edgealign.runtimes.lora_weights import read_lora_config, require_base


def run(
    recipe: AdviceRecipe,
    *,
    model: str | Path,
    adapters: Mapping[str, Path],
    reports: Sequence[Path],
    bundles: Sequence[Path],
    device: Sequence[str],
    out: Path | None = None,
) -> Artifact | dict[str, Any]:
    """Advise, and publish the advice with its picture when `out` is given; `advice.fits` fails if nothing fits.

    Raises:
        UsageError: the wishes cannot be judged by what was given, or contradict the model.
        InputError: a bundle or an adapter of another model.
    """
    if out is not None:
        refuse_existing(Path(out))
    source = open_model(model)
    facts = read_facts(source.path)
    opened = _name([read_report(path) for path in reports])
    machine = read_device(device)
    users = [_read_adapter(name, folder, source) for name, folder in adapters.items()]
    _check_wishes(recipe, facts, machine, opened)
    known = read_known(bundles, opened, source.digest)
    _check_users(known, users)
    cells = read_cells(opened, machine, source.digest)
    question = Question(recipe, facts, machine, cells, known, users)
    targets = [target for target in recipe.targets if supports(facts, target)]
    if not targets:
        reason = f"of the type {facts.model_type} cannot be exported to {', '.join(recipe.targets)}"
        raise UsageError(model, reason, "see export/README.md for what can")
    found = making.make_all(question, targets)
    choice = choosing.choose(question, found)
    left_out = [target for target in recipe.targets if target not in targets]
    warnings = [*_warnings(found, choice, left_out, facts, machine, recipe), *caveats(opened)]
    result = _result(question, found, choice, warnings)
    result["text"] = render(question, found, choice, warnings)
    check = Check("advice.fits", None, None, choice.taken is not None, choice.reason)
    if out is None:
        return {**result, "checks": [vars(check)]}
    inputs = [source.as_input("model"), *(report.artifact.as_input(name) for name, report in opened.items())]
    inputs += [open_artifact(path, check_digests=False).as_input(Path(path).name) for path in bundles]
    with publish(Path(out), kind="report", format="advice", stage="advise", recipe=recipe, inputs=inputs) as draft:
        from edgealign.advise.picture import draw

        (draft.dir / "result.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (draft.dir / "table.md").write_text(result["text"] + "\n", encoding="utf-8")
        draw(question, found, choice, draft.dir / "advice.png")
        draft.add_check(check)
    return open_artifact(Path(out))


def _result(
    question: Question, found: Sequence[Candidate], choice: choosing.Choice, warnings: Sequence[str]
) -> dict[str, Any]:
    entry = choice.taken or choice.nearest
    assert entry is not None
    return {
        "schema": 1,
        "device": {"name": question.device.name, **question.device.card},
        "wishes": asdict(question.recipe),
        "advice": {
            "fits": choice.taken is not None, "target": entry.target, "quant": entry.quant, "carrier": entry.carrier,
            "verdict": entry.verdict, "reason": choice.reason, "carrier_reason": list(choice.carrier),
            "relax": list(choice.relax), "not_measured": missing(entry), "measure": command(question, entry),
        },
        "warnings": list(warnings),
        "candidates": [candidate.to_dict() for candidate in found],
        "cells": [{**asdict(cell), "share": cell.share} for cell in question.cells],
    }  # fmt: skip


def _check_wishes(recipe: AdviceRecipe, facts: ModelFacts, device: Device, reports: Mapping[str, Report]) -> None:
    tokens = recipe.prompt_tokens + recipe.gen_tokens
    if tokens > facts.context:
        reason = f"does not fit the model's context of {facts.context}"
        raise UsageError(f"{recipe.prompt_tokens} + {recipe.gen_tokens} tokens", reason, "ask for a shorter prompt")
    asks_speed = recipe.decode_tok_s is not None or recipe.first_token_ms is not None
    if asks_speed and not reports and not device.bandwidth:
        reason = "cannot be judged without a measurement or the device's bandwidth"
        raise UsageError("the wanted speed", reason, "give --bench REPORT, or --device bandwidth_gb_s=NUMBER")
    ram = device.ram_bytes
    if recipe.memory_mib and ram and recipe.memory_mib * 2**20 > ram:
        reason = f"is more than the device has ({ram / 2**20:,.0f} MiB)"
        raise UsageError(f"--memory-mib {recipe.memory_mib:g}", reason, "ask for less, or leave it out")


def _check_users(known: Sequence[Any], users: Sequence[Adapter]) -> None:
    """A user's adapter in a bundle must be the one that was given."""
    for entry in known:
        for user in users:
            there = entry.adapter_digests.get(user.user)
            if there and user.digest and there != user.digest:
                reason = f"holds another adapter of {user.user} ({there[:12]}) than the one given ({user.digest[:12]})"
                raise InputError(entry.origin, reason, "give the adapter that it was exported with")


def _read_adapter(name: str, folder: Path, model: Artifact) -> Adapter:
    read_lora_config(folder)
    digest = None
    if (folder / MANIFEST).is_file():
        require_base(folder, model)
        digest = open_artifact(folder, check_digests=False).digest
    sizes = {
        (target, quant): adapter_bytes(folder, target, quant) for target, quants in QUANTS.items() for quant in quants
    }
    return Adapter(name, digest, sizes)


def _warnings(
    found: Sequence[Candidate], choice: choosing.Choice, left_out: Sequence[str], facts: ModelFacts, device: Device,
    recipe: AdviceRecipe,
) -> list[str]:  # fmt: skip
    lines = [
        f"{entry.name()} keeps {entry.kept.value:.2f} of the user's change, wanted {entry.kept_wanted:.2f} "
        f"({entry.kept.how})" for entry in found if entry.loses_change and entry.verdict != FAILS
    ]  # fmt: skip
    if choice.taken is not None and choice.taken.loses_change:
        lines.append("the advised one loses more of the user's change than wanted: more bits keep more of it")
    if left_out:
        lines.append(f"{facts.model_type} cannot be exported to {', '.join(left_out)}")
    if device.ram_bytes and recipe.memory_mib is None:
        lines.append(
            f"all {device.ram_bytes / 2**20:,.0f} MiB of the device were taken as the limit: an app gets less, say so "
            "with --memory-mib"
        )
    return lines


def _name(reports: Sequence[Report]) -> dict[str, Report]:
    named: dict[str, Report] = {}
    for report in reports:
        base, count = report.path.resolve().name, 1
        while (name := base if count == 1 else f"{base}-{count}") in named:
            count += 1
        named[name] = report
    return named
