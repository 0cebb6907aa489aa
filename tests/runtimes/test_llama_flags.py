"""Build flags for llama-cpp-python from /proc/cpuinfo: never AMX, never an instruction that the CPU lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgealign.runtimes import llama_flags

BASE = "fpu sse4_2 avx avx2 bmi2 fma f16c"
WIDE = "avx512f avx512cd avx512bw avx512dq avx512vl"


def cpuinfo(*cores: str) -> str:
    return "\n\n".join(f"processor\t: {n}\nflags\t\t: {flags}\nbugs\t\t: none" for n, flags in enumerate(cores))


def flags(*cores: str, machine: str = "x86_64") -> set[str]:
    return set(llama_flags.cmake_args(cpuinfo(*cores), machine))


def test_a_cpu_with_amx_gets_everything_but_amx() -> None:
    found = flags(f"{BASE} {WIDE} avx512vbmi avx512_vnni avx512_bf16 avx_vnni amx_tile amx_int8 amx_bf16")
    assert "-DGGML_NATIVE=OFF" in found
    assert {"-DGGML_AVX512=ON", "-DGGML_AVX512_VBMI=ON", "-DGGML_AVX512_VNNI=ON", "-DGGML_AVX512_BF16=ON"} <= found
    assert "-DGGML_AVX_VNNI=ON" in found
    assert not any("AMX" in flag for flag in found)


def test_a_cpu_without_avx512_gets_none_of_its_flags() -> None:
    found = flags(BASE)
    assert not any("AVX512" in flag for flag in found)
    assert {"-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON"} <= found


def test_a_part_of_avx512_is_not_enough() -> None:
    assert not any("AVX512" in flag for flag in flags(f"{BASE} avx512f avx512cd avx512_vnni"))


def test_what_a_portable_build_has_by_default_is_switched_off_by_name() -> None:
    found = flags("fpu sse4_2 avx")
    assert {"-DGGML_AVX=ON", "-DGGML_AVX2=OFF", "-DGGML_FMA=OFF", "-DGGML_F16C=OFF", "-DGGML_BMI2=OFF"} <= found


def test_only_what_every_core_has_counts() -> None:
    assert "-DGGML_AVX512=ON" not in flags(f"{BASE} {WIDE}", BASE)


def test_an_arm_machine_builds_natively() -> None:
    for machine in ("aarch64", "arm64"):
        assert llama_flags.cmake_args("Features : fp asimd", machine) == ["-DGGML_NATIVE=ON"]


def test_without_a_look_at_the_cpu_the_build_is_portable() -> None:
    assert llama_flags.cmake_args("", "x86_64") == ["-DGGML_NATIVE=OFF"]


def test_the_script_runs_before_anything_is_installed() -> None:
    script = Path(llama_flags.__file__)
    answer = subprocess.run([sys.executable, "-I", "-S", str(script)], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == llama_flags.cmake_args()


def test_the_install_command_names_flags_and_version() -> None:
    command = llama_flags.install_command("0.3.36")
    assert command.startswith('CMAKE_ARGS="-DGGML_NATIVE=O')
    assert command.endswith("llama-cpp-python==0.3.36")
