"""Which arithmetic a machine should train in, and how it is applied.

bfloat16 needs a unit that multiplies it: AMX or AVX512-BF16 on x86, the bf16 extension on Arm, any recent GPU.
Elsewhere it is emulated and slower than float32.

How: with a LoRA the frozen weights themselves are stored in bfloat16 (half the memory traffic) and the LoRA stays in
float32 under autocast; with full training all weights stay in float32 (an update is far smaller than a bfloat16
step) and autocast rounds them for the products.

Measured with AVX512-BF16 and one thread, forward and backward of four LFM2 layers with a LoRA, tokens per second:

    hidden size   float32   autocast   bfloat16 weights   mean error of a log-probability (nats)
            128     7,800     12,100             12,400   0.001 to 0.002
            512       910      1,810              1,860   0.004 to 0.006
          1,024       260        560                570   0.006 to 0.008
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

NATIVE_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
SMALL_PARAMETERS = 10_000_000  # below this float32 is quick enough, and exact


@dataclass(frozen=True)
class Precision:
    """`weights`: the type that frozen weights are loaded in; `autocast`: whether products run in bfloat16."""

    name: str
    weights: str
    autocast: bool

    def context(self, device: torch.device | str = "cpu") -> contextlib.AbstractContextManager[object]:
        """Run forward passes inside this."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def choose_precision(requested: str, *, lora: bool, n_parameters: int) -> Precision:
    """`auto` becomes what this machine is quick at; anything else is taken as asked."""
    if requested == "auto":
        requested = "bfloat16" if native_bfloat16() and n_parameters >= SMALL_PARAMETERS else "float32"
    if requested == "float32":
        return Precision("float32", "float32", False)
    return Precision("bfloat16", "bfloat16" if lora else "float32", True)


def native_bfloat16() -> bool:
    """Whether the machine multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(NATIVE_FLAGS & cpu_flags())


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The instruction sets that Linux lists; empty where it lists none."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    lines = (line for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    return set(next(lines, ":").partition(":")[2].split())


@contextmanager
def fixed_threads(threads: int) -> Iterator[int]:
    """Use this many CPU threads within the block (0: as many as now); the number decides the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
