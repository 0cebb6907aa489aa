"""Results as a benchmark makes them, from made-up times; and reports of them, published."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgealign.artifact import publish
from edgealign.bench.cells import Cell
from edgealign.bench.rows import describe_seconds, speed_rows
from edgealign.bench.run import SCHEMA, SOURCE
from edgealign.runtimes.session import Bundle

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`load_benchmark("fspo")`: the program benchmarks/fspo.py as a module, until the test ends."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


MakeResult = Callable[..., dict[str, Any]]
MakeReport = Callable[..., Path]

CARD = {
    "cpu": "A CPU", "architecture": "x86_64", "flags": ["avx2"], "cores_usable": 2, "cores_logical": 2,
    "ram_bytes": 2**34, "governor": None, "virtual_machine": False, "os": "An OS", "kernel": "6", "libc": None,
    "python": "3.11", "versions": {"edgealign": "0"}, "load_average_before": None, "cpu_busy_before": 0.0,
}  # fmt: skip


@pytest.fixture
def make_result() -> MakeResult:
    """Factory of results; `speeds`: decode tokens per second by (target, quant), prefill ten times that.

    Samples lie within 2 % of it; an adapter costs 20 %, a second thread brings 60 %.
    """

    def make(
        speeds: Mapping[tuple[str, str], float], *, users: bool = True, threads: tuple[int, ...] = (1,),
        card: Mapping[str, Any] | None = None, caveats: tuple[str, ...] = (), version: str = "1.0",
        model_digest: str | None = "d" * 64, kl: float | None = 0.01, bytes_per_token: int | None = 10**8,
    ) -> dict[str, Any]:  # fmt: skip
        machine = {**CARD, **(card or {})}
        rows: list[dict[str, Any]] = []
        bundles = []
        for (target, quant), speed in speeds.items():
            name = f"{target}-{quant}"
            bundle = Bundle(Path(name), target, quant, Path(name, "model"), {"ana": Path(name, "ana")})
            for count in threads:
                for user in (None, "ana") if users else (None,):
                    rate = speed * (1 + 0.6 * (count - 1)) * (0.8 if user else 1.0)
                    wobble = (0.98, 0.99, 1.0, 1.01, 1.02)
                    found = {
                        "prefill_ns": [round(512e8 / (rate * part)) for part in wobble],
                        "decode_ns": [round(100e9 / (rate * part)) for part in wobble],
                        "ttft_ns": [round(512e8 / (rate * part)) for part in wobble],
                        "peak_bytes": 4 * 10**8, "interpreter_bytes": 10**8, "facts": {"version": version},
                    }  # fmt: skip
                    cell = Cell("speed", name, bundle, count, 512, 100, user)
                    rows += speed_rows(cell, len(rows) // 2, "2026-01-01T00:00:00+00:00", found, machine)
            bundles.append({
                "bundle": name, "target": target, "quant": quant, "digest": "b" * 64, "model_digest": model_digest,
                "file_bytes": 2 * 10**8, "adapter_bytes": {"ana": 10**6},
                "fidelity": {
                    "kl": kl, "largest_logit_gap": None, "change_kept": {"ana": 0.98},
                    "origin": "the parity gate" if kl is not None else None,
                },
                "token_bytes": {"bytes": bytes_per_token, "how": "weights that a token touches"},
                "model_n_params": None, "system_info": None, "load_s": describe_seconds([10**8] * 3),
                "load_threads": threads[0], "loaded_from": "page cache (warm)",
                "adapter_load_s": describe_seconds([10**6] * 3), "swap_s": describe_seconds([10**5] * 3),
                "swap_threads": threads[0], "prompt_after_swap_s": None, "prompt_s": None, "errors": [],
            })  # fmt: skip
        return {
            "schema": SCHEMA, "source": SOURCE, "comparable": not caveats, "caveats": list(caveats),
            "machine": machine, "recipe": {"repetitions": 5}, "results": rows, "bundles": bundles,
            "bandwidth": [
                {"threads": count, "bytes_per_s": 2e10 * count, "samples": [], "buffer_bytes": 1, "error": None}
                for count in threads
            ],
        }  # fmt: skip

    return make


@pytest.fixture
def make_report(tmp_path: Path) -> MakeReport:
    """Factory of published reports: `make_report("name", result)`, or any text in the place of the result."""

    def make(name: str, result: dict[str, Any] | str) -> Path:
        text = result if isinstance(result, str) else json.dumps(result)
        with publish(tmp_path / name, kind="report", format="bench", stage="bench", recipe={}) as draft:
            (draft.dir / "result.json").write_text(text, encoding="utf-8")
        return tmp_path / name

    return make


def llama_row(n_prompt: int, n_gen: int, n_depth: int = 0, **changes: Any) -> dict[str, Any]:
    """One row as `llama-bench -o json` prints it, of a phone that there is not; 100 and 10 tokens per second."""
    tokens, rate = n_prompt + n_gen, 100.0 if n_prompt else 10.0
    samples = [round(tokens * 1e9 / rate * part) for part in (0.99, 1.0, 1.01, 1.0, 0.995)]
    speeds = [tokens * 1e9 / sample for sample in samples]
    return {
        "build_commit": "a1b2c3d4", "build_number": 7321, "cpu_info": "Cortex-X9", "gpu_info": "", "backends": "CPU",
        "model_filename": "/data/local/tmp/edgealign/model.gguf", "model_type": "lfm2 350M Q4_0",
        "model_size": 219_000_000, "model_n_params": 354_483_968, "n_batch": 2048, "n_ubatch": 512, "n_threads": 4,
        "cpu_mask": "0x0", "cpu_strict": False, "poll": 50, "type_k": "f16", "type_v": "f16", "n_gpu_layers": 99,
        "split_mode": "layer", "main_gpu": 0, "no_kv_offload": False, "flash_attn": False, "devices": "auto",
        "tensor_split": "0.00", "tensor_buft_overrides": "none", "load_mode": "mmap", "embeddings": False,
        "no_op_offload": 0, "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth,
        "test_time": "2026-02-03T04:05:06Z", "avg_ns": sum(samples) // 5, "stddev_ns": 1_000_000,
        "avg_ts": sum(speeds) / 5, "stddev_ts": 0.5, "samples_ns": samples, "samples_ts": speeds, **changes,
    }  # fmt: skip


def stats_line(start_ms: int = 1_760_000_000_000, prompt_ms: int = 800, decode_ms: int = 2_000, **changes: Any) -> str:
    """One line as ExecuTorch's runner prints it."""
    prompt_end = start_ms + prompt_ms
    stats = {
        "prefill_token_per_sec": 640.0, "decode_token_per_sec": 50.0, "prompt_tokens": 512, "generated_tokens": 100,
        "model_load_start_ms": start_ms - 900, "model_load_end_ms": start_ms - 400, "inference_start_ms": start_ms,
        "inference_end_ms": prompt_end + decode_ms, "prompt_eval_end_ms": prompt_end, "first_token_ms": prompt_end + 5,
        "aggregate_sampling_time_ms": 3, "SCALING_FACTOR_UNITS_PER_SECOND": 1000, **changes,
    }  # fmt: skip
    return f"PyTorchObserver {json.dumps(stats)}\n"


@pytest.fixture
def llama_file(tmp_path: Path) -> Callable[..., Path]:
    """Factory of files as llama-bench prints them: prompt, and decode after it, unless other rows are given."""

    def make(*rows: dict[str, Any], name: str = "bench.json") -> Path:
        text = json.dumps(list(rows) or [llama_row(512, 0), llama_row(0, 100, 512)], indent=2)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return make


@pytest.fixture
def rows() -> Callable[..., dict[str, Any]]:
    return llama_row


@pytest.fixture
def stats() -> Callable[..., str]:
    return stats_line
