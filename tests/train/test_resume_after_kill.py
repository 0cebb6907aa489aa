"""SIGKILL at ten different moments: no half artifact, and the resumed run publishes the very same weights.

A child process imports everything once and then forks for every attempt, so that a kill costs a fraction of a second.
Each attempt dies where its plan says: at a call that stands for a moment of the run, the n-th time it happens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgealign.artifact import open_artifact, sha256_file

pytestmark = pytest.mark.slow

# (moment, how many times it has happened). `step`: before a step; `mid`: between two passes of one step, or between
# forward and backward; `saving`: while a checkpoint is written; `marking`: it is written but not marked complete.
MOMENTS = [
    ("reading", 1), ("scoring", 1), ("step", 1), ("mid", 4), ("step", 4), ("saving", 1), ("marking", 2), ("mid", 11),
    ("saving", 3), ("merging", 1), ("publishing", 1), ("renaming", 1),
]

CHILD = r'''
import json, os, signal, sys, traceback
import matplotlib.backends.backend_agg, matplotlib.figure, peft, torch  # slow to import: once, before the forks
torch.set_num_threads(1)
from edgealign import artifact
from edgealign.train import checkpoints, examples, preference, scoring, sft, stage, trainer
from edgealign.train.recipes import PreferenceRecipe, SftRecipe

PLACES = {
    "reading": (examples, "read_all"), "scoring": (scoring, "token_logprobs"),
    "step": (trainer.AlignTrainer, "training_step"), "mid": (trainer.AlignTrainer, "_forward"),
    "saving": (trainer.AlignTrainer, "_save_optimizer_and_scheduler"),
    "marking": (checkpoints, "mark_complete"), "merging": (stage, "_final_model"), "publishing": (stage, "draw_curves"),
    "renaming": (os, "rename"),
}

def die_at(moment, times):
    owner, name = PLACES[moment]
    original = getattr(owner, name)
    seen = 0
    def patched(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == times:
            if moment == "saving":  # leave half of a file behind
                original(*args, **kwargs)
                file = os.path.join(args[1], "optimizer.pt")
                with open(file, "r+b") as stream:
                    stream.truncate(os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, patched)

def run(job):
    module, recipe = {"sft": (sft, SftRecipe), "dpo": (preference, PreferenceRecipe)}[job["stage"]]
    os.environ["EDGEALIGN_CACHE"] = job["out"] + "-cache"
    if job["moment"]:
        die_at(*job["moment"])
    module.run(recipe(**job["recipe"]), model=job["model"], data=job["data"], out=job["out"])

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            run(json.loads(line))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(9)
    _, status = os.waitpid(pid, 0)
    print(json.dumps(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), flush=True)
'''

COMMON = {"batch_size": 4, "tokens_per_pass": 80, "threads": 1, "valid_fraction": 0.1, "save_every_steps": 2}
JOBS = {
    "sft": {"stage": "sft", "recipe": {**COMMON, "epochs": 2, "learning_rate": 1e-2}},
    "dpo": {
        "stage": "dpo",
        "recipe": {**COMMON, "epochs": 2, "learning_rate": 1e-2, "lora": True, "rank": 4, "lora_dropout": 0.1},
    },
}


@pytest.fixture(scope="module")
def child():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def run(job):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


@pytest.fixture(scope="module")
def material(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"{i} it is." * (1 + i % 3), "rejected": f"No {i}!" * (1 + i % 2)}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    return {"model": str(tiny_model), "sft": [str(folder / "turns.jsonl")], "dpo": [str(folder / "pairs.jsonl")]}


@pytest.fixture(scope="module")
def uninterrupted(child, material, tmp_path_factory):
    """The weights that a run publishes when nobody kills it."""
    results = {}
    for stage, job in JOBS.items():
        out = tmp_path_factory.mktemp("whole") / stage
        status = child({**job, "moment": None, "model": material["model"], "data": material[stage], "out": str(out)})
        assert status == 0
        results[stage] = (sha256_file(out / "model.safetensors"), steps_of(out), open_artifact(out).meta)
    return results


def steps_of(out: Path):
    """The log without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tok_per_s"} for row in rows]


@pytest.mark.parametrize("stage", JOBS)
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m[0]}{m[1]}")
def test_a_killed_run_resumes_to_the_same_bits(stage, moment, child, material, uninterrupted, tmp_path):
    out = tmp_path / stage
    job = {**JOBS[stage], "model": material["model"], "data": material[stage], "out": str(out)}
    assert child({**job, "moment": moment}) == -9, "the plan's moment never came"
    assert not out.exists(), "a killed run left an artifact"
    assert child({**job, "moment": None}) == 0
    weights, steps, meta = uninterrupted[stage]
    assert sha256_file(out / "model.safetensors") == weights
    assert steps_of(out) == steps
    published = open_artifact(out).meta
    assert (published["before"], published["after"]) == (meta["before"], meta["after"])
    assert {entry.name for entry in tmp_path.iterdir()} <= {stage, f"{stage}-cache"}, "leftovers"
    if moment[0] not in ("reading", "scoring", "step", "mid") and moment != ("saving", 1):
        assert published["resumed_at_step"] > 0, "it started over instead of resuming"


def test_two_kills_in_a_row_change_nothing_either(child, material, uninterrupted, tmp_path):
    out = tmp_path / "dpo"
    job = {**JOBS["dpo"], "model": material["model"], "data": material["dpo"], "out": str(out)}
    for moment in (("mid", 9), ("saving", 1), ("publishing", 1)):
        assert child({**job, "moment": moment}) == -9
        assert not out.exists()
    assert child({**job, "moment": None}) == 0
    assert sha256_file(out / "model.safetensors") == uninterrupted["dpo"][0]


def test_another_recipe_does_not_resume_the_old_run(child, material, uninterrupted, tmp_path):
    """The control: what the checkpoints belong to is checked."""
    out = tmp_path / "sft"
    job = {**JOBS["sft"], "model": material["model"], "data": material["sft"], "out": str(out)}
    assert child({**job, "moment": ["step", 8]}) == -9
    job["recipe"] = {**job["recipe"], "learning_rate": 2e-2}
    assert child({**job, "moment": None}) == 0
    assert open_artifact(out).meta["resumed_at_step"] == 0
    assert sha256_file(out / "model.safetensors") != uninterrupted["sft"][0]
