"""Gated short convolutions that follow a tree layout, for transformers' LFM2, LFM2-MoE and LFM3.

transformers runs the depthwise kernel over neighbours in memory, which mixes packed documents and the two
completions of a pair. Here each token reads its predecessors along its own path (`Batch.taps`), so that
nothing leaks. It runs as K shifted multiply-adds in the (B, T, D) layout, without `F.conv1d` with `groups=D` and the
transposes around it.

`tree_rows(model)` swaps the forward of those modules for as long as its `with` block lasts. Without taps among
the keyword arguments (generation, an ordinary forward) the original forward runs, so the block is safe to be in.

The operator: B, C, x = split(in_proj(h)); y = C * conv(B * x); out_proj(y) (LFM2 report, section 2).
Shape legend: B rows, T tokens, D channels, K kernel width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgealign.errors import InputError
from edgealign.train.lora_linear import quick_lora
from edgealign.train.norms import quick_norms

SHORT_CONVOLUTIONS = ("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv")
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
    """Within the block, the short convolutions of `model` follow the taps of a `Batch`, and its norms and LoRA layers
    are quick ones (`norms.py`, `lora_linear.py`); restored afterwards.

    Backward must run inside the block too when gradient checkpointing recomputes the forward.
    """
    refuse_recurrent_layers(model)
    modules = [module for module in short_convolutions(model) if not follows_taps(module)]
    for module in modules:
        module.forward = functools.partial(_forward, module, module.forward)
    try:
        with quick_norms(model), quick_lora(model):
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
            "train an attention or short-convolution model, such as lfm2, lfm2_moe, lfm3, qwen3 or llama",
        )


@dataclass(frozen=True)
class Taps:
    """Where each token's predecessors are. Almost always it is the row before, so only the exceptions are listed.

    `jumps[d - 1]`: (rows, sources) of the rows whose predecessor at distance d is elsewhere; the number of rows as
    a source means that there is none.
    """

    jumps: tuple[tuple[Tensor, Tensor], ...]


def plan_taps(taps: Tensor) -> Taps:
    """`Batch.taps` (K-1, B*T) as the convolutions read them; once per batch, for all layers."""
    jumps = []
    for distance, source in enumerate(taps, start=1):
        usual = torch.arange(-distance, source.numel() - distance, device=source.device)
        rows = (source != usual).nonzero().squeeze(1)
        jumps.append((rows, source[rows]))
    return Taps(tuple(jumps))


def dense_taps(taps: Tensor) -> Tensor:
    """(K-1, B*T, 1) bool: whether a token has a predecessor at distance 1..K-1, for rows without branches.

    There a predecessor is the row before or nobody, so the kernel is K shifted multiply-adds with a mask: operations
    of fixed shape, which a compiler fuses into one loop. Eagerly `plan_taps` is the quicker form.
    """
    return (taps != taps.shape[1])[:, :, None]


def _shift(u: Tensor, distance: int, jumps: tuple[Tensor, Tensor]) -> Tensor:
    """(R, D) -> (R, D): each row's predecessor at this distance, zeros where it has none."""
    rows, sources = jumps
    out = torch.empty_like(u)
    out[distance:] = u[:-distance]  # a plain copy; gathering every row costs several times as much
    absent = (sources == u.shape[0])[:, None]
    return out.index_copy_(0, rows, u[sources.clamp(max=u.shape[0] - 1)].masked_fill_(absent, 0.0))


def _unshift(grad: Tensor, into: Tensor, distance: int, jumps: tuple[Tensor, Tensor]) -> None:
    """The transpose of `_shift`, added to `into`; overwrites `grad`."""
    rows, sources = jumps
    there = sources < grad.shape[0]
    jumped = grad[rows[there]]
    grad.index_fill_(0, rows, 0.0)
    into[:-distance] += grad[distance:]
    into.index_add_(0, sources[there], jumped)


class _TreeConvolution(torch.autograd.Function):
    """Depthwise convolution along the paths: u (R, D), kernel (K, D), its last row for the token itself -> (R, D)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor, taps: Taps) -> Tensor:
        ctx.save_for_backward(u, kernel)
        ctx.taps = taps
        mixed = u * kernel[-1]
        for distance, jumps in enumerate(taps.jumps, start=1):
            mixed.addcmul_(_shift(u, distance, jumps), kernel[-1 - distance])
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        u, kernel = ctx.saved_tensors
        grad_u = grad * kernel[-1]
        grad_kernel = torch.empty_like(kernel) if ctx.needs_input_grad[1] else None
        if grad_kernel is not None:
            grad_kernel[-1] = (grad * u).sum(0)
        for distance, jumps in enumerate(ctx.taps.jumps, start=1):
            _unshift(grad * kernel[-1 - distance], grad_u, distance, jumps)
            if grad_kernel is not None:
                grad_kernel[-1 - distance] = (grad * _shift(u, distance, jumps)).sum(0)
        return grad_u, grad_kernel, None


def _convolve(u: Tensor, kernel: Tensor, taps: Taps | Tensor) -> Tensor:
    if isinstance(taps, Tensor):
        return _dense_convolution(u, kernel, taps)
    mixed: Tensor = _TreeConvolution.apply(u, kernel, taps)  # type: ignore[no-untyped-call]
    return mixed


def _dense_convolution(u: Tensor, kernel: Tensor, present: Tensor) -> Tensor:
    """As `_TreeConvolution` for rows without branches; `present` (K-1, R, 1) is from `dense_taps`."""
    mixed = u * kernel[-1]
    for distance in range(1, kernel.shape[0]):
        before = nn.functional.pad(u, (0, 0, distance, 0))[: u.shape[0]]
        mixed = mixed + before * present[distance - 1] * kernel[-1 - distance]
    return mixed


def _forward(module: Any, original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """hidden_states (B, T, D) -> (B, T, D)"""
    taps: Taps | Tensor | None = kwargs.pop(TAPS, None)
    if taps is None:
        out: Tensor = original(hidden_states, *args, **kwargs)
        return out
    gate_in, gate_out, x = module.in_proj(hidden_states).chunk(3, dim=-1)
    u = (gate_in * x).flatten(0, 1)  # (B*T, D)
    kernel = module.conv.weight.squeeze(1).to(u.dtype).t().contiguous()  # (K, D): a row is quicker to read
    mixed = _convolve(u, kernel, taps)
    if module.conv.bias is not None:
        mixed = mixed + module.conv.bias.to(u.dtype)
    projected: Tensor = module.out_proj(gate_out * mixed.view_as(gate_out))
    return projected
