"""The phone kit's own scripts with llama.cpp's real arm64 programs, under qemu-user: same greedy tokens as on x86.

Cross-compiling llama.cpp takes longer than a test run should, so a folder of programs is given:

    EDGEALIGN_AARCH64_LLAMA=BUILD/bin python -m pytest tests/export/test_kit_qemu.py

docs/results/android_kit.md says how that folder is made. The one thing that is not real is the cable: `adb_double.sh`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PROGRAMS = os.environ.get("EDGEALIGN_AARCH64_LLAMA", "")
TinyLora = Callable[..., Path]

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAMS, reason="EDGEALIGN_AARCH64_LLAMA names no folder of llama.cpp's arm64 programs"),
    pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 is not installed (qemu-user)"),
]


def run(script: str, bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ADB": str(HERE / "adb_double.sh"), "DIR": str(bundle.parent / "device" / "edgealign")}
    return subprocess.run(
        ["sh", str(bundle / "kit" / script), "--llama-bin", PROGRAMS, "--threads", "1", *arguments],
        capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["f32", "q8_0", "q4_0"])
def bundle(request: pytest.FixtureRequest, tiny_lora: TinyLora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter with two users, exported with its kit."""
    from to_gguf import export

    from edgealign.export_recipes import ExportRecipe
    from edgealign.models.load import resolve_model

    starter = resolve_model("starter")
    users = {name: tiny_lora(seed=seed, base=starter, strength=0.2) for seed, name in enumerate(("ana", "ben"))}
    out = tmp_path_factory.mktemp(request.param) / "bundle"
    quick = ("prompt_lengths=1,2,9", "steps=2", "windows=1", "window_tokens=16")
    recipe = ExportRecipe(quant=request.param, verify=quick)
    export(recipe, model="starter", adapters=users, out=out, calibration=None, kit="android")
    return out


def test_arm64_draws_the_tokens_of_x86(bundle: Path) -> None:
    kit = json.loads((bundle / "manifest.json").read_text())["meta"]["kit"]
    assert min(kit["answers_changed"].values()) >= 3, "adapters that change little prove little"
    done = run("check.sh", bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = [line.split("\t")[4] for line in done.stdout.splitlines()[1:]]
    assert len(verdicts) == 18
    if "f32" in str(bundle):
        assert set(verdicts) == {"same"}
    else:  # 13 and 16 were measured with fitted adapters: the others part where rounding decides
        assert verdicts.count("same") >= 9


def test_users_in_each_others_place_are_found_out(bundle: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "bundle"
    shutil.copytree(bundle, swapped)
    shutil.copyfile(bundle / "adapters" / "ben.gguf", swapped / "adapters" / "ana.gguf")
    shutil.copyfile(bundle / "adapters" / "ana.gguf", swapped / "adapters" / "ben.gguf")
    done = run("check.sh", swapped)
    assert done.returncode == 1
    wrong = {line.split("\t")[0] for line in done.stdout.splitlines() if "\tdifferent\t" in line}
    assert wrong == {"ana", "ben"}


def test_the_real_programs_numbers_come_back_as_json(bundle: Path) -> None:
    done = run("bench.sh", bundle, "--prompt", "16", "--gen", "4", "--reps", "1")
    assert done.returncode == 0, done.stderr
    results = Path(done.stdout.strip())
    rows = json.loads((results / "llama-bench.json").read_text())
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [(16, 0, 0), (0, 4, 16)]
    assert all(len(row["samples_ns"]) == 1 and row["backends"] == "CPU" for row in rows)
    users = json.loads((results / "users.json").read_text())
    assert [row["user"] for row in users] == [None, "ana", "ben"]
    assert all(row["prompt_ms"] > 0 and row["gen_ms"] > 0 and row["n_gen"] == 3 for row in users)
