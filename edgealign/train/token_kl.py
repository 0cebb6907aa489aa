"""Log-probabilities of the tokens that came, and beside each KL(ref || pi) over the whole vocabulary, in chunks.

What RRPO and SparsePO read. The reference's logits are made of its final states (`Anchor`) where they are needed, so
that nothing of the size of the vocabulary is kept: a number for every element of a token's width.

Shape legend: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgealign.train.gather import log_softmax, through_logits
from edgealign.train.layout import Anchor


def logprobs_with_kl(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, anchor: Anchor, chunk: int
) -> Tensor:
    """hidden (N, D), weight (V, D), target (N,) -> (N, 2): log pi(target), KL(ref || pi); float32 or wider.

    Differentiable in hidden, weight and bias; the anchor is held still. `chunk` positions at a time.
    """
    out: Tensor = _ChunkedKl.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, target, anchor.states, anchor.weight, anchor.bias, chunk
    )
    return out


class _ChunkedKl(torch.autograd.Function):
    """d logits = g_logp (onehot - p) + g_kl (p - q), q the reference's; logits are made again in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, states: Tensor,
        their_weight: Tensor, their_bias: Tensor | None, chunk: int,
    ) -> Tensor:  # fmt: skip
        out = hidden.new_empty(len(hidden), 2, dtype=torch.promote_types(torch.float32, hidden.dtype))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            ours = log_softmax(hidden[part], weight, bias)
            theirs = log_softmax(states[part], their_weight, their_bias)
            out[part, 0] = ours.gather(1, target[part, None]).squeeze(1)
            out[part, 1] = (theirs.exp() * (theirs - ours)).sum(-1)
        ctx.chunk, ctx.device = chunk, hidden.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.save_for_backward(hidden, weight, bias, target, states, their_weight, their_bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_logp, of_kl = grads[0][:, :1], grads[0][:, 1:]
        hidden, weight, bias, target, states, their_weight, their_bias = ctx.saved_tensors

        def by_logits(part: slice) -> Tensor:
            wide = log_softmax(hidden[part], weight, bias).exp_().mul_(of_kl[part] - of_logp[part])
            wide.addcmul_(log_softmax(states[part], their_weight, their_bias).exp_(), -of_kl[part])
            return wide.scatter_add_(1, target[part, None], of_logp[part])

        return (*through_logits(ctx, hidden, weight, bias, by_logits), None, None, None, None, None)
