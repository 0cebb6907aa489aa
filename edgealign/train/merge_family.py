"""Which models may be merged: one architecture, one tokenizer and template, the same tensors, one base.

Merging averages weights, so it makes sense only between models that started from the same ones. Where models have
manifests their lineage must show it; a foreign model has only the shapes of its tensors to be judged by.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, Input, hash_json, open_model
from edgealign.errors import InputError
from edgealign.lineage import Ancestor, lineage


@dataclass(frozen=True)
class Family:
    """Models that may be merged: one architecture, one tokenizer and template, one base."""

    models: tuple[Artifact, ...]
    base: Artifact | None
    config: dict[str, Any]
    template_hash: str

    @property
    def donor(self) -> Artifact:
        """Whose tokenizer, template and configuration the result gets."""
        return self.base or self.models[0]

    @property
    def inputs(self) -> list[Input]:
        base = [self.base.as_input("base")] if self.base else []
        return [*base, *(model.as_input(f"model {i}") for i, model in enumerate(self.models, start=1))]


def stored_dtype(config: dict[str, Any], wanted: str) -> str:
    """The type that the result is stored in; "keep" is what the model's own configuration says."""
    return wanted if wanted != "keep" else str(config.get("dtype") or config.get("torch_dtype") or "float32")


def open_family(models: Sequence[Path | str], base: Path | str | None) -> Family:
    """Open the models and prove that they belong together.

    Raises:
        InputError: fewer than two (one with a base), the same one twice, another architecture, tokenizer or base.
    """
    from edgealign.data.encode import template_hash
    from edgealign.models.load import check_model, load_tokenizer

    if len(models) < (2 if base is None else 1):
        raise InputError(
            f"{len(models)} model", "merging takes two or more, or one and its --base to scale what it learned",
            "give --model again, or --adapter to merge a LoRA",
        )
    opened = [open_model(path) for path in models]
    digests = [model.digest for model in opened]
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            raise InputError(models[i], "is given twice", "give different models")
    root = open_model(base) if base is not None else None
    everyone = [*opened, *([root] if root else [])]
    configs = [check_model(model.path) for model in everyone]
    tokenizers = [load_tokenizer(model.path) for model in everyone]
    first = everyone[0]
    tensors = tensor_shapes(first.path)
    vocabulary, template = _tokenizer_hash(tokenizers[0]), template_hash(tokenizers[0])
    for other, config, tokenizer in zip(everyone[1:], configs[1:], tokenizers[1:], strict=True):
        if config.get("model_type") != configs[0].get("model_type"):
            kinds = f"{config.get('model_type')}, {first.path.name} is a {configs[0].get('model_type')}"
            raise InputError(other.path, f"is a {kinds}", "merge models of one architecture")
        if difference := first_difference(tensors, tensor_shapes(other.path)):
            raise InputError(
                other.path, f"has other tensors than {first.path.name}: {difference}", "merge models of one base"
            )
        if _tokenizer_hash(tokenizer) != vocabulary:
            raise InputError(other.path, f"has another tokenizer than {first.path.name}", "merge models of one base")
        if template_hash(tokenizer) != template:
            raise InputError(
                other.path, f"has another chat template than {first.path.name}", "train both with the same template"
            )
    _check_one_base(opened, root)
    return Family(tuple(opened), root, configs[0], template)


def _check_one_base(models: Sequence[Artifact], base: Artifact | None) -> None:
    """By lineage where there are manifests; a foreign model has only its shapes, which were compared already."""
    known = [(model, ancestors) for model in models if (ancestors := _ancestors(model))]
    if base is not None:
        for model, ancestors in known:
            if base.digest not in ancestors:
                raise InputError(
                    model.path, f"was not trained from {base.path.name} ({base.digest[:12]})",
                    f"see where it comes from with: edgealign show {model.path}",
                )
        return
    shared = set.intersection(*(ancestors for _, ancestors in known)) if known else {""}
    if not shared:
        names = ", ".join(model.path.name for model, _ in known)
        raise InputError(names, "have no base in common", "merge models that were trained from one model")


def _ancestors(model: Artifact) -> set[str]:
    """Digests of the models that this one comes from, itself included; empty for a foreign one."""
    if model.manifest.stage == "foreign":
        return set()

    def walk(node: Ancestor) -> set[str]:
        own = {node.entry.digest} if node.entry.kind == "model" else set()
        return own.union(*(walk(parent) for parent in node.parents))

    return {model.digest} | walk(lineage(model.path))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from edgealign.models.load import check_safetensors

    return {
        name: tuple(entry["shape"])
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in check_safetensors(file).items()
    }


def first_difference(ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> str:
    """The first tensor by name that is missing, added or of another shape; empty if there is none."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            return f"{name} is missing"
        if name not in ours:
            return f"{name} is new"
        if ours[name] != theirs[name]:
            return f"{name} is {theirs[name]}, not {ours[name]}"
    return ""


def _tokenizer_hash(tokenizer: Any) -> str:
    """Vocabulary, merges and text handling; not the template, not the cosmetic fields."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hash_json(sorted(tokenizer.get_vocab().items()))
    parsed = json.loads(backend.to_str())
    return hash_json({key: parsed.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")})


