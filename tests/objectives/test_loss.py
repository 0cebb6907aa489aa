"""The losses against TRL's own code, by hand, and by properties that must hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgealign.errors import RecipeError
from edgealign.objectives.loss import pair_loss, pair_metrics
from edgealign.objectives.reduce import mean_tokens
from edgealign.objectives.scores import Ragged, Scores, pad_ragged
from edgealign.objectives.table import find

LENGTHS = (5, 3, 1, 7, 4, 4)  # three pairs
PLAIN = ("dpo", "ln_dpo")


def scores(lengths=LENGTHS, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = -scale * torch.rand(sum(lengths), generator=generator, dtype=dtype) - 0.1
    counts = torch.tensor(lengths)
    return pad_ragged(Ragged(values, torch.repeat_interleave(torch.arange(len(lengths)), counts), counts))


def swapped(table: Scores) -> Scores:
    order = [i ^ 1 for i in range(len(table.mask))]
    return table.select(torch.tensor(order))


def test_one_pair_by_hand():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    policy = Scores(torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]]), mask)
    reference = Scores(torch.tensor([[-2.0, -2.0, -2.5], [-3.5, -5.5, 0.0]]), mask)
    # log-ratios 1, 0, -0.5 (sum 0.5, mean 1/6) and -0.5, 0.5 (sum 0)
    assert pair_loss(find("dpo"), policy, reference).loss.item() == pytest.approx(math.log1p(math.exp(-0.1 * 0.5)))
    assert pair_loss(find("ln_dpo"), policy, reference).loss.item() == pytest.approx(math.log1p(math.exp(-5.0 / 6.0)))


@pytest.mark.parametrize("key", PLAIN)
def test_swapping_chosen_and_rejected_negates_the_margin(key):
    policy, reference = scores(seed=1), scores(seed=2)
    there = pair_loss(find(key), policy, reference)
    back = pair_loss(find(key), swapped(policy), swapped(reference))
    assert torch.equal(there.delta, -back.delta)
    # softplus(-x) - softplus(x) = -x
    beta = find(key).beta
    assert torch.allclose(there.loss - back.loss, -beta * there.delta)


@pytest.mark.parametrize("key", PLAIN)
def test_a_policy_equal_to_its_reference_costs_ln_2(key):
    policy = scores(seed=4)
    assert torch.allclose(pair_loss(find(key), policy, policy).loss, torch.tensor(math.log(2.0), dtype=torch.float64))


def test_repeating_the_tokens_of_one_side_moves_the_summed_loss_only():
    """With a constant ratio per token a longer answer is no better, if lengths are normalised."""
    def constant(lengths):
        mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
        ratio = torch.tensor([0.3, -0.2])[:, None]
        return Scores(ratio * mask, mask), Scores(torch.zeros_like(ratio * mask), mask)

    short, long = constant((4, 4)), constant((8, 4))
    assert torch.allclose(pair_loss(find("ln_dpo"), *short).loss, pair_loss(find("ln_dpo"), *long).loss)
    assert pair_loss(find("dpo"), *long).loss < pair_loss(find("dpo"), *short).loss - 0.01


@pytest.mark.parametrize("key", PLAIN)
def test_gradients_agree_with_finite_differences(key):
    reference = scores(seed=2)
    start = scores(seed=1)

    def loss(values):
        return pair_loss(find(key), Scores(values * start.mask, start.mask), reference).loss

    values = start.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (values,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("key", PLAIN)
def test_nothing_learns_through_the_reference(key):
    policy = Scores(scores(seed=1).values.requires_grad_(), scores().mask)
    reference = Scores(scores(seed=2).values.requires_grad_(), scores().mask)
    pair_loss(find(key), policy, reference).loss.sum().backward()
    assert policy.values.grad.abs().sum() > 0
    assert reference.values.grad is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=8).filter(lambda n: len(n) % 2 == 0), st.integers(0, 99))
def test_the_order_of_pairs_does_not_matter(lengths, seed):
    policy, reference = scores(lengths, seed), scores(lengths, seed + 1)
    order = torch.arange(len(lengths)).view(-1, 2).flip(0).flatten()
    there = pair_loss(find("ln_dpo"), policy, reference).loss
    back = pair_loss(find("ln_dpo"), policy.select(order), reference.select(order)).loss
    assert torch.allclose(there, back.flip(0))


def test_scores_of_other_tokens_than_the_policys_are_an_error():
    with pytest.raises(ValueError, match="different tokens"):
        pair_loss(find("dpo"), scores(), scores((5, 3, 1, 6, 4, 4)))
    with pytest.raises(ValueError, match="do not make pairs"):
        pair_loss(find("dpo"), scores((5, 3, 1)), scores((5, 3, 1)))


def test_a_missing_reference_is_refused():
    with pytest.raises(RecipeError, match="compares with a reference model"):
        pair_loss(find("ln_dpo"), scores())


def test_metrics_tell_summed_and_per_token_margins_apart():
    """The summed margin prefers the long answer, the one per token the short one."""
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    policy = Scores(torch.tensor([[-0.9] * 4, [-0.7, 0.0, 0.0, 0.0]]), mask)
    reference = Scores(torch.where(mask, -1.0, 0.0), mask)
    metrics = {name: value.item() for name, value in pair_metrics(find("ln_dpo"), policy, reference).items()}
    assert metrics["margin_sum"] == pytest.approx(0.1, abs=1e-6)
    assert metrics["margin_mean"] == pytest.approx(-0.2, abs=1e-6)
    assert metrics["hit"] == 0.0
    assert metrics["hit_free"] == 0.0
    assert pair_metrics(find("dpo"), policy, reference)["hit"].item() == 1.0
    assert (metrics["tokens_chosen"], metrics["tokens_rejected"]) == (4, 1)
    assert metrics["kl"] > 0
    assert metrics["ratio_chosen"] == pytest.approx(0.1, abs=1e-6)


def test_rounding_is_half_a_hit_and_no_drift_is_no_kl():
    policy = scores(seed=3)
    noisy = Scores(policy.values + 1e-6 * policy.mask, policy.mask)
    metrics = pair_metrics(find("ln_dpo"), noisy, policy)
    assert metrics["hit"].tolist() == [0.5, 0.5, 0.5]
    assert metrics["kl"].abs().max() < 1e-9


def test_metrics_without_a_reference_leave_out_what_needs_one():
    assert set(pair_metrics(find("ln_dpo"), scores(), None)) == {
        "hit_free", "logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"
    }


def test_the_mean_of_no_tokens_is_zero():
    assert mean_tokens(torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)).tolist() == [0.0]


def test_a_ragged_table_keeps_values_gradients_and_empty_sequences():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    table = pad_ragged(Ragged(values, torch.tensor([0, 2, 2]), torch.tensor([1, 0, 2])))
    assert table.values.tolist() == [[1.0, 0.0], [0.0, 0.0], [2.0, 3.0]]
    assert table.lengths.tolist() == [1.0, 0.0, 2.0]
    (table.values * torch.tensor([5.0, 7.0])).sum().backward()
    assert values.grad.tolist() == [5.0, 5.0, 7.0]
