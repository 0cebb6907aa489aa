"""Log-probabilities of several tokens per position, and the likeliest tokens of a position, in chunks.

What distillation needs beside `logprobs.token_logprobs`: for each position the student's log-probabilities of the
teacher's K tokens, and from the teacher those tokens. The (N, V) logits exist for one chunk of positions at a time.

Shape legend: N positions, M tokens asked for per position, K tokens kept, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gather_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, chunk: int) -> Tensor:
    """log softmax(hidden W^T + bias)[ids]: hidden (N, D), weight (V, D), ids (N, M) -> (N, M) float32.

    Differentiable in hidden, weight and bias; `chunk` positions at a time.
    """
    out: Tensor = _ChunkedGather.apply(hidden, weight, bias, ids, chunk)  # type: ignore[no-untyped-call]
    return out


def likeliest(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, chunk: int, *, n_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """The K likeliest tokens of every position: log-probabilities (N, K), normalised over all V, and ids (N, K).

    `n_tokens`: only the first so many count as tokens; what a head has beyond its tokenizer is padding.
    """
    values = hidden.new_empty(hidden.shape[0], k, dtype=torch.float32)
    ids = torch.empty(hidden.shape[0], k, dtype=torch.int64, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        values[part], ids[part] = log_softmax(hidden[part], weight, bias)[:, :n_tokens].topk(k, dim=-1)
    return values, ids


class _ChunkedGather(torch.autograd.Function):
    """d logits = scatter(g) - softmax * sum(g); the logits are made again in backward, a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, chunk: int) -> Tensor:
        out = hidden.new_empty(ids.shape, dtype=torch.promote_types(torch.float32, hidden.dtype))
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            out[part] = log_softmax(hidden[part], weight, bias).gather(1, ids[part])
        ctx.chunk, ctx.device = chunk, hidden.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.save_for_backward(hidden, weight, bias, ids)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad,) = grads  # (N, M)
        hidden, weight, bias, ids = ctx.saved_tensors

        def by_logits(part: slice) -> Tensor:
            direction = log_softmax(hidden[part], weight, bias).exp_().mul_(-grad[part].sum(1, keepdim=True))
            return direction.scatter_add_(1, ids[part], grad[part])

        return (*through_logits(ctx, hidden, weight, bias, by_logits), None, None)


def through_logits(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, by_logits: Callable[[slice], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden, weight and bias, the first inputs of a function, whose `ctx` has `chunk`, `device` and
    `autocast`; `by_logits(part)` is its gradient (n, V) by the logits of those positions.
    """
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
    grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
    enabled, dtype = ctx.autocast
    with torch.autocast(ctx.device, dtype=dtype, enabled=enabled):  # the same logits as in forward
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            wide = by_logits(part).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = wide @ weight
            if grad_weight is not None:
                grad_weight += wide.t() @ hidden[part].to(weight.dtype)
            if grad_bias is not None:
                grad_bias += wide.sum(0)
    return grad_hidden, grad_weight, grad_bias


def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """log softmax(hidden W^T + bias): (N, D) -> (N, V), float32 or wider."""
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    return torch.log_softmax(logits.to(torch.promote_types(torch.float32, hidden.dtype)), dim=-1)
