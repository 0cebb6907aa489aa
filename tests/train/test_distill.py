"""Distillation: log-probabilities in chunks, the teacher's cache, the stage."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgealign.errors import InputError, OutputError, RecipeError
from edgealign.models.create import run as init
from edgealign.models.recipes import InitRecipe
from edgealign.plan import plan_stage
from edgealign.train import distill, pretrain, teacher_cache
from edgealign.train.distill import DistillTask
from edgealign.train.gather import gather_logprobs, likeliest
from edgealign.train.logprobs import token_logprobs
from edgealign.train.precision import Precision
from edgealign.train.recipes import DistillRecipe, PretrainRecipe
from edgealign.train.rows import PretrainTask, Rows
from edgealign.train.scoring import Passes
from edgealign.train.shortconv import tree_rows
from edgealign.train.teacher_cache import teach
from edgealign.train.trainer import AlignTrainer, fit

FLOAT32 = Precision("float32", "float32", False)


def rows_of(lengths, width, vocab=96, seed=0):
    ids = np.random.default_rng(seed).integers(3, vocab, sum(lengths)).astype(np.int32)
    return Rows(ids, np.repeat(np.arange(len(lengths)), lengths).astype(np.int32), width)


@pytest.fixture
def taught(lfm2, make_model):
    passes = Passes.of(lfm2, FLOAT32, tokens_per_pass=64)
    calls = []

    def make(rows, k=8, digest="a" * 64, model=None, passes=passes):
        def load():
            calls.append(1)
            return model or make_model("lfm2", seed=5)

        return teach(rows, load, teacher_digest=digest, vocab_size=96, k=k, passes=passes)

    make.calls, make.passes = calls, passes
    return make


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    words = ["fox", "boat", "river", "bread", "old", "man", "saw", "the", "small", "a"]
    file = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choice(words, 60, p=rng.dirichlet([1] * 10)))}) for _ in range(40)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [3, 100])
def test_gathered_log_probabilities_and_gradients_are_those_of_the_whole_softmax(bias, chunk):
    torch.manual_seed(0)
    given = [torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)]
    given += [torch.randn(11, dtype=torch.float64)] if bias else []
    ids = torch.randint(0, 11, (7, 4))
    ids[0] = 2  # the same token four times
    upstream = torch.randn(7, 4, dtype=torch.float64)
    found = []
    for chunked in (True, False):
        leaves = [value.clone().requires_grad_() for value in given]
        hidden, weight, *rest = leaves
        b = rest[0] if rest else None
        if chunked:
            out = gather_logprobs(hidden, weight, b, ids, chunk)
        else:
            out = torch.log_softmax(torch.nn.functional.linear(hidden, weight, b), -1).gather(1, ids)
        (out * upstream).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_the_likeliest_tokens_keep_their_share_of_the_whole_vocabulary():
    hidden, weight = torch.randn(6, 5), torch.randn(11, 5)
    logps, ids = likeliest(hidden, weight, None, 4, chunk=4)
    whole = torch.log_softmax(hidden @ weight.T, -1)
    torch.testing.assert_close(logps, whole.gather(1, ids))
    assert torch.equal(ids, whole.topk(4, -1).indices)


def test_a_batch_brings_what_the_teacher_says_of_its_own_tokens(taught, make_model):
    rows = rows_of([30, 9, 41], width=8)
    found, facts = taught(rows)
    batch = found.batch([4, 1], kernel=3)
    teacher = make_model("lfm2", seed=5)
    with torch.no_grad(), tree_rows(teacher):
        said = token_logprobs(teacher, batch)  # (N, 1 + K): the target's, then the candidates'
    torch.testing.assert_close(said[:, 1:], batch.teacher, atol=0.01, rtol=0.002)  # stored as float16
    torch.testing.assert_close(said[:, 0], token_logprobs_of(teacher, rows, [4, 1]))
    assert facts["teacher_tokens"] == int(rows.learned_counts().sum())
    assert 0.0 < facts["teacher_mass"] < 1.0


def token_logprobs_of(model, rows, indices):
    with torch.no_grad(), tree_rows(model):
        return token_logprobs(model, rows.batch(indices, kernel=3))


def test_a_second_run_asks_no_teacher_and_another_one_does(taught):
    rows = rows_of([30, 9, 41], width=8)
    taught(rows)
    taught(rows)
    assert len(taught.calls) == 1
    taught(rows, digest="b" * 64)
    taught(rows, k=4)
    taught(rows_of([30, 9, 41], width=8, seed=1))
    assert len(taught.calls) == 4


def test_what_a_teacher_says_does_not_depend_on_the_student_s_convolutions(taught):
    """A student without convolutions brings batches without taps; the teacher needs its own."""
    rows = rows_of([30, 9, 41], width=8)
    expected, _ = taught(rows)
    found, _ = taught(rows, digest="b" * 64, passes=replace(taught.passes, kernel=1))
    assert torch.equal(found.batch(range(9), kernel=3).teacher, expected.batch(range(9), kernel=3).teacher)


def test_rows_of_a_head_beyond_the_vocabulary_are_never_candidates(taught, make_model):
    """Heads are padded; an id above 65,535 would not even fit its two bytes."""
    padded = make_model("lfm2", vocab=70_000, seed=5)
    found, _ = taught(rows_of([24], width=8), model=padded)
    batch = found.batch([0, 1], kernel=3)
    assert int(batch.candidates.max()) < 96
    with torch.no_grad(), tree_rows(padded):
        said = token_logprobs(padded, batch)
    torch.testing.assert_close(said[:, 1:], batch.teacher, atol=0.01, rtol=0.002)  # mass over the whole head


def test_processes_of_one_machine_share_the_teacher_s_work(taught, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 4)
    rows = rows_of([80], width=8)  # three shards
    alone, _ = taught(rows)
    alone = alone.batch(range(9), kernel=3).teacher.clone()
    (folder,) = teacher_cache.cache_dir("teacher").iterdir()
    other = folder.with_name("of-the-other-process")
    folder.rename(other)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    made, all_mine = [], threading.Event()
    original = teacher_cache._store

    def store(where, number, arrays):
        original(where, number, arrays)
        made.append(number)
        if len(made) == 2:
            all_mine.set()

    def other_process():
        all_mine.wait(60)
        for file in sorted(other.glob("00001.*"), reverse=True):
            shutil.copy(file, folder)

    monkeypatch.setattr(teacher_cache, "_store", store)
    thread = threading.Thread(target=other_process)
    thread.start()
    shared, _ = taught(rows)
    thread.join()
    assert made == [0, 2]
    assert torch.equal(shared.batch(range(9), kernel=3).teacher, alone)


def test_a_cache_that_cannot_be_written_is_one_line_that_names_its_setting(taught, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EDGEALIGN_CACHE", str(blocked))
    with pytest.raises(OutputError, match=r"cannot be written .*; set EDGEALIGN_CACHE"):
        taught(rows_of([24], width=8))


def test_a_disk_that_fills_up_leaves_whole_shards_only_and_the_next_run_goes_on(taught, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 4)
    rows = rows_of([80], width=8)
    saved = np.save

    def full(file, array, **options):
        if (file.parent / "00000.json").exists():
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved(file, array, **options)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache.np, "save", full)
        with pytest.raises(OutputError, match="No space left"):
            taught(rows)
    (folder,) = teacher_cache.cache_dir("teacher").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["00000.ids.npy", "00000.json", "00000.logprobs.npy"]
    _, facts = taught(rows)
    assert facts["teacher_shards_made"] == 2


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "marker", "foreign"])
def test_a_damaged_shard_is_made_again_and_only_that_one(harm, taught, monkeypatch, capsys):
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 4)
    rows = rows_of([80], width=8)
    before, _ = taught(rows)
    before = before.batch(range(9), kernel=3).teacher.clone()
    (folder,) = teacher_cache.cache_dir("teacher").iterdir()
    file, marker = folder / "00001.logprobs.npy", folder / "00001.json"
    whole = file.read_bytes()
    if harm == "flip":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "truncate":
        file.write_bytes(whole[:-7])
    elif harm == "remove":
        file.unlink()
    elif harm == "marker":
        marker.write_text("{")
    else:
        np.save(file, np.zeros((3, 3)))
    untouched = (folder / "00000.ids.npy").stat().st_mtime_ns
    after, facts = taught(rows)
    assert facts["teacher_shards_made"] == 1
    assert "shard 1 of the teacher's cache" in capsys.readouterr().err
    assert torch.equal(after.batch(range(9), kernel=3).teacher, before)
    assert (folder / "00000.ids.npy").stat().st_mtime_ns == untouched


def test_a_student_comes_closer_to_its_teacher(lfm2, make_model, taught, tmp_path):
    rows = rows_of([600], width=16)
    found, _ = taught(rows, model=make_model("lfm2", seed=5))
    losses = {}
    for name, ce_weight in (("taught", 0.0), ("text alone", 1.0)):
        student = copy.deepcopy(lfm2)
        task = DistillTask(found, temperature=1.0, ce_weight=ce_weight)
        recipe = DistillRecipe(max_tokens=16, batch_size=4, epochs=4, learning_rate=5e-3, compile="off", save_every_s=0)
        (tmp_path / name).mkdir()
        fit(student, task, recipe, passes=taught.passes, work=tmp_path / name)
        with torch.no_grad(), tree_rows(student):
            batch = found.batch(range(10), kernel=3)
            logps = token_logprobs(student, batch)
        losses[name] = float(DistillTask(found, 1.0, 0.0).loss(logps, batch, range(10))[0])
    assert losses["taught"] < 0.7 * losses["text alone"]


def test_an_interrupted_distillation_ends_with_the_very_same_weights(lfm2, taught, tmp_path, monkeypatch):
    found, _ = taught(rows_of([600], width=16))
    task = DistillTask(found, 2.0, 0.5)
    recipe = DistillRecipe(max_tokens=16, batch_size=4, max_steps=8, save_every_steps=3, save_every_s=0, compile="off")
    original = AlignTrainer.training_step
    results = []
    for name in ("whole", "broken", "broken"):
        model, work = copy.deepcopy(lfm2), tmp_path / name
        dies = name == "broken" and not work.exists()
        work.mkdir(exist_ok=True)

        def step(self, *args, dies=dies, **kwargs):
            if dies and self.state.global_step == 5:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        monkeypatch.setattr(AlignTrainer, "training_step", step)
        try:
            fit(model, task, recipe, passes=taught.passes, work=work)
        except KeyboardInterrupt:
            continue
        results.append(model)
    assert len(results) == 2
    for a, b in zip(*(m.parameters() for m in results), strict=True):
        assert torch.equal(a, b)


def test_the_stage_publishes_a_student_and_compares_by_plain_cross_entropy(tiny_model, texts, tmp_path):
    common = {"max_tokens": 32, "batch_size": 4, "valid_fraction": 0.2, "learning_rate": 5e-3}
    teacher = pretrain.run(PretrainRecipe(**common, epochs=6), model=tiny_model, data=[texts], out=tmp_path / "teacher")
    recipe = DistillRecipe(**common, top_k=8, total_tokens=1280)
    student = distill.run(recipe, model=tiny_model, teacher=teacher.path, data=[texts], out=tmp_path / "student")
    meta = student.manifest.meta
    assert meta["before"]["loss"] == pytest.approx(teacher.manifest.meta["before"]["loss"], abs=1e-5)
    assert meta["after"]["loss"] < meta["before"]["loss"] - 0.3
    assert meta["teacher_tokens"] <= 1280  # asked only about the rows that the run uses
    assert meta["teacher_bytes"] < 8 * 4 * meta["teacher_tokens"] + 4096
    assert {entry.role for entry in student.manifest.inputs} >= {"model", "teacher", "data"}
    log = [json.loads(line) for line in (student.path / "log.jsonl").read_text().splitlines()]
    assert {"ce", "kl_membership", "kl_inside"} <= set(log[0])


def test_a_teacher_of_another_vocabulary_is_refused_in_one_line(tiny_model, texts, tmp_path):
    other = init(InitRecipe(shape="tiny", vocab_size=300), text=[], out=tmp_path / "other")
    with pytest.raises(InputError, match=r"another vocabulary \(300 tokens\)"):
        distill.run(DistillRecipe(), model=tiny_model, teacher=other.path, data=[texts], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_there_are_is_a_mistake_in_the_recipe(tiny_model, texts, tmp_path):
    with pytest.raises(RecipeError, match=r"top_k 600: is more than the 512 tokens there are; lower --top-k"):
        distill.run(DistillRecipe(top_k=600), model=tiny_model, teacher=tiny_model, data=[texts], out=tmp_path / "out")


def test_no_more_is_asked_of_a_teacher_than_the_steps_need():
    rows = rows_of([800], width=8)
    assert len(distill._needed(rows, DistillRecipe(batch_size=4, max_steps=3))) == 12
    assert len(distill._needed(rows, DistillRecipe(max_tokens=8, batch_size=4, total_tokens=64))) == 8
    assert len(distill._needed(rows, DistillRecipe(batch_size=4, epochs=3))) == len(rows)


def test_the_plan_counts_every_token_of_the_cache_once(tiny_model, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "a" * 4 * 2**20}) + "\n")  # about 2^20 tokens of 128 bytes each
    inputs = {"model": str(tiny_model), "teacher": str(tiny_model), "data": [str(text)]}
    said = [plan_stage("distill", DistillRecipe(epochs=n), inputs)["estimate"]["teacher"] for n in (1, 5)]
    assert all(line.startswith("about 128 MiB of cache; one forward pass over the data, about") for line in said)
    later = plan_stage("distill", DistillRecipe(), {**inputs, "teacher": str(tmp_path / "later")})["estimate"]
    assert later["teacher"] == "about 128 MiB of cache; one forward pass over the data, once it is there"


def test_plain_rows_score_as_before(lfm2):
    """The branch for candidates leaves everybody else alone."""
    rows = rows_of([40], width=8)
    assert token_logprobs_of(lfm2, rows, [0, 1]).ndim == 1
    assert PretrainTask(rows).weight(0) == 8
