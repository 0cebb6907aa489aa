"""Answers drawn while training: from the model as it is, scored by what stands still, the same after a resume."""

from __future__ import annotations

import copy

import pytest
import torch

from edgealign.errors import UsageError
from edgealign.objectives.absolute import online_kl
from edgealign.objectives.pairs import Pairs
from edgealign.objectives.scores import Scores
from edgealign.objectives.table import find
from edgealign.train import preference
from edgealign.train.adapt import add_lora
from edgealign.train.online import OnlineAnswers
from edgealign.train.preference_task import PreferenceTask
from edgealign.train.recipes import PreferenceRecipe
from edgealign.train.scoring import score
from edgealign.train.tasks import PerToken
from edgealign.train.trainer import AlignTrainer, fit

from .conftest import passes_of

END = 2


def answers(trees, model, reference, **options):
    given = {"end": END, "samples": 2, "max_new_tokens": 5, "max_tokens": 64, "seed": 0, **options}
    return OnlineAnswers(trees, reference, passes_of(model), **given)


def drawn(online, model, indices, step):
    online.draw(model, indices, step)
    return [tuple(segment.ids for segment in online.trees[i].segments[3:]) for i in indices]


def test_the_reference_scores_what_the_model_said_and_the_trees_come_back(make_model, trees, plain):
    model, still, before = make_model(), make_model(seed=0), list(trees)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    online = answers(trees, model, still)
    said = drawn(online, model, [4, 1, 3], step=7)
    assert all(len(each) == 2 for each in said)
    assert all(1 <= len(ids) <= 6 and END not in ids[:-1] for each in said for ids in each)
    assert all(len(ids) < 6 or ids[-1] == END for each in said for ids in each)
    assert [trees[i] for i in (0, 2, 5)] == [before[i] for i in (0, 2, 5)]
    base = PerToken.of(score(still, before, passes_of(still)), before)
    found = online.with_reference(base.take, [3, 1])
    with torch.no_grad():
        wanted = torch.cat([plain(still, trees[i].segments[0].ids, part.ids) for i in (3, 1)
                            for part in trees[i].segments[1:]])  # fmt: skip
    assert torch.allclose(found, wanted, atol=1e-4)
    online.forget()
    assert trees == before
    assert online.scores == {}


def test_a_draw_belongs_to_its_seed_step_and_example(lfm2, trees):
    def once(step, indices=(0, 1, 2), **options):
        return drawn(answers(list(trees), lfm2, lfm2, **options), lfm2, list(indices), step)

    first = once(3)
    assert once(3) == first
    assert once(3, indices=(2, 0)) == [first[2], first[0]], "whatever else is in the step"
    assert once(4) != first
    assert once(3, seed=1) != first
    assert first[0][0] != first[0][1] or first[1][0] != first[1][1]


def test_answers_come_from_the_whole_distribution(lfm2, trees):
    """Of 1,600 first tokens each comes as often as the model says, to five standard errors."""
    same = [trees[0]] * 100
    counts = torch.zeros(96)
    for step in range(2):
        for each in drawn(answers(list(same), lfm2, lfm2, samples=8, max_new_tokens=1), lfm2, range(100), step):
            for ids in each:
                counts[ids[0]] += 1
    with torch.no_grad():
        p = lfm2(input_ids=torch.tensor([trees[0].segments[0].ids])).logits[0, -1].softmax(-1)
    n = float(counts.sum())
    assert n == 1600
    assert bool(((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all())
    assert int((counts > 0).sum()) > 20


def test_with_a_lora_the_reference_is_the_model_without_it(lfm2, trees, plain):
    untouched = copy.deepcopy(lfm2)
    lora = add_lora(lfm2, rank=4, alpha=8.0, seed=1)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    online = answers(trees, lora, None)
    lora.train()
    drawn(online, lora, [0], step=0)
    assert lora.training
    with torch.no_grad():
        wanted = torch.cat([plain(untouched, trees[0].segments[0].ids, part.ids) for part in trees[0].segments[3:]])
        of_lora = torch.cat([plain(lora.eval(), trees[0].segments[0].ids, part.ids) for part in trees[0].segments[3:]])
    assert torch.allclose(online.scores[0], wanted, atol=1e-4)
    assert not torch.allclose(online.scores[0], of_lora, atol=1e-2)


def test_the_mean_over_all_draws_has_the_gradient_of_the_divergence():
    """Three possible answers of one token, two draws: nine outcomes, each as likely as the policy says."""
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(3, generator=draw, dtype=torch.float64).requires_grad_()
    theirs = torch.randn(3, generator=draw, dtype=torch.float64).log_softmax(-1)
    logp, mask = ours.log_softmax(-1), torch.ones(2, 1, dtype=torch.bool)
    total = torch.zeros_like(ours)
    for first in range(3):
        for second in range(3):
            said = torch.tensor([first, second])
            columns = {"online": Scores(logp[said][:, None], mask),
                       "online_reference": Scores(theirs[said][:, None], mask)}  # fmt: skip
            one = torch.zeros(1, dtype=torch.float64)
            pairs = Pairs(one, one, Scores(one[:, None], mask[:1]), None, columns, 0.1, {}, {})
            (grad,) = torch.autograd.grad(online_kl(pairs).sum(), ours, retain_graph=True)
            total += logp.exp()[first].detach() * logp.exp()[second].detach() * grad
    kl = (logp.exp() * (logp - theirs)).sum()
    (wanted,) = torch.autograd.grad(kl, ours)
    assert torch.allclose(total, wanted, atol=1e-12)


def test_a_resumed_run_draws_what_it_would_have_drawn(lfm2, trees, tmp_path, monkeypatch):
    objective = find("hypo_online_kl")
    still = copy.deepcopy(lfm2)
    reference = PerToken.of(score(still, trees, passes_of(still)), trees)
    recipe = PreferenceRecipe(batch_size=3, epochs=4, learning_rate=1e-3, save_every_steps=3)

    def run(model, work):
        mine = list(trees)
        task = PreferenceTask(mine, objective, 0.1, reference, online=answers(mine, model, still))
        return fit(model, task, recipe, passes=passes_of(model), work=work)

    whole, cut, again = (copy.deepcopy(lfm2) for _ in range(3))
    run(whole, tmp_path / "whole")
    plain = AlignTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(cut, tmp_path / "cut")
    assert run(again, tmp_path / "cut").resumed_at == 3
    values = dict(again.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in whole.named_parameters())


def test_sharded_weights_are_refused_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("EDGEALIGN_SHARD", "1")
    with pytest.raises(UsageError, match="hypo_online_kl: draws answers while it trains, which needs whole weights"):
        preference.run(PreferenceRecipe(objective="hypo_online_kl"), model="nowhere", data=[], out=tmp_path / "out")
