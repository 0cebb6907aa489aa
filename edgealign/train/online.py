"""Answers that the model draws itself before each optimizer step, for objectives that learn on them (HyPO).

Every prompt of a step is answered K times by the model as it is now, drawn from its whole distribution (temperature 1,
nothing cut off): only such answers estimate KL(pi || ref). They become branches of the pairs' trees for the length of
the step, and the reference scores them: the same model with its LoRA off, or a copy that stands still.

A draw is fixed by the seed, the step and the example, so that a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.together import decode_rows
from edgealign.runtimes.torch_rows import TorchRows
from edgealign.train import processes
from edgealign.train.layout import Tree, branches
from edgealign.train.logprobs import causal_lm
from edgealign.train.scoring import Passes, read_tokens

SEEDS = 1_000_003  # a step's seeds: no two examples of a run share one before this many


@dataclass(frozen=True)
class OnlineAnswers:
    """`trees` changes in place: `draw` adds branches to the examples of a step, `forget` takes them off."""

    trees: list[Tree]
    reference: nn.Module | None  # None: the model without its LoRA
    passes: Passes
    end: int  # the token that ends an answer
    samples: int  # K, answers to each prompt
    max_new_tokens: int
    max_tokens: int  # of prompt and answer
    seed: int
    scores: dict[int, Tensor] = field(default_factory=dict)  # example -> the reference's of its answers' tokens
    before: dict[int, Tree] = field(default_factory=dict)  # the trees without branches

    def draw(self, model: nn.Module, indices: Sequence[int], step: int) -> None:
        """Answer the prompts of a step, of several processes each its share, and have the reference score them."""
        self.forget()
        was_training = model.training
        model.eval()
        try:
            mine = list(processes.share(indices))
            trees = [branches(self.trees[i].segments[0].ids, answers) for i, answers in
                     zip(mine, self._answers(model, mine, step), strict=True)]  # fmt: skip
            with self._standing_still(model) as reference:
                scored = read_tokens(reference, trees, self.passes, self.passes.logprobs, label="")
        finally:
            model.train(was_training)
        found = {i: (tree.segments[1:], values) for i, tree, values in zip(mine, trees, scored, strict=True)}
        for part in processes.gather(found):
            for i, (segments, values) in part.items():
                self.before[i], self.scores[i] = self.trees[i], values
                self.trees[i] = replace(self.trees[i], segments=(*self.trees[i].segments, *segments))

    def forget(self) -> None:
        """The step is over."""
        for i, tree in self.before.items():
            self.trees[i] = tree
        self.before.clear()
        self.scores.clear()

    def with_reference(self, values: Callable[[Sequence[int]], Tensor], indices: Sequence[int]) -> Tensor:
        """(N,) the reference's scores of examples with their answers; `values` takes those of the pairs."""
        return torch.cat([part for i in indices for part in (values([i]), self.scores[i])])

    def _answers(self, model: nn.Module, indices: Sequence[int], step: int) -> list[list[tuple[int, ...]]]:
        prompts = [self.trees[i].segments[0].ids for i in indices for _ in range(self.samples)]
        samplings = [
            Sampling(
                max_tokens=max(1, min(self.max_new_tokens, self.max_tokens - len(self.trees[i].segments[0].ids))),
                temperature=1.0, min_p=0.0, repetition_penalty=1.0,
                seed=(self.seed * SEEDS + step) * SEEDS + i * self.samples + k,
            )
            for i in indices for k in range(self.samples)
        ]  # fmt: skip
        core: Any = causal_lm(model)
        device = next(model.parameters()).device
        with self.passes.precision.context(device):
            said = decode_rows(lambda rows: TorchRows(core, rows, device=device), prompts, samplings, stop={self.end})
        whole = [(*each.tokens, *([self.end] if each.finish == "stop" else [])) for each in said]
        return [whole[start : start + self.samples] for start in range(0, len(whole), self.samples)]

    @contextlib.contextmanager
    def _standing_still(self, model: Any) -> Any:
        if self.reference is not None:
            yield self.reference
            return
        with model.disable_adapter():
            yield model
