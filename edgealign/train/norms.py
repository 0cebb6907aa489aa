"""RMS norms of a model in fewer passes over memory: the same bits forward, the same gradients to rounding.

transformers writes the norm as seven operations, and autograd keeps their results and runs about fifteen more. Here it
is one function: it keeps its input and one number a token, and its gradient is written out.

    y = weight * x * r,   r = (mean(x^2) + eps)^(-1/2)
    dx = r (g - x r mean(g x r)),   g = weight * dy,     dweight = sum(dy x r)

`quick_norms(model)` swaps the forward of such modules for as long as its `with` block lasts; what a compiler traces
keeps its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Norms that compute weight * (x r), x and r in float32 and x r rounded to the input's type (Gemma's differ).
RMS_NORMS = ("Lfm2RMSNorm", "Lfm2MoeRMSNorm", "Lfm3RMSNorm", "LlamaRMSNorm", "Qwen3RMSNorm")


@contextmanager
def quick_norms(model: nn.Module) -> Iterator[None]:
    """Within the block the RMS norms of `model` run as one function each; restored afterwards."""
    modules: list[Any] = [
        module for module in model.modules()
        if type(module).__name__ in RMS_NORMS and "forward" not in vars(module)
    ]  # fmt: skip
    for module in modules:
        module.forward = functools.partial(_forward, module, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the instance attribute; the class's own forward shows again


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in the wider of their types."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def _forward(module: Any, original: Any, hidden_states: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        out: Tensor = original(hidden_states)
        return out
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        r = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()  # transformers' operations: the same bits
        ctx.save_for_backward(x, weight, r)
        unit = (wide * r).to(x.dtype)
        same_type: bool = unit.dtype == torch.promote_types(weight.dtype, unit.dtype)
        out: Tensor = unit.mul_(weight) if same_type else unit * weight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        dy = grads[0].float()
        unit = x.float() * r
        along = dy * unit
        dweight = along.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        inner = (along @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)
        dx = (dy * weight).addcmul_(unit, inner, value=-1.0).mul_(r)
        return dx.to(x.dtype), dweight, None
