"""Embedding users on planted tastes over Gaussian features: what few choices are worth, and must not cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgealign.errors import UsageError
from edgealign.personalize import lore
from edgealign.personalize.lore import Basis, Fitted, fit_released, fit_users, learn_basis, next_question

FEATURES, RANK = 24, 4


class World:
    """Users whose taste is everybody's direction plus `spread` times their own mix of a few."""

    def __init__(self, spread: float, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.common = self.rng.normal(size=FEATURES) / np.sqrt(FEATURES)
        self.ways = self.rng.normal(size=(FEATURES, RANK)) / np.sqrt(FEATURES)
        self.spread = spread

    def users(self, count: int) -> np.ndarray:
        return self.common + self.spread * self.rng.normal(size=(count, RANK)) @ self.ways.T

    def choices(self, tastes: np.ndarray, count: int) -> np.ndarray:
        """(U, count, F) gaps, the chosen side first; labels are drawn."""
        gaps = self.rng.normal(size=(len(tastes), count, FEATURES))
        p = 1 / (1 + np.exp(-3 * np.einsum("ukf,uf->uk", gaps, tastes)))
        return gaps * np.where(self.rng.random(p.shape) < p, 1.0, -1.0)[..., None]

    def learn(self, count: int = 300, each: int = 24) -> Basis:
        gaps = self.choices(self.users(count), each)
        return learn_basis(gaps.reshape(-1, FEATURES), np.repeat(np.arange(count), each), rank=RANK)


def accuracy(basis: Basis, weights: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """(U,) of held-out choices."""
    projected = basis.project(gaps).numpy()
    return (projected[..., 0] + np.einsum("ukb,ub->uk", projected[..., 1:], weights) > 0).mean(1)


@pytest.fixture(scope="module")
def distinct():
    world = World(1.5)
    return world, world.learn()


def test_eight_choices_beat_none_for_users_that_differ(distinct):
    world, basis = distinct
    tastes = world.users(200)
    held_out = world.choices(tastes, 200)
    none = accuracy(basis, np.zeros((200, RANK)), held_out)
    gains = {}
    for k in (1, 2, 4, 8, 16, 32):
        fitted = fit_users(basis.project(world.choices(tastes, k)))
        gains[k] = accuracy(basis, fitted.weights, held_out) - none
    assert all(gains[k].mean() > 0 for k in gains), {k: gain.mean() for k, gain in gains.items()}
    boot = [np.random.default_rng(i).choice(gains[8], 200).mean() for i in range(200)]
    assert np.quantile(boot, 0.025) > 0.02
    assert gains[32].mean() > gains[8].mean() > gains[2].mean()


def test_users_that_are_alike_lose_no_more_than_a_point_at_any_number_of_choices():
    world = World(0.05, seed=3)
    basis = world.learn()
    tastes = world.users(300)
    held_out = world.choices(tastes, 200)
    none = accuracy(basis, np.zeros((300, RANK)), held_out).mean()
    for k in (1, 2, 4, 8, 16, 32):
        fitted = fit_users(basis.project(world.choices(tastes, k)))
        assert accuracy(basis, fitted.weights, held_out).mean() > none - 0.01


def test_another_users_choices_do_not_help(distinct):
    world, basis = distinct
    tastes = world.users(200)
    held_out = world.choices(tastes, 200)
    fitted = fit_users(basis.project(world.choices(tastes, 16)))
    own, none = accuracy(basis, fitted.weights, held_out), accuracy(basis, np.zeros((200, RANK)), held_out)
    other = accuracy(basis, np.roll(fitted.weights, 1, axis=0), held_out)
    assert own.mean() > none.mean() > other.mean()


def test_the_released_step_is_beaten_at_every_number_of_choices(distinct):
    world, basis = distinct
    tastes = world.users(150)
    held_out = world.choices(tastes, 200)
    for k in (1, 2, 4, 8, 16, 32):
        projected = basis.project(world.choices(tastes, k))
        fitted, released = fit_users(projected), fit_released(projected[..., 1:])
        gain = accuracy(basis, fitted.weights, held_out) - accuracy(basis, released, held_out)
        assert gain.mean() > -gain.std() / np.sqrt(150), k


def test_more_directions_than_people_differ_in_add_nothing_and_none_is_unused():
    """T8: tastes differ in RANK ways; accuracy rises up to there and no further."""
    world = World(1.5, seed=5)
    gaps = world.choices(world.users(300), 24).reshape(-1, FEATURES)
    tastes = world.users(200)
    own, held_out = world.choices(tastes, 16), world.choices(tastes, 200)
    found = {}
    for rank in (1, 2, RANK, 2 * RANK):
        basis = learn_basis(gaps, np.repeat(np.arange(300), 24), rank=rank)
        found[rank] = accuracy(basis, fit_users(basis.project(own)).weights, held_out).mean()
        if rank == RANK:
            lengths = np.linalg.norm(basis.directions, axis=0)
            cosines = np.abs(np.corrcoef(basis.directions.T)[np.triu_indices(RANK, 1)])
            assert cosines.mean() < 0.5
            assert lengths.min() > 0.2 * lengths.max()
    assert found[1] + 0.01 < found[2] < found[RANK] - 0.01
    assert found[RANK] - 0.03 < found[2 * RANK] < found[RANK] + 0.01  # what they find of noise costs a little


def test_the_weights_are_where_the_gradient_vanishes(distinct):
    world, basis = distinct
    gaps = basis.project(world.choices(world.users(5), 7))
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0, 3:] = False
    fitted = fit_users(gaps, mask)
    for user in range(5):
        own = gaps[user][mask[user]].numpy()
        wrong = 1 / (1 + np.exp(own[:, 0] + own[:, 1:] @ fitted.weights[user]))
        assert fitted.weights[user] - own[:, 1:].T @ wrong == pytest.approx(np.zeros(RANK), abs=1e-5)
        hessian = (own[:, 1:] * (wrong * (1 - wrong))[:, None]).T @ own[:, 1:] + np.eye(RANK)
        assert fitted.covariance[user] @ hessian == pytest.approx(np.eye(RANK), abs=1e-5)
    nobody = fit_users(gaps[:, :0])
    assert not nobody.weights.any()
    assert nobody.covariance == pytest.approx(np.stack([np.eye(RANK)] * 5))


def test_the_seen_users_weights_have_the_priors_mean_and_covariance(distinct):
    world, basis = distinct
    fitted = fit_users(basis.project(world.choices(world.users(400), 60)))
    assert np.abs(fitted.weights.mean(0)).max() < 0.3
    total = np.cov(fitted.weights.T) + fitted.covariance.mean(0)
    assert np.linalg.eigvalsh(total).min() > 0.4
    assert np.linalg.eigvalsh(total).max() < 2.0


def test_asking_what_teaches_most_needs_fewer_questions_than_asking_anything(distinct):
    world, basis = distinct
    tastes = world.users(60)
    held_out = world.choices(tastes, 200)
    found = {"active": [], "random": []}
    for user, taste in enumerate(tastes):
        pool = world.choices(taste[None], 80)[0]
        for how, scores in found.items():
            asked: list[int] = []
            for _ in range(8):
                left = [i for i in range(80) if i not in asked]
                fitted = fit_users(basis.project(pool[None, asked]))
                pick = next_question(basis.project(pool[left]).numpy(), fitted) if how == "active" else 0
                asked.append(left[pick])
            fitted = fit_users(basis.project(pool[None, asked]))
            scores.append(accuracy(basis, fitted.weights, held_out[user : user + 1])[0])
    assert np.mean(found["active"]) > np.mean(found["random"]) + 0.01


def test_a_question_in_a_direction_that_is_known_teaches_nothing():
    known = Fitted(np.zeros((1, 2)), np.diag([0.01, 1.0])[None])
    assert next_question(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]), known) == 1


def test_more_directions_than_users_are_refused():
    with pytest.raises(UsageError, match="rank 4: asks for as many directions as 3 users can show"):
        learn_basis(np.random.default_rng(0).normal(size=(30, 5)), np.arange(30) % 3, rank=4)


@pytest.mark.parametrize("seed", range(3))
def test_everybodys_direction_reaches_as_far_as_it_tells_of_new_users(seed):
    """Where it is noise one choice outweighs it; where everybody is alike it stays, and nobody is told apart."""
    apart, alike = World(1.5, seed), World(0.0, seed)
    apart.common = np.zeros(FEATURES)
    far, near = {}, {}
    for world, found in ((apart, far), (alike, near)):
        gaps = world.choices(world.users(80), 16)
        x, who = torch.from_numpy(gaps.reshape(-1, FEATURES)), torch.arange(80).repeat_interleave(16)
        found["common"], found["directions"] = lore._reaches(x, who, 80, RANK, 1e-3, seed)
    assert far["common"] <= 0.2 < near["common"], (far, near)
    assert near["directions"] < far["directions"], (far, near)
