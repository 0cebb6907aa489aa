"""A frozen linear layer and its LoRA as one function: y = x W^T + s (x A^T) B^T.

peft computes the two products, multiplies the second by its scale, adds them, and autograd goes the same way back: four
passes over tensors as large as the layer's input or output, which at small widths cost as much as the products. Here
the second product is added by the matrix product itself, both ways.

    dx = dy W + s (dy B) A,     dA = s (dy B)^T x,     dB = s dy^T (x A^T)

`quick_lora(model)` swaps the forward of peft's LoRA layers for as long as its `with` block lasts. Whatever is not one
plain, active, unmerged adapter without dropout on a frozen `nn.Linear` runs as peft has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def quick_lora(model: nn.Module) -> Iterator[None]:
    """Within the block the LoRA layers of `model` run as one function each; restored afterwards."""
    modules: list[Any] = [
        module for module in model.modules()
        if type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear"
        and "forward" not in vars(module)
    ]  # fmt: skip
    for module in modules:
        module.forward = functools.partial(_forward, module, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the instance attribute; the class's own forward shows again


def _forward(module: Any, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = _only_adapter(module)
    product = _product_type(module, x)
    if name is None or product is None or args or kwargs or torch.compiler.is_compiling():
        out: Tensor = original(x, *args, **kwargs)
        return out
    base = module.base_layer
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    fused: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.bias, a, b, float(module.scaling[name]), product
    )
    return fused


def _only_adapter(module: Any) -> str | None:
    """The name of the one plain adapter of a layer, None where there is more to do."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.disable_adapters or module.merged or names[0] in module.lora_variant:
        return None
    dropout = module.lora_dropout[names[0]]
    idle = isinstance(dropout, nn.Identity) or not module.training
    plain = type(module.base_layer) is nn.Linear and not module.base_layer.weight.requires_grad
    return names[0] if idle and plain and module.lora_B[names[0]].bias is None else None


def _product_type(module: Any, x: Tensor) -> torch.dtype | None:
    """The type that the products are in; None where types are mixed in a way that peft sorts out."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    types = {x.dtype, module.base_layer.weight.dtype, *(p.dtype for p in module.lora_A.parameters())}
    return x.dtype if len(types) == 1 else None


class _LoraLinear(torch.autograd.Function):
    """x (..., I), weight (O, I) frozen, bias (O,) frozen or None, a (r, I), b (O, r) -> (..., O)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
        product: torch.dtype,
    ) -> Tensor:  # fmt: skip
        rows = x.to(product).flatten(0, -2)  # (N, I)
        frozen, narrow, wide = weight.to(product), a.to(product), b.to(product)
        out = nn.functional.linear(rows, frozen, None if bias is None else bias.to(product))
        low = rows @ narrow.t()  # (N, r)
        out.addmm_(low, wide.t(), alpha=scale)
        ctx.save_for_backward(rows, frozen, narrow, wide, low)
        ctx.scale, ctx.shape, ctx.types = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, frozen, narrow, wide, low = ctx.saved_tensors
        dy = grads[0].flatten(0, -2).to(rows.dtype)
        dlow = (dy @ wide).mul_(ctx.scale)  # (N, r)
        of_x, of_a, of_b = ctx.types
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ frozen).addmm_(dlow, narrow).view(ctx.shape).to(of_x)
        da = (dlow.t() @ rows).to(of_a) if ctx.needs_input_grad[3] else None
        db = (dy.t() @ low).mul_(ctx.scale).to(of_b) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None, None
