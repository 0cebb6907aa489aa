"""What objectives read of the reference beside log-probabilities, against plain forward passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgealign.objectives.loss import pair_loss
from edgealign.objectives.scores import Ragged, pad_ragged
from edgealign.objectives.table import find
from edgealign.train.anchors import Anchors, stretched
from edgealign.train.beside import differing
from edgealign.train.layout import Anchor, pair
from edgealign.train.logprobs import output_projection
from edgealign.train.preference_task import PreferenceTask
from edgealign.train.scoring import evaluate, score
from edgealign.train.shortconv import tree_rows
from edgealign.train.tasks import PerToken
from edgealign.train.token_kl import logprobs_with_kl

from .conftest import passes_of


def logits_of(model, tree, side):
    """(n, V) before each token of a completion, by transformers' own forward pass."""
    prompt, ids = tree.segments[0].ids, tree.segments[side].ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]


# --- KL(ref || pi) at every token


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_values_and_gradients_are_those_of_the_plain_formula(chunk, with_bias):
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden, weight, states, their_weight = random(7, 5), random(11, 5), random(7, 5), random(11, 5)
    bias, their_bias = (random(11), random(11)) if with_bias else (None, None)
    target = torch.randint(0, 11, (7,), generator=draw)
    learned = [each.requires_grad_() for each in (hidden, weight, bias) if each is not None]
    found = logprobs_with_kl(hidden, weight, bias, target, Anchor(states, their_weight, their_bias), chunk)
    ours = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias), -1)
    theirs = torch.log_softmax(torch.nn.functional.linear(states, their_weight, their_bias), -1)
    kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    wanted = torch.stack([ours.gather(1, target[:, None])[:, 0], kl], 1)
    assert torch.allclose(found, wanted, atol=1e-12)
    upstream = random(7, 2)
    for got, expected in zip(
        torch.autograd.grad((found * upstream).sum(), learned), torch.autograd.grad((wanted * upstream).sum(), learned),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(got, expected, atol=1e-12)


def test_a_batch_with_an_anchor_has_both_numbers_of_its_own_tokens(make_model, trees):
    reference, model = make_model(), make_model(seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    passes = passes_of(model)
    anchors = Anchors.of(find("rrpo"), reference, trees, passes, head_learns=True)
    assert anchors.weights is None
    assert anchors.features is None
    assert anchors.head[0] is not output_projection(reference)[0], "the head is about to learn: a copy"
    for group in passes.groups(trees, range(len(trees))):
        batch = anchors.attach(passes.batch(trees, group, "cpu"), group)
        with tree_rows(model), torch.no_grad():
            found = passes.logprobs(model, batch)
        sides = [(trees[i], side) for i in group for side in (1, 2)]
        theirs = [logits_of(reference, *each).log_softmax(-1) for each in sides]
        ours = [logits_of(model, *each).log_softmax(-1) for each in sides]
        kl = torch.cat([(q.exp() * (q - p)).sum(-1) for p, q in zip(ours, theirs, strict=True)])
        came = [p.gather(1, torch.tensor(tree.segments[side].ids)[:, None])[:, 0]
                for p, (tree, side) in zip(ours, sides, strict=True)]  # fmt: skip
        assert float(kl.min()) > 0.01
        assert torch.allclose(found[:, 1], kl, atol=1e-4)
        assert torch.allclose(found[:, 0], torch.cat(came), atol=1e-4)


def test_an_untrained_model_is_where_its_reference_is(lfm2, trees):
    passes = passes_of(lfm2)
    anchors = Anchors.of(find("sparse_po"), lfm2, trees, passes, head_learns=False)
    assert anchors.head[0].data_ptr() == output_projection(lfm2)[0].data_ptr(), "a frozen head is not copied"
    (group,) = passes_of(lfm2, 1000).groups(trees, range(len(trees)))
    with tree_rows(lfm2), torch.no_grad():
        found = passes.logprobs(lfm2, anchors.attach(passes.batch(trees, group, "cpu"), group))
    assert float(found[:, 1].abs().max()) < 1e-6


# --- activity of tokens, features of prompts, differing tokens


def test_token_weights_are_the_stretched_means_of_every_layers_states(lfm2, trees):
    anchors = Anchors.of(find("sparse_po"), lfm2, trees, passes_of(lfm2), head_learns=True)
    expected = []
    for tree in trees:
        for side in (1, 2):
            prompt, ids = tree.segments[0].ids, tree.segments[side].ids
            with torch.no_grad():
                out = lfm2(input_ids=torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
            states, kept = [], []
            hook = lfm2.model.layers[-1].register_forward_hook(lambda *args, kept=kept: kept.append(args[2]))
            with torch.no_grad():
                lfm2(input_ids=torch.tensor([[*prompt, *ids]]))
            hook.remove()
            last = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
            states = [*out.hidden_states[1:-1], last]  # the last entry of transformers' is after the final norm
            means = torch.stack([state[0, len(prompt) - 1 : -1].mean(-1) for state in states])  # (layers, n)
            low, high = means.min(1, keepdim=True).values, means.max(1, keepdim=True).values
            flat = high == low
            expected.append(torch.where(flat, 1.0, (means - low) / (high - low).clamp(min=1e-12)).mean(0))
    assert torch.allclose(anchors.weights.values, torch.cat(expected), atol=1e-4)
    assert 0 < float(anchors.weights.values.mean()) < 1


def test_stretching_is_within_a_sequence():
    values, sequence = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 4.0]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert stretched(values, sequence, 3).tolist() == [0.0, 1.0, 0.5, 1.0, 1.0, 1.0]


def test_prompt_features_are_centred_means_and_the_same_for_the_same_prompt(lfm2, trees):
    given = [*trees, pair(trees[0].segments[0].ids, (5,), (6,))]
    found = Anchors.of(find("rpo_relative"), lfm2, given, passes_of(lfm2), head_learns=True).features
    means = []
    for tree in trees:
        with torch.no_grad():
            states = lfm2.model(input_ids=torch.tensor([tree.segments[0].ids])).last_hidden_state[0, :-1]
        means.append(states.mean(0))
    unique = torch.stack(means)
    assert torch.allclose(found[:-1], unique - unique.mean(0), atol=1e-4)
    assert torch.equal(found[-1], found[0])


@pytest.mark.parametrize("key", ["rrpo", "sparse_po"])
def test_the_task_hands_the_loss_what_it_reads(key, make_model, trees):
    """The mean loss of an evaluation in several passes, against the loss of columns that are made here."""
    objective, reference, model = find(key), make_model(), make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    trees = [replace(tree, facts={"spans": differing(tree.segments[1].ids, tree.segments[2].ids)}) for tree in trees]
    assert any(not all(tree.facts["spans"]) for tree in trees)
    passes = passes_of(model)
    anchors = Anchors.of(objective, reference, trees, passes, head_learns=True)
    before = PerToken.of(score(reference, trees, passes), trees)
    found = evaluate(model, PreferenceTask(trees, objective, 0.1, before, anchors=anchors), passes)["loss"]
    sides = [(tree, side) for tree in trees for side in (1, 2)]
    ours, theirs = ([logits_of(each, *side).log_softmax(-1) for side in sides] for each in (model, reference))
    lengths = torch.tensor([len(tree.segments[side].ids) for tree, side in sides])

    def table(values):
        number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return pad_ragged(Ragged(torch.cat(values), number, lengths))

    came = [torch.tensor(tree.segments[side].ids)[:, None] for tree, side in sides]
    policy, fixed = (
        table([p.gather(1, ids)[:, 0] for p, ids in zip(each, came, strict=True)]) for each in (ours, theirs)
    )
    columns = {
        "token_kl": table([(q.exp() * (q - p)).sum(-1) for p, q in zip(ours, theirs, strict=True)]).values,
        "spans": table([torch.tensor(tree.facts["spans"]).float() for tree in trees]).values > 0,
    }
    if anchors.weights is not None:
        weights = table([anchors.weights.take([i]) for i in range(len(trees))]).values
        columns |= {"token_weights": weights, "kl_weights": weights}
    wanted = pair_loss(objective, policy, fixed, beta=0.1, columns=columns).loss.mean()
    assert found == pytest.approx(float(wanted), rel=1e-4)
    plain = pair_loss(find("dpo"), policy, fixed, beta=0.1).loss.mean()
    assert abs(float(wanted - plain)) > 1e-3


def test_nothing_is_computed_for_who_reads_nothing(lfm2, trees, monkeypatch):
    monkeypatch.setattr(lfm2, "forward", None)
    assert Anchors.of(find("ln_dpo"), lfm2, trees, passes_of(lfm2), head_learns=True) is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "flags"),
    [
        ((1, 2, 3, 4), (1, 9, 3, 4), "0100 0100"), ((1, 2), (1, 2), "00 00"), ((1, 2), (3, 4, 5), "11 111"),
        ((1, 2, 3), (2, 3), "100 00"), ((1, 2, 3), (1, 2, 3, 7, 8), "000 00011"),
    ],
)  # fmt: skip
def test_tokens_outside_of_common_blocks_differ(chosen, rejected, flags):
    assert "".join("01"[flag] for flag in differing(chosen, rejected)) == flags.replace(" ", "")
