"""The trainer: accumulation that changes nothing, exact resumption, its log, its refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import chain

import pytest
import torch

from edgealign.errors import CheckFailed
from edgealign.models.shapes import SHAPES
from edgealign.objectives.table import find
from edgealign.train import trainer as trainer_module
from edgealign.train.checkpoints import MARKER, newest_complete
from edgealign.train.layout import document, pair
from edgealign.train.log import LOG_FILE, TENSORBOARD_FILE
from edgealign.train.precision import Precision
from edgealign.train.preference_task import PreferenceTask
from edgealign.train.recipes import PreferenceRecipe, SftRecipe
from edgealign.train.schedule import learning_rate_share, plan_steps, warn_few_steps
from edgealign.train.scoring import Passes, evaluate, score, tokens_of_pass
from edgealign.train.shortconv import tree_rows
from edgealign.train.tasks import PerToken, SftTask
from edgealign.train.trainer import AlignTrainer, fit

FLOAT32 = Precision("float32", "float32", False)


def passes_of(model, tokens_per_pass=64):
    return Passes.of(model, FLOAT32, tokens_per_pass=tokens_per_pass)


@pytest.mark.parametrize(("shape", "lora", "tokens_"), [
    ("lfm2-350m", True, 256), ("lfm2-350m", False, 2048), ("starter", True, 2048), ("tiny", True, 2048),
])  # fmt: skip
def test_a_pass_of_a_lora_is_as_small_as_its_activations_ask(shape, lora, tokens_):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape].config())
    assert tokens_of_pass(model, lora=lora) == tokens_


@pytest.fixture
def documents(tokens):
    return SftTask([document(tokens(n), (False, *(True,) * (n - 1))) for n in (5, 9, 12, 4, 7, 10, 6)])


@pytest.fixture
def pairs(lfm2, tokens):
    trees = [pair(tokens(3), tokens(n), tokens(8 - n)) for n in (1, 2, 3, 4, 5, 6)]
    reference = PerToken.of(score(lfm2, trees, passes_of(lfm2)), trees)
    return PreferenceTask(trees, find("ln_dpo"), 5.0, reference)


@pytest.fixture
def labelled(lfm2, tokens):
    """Pairs of two annotators, for an objective that remembers how reliable each is."""
    trees = [
        replace(pair(tokens(3), tokens(n), tokens(8 - n)), facts={"user": "ab"[n % 2]}) for n in (1, 2, 3, 4, 5, 6)
    ]
    reference = PerToken.of(score(lfm2, trees, passes_of(lfm2)), trees)
    return PreferenceTask(trees, find("lcpo_latent"), 0.1, reference, users=("a", "b"))


def recipe_for(task, **options):
    kind = SftRecipe if isinstance(task, SftTask) else PreferenceRecipe
    return kind(**{"batch_size": 4, "epochs": 2, "learning_rate": 1e-3, **options})


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("which", ["documents", "pairs"])
def test_the_size_of_a_forward_pass_does_not_change_the_gradient(which, lfm2, tmp_path, request):
    """A document of 12 tokens weighs more than one of 4, and every pair weighs the same, however they are cut."""
    task = request.getfixturevalue(which)
    results = []
    for budget in (1, 20, 1000):
        model = copy.deepcopy(lfm2)
        recipe = recipe_for(task, epochs=1, batch_size=100, max_grad_norm=1e9)
        steps = plan_steps(task, recipe, passes_of(model, budget))
        assert (len(steps), len(steps[0]) > 1) == (1, budget < 1000)
        seen = {}

        class Spy(AlignTrainer):
            def training_step(self, model, inputs, num_items_in_batch=None, seen=seen):
                loss = super().training_step(model, inputs, num_items_in_batch)
                seen["loss"] = float(loss)
                seen["grads"] = {name: p.grad.clone() for name, p in model.named_parameters()}
                return loss

        arguments = trainer_module._arguments(recipe, tmp_path)
        with tree_rows(model):
            Spy(model, task, steps, passes_of(model, budget), recipe, arguments).train()
        results.append(seen)
    for other in results[1:]:
        assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
        for name, grad in results[0]["grads"].items():
            assert torch.allclose(other["grads"][name], grad, rtol=1e-3, atol=1e-5), name


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(lfm2, documents, tmp_path):
    result = fit(
        copy.deepcopy(lfm2), documents, recipe_for(documents, epochs=1, batch_size=100), passes=passes_of(lfm2, 20),
        work=tmp_path,
    )
    wanted = -float(score(lfm2, documents.trees, passes_of(lfm2)).mean())
    assert result.rows[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert evaluate(lfm2, documents, passes_of(lfm2))["loss"] == pytest.approx(wanted, rel=1e-5)


def test_every_example_comes_once_per_epoch_in_an_order_of_its_own(lfm2, documents):
    recipe = recipe_for(documents, batch_size=3)
    steps = plan_steps(documents, recipe, passes_of(lfm2))
    flat = [sorted(i for group in step for i in group) for step in steps]
    assert [len(step) for step in flat] == [3, 3, 1, 3, 3, 1]
    assert sorted(chain(*flat[:3])) == sorted(chain(*flat[3:])) == list(range(7))
    assert flat[:3] != flat[3:]
    assert plan_steps(documents, recipe, passes_of(lfm2)) == steps
    assert plan_steps(documents, recipe_for(documents, batch_size=3, seed=1), passes_of(lfm2)) != steps
    assert len(plan_steps(documents, recipe_for(documents, batch_size=3, max_steps=4), passes_of(lfm2))) == 4


@pytest.mark.parametrize("which", ["documents", "pairs"])
def test_training_lowers_the_loss_and_logs_every_step(which, lfm2, tmp_path, request):
    task = request.getfixturevalue(which)
    before = evaluate(lfm2, task, passes_of(lfm2))
    result = fit(lfm2, task, recipe_for(task, epochs=8), passes=passes_of(lfm2), work=tmp_path)
    after = evaluate(lfm2, task, passes_of(lfm2))
    assert after["loss"] < 0.9 * before["loss"]
    assert [row["step"] for row in result.rows] == list(range(1, 17))
    logged = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert logged == list(result.rows)
    wanted = {"loss", "learning_rate", "grad_norm", "tokens", "tok_per_s", "epoch", "step"}
    if which == "pairs":
        wanted |= {"margin_mean", "margin_sum", "hit", "hit_free", "tokens_chosen", "tokens_rejected", "kl"}
        wanted |= {"logp_chosen", "logp_rejected", "ratio_chosen"}
        assert before["hit"] == 0.5
        assert before["loss"] == pytest.approx(0.6931, abs=1e-4)
        assert after["hit"] > 0.8
        assert after["margin_mean"] > 0.1
    assert set(logged[0]) == wanted
    assert not lfm2.training


def test_tensorboard_reads_the_same_numbers(lfm2, documents, tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    result = fit(lfm2, documents, recipe_for(documents), passes=passes_of(lfm2), work=tmp_path)
    events = list(EventFileLoader(str(tmp_path / TENSORBOARD_FILE)).Load())
    losses = [(e.step, v.tensor.float_val[0]) for e in events for v in e.summary.value if v.tag == "train/loss"]
    assert [step for step, _ in losses] == [row["step"] for row in result.rows]
    assert [loss for _, loss in losses] == pytest.approx([row["loss"] for row in result.rows], rel=1e-6)


class Interrupted(Exception):
    """Stands for the end of a process."""


def interrupt_at(monkeypatch, step):
    original = AlignTrainer.training_step

    def patched(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Interrupted
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AlignTrainer, "training_step", patched)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("which", ["documents", "pairs", "labelled"])
def test_a_resumed_run_ends_with_the_same_bits(which, lanes, lfm2, tmp_path, monkeypatch, request):
    task = request.getfixturevalue(which)
    recipe = recipe_for(task, epochs=4, save_every_steps=3)
    whole, interrupted = copy.deepcopy(lfm2), copy.deepcopy(lfm2)
    passes = replace(passes_of(lfm2), lanes=lanes)
    wanted = fit(whole, task, recipe, passes=passes, work=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            fit(interrupted, task, recipe, passes=passes, work=tmp_path / "cut")
    fresh = copy.deepcopy(lfm2)
    result = fit(fresh, task, recipe, passes=passes, work=tmp_path / "cut")
    assert result.resumed_at == 3
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(whole).items())
    timeless = [{k: v for k, v in row.items() if k != "tok_per_s"} for row in result.rows]
    assert timeless == [{k: v for k, v in row.items() if k != "tok_per_s"} for row in wanted.rows]
    logged = [json.loads(line) for line in (tmp_path / "cut" / LOG_FILE).read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(1, 9))
    if which == "labelled":
        assert (tmp_path / "cut" / "checkpoint-6" / "task_state.safetensors").is_file()
        assert task.state["eta"].tolist() != pytest.approx([0.9, 0.9], abs=1e-3)


def test_evaluation_leaves_what_an_objective_remembers_alone(lfm2, labelled, tmp_path):
    fit(copy.deepcopy(lfm2), labelled, recipe_for(labelled), passes=passes_of(lfm2), work=tmp_path)
    before = {name: value.clone() for name, value in labelled.state.items()}
    evaluate(lfm2, labelled, passes_of(lfm2))
    assert all(torch.equal(before[name], value) for name, value in labelled.state.items())


def test_only_a_checkpoint_with_its_marker_counts(tmp_path):
    for step, marked in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if marked:
            (folder / MARKER).write_text("")
    assert newest_complete(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()
    assert newest_complete(tmp_path / "nothing") is None


def test_old_checkpoints_go_when_the_new_one_is_whole(lfm2, documents, tmp_path):
    fit(
        lfm2, documents, recipe_for(documents, epochs=3, save_every_steps=2), passes=passes_of(lfm2), work=tmp_path,
    )
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_loss_that_is_no_number_ends_the_run(lfm2, documents, tmp_path):
    with torch.no_grad():
        lfm2.model.embedding_norm.weight[0] = float("nan")
    with pytest.raises(CheckFailed, match=r"loss nan: stopped being a number at step 1; try a lower --learning-rate"):
        fit(lfm2, documents, recipe_for(documents), passes=passes_of(lfm2), work=tmp_path)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_then_falls_to_its_floor_and_is_never_zero(schedule):
    recipe = SftRecipe(schedule=schedule, warmup_share=0.2, final_lr_share=0.1)
    shares = [learning_rate_share(step, 20, recipe) for step in range(20)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert min(shares) > 0
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert learning_rate_share(20, 20, recipe) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert learning_rate_share(0, 1, recipe) == 1.0


def test_gradient_checkpointing_learns_the_same(lfm2, documents, tmp_path):
    plain, saving = copy.deepcopy(lfm2), copy.deepcopy(lfm2)
    fit(plain, documents, recipe_for(documents), passes=passes_of(lfm2), work=tmp_path / "a")
    recipe = recipe_for(documents, gradient_checkpointing=True)
    fit(saving, documents, recipe, passes=passes_of(lfm2), work=tmp_path / "b")
    other = weights(saving)
    assert all(torch.allclose(value, other[name], atol=1e-5) for name, value in weights(plain).items())


def test_few_steps_are_said_aloud(capsys):
    assert "only 49 optimizer steps" in warn_few_steps(49)
    assert "warning: only 49 optimizer steps" in capsys.readouterr().err
    assert warn_few_steps(50) is None
