"""A step whose examples are compared with each other, cut into passes all the same.

Its loss is no sum over passes. But it is a function of log-probabilities alone, of which there are few: one forward
pass over the whole step finds them without keeping anything, the loss is taken of all at once, and its gradient by each
log-probability is what the passes then carry back, one after the other (GradCache, arXiv 2101.06983). So the size of a
pass changes no gradient here either; it costs a second forward pass, where a step has more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgealign.train import processes
from edgealign.train.lanes import Lanes, Turn
from edgealign.train.logprobs import is_sharded
from edgealign.train.scoring import Passes
from edgealign.train.tasks import Couples, Learned


@dataclass(frozen=True)
class Whole:
    """What the loss of a whole step says."""

    loss: Tensor  # () detached: summed over the examples
    metrics: dict[str, float]  # summed
    gradients: dict[int, Tensor]  # by number of the pass: (n,) of the loss, by the pass's log-probabilities


def look(model: nn.Module, task: Couples, passes: Passes, groups: Sequence[Sequence[int]], lanes: Lanes) -> Whole:
    """The loss of a step of these passes, and what each of them has to carry back. Every process calls it.

    Random numbers (of a LoRA's dropout) are put back, so that the passes meet the same ones again.
    """
    device = next(model.parameters()).device

    def read(number: int, _: Turn) -> Learned:
        batch = passes.batch(task.trees, groups[number], device)
        with torch.no_grad():
            return Learned(passes.logprobs(model, batch).cpu(), batch.sequence.cpu(), batch.lengths.cpu())

    numbers = processes.share(range(len(groups)))
    with torch.random.fork_rng():
        mine = dict(lanes.each(read, numbers, [passes.n_tokens(task.trees, groups[number]) for number in numbers]))
        for _ in range(processes.idle(groups) if is_sharded(model) else 0):
            read(len(groups) - 1, Turn())
    found = {number: learned for part in processes.gather(mine) for number, learned in part.items()}
    whole = Learned.join([found[number] for number in range(len(groups))])
    logps = whole.logps.requires_grad_()
    loss, metrics = task.loss(logps, whole, [i for group in groups for i in group])
    (gradient,) = torch.autograd.grad(loss, logps)
    parts = torch.split(gradient, [len(found[number].logps) for number in range(len(groups))])
    return Whole(loss.detach(), metrics, dict(enumerate(parts)))
