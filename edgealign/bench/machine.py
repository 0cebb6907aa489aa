"""The machine card: what a speed means nothing without. No host name, no user name, no path."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgealign.runtimes.probe import usable_cores as usable_cores

# Instruction sets that decide which kernels run.
TELLING_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd",
    "asimddp", "i8mm", "sve", "bf16",
)  # fmt: skip
# Up to this share of the cores may be in use by others on a quiet machine.
QUIET = 0.10
PACKAGES = (
    "edgealign", "llama-cpp-python", "gguf", "onnxruntime", "onnxruntime-genai", "executorch", "torch", "transformers",
    "numpy",
)  # fmt: skip


def machine_card() -> dict[str, Any]:
    """Facts about this machine; what cannot be read is null."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "flags": [flag for flag in TELLING_FLAGS if flag in flags],
        "cores_usable": usable_cores(),
        "cores_logical": os.cpu_count(),
        "ram_bytes": _ram_bytes(),
        "cache_bytes": last_cache_bytes(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "virtual_machine": "hypervisor" in flags,
        "os": _os_name(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "python": platform.python_version(),
        "versions": _versions(),
        "load_average_before": load_average(),
        "cpu_busy_before": cpu_busy(),
    }


def load_average() -> list[float] | None:
    """Over 1, 5 and 15 minutes."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None


def cpu_busy(watch_s: float = 0.5) -> float:
    """The share of all cores that was in use while this function slept, from 0 to 1."""
    import psutil

    return round(float(psutil.cpu_percent(interval=watch_s)) / 100, 3)


def busy(card: Mapping[str, Any]) -> bool:
    """Did others use the cores just before the measurement? The load average would still count our own past."""
    return float(card["cpu_busy_before"]) > QUIET


def last_cache_bytes() -> int | None:
    """Size of the last cache before the memory; it may be shared with cores that this machine does not show."""
    found = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = _read(str(file)) or ""
        if size[:-1].isdigit() and size[-1] in "KM":
            found.append(int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]])
    return max(found, default=None)


def peak_bytes() -> int | None:
    """The most memory that was resident in this process, mapped model pages included.

    On Linux VmHWM, not ru_maxrss: the latter starts at the resident size of the process that started this one.
    """
    status = _read("/proc/self/status")
    if status:
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if platform.system() == "Darwin" else size * 1024


def _cpuinfo() -> dict[str, str]:
    """The first core's entries."""
    found: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() and key.strip() not in found:
            found[key.strip()] = value.strip()
    return found


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return f"{platform.system()} {platform.release()}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
