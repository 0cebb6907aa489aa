"""Completion log-probabilities: the one function that turns a batch into what every loss reads.

It never computes a logit that no loss reads: the backbone runs over all tokens, then only the hidden states that
predict a learned token meet the vocabulary projection, a chunk at a time. Log-softmax is in float32.

How to fit a LoRA on a few pairs with these parts, without any trainer:

    from edgealign.objectives.loss import pair_loss
    from edgealign.objectives.table import find
    from edgealign.train.adapt import add_lora
    from edgealign.train.layout import pack, pair
    from edgealign.train.logprobs import sequence_logprobs
    from edgealign.train.shortconv import kernel_width, tree_rows

    trees = [pair(*encode_pair(tokenizer, p, max_tokens=1024)) for p in pairs]
    batch = pack(trees, kernel=kernel_width(model))           # or several, see layout.split_by_tokens
    with tree_rows(model):
        with torch.no_grad():
            reference = sequence_logprobs(model, batch)       # before add_lora; (S, L) values and mask
        model = add_lora(model, rank=8, alpha=16.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
        for _ in range(epochs):
            result = pair_loss(find("ln_dpo"), sequence_logprobs(model, batch), reference)
            result.loss.mean().backward()
            optimizer.step(); optimizer.zero_grad()

`scoring.Passes` does the packing, the precision and the cutting into passes; `reference.reference_scores` caches the
reference; `trainer.fit` is the whole loop with a schedule, a log and checkpoints.

Shape legend: B rows, T tokens, D hidden size, V vocabulary, N learned tokens, S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgealign.errors import InputError
from edgealign.objectives.scores import Ragged, Scores, pad_ragged
from edgealign.train.gather import gather_logprobs
from edgealign.train.layout import Batch, branches, document, pack
from edgealign.train.shortconv import (
    TAPS,
    dense_taps,
    follows_taps,
    kernel_width,
    plan_taps,
    short_convolutions,
    tree_rows,
)
from edgealign.train.token_kl import logprobs_with_kl

# The tests compare these with plain forward passes.
VERIFIED = ("lfm2", "lfm2_moe", "lfm3", "llama", "qwen3", "gemma3_text")
LAYOUT_TOLERANCE_NATS = 0.05  # bfloat16 weights differ by up to about 0.02
CHUNK_LOGITS = 2**20  # logits held at once: 4 MiB of float32, which stay in a core's cache from one pass to the next
KEPT_LOGITS = 2**24  # what full training may keep of them for backward, 32 MiB in bfloat16; beyond, they are made again
GATHERED = "gathered_logprobs"  # a sharded model's method that gathers its weights for `path_logprobs` (`sharding`)
CHUNK_ROWS = 512  # but no fewer positions than this: below, a product with a large vocabulary's matrix is slow


def sequence_logprobs(model: nn.Module, batch: Batch) -> Scores:
    """Log-probability of every learned token as (S, L) with its mask; see `token_logprobs`."""
    return pad_ragged(Ragged(token_logprobs(model, batch), batch.sequence, batch.lengths))


def token_logprobs(model: nn.Module, batch: Batch, *, chunk: int | None = None) -> Tensor:
    """(N,) float32: log p(target | its own path) for the learned tokens of `batch`.

    `model` is a transformers causal language model, PEFT-wrapped or not, inside `shortconv.tree_rows(model)`.
    Differentiable in whatever requires grad; call it under `torch.no_grad()` to score. A batch with candidates (a
    distillation) gives (N, 1 + K): the target's, then the candidates'; one with an anchor (N, 2): the target's, and
    KL(ref || pi).
    """
    if not is_sharded(model):
        return path_logprobs(model, batch, chunk)
    core: Any = causal_lm(model)
    found: Tensor = getattr(core, GATHERED)(batch, chunk)
    if not torch.is_grad_enabled():
        core.reshard()  # after a backward pass FSDP does so itself
    return found


def path_logprobs(model: nn.Module, batch: Batch, chunk: int | None) -> Tensor:
    """`token_logprobs` of a model whose weights are here; what a sharded model runs once it has gathered them."""
    hidden = hidden_states(model, batch)  # (B, T, D)
    picked = hidden.flatten(0, 1).index_select(0, batch.source)  # (N, D)
    weight, bias = output_projection(model)
    rows = chunk or chunk_rows(weight.shape[0])
    if batch.anchor is not None:
        return logprobs_with_kl(picked, weight, bias, batch.target, batch.anchor, rows)
    if batch.candidates is not None:
        return gather_logprobs(picked, weight, bias, torch.cat([batch.target[:, None], batch.candidates], 1), rows)
    out: Tensor = _ChunkedLogProb.apply(  # type: ignore[no-untyped-call]
        picked, weight, bias, batch.target, rows, torch.is_grad_enabled()
    )
    return out


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only its part of the weights (`sharding.sharded`)."""
    return hasattr(causal_lm(model), GATHERED)


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits are held at once."""
    return max(CHUNK_ROWS, CHUNK_LOGITS // vocabulary)


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """(B, T, D): the final hidden states of every token, each computed along its own path."""
    core: Any = causal_lm(model)
    convolutions = short_convolutions(core)
    extra: dict[str, Any] = {}
    if convolutions:
        if not all(follows_taps(module) for module in convolutions):
            raise RuntimeError("call this inside `with tree_rows(model):`, or short convolutions mix the sequences")
        extra[TAPS] = dense_taps(batch.taps) if is_compiled(core) else plan_taps(batch.taps)
    out = core.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=_attention_mask(core, batch),
        use_cache=False,
        **extra,
    )
    last: Tensor = out.last_hidden_state
    return last


@contextmanager
def compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within the block the decoder of `model` runs compiled by TorchInductor; batches must be rows of one shape."""
    decoder: Any = causal_lm(model).get_decoder()  # type: ignore[operator]
    if wanted:
        decoder.compile(dynamic=False)
    try:
        yield
    finally:
        decoder._compiled_call_impl = None


def is_compiled(core: Any) -> bool:
    """Whether `compiled` is in effect."""
    return getattr(core.get_decoder(), "_compiled_call_impl", None) is not None


def check_layout(model: nn.Module) -> None:
    """Compare a small tree with the model's own forward pass: an architecture that nobody has tried may do more.

    Raises:
        InputError: the two disagree, so training would learn from wrong numbers.
    """
    core: Any = causal_lm(model)
    if core.config.model_type in VERIFIED:
        return
    device = next(core.parameters()).device
    prompt, answers = (3, 4, 5), ((6, 7), (8, 9, 10))
    with torch.no_grad(), tree_rows(model):
        batch = pack([document((11, 12), (False, False)), branches(prompt, answers)], kernel=kernel_width(model))
        got = token_logprobs(model, batch.to(device))
        wanted = []
        for answer in answers:
            logits = core(input_ids=torch.tensor([[*prompt, *answer]], device=device)).logits[0, 2:-1]
            logp = torch.log_softmax(logits.float(), -1)
            wanted.append(logp.gather(1, torch.tensor(answer, device=device)[:, None]).squeeze(1))
    error = float((got - torch.cat(wanted)).abs().max())
    if not error < LAYOUT_TOLERANCE_NATS:
        raise InputError(
            str(core.config.model_type), f"scores differ by {error:.2g} nats from its own forward pass when packed",
            f"train one of: {', '.join(VERIFIED)}",
        )


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (LoRA layers stay in place), or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def output_projection(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias of the vocabulary projection; refuses heads that are more than a linear map."""
    core: Any = causal_lm(model)
    head = core.get_output_embeddings()
    config = core.config
    reason = ""
    if type(head) is not nn.Linear:
        reason = f"its output head is a {type(head).__name__}, not a plain linear layer"
    elif getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_scaling", None):
        reason = "it transforms its logits after the output head"
    if reason:
        raise InputError(str(config.model_type), reason, "train a model with a plain head, without adapters on lm_head")
    return head.weight, head.bias


def _attention_mask(core: Any, batch: Batch) -> Any:
    """The mask in the form that a model takes it: boolean for SDPA, additive for eager, one per kind of layer."""
    config = core.config
    full = batch.allowed
    kinds = set(getattr(config, "layer_types", None) or ())
    masks = {"full_attention": full}
    if "sliding_attention" in kinds:
        distance = batch.position_ids[:, None, :, None] - batch.position_ids[:, None, None, :]  # (B, 1, T, T)
        masks["sliding_attention"] = full & (distance < config.sliding_window)
    if config._attn_implementation == "eager":
        dtype = core.get_input_embeddings().weight.dtype
        masks = {k: torch.zeros_like(m, dtype=dtype).masked_fill(~m, torch.finfo(dtype).min) for k, m in masks.items()}
    if len(masks) == 1:
        return masks["full_attention"]
    return {**masks, **dict.fromkeys(kinds & {"conv"})}  # LFM3 looks up every kind; its convolutions follow the taps


class _ChunkedLogProb(torch.autograd.Function):
    """log softmax(h W^T + b)[target], holding the logits of one chunk of positions at a time.

    With G = onehot - softmax (N, V) and the upstream gradient g (N,), dh = g (G W) and dW = G^T (g h). Neither G W nor
    G depends on g, so what backward needs is made in the forward pass while the logits are there: G W where W is
    frozen (LoRA), G itself where W learns and G is small, and else nothing: the logits are computed again, a chunk at
    a time.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk: int, learns: bool
    ) -> Tensor:
        """hidden (N, D), weight (V, D), bias (V,) or None, target (N,) -> (N,) float32; `learns`: backward will come"""
        learns_weight = learns and (weight.requires_grad or (bias is not None and bias.requires_grad))
        ctx.device = hidden.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.product = ctx.autocast[1] if ctx.autocast[0] else weight.dtype
        n, vocabulary = hidden.shape[0], weight.shape[0]
        direction = torch.empty_like(hidden) if learns and hidden.requires_grad and not learns_weight else None
        small = learns_weight and n * vocabulary <= KEPT_LOGITS
        kept = hidden.new_empty(n, vocabulary, dtype=ctx.product) if small else None
        out = hidden.new_empty(n, dtype=torch.float32)
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            logp = _log_softmax(hidden[part], weight, bias)
            out[part] = logp.gather(1, target[part, None]).squeeze(1)
            if direction is not None:
                direction[part] = _onehot_minus_softmax(logp, target[part]).to(weight.dtype) @ weight
            elif kept is not None:
                kept[part] = _onehot_minus_softmax(logp, target[part])
            del logp  # or it lies beside the next chunk's
        ctx.chunk, ctx.hidden_learns, ctx.learns_weight = chunk, hidden.requires_grad, learns_weight
        if learns_weight:
            ctx.save_for_backward(hidden, weight, bias, target, kept)
        elif direction is not None:
            ctx.save_for_backward(direction)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        (grad,) = grads  # (N,)
        if not ctx.learns_weight:
            if not ctx.hidden_learns:
                return None, None, None, None, None, None
            (direction,) = ctx.saved_tensors
            return direction * grad[:, None].to(direction.dtype), None, None, None, None, None
        hidden, weight, bias, target, kept = ctx.saved_tensors
        scaled = (hidden * grad[:, None]).to(ctx.product)  # (N, D) is less to multiply than (N, V)
        grad_hidden = torch.empty_like(hidden) if ctx.hidden_learns else None
        grad_weight = grad_bias = None
        enabled, dtype = ctx.autocast
        with torch.autocast(ctx.device, dtype=dtype, enabled=enabled):  # the same logits as in forward
            rows = ctx.chunk if kept is None else max(len(hidden), 1)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                if kept is None:
                    logp = _log_softmax(hidden[part], weight, bias)
                    wide = _onehot_minus_softmax(logp, target[part]).to(ctx.product)
                else:
                    wide = kept
                if grad_hidden is not None:
                    grad_hidden[part] = (wide @ weight) * grad[part, None]
                grad_weight = _plus_product(grad_weight, wide.t(), scaled[part], weight.dtype)
                if bias is not None:
                    grad_bias = _plus(grad_bias, grad[part].to(ctx.product) @ wide, bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _plus(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if total is None else total.add_(part)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right; of one type, in one pass over a gradient as large as the vocabulary's matrix."""
    if total is not None and total.dtype == left.dtype:
        return total.addmm_(left, right)
    return _plus(total, left @ right, dtype)


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, D) -> (N, V) float32"""
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    return torch.log_softmax(logits.float(), dim=-1)


def _onehot_minus_softmax(logp: Tensor, target: Tensor) -> Tensor:
    """(N, V): overwrites `logp` with the gradient of the target's log-probability by the logits."""
    grad = logp.exp_().neg_()
    grad.scatter_add_(1, target[:, None], torch.ones_like(target, dtype=grad.dtype)[:, None])
    return grad
