"""Objectives that compare a batch's pairs with each other: the cut into passes changes nothing, nor do processes."""

from __future__ import annotations

import copy

import pytest
import torch

from edgealign.errors import InputError
from edgealign.objectives.loss import pair_loss
from edgealign.objectives.scores import Ragged, pad_ragged
from edgealign.objectives.table import find, names
from edgealign.train import trainer as trainer_module
from edgealign.train.adapt import add_lora
from edgealign.train.anchors import Anchors
from edgealign.train.beside import with_unrelated
from edgealign.train.layout import pack, pair
from edgealign.train.logprobs import token_logprobs
from edgealign.train.preference_task import PreferenceTask
from edgealign.train.recipes import PreferenceRecipe
from edgealign.train.schedule import plan_steps
from edgealign.train.scoring import Passes, evaluate, score
from edgealign.train.shortconv import kernel_width, tree_rows
from edgealign.train.tasks import PerToken
from edgealign.train.trainer import AlignTrainer

from .conftest import passes_of

COUPLED = tuple(key for key in names() if find(key).couples)


def moved(model):
    """The model a little further on, so that log-ratios are not zero."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return other


@pytest.fixture
def make_task(lfm2, trees):
    def make(objective):
        given = with_unrelated(trees, 64) if "unrelated" in objective.columns else trees
        reference = PerToken.of(score(lfm2, given, passes_of(lfm2)), given)
        anchors = Anchors.of(objective, lfm2, given, passes_of(lfm2), head_learns=True)
        return PreferenceTask(given, objective, objective.beta, reference, anchors=anchors)

    return make


def one_step(model, task, budget, tmp_path):
    """Loss, gradients, logged metrics and number of forward passes of a step over all pairs."""
    recipe = PreferenceRecipe(batch_size=100, epochs=1, learning_rate=1e-3, max_grad_norm=1e9)
    passes = passes_of(model, budget)
    seen, counted = {}, []

    class Spy(AlignTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            torch.manual_seed(5)  # of dropout
            loss = super().training_step(model, inputs, num_items_in_batch)
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            seen.update(loss=float(loss), grads=grads, metrics=dict(self._sums))
            return loss

        def _forward(self, *args):
            counted.append(1)
            return super()._forward(*args)

    steps = plan_steps(task, recipe, passes)
    with tree_rows(model):
        Spy(model, task, steps, passes, recipe, trainer_module._arguments(recipe, tmp_path)).train()
    return {**seen, "passes": len(counted)}


def test_they_are_the_two_that_the_literature_has():
    assert set(COUPLED) == {"kto", "rpo_relative"}
    assert not [key for key in COUPLED if find(key).state], "coupled.look would remember a step once a process"


@pytest.mark.parametrize("key", COUPLED)
def test_the_cut_into_passes_changes_no_gradient_loss_or_metric(key, lfm2, make_task, tmp_path):
    task = make_task(find(key))
    whole, *cut = (one_step(moved(lfm2), task, budget, tmp_path) for budget in (1000, 60, 1))
    assert [whole["passes"], cut[1]["passes"]] == [1, 6]
    for other in cut:
        assert other["passes"] > 1
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert other["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-5)
        for name, grad in whole["grads"].items():
            assert torch.allclose(other["grads"][name], grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("key", COUPLED)
def test_evaluation_compares_each_pair_with_all_others(key, lfm2, make_task):
    task, model = make_task(find(key)), moved(lfm2)
    whole = evaluate(model, task, passes_of(model, 1000))
    for budget in (1, 60):
        assert evaluate(model, task, passes_of(model, budget)) == pytest.approx(whole, rel=1e-4, abs=1e-5)
    with torch.no_grad(), tree_rows(model):
        batch = pack(task.trees, kernel=kernel_width(model))
        ours = pad_ragged(Ragged(token_logprobs(model, batch), batch.sequence, batch.lengths))
    theirs = pad_ragged(Ragged(task.reference.values, batch.sequence, batch.lengths))
    each = torch.arange(len(ours.values)).view(len(task.trees), -1)
    first = each[:, :2].flatten()
    columns = {"prompt_features": task.anchors.features} if task.anchors else {
        "unrelated": ours.select(each[:, 2]), "unrelated_reference": theirs.select(each[:, 2])}  # fmt: skip
    expected = pair_loss(task.objective, ours.select(first), theirs.select(first), columns=columns).loss.mean()
    assert whole["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_dropout_drops_the_same_when_a_pass_comes_again(lfm2, make_task, tmp_path, monkeypatch):
    task = make_task(find("kto"))
    lora = add_lora(moved(lfm2), rank=4, alpha=8.0, dropout=0.5, seed=1)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    plain, seen = Passes.logprobs, []

    def logprobs(self, model, batch):
        seen.append(plain(self, model, batch))
        return seen[-1]

    monkeypatch.setattr(Passes, "logprobs", logprobs)
    one_step(lora, task, 1, tmp_path)
    first, again = seen[:6], seen[6:]
    assert all(torch.equal(*each) for each in zip(first, again, strict=True))
    assert not any(each.requires_grad for each in first)
    assert all(each.requires_grad for each in again)
    seen.clear()
    torch.manual_seed(6)
    with tree_rows(lora):
        other = passes_of(lora, 1).batch(task.trees, [0], "cpu")
        assert not torch.equal(logprobs(passes_of(lora), lora.train(), other), logprobs(passes_of(lora), lora, other))


def test_an_answer_to_another_prompt_is_the_next_pairs_chosen_or_rejected(tokens):
    first, second = tokens(9)[:4], tokens(9)[5:]
    trees = [pair(first, (7, 8), (9,)), pair(first, (10,), (11, 12)), pair(second, (13, 14, 15), (16,))]
    found = with_unrelated(trees, 6)
    assert [tree.segments[3].ids for tree in found] == [(13, 14), (16,), (7, 8)]  # cut to the room of 6 tokens
    assert all(tree.segments[3].parent == 0 and all(tree.segments[3].learned) for tree in found)
    assert [tree.segments[:3] for tree in found] == [tree.segments for tree in trees]
    with pytest.raises(InputError, match="2 pairs: have one prompt, and the objective compares with answers"):
        with_unrelated(trees[:2], 64)
