"""Quantisation-aware training: the forward pass sees weights as a 4-bit file will hold them.

With `--qat q4_0` every linear layer but the output head is rounded to llama.cpp's Q4_0 grid on the way into the
product: blocks of 32 along a row, one scale d each, values d q with q from -8 to 7. Gradients pass through the rounding
(straight-through estimator, arXiv 1308.3432). The published weights lie on the grid, so exporting them to Q4_0 loses
nothing: the file holds the very numbers that were trained.

A scale has 5 significant bits, so that every d q has at most 8 and is exact in bfloat16 (and d in the float16 that a
Q4_0 file keeps scales in). The largest value of a block is -8 d, as llama.cpp chooses it; hence quantising twice
changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

BLOCK = 32
SCALE_BITS = 5
LOWEST, HIGHEST = -8, 7


class OnGrid(nn.Module):
    """Round a weight to the Q4_0 grid; the gradient does not notice."""

    def forward(self, weight: Tensor) -> Tensor:
        """weight (..., 32 n) -> the same shape, on the grid"""
        rounded: Tensor = _Straight.apply(weight)  # type: ignore[no-untyped-call]
        return rounded


def to_grid(weight: Tensor) -> Tensor:
    """The nearest values that a Q4_0 block of 32 can hold, with scales of 5 significant bits."""
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # signed
    mantissa, exponent = torch.frexp(largest / LOWEST)
    scale = torch.ldexp(torch.round(mantissa * 2**SCALE_BITS) / 2**SCALE_BITS, exponent)
    steps = torch.where(scale == 0, torch.zeros_like(blocks), blocks / scale)
    return (torch.floor(steps + 0.5).clamp(LOWEST, HIGHEST) * scale).reshape(weight.shape)


class _Straight(torch.autograd.Function):
    """Rounding forward, identity backward: adding a difference instead would leave values next to the grid."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return to_grid(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def put_on_grid(model: nn.Module) -> int:
    """Parametrise the linear layers of `model`; how many."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    layers = [
        module for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.shape[-1] % BLOCK == 0
    ]
    for module in layers:
        parametrize.register_parametrization(module, "weight", OnGrid())
    return len(layers)


def keep_on_grid(model: nn.Module) -> None:
    """Make the rounded weights the weights, and the layers plain again."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
