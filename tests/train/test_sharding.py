"""Sharded weights (FSDP2, two processes on CPU): what one process learns and publishes, killed, resumed, refused.

A batch of 8 is the same 8 examples however many processes share them: here four each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgealign.errors import UsageError
from edgealign.train import preference, sharding
from edgealign.train.recipes import PreferenceRecipe, PretrainRecipe

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip
# `edgealign` that writes down the parts of every process and how many passes it ran, and can end before a step.
PROGRAM = """
import json, os, sys
from pathlib import Path
from edgealign.cli import main
from edgealign.train import processes, trainer

seen = Path(os.environ["SEEN"])
dies_at = int(os.environ.get("DIES_AT", "-1"))
plain, forward = trainer.AlignTrainer.training_step, trainer.Passes.logprobs
passes = 0

def logprobs(self, model, batch):
    global passes
    passes += 1
    return forward(self, model, batch)

def step(self, model, *args, **kwargs):
    if self.state.global_step == dies_at:
        processes.wait()  # the checkpoint of process 0 is whole
        os._exit(7)
    before = passes
    loss = plain(self, model, *args, **kwargs)
    parts = [[p.to_local().numel() if hasattr(p, "to_local") else p.numel(), p.numel()] for p in model.parameters()]
    row = {"parts": [sum(column) for column in zip(*parts)], "passes": passes - before}
    with open(seen / f"process-{processes.rank()}", "a") as file:
        file.write(json.dumps(row) + "\\n")
    return loss

trainer.Passes.logprobs, trainer.AlignTrainer.training_step = logprobs, step
main()
"""

# Log-probabilities and gradients of every architecture, whole and sharded; two passes, so that weights come twice.
ARCHITECTURES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import MAKERS
from edgealign.train import processes, sharding
from edgealign.train.layout import document, pack
from edgealign.train.logprobs import VERIFIED, is_sharded, token_logprobs
from edgealign.train.shortconv import kernel_width, tree_rows

torch.set_num_threads(1)
draw = torch.Generator().manual_seed(1)
for name, make in MAKERS.items():
    model = make()
    assert model.config.model_type in VERIFIED
    texts = [torch.randint(3, 96, (n,), generator=draw).tolist() for n in (9, 6, 7, 5)]
    batches = [pack([document(t, [True] * len(t)) for t in part], kernel=kernel_width(model))
               for part in (texts[:1], texts[1:2], texts[2:3], texts[3:])]
    with tree_rows(model):
        wanted = [token_logprobs(model, batch) for batch in batches]
        sum(logps.sum() for logps in wanted).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with sharding.sharded(model, True) as part, tree_rows(part):
        assert is_sharded(part) and not is_sharded(model)
        assert sum(p.numel() for p in model.parameters()) == 0
        with torch.no_grad():
            torch.testing.assert_close(token_logprobs(part, batches[0]), wanted[0])
        for logps, batch in list(zip(wanted, batches))[processes.rank() :: 2]:
            got = token_logprobs(part, batch)
            torch.testing.assert_close(got, logps)
            got.sum().backward()
        for n, p in part.named_parameters():
            told = lambda text, n=n: f"{name} {n}: {text}"
            torch.testing.assert_close(p.grad.full_tensor(), grads[n], atol=1e-4, rtol=1e-4, msg=told)
    for n, p in model.named_parameters():
        assert torch.equal(p, weights[n]), n
processes.wait()
"""


@pytest.fixture
def run(tmp_path):
    """`run(launcher, options, shard=..., dies_at=...)`: the command's stderr, and what its processes wrote down."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def start(launcher, *options, shard=False, dies_at=None):
        seen = tmp_path / f"seen{len(list(tmp_path.glob('seen*')))}"
        seen.mkdir()
        env = {
            **os.environ, "EDGEALIGN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "SEEN": str(seen),
            "HF_HOME": str(tmp_path / "hf"), **({"EDGEALIGN_SHARD": "1"} if shard else {}),
            **({} if dies_at is None else {"DIES_AT": str(dies_at)}),
        }  # fmt: skip
        command = [*launcher, str(program), *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
        assert (done.returncode == 0) is (dies_at is None), done.stderr[-4000:]
        return done.stderr, [
            [json.loads(row) for row in file.read_text().splitlines()] for file in sorted(seen.iterdir())
        ]

    return start


@pytest.fixture
def pairs(tmp_path):
    """20 pairs, of which 3 are held out: the last step of an epoch has one pair, so one process has none of its own."""
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No " * (i % 4) + "no!"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def same(ours: Path, theirs: Path) -> None:
    """Published weights to 1e-5, and the log's rows."""
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    logs = [[json.loads(row) for row in (n / "log.jsonl").read_text().splitlines()] for n in (ours, theirs)]
    assert len(logs[0]) == len(logs[1]) > 3
    for mine, other in zip(*logs, strict=True):
        assert (mine["step"], mine["tokens"]) == (other["step"], other["tokens"])
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def is_shared_out(seen) -> bool:
    """Whether each of two processes held about half of the weights at every step, and ran as many passes."""
    assert len(seen) == 2
    for rows in zip(*seen, strict=True):
        assert rows[0]["passes"] == rows[1]["passes"] > 0
        whole = rows[0]["parts"][1]
        if not all(0.4 * whole < row["parts"][0] < 0.6 * whole for row in rows):
            return False
        assert sum(row["parts"][0] for row in rows) == whole
    return True


@pytest.mark.slow
def test_two_processes_publish_what_one_publishes_however_they_are_started(tiny_model, pairs, run, command, tmp_path):
    options = (
        "dpo", "--model", str(tiny_model), "--data", pairs, "--batch-size", "8", "--tokens-per-pass", "64",
        "--epochs", "2", "--learning-rate", "3e-4", "--precision", "float32", "--threads", "1",
        "--valid-fraction", "0.15",
    )  # fmt: skip
    one = tmp_path / "one"
    assert command(*options, "--out", one) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, one))
    assert max(float((value - before[name]).abs().max()) for name, value in after.items()) > 5e-4
    ways = {
        "torchrun": (TORCHRUN, True, True),
        "accelerate-fsdp": ((*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"), False, True),
        "accelerate": ((*ACCELERATE, "--multi_gpu"), False, False),
    }
    for name, (launcher, shard, parts) in ways.items():
        said, seen = run(launcher, *options, "--out", str(tmp_path / name), shard=shard)
        same(one, tmp_path / name)
        assert is_shared_out(seen) is parts
        assert ("shared out" in said) is parts
    fewer = [rows[2]["passes"] for rows in seen]  # the step of one pair, by plain processes: nothing to wait for
    assert fewer == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kto", "rrpo"])
def test_sharded_weights_learn_what_compares_pairs_or_reads_the_whole_vocabulary(
    objective, tiny_model, pairs, run, command, tmp_path
):
    """kto looks at a step twice; in the step of one pair one process has nothing to look at, and gathers all the same.
    """
    options = (
        "dpo", "--objective", objective, "--model", str(tiny_model), "--data", pairs, "--batch-size", "8",
        "--tokens-per-pass", "64", "--epochs", "2", "--learning-rate", "3e-4", "--precision", "float32", "--threads",
        "1", "--valid-fraction", "0.15",
    )  # fmt: skip
    assert command(*options, "--out", tmp_path / "one") == 0
    _, seen = run(TORCHRUN, *options, "--out", str(tmp_path / "two"), shard=True)
    same(tmp_path / "one", tmp_path / "two")
    assert is_shared_out(seen)


@pytest.mark.slow
def test_a_sharded_run_is_resumed_by_two_processes_and_by_one(tiny_model, run, command, tmp_path):
    """Pre-training with evaluations on the way and recomputed activations; checkpoints are whole, so one can go on."""
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"The boat of {i} men is on river {i % 7}. " * 4} for i in range(40)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        "pretrain", "--model", str(tiny_model), "--data", str(text), "--max-tokens", "32", "--batch-size", "8",
        "--max-steps", "7", "--tokens-per-pass", "96", "--optimizer", "adamw", "--precision", "float32",
        "--threads", "1", "--gradient-checkpointing", "--save-every-s", "0", "--save-every-steps", "2",
        "--eval-every-tokens", "768", "--learning-rate", "3e-4", "--valid-fraction", "0.2",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert command(*options, "--out", one) == 0
    for dies_at in (3, 5):
        _, seen = run(TORCHRUN, *options, "--out", str(two), shard=True, dies_at=dies_at)
        assert is_shared_out(seen)
        assert len(seen[0]) == {3: 3, 5: 3}[dies_at]  # from the start, then from step 2
    assert command(*options, "--out", two) == 0
    same(one, two)
    assert json.loads((two / "manifest.json").read_text())["meta"]["resumed_at_step"] == 4
    histories = [[json.loads(row) for row in (n / "history.jsonl").read_text().splitlines()] for n in (one, two)]
    assert len(histories[0]) == len(histories[1]) >= 3
    for mine, other in zip(*histories, strict=True):
        assert (mine["step"], mine["tokens"]) == (other["step"], other["tokens"])
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)


@pytest.mark.slow
def test_every_architecture_has_the_same_gradients_sharded_and_its_weights_back(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(ARCHITECTURES)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(program), str(Path(__file__).parent)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (PretrainRecipe(optimizer="muon"), r"--optimizer muon with sharded weights.*adamw"),
        (PreferenceRecipe(qat="q4_0"), r"--qat with sharded weights.*EDGEALIGN_SHARD"),
        (PreferenceRecipe(lora=True), r"--lora with sharded weights.*EDGEALIGN_SHARD"),
        (PretrainRecipe(optimizer="adamw", compile="on"), r"--compile on with sharded weights.*off"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(recipe, message, monkeypatch):
    monkeypatch.setenv("EDGEALIGN_SHARD", "1")
    assert not sharding.wanted(recipe)  # one process has nothing to share out
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=message):
        sharding.wanted(recipe)


def test_other_ways_of_sharding_are_refused_before_anything_is_read(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"accelerate's DEEPSPEED: is not used here.*--use_fsdp"):
        preference.run(PreferenceRecipe(), model=tiny_model, data=["absent.jsonl"], out=tmp_path / "out")


def test_accelerate_s_switch_becomes_ours(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("EDGEALIGN_SHARD", "0")
    assert sharding.wanted(PreferenceRecipe())
    assert "ACCELERATE_USE_FSDP" not in os.environ  # or accelerate would wrap the model in its own way
    assert sharding.wanted(PreferenceRecipe())  # a second stage of the same process
