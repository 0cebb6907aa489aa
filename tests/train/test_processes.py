"""Several processes (torchrun, gloo) learn what one learns: preference training, its facts, its memory, its cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgealign.objectives.table import find, names

WITH_STATE = tuple(key for key in names() if find(key).state)
TOGETHER = (*WITH_STATE, *(key for key in names() if find(key).couples), "hypo_online_kl")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Runs of `fit`, one an objective, whose weights and memory every process writes down; all can end after some steps.
PROGRAM = """
import copy, os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from edgealign.objectives.table import find
from edgealign.train import processes, trainer
from edgealign.train.anchors import Anchors
from edgealign.train.beside import with_unrelated
from edgealign.train.layout import pair
from edgealign.train.online import OnlineAnswers
from edgealign.train.precision import Precision
from edgealign.train.recipes import PreferenceRecipe
from edgealign.train.scoring import Passes, score
from edgealign.train.preference_task import PreferenceTask
from edgealign.train.tasks import PerToken
from dataclasses import replace
from transformers import Lfm2Config, Lfm2ForCausalLM

out, dies_at = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1 + processes.rank())
tiny = Lfm2ForCausalLM(Lfm2Config(vocab_size=96, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
lanes = Passes.for_training(tiny, Precision("float32", "float32", False), lora=False, tokens_per_pass=512).lanes
assert lanes == 1, "a process has one thread, so none has two lanes: all cut a step alike"
torch.set_num_threads(1)
draw = torch.Generator().manual_seed(1)
texts = [[torch.randint(3, 96, (n,), generator=draw).tolist() for n in (4, 3 + i % 5, 9 - i % 4)] for i in range(18)]
pairs = [replace(pair(*text), facts={"user": "ann" if i % 3 else "bo"}) for i, text in enumerate(texts)]
recipe = PreferenceRecipe(
    batch_size=6, epochs=3, learning_rate=1e-3, precision="float32", save_every_s=0, save_every_steps=2,
)
plain = trainer.AlignTrainer.training_step
class Died(BaseException):
    pass
def step(self, *args, **kwargs):
    if self.state.global_step == dies_at:
        processes.wait()  # the checkpoint of process 0 is whole
        raise Died
    return plain(self, *args, **kwargs)
trainer.AlignTrainer.training_step = step
for objective in sys.argv[3:]:
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(Lfm2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, pad_token_id=0,
    ))
    passes = Passes.of(model, Precision("float32", "float32", False), tokens_per_pass=40)
    entry = find(objective)
    trees = with_unrelated(pairs, 64) if "unrelated" in entry.columns else list(pairs)
    reference = PerToken.of(score(model, trees, passes, shared=True), trees)
    online = OnlineAnswers(
        trees, copy.deepcopy(model), passes, end=2, samples=2, max_new_tokens=5, max_tokens=64, seed=0,
    ) if "online" in entry.columns else None
    anchors = Anchors.of(entry, model, trees, passes, head_learns=True)
    task = PreferenceTask(
        trees, entry, entry.beta, reference, users=("ann", "bo"), anchors=anchors, online=online,
    )
    work = out / objective / "work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        done = trainer.fit(model, task, recipe, passes=passes, work=work)
    except Died:
        continue
    state = {f"memory.{name}": value for name, value in task.state.items()}
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    save_file({**values, **state}, out / objective / f"process-{processes.rank()}.safetensors")
    (out / objective / f"resumed-{processes.rank()}").write_text(str(done.resumed_at))
    processes.wait()
"""


def start(*command: str, cache: Path) -> None:
    env = {**os.environ, "EDGEALIGN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_two_processes_publish_what_one_publishes_and_share_the_reference(tiny_model, tmp_path, command, monkeypatch):
    """dpo of the objective that keeps a number for every annotator; the rows of each pass decide which."""
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No " * (i % 4) + "no!",
         "user_id": "bo" if i % 3 else "ann"}
        for i in range(24)
    ]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        "dpo", "--model", str(tiny_model), "--data", str(data), "--objective", "lcpo_latent",
        "--batch-size", "8", "--tokens-per-pass", "64", "--epochs", "2", "--learning-rate", "1e-3",
        "--precision", "float32", "--threads", "1", "--valid-fraction", "0.15",
    )  # fmt: skip
    monkeypatch.setenv("EDGEALIGN_CACHE", str(tmp_path / "cache1"))
    assert command(*options, "--out", tmp_path / "one") == 0
    start(*TORCHRUN, "-m", "edgealign", *options, "--out", str(tmp_path / "two"), cache=tmp_path / "cache2")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    same(*weights)
    before = load_file(tiny_model / "model.safetensors")
    assert max(float((value - before[name]).abs().max()) for name, value in weights[0].items()) > 1e-3
    logs = [[json.loads(row) for row in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    for mine, other in zip(*logs, strict=True):
        assert mine["tokens"] == other["tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["margin_mean"] == pytest.approx(other["margin_mean"], abs=1e-4)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n / "reference").iterdir()} for n in ("cache1", "cache2"))
    assert one == two
    assert len(one) == 2  # pairs to train on, pairs held out


@pytest.mark.slow
def test_two_processes_remember_the_same_and_resume_it(tmp_path):
    """Objectives that keep numbers between steps, compare pairs with each other or draw answers; in turn in the same
    processes: one takes ten seconds to start."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    one, two = tmp_path / "one", tmp_path / "two"
    start(sys.executable, str(program), str(one), "-1", *TOGETHER, cache=tmp_path)
    start(*TORCHRUN, str(program), str(two), "5", *TOGETHER, cache=tmp_path)
    for objective in TOGETHER:
        saved = (two / objective / "work" / "checkpoint-4" / "task_state.safetensors").is_file()
        assert saved == (objective in WITH_STATE)
        assert not (two / objective / "process-0.safetensors").exists()
    start(*TORCHRUN, str(program), str(two), "-1", *TOGETHER, cache=tmp_path)
    for objective in TOGETHER:
        assert [(two / objective / f"resumed-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
        wanted = load_file(one / objective / "process-0.safetensors")
        assert bool([name for name in wanted if name.startswith("memory.")]) == (objective in WITH_STATE)
        for rank in (0, 1):
            same(wanted, load_file(two / objective / f"process-{rank}.safetensors"))
