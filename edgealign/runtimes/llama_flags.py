"""Choose CMake flags for llama-cpp-python by looking at the CPU. Standard library only: it runs before any install.

    CMAKE_ARGS="$(python edgealign/runtimes/llama_flags.py)" pip install llama-cpp-python

A native build on a CPU with AMX crashes on every quantised model (llama.cpp #20824, open pull request #26954: the
compiler drops the stores that configure the AMX tiles). So on x86 the build is not native: each instruction set that
the CPU has is named, AMX is not. On 64-bit ARM the native build is right.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
PACKAGE = "llama-cpp-python"

# CMake option -> the /proc/cpuinfo flags that it needs. A build that is not native has these on by default:
# a CPU that lacks one needs an explicit OFF.
ON_BY_DEFAULT = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_AVX2": ("avx2",),
    "GGML_BMI2": ("bmi2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
}
# These are off by default. GGML_AVX512 compiles with all five of its foundations.
OFF_BY_DEFAULT = {
    "GGML_AVX_VNNI": ("avx_vnni",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"),
    "GGML_AVX512_VBMI": ("avx512_vbmi", "avx512vbmi"),
    "GGML_AVX512_VNNI": ("avx512_vnni", "avx512vnni"),
    "GGML_AVX512_BF16": ("avx512_bf16", "avx512bf16"),
}
SPELLINGS = ("GGML_AVX512_VBMI", "GGML_AVX512_VNNI", "GGML_AVX512_BF16")  # kernels spell these flags in two ways
X86 = ("x86_64", "amd64", "i686", "i386", "x86")


def cmake_args(cpuinfo: str | None = None, machine: str | None = None) -> list[str]:
    """The flags for this CPU, or for the given text of /proc/cpuinfo and machine name."""
    machine = (platform.machine() if machine is None else machine).lower()
    if machine not in X86:
        return ["-DGGML_NATIVE=ON"]
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.is_file() else ""
    has = cpu_flags(cpuinfo)
    if not has:  # no way to look: the defaults of a portable build
        return ["-DGGML_NATIVE=OFF"]
    args = ["-DGGML_NATIVE=OFF"]
    args += [f"-D{name}={'ON' if has.issuperset(needs) else 'OFF'}" for name, needs in ON_BY_DEFAULT.items()]
    wide = has.issuperset(OFF_BY_DEFAULT["GGML_AVX512"])
    for name, needs in OFF_BY_DEFAULT.items():
        found = bool(has.intersection(needs)) if name in SPELLINGS else has.issuperset(needs)
        if found and (wide or not name.startswith("GGML_AVX512")):
            args.append(f"-D{name}=ON")
    return args


def cpu_flags(cpuinfo: str) -> set[str]:
    """The flags that every core has."""
    cores = [
        set(value.split())
        for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())
        if key.strip() == "flags"
    ]
    return set.intersection(*cores) if cores else set()


def install_command(version: str = "") -> str:
    """The command that compiles a llama-cpp-python which is safe on this CPU."""
    wanted = f"{PACKAGE}=={version}" if version else PACKAGE
    arguments = " ".join(cmake_args())
    return f'CMAKE_ARGS="{arguments}" pip install --force-reinstall --no-cache-dir --no-binary :all: --no-deps {wanted}'


if __name__ == "__main__":
    sys.stdout.write(" ".join(cmake_args()) + "\n")
