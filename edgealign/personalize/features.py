"""What personal rewards see of an answer: frozen states of the model that ships, read through any session.

    features = Features(model)                       # the map from logits to states, from the model's head
    phi = features.of(session, prompt, answer)       # (F,), the same from torch and from every bundle
    folded = features.fold(basis)                    # what a device keeps: one number per token and direction
    folded.of(session, prompt, answer)               # (B + 1,)

No runtime has to return hidden states. The logits are the last state times the head's matrix, which has many more rows
than columns, so the state is the logits times its (ridge-regularised) pseudo-inverse. All of it is linear and a basis
is too: folded together, a device keeps (V, B + 1) numbers and never sees a state.

Features of an answer: the mean of its states, the last one, the mean of its tokens' embeddings, ln(1 + its tokens), and
how likely it is (mean log-probability, nats per token).

Shape legend: T answer tokens, V vocabulary, D hidden size, F = 3 D + 2 features, C main components, B rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.errors import ArtifactError, UsageError, writing
from edgealign.runtimes.session import Session, score

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.personalize.lore import Basis

    Floats = npt.NDArray[np.float64]

SCALARS = 2  # size and likelihood
RIDGE = 1e-6  # of the head's mean squared singular value: a null direction of the head stays out of the states


@dataclass(frozen=True)
class Pooled:
    """What is read of one answer: (V,) mean and last logits after its tokens, the tokens, nats per token."""

    mean: Floats
    last: Floats
    tokens: tuple[int, ...]
    likelihood: float

    @property
    def scalars(self) -> Floats:
        return np.array([np.log1p(len(self.tokens)), self.likelihood])


def pool(session: Session, prompt: Sequence[int], answer: Sequence[int]) -> Pooled:
    """Read an answer in one pass where the runtime can do that; empties the session's state.

    Raises:
        UsageError: an answer without tokens.
    """
    if not len(answer):
        raise UsageError("answer", "has no tokens", "leave empty answers out")
    if not len(prompt):
        raise UsageError("prompt", "has no tokens", "give at least a start token")
    logits = score(session, [*prompt, *answer])[len(prompt) - 1 :].astype(np.float64)
    before = logits[:-1]
    top = before.max(-1, keepdims=True)
    total = np.log(np.exp(before - top).sum(-1)) + top[:, 0]
    likelihood = float((before[np.arange(len(answer)), list(answer)] - total).mean())
    return Pooled(logits[1:].mean(0), logits[-1], tuple(answer), likelihood)


class Features:
    """The map of one model from what is pooled to features.

    Args:
        head: (V, D), the matrix whose product with a state are the logits.
        embedding: (V, D); None where the model shares the two.
    """

    def __init__(self, head: npt.ArrayLike, embedding: npt.ArrayLike | None = None) -> None:
        matrix = np.asarray(head, dtype=np.float64)
        gram = matrix.T @ matrix
        gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        self.inverse: Floats = np.asarray(np.linalg.solve(gram, matrix.T).T, dtype=np.float64)  # (V, D)
        self.embedding: Floats = matrix if embedding is None else np.asarray(embedding, dtype=np.float64)

    @classmethod
    def of_model(cls, model: Path) -> Features:
        """Of a model directory."""
        from edgealign.models.load import load_model

        network: Any = load_model(model)
        head, embedding = network.get_output_embeddings().weight, network.get_input_embeddings().weight
        shared = head.data_ptr() == embedding.data_ptr()
        return cls(head.detach().float().numpy(), None if shared else embedding.detach().float().numpy())

    @property
    def size(self) -> int:
        return 3 * int(self.inverse.shape[1]) + SCALARS

    def of(self, session: Session, prompt: Sequence[int], answer: Sequence[int]) -> Floats:
        """(F,) of one answer."""
        return self.read(pool(session, prompt, answer))

    def read(self, pooled: Pooled) -> Floats:
        """(F,) of what was pooled."""
        bag = self.embedding[list(pooled.tokens)].mean(0)
        return np.concatenate([pooled.mean @ self.inverse, pooled.last @ self.inverse, bag, pooled.scalars])

    def fold(self, basis: Basis) -> Folded:
        """A basis over these features as numbers per token.

        Raises:
            UsageError: a basis over other features.
        """
        if len(basis.scale) != self.size:
            raise UsageError(f"{len(basis.scale)} features", f"are not this model's {self.size}", "learn it again")
        columns = np.concatenate([basis.mean[:, None], basis.directions], 1) / basis.scale[:, None]  # (F, B + 1)
        d = self.inverse.shape[1]
        parts = self.inverse @ columns[:d], self.inverse @ columns[d : 2 * d], self.embedding @ columns[2 * d : 3 * d]
        return Folded(*(part.astype(np.float32) for part in (*parts, columns[3 * d :])))


def main_components(features: Floats, count: int) -> Floats:
    """(F, C) such that features times it are the main components of these answers' features (A, F).

    Each feature is divided by its deviation first. A component's own deviation is the root of what it was: the first
    ones know more of a taste than the last, and less than their size says (the starter's answers, planted users: 0.627
    against 0.605 without the root and 0.582 at equal size, 32 choices). There are no more components than answers.
    """
    scale = features.std(0)
    scale = np.where(scale > 1e-9, scale, np.inf)  # one that never varies says nothing
    _, sizes, right = np.linalg.svd((features - features.mean(0)) / scale, full_matrices=False)
    count = min(count, int((sizes > 1e-9 * sizes[0]).sum()))
    deviation = sizes[:count] / len(features) ** 0.5
    found: Floats = (right[:count] / scale).T / np.sqrt(deviation * deviation.mean())
    return found


@dataclass(frozen=True)
class Folded:
    """A reward basis as a device keeps it: (V, B + 1) for mean and last logits and tokens, (2, B + 1) for scalars."""

    mean: npt.NDArray[np.float32]
    last: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.float32]
    scalars: npt.NDArray[np.float32]

    @property
    def rank(self) -> int:
        return int(self.scalars.shape[1]) - 1

    def of(self, session: Session, prompt: Sequence[int], answer: Sequence[int]) -> Floats:
        """(B + 1,): everybody's reward of an answer, then the directions'."""
        return self.read(pool(session, prompt, answer))

    def read(self, pooled: Pooled) -> Floats:
        """(B + 1,) of what was pooled."""
        found: Floats = (
            pooled.mean @ self.mean
            + pooled.last @ self.last
            + self.tokens[list(pooled.tokens)].mean(0)
            + pooled.scalars @ self.scalars
        )
        return found

    def save(self, file: Path) -> None:
        from safetensors.numpy import save_file

        with writing(file):
            save_file({field.name: getattr(self, field.name) for field in fields(self)}, file)

    @classmethod
    def load(cls, file: Path) -> Folded:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, damaged, or something else.
        """
        from safetensors.numpy import load_file

        try:
            found = load_file(file)
            folded = cls(*(found[field.name] for field in fields(cls)))
            table = (len(folded.mean), folded.rank + 1)
            fits = {folded.mean.shape, folded.last.shape, folded.tokens.shape} == {table}
            fits = fits and len(folded.scalars) == SCALARS and all(np.isfinite(part).all() for part in found.values())
        except Exception as error:  # safetensors raises a class of its own for each kind of damage
            raise ArtifactError(file, "is no readable basis", "learn it again: edgealign basis") from error
        if not fits:
            raise ArtifactError(file, "holds no basis that fits together", "learn it again: edgealign basis")
        return folded


class Cache:
    """Features on disk by the digests of model and text, so that an answer is read once.

    Args:
        folder: None keeps nothing.
        key: what the features depend on besides the text: the model's digest, and the bundle's where one is read.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder, self.key = folder, key

    def of(self, source: Features | Folded, session: Session, prompt: Sequence[int], answer: Sequence[int]) -> Floats:
        file = self._file(type(source).__name__, prompt, answer)
        if file is not None and file.is_file():
            try:
                found: Floats = np.load(file, allow_pickle=False)
                return found
            except (OSError, ValueError):  # of a run that was killed while it wrote
                file.unlink()
        found = source.of(session, prompt, answer)
        if file is not None:
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part.npy")
                np.save(part, found)
                part.replace(file)
        return found

    def _file(self, kind: str, prompt: Sequence[int], answer: Sequence[int]) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(repr((self.key, kind, list(prompt), list(answer))).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.npy"
