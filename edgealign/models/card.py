"""A model card from what is known: a run's manifests, its preset, its reports. No number is written by hand.

The stages that count are those in the model's ancestry, found by the manifests' hints and digests; what they read is
what the preset gives them from `--data`, and each of those folders must have a credit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgealign import stages
from edgealign.artifact import Artifact, Manifest
from edgealign.data.credits import Credit, credit_of
from edgealign.errors import InputError
from edgealign.lineage import Ancestor, lineage
from edgealign.pipeline import Preset
from edgealign.recipe import to_dict

LIMITS = """\
- It has a few million parameters and read some millions of words, mostly old children's books. It knows next to
  nothing about the world; what it states as a fact is likely to be wrong.
- It cannot calculate, reason in steps, write code, translate, or speak another language than English.
- It loses the thread after a few turns, repeats itself, and invents what a story does not say.
- It was not made safe: old books and real conversations carry their prejudices, and no filter was trained in.
- It is for trying edgealign, for its tests and for learning how such a model is made. Do not rely on an answer."""


@dataclass(frozen=True)
class Facts:
    """What a card is made of. `used`: stage id -> manifest, in the preset's order; `sources`: folder -> its use."""

    name: str
    config: Mapping[str, Any]
    parameters: int
    used: Mapping[str, Manifest]
    sources: Mapping[str, tuple[Credit, tuple[str, ...]]]
    reports: Sequence[Artifact]
    trained_on: str = ""


def collect(
    name: str, model: Artifact, preset: Preset, *, config: Mapping[str, Any], parameters: int,
    reports: Sequence[Artifact] = (), trained_on: str = "",
) -> Facts:
    """The facts about a model that a run of the preset made.

    Raises:
        InputError: an ancestor is gone, or a source has no credit.
    """
    found = {path: manifest for path, manifest in _ancestors(lineage(model.path), model.path)}
    ids = {path.name: manifest for path, manifest in found.items()}
    used = {step.id: ids[step.id] for step in preset.steps if step.id in ids}
    read: dict[str, list[str]] = {}
    for step in preset.steps:
        if step.id in used:
            for path in _data_paths(step.inputs):
                read.setdefault(path, []).append(step.id)
    sources: dict[str, tuple[Credit, tuple[str, ...]]] = {}
    for path in sorted(read):
        folder, credit = credit_of(path)
        files = sources.get(folder, (credit, ()))[1]
        sources[folder] = (credit, (*files, path.removeprefix(folder + "/").split(".")[0]))
    return Facts(name, config, parameters, used, sources, reports, trained_on)


def render(facts: Facts) -> str:
    """The card as Markdown."""
    config = facts.config
    layers = list(config.get("layer_types") or [])
    shape = ", ".join(f"{layers.count(kind)} {words}" for kind, words in (
        ("conv", "gated short convolutions"), ("full_attention", "grouped-query attention"),
    ) if kind in layers)  # fmt: skip
    head = [
        f"# {facts.name}", "",
        f"A small language model for conversation: {facts.parameters / 1e6:.1f} million parameters, "
        f"{config.get('num_hidden_layers')} layers{f' ({shape})' if shape else ''}, width {config.get('hidden_size')}, "
        f"{config.get('vocab_size'):,} tokens, context {config.get('max_position_embeddings'):,}, "
        f"architecture `{config.get('model_type')}`, weights in {config.get('dtype')}. It was trained from random "
        "weights with edgealign's own commands.", "",
        "```", "edgealign chat", f"edgealign sft --model {facts.name} --data yours.jsonl --out mine", "```", "",
    ]  # fmt: skip
    limits = ["## What it cannot do", "", LIMITS, ""]
    return "\n".join([*head, *_data(facts), *_training(facts), *_results(facts), *limits])


def _data(facts: Facts) -> list[str]:
    if not facts.sources:
        return []
    lines = ["## Data", "", "| what | files | licence | credit |", "|---|---|---|---|"]
    for folder, (credit, files) in facts.sources.items():
        lines.append(f"| {credit.what} | {folder}: {', '.join(files)} | {credit.licence} | {credit.credit} |")
    return [*lines, "", "The texts themselves are not part of this folder.", ""]


def _training(facts: Facts) -> list[str]:
    lines = [
        "## How it was trained", "", "| stage | command | recipe, where it is not the default | held-out loss | time |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, manifest in facts.used.items():
        if manifest.kind != "model":
            continue
        meta = manifest.meta
        before, after = (_number(meta.get(key)) for key in ("before", "after"))
        seconds = f"{meta['seconds'] / 60:.0f} min" if "seconds" in meta else ""
        moved = f"{before:.2f} to {after:.2f}" if before is not None and after is not None else ""
        lines.append(f"| {name} | {manifest.stage} | {_changed(manifest)} | {moved} | {seconds} |")
    versions = list(facts.used.values())[-1].versions if facts.used else {}
    made = ", ".join(f"{name} {versions[name]}" for name in ("edgealign", "torch", "transformers") if name in versions)
    lines += ["", f"Made with {made}{f' on {facts.trained_on}' if facts.trained_on else ''}.", ""]
    return lines


def _results(facts: Facts) -> list[str]:
    checks = [check for report in facts.reports for check in report.manifest.checks]
    if not checks:
        return []
    lines = ["## Results", "", "| measured | value | asked for | |", "|---|---|---|---|"]
    for check in checks:
        value, asked = (("" if number is None else f"{number:.3g}") for number in (check.value, check.tolerance))
        lines.append(f"| {check.name} | {value} | {asked} | {'' if check.passed else 'missed'} |")
    return [*lines, ""]


def _changed(manifest: Manifest) -> str:
    """The recipe's fields that are not the stage's defaults."""
    defaults = json.loads(json.dumps(to_dict(stages.recipe_class(manifest.stage)())))
    changed = {name: value for name, value in manifest.recipe.items() if value != defaults.get(name)}
    return ", ".join(f"{name} {_short(value)}" for name, value in changed.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_short, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _number(measured: Any) -> float | None:
    value = measured.get("loss") if isinstance(measured, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _ancestors(node: Ancestor, path: Path) -> Iterator[tuple[Path, Manifest]]:
    if node.manifest is None:
        raise InputError(path, "is not there any more, and the card says what the model read", "keep the whole run")
    yield path.resolve(), node.manifest
    for parent in node.parents:
        if parent.entry.kind != "file":
            yield from _ancestors(parent, path / parent.entry.hint)


def _data_paths(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.removeprefix("data:")] if value.startswith("data:") else []
    items = value.values() if isinstance(value, Mapping) else value
    return [path for item in items for path in _data_paths(item)]
