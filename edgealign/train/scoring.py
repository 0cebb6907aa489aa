"""Forward passes over many examples, in passes of a token budget: reference scores and evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgealign.progress import bar
from edgealign.train import processes
from edgealign.train.adapt import lora_without_casts
from edgealign.train.lanes import Lanes, Turn, lanes_of, side_by_side
from edgealign.train.layout import Batch, Tree, arrange, lay_out, split_for, split_in_rows
from edgealign.train.logprobs import is_sharded, token_logprobs
from edgealign.train.precision import Precision, choose_precision
from edgealign.train.rows import Rows
from edgealign.train.shortconv import kernel_width, tree_rows
from edgealign.train.tasks import Attaches, Couples, Learned, Task, coupled

Read: TypeAlias = Callable[[nn.Module, Batch], Tensor]  # (N, ...) of a pass
Attach: TypeAlias = Callable[[Batch, Sequence[int]], Batch]

FULL_PASS = 2048  # tokens: smaller passes add gradients of the model's size more often, larger ones hold more
LORA_PASS = 256  # tokens; at least: below it the products of a layer lose speed
LORA_ACTIVATIONS = 512 * 2**20  # bytes
ACTIVATIONS = 136  # bytes that a layer keeps for backward, a token and an element of its width; LFM2 in 32 bits


def tokens_of_pass(model: nn.Module, *, lora: bool) -> int:
    """Tokens in a forward pass where nobody names a number.

    A LoRA's gradients are small, so that small passes cost nothing: on a CPU they hold half a GiB of activations. For
    LFM2-350M that is 256 tokens instead of 2,048: as quick, and 2.7 GiB in all instead of 4.5 (docs/performance.md).
    """
    if not lora or next(model.parameters()).is_cuda:
        return FULL_PASS
    config: Any = model.config
    shape = config.get_text_config()
    held = ACTIVATIONS * int(shape.num_hidden_layers) * int(shape.hidden_size)
    return max(LORA_PASS, min(FULL_PASS, LORA_ACTIVATIONS // held))


@dataclass(frozen=True)
class Passes:
    """How examples become forward passes of one model."""

    kernel: int
    pad_id: int
    tokens_per_pass: int  # of the passes that are side by side together
    precision: Precision
    lanes: int = 1  # passes that may be side by side

    @staticmethod
    def of(model: nn.Module, precision: Precision, *, tokens_per_pass: int, pad_id: int = 0) -> Passes:
        return Passes(kernel_width(model), pad_id, tokens_per_pass, precision)

    @staticmethod
    def for_training(
        model: nn.Module, precision: Precision, *, lora: bool, tokens_per_pass: int = 0, pad_id: int = 0
    ) -> Passes:
        """As large, and as many side by side, as suits the model and this machine. `lora`: it will get one.

        Several CPU threads must be known by now (`precision.fixed_threads`).
        """
        tokens = tokens_per_pass or tokens_of_pass(model, lora=lora)
        lanes = min(processes.gather(lanes_of(model, tokens, lora=lora)))  # every process cuts a step alike
        return Passes(kernel_width(model), pad_id, tokens, precision, lanes)

    @staticmethod
    def reading(model: nn.Module) -> Passes:
        """In 32 bits and whole passes: what only reads needs no other."""
        return Passes.of(model, choose_precision("float32", lora=False, n_parameters=0), tokens_per_pass=FULL_PASS)

    def groups(self, trees: Sequence[Tree] | Rows, indices: Sequence[int], *, parts: int = 1) -> list[list[int]]:
        """`indices` split so that each group fits a pass, and, where there are enough of them, in a number of groups
        that `parts` divides, and as many of these for every lane, if lanes would be at work then."""
        if self.lanes > 1:
            finer = self._split(trees, indices, self.tokens_per_pass // self.lanes, parts * self.lanes)
            sizes = [self.n_tokens(trees, group) for group in finer]
            if side_by_side(sizes, parts * self.tokens_per_pass, parts * self.lanes):
                return finer
        return self._split(trees, indices, self.tokens_per_pass, parts)

    def _split(
        self, trees: Sequence[Tree] | Rows, indices: Sequence[int], tokens: int, parts: int
    ) -> list[list[int]]:
        if isinstance(trees, Rows):
            return trees.groups(indices, tokens, parts=parts)
        lengths = [trees[i].n_tokens for i in indices]
        split = split_for(lengths, tokens, parts)
        ordered = [[group[i] for i in arrange([lengths[j] for j in group])] for group in split]
        return [[indices[i] for i in group] for group in ordered]

    def batch(self, trees: Sequence[Tree] | Rows, group: Sequence[int], device: torch.device | str) -> Batch:
        """The examples of one pass in the order of `group`, as rows that attention is quick on."""
        if isinstance(trees, Rows):
            return trees.batch(group, kernel=self.kernel).to(device)
        chosen = [trees[i] for i in group]
        rows = [[chosen[i] for i in row] for row in split_in_rows([tree.n_tokens for tree in chosen])]
        return lay_out(rows, kernel=self.kernel, pad_id=self.pad_id).to(device)

    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(N,) float32, in this precision."""
        with self.precision.context(batch.input_ids.device), lora_without_casts(model, self.precision):
            return token_logprobs(model, batch)

    @contextmanager
    def side_by_side(self, model: nn.Module) -> Iterator[Lanes]:
        """Within the block passes of `model` may run in lanes. It is made ready for all of them, as each would do by
        itself: what one undoes at its end another might be using."""
        with tree_rows(model), lora_without_casts(model, self.precision), Lanes(self.lanes, self.tokens_per_pass) as it:
            yield it

    def n_tokens(self, trees: Sequence[Tree] | Rows, group: Sequence[int]) -> int:
        """Of one pass."""
        return trees.width * len(group) if isinstance(trees, Rows) else sum(trees[i].n_tokens for i in group)


def score(
    model: nn.Module, trees: Sequence[Tree], passes: Passes, *, label: str = "scoring", shared: bool = False
) -> Tensor:
    """(sum of n_learned,) float32 on the CPU: log-probabilities in the order of the examples.

    `shared`: all processes of the run call this, and each scores its share.
    """
    return torch.cat([torch.empty(0), *read_tokens(model, trees, passes, passes.logprobs, label=label, shared=shared)])


def read_tokens(
    model: nn.Module, trees: Sequence[Tree], passes: Passes, read: Read, *, label: str, shared: bool = False
) -> list[Tensor]:
    """What `read` finds at the learned tokens of each example, (n_learned, ...) on the CPU. `shared`: as for `score`.
    """
    found: dict[int, Tensor] = {}
    for group, batch, values in _forward_all(model, trees, passes, label, shared=shared, read=read):
        per_tree = _learned_per_tree(trees, group)
        assert int(batch.lengths.sum()) == sum(per_tree)
        found.update(zip(group, torch.split(values.cpu(), per_tree), strict=True))
    if shared:
        found = {i: part for each in processes.gather(found) for i, part in each.items()}
    return [found[i] for i in range(len(trees))]


def evaluate(
    model: nn.Module, task: Task, passes: Passes, *, label: str = "evaluating", shared: bool = False
) -> dict[str, float]:
    """Mean loss and metrics over all examples of a task, without learning. `shared`: as for `score`.

    Where examples are compared with each other, each is with all others: the result does not depend on the passes.
    """
    if (together := coupled(task)) is not None:
        return _evaluate_at_once(model, task, together, passes, label, shared=shared)
    attach = task.attach if isinstance(task, Attaches) else None
    totals: Counter[str] = Counter()
    weight = 0
    for group, batch, logps in _forward_all(model, task.trees, passes, label, shared=shared, attach=attach):
        loss, metrics = task.loss(logps, batch, group)
        totals.update({"loss": float(loss), **metrics})
        weight += sum(task.weight(i) for i in group)
    if shared:
        totals, weight = processes.add_counts(totals, weight)
    return {name: value / max(weight, 1) for name, value in sorted(totals.items())}


def _evaluate_at_once(
    model: nn.Module, task: Task, together: Couples, passes: Passes, label: str, *, shared: bool
) -> dict[str, float]:
    mine = [
        (group, Learned(logps.cpu(), batch.sequence.cpu(), batch.lengths.cpu()))
        for group, batch, logps in _forward_all(model, task.trees, passes, label, shared=shared)
    ]
    every = [each for part in (processes.gather(mine) if shared else [mine]) for each in part]
    indices = [i for group, _ in every for i in group]
    with torch.no_grad():
        whole = Learned.join([learned for _, learned in every])
        loss, metrics = together.loss(whole.logps, whole, indices)
    weight = sum(task.weight(i) for i in indices)
    found = {"loss": float(loss), **metrics}
    return {name: value / max(weight, 1) for name, value in sorted(found.items())}


def _forward_all(
    model: nn.Module,
    trees: Sequence[Tree],
    passes: Passes,
    label: str,
    *,
    shared: bool = False,
    read: Read | None = None,
    attach: Attach | None = None,
) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """Every pass with what `read` finds in it (log-probabilities, if it is not given)."""
    read = read or passes.logprobs
    device = next(model.parameters()).device
    was_training = model.training

    def forward(group: list[int], _: Turn) -> tuple[Batch, Tensor]:
        batch = passes.batch(trees, group, device)
        if attach is not None:
            batch = attach(batch, group)
        with torch.no_grad():
            return batch, read(model, batch)

    model.eval()
    try:
        groups = passes.groups(trees, range(len(trees)))
        mine = list(processes.share(groups)) if shared else groups
        with bar(total=len(mine), label=label) as advance, passes.side_by_side(model) as lanes:
            sizes = [passes.n_tokens(trees, group) for group in mine]
            for group, (batch, values) in lanes.each(forward, mine, sizes):
                yield group, batch, values
                advance(1, "")
            for _ in range(processes.idle(groups) if shared and is_sharded(model) else 0):
                forward(groups[-1], Turn())
    finally:
        model.train(was_training)


def _learned_per_tree(trees: Sequence[Tree], group: Sequence[int]) -> list[int]:
    return [trees[i].n_learned for i in group]
