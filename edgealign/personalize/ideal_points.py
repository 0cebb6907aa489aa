"""PAL: a user is a mix of a few prototypes, and likes what is near it (arXiv 2406.08469).

    PAL-A   reward = -|f(y) - a|^2,                a = sum_k w_k p_k
    PAL-B   reward = strength cos(a(prompt), f(y)),  a(prompt) = sum_k w_k g_k(prompt)        w = softmax(mean + user)

As released: K prototypes, softmax weights, a point (A) and prototypes that depend on the prompt under a cosine (B), K
numbers a user. Ours: f is linear on frozen features and g_k on the prompt's (the released f is a residual network on a
language model that is trained too); the squared distance and the logistic loss, so that margins are log-odds (released:
distance and hinge); and the prior N(0, 1 / precision) on the user's numbers, with a precision chosen on held-out users,
in place of twenty epochs from anywhere: without choices a user is everybody's mix, and few choices move it little.

Shape legend: N pairs, F features, D dimensions of the space of points, K prototypes, P prompt features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgealign.errors import UsageError
from edgealign.personalize.heads import Choices, Floats, State, learn_calibrated, minimise
from edgealign.personalize.lore import fit_population

DIMENSIONS, PROTOTYPES, STEPS, RIDGE = 16, 8, 300, 1e-4
LOOSE = 0.2  # the seen users' own precision while everything is learned together
PRECISIONS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0, 1e4)  # the last: everybody is the same
NEWTON_STEPS, HALVINGS, CLOSE, FAR = 40, 12, 1e-6, 3.0


class Parts(NamedTuple):
    """Margins as a function of the weights w: (offset + slope w) / sqrt(w gram w); without a gram, undivided."""

    offset: Tensor  # (N,)
    slope: Tensor  # (N, K)
    gram: Tensor | None  # (N, K, K)


@dataclass(frozen=True)
class PalA:
    """Points in a space; `mean`: everybody's logits of the prototypes."""

    projector: Annotated[Floats, "F D"]
    prototypes: Annotated[Floats, "K D"]
    mean: Annotated[Floats, "K"]
    scale: Annotated[Floats, "F"]
    precision: float = 1.0
    name: ClassVar[str] = "pal-a"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, prototypes: int = PROTOTYPES) -> PalA:
        learn = partial(_learn_a, seed=seed, prototypes=prototypes)
        return learn_calibrated(learn, choices, "precision", PRECISIONS, seed)

    @property
    def state_size(self) -> int:
        return len(self.mean)

    def fit(self, choices: Choices) -> State:
        return _fit(self._parts(choices), torch.from_numpy(self.mean), self.precision)

    def margins(self, state: State, pairs: Choices) -> Floats:
        return _margins(self._parts(pairs), torch.from_numpy(self.mean + state.astype(np.float64)))

    def _parts(self, pairs: Choices) -> Parts:
        return _parts_a(*pairs.scaled(self.scale), torch.from_numpy(self.projector), torch.from_numpy(self.prototypes))


@dataclass(frozen=True)
class PalB:
    """Directions that depend on the prompt; `turn` (P = 0 without prompts) is how."""

    projector: Annotated[Floats, "F D"]
    prototypes: Annotated[Floats, "K D"]
    turn: Annotated[Floats, "P K D"]
    mean: Annotated[Floats, "K"]
    scale: Annotated[Floats, "F"]
    strength: float = 1.0
    precision: float = 1.0
    name: ClassVar[str] = "pal-b"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, prototypes: int = PROTOTYPES) -> PalB:
        learn = partial(_learn_b, seed=seed, prototypes=prototypes)
        return learn_calibrated(learn, choices, "precision", PRECISIONS, seed)

    @property
    def state_size(self) -> int:
        return len(self.mean)

    def fit(self, choices: Choices) -> State:
        return _fit(self._parts(choices), torch.from_numpy(self.mean), self.precision)

    def margins(self, state: State, pairs: Choices) -> Floats:
        return _margins(self._parts(pairs), torch.from_numpy(self.mean + state.astype(np.float64)))

    def _parts(self, pairs: Choices) -> Parts:
        width = self.turn.shape[0]
        if width and (pairs.prompts is None or pairs.prompts.shape[1] != width):
            raise UsageError("pal-b", f"was learned with {width} prompt features, which are not here", "give prompts")
        prompts = torch.from_numpy(pairs.prompts.astype(np.float64)) if width and pairs.prompts is not None else None
        projector, prototypes, turn = map(torch.from_numpy, (self.projector, self.prototypes, self.turn))
        chosen, rejected = pairs.scaled(self.scale)
        return _parts_b(chosen, rejected, prompts, projector, prototypes, turn, torch.tensor(self.strength))


def _parts_a(chosen: Tensor, rejected: Tensor, projector: Tensor, prototypes: Tensor) -> Parts:
    near, far = chosen @ projector, rejected @ projector
    return Parts((far**2).sum(1) - (near**2).sum(1), 2 * (near - far) @ prototypes.T, None)


def _parts_b(
    chosen: Tensor, rejected: Tensor, prompts: Tensor | None, projector: Tensor, prototypes: Tensor, turn: Tensor,
    strength: Tensor,
) -> Parts:  # fmt: skip
    near, far = (torch.nn.functional.normalize(side @ projector, dim=1) for side in (chosen, rejected))
    bases = prototypes.expand(len(near), *prototypes.shape)
    if prompts is not None:
        bases = bases + torch.einsum("np,pkd->nkd", prompts, turn)
    slope = strength * torch.einsum("nkd,nd->nk", bases, near - far)
    return Parts(torch.zeros_like(slope[:, 0]), slope, bases @ bases.transpose(1, 2))


def _margins(parts: Parts, logits: Tensor) -> Floats:
    found: Floats = _margins_of(parts, torch.softmax(logits, -1).expand(parts.slope.shape)).numpy()
    return found


def _margins_of(parts: Parts, weights: Tensor) -> Tensor:
    """(N,) for (N, K) weights."""
    raw = parts.offset + (parts.slope * weights).sum(1)
    if parts.gram is None:
        return raw
    return raw / torch.einsum("nk,nkj,nj->n", weights, parts.gram, weights).clamp(min=1e-12).sqrt()


def _fit(parts: Parts, mean: Tensor, precision: float) -> State:
    """(K,) MAP by Gauss-Newton with halved steps: the softmax makes it non-convex, the prior keeps it near the mean."""
    own = torch.zeros_like(mean)
    prior = precision * torch.eye(len(mean), dtype=mean.dtype)

    def cost(values: Tensor) -> float:
        margins = _margins_of(parts, torch.softmax(mean + values, -1).expand(parts.slope.shape))
        return float(torch.nn.functional.softplus(-margins).sum() + 0.5 * precision * (values**2).sum())

    here = cost(own) if len(parts.slope) else 0.0
    for _ in range(NEWTON_STEPS if len(parts.slope) else 0):
        weights = torch.softmax(mean + own, -1)
        margins, slopes = _linearise(parts, weights)
        wrong = torch.sigmoid(-margins)
        gradient = precision * own - slopes.T @ wrong
        change = torch.linalg.solve((slopes * (wrong * (1 - wrong))[:, None]).T @ slopes + prior, gradient)
        size = 1.0
        for _ in range(HALVINGS):
            if (there := cost(own - size * change)) < here:
                break
            size /= 2
        else:
            break
        own, done, here = own - size * change, here - there < CLOSE, there
        if done:
            break
    found: State = own.numpy().astype(np.float32)
    return found


def _linearise(parts: Parts, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) margins and (N, K) their slopes in the logits."""
    margins, slopes = _margins_of(parts, weights.expand(parts.slope.shape)), parts.slope
    if parts.gram is not None:
        turned = parts.gram @ weights  # (N, K)
        length = (turned @ weights).clamp(min=1e-12).sqrt()[:, None]
        slopes = slopes / length - margins[:, None] * turned / length**2
    return margins, slopes * weights - (slopes @ weights)[:, None] * weights


def _start(choices: Choices, prototypes: int, seed: int) -> tuple[Floats, Tensor, list[Tensor]]:
    """Scale, who chose, random points; the last of the list: the seen users' own numbers."""
    scale = choices.gaps.std(0).clip(min=1e-9)
    names, place = np.unique(choices.users, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    width = choices.chosen.shape[1]

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    dimensions = min(DIMENSIONS, width)
    points = [
        0.3 * random(width, dimensions) / width**0.5, random(prototypes, dimensions),
        torch.zeros(prototypes, dtype=torch.float64), 0.1 * random(len(names), prototypes),
    ]  # fmt: skip
    return scale, torch.from_numpy(place), points


def _regularised(margins: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
    value = torch.nn.functional.softplus(-margins).mean() + 0.5 * LOOSE * (own**2).sum() / len(margins)
    for part in shared:
        value = value + 0.5 * RIDGE * (part**2).sum()
    return value


def _learn_a(choices: Choices, *, seed: int, prototypes: int) -> PalA:
    scale, who, parts = _start(choices, prototypes, seed)
    chosen, rejected = choices.scaled(scale)
    # A far point and features close together are nearly a direction: it starts as everybody's.
    parts[0][:, 0] = fit_population(chosen - rejected, RIDGE) / (2 * FAR)
    parts[1][:, 0] = FAR

    def loss() -> Tensor:
        weights = torch.softmax(parts[2] + parts[3], -1)[who]
        return _regularised(_margins_of(_parts_a(chosen, rejected, *parts[:2]), weights), parts[3], parts[:3])

    found = [part.numpy() for part in minimise(parts, loss, STEPS)]
    return PalA(found[0], found[1], found[2], scale)


def _learn_b(choices: Choices, *, seed: int, prototypes: int) -> PalB:
    scale, who, parts = _start(choices, prototypes, seed)
    chosen, rejected = choices.scaled(scale)
    prompts = None if choices.prompts is None else torch.from_numpy(choices.prompts.astype(np.float64))
    turn = torch.zeros(0 if prompts is None else prompts.shape[1], *parts[1].shape, dtype=torch.float64)
    parts = [*parts, turn, torch.ones((), dtype=torch.float64)]

    def loss() -> Tensor:
        weights = torch.softmax(parts[2] + parts[3], -1)[who]
        shared = _parts_b(chosen, rejected, prompts, parts[0], parts[1], parts[4], parts[5].exp())
        return _regularised(_margins_of(shared, weights), parts[3], [*parts[:3], parts[4]])

    found = minimise(parts, loss, STEPS)
    projector, points, mean, _, turned = (part.numpy() for part in found[:5])
    return PalB(projector, points, turned, mean, scale, float(found[5].exp()))
