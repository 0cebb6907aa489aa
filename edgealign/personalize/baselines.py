"""What a few choices are worth without what others taught: the model's likelihood, a prompt, a fit from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.personalize.few_shot_material import Material
from edgealign.personalize.heads import Choices
from edgealign.personalize.lore import Basis, fit_users
from edgealign.personalize.planted import KS, Person
from edgealign.personalize.recipes import FewShotRecipe
from edgealign.personalize.text_users import MOST_CHOICES, TextUsers

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

PROMPTED, PROMPTED_PAIRS = (0, 1, 2, 4, 8), 12  # numbers of choices in a prompt, pairs that are asked behind it


def likelihood(material: Material, users: TextUsers, prompts: Any, recipe: FewShotRecipe, seed: int) -> list[float]:
    """The model without anybody: it likes what it would say."""
    _, shown = users.choose(prompts, recipe.asked, seed=seed + 1, noiseless=True)
    gaps = material.raw[shown[:, 0], -1] - material.raw[shown[:, 1], -1]
    right = ((gaps > 0) + 0.5 * (gaps == 0)).reshape(users.count, -1)
    return [float(value) for value in right.mean(1)]


def scratch(people: Sequence[Person], taught: Choices) -> dict[int, list[float]]:
    """Ridge logistic regression on the user's own choices alone: nothing that others taught."""
    scale: Floats = np.asarray(taught.gaps.std(0).clip(min=1e-9), dtype=np.float64)
    size = len(scale)
    basis = Basis(np.zeros(size), np.eye(size) / size**0.5, scale)
    found: dict[int, list[float]] = {}
    for k in KS:
        for person in people:
            own, asked = (np.asarray(each.gaps, dtype=np.float64) for each in (person.own, person.held_out))
            weights = fit_users(basis.project(own[:k])[None]).weights[0]
            margins = basis.reward(asked, weights)
            found.setdefault(k, []).append(float(np.mean((margins > 0) + 0.5 * (margins == 0))))
    return found


def prompted(
    material: Material, users: TextUsers, own_on: Any, asked_on: Any, recipe: FewShotRecipe, seed: int
) -> dict[int, list[float]]:
    """The first users' choices in the prompt: the same choices and, of the same held-out pairs, the first."""
    from edgealign.models.load import load_model, load_tokenizer
    from edgealign.personalize.prompted import ranked_right
    from edgealign.train.precision import fixed_threads
    from edgealign.train.scoring import Passes

    if not recipe.prompted:
        return {}
    _, own = users.choose(own_on, MOST_CHOICES, seed=seed, flips=recipe.flips)
    _, asked = users.choose(asked_on, recipe.asked, seed=seed + 1, noiseless=True)
    sides = [
        [[material.pair(*places) for places in shown[:count]] for shown in each.reshape(users.count, -1, 2)]
        for each, count in ((own, max(PROMPTED)), (asked, PROMPTED_PAIRS))
    ]
    people = list(zip(*sides, strict=True))[: recipe.prompted]
    with fixed_threads(recipe.threads):
        network = load_model(material.model)
        passes = Passes.reading(network)
        tokenizer = load_tokenizer(material.model)
        return {k: ranked_right(network, tokenizer, passes, people, k) for k in PROMPTED}
