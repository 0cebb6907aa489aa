"""A user as a weighted sum of LoRAs, one for each direction of a basis: weights from the first choice on.

    edgealign personalize --method lora-mix --basis BASIS --loras LORAS --choices ana.jsonl --user ana --out ana

The user's weights w on the basis are fitted as for an embedding (lore.py), and

    D = strength * sum_b w_b B_b A_b

as the user's reward is the weighted sum of the directions': to first order, what raises each of them raises the sum.
Rewarded soups (arXiv 2306.04488) sum whole models' weights alike. A sum of LoRAs is a LoRA, factors put together and
weight and scale in B: it is exported, verified and swapped as any other, and nothing is trained on the device. A sum
over the budget (budget.py) is halved, a few times, then refused.

Shape legend: B rank of the basis, r rank of one LoRA.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edgealign.artifact import Artifact, open_artifact, publish, refuse_existing
from edgealign.errors import UsageError
from edgealign.personalize.basis import open_basis
from edgealign.personalize.budget import Gauge, Spent, keep_within
from edgealign.personalize.budget_recipe import BudgetRecipe
from edgealign.personalize.embedding import Read, checked, read_user
from edgealign.personalize.lora import slug
from edgealign.personalize.lora_basis import open_loras
from edgealign.personalize.lowrank import Factors, wrap, write_factors
from edgealign.personalize.recipes import LoraMixRecipe
from edgealign.progress import say

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


def run(
    recipe: LoraMixRecipe, *, model: str | Path, basis: str | Path, loras: str | Path, choices: str | Path, user: str,
    out: Path, bundle: Path | None = None, budget: BudgetRecipe | None = None,
) -> Artifact:  # fmt: skip
    """Fit one user and publish the sum at `out`.

    Args:
        budget: None is the default one.

    Raises:
        InputError: no choices, a basis of another model, or LoRAs of another basis.
        CheckFailed: the user's choices are not predicted as well as by the population, or the sum is over budget;
            nothing is published.
    """
    out = Path(out)
    refuse_existing(out)
    budget = budget or BudgetRecipe()
    started_s = time.monotonic()
    own, parts = open_loras(loras, open_basis(basis))  # what is wrong with them is said before anything is read
    read = read_user(recipe, model=model, basis=basis, choices=choices, user=user, bundle=bundle)
    fitted, checks = checked(read.projected, recipe.prior_precision, user)
    weights = fitted.weights[0]
    spent = _spend(read, mix(parts, recipe.strength * weights), budget, slug(user))
    with publish(
        out, kind="adapter", format="peft", stage="personalize_mix", recipe=recipe,
        inputs=[*read.inputs, own.as_input("loras")], licences=read.licences,
    ) as draft:  # fmt: skip
        mixed = mix(parts, spent.scale * recipe.strength * weights)
        rank, count = write_factors(draft.dir, mixed, alpha=None, base_name=read.basis.model_digest)
        for check in (*checks, *spent.checks(budget)):
            draft.add_check(check)
        draft.meta.update(
            base_digest=read.basis.model_digest, basis_digest=read.basis.digest, user=slug(user), method="lora-mix",
            fitted=len(read.projected), words=read.basis.words(weights), weights=weights.tolist(), rank=rank,
            parameters=count, budget=spent.facts, choices=read.facts, seconds=round(time.monotonic() - started_s, 2),
        )  # fmt: skip
    made = open_artifact(out)
    say(f"user {slug(user)}: {len(read.projected)} choices, {made.meta['words'] or 'as everybody'}")
    return made


def _spend(read: Read, mixed: Mapping[str, Factors], budget: BudgetRecipe, user: str) -> Spent:
    """What the sum costs, as far as it may go."""
    from edgealign.models.load import load_model, load_tokenizer

    network = load_model(read.base.path)
    gauge = Gauge.of(network, load_tokenizer(read.base.path), read.prompts, read.base.path)
    layers = wrap(network, [], rank=1, scale=1.0, seed=0, population=mixed)

    def halve() -> None:
        for layer in layers.values():
            assert layer.frozen_b is not None
            layer.frozen_b.mul_(0.5)

    return keep_within(gauge, budget, user=user, halve=halve)


def mix(loras: Sequence[Mapping[str, Factors]], weights: Floats) -> dict[str, Factors]:
    """The weighted sum of LoRAs: factors put together, weights in B.

    Raises:
        UsageError: not one weight a LoRA.
    """
    if len(loras) != len(weights):
        raise UsageError(f"{len(weights)} weights", f"are not one for each of {len(loras)} LoRAs", "use their basis")
    mixed = {}
    for name in sorted({name for lora in loras for name in lora}):
        own = [(lora[name], float(weight)) for lora, weight in zip(loras, weights, strict=True) if name in lora]
        a = torch.cat([part.a for part, _ in own])
        b = torch.cat([part.b * weight for part, weight in own], dim=1)
        mixed[name] = Factors(a, b)
    return mixed


