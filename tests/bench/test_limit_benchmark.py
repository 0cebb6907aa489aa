"""benchmarks/decode_limit.py: the parts of a token's time add up to it, and what limits a kernel is read off right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def program(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("decode_limit")


def one_round(shift: float = 0.0, cached_ms: float = 1.0) -> dict[str, Any]:
    """A token takes 22 ms after 500 others, 20 after 8; the thin graph 2; 180 MB at 15 GB/s are 12 ms."""
    def row(probe: str, depth: int, ms: float) -> dict[str, Any]:
        return {"bundle": f"v/{probe}", "n_threads": 1, "n_depth": depth, "median_ns": (ms + shift) * 64e6,
                "n_gen": 64, "error": None}  # fmt: skip

    return {
        "rows": [row("full", 500, 22.0), row("full", 8, 20.0), row("thin", 8, 2.0), row("cached", 8, cached_ms)],
        "bandwidth": {"1": 15e9}, "bytes": {"v/full": 180_000_000, "v/cached": 9_000_000}, "caveats": [],
    }  # fmt: skip


def test_the_parts_add_up(program: ModuleType) -> None:
    found = program.split([one_round(), one_round(1.0), one_round(-1.0)], "v", 1)
    assert found["ms"] == pytest.approx(22.0)
    assert (found["low"], found["high"]) == (pytest.approx(21.0), pytest.approx(23.0))
    assert found["fixed"] + found["context"] + found["memory"] + found["kernels"] == pytest.approx(found["ms"])
    assert (found["fixed"], found["context"]) == (pytest.approx(2.0), pytest.approx(2.0))
    assert (found["memory"], found["kernels"]) == (pytest.approx(12.0), pytest.approx(6.0))
    assert found["share"] == pytest.approx(12 / 22)
    assert found["read_per_s"] == pytest.approx(10e9)


@pytest.mark.parametrize(("cached_ms", "limit"), [(1.15, "arithmetic"), (0.85, "memory")])
def test_a_kernel_that_is_no_faster_from_the_cache_waits_for_arithmetic(
    cached_ms: float, limit: str, program: ModuleType, tmp_path: Path
) -> None:
    """Two of sixteen layers cost 0.25 of the thin graph's 2 ms: 9 MB in 0.9 ms are 10 GB/s, in 0.6 ms 15."""
    part = program.split([one_round(cached_ms=cached_ms)], "v", 1)
    result = {
        "parts": [part], "caveats": [], "settings": {"shape": "s", "long": 500, "rounds": 1, "repetitions": 3},
        "machine": {"cpu": "A CPU", "cores_usable": 2, "os": "An OS", "versions": {}},
    }  # fmt: skip
    line = program.render(result).splitlines()[2]
    assert line.endswith(f"| {limit} |")
    program.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    json.dumps(result)
