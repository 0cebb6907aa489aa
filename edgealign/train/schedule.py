"""What the steps of a run are, how many, and how its learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edgealign.progress import say
from edgealign.train import processes
from edgealign.train.recipes import PretrainRecipe, TrainRecipe
from edgealign.train.scoring import Passes
from edgealign.train.tasks import Task

FEW_STEPS = 50  # fewer optimizer steps than this rarely change a model visibly (lqh warns at the same number)


Step = list[list[int]]  # examples of one optimizer step, one list per forward pass
Order = Callable[[int], Sequence[int] | None]  # epoch from 0 -> all examples in order; None: shuffled by the seed


def wanted_steps(recipe: TrainRecipe) -> int:
    """Optimizer steps after which a run ends, 0: with its epochs."""
    if isinstance(recipe, PretrainRecipe) and recipe.total_tokens and not recipe.max_steps:
        return max(1, recipe.total_tokens // (recipe.batch_size * recipe.max_tokens))
    return recipe.max_steps


def epochs_of(n_examples: int, recipe: TrainRecipe) -> int:
    """How often the data is seen at most: `epochs`, or what `total_tokens` needs."""
    if not isinstance(recipe, PretrainRecipe) or not recipe.total_tokens:
        return recipe.epochs
    return -(-recipe.total_tokens // (n_examples * recipe.max_tokens))


def plan_steps(task: Task, recipe: TrainRecipe, passes: Passes, order: Order | None = None) -> list[Step]:
    """All optimizer steps of a run: every epoch shuffles anew, the last step of an epoch may be smaller.

    `order` may put an epoch in another order. It must give the same answer every time: a resumed run asks again.
    Of several processes each has the same number of passes in a step, where the step has enough examples.
    """
    steps: list[Step] = []
    n = len(task.trees)
    n_wanted = wanted_steps(recipe)
    for epoch in range(epochs_of(n, recipe)):
        given = order(epoch) if order is not None else None
        places = np.random.default_rng((recipe.seed, epoch)).permutation(n).tolist() if given is None else given
        for start in range(0, n, recipe.batch_size):
            together = places[start : start + recipe.batch_size]
            steps.append(passes.groups(task.trees, together, parts=processes.count()))
            if len(steps) == n_wanted:
                return steps
    return steps


def learning_rate_share(step: int, n_steps: int, recipe: TrainRecipe) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0): a linear rise, then the decay."""
    n_rising = int(recipe.warmup_share * n_steps)
    if step < n_rising:
        return (step + 1) / (n_rising + 1)
    progress = (step - n_rising) / max(1, n_steps - n_rising)
    floor = recipe.final_lr_share
    if recipe.schedule == "wsd":
        rest = min(1.0, max(0.0, (1.0 - progress) / recipe.decay_share))
        return floor + (1.0 - floor) * rest
    if recipe.schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return floor + (1.0 - floor) * (1.0 - min(progress, 1.0)) if recipe.schedule == "linear" else 1.0


def warn_few_steps(n_steps: int) -> str | None:
    """The warning for a run too short to show much, said and returned."""
    if n_steps >= FEW_STEPS:
        return None
    message = f"only {n_steps} optimizer steps: fewer than {FEW_STEPS} rarely change a model visibly"
    say(f"warning: {message} (more --epochs, or a smaller --batch-size)")
    return message
