"""What the few-shot evaluation is made of: a model's answers with their attributes and features.

Shape legend: A answers, F features, C components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import Artifact
from edgealign.data.forms import Pair
from edgealign.personalize.candidates import Candidates, read_answers
from edgealign.personalize.features import Cache, Features, main_components
from edgealign.personalize.recipes import FewShotRecipe
from edgealign.personalize.text_users import Pool
from edgealign.personalize.traits import Whitening
from edgealign.runtimes.session import open_session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Material:
    """A pool with what it was made of: model, texts in the pool's order, the features' map and components."""

    model: Path
    pool: Pool
    texts: tuple[str, ...]
    raw: Floats  # (A, F) features; the last is the model's likelihood
    features: Features
    components: Floats  # (F, C)
    whitening: Whitening
    rows: tuple[Candidates, ...]

    def pair(self, chosen: int, rejected: int) -> Pair:
        """Two answers to one prompt, by their numbers in the pool."""
        return Pair(self.rows[self.pool.prompts[chosen]].prompt, self.texts[chosen], self.texts[rejected])


def read_material(
    recipe: FewShotRecipe, source: Artifact, rows: Sequence[Candidates], tokenizer: Any, cache: Path | None
) -> Material:
    """Every candidate as text, attributes and features."""
    texts = [text for row in rows for text in row.answers]
    prompts = np.array([number for number, row in enumerate(rows) for _ in row.answers])
    features = Features.of_model(source.path)
    session = open_session(source.path, threads=recipe.threads or None)
    try:
        found = read_answers(features, session, tokenizer, rows, Cache(cache, source.digest))
    finally:
        session.close()
    whitening = Whitening.of(texts, recipe.traits)
    components = main_components(found, recipe.components)
    pool = Pool(found @ components, whitening.read(texts), prompts)
    return Material(source.path, pool, tuple(texts), found, features, components, whitening, tuple(rows))
