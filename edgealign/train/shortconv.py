"""Gated short convolutions that follow a tree layout, for transformers' LFM2 and LFM2-MoE.

transformers runs the depthwise kernel over neighbours in memory, which mixes packed documents and the two
completions of a pair. Here each token reads its predecessors along its own path (`Batch.taps`), so that
nothing leaks; as K shifted multiply-adds in the (B, T, D) layout it is also faster on a CPU than
`F.conv1d` with `groups=D` and the transposes around it.

`tree_rows(model)` swaps the forward of those modules for as long as its `with` block lasts. Without taps among
the keyword arguments (generation, an ordinary forward) the original forward runs, so the block is safe to be in.

The operator: B, C, x = split(in_proj(h)); y = C * conv(B * x); out_proj(y) (LFM2 report, section 2).
Shape legend: B rows, T tokens, D channels, K kernel width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgealign.errors import InputError

SHORT_CONVOLUTIONS = ("Lfm2ShortConv", "Lfm2MoeShortConv")
TAPS = "conv_taps"
_SEPARABLE_LAYERS = {"full_attention", "sliding_attention", "conv"}


def short_convolutions(model: nn.Module) -> list[Any]:
    """The short-convolution modules of a model; empty for a plain transformer."""
    return [module for module in model.modules() if type(module).__name__ in SHORT_CONVOLUTIONS]


def kernel_width(model: nn.Module) -> int:
    """K, as `layout.pack` wants it: 1 where a model has no short convolution."""
    return max((int(module.conv.weight.shape[-1]) for module in short_convolutions(model)), default=1)


@contextmanager
def tree_rows(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, the short convolutions of `model` follow the taps of a `Batch`; restored afterwards.

    Backward must run inside the block too when gradient checkpointing recomputes the forward.
    """
    refuse_recurrent_layers(model)
    modules = [module for module in short_convolutions(model) if not follows_taps(module)]
    for module in modules:
        module.forward = functools.partial(_forward, module, module.forward)
    try:
        yield model
    finally:
        for module in modules:
            del module.forward  # the instance attribute; the class's own forward shows again


def follows_taps(module: Any) -> bool:
    """Whether `tree_rows` is in effect for a short-convolution module."""
    return "forward" in vars(module)


def refuse_recurrent_layers(model: nn.Module) -> None:
    """A model whose layers carry a state from token to token cannot be laid out as a tree."""
    config: Any = getattr(model, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    strange = sorted(kinds - _SEPARABLE_LAYERS)
    known = {id(module.conv) for module in short_convolutions(model)}
    if not strange:
        strange = sorted({name for name, m in model.named_modules() if isinstance(m, nn.Conv1d) and id(m) not in known})
    if strange:
        name = getattr(config, "model_type", type(model).__name__)
        raise InputError(
            str(name),
            f"has layers that carry state between tokens ({', '.join(strange[:3])}), and training would mix examples",
            "train an attention or short-convolution model, such as lfm2, lfm2_moe, qwen3 or llama",
        )


class _Shift(torch.autograd.Function):
    """rows[i] = u[index[i]], or zeros where index[i] == len(u)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, index: Tensor) -> Tensor:
        """u (R, D), index (R,) -> (R, D)"""
        ctx.save_for_backward(index)
        return torch.cat((u, u.new_zeros(1, u.shape[1]))).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        (grad,) = grads
        out = grad.new_zeros(grad.shape[0] + 1, grad.shape[1])
        return out.index_add_(0, index, grad)[:-1], None


def _shift(u: Tensor, index: Tensor) -> Tensor:
    shifted: Tensor = _Shift.apply(u, index)  # type: ignore[no-untyped-call]
    return shifted


def _forward(module: Any, original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """hidden_states (B, T, D) -> (B, T, D)"""
    taps: Tensor | None = kwargs.pop(TAPS, None)
    if taps is None:
        out: Tensor = original(hidden_states, *args, **kwargs)
        return out
    gate_in, gate_out, x = module.in_proj(hidden_states).chunk(3, dim=-1)
    u = (gate_in * x).flatten(0, 1)  # (B*T, D)
    kernel = module.conv.weight.squeeze(1).to(u.dtype)  # (D, K); the last column weighs the token itself
    mixed = u * kernel[:, -1]
    for distance, index in enumerate(taps, start=1):
        mixed = torch.addcmul(mixed, _shift(u, index), kernel[:, -1 - distance])
    if module.conv.bias is not None:
        mixed = mixed + module.conv.bias.to(u.dtype)
    projected: Tensor = module.out_proj(gate_out * mixed.unflatten(0, gate_out.shape[:2]))
    return projected
