"""What must hold between objectives and within each: special cases, symmetry, gradients, what is held still."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from edgealign.errors import RecipeError
from edgealign.objectives.entries import OBJECTIVES
from edgealign.objectives.lists import dcg_weights, list_loss
from edgealign.objectives.loss import pair_loss
from edgealign.objectives.reduce import desensitised_weights, sum_tokens
from edgealign.objectives.scores import Scores
from edgealign.objectives.table import find
from edgealign.objectives.terms import best_tau

PAIR_KEYS = [key for key, entry in OBJECTIVES.items() if not entry.is_list]
LIST_KEYS = [key for key, entry in OBJECTIVES.items() if entry.is_list]


@pytest.fixture
def both(scores):
    return scores(seed=1), scores(seed=2)


def close(mine: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(mine, other, atol=1e-9, rtol=1e-9)


# --- each objective


@pytest.mark.parametrize("key", PAIR_KEYS)
def test_gradients_agree_with_finite_differences(key, scores, columns):
    start, reference = scores(seed=1), scores(seed=2)
    state = pair_loss(find(key), scores(seed=5), scores(seed=6), columns=columns).state

    def loss(values):
        policy = Scores(values * start.mask, start.mask)
        return pair_loss(find(key), policy, reference, columns=columns, state=state).loss

    values = start.values.clone().requires_grad_()
    held_still = find(key).weight in ("adaptive_scale", "reliability") or find(key).margin == "adaptive"
    if not held_still:
        assert torch.autograd.gradcheck(loss, (values,), eps=1e-6, atol=1e-6)
    loss(values).sum().backward()
    assert values.grad is not None
    assert float(values.grad.abs().sum()) > 0
    assert bool((values.grad[~start.mask] == 0).all())


@pytest.mark.parametrize("key", PAIR_KEYS)
def test_nothing_learns_through_a_reference_or_a_column_of_one(key, scores, columns):
    policy = Scores(scores(seed=1).values.requires_grad_(), scores().mask)
    reference = Scores(scores(seed=2).values.requires_grad_(), scores().mask)
    names = ("second_reference", "previous", "base_reference", "online_reference", "unrelated", "unrelated_reference")
    held = {name: columns[name] for name in names}
    for each in held.values():
        each.values.requires_grad_()
    pair_loss(find(key), policy, reference, columns=columns).loss.sum().backward()
    assert reference.values.grad is None
    assert all(each.values.grad is None for each in held.values())


@pytest.mark.parametrize("key", PAIR_KEYS)
def test_a_missing_column_or_reference_is_refused_by_name(key, both, columns):
    objective, (policy, reference) = find(key), both
    for name in objective.columns:
        if name != "rejected_prompt":
            with pytest.raises(RecipeError, match=f"{name}: this objective reads that column"):
                pair_loss(objective, policy, reference, columns={**columns, name: None})
    if objective.needs_reference:
        with pytest.raises(RecipeError, match="compares with a reference model"):
            pair_loss(objective, policy, None, columns=columns)
    else:
        pair_loss(objective, policy, None, columns=columns)


def test_of_sides_is_who_does_not_mind_which_answers_meet(scores, columns):
    """Rejected answers change places among the pairs: the losses' sum stays for those, and for no others."""
    turn = torch.tensor([0, 3, 2, 5, 4, 1])  # chosen 0 with rejected 1, ...
    both = scores(seed=1, scale=9.0), scores(seed=2, scale=9.0)
    turned = [each.select(turn) for each in both]
    by_token = {"second_reference", "previous", "token_weights", "kl_weights", "token_kl", "spans"}
    for key in PAIR_KEYS:
        entry = find(key)
        if by_token.intersection(entry.columns):
            assert not entry.of_sides
            continue
        there, back = (pair_loss(entry, *each, columns=columns).loss.sum() for each in (both, turned))
        assert entry.of_sides == close(there, back), key
    assert not any(find(key).of_sides for key in LIST_KEYS)


@pytest.mark.parametrize("key", PAIR_KEYS)
def test_swapping_the_sides_negates_the_margin(key, both, columns):
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    swapped = {
        name: (each.select(order) if name in ("second_reference", "previous") else
               each[order] if name in ("token_weights", "kl_weights", "token_kl", "spans") else each)
        for name, each in columns.items()
    }  # fmt: skip
    there = pair_loss(find(key), *both, columns=columns).delta
    back = pair_loss(find(key), *(each.select(order) for each in both), columns=swapped).delta
    assert close(there, -back)


# --- special cases


def test_the_lfm2_family_holds_dpo_norm_simpo_and_apo_zero(both):
    policy, reference = both
    family = find("lfm2")
    assert close(pair_loss(family, *both).loss, pair_loss(find("ln_dpo"), *both).loss)
    simpo = replace(family, reference="none")
    found = pair_loss(simpo, policy, beta=2.0, settings={"gamma": 0.5}).loss
    assert close(found, pair_loss(find("simpo"), policy).loss)
    apo = pair_loss(family, *both, settings={"omega": 0.0, "weight_lfm2_delta": 1.0}).loss
    assert close(apo + 1, pair_loss(find("ln_apo_zero"), *both).loss)
    hinged = pair_loss(replace(family, pair_term="hinge"), policy, reference).loss
    assert close(hinged, torch.relu(1 - 5.0 * pair_loss(family, *both).delta))


@pytest.mark.parametrize(
    ("key", "settings", "plain"),
    [
        ("cdpo", {"epsilon": 0.0}, "dpo"), ("rdpo_robust", {"epsilon": 0.0}, "dpo"), ("ld_dpo", {"alpha": 1.0}, "dpo"),
        ("rdpo_length", {"alpha": 0.0}, "dpo"), ("ada_dpo", {"least": 1.0, "most": 1.0}, "dpo"),
        ("decoupled_betas", {"beta_rejected": 0.1, "weight_nll_chosen": 0.0}, "dpo"), ("modpo", {"w": 1.0}, "dpo"),
        ("lcpo_latent", {"eta": 1.0}, "dpo"), ("rationale_dpo", {"weight_nll_rationale": 0.0}, "dpo"),
        ("bapo_base_anchor", {"weight_base_anchor": 0.0}, "dpo"), ("vpo", {"sign": 0.0}, "dpo"),
        ("hypo_online_kl", {"weight_online_kl": 0.0}, "dpo"), ("dove", {}, "dpo"),
    ],
)  # fmt: skip
def test_each_variant_without_what_it_adds_is_plain(key, settings, plain, both, columns):
    found = pair_loss(find(key), *both, settings=settings, columns=columns).loss
    assert close(found, pair_loss(find(plain), *both).loss)


def test_equal_references_in_mrpo_are_dpo(both, columns):
    for share in (-1.0, 0.3, 0.9):
        given = {**columns, "second_reference": both[1]}
        found = pair_loss(find("mrpo"), *both, columns=given, settings={"a": share}).loss
        assert close(found, pair_loss(find("dpo"), *both).loss)


def test_mrpo_by_hand():
    """One token a side: log references -1 and -2, share 0.5: -3 - log((e^-1.9 + e^-2) / 2), -1 clipped to -1.8."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    policy = Scores(torch.tensor([[-1.0], [-1.5]]), mask)
    first, second = Scores(torch.tensor([[-1.0], [-1.0]]), mask), Scores(torch.tensor([[-2.0], [-1.0]]), mask)
    found = pair_loss(find("mrpo"), policy, first, columns={"second_reference": second}, settings={"a": 0.5})
    clipped = -1.8
    combined = clipped - 2.0 - math.log(0.5 * math.exp(clipped) + 0.5 * math.exp(-2.0))
    assert found.delta.item() == pytest.approx((-1.0 - combined) - (-1.5 + 1.0), abs=1e-6)


def test_inpo_whose_last_iterate_is_the_reference_is_ipo(both, columns):
    given = {**columns, "previous": both[1]}
    found = pair_loss(find("inpo_nash"), *both, columns=given)
    assert close(found.loss, (pair_loss(find("ipo_sum"), *both).delta - 0.5 / 0.0075) ** 2)


def test_gpo_with_a_score_of_one_half_is_sppo(both, columns):
    given = {**columns, "score": torch.full((3,), 0.5)}
    assert close(pair_loss(find("gpo"), *both, columns=given).loss, pair_loss(find("sppo_hard"), *both).loss)


def test_minor_dpo_is_dpo_where_the_rejected_side_is_above_the_reference(both):
    policy, reference = both
    higher = Scores(reference.values - 2.0 * reference.mask, reference.mask)  # so that all ratios are above 0
    assert close(pair_loss(find("minor_dpo"), policy, higher).loss, pair_loss(find("dpo"), policy, higher).loss)
    lower = Scores((reference.values + 2.0) * reference.mask, reference.mask)
    values = Scores(policy.values.clone().requires_grad_(), policy.mask)
    pair_loss(find("minor_dpo"), values, lower).loss.sum().backward()
    assert float(values.values.grad[1::2].abs().sum()) == 0.0
    assert float(values.values.grad[0::2].abs().sum()) > 0.0


def test_row_smoothing_is_smoothing_where_the_rows_agree(both, columns):
    given = {**columns, "epsilon": torch.full((3,), 0.1)}
    assert close(pair_loss(find("rosepo"), *both, columns=given).loss, pair_loss(find("cdpo"), *both).loss)


def test_the_robust_loss_is_right_on_average_over_flips(both):
    """(1 - e) times the loss of the label, e times that of the flipped one, is DPO's loss of the label."""
    flipped = tuple(each.select(torch.tensor([1, 0, 3, 2, 5, 4])) for each in both)
    mean = 0.9 * pair_loss(find("rdpo_robust"), *both).loss + 0.1 * pair_loss(find("rdpo_robust"), *flipped).loss
    assert close(mean, pair_loss(find("dpo"), *both).loss)


def test_relative_po_of_one_pair_is_dpo(scores, columns):
    one = scores((5, 3), seed=1), scores((5, 3), seed=2)
    given = {"prompt_features": torch.rand(1, 4, dtype=torch.float64)}
    assert close(pair_loss(find("rpo_relative"), *one, columns=given).loss, pair_loss(find("dpo"), *one).loss)


def test_sparse_and_span_losses_with_whole_masks_are_dpo(both, columns):
    ones, nothing = torch.ones_like(both[0].values), torch.zeros_like(both[0].values)
    given = {"token_weights": ones, "kl_weights": nothing, "token_kl": ones, "spans": ones.bool()}
    assert close(pair_loss(find("sparse_po"), *both, columns=given).loss, pair_loss(find("dpo"), *both).loss)
    found = pair_loss(find("rrpo"), *both, columns=given, settings={"weight_token_kl_chosen": 0.0}).loss
    assert close(found, pair_loss(find("dpo"), *both).loss)


def test_repeating_tokens_moves_sums_only():
    """With one ratio per side a longer answer is no better where lengths are normalised."""
    def constant(lengths):
        mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
        ratio = torch.tensor([0.3, -0.2], dtype=torch.float64)[:, None]
        return Scores(ratio * mask, mask), Scores(torch.zeros_like(ratio * mask), mask)

    for key in ("ln_dpo", "lfm2", "ipo_mean", "ln_apo_zero", "ln_apo_down"):
        assert close(pair_loss(find(key), *constant((4, 4))).loss, pair_loss(find(key), *constant((8, 4))).loss)
    for key in ("dpo", "ipo_sum", "hinge", "apo_anchored_zero", "ld_dpo"):
        assert not close(pair_loss(find(key), *constant((4, 4))).loss, pair_loss(find(key), *constant((8, 4))).loss)


def test_r_dpo_asks_less_of_a_choice_that_its_length_explains():
    """The other sign makes answers longer: a longer choice would be pushed further than DPO pushes it."""
    def pushed(key, lengths, **settings):
        mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
        values = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
        result = pair_loss(find(key), Scores(values * mask, mask), Scores(torch.zeros_like(values), mask), **settings)
        (gradient,) = torch.autograd.grad(result.loss.sum(), values)
        return float(result.loss.detach()), -float(gradient[0, 0])

    alpha = {"settings": {"alpha": 0.05}}
    plain, longer, shorter = pushed("dpo", (12, 8)), pushed("rdpo_length", (12, 8), **alpha), pushed(
        "rdpo_length", (8, 12), **alpha
    )  # fmt: skip
    assert longer[0] == pytest.approx(math.log1p(math.exp(-0.05 * 4)))
    assert shorter[0] == pytest.approx(math.log1p(math.exp(0.05 * 4)))
    assert longer[1] < plain[1] < shorter[1]


def test_the_longer_sides_tail_weighs_alpha():
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    weights = desensitised_weights(mask, 0.5)
    assert weights[1].tolist() == [1.0, 1.0, 1.0, 0.5, 0.5]
    assert weights[0, :3].tolist() == [1.0] * 3


# --- state, and what is held still


def test_alpha_dpos_margin_is_a_z_score_of_what_was_seen_and_learns_nothing(scores):
    objective, policy = find("alpha_dpo_margin"), scores(seed=1)
    first = pair_loss(objective, policy, scores(seed=2))
    assert close(first.loss, pair_loss(find("simpo"), policy, beta=2.5, settings={"gamma": 0.75}).loss)
    second = pair_loss(objective, scores(seed=3), scores(seed=4), state=first.state)
    gaps = torch.cat([_gap(policy, scores(seed=2)), _gap(scores(seed=3), scores(seed=4))])
    assert float(second.state["count"]) == 6
    assert second.state["mean"].item() == pytest.approx(gaps.mean().item())
    assert (second.state["squares"] / 6).sqrt().item() == pytest.approx(gaps.std(unbiased=False).item())
    z = (_gap(scores(seed=3), scores(seed=4)) - gaps[:3].mean()) / gaps[:3].std(unbiased=False)
    expected = -torch.nn.functional.logsigmoid(2.5 * (second.delta - 0.1 * z) - 0.75)
    assert close(second.loss, expected)


def test_a_reliable_annotators_labels_count_and_a_contrarians_are_turned(scores):
    """Annotator 1 contradicts what the policy has learned: its reliability falls, annotator 0's does not."""
    mask = torch.ones(8, 1, dtype=torch.bool)
    policy = Scores(torch.tensor([[3.0], [-3.0], [3.0], [-3.0], [-3.0], [3.0], [-3.0], [3.0]]) * 10, mask)
    reference = Scores(torch.zeros(8, 1), mask)
    users, state = torch.tensor([0, 0, 1, 1]), {}
    for _ in range(30):
        found = pair_loss(find("lcpo_latent"), policy, reference, columns={"user": users}, state=state)
        state = found.state
    assert state["eta"][0] > 0.95
    assert state["eta"][1] < 0.3
    later = pair_loss(find("lcpo_latent"), policy, reference, columns={"user": torch.tensor([0, 0, 2, 2])}, state=state)
    assert len(later.state["eta"]) == 3


def test_the_shift_of_bco_is_the_running_mean_of_rewards(both, scores):
    first = pair_loss(find("bco"), *both)
    rewards = 0.1 * sum_tokens(both[0].values - both[1].values, both[0].mask)
    assert first.state["shift"].item() == pytest.approx(rewards.mean().item())
    second = pair_loss(find("bco"), scores(seed=3), scores(seed=4), state=first.state)
    more = 0.1 * sum_tokens(scores(seed=3).values - scores(seed=4).values, both[0].mask)
    assert second.state["shift"].item() == pytest.approx(torch.cat([rewards, more]).mean().item())


@pytest.mark.parametrize("key", ["ada_dpo", "lcpo_latent", "alpha_dpo_margin"])
def test_weights_and_margins_are_held_still(key, scores, columns):
    """The gradient is that of the loss with the weight or margin as a number: it is found again with it frozen."""
    objective, reference = find(key), scores(seed=2)
    state = pair_loss(objective, scores(seed=5), reference, columns=columns).state
    policy = Scores(scores(seed=1).values.clone().requires_grad_(), scores().mask)
    found = pair_loss(objective, policy, reference, columns=columns, state=state)
    (gradient,) = torch.autograd.grad(found.loss.sum(), policy.values, retain_graph=True)
    x = found.delta if key == "alpha_dpo_margin" else 0.1 * found.delta
    if key == "ada_dpo":
        tau = best_tau(x.detach(), 0.1)
        frozen = -tau * torch.nn.functional.logsigmoid(x / tau)
    elif key == "lcpo_latent":
        p, eta = torch.sigmoid(x.detach()), state["eta"][columns["user"]]
        w = eta * p / (eta * p + (1 - eta) * (1 - p))
        frozen = -w * torch.nn.functional.logsigmoid(x) - (1 - w) * torch.nn.functional.logsigmoid(-x)
    else:
        gap = _gap(policy, reference).detach()
        z = (gap - state["mean"]) / (state["squares"] / state["count"]).sqrt()
        frozen = -torch.nn.functional.logsigmoid(2.5 * (x - 0.1 * z) - 0.75)
    again = pair_loss(objective, policy, reference, columns=columns, state=state)
    assert close(frozen, again.loss)
    x_gradient = torch.autograd.grad(frozen.sum(), policy.values, retain_graph=True)[0]
    assert close(gradient, x_gradient)


def test_newtons_tau_is_the_minimiser():
    x = torch.linspace(-4, 4, 17, dtype=torch.float64)
    grid = torch.linspace(0.1, 5.0, 4901, dtype=torch.float64)
    values = grid * torch.nn.functional.softplus(-x[:, None] / grid) + (0.1 - math.log(2)) * grid
    best = grid[values.argmin(-1)]
    found = best_tau(x, 0.1)
    exact = grid * 0 + found[:, None]
    loss = (exact * torch.nn.functional.softplus(-x[:, None] / exact) + (0.1 - math.log(2)) * exact)[:, 0]
    # five steps from 1 do not always arrive: what they reach is never more than 5 % worse than the best
    assert bool((loss <= values.min(-1).values + 0.05 * values.min(-1).values.abs() + 1e-3).all()), (found, best)


# --- lists


@pytest.mark.parametrize("key", LIST_KEYS)
def test_list_gradients_agree_with_finite_differences(key, scores):
    start, reference = scores((3, 4, 2, 5, 1, 3), seed=1), scores((3, 4, 2, 5, 1, 3), seed=2)
    grades = torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 3.0]], dtype=torch.float64)
    values = start.values.clone().requires_grad_()

    def loss(each):
        return list_loss(find(key), Scores(each * start.mask, start.mask), grades, reference)

    assert torch.autograd.gradcheck(loss, (values,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("key", LIST_KEYS)
def test_the_order_of_a_list_does_not_matter(key, scores):
    policy, reference = scores((3, 4, 2), seed=1), scores((3, 4, 2), seed=2)
    grades, order = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([2, 0, 1])
    there = list_loss(find(key), policy, grades, reference)
    back = list_loss(find(key), policy.select(order), grades[:, order], reference.select(order))
    assert close(there, back)


def test_a_list_of_two_is_dpo_but_for_its_weight(scores):
    policy, reference = scores((5, 3), seed=1), scores((5, 3), seed=2)
    grades = torch.tensor([[1.0, 0.0]])
    dpo = pair_loss(find("dpo"), policy, reference, beta=0.05).loss
    sums = sum_tokens(policy.values - reference.values, policy.mask)[None]
    weight = dcg_weights(0.05 * sums, grades)[0, 0, 1]
    assert weight.item() == pytest.approx(1 / math.log(2) - 1 / math.log(3))
    assert close(list_loss(find("lipo_lambda"), policy, grades, reference), weight * dpo)
    assert close(list_loss(find("irpo_ranking"), policy, grades, reference, beta=0.05), dpo)


def test_pro_ranking_by_hand():
    """Scores -1 and -2, grades 1 and 0: log(e^-1 + e^-2) + 1, and 0.05 times 1 squared times the best one's 1 nat."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    policy = Scores(torch.tensor([[-1.0], [-2.0]]), mask)
    found = list_loss(find("pro_ranking"), policy, torch.tensor([[1.0, 0.0]]))
    assert found.item() == pytest.approx(math.log(math.exp(-1) + math.exp(-2)) + 1 + 0.05)


def test_exo_on_a_list_is_zero_where_the_policy_has_the_grades():
    mask = torch.ones(3, 1, dtype=torch.bool)
    grades = torch.tensor([[0.3, 0.1, 0.2]])
    policy = Scores(100.0 * grades.T, mask)  # beta 0.1 and 1 / beta_reward 10
    found = list_loss(find("exo_lists"), policy, grades, Scores(torch.zeros(3, 1), mask))
    assert found.item() == pytest.approx(0.0, abs=1e-6)


def test_the_losses_of_pairs_and_of_lists_are_not_mixed_up(scores):
    with pytest.raises(ValueError, match="is an objective of lists"):
        pair_loss(find("lipo_lambda"), scores(), scores())


def _gap(policy: Scores, reference: Scores) -> torch.Tensor:
    ours, theirs = (sum_tokens(each.values, each.mask) / each.lengths for each in (policy, reference))
    return (ours[0::2] - ours[1::2]) - (theirs[0::2] - theirs[1::2])
