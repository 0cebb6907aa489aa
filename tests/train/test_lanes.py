"""Passes side by side: the same gradients as one after the other, the same bits every time, and when not to."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from edgealign.models.shapes import SHAPES
from edgealign.objectives.table import find
from edgealign.train import trainer as trainer_module
from edgealign.train.adapt import add_lora
from edgealign.train.anchors import Anchors
from edgealign.train.lanes import Lanes, Turn, draws_chance, lanes_of, side_by_side
from edgealign.train.layout import branches, document
from edgealign.train.precision import Precision
from edgealign.train.preference_task import PreferenceTask
from edgealign.train.recipes import PreferenceRecipe, SftRecipe
from edgealign.train.schedule import plan_steps
from edgealign.train.scoring import Passes, evaluate, score
from edgealign.train.tasks import PerToken, SftTask
from edgealign.train.trainer import AlignTrainer, fit

from .conftest import passes_of


@pytest.fixture
def trees(tokens):
    texts = find("kto").texts
    return [
        replace(
            branches(tokens(3), [tokens(n), tokens(9 - n), *(tokens(4) for _ in texts)]), facts={"user": "ab"[n % 2]}
        )
        for n in (1, 2, 3, 4, 5, 6, 7, 8)
    ]


@pytest.fixture
def make_task(lfm2, trees):
    """`make_task("kto")`: a task on the same pairs, with what else the objective reads."""

    def make(key):
        if key == "sft":
            return SftTask(trees)
        objective = find(key)
        given = trees if objective.texts else [replace(tree, segments=tree.segments[:3]) for tree in trees]
        reference = PerToken.of(score(lfm2, given, passes_of(lfm2)), given)
        anchors = Anchors.of(objective, lfm2, given, passes_of(lfm2), head_learns=True)
        return PreferenceTask(given, objective, objective.beta, reference, users=("a", "b"), anchors=anchors)

    return make


def recipe_for(key, **options):
    kind = SftRecipe if key == "sft" else PreferenceRecipe
    return kind(**{"batch_size": 8, "epochs": 2, "learning_rate": 1e-3, **options})


def trained(model, task, key, lanes, work, *, monkeypatch, delay=0.0, tokens=100, **options):
    """Gradients of every step, names of the threads of its passes, and the log of a run."""
    seen, threads, forward = [], [], AlignTrainer._forward

    class Spy(AlignTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
            return loss

        def _forward(self, model, group):
            threads.append(threading.current_thread().name)
            time.sleep(delay * (group[0] % 3))
            return forward(self, model, group)

    passes = replace(passes_of(model, tokens), lanes=lanes)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "AlignTrainer", Spy)
        result = fit(model, task, recipe_for(key, **options), passes=passes, work=work)
    rows = [{name: value for name, value in row.items() if name != "tok_per_s"} for row in result.rows]
    return seen, threads, rows


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("key", ["sft", "ln_dpo", "lcpo_latent", "kto", "sparse_po"])
def test_gradients_loss_and_log_are_those_of_one_pass_after_the_other(
    key, lora, lfm2, make_task, tmp_path, monkeypatch
):
    task, found = make_task(key), []
    for lanes in (1, 2):
        model = copy.deepcopy(lfm2)
        if lora:
            model = add_lora(model, rank=2, alpha=4.0)
        work = tmp_path / str(lanes)
        found.append(trained(model, task, key, lanes, work, monkeypatch=monkeypatch, learning_rate=1e-5))
    (one, threads, rows), (two, theirs, others) = found
    assert set(threads) == {"MainThread"}
    assert {name.split("_")[0] for name in theirs} == {"lane"}
    assert len(theirs) > len(one) == len(two) == 2, "more passes than steps"
    for row, other in zip(rows, others, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-5)
    for grads, same in zip(one, two, strict=True):
        assert same.keys() == grads.keys()
        for name, grad in grads.items():
            assert torch.allclose(same[name], grad, rtol=1e-3, atol=1e-4), name
            assert same[name].stride() == grad.stride(), f"{name}: the optimizer reads it in the order of memory"


@pytest.mark.parametrize("key", ["sft", "lcpo_latent"])
def test_it_does_not_matter_which_lane_is_quicker(key, lfm2, make_task, tmp_path, monkeypatch):
    """Passes that end in another order are added, and remembered, in the same one: the bits are the same."""
    ends = []
    for delay in (0.0, 0.02):
        model, task = copy.deepcopy(lfm2), make_task(key)
        *_, rows = trained(
            model, task, key, 2, tmp_path / str(delay), monkeypatch=monkeypatch, delay=delay, batch_size=8, epochs=3
        )
        ends.append((rows, [p.detach() for p in model.parameters()], getattr(task, "state", {})))
    (rows, weights, state), (others, theirs, another) = ends
    assert rows == others
    assert all(torch.equal(p, q) for p, q in zip(weights, theirs, strict=True))
    assert state.keys() == another.keys()
    assert all(torch.equal(state[name], another[name]) for name in state)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"lora_dropout": 0.1}])
def test_what_wants_memory_or_takes_random_numbers_has_one_lane(options, lfm2, make_task, tmp_path, monkeypatch):
    model = copy.deepcopy(lfm2)
    if "lora_dropout" in options:
        model = add_lora(model, rank=2, alpha=4.0, dropout=options["lora_dropout"])
    _, threads, _ = trained(model, make_task("sft"), "sft", 2, tmp_path, monkeypatch=monkeypatch, **options)
    assert set(threads) == {"MainThread"}


@pytest.mark.parametrize(("key", "lane"), [("kto", "MainThread"), ("ln_dpo", "lane")])
def test_a_step_that_would_be_read_twice_if_it_were_cut_stays_one_pass(
    key, lane, lfm2, make_task, tmp_path, monkeypatch
):
    _, threads, rows = trained(lfm2, make_task(key), key, 2, tmp_path, monkeypatch=monkeypatch, tokens=1000)
    assert {name.split("_")[0] for name in threads} == {lane}
    assert len(threads) == len(rows) * (1 if lane == "MainThread" else 2)


SMALL = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "facts", "draws"), [
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}, True),  # functional: no module of it
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, False),
    ("mixtral", {"num_key_value_heads": 2, "router_jitter_noise": 0.1}, True),
    ("mixtral", {"num_key_value_heads": 2}, False),
    ("llama", {"attention_dropout": 0.1}, True),
    ("llama", {}, False),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),  # modules, which transformers' default sets to 0.1
])  # fmt: skip
def test_models_that_take_random_numbers_are_known(kind, facts, draws):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **facts})).train()
    before = torch.get_rng_state()
    model(input_ids=torch.arange(3, 23)[None])
    assert draws == (not torch.equal(before, torch.get_rng_state())) == draws_chance(model)


@pytest.mark.parametrize(("kind", "facts", "lanes"), [
    ("dynamic", {"factor": 2.0}, 1),
    ("longrope", {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}, 1),
    ("default", {}, 2),
])  # fmt: skip
def test_positions_that_a_forward_pass_changes_have_one_lane(kind, facts, lanes, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rope = {"rope_type": kind, "rope_theta": 10000.0, **facts}
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "rope_parameters": rope}))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model(input_ids=torch.arange(200)[None] % 90)
    moved = not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert moved == (lanes == 1)
    assert lanes_of(model, 2048, lora=False) == lanes


def test_scores_are_the_same_and_in_the_order_of_the_examples(lfm2, tokens):
    """Also where an example is too long to share a pass's tokens, and comes first."""
    task = SftTask([document(tokens(n), (False, *(True,) * (n - 1))) for n in (5, 9, 40, 4, 7, 10, 6, 12)])
    one = passes_of(lfm2, 48)
    two = replace(one, lanes=2)
    assert torch.allclose(score(lfm2, task.trees, two), score(lfm2, task.trees, one), atol=1e-5)
    assert evaluate(lfm2, task, two) == pytest.approx(evaluate(lfm2, task, one), rel=1e-5)


def test_a_step_has_passes_for_every_lane_that_hold_together_what_one_may(lfm2, trees):
    recipe = recipe_for("sft", epochs=1)
    passes = passes_of(lfm2, 60)
    (one,), (two,) = (plan_steps(SftTask(trees), recipe, replace(passes, lanes=lanes)) for lanes in (1, 2))
    assert sorted(i for group in two for i in group) == sorted(i for group in one for i in group)
    assert len(two) % 2 == 0
    assert max(passes.n_tokens(trees, group) for group in two) * 2 <= 60


@pytest.mark.parametrize(("n", "sizes"), [(3, [3]), (4, [2, 2]), (1, [1])])
def test_a_step_that_would_leave_a_lane_idle_is_not_cut_for_it(n, sizes, lfm2, tokens):
    trees = [document(tokens(10), (True,) * 10) for _ in range(n)]
    groups = replace(passes_of(lfm2, 40), lanes=2).groups(trees, range(n))
    assert [len(group) for group in groups] == sizes


@pytest.mark.parametrize(("n_tokens", "beside"), [
    ([10, 10], [0, 1]),
    ([10, 10, 30, 10, 10], [0, 1, 3, 4]),  # too large beside another one
    ([10], []),  # the other lane would be idle
    ([20, 5], []),
    ([10, 10, 10], []),  # a third of the time
    ([10] * 9, list(range(9))),
    ([], []),
])  # fmt: skip
def test_which_passes_are_side_by_side(n_tokens, beside):
    assert side_by_side(n_tokens, tokens=40, count=2) == beside


@pytest.mark.parametrize(("shape", "lora", "threads", "lanes"), [
    ("starter", False, 2, 2), ("starter", True, 8, 2), ("starter", False, 1, 1),
    ("lfm2-350m", False, 8, 1),  # a second copy of its gradients is 1.4 GB
    ("lfm2-350m", True, 8, 1),  # its passes are as small as can be already
])  # fmt: skip
def test_small_models_have_lanes_where_there_are_threads(shape, lora, threads, lanes, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape].config())
    passes = Passes.for_training(model, Precision("float32", "float32", False), lora=lora)
    assert passes.lanes == lanes == lanes_of(model, passes.tokens_per_pass, lora=lora)


def test_threads_are_shared_out_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with Lanes(2, tokens=40) as lanes:
            found = [value for _, value in lanes.each(lambda *_: torch.get_num_threads(), range(4), [10] * 4)]
        assert (found, torch.get_num_threads()) == ([2] * 4, 4)
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 4
    finally:
        torch.set_num_threads(before)


def test_a_pass_that_fails_is_heard_of_and_holds_nobody_up():
    """Before its turn as after it: those behind it would wait for ever."""
    for early in (True, False):

        def job(item, turn: Turn, early=early):
            if item == 1 and early:
                raise ValueError("pass 1")
            with turn:
                pass
            if item == 1:
                raise ValueError("pass 1")
            return item

        with pytest.raises(ValueError, match="pass 1"), Lanes(2, tokens=100) as lanes:
            list(lanes.each(job, range(8), [10] * 8))


def test_a_pass_that_is_called_off_holds_nobody_up():
    """As where an error ends the lanes while passes wait: the second may be off, and the third already taken."""

    turns = []

    class SecondIsOff(ThreadPoolExecutor):
        def submit(self, call, /, job, item, turn):
            turns.append(turn)
            if item == 1:
                off = Future()
                off.cancel()
                return off
            return super().submit(call, job, item, turn)

    def run():
        with Lanes(2, tokens=100) as lanes:
            lanes._pool = SecondIsOff(2)
            with pytest.raises(CancelledError):
                list(lanes.each(lambda item, turn: item, range(4), [10] * 4))

    running = threading.Thread(target=run)
    running.start()
    running.join(20)
    hangs = running.is_alive()
    for turn in turns:  # or the threads would outlive the test
        with turn:
            pass
    assert not hangs


def test_turns_come_in_order():
    order = []

    def job(item, turn):
        time.sleep(0.01 * (item % 2 == 0))
        with turn:
            order.append(item)

    with Lanes(2, tokens=100) as lanes:
        assert [item for item, _ in lanes.each(job, range(8), [10] * 8)] == list(range(8))
    assert order == list(range(8))
