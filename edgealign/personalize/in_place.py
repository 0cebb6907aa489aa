"""A user's choices become a version in the registry, right after a choice: fit, check, publish, use.

    learned = learn(users, "ana", basis, pairs, rows)     # Learned(words="shorter", version=3, ...)

What the assistant and the terminal do after each choice; `edgealign personalize` does it from a file. A version is
published only if the choices, each predicted from the others, are predicted at least as well as by the population.
What is published holds numbers and digests: no text, no path.

Where a LoRA is in use, numbers take its place only if they are better on `LEAST` or more choices that it never saw:

    foreseen(rows, newer) > share_that_the_lora_ranks_right

Shape legend: k choices, B rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgealign.artifact import Input, hash_json
from edgealign.data.forms import Pair, to_json
from edgealign.errors import CheckFailed
from edgealign.personalize import embedding
from edgealign.personalize.basis import OpenBasis
from edgealign.personalize.recipes import EmbeddingRecipe
from edgealign.personalize.users import Users, UserVersion, scratch

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


LEAST = 4  # held-out choices: with fewer one lucky guess decides


@dataclass(frozen=True)
class Learned:
    """What choices taught; `version` None: nothing was published, for this reason."""

    choices: int
    words: str = ""
    version: UserVersion | None = None
    reason: str = ""
    seconds: float = 0.0


def learn(users: Users, name: str, basis: OpenBasis, pairs: Sequence[Pair], rows: Floats) -> Learned:
    """Fit on (k, B + 1) choices and make the result the version in use, if it does no harm."""
    if not len(rows):
        return Learned(0, reason="nothing was preferred yet")
    started_s = time.perf_counter()
    # Choices by their digest, and no path: nothing of a user is in an adapter's manifest.
    digest = hash_json([to_json(pair) for pair in pairs])
    inputs = [Input("basis", "basis", basis.digest, ""), Input("choices", "file", digest, "")]
    with scratch(users.folder) as folder:
        try:
            made = embedding.publish_user(
                EmbeddingRecipe(), basis, rows, user=name, out=folder / "adapter", inputs=inputs, licences={}, facts={}
            )
        except CheckFailed:
            reason = "these choices are not foreseen better with it than without: kept as it is"
            return Learned(len(rows), reason=reason)
        words = str(made.meta["words"])
        known = users.user(name).versions if name in users.names() else ()
        if known and known[-1].digest == made.digest:
            return Learned(len(rows), words, reason="nothing new in it")
        version = users.add_version(name, made.path)
    return Learned(len(rows), words, version, seconds=time.perf_counter() - started_s)


def foreseen(rows: Floats, places: Sequence[int]) -> float:
    """Share of the choices at `places` of (k, B + 1) that a fit on all others ranks as chosen; a tie counts half."""
    import torch

    from edgealign.personalize.lore import fit_users

    others = torch.ones(len(places), len(rows), dtype=torch.float64)
    others[range(len(places)), list(places)] = 0
    weights = fit_users(torch.from_numpy(rows).expand(len(places), -1, -1), others).weights  # (n, B)
    asked = rows[list(places)]
    return ranked_right(asked[:, 0] + (asked[:, 1:] * weights).sum(1))


def ranked_right(margins: Floats) -> float:
    """Share of (k,) margins, of chosen minus rejected, above 0; a tie counts half."""
    return float(((margins > 0) + 0.5 * (margins == 0)).mean())
