"""Put a LoRA on a model, take it off again, merge it: the only place in training that knows peft."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgealign.models.lint import lora_targets
from edgealign.train.precision import Precision

ADAPTER_CONFIG = "adapter_config.json"


def add_lora(
    model: Any, *, rank: int, alpha: float, targets: Sequence[str] = (), dropout: float = 0.0, seed: int = 0
) -> Any:
    """`model` with a fresh LoRA (B = 0: it changes nothing yet) as a `PeftModel`; only the LoRA learns.

    `targets` are names as `models.lint.lora_targets` takes them; none means every linear layer of the architecture.

    Raises:
        RecipeError: a target matches no layer.
    """
    from peft import LoraConfig, get_peft_model

    names = list(lora_targets(model, list(targets)).modules)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a property that transformers is renaming
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def lora_without_casts(model: Any, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Under autocast, peft's cast of every input to the LoRA's float32 is undone at once: two copies for nothing."""
    if not precision.autocast or not hasattr(model, "peft_config"):
        return contextlib.nullcontext()
    from peft.helpers import disable_input_dtype_casting

    without: contextlib.AbstractContextManager[object] = disable_input_dtype_casting(model)
    return without


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The learned parameters by name, copied to the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Put values from `trainable` back."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def merge_lora(model: Any) -> Any:
    """The transformers model with its LoRA folded into the weights, in their own type."""
    return model.merge_and_unload()


def save_lora(model: Any, folder: Path, *, base_name: str) -> None:
    """PEFT layout; the config names the base by `base_name`, never by a path on this machine."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])  # peft writes a set in no order
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
