"""Pre-training: rows that leak nothing, every token once, exact resumption, Muon, history, several processes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgealign.errors import InputError
from edgealign.train import optimizers, pretrain
from edgealign.train.checkpoints import newest_complete
from edgealign.train.history import HISTORY_FILE, read_history
from edgealign.train.layout import document, pack
from edgealign.train.logprobs import compiled, token_logprobs
from edgealign.train.optimizers import Muon32, MuonWithAdamW, build_optimizer
from edgealign.train.precision import Precision
from edgealign.train.recipes import PretrainRecipe
from edgealign.train.rows import PretrainTask, Rows, load_rows
from edgealign.train.schedule import learning_rate_share, plan_steps
from edgealign.train.scoring import Passes
from edgealign.train.shortconv import kernel_width, tree_rows
from edgealign.train.speed import training_flops
from edgealign.train.trainer import AlignTrainer, fit

FLOAT32 = Precision("float32", "float32", False)
WORDS = ("the fox saw a small boat on the river and asked the old man for bread").split()  # noqa: SIM905


def rows_of(lengths, width, vocab=96, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab, sum(lengths)).astype(np.int32)
    return Rows(ids, np.repeat(np.arange(len(lengths)), lengths).astype(np.int32), width)


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 60)) + f" {i}."}) for i in range(40)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def test_every_token_but_the_first_of_a_document_is_learned_exactly_once():
    rows = rows_of([5, 1, 17, 30, 2, 9], width=8)
    batch = rows.batch(range(len(rows)), kernel=3)
    used = len(rows) * 8 + 1
    document_of = rows.document[:used]
    expected = np.flatnonzero(document_of[1:] == document_of[:-1]) + 1
    assert batch.target.tolist() == rows.ids[expected].tolist()
    assert [rows.n_learned(i) for i in range(len(rows))] == batch.lengths.tolist()


def test_rows_of_a_step_make_as_many_passes_for_every_process():
    rows = rows_of([81], width=8)
    for n, tokens, parts in [(10, 32, 1), (10, 32, 2), (9, 72, 4), (3, 64, 2), (1, 64, 2), (7, 8, 3)]:
        groups = rows.groups(list(range(n)), tokens, parts=parts)
        assert [i for group in groups for i in group] == list(range(n))
        assert len(groups) % parts == 0 or len(groups) == n
        assert max(map(len, groups)) * 8 <= tokens
    assert [len(group) for group in rows.groups(list(range(9)), 72, parts=4)] == [2, 2, 2, 3]


@pytest.mark.parametrize("name", ["lfm2", "llama"])
def test_a_row_scores_its_documents_as_if_each_stood_alone(name, make_model):
    model = make_model(name)
    rows = rows_of([5, 7, 4], width=15)
    with torch.no_grad(), tree_rows(model):
        together = token_logprobs(model, rows.batch([0], kernel=kernel_width(model)))
        alone = []
        for number in range(3):
            ids = rows.ids[rows.document == number].tolist()
            tree = document(ids, (True,) * len(ids))
            alone.append(token_logprobs(model, pack([tree], kernel=kernel_width(model))))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_changed_document_changes_no_score_of_its_neighbours(lfm2):
    rows = rows_of([6, 6, 6], width=17)
    other = rows.ids.copy()
    other[6:12] = (other[6:12] + 7) % 90 + 3
    with torch.no_grad(), tree_rows(lfm2):
        before = token_logprobs(lfm2, rows.batch([0], kernel=3))
        after = token_logprobs(lfm2, Rows(other, rows.document, 17).batch([0], kernel=3))
    assert torch.equal(before[:5], after[:5])
    torch.testing.assert_close(before[10:], after[10:])
    assert not torch.allclose(before[5:10], after[5:10], atol=1e-3)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(lfm2):
    rows = rows_of([6, 20, 10, 30], width=16)
    found = []
    for wanted in (False, True):
        model = copy.deepcopy(lfm2)
        with tree_rows(model), compiled(model, wanted):
            loss = -token_logprobs(model, rows.batch([0, 1], kernel=3)).sum()
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, fast in zip(*found, strict=True):
        torch.testing.assert_close(eager, fast, atol=1e-4, rtol=1e-4)


def test_wsd_rises_stays_and_falls():
    recipe = PretrainRecipe(warmup_share=0.1, decay_share=0.5, final_lr_share=0.0)
    shares = [learning_rate_share(i, 100, recipe) for i in range(100)]
    assert shares[0] < shares[5] < shares[10] == 1.0
    assert set(shares[10:55]) == {1.0}
    assert shares[56:] == sorted(set(shares[56:]), reverse=True)
    assert 0.0 < shares[-1] < 0.05


def test_total_tokens_sets_the_number_of_steps_over_as_many_epochs_as_it_takes(lfm2):
    task = PretrainTask(rows_of([200], width=16))
    recipe = PretrainRecipe(max_tokens=16, batch_size=4, total_tokens=1600)
    steps = plan_steps(task, recipe, Passes.of(lfm2, FLOAT32, tokens_per_pass=32))
    assert len(steps) == 1600 // 64
    assert all(len(group) <= 2 for step in steps for group in step)


def test_muon_moves_matrices_by_their_momentums_directions_and_leaves_embeddings_to_adamw(lfm2):
    optimizer = build_optimizer(lfm2, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95))
    assert isinstance(optimizer, MuonWithAdamW)
    embedding = lfm2.get_input_embeddings().weight
    matrices = {id(p) for p in optimizer.muon.param_groups[0]["params"]}
    assert id(embedding) not in matrices
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in lfm2.parameters())
    weight = lfm2.model.layers[0].feed_forward.w1.weight
    before = weight.detach().clone()
    for p in lfm2.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    step = (weight.detach() - before).double() / (1e-2 * 0.2 * max(weight.shape) ** 0.5)
    singular = torch.linalg.svdvals(step)
    assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.5  # orthogonal up to five iterations


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_in_32_bits_takes_torchs_steps_and_goes_on_from_its_state(shape):
    """Where bfloat16 is emulated, a step of the starter takes 14.6 s in it and 0.4 s in 32 bits."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(shape, generator=generator) for _ in range(6))
    options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    moved = {}
    for kind in (torch.optim.Muon, Muon32):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], **options)
        for grad in grads[:3]:
            p.grad = grad.clone()
            optimizer.step()
        if kind is Muon32:  # torch does the other half, from our state
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = torch.optim.Muon([p], **options)
            optimizer.load_state_dict(state)
        for grad in grads[3:]:
            p.grad = grad.clone()
            optimizer.step()
        moved[kind] = p.detach() - start
    gap = (moved[Muon32] - moved[torch.optim.Muon]).norm() / moved[torch.optim.Muon].norm()
    assert gap < 0.02  # bfloat16's


@pytest.mark.parametrize(("native", "kind"), [(True, torch.optim.Muon), (False, Muon32)])
def test_muon_orthogonalises_in_what_the_machine_multiplies(native, kind, lfm2, monkeypatch):
    monkeypatch.setattr(optimizers, "native_bfloat16", lambda: native)
    found = build_optimizer(copy.deepcopy(lfm2), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95))
    assert type(found.muon) is kind


def test_a_restored_muon_goes_on_as_if_nothing_had_happened(lfm2):
    runs = []
    for restored in (False, True):
        model = copy.deepcopy(lfm2)
        optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
        torch.manual_seed(0)
        for i in range(4):
            if restored and i == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = build_optimizer(model, lr=1.0, weight_decay=0.1, betas=(0.9, 0.95))
                optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (i + 1)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        runs.append(list(model.parameters()))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_very_same_weights_and_history(optimizer, lfm2, tmp_path, monkeypatch):
    task, held = PretrainTask(rows_of([900], width=16)), PretrainTask(rows_of([80], width=16, seed=1))
    recipe = PretrainRecipe(
        max_tokens=16, batch_size=4, total_tokens=640, optimizer=optimizer, save_every_steps=3, save_every_s=0,
        eval_every_tokens=128, compile="off",
    )
    passes = Passes.of(lfm2, FLOAT32, tokens_per_pass=32)

    def run(name, dies_at=None):
        model = copy.deepcopy(lfm2)
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        if dies_at is not None:
            original = AlignTrainer.training_step

            def step(self, *args, **kwargs):
                if self.state.global_step == dies_at:
                    raise KeyboardInterrupt
                return original(self, *args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(AlignTrainer, "training_step", step)
                with pytest.raises(KeyboardInterrupt):
                    fit(model, task, recipe, passes=passes, work=work, held_out=held)
            return None
        fit(model, task, recipe, passes=passes, work=work, held_out=held)
        return model, [{**row, "seconds": 0} for row in read_history(work / HISTORY_FILE)]

    whole, history = run("whole")
    run("broken", dies_at=7)
    assert newest_complete(tmp_path / "broken").name == "checkpoint-6"
    resumed, again = run("broken")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again == history
    assert [row["tokens"] for row in history] == [0, 128, 256, 384, 512, 640]
    assert history[-1]["loss"] < history[0]["loss"]


def test_the_stage_publishes_a_model_that_learned_with_its_history_and_pictures(tiny_model, texts, tmp_path):
    recipe = PretrainRecipe(max_tokens=32, batch_size=4, epochs=3, valid_fraction=0.2, eval_every_tokens=512)
    artifact = pretrain.run(recipe, model=tiny_model, data=[texts], out=tmp_path / "out")
    meta = artifact.manifest.meta
    assert meta["after"]["loss"] < meta["before"]["loss"] - 0.5
    history = read_history(artifact.path / HISTORY_FILE)
    assert history[0]["loss"] == pytest.approx(meta["before"]["loss"], abs=1e-4)
    assert history[-1]["loss"] == pytest.approx(meta["after"]["loss"], abs=1e-4)
    assert (artifact.path / "curves.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (artifact.path / "log.jsonl").read_text().splitlines()]
    assert all(0.0 < row["peak_share"] < 1.5 for row in rows)


def test_conversations_are_read_as_text_of_which_every_token_counts(tiny_model, tmp_path):
    from edgealign.models.load import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    file = tmp_path / "talk.jsonl"
    message = {"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]}
    file.write_text((json.dumps(message) + "\n") * 4)
    examples = load_rows([str(file)], tokenizer, PretrainRecipe(max_tokens=8, valid_fraction=0.0))
    shown = tokenizer.decode(examples.train.ids.tolist())
    assert shown.count("<|im_start|>user\nHello there<|im_end|>") == 4
    whole = examples.train.n_learned(0) + examples.train.n_learned(1)
    assert whole >= 14


def test_files_that_cannot_be_used_are_refused_in_one_line(tiny_model, tmp_path):
    from edgealign.models.load import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a b c"}\n')
    with pytest.raises(InputError, match="less than one row of 512"):
        load_rows([str(short)], tokenizer, PretrainRecipe())
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(InputError, match="the form pair"):
        load_rows([str(pairs)], tokenizer, PretrainRecipe())
    with pytest.raises(InputError, match="names no file"):
        load_rows([], tokenizer, PretrainRecipe())


def test_held_out_documents_are_whole_and_in_no_training_row(tiny_model, texts):
    from edgealign.models.load import load_tokenizer

    examples = load_rows([texts], load_tokenizer(tiny_model), PretrainRecipe(max_tokens=16, valid_fraction=0.25))
    train = {tuple(examples.train.ids[examples.train.document == d]) for d in np.unique(examples.train.document)}
    rows = examples.held_out
    held = {tuple(rows.ids[rows.document == d]) for d in np.unique(rows.document)}
    assert held
    assert not train & held
    assert 0.1 < len(held) / 40 < 0.3


def test_the_work_per_token_is_six_operations_per_parameter_and_the_attention(lfm2):
    n = sum(p.numel() for p in lfm2.parameters())
    assert training_flops(lfm2, 100) == 6 * n + 6 * 100 * 32 * 2
    untied = SimpleNamespace(parameters=lfm2.parameters, config=copy.deepcopy(lfm2.config))
    untied.config.tie_word_embeddings = False
    assert training_flops(untied, 100) == training_flops(lfm2, 100) - 6 * 96 * 32


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tiny_model, texts, tmp_path):
    """`torchrun` on two CPU processes: same steps, gradients added; sums in another order, so equal to 1e-4."""
    from safetensors.torch import load_file

    options = [
        "--model", str(tiny_model), "--data", texts, "--max-tokens", "32", "--batch-size", "4", "--max-steps", "6",
        "--tokens-per-pass", "32", "--optimizer", "adamw", "--precision", "float32", "--compile", "off",
        "--threads", "1",
    ]
    env = {**os.environ, "EDGEALIGN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    one = [sys.executable, "-m", "edgealign", "pretrain", *options, "--out", str(tmp_path / "one")]
    two = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edgealign",
        "pretrain", *options, "--out", str(tmp_path / "two"),
    ]
    for command in (one, two):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
    logs = [[json.loads(row) for row in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert [row["tokens"] for row in logs[0]] == [row["tokens"] for row in logs[1]]
    assert logs[0][-1]["loss"] == pytest.approx(logs[1][-1]["loss"], abs=1e-3)
