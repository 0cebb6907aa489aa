"""Read a LoRA in PEFT's layout into plain arrays, without torch: what every runtime's adapter writer starts from.

The scale is folded into B here, once: a runtime that multiplied by alpha / rank again would double it, and none of
them knows rsLoRA (alpha / sqrt(rank)) or per-module patterns. What a runtime cannot apply as two small matrices
beside a linear layer (DoRA, embeddings, the head, whole modules, biases) is refused with the reason.

Shape legend: r rank, I in features, O out features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.artifact import MANIFEST, Artifact, open_artifact
from edgealign.errors import ArtifactError, InputError
from edgealign.models.load import check_safetensors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
MERGE = "merge it into the model instead: edgealign merge"

# Options of PEFT's LoraConfig that change what the weights mean; a value that is not empty is refused.
FOREIGN = {
    "use_dora": "is a DoRA: its magnitudes are no pair of small matrices",
    "use_qalora": "is a QALoRA: it groups its inputs",
    "use_bdlora": "is a block-diagonal LoRA",
    "alora_invocation_tokens": "is an activated LoRA: it applies only after its own tokens",
    "modules_to_save": "replaces whole modules (modules_to_save)",
    "trainable_token_indices": "replaces rows of the embedding (trainable_token_indices)",
    "target_parameters": "adapts stacked expert parameters (target_parameters)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "fan_in_fan_out": "stores its weights transposed (fan_in_fan_out)",
    "lora_bias": "has biases (lora_bias)",
}


@dataclass(frozen=True)
class LowRank:
    """One module's pair: `a` (r, I), `b` (O, r) with the scale folded in; the update is `b @ a`."""

    a: Floats
    b: Floats

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True)
class LoraWeights:
    """A whole adapter: full module name -> pair. `base_digest` is the model it was fitted on, if it says."""

    modules: Mapping[str, LowRank]
    base_digest: str | None


def read_lora(adapter: Path) -> LoraWeights:
    """Read and fold an adapter directory.

    Raises:
        ArtifactError: it has a manifest that does not fit, or is no adapter.
        InputError: it is no LoRA, holds something a runtime cannot apply, or is damaged.
    """
    config = read_lora_config(adapter)
    tensors = _read_tensors(adapter / WEIGHTS)
    pairs: dict[str, dict[str, Floats]] = {}
    for key, value in tensors.items():
        module, side = _split(adapter, key)
        pairs.setdefault(module, {})[side] = value
    modules = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].ndim != 2 or pair["B"].ndim != 2:
            raise InputError(adapter, f"{module} has no matching pair of matrices", "fit or get the adapter again")
        modules[module] = _fold(adapter, module, pair["A"], pair["B"], config)
    if not modules:
        raise InputError(adapter, "holds no LoRA weights", "fit it again: edgealign personalize")
    return LoraWeights(modules, base_digest(adapter))


def read_lora_config(adapter: Path) -> dict[str, Any]:
    """`adapter_config.json`, refused where it asks for more than a plain LoRA."""
    file = adapter / CONFIG
    if (adapter / MANIFEST).is_file():
        open_artifact(adapter, kind="adapter")
    if not file.is_file():
        raise InputError(adapter, f"has no {CONFIG}: not a LoRA in PEFT's layout", "make one: edgealign personalize")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(file, "is damaged", "fit or get the adapter again") from error
    if kind != "LORA":
        raise InputError(adapter, f"is a {kind} adapter, only LoRA can be exported", MERGE)
    for option, reason in FOREIGN.items():
        if config.get(option):
            raise InputError(adapter, f"{reason}, which no runtime adapter can hold", MERGE)
    if config.get("bias", "none") != "none":
        raise InputError(adapter, f"trains biases (bias={config['bias']}), which no runtime adapter can hold", MERGE)
    return config


def base_digest(adapter: Path) -> str | None:
    """The digest of the model that the adapter was fitted on; None for an adapter made elsewhere."""
    if not (adapter / MANIFEST).is_file():
        return None
    digest = open_artifact(adapter, check_digests=False).meta.get("base_digest")
    return str(digest) if digest else None


def require_base(adapter: Path, model: Artifact) -> str:
    """The adapter's base digest, which must be the model's.

    Raises:
        ArtifactError: it was fitted on another model (both digests are named), or does not say on which.
    """
    digest = base_digest(adapter)
    if digest is None:
        raise ArtifactError(
            adapter, "does not say which model it was fitted on", "fit it here: edgealign personalize"
        )
    if digest != model.digest:
        raise ArtifactError(
            adapter, f"was fitted on the model {digest[:12]}, this one is {model.digest[:12]} ({model.path})",
            f"fit it on this model: edgealign personalize --model {model.path}",
        )
    return digest


def _fold(adapter: Path, module: str, a: Floats, b: Floats, config: Mapping[str, Any]) -> LowRank:
    import numpy as np

    rank = a.shape[0]
    if b.shape[1] != rank:
        raise InputError(adapter, f"{module}: A has rank {rank}, B has {b.shape[1]}", "fit or get the adapter again")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(adapter, f"{module} holds numbers that are not finite", "fit it again with a lower lr")
    stated = _pattern(config.get("rank_pattern"), module, config.get("r"))
    if stated is not None and int(stated) != rank:
        raise InputError(adapter, f"{module} has rank {rank}, its config says {stated}", "fit or get the adapter again")
    alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank)))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b * np.float32(scale), np.float32))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the whole name or a dotted tail of it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _split(adapter: Path, key: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(PREFIX))
    if found is not None:
        return found.group(1), found.group(2)
    reasons = (
        ("embed", "adapts the embedding, which would abort llama.cpp on a tied model"),
        ("lora_magnitude", "holds DoRA magnitudes"),
        ("bias", "holds a bias"),
    )
    reason = next((text for part, text in reasons if part in key), "holds more than pairs of LoRA matrices")
    raise InputError(adapter, f"{reason} ({key.removeprefix(PREFIX)})", MERGE)


def _read_tensors(file: Path) -> dict[str, Floats]:
    """All tensors as float32; numpy has no bfloat16, so those are widened by hand."""
    import numpy as np

    if not file.is_file():
        pickled = sorted(other.name for other in file.parent.glob("adapter_model.*") if other != file)
        reason = f"is a pickle ({pickled[0]}), which can run code" if pickled else f"has no {file.name}"
        raise InputError(file.parent, reason, "ask for safetensors, or fit it again: edgealign personalize")
    header = check_safetensors(file)
    data = np.memmap(file, np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    tensors: dict[str, Floats] = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        raw = np.array(data[start + first : start + last])
        if entry["dtype"] == "BF16":
            value = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in ("F16", "F32", "F64"):
            value = raw.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[entry["dtype"]])
        else:
            raise InputError(file, f"{name} has the type {entry['dtype']}", "save the adapter in float32")
        tensors[name] = value.astype(np.float32).reshape(entry["shape"])
    return tensors
