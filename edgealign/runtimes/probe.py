"""Does quantised inference work with this build of llama.cpp, on this CPU? Asked once, in a child process.

A native build of llama.cpp on a CPU with AMX dies with SIGSEGV or SIGILL on quantised weights (llama.cpp #20824),
and no parent survives that. So a child writes a small random model with Q8_0 and Q4_0 weights, loads it with the
default parameters and decodes a prompt and some single tokens. If the child dies, every session runs with llama.cpp's
extra weight buffers off, which is slower and safe. The answer is cached under the library's files and the CPU.

    python -m edgealign.runtimes.probe on|off        the child: exit 0 when inference works
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgealign.artifact import write_atomic
from edgealign.errors import ToolMissing
from edgealign.progress import say

DRIVEN_VERSION = "0.3.36"  # of llama-cpp-python: the API that llamacpp.py calls
TIMEOUT_S = 60.0
# A shell-like command to run in place of the child; tests put one here that really dies.
COMMAND_VARIABLE = "EDGEALIGN_PROBE_COMMAND"
CACHE_VARIABLE = "EDGEALIGN_CACHE"
SMALL_BYTES = 32 << 20  # of a model file that one thread decodes; see default_threads
CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")

# Rows of 256 and 512: a multiple of every repacking and AMX tile width, so that those kernels are what runs.
WIDTH, FEED_FORWARD, VOCAB, LAYERS, HEADS = 256, 512, 512, 2, 4
PROMPT_TOKENS, STEPS = 40, 4
ABSENT = ["absent"]


@dataclass(frozen=True)
class Verdict:
    """`extra_bufts`: may the extra buffers be used; `reason`: what the child said or died of."""

    extra_bufts: bool
    reason: str


def extra_buffers_work() -> bool:
    """The cached answer for this build and CPU; finds it out the first time.

    Raises:
        ToolMissing: llama-cpp-python is not installed, or its build cannot run at all.
    """
    if library_lines() == ABSENT:
        raise ToolMissing("llama-cpp-python", "is not installed", f"install it with: {install_line()}")
    verdict = judge(_child_command())
    if not verdict.extra_bufts:
        _warn(verdict.reason)
    return verdict.extra_bufts


def judge(command: tuple[str, ...]) -> Verdict:
    """Read the verdict from the cache, or run ``command`` with "on" (and "off" if that dies) and store it.

    Raises:
        ToolMissing: inference dies with the extra buffers off, too.
    """
    file = cache_dir() / f"llama-probe-{build_key(command)}.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return Verdict(bool(stored["extra_bufts"]), str(stored["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    verdict = _probe(command)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"extra_bufts": verdict.extra_bufts, "reason": verdict.reason}) + "\n")
    except OSError:
        say(f"edgealign: cannot write {file.parent}; llama.cpp is probed again each time")
    return verdict


def cache_dir() -> Path:
    """Where machine-wide facts are kept: ``EDGEALIGN_CACHE`` or ~/.cache/edgealign."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "edgealign"


@functools.cache
def build_key(command: tuple[str, ...]) -> str:
    """What the answer depends on: the library's files, the CPU, the probing command."""
    lines = [*library_lines(), platform.machine(), cpu_flags(), *command]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def library_lines() -> list[str]:
    """Name, size and time of every shared library of the installed wheel, without loading it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return ABSENT
    files = sorted(file for file in (Path(spec.origin).parent / "lib").glob("*") if file.is_file())
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def cpu_flags() -> str:
    """The CPU's model and instruction sets as the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_LIMIT.read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return cores


def default_threads(model: Path | None = None) -> int:
    """The threads of a runtime whose caller names none: OMP_NUM_THREADS, as in torch, or else the usable cores.

    `model` is the file of a runtime whose threads wait for one another after every operation, spinning (llama.cpp). A
    small one has little to share out: on two cores the starter (6.6 MB) decodes 1275 tokens/s with one thread and 1594
    with two, but 1146 and 224 beside a busy process. So it takes one. LFM2-350M (219 MB) decodes 37 and 48, beside 35
    and 22: it takes all. Between the two nothing was measured (docs/results/neighbour).
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if first.isdecimal() and int(first):
        return int(first)
    return 1 if model and model.is_file() and model.stat().st_size < SMALL_BYTES else usable_cores()


def install_line() -> str:
    """The command that builds llama-cpp-python safely for this CPU."""
    from edgealign.runtimes.llama_flags import install_command

    return install_command(DRIVEN_VERSION)


def _child_command() -> tuple[str, ...]:
    replaced = os.environ.get(COMMAND_VARIABLE)
    return tuple(shlex.split(replaced)) if replaced else (sys.executable, "-m", "edgealign.runtimes.probe")


def _probe(command: Sequence[str]) -> Verdict:
    fault = _run(command, "on")
    if fault is None:
        return Verdict(True, "quantised inference works")
    if (worse := _run(command, "off")) is not None:
        raise ToolMissing(
            "llama-cpp-python", f"quantised inference fails here ({worse})", f"rebuild it with: {install_line()}"
        )
    return Verdict(False, fault)


def _run(command: Sequence[str], extra: str) -> str | None:
    """None if the child ended well, otherwise what became of it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_root(), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [*command, extra], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"died of {signal.Signals(-done.returncode).name}"
    words = done.stderr.strip().splitlines()
    return words[-1] if words else f"exit status {done.returncode}"


@functools.cache
def _warn(reason: str) -> None:
    say(
        f"edgealign: quantised inference with this build of llama.cpp {reason}; it runs with the extra buffers off, "
        f"slower. Rebuild it with: {install_line()}"
    )


def _root() -> str:
    return str(Path(__file__).resolve().parents[2])


def write_model(file: Path) -> None:
    """A random llama with Q8_0 attention and Q4_0 feed-forward weights, without a tokenizer."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        values = rng.normal(0.0, 0.05, shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    q8, q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
    add("token_embd.weight", (VOCAB, WIDTH), q8)
    add("output.weight", (VOCAB, WIDTH), q8)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", (WIDTH, WIDTH), q8)
        add(f"blk.{layer}.ffn_gate.weight", (FEED_FORWARD, WIDTH), q4)
        add(f"blk.{layer}.ffn_up.weight", (FEED_FORWARD, WIDTH), q4)
        add(f"blk.{layer}.ffn_down.weight", (WIDTH, FEED_FORWARD), q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(extra: str) -> int:
    """The child: 0 when a quantised model loads and its logits are numbers."""
    import numpy as np

    from edgealign.runtimes.llamacpp import LlamaSession

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.gguf"
        write_model(file)
        # Two threads at least: the AMX defect also hits threads that never asked for the tiles.
        session = LlamaSession(file, threads=2, extra_bufts=extra == "on")
        rows = [session.prefill(list(range(PROMPT_TOKENS)))]
        rows += [session.step(token) for token in range(STEPS)]
        session.close()
    if not np.isfinite(np.stack(rows)).all():
        print("gives logits that are not numbers", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
