"""Users as a few numbers: a reward basis shared by all, and each user's weights by MAP from a handful of choices.

    basis = learn_basis(gaps, users, rank=8)           # many seen users: (N, F) feature gaps, (N,) who chose
    fitted = fit_users(basis.project(new_gaps))        # (U, k, F): a new user's choices -> (U, B) weights
    reward = basis.reward(features, fitted.weights[0])

The reward of an answer with features phi is (mean + directions w)ᵀ phi: `mean` is everybody's direction, `directions`
(F, B) are the ways in which people differ, w is the user. This is LoRe (arXiv 2504.14439) with two corrections that
decide at few choices: weights have a sign (a softmax cannot dislike), and a Gaussian prior learned from the seen users
(the released few-shot step starts at random without any, and is worse than no personalisation at one to four choices).
Signed weights around a population direction follow PReF (arXiv 2503.06358) and the LoRe-BasisInterp replication.
`fit_released` is LoRe's few-shot step as released, kept as a baseline under its own name.

Shape legend: N choices, F features, B rank, U users, k choices of a user. A gap is features of the chosen answer minus
those of the rejected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgealign.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

NEWTON_STEPS, WHOLE_STEP = 40, 0.25
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a user's loss, in the norm of its curvature
CHUNK = 16_384  # users fitted at once
EM_ROUNDS, REFINE_STEPS = 3, 60
HELD_OUT = 4  # every fourth user decides how far everybody's direction and the others reach
REACHES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  # the first not for everybody's: it breaks ties
GIVEN = (0, 1, 4, 16)  # choices of such a user, by which the rest is predicted


@dataclass(frozen=True)
class Basis:
    """`scale`: what features are divided by, one number: they are expected on scales that can be compared.

    Weights of the seen users have mean 0 and covariance 1: the prior is N(0, 1).
    """

    mean: Floats  # (F,)
    directions: Floats  # (F, B)
    scale: Floats  # (F,)

    @property
    def rank(self) -> int:
        return int(self.directions.shape[1])

    def project(self, gaps: Floats) -> Tensor:
        """(..., F) gaps -> (..., B + 1): everybody's part first, then the directions'."""
        scaled = np.asarray(gaps) / self.scale
        return torch.from_numpy(np.concatenate([(scaled @ self.mean)[..., None], scaled @ self.directions], -1))

    def reward(self, features: Floats, weights: Floats) -> Floats:
        """(..., F) and (B,) -> (...,): the user's reward, comparable within a prompt."""
        found: Floats = (np.asarray(features) / self.scale) @ (self.mean + self.directions @ weights)
        return found


@dataclass(frozen=True)
class Fitted:
    """(U, B) weights and (U, B, B) posterior covariances (Laplace)."""

    weights: Floats
    covariance: Floats


def fit_users(projected: Tensor, mask: Tensor | None = None, *, precision: float = 1.0) -> Fitted:
    """MAP weights of many users at once: Newton's method on a convex loss, with the prior N(0, 1 / precision).

    Args:
        projected: (U, k, B + 1), what `Basis.project` returns; no choices at all (k = 0) give zeros. In 32-bit floats
            it is half the work, to a thousandth of a posterior's deviation.
        mask: (U, k) which choices there are; None: all.
    """
    count, choices, width = projected.shape
    rank = width - 1
    weights = torch.zeros(count, rank, dtype=projected.dtype)
    covariance = torch.eye(rank, dtype=projected.dtype).expand(count, rank, rank) / precision
    if not choices:
        return Fitted(weights.numpy(), covariance.numpy().copy())
    there = torch.ones(count, choices, dtype=projected.dtype) if mask is None else mask.to(projected.dtype)
    parts = [
        _newton(projected[start : start + CHUNK], there[start : start + CHUNK], precision)
        for start in range(0, count, CHUNK)
    ]
    return Fitted(*(torch.cat(each).numpy() for each in zip(*parts, strict=True)))


def _newton(projected: Tensor, there: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """Each step is of the users that are not there yet."""
    offset, gaps = projected[..., :1], projected[..., 1:] * there[..., None]  # (U, k, 1), (U, k, B); absent ones are 0
    weights = torch.zeros(gaps.shape[0], gaps.shape[2], 1, dtype=gaps.dtype)
    prior = precision * torch.eye(gaps.shape[2], dtype=gaps.dtype)
    left, start, x, own = torch.arange(len(gaps)), offset, gaps, weights.clone()
    for _ in range(NEWTON_STEPS):
        wrong, factor = _curvature(start, x, own, prior)
        slope = torch.baddbmm(own, x.mT, wrong, beta=precision, alpha=-1)
        change = torch.cholesky_solve(slope, factor)
        decrement = (slope * change).sum(1, keepdim=True).clamp_(min=0).sqrt_()
        # Far from the end a whole step overshoots: the curvature there is that of choices that are no tie any more.
        own = own - change / (decrement * (decrement > WHOLE_STEP) + 1)
        going = decrement[:, 0, 0] > CLOSE[gaps.dtype]
        if not going.all():
            weights[left] = own
            left, start, x, own = (each[going] for each in (left, start, x, own))
            if not len(left):
                break
    weights[left] = own
    factor = _curvature(offset, gaps, weights, prior)[1]
    return weights[..., 0], torch.cholesky_inverse(factor)


def _curvature(offset: Tensor, gaps: Tensor, weights: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """(U, k, 1) probabilities of the other answer, and the Cholesky factor of the loss's Hessian (U, B, B)."""
    wrong = torch.baddbmm(offset, gaps, weights).neg_().sigmoid_()
    curve = gaps * torch.addcmul(wrong, wrong, wrong, value=-1)
    return wrong, torch.linalg.cholesky(torch.baddbmm(prior, curve.mT, gaps))


def learn_basis(gaps: Floats, users: npt.NDArray[np.int64], *, rank: int, ridge: float = 1e-3, seed: int = 0) -> Basis:
    """The basis from the choices of many users.

    Everybody's direction is a ridge logistic regression on all choices. The directions start as the main components of
    what it leaves of each user (the users' gradients), and are refined together with everybody's direction while the
    users' weights are fitted to them; then the weights' mean and covariance, with what is uncertain in them, become the
    prior (empirical Bayes) and are folded into the basis.

    Both are also found where they are not: directions in noise where people agree, and a direction of everybody where
    everybody is different, which then outweighs a few choices. So all of this is done on three quarters of the users
    first; how far each reaches (0: not at all) is what predicts the others best from 0, 1, 4 and 16 of their choices.
    Then it is done on all.

    Raises:
        UsageError: fewer users than directions.
    """
    names, place = np.unique(users, return_inverse=True)
    if len(names) <= rank:
        raise UsageError(f"rank {rank}", f"asks for as many directions as {len(names)} users can show", "lower it")
    scale = np.full(gaps.shape[1], max(float(gaps.std()), 1e-9))
    x, who = torch.from_numpy(gaps / scale), torch.from_numpy(place)
    common, reach = _reaches(x, who, len(names), rank, ridge, seed)
    mean, directions = _learn(x, who, len(names), rank, ridge)
    return Basis((common * mean).numpy(), (reach * directions).numpy(), scale)


def _reaches(x: Tensor, who: Tensor, count: int, rank: int, ridge: float, seed: int) -> tuple[float, float]:
    """How far everybody's direction and the others reach, by what predicts users who taught nothing."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    held = max(1, count // HELD_OUT)
    new = order.argsort()[who] < held  # (N,) choices of users who teach nothing
    taught = torch.unique(who[~new], return_inverse=True)[1]
    people = int(taught.max()) + 1 if len(taught) else 0
    if people < 2:
        return 1.0, 1.0
    mean, directions = _learn(x[~new], taught, people, min(rank, people - 1), ridge)
    asked = torch.unique(who[new], return_inverse=True)[1]
    table, there = padded(torch.cat([(x[new] @ mean)[:, None], x[new] @ directions], 1), asked, held)
    column = torch.arange(table.shape[1])
    losses = {}
    for common in REACHES[1:]:
        for reach in REACHES:
            projected = table * torch.tensor([common] + [reach] * directions.shape[1], dtype=x.dtype)
            losses[common, reach] = 0.0
            for given in GIVEN:
                rest = there & (column >= given)
                if not bool(rest.any()):
                    continue
                weights = torch.from_numpy(fit_users(projected[:, :given], there[:, :given]).weights)
                margin = projected[..., 0] + torch.einsum("ukb,ub->uk", projected[..., 1:], weights)
                losses[common, reach] += float(torch.nn.functional.softplus(-margin[rest]).mean())
    return min(losses, key=losses.__getitem__)


def _learn(x: Tensor, who: Tensor, count: int, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """(F,) everybody's direction and (F, B) the others, such that the users' weights have mean 0 and covariance 1."""
    mean = fit_population(x, ridge)
    left = torch.sigmoid(-(x @ mean))[:, None] * x  # (N, F): each choice's gradient
    counts = torch.bincount(who, minlength=count).clamp(min=1).to(x.dtype)
    by_user = torch.zeros(count, x.shape[1], dtype=x.dtype).index_add_(0, who, left) / counts[:, None]
    _, sizes, right = torch.linalg.svd(by_user - by_user.mean(0), full_matrices=False)
    directions = (right[:rank] * (sizes[:rank, None] / sizes[0].clamp(min=1e-12))).T.contiguous()
    for _ in range(EM_ROUNDS):
        fitted = fit_ragged(x, who, mean, directions, count)
        mean, directions = _refine(x, who, mean, directions, torch.from_numpy(fitted.weights), ridge)
        fitted = fit_ragged(x, who, mean, directions, count)
        weights = torch.from_numpy(fitted.weights)
        middle = weights.mean(0)
        spread = torch.cov(weights.T).reshape(rank, rank) + torch.from_numpy(fitted.covariance).mean(0)
        mean = mean + directions @ middle
        directions = directions @ torch.linalg.cholesky(spread)
    return mean, directions


def next_question(projected: Floats, fitted: Fitted, user: int = 0) -> int:
    """Which of the candidate pairs to ask: the one whose answer is expected to narrow the user's weights most.

    With v the pair's projected gap and S the posterior covariance, p (1 - p) vᵀ S v: uncertain in itself, and in a
    direction in which the user is not known yet (PReF, with the posterior in place of its running sum).

    Args:
        projected: (M, B + 1) gaps, in either order of the two answers.
    """
    v = projected[:, 1:]
    p = 1 / (1 + np.exp(-(projected[:, 0] + v @ fitted.weights[user])))
    gain = p * (1 - p) * np.einsum("mb,bc,mc->m", v, fitted.covariance[user], v)
    return int(gain.argmax())


def fit_released(projected: Tensor, *, steps: int = 500, rate: float = 0.1, seed: int = 0) -> Floats:
    """LoRe's few-shot step as released: weights are a softmax, begin at random, and have no prior. (U, B).

    `projected` without everybody's part, (U, k, B). A baseline; it cannot express dislike.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(projected.shape[0], projected.shape[2], generator=generator, dtype=projected.dtype)
    raw.requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        margin = torch.einsum("ukb,ub->uk", projected, torch.softmax(raw, -1))
        torch.nn.functional.softplus(-margin).mean(1).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return np.asarray(torch.softmax(raw.detach(), -1).numpy())


def fit_population(x: Tensor, ridge: float) -> Tensor:
    """(F,) ridge logistic regression on all choices, by Newton's method."""
    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    for _ in range(NEWTON_STEPS):
        wrong = torch.sigmoid(-(x @ weights))
        slope = -(x.T @ wrong) / len(x) + ridge * weights
        curve = (x * (wrong * (1 - wrong) / len(x))[:, None]).T @ x + ridge * eye
        change = torch.linalg.solve(curve, slope)
        weights = weights - change
        if float(change.abs().max()) < CLOSE[torch.float64]:
            break
    return weights


def fit_ragged(x: Tensor, who: Tensor, mean: Tensor, directions: Tensor, count: int) -> Fitted:
    """Users with different numbers of choices."""
    return fit_users(*padded(torch.cat([(x @ mean)[:, None], x @ directions], 1), who, count))


def padded(projected: Tensor, who: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, B + 1) rows of users -> (U, k, B + 1), filled up to the longest, and (U, k) which are there."""
    order = torch.argsort(who, stable=True)
    sizes = torch.bincount(who, minlength=count)
    starts = torch.cumsum(sizes, 0) - sizes
    column = torch.arange(len(who)) - starts[who[order]]
    table = projected.new_zeros(count, int(sizes.max()), projected.shape[1])
    table[who[order], column] = projected[order]
    return table, torch.arange(table.shape[1])[None] < sizes[:, None]


def _refine(
    x: Tensor, who: Tensor, mean: Tensor, directions: Tensor, weights: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Everybody's direction and the others, for these weights: a convex problem, by L-BFGS."""
    mean, directions = mean.clone().requires_grad_(), directions.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([mean, directions], max_iter=REFINE_STEPS, line_search_fn="strong_wolfe")
    own = weights[who]

    def loss() -> Tensor:
        optimizer.zero_grad()
        margin = x @ mean + ((x @ directions) * own).sum(1)
        value = torch.nn.functional.softplus(-margin).mean()
        value = value + 0.5 * ridge * ((mean**2).sum() + (directions**2).sum())
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return mean.detach(), directions.detach()
