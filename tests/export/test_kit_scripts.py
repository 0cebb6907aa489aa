"""The phone kit's scripts against a double of adb: what is pushed, what comes back, what is refused and how.

The double (`adb_double.sh`) stands for the cable. Behind it, in these tests, are stand-ins for llama.cpp's programs
that answer as told: they show what the scripts do, not what a phone would say. `test_kit_qemu.py` runs the real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "export" / "kits" / "android"
ARM = b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x02\0\xb7\0" + b"\0" * 44
INTEL = ARM[:18] + b"\x3e\0" + ARM[20:]

# llama-completion as far as the scripts use it: ids into the head of the prompt cache, times on stdout.
COMPLETION = f"""#!{sys.executable}
import json, os, struct, sys
given = sys.argv[1:]
if os.environ.get("STAND_IN_FAILS"):
    sys.exit("error: failed to load model 'model.gguf'")
user = given[given.index("--lora") + 1].split("/")[1].removesuffix(".gguf") if "--lora" in given else "-"
prompt = given[given.index("-bf") + 1].split("-")[-1].removesuffix(".txt")
assert open("model.gguf").read() == "weights", "the wrong folder"
if "--prompt-cache" in given:
    ids = json.load(open(os.environ["STAND_IN_ANSWERS"]))[user][prompt]
    with open(given[given.index("--prompt-cache") + 1], "wb") as file:
        file.write(b"ggsn" + struct.pack(f"<II{{len(ids)}}i", 9, len(ids), *ids) + b"state" * 100)
print("common_perf_print: prompt eval time =      52.50 ms /   507 tokens (    0.10 ms per token,  9657.14 ...)")
print("common_perf_print:        eval time =      40.25 ms /     3 runs   (   13.42 ms per token,    74.53 ...)")
"""
BENCH = f"""#!{sys.executable}
import json, os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if os.environ.get("STAND_IN_PRINTS"):
    print(os.environ["STAND_IN_PRINTS"])
    sys.exit(0)
for threads in given["-t"].split(","):
    for depth in given["-d"].split(","):
        for prompt in given["-p"].split(","):
            shape = {{"n_prompt": int(prompt), "n_gen": int(given["-n"]), "n_depth": int(depth)}}
            print(json.dumps({{**shape, "n_threads": int(threads)}}))
"""


@dataclass
class Phone:
    """A bundle with a kit, a folder of programs, and the device that the double has."""

    root: Path
    environment: dict[str, str]

    @property
    def device(self) -> Path:
        return self.root / "device" / "edgealign"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def answers(self) -> Path:
        return self.root / "answers.json"

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(self.bundle / "kit" / script), *arguments], capture_output=True, text=True, check=False,
            env={**self.environment, **environment}, stdin=subprocess.DEVNULL, cwd=self.root,
        )

    def calls(self) -> list[str]:
        """What adb was asked since the last time."""
        log = Path(self.environment["ADB_DOUBLE_LOG"])
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def pushed(self) -> list[str]:
        return [Path(line.split()[3]).name for line in self.calls() if " push " in line]


@pytest.fixture
def phone(tmp_path: Path) -> Iterator[Phone]:
    bundle, programs, stand_ins = (tmp_path / name for name in ("bundle", "programs", "stand-ins"))
    for folder in (bundle / "adapters", programs, stand_ins):
        folder.mkdir(parents=True)
    shutil.copytree(SCRIPTS, bundle / "kit")
    (bundle / "model.gguf").write_text("weights")
    (bundle / "adapters" / "ana.gguf").write_text("ana")
    (bundle / "kit" / "speed.txt").write_text("once upon a time")
    for number in (1, 2):
        (bundle / "kit" / f"prompt-{number}.txt").write_text(f"prompt {number}")
    (bundle / "kit" / "expected.tsv").write_text(
        "# made by a test\n# undecided up to 0.2000 logits: 2 times what rounding moved a lead on that machine\n"
        "-\t1\t4\t1 5 6\t10 11 12\t3.0000 0.1000 2.0000\n-\t2\t4\t1 7\t20 21\t3.0000 2.5000\n"
        "ana\t1\t4\t1 5 6\t30 31 32\t3.0000 0.3000 2.0000\nana\t2\t4\t1 7\t40\t3.0000\n"
    )
    base, ana = {"1": [1, 5, 6, 10, 11, 12], "2": [1, 7, 20, 21]}, {"1": [1, 5, 6, 30, 31, 32], "2": [1, 7, 40]}
    (tmp_path / "answers.json").write_text(json.dumps({"-": base, "ana": ana}))
    for name, code in (("llama-completion", COMPLETION), ("llama-bench", BENCH)):
        (programs / name).write_bytes(ARM)
        (stand_ins / name).write_text(code)
        (stand_ins / name).chmod(0o755)
    (programs / "libllama.so").write_bytes(ARM)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ADB", "ANDROID"))},
        "ADB": str(HERE / "adb_double.sh"), "ADB_DOUBLE_LOG": str(tmp_path / "calls"),
        "ADB_DOUBLE_PROGRAMS": str(stand_ins), "LLAMA_BIN": str(programs),
        "STAND_IN_ANSWERS": str(tmp_path / "answers.json"), "DIR": str(tmp_path / "device" / "edgealign"),
        "TMPDIR": str(tmp_path),
    }  # fmt: skip
    yield Phone(tmp_path, environment)
    assert not list(tmp_path.glob("tmp.*")), "a script left its scratch folder"


def rows(table: str) -> list[list[str]]:
    return [line.split("\t") for line in table.splitlines()[1:]]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_the_scripts_are_posix_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(script)], check=True)


def test_the_expected_tokens_pass_and_every_file_is_on_the_device(phone: Phone) -> None:
    done = phone.run("check.sh")
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == [
        ["-", "1", "3", "3", "same", "-"], ["-", "2", "2", "2", "same", "-"],
        ["ana", "1", "3", "3", "same", "-"], ["ana", "2", "1", "1", "same", "-"],
    ]  # fmt: skip
    assert done.stderr.splitlines()[-1] == "4 of 4 answers have the expected tokens"
    there = {path.relative_to(phone.device).as_posix() for path in phone.device.rglob("*") if path.is_file()}
    assert {
        "model.gguf", "adapters/ana.gguf", "kit/prompt-1.txt", "kit/prompt-2.txt", "kit/speed.txt", "bin/llama-bench",
        "bin/llama-completion", "bin/libllama.so", ".edgealign-kit",
    } <= there  # fmt: skip
    assert not [name for name in there if name.endswith((".part", "state.bin"))]


@pytest.mark.parametrize(
    ("user", "prompt", "ids", "verdict", "status"),
    [
        ("-", "1", [1, 5, 6, 10, 99, 12], ["1", "3", "undecided", "0.1000"], 0),
        ("ana", "1", [1, 5, 6, 30, 99, 32], ["1", "3", "different", "0.3000"], 1),
        ("ana", "1", [1, 5, 6, 10, 11, 12], ["0", "3", "different", "3.0000"], 1),  # the adapter was not on
        ("-", "1", [1, 5, 6, 10, 11], ["2", "3", "different", "2.0000"], 1),
        ("-", "2", [1, 7, 20, 21, 22], ["2", "2", "goes on", "-"], 1),
        ("-", "1", [1, 1, 5, 6, 10, 11, 12], ["0", "3", "other prompt", "-"], 1),
        ("-", "1", [], ["0", "3", "other prompt", "-"], 1),
    ],
)
def test_another_token_is_named_with_its_lead(
    phone: Phone, user: str, prompt: str, ids: list[int], verdict: list[str], status: int
) -> None:
    answers = json.loads(phone.answers.read_text())
    answers[user][prompt] = ids
    phone.answers.write_text(json.dumps(answers))
    done = phone.run("check.sh")
    assert done.returncode == status, done.stderr
    assert [user, prompt, *verdict] in rows(done.stdout)
    said = done.stderr.splitlines()[-1]
    assert said.startswith("check.sh: 3 of 4" if status else "3 of 4 answers have the expected tokens, 1 part")


def test_only_what_changed_is_pushed(phone: Phone) -> None:
    assert phone.run("check.sh").returncode == 0
    assert len(phone.pushed()) == 8
    assert phone.run("check.sh").returncode == 0
    assert phone.pushed() == []
    (phone.bundle / "adapters" / "ana.gguf").write_text("ana again")
    (phone.device / "kit" / "prompt-1.txt").write_text("half")
    assert phone.run("check.sh").returncode == 0
    assert phone.pushed() == ["ana.gguf", "prompt-1.txt"]


def test_bench_brings_whole_json_into_one_folder_beside_the_bundle(phone: Phone) -> None:
    done = phone.run("bench.sh", "--threads", "1,4", "--prompt", "128,512", "--gen", "32", "--reps", "2")
    assert done.returncode == 0, done.stderr
    results = Path(done.stdout.strip())
    assert results.parent == phone.root / "bundle-results"
    assert sorted(os.listdir(results)) == ["conditions.json", "llama-bench.json", "machine.json", "users.json"]
    measured = json.loads((results / "llama-bench.json").read_text())
    shapes = {(row["n_prompt"], row["n_gen"], row["n_depth"], row["n_threads"]) for row in measured}
    pairs = [(length, threads) for length in (128, 512) for threads in (1, 4)]
    assert shapes == {(length, 0, 0, n) for length, n in pairs} | {(0, 32, length, n) for length, n in pairs}
    users = json.loads((results / "users.json").read_text())
    assert [row["user"] for row in users] == [None, "ana"] * 4
    assert users[0] == {
        "program": "llama-completion", "user": None, "n_threads": 1, "repetition": 1,
        "n_prompt": 507, "prompt_ms": 52.5, "n_gen": 3, "gen_ms": 40.25,
    }  # fmt: skip
    card = json.loads((results / "machine.json").read_text())
    assert card["device"] == 'Nobody Double "One"'
    assert card["os"] == "Android 16"
    assert card["cpu"] is None
    assert 0 <= card["cpu_busy_before"] <= 1
    conditions = json.loads((results / "conditions.json").read_text())
    assert list(conditions) == ["before", "after"]
    assert conditions["after"]["battery_tenths_celsius"] == 287
    assert conditions["after"]["powered"] == {"ac": False, "usb": True}


@pytest.mark.parametrize(
    "trouble", [{"STAND_IN_PRINTS": '{"n_prompt": 512'}, {"ADB_DOUBLE_FAIL": "pull"}, {"STAND_IN_FAILS": "1"}]
)
def test_a_run_that_breaks_leaves_no_results(phone: Phone, trouble: dict[str, str]) -> None:
    done = phone.run("bench.sh", "--reps", "1", **trouble)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("bench.sh: ")
    assert list((phone.root / "bundle-results").iterdir()) == []
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "message"),
    [
        ([], {"ADB": "no-such-adb"}, 3, "no-such-adb: is not installed; install Android's platform-tools"),
        ([], {"ADB_DOUBLE_DEVICES": ""}, 2, "sees no device; plug one in"),
        ([], {"ADB_DOUBLE_DEVICES": "double\\tunauthorized"}, 2, "double: does not trust this computer yet; unlock it"),
        ([], {"ADB_DOUBLE_DEVICES": "double\\toffline"}, 2, "double: is offline"),
        ([], {"ADB_DOUBLE_DEVICES": "double\\tno permissions (plugdev)"}, 2, "cannot be used (no permissions"),
        ([], {"ADB_DOUBLE_DEVICES": "double\\tdevice\\nother\\tdevice"}, 2, "double other: are connected; choose one"),
        (["--serial", "elsewhere"], {}, 2, "elsewhere: is not connected"),
        ([], {"ADB_DOUBLE_ABI": "x86_64"}, 2, "double: is no 64-bit Arm device (x86_64)"),
        ([], {"LLAMA_BIN": ""}, 3, "llama.cpp: is not given; give the folder"),
        (["--llama-bin", "/usr/lib"], {}, 3, "/usr/lib: holds no llama-bench"),
        ([], {"ADB_DOUBLE_FREE_KIB": "2048"}, 2, "double: has 2 MiB free, 64 MiB are needed"),
        ([], {"ADB_DOUBLE_FAIL": "push"}, 1, "model.gguf: cannot be pushed (adb: error: failed to copy"),
        ([], {"ADB_DOUBLE_FAIL": "damage"}, 1, "model.gguf: arrived damaged"),
        (["--thread", "4"], {}, 2, "--thread: is no option; see: sh"),
        (["--threads"], {}, 2, "--threads: needs a value"),
        (["--threads", "four"], {}, 2, "--threads four: is not a whole number above 0; for example --threads 4"),
        (["--threads", "0"], {}, 2, "--threads 0: is not a whole number above 0"),
        (["--threads", "1,,2"], {}, 2, "is not a whole number above 0"),
        (["--gen", "1,2"], {}, 2, "--gen 1,2: is more than one number"),
        (["--dir", "/data/local/tmp"], {}, 2, "/data/local/tmp: is no folder of our own"),
        (["--dir", "/sdcard/a b; rm -rf x"], {}, 2, "is no folder of our own"),
        (["--dir", "relative/folder"], {}, 2, "is no folder of our own"),
        (["--dir", "/data/../etc"], {}, 2, "is no folder of our own"),
        (["--clean"], {}, 2, "is not there, or is not this kit's; nothing was removed"),
    ],
)
def test_every_failure_is_one_line_with_its_exit_code(
    phone: Phone, arguments: list[str], environment: dict[str, str], status: int, message: str
) -> None:
    done = phone.run("bench.sh", *arguments, **environment)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("pushing ")]
    assert len(lines) == 1
    assert lines[0].startswith("bench.sh: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(INTEL, "for another processor (ELF machine 62)"), (b"#!/bin/sh\n", "is no program for Android"), (b"", "no ELF")],
)
def test_programs_for_another_processor_are_refused_before_anything_is_pushed(
    phone: Phone, content: bytes, message: str
) -> None:
    (phone.root / "programs" / "llama-completion").write_bytes(content)
    done = phone.run("check.sh")
    assert done.returncode == 3
    assert message in done.stderr
    assert not phone.device.exists()


def test_a_program_that_fails_on_the_device_says_why(phone: Phone) -> None:
    done = phone.run("check.sh", STAND_IN_FAILS="1")
    assert done.returncode == 1
    assert "failed on double for user - (error: failed to load model 'model.gguf')" in done.stderr


def test_clean_removes_the_kits_folder_and_no_other(phone: Phone) -> None:
    assert phone.run("check.sh").returncode == 0
    assert phone.run("bench.sh", "--clean").returncode == 0
    assert not phone.device.exists()
    phone.device.mkdir(parents=True)
    (phone.device / "photo.jpg").write_text("mine")
    for arguments in (["--clean"], []):
        done = phone.run("bench.sh", *arguments)
        assert done.returncode == 2
        assert "not this kit's" in done.stderr
    assert [path.name for path in phone.device.iterdir()] == ["photo.jpg"]


def test_results_never_go_into_the_bundle(phone: Phone) -> None:
    before = sorted(phone.bundle.rglob("*"))
    for inside in (phone.bundle, phone.bundle / "kit" / "results"):
        done = phone.run("bench.sh", "--out", os.path.relpath(inside, phone.root))
        assert done.returncode == 2
        assert "is inside the bundle" in done.stderr
    assert sorted(phone.bundle.rglob("*")) == before
