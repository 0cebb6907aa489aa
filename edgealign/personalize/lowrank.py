"""A low-rank addition to linear layers, in the layout that PEFT reads, without loading PEFT.

    y = W x + b + B A x        A (r, D_in), B (D_out, r), the LoRA's scale folded into B

Arithmetically this is PEFT's LoRA without dropout. It exists because a per-user fit takes seconds: importing PEFT
alone takes two, and here the sum is accumulated into the product W x instead of being a tensor of its own, and the
population's factors (frozen) and the user's (learning) are one product with the ranks put together.

Shape legend: R rows (all tokens of a batch), D_in, D_out, r rank (population and user together).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgealign.errors import InputError
from edgealign.personalize.adapter import ADAPTER_FILES, read_config

PREFIX = "base_model.model."  # PEFT's name for the model inside its wrapper
PLAIN = {
    "peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none", "fan_in_fan_out": False,
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
}


@dataclass(frozen=True)
class Factors:
    """One layer's addition: B @ A."""

    a: Tensor  # (r, D_in) float32
    b: Tensor  # (D_out, r) float32


class LowRankLinear(nn.Module):
    """A frozen linear layer with a learning low-rank addition, and optionally a frozen one."""

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float, frozen: Factors | None) -> None:
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)  # PEFT's initialisation
        self.frozen_a: Tensor | None
        self.frozen_b: Tensor | None
        self.register_buffer("frozen_a", None if frozen is None else frozen.a)
        self.register_buffer("frozen_b", None if frozen is None else frozen.b)

    @property
    def user(self) -> Factors:
        """What was learned, scale folded into B."""
        return Factors(self.a.detach(), self.b.detach() * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D_in) -> (..., D_out)"""
        a: Tensor = self.a
        b: Tensor = self.b * self.scale
        if self.frozen_a is not None and self.frozen_b is not None:
            a, b = torch.cat((self.frozen_a, a)), torch.cat((self.frozen_b, b), dim=1)
        dtype = self.linear.weight.dtype
        out: Tensor = _AddLowRank.apply(x, self.linear.weight, self.linear.bias, a.to(dtype), b.to(dtype))  # type: ignore[no-untyped-call]
        return out


class _AddLowRank(torch.autograd.Function):
    """x W^T + (x A^T) B^T, with gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """x (..., D_in), weight (D_out, D_in), a (r, D_in), b (D_out, r) -> (..., D_out)"""
        rows = x.reshape(-1, x.shape[-1])  # (R, D_in)
        inner = rows @ a.t()  # (R, r)
        out = torch.nn.functional.linear(rows, weight, bias)
        out.addmm_(inner, b.t())
        ctx.save_for_backward(rows, inner, weight, a, b)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        rows, inner, weight, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])  # (R, D_out)
        grad_inner = grad @ b  # (R, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_inner, a)
            grad_x = grad_x.view(*grads[0].shape[:-1], -1)
        return grad_x, None, None, grad_inner.t() @ rows, grad.t() @ inner


def wrap(
    model: nn.Module, names: Sequence[str], *, rank: int, scale: float, seed: int,
    population: Mapping[str, Factors] | None = None, along: bool = False,
) -> dict[str, LowRankLinear]:
    """Put a fresh addition (B = 0: no effect yet) on the named layers; everything else is frozen.

    Layers that only the population adapts are wrapped too. A depends on the seed and the layers' names alone, or is the
    population's own where the addition shall go `along` it.

    Raises:
        InputError: a layer that is not linear; a population of another rank to go along.
    """
    population = population or {}
    model.requires_grad_(False)
    wrapped: dict[str, LowRankLinear] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in [*names, *(extra for extra in population if extra not in names)]:
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise InputError(name, "is not a linear layer of this model", "fit the population adapter again")
            layer = LowRankLinear(linear, rank=rank, scale=scale, frozen=population.get(name))
            if along and layer.frozen_a is not None:
                if layer.frozen_a.shape != layer.a.shape:
                    known = len(layer.frozen_a)
                    raise InputError(name, f"starts with rank {known}, this fit has {rank}", f"use --rank {known}")
                layer.a.data.copy_(layer.frozen_a)
            wrapped[name] = layer.to(linear.weight.device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrapped[name])
    return wrapped


def scale_user(wrapped: Mapping[str, LowRankLinear], share: float) -> None:
    """Shrink what was learned to this share of itself."""
    with torch.no_grad():
        for layer in wrapped.values():
            layer.b.mul_(share)


def write_peft(
    folder: Path, wrapped: Mapping[str, LowRankLinear], *, alpha: float, base_name: str
) -> tuple[int, int]:
    """Write `adapter_config.json` and `adapter_model.safetensors`; returns rank and number of parameters.

    Without a population the configuration has the recipe's own rank and alpha. With one, the factors are put
    together, the rank is the sum of both, alpha equals it (scale 1) and every scale is in B.
    """
    together = any(layer.frozen_a is not None for layer in wrapped.values())
    parts = {name: _combined(layer) if together else Factors(layer.a.detach(), layer.b.detach())
             for name, layer in wrapped.items()}
    return write_factors(folder, parts, alpha=None if together else alpha, base_name=base_name)


def write_factors(
    folder: Path, parts: Mapping[str, Factors], *, alpha: float | None, base_name: str
) -> tuple[int, int]:
    """Write layers' factors as a LoRA; `alpha` None says that every scale is in B."""
    rank = max(part.a.shape[0] for part in parts.values())
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        missing = rank - part.a.shape[0]  # PEFT wants one rank: fill with factors that add nothing
        a = torch.cat((part.a, part.a.new_zeros(missing, part.a.shape[1])))
        b = torch.cat((part.b, part.b.new_zeros(part.b.shape[0], missing)), dim=1)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.cpu().contiguous()
    config = {
        **PLAIN, "base_model_name_or_path": base_name, "inference_mode": True, "init_lora_weights": True,
        "lora_alpha": rank if alpha is None else alpha, "lora_dropout": 0.0, "r": rank, "revision": None,
        "target_modules": sorted(parts), "task_type": "CAUSAL_LM",
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / ADAPTER_FILES[0]).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
    return rank, sum(tensor.numel() for tensor in tensors.values())


def read_peft(folder: Path) -> dict[str, Factors]:
    """The layers of a plain LoRA in PEFT layout, scale folded into B.

    Raises:
        InputError: DoRA, per-layer ranks, trained embeddings or anything else that is no plain LoRA; damaged files.
    """
    config = read_config(folder)
    for key, plain in PLAIN.items():
        if key in ("use_rslora", "fan_in_fan_out"):
            continue
        if config.get(key, plain) not in (plain, [], {}) and config.get(key) is not None:
            raise InputError(folder, f"is no plain LoRA ({key} = {config[key]!r})", "fit the population adapter again")
    try:
        tensors = load_file(folder / ADAPTER_FILES[1])
        rank, alpha = int(str(config["r"])), float(str(config["lora_alpha"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(folder, "is damaged or incomplete", "fit it again") from error
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    found: dict[str, Factors] = {}
    for key, tensor in sorted(tensors.items()):
        name, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")[::2]
        if kind not in ("A", "B") or not name:
            raise InputError(folder, f"holds {key}, which is no part of a plain LoRA", "fit it again")
        if kind == "A":
            other = tensors.get(key.replace("lora_A", "lora_B"))
            if other is None:
                raise InputError(folder, f"has no B for {name}", "fit it again")
            found[name] = Factors(tensor.float(), other.float() * scale)
    return found


def _combined(layer: LowRankLinear) -> Factors:
    user = layer.user
    if layer.frozen_a is None or layer.frozen_b is None:
        return user
    return Factors(torch.cat((layer.frozen_a, user.a)), torch.cat((layer.frozen_b, user.b), dim=1))
