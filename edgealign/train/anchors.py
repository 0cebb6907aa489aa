"""What an objective reads of the reference beside log-probabilities; taken once, before training, as those are.

    token_kl           KL(ref || pi) at every token: the reference's final states, of which its distribution is made
                       again when a pass needs it (RRPO, SparsePO)
    token_weights      how active the reference is at a token (SparsePO's MaPO)
    prompt_features    where a prompt lies among all prompts (relative PO)

They stay in memory: a learned token's final state has the model's width, 4 KiB for LFM2-350M in 32 bits.

Shape legend: N learned tokens, S sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgealign.objectives.table import Objective
from edgealign.train.adapt import lora_without_casts
from edgealign.train.layout import Anchor, Batch, Tree, document
from edgealign.train.logprobs import causal_lm, hidden_states, output_projection
from edgealign.train.scoring import Passes, Read, read_tokens
from edgealign.train.tasks import PerToken


@dataclass(frozen=True)
class Anchors:
    """None where the objective does not read it."""

    states: PerToken | None = None  # (sum of n_learned, D)
    head: tuple[Tensor, Tensor | None] | None = None  # (V, D), (V,)
    weights: PerToken | None = None  # (sum of n_learned,) from 0 to 1
    features: Tensor | None = None  # (examples, D)

    @staticmethod
    def of(
        objective: Objective, model: nn.Module, trees: Sequence[Tree], passes: Passes, *, head_learns: bool
    ) -> Anchors | None:
        """What `objective` reads of `model` as it is now; None where that is nothing.

        Args:
            head_learns: the vocabulary's matrix is about to change, so a copy is kept.
        """
        states = head = weights = features = None
        if "token_kl" in objective.columns:
            found = read_tokens(model, trees, passes, final_states(passes), label="reference states", shared=True)
            states = PerToken.of(torch.cat(found), trees)
            weight, bias = (None if each is None else each.detach() for each in output_projection(model))
            assert weight is not None
            head = (weight.clone(), None if bias is None else bias.clone()) if head_learns else (weight, bias)
        if "token_weights" in objective.columns:
            alone = replace(passes, lanes=1)  # a layer's outputs are collected from one pass at a time
            found = read_tokens(model, trees, alone, activity(alone), label="reference activations", shared=True)
            weights = PerToken.of(torch.cat(found), trees)
        if "prompt_features" in objective.columns:
            features = prompt_features(model, trees, passes)
        if states is None and weights is None and features is None:
            return None
        return Anchors(states, head, weights, features)

    def attach(self, batch: Batch, indices: Sequence[int]) -> Batch:
        """The batch of these examples with the reference's distribution at its learned tokens."""
        if self.states is None or self.head is None:
            return batch
        states = self.states.take(indices).to(batch.input_ids.device)
        return replace(batch, anchor=Anchor(states, *self.head))


def final_states(passes: Passes) -> Read:
    """Reads (N, D): the final states that predict the learned tokens."""

    def read(model: nn.Module, batch: Batch) -> Tensor:
        with passes.precision.context(batch.input_ids.device), lora_without_casts(model, passes.precision):
            return hidden_states(model, batch).flatten(0, 1).index_select(0, batch.source)

    return read


def activity(passes: Passes) -> Read:
    """Reads (N,): the mean of a token's state, stretched over its sequence to 0 to 1; after each layer, their mean.

    SparsePO's MaPO with activations of the residual stream (its code, `zn_rescale`). A sequence of one token has 1.
    """

    def read(model: nn.Module, batch: Batch) -> Tensor:
        with layer_outputs(model) as outputs:
            final_states(passes)(model, batch)
        means = (state.float().mean(-1).flatten()[batch.source] for state in outputs)
        return torch.stack([stretched(each, batch.sequence, len(batch.lengths)) for each in means]).mean(0)

    return read


def stretched(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """(N,) from 0 for a sequence's least value to 1 for its largest; 1 where all are the same."""
    low, high = (
        values.new_zeros(count).scatter_reduce_(0, sequence, values, reduce, include_self=False)[sequence]
        for reduce in ("amin", "amax")
    )
    return torch.where(high > low, (values - low) / (high - low).clamp(min=1e-12), 1.0)


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects (B, T, D) after each layer of the decoder, within the block."""
    decoder: Any = causal_lm(model).get_decoder()  # type: ignore[operator]
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in decoder.layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def prompt_features(model: nn.Module, trees: Sequence[Tree], passes: Passes) -> Tensor:
    """(examples, D): the mean final state of each prompt (without its last token), less the mean of all prompts'.

    Relative PO takes a sentence embedder. A language model's states all point the same way, so that without the mean
    taken away every prompt would be as near as any other.
    """
    place = {ids: i for i, ids in enumerate(dict.fromkeys(tree.segments[0].ids for tree in trees))}
    prompts = [document(ids, [True] * len(ids)) for ids in place]
    found = read_tokens(model, prompts, passes, final_states(passes), label="prompts", shared=True)
    means = torch.stack([states.float().mean(0) if len(states) else torch.zeros(states.shape[1]) for states in found])
    return (means - means.mean(0))[[place[tree.segments[0].ids] for tree in trees]]
