"""The benchmark: statistics by hand, a fresh process per cell, llama-bench's names, honest gaps."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.artifact import Artifact, open_artifact
from edgealign.bench import run as bench
from edgealign.bench.machine import busy, cpu_busy, machine_card, peak_bytes
from edgealign.bench.published import read_report
from edgealign.bench.recipes import BenchRecipe
from edgealign.bench.report import draw, render
from edgealign.bench.roofline import bandwidth_share
from edgealign.bench.rows import speed_rows
from edgealign.bench.timing import percentile, rates, spread, timed
from edgealign.errors import OutputError, UsageError
from edgealign.runtimes.probe import usable_cores
from edgealign.runtimes.session import Bundle, read_bundle

Bundles = Callable[[str], Path]
QUICK = BenchRecipe(prompt_tokens=(16,), gen_tokens=(4,), threads=(1,), repetitions=3, pause_s=0)

# Not in llama-bench: what we add. In llama-bench and not here: settings of GPUs and of its own command line.
LLAMA_BENCH = {
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_batch", "n_ubatch", "n_threads", "cpu_mask", "poll", "type_k", "type_v", "flash_attn",
    "load_mode", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts",
    "samples_ns", "samples_ts",
}  # fmt: skip


# --- statistics and machine ------------------------------------------------------------------------------------------


def test_spread_is_median_mean_sample_deviation_and_interpolated_p90() -> None:
    samples = [1.0, 2.0, 3.0, 4.0, 10.0]
    found = spread(samples)
    assert (found.n, found.median, found.mean) == (5, 3.0, 4.0)
    assert found.sd == pytest.approx(statistics.stdev(samples))
    assert found.p90 == pytest.approx(np.percentile(samples, 90)) == pytest.approx(7.6)
    assert spread([5.0]).sd == 0.0
    assert percentile([1.0, 2.0], 0.5) == 1.5


def test_rates_are_tokens_per_second_and_timed_returns_value_and_ns() -> None:
    assert rates([500_000_000, 1_000_000_000], 100) == [200.0, 100.0]
    value, taken_ns = timed(sum, [1, 2])
    assert value == 3
    assert taken_ns > 0


def test_the_machine_card_names_the_cpu_and_no_person_or_path() -> None:
    card = machine_card()
    assert card["cpu"]
    assert card["cores_usable"] == usable_cores() >= 1
    assert card["versions"]["edgealign"]
    for package in ("executorch", "onnxruntime-genai", "onnxruntime"):
        assert (package in card["versions"]) == (find_spec(package.replace("-", "_")) is not None)
    assert 0 <= card["cpu_busy_before"] <= 1
    text = json.dumps(card)
    for private in (os.uname().nodename, str(Path.home()), os.environ.get("USER") or "nobody here"):
        assert len(private) < 4 or private not in text


def test_a_machine_is_busy_when_others_use_its_cores() -> None:
    assert busy({"cpu_busy_before": 0.5})
    assert not busy({"cpu_busy_before": 0.02})
    assert 0 <= cpu_busy(0.05) <= 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_is_this_processs_own_and_not_its_parents() -> None:
    ballast = np.ones(40_000_000)  # 320 MB in the parent
    code = "from edgealign.bench.machine import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ballast.nbytes < (peak_bytes() or 0)
    assert 5_000_000 < int(done.stdout) < 100_000_000


# --- the plan and the rows -------------------------------------------------------------------------------------------


def fake(name: str, users: tuple[str, ...] = ()) -> Bundle:
    return Bundle(Path(name), "gguf", "q4_0", Path(name, "model.gguf"), {user: Path(name, user) for user in users})


def test_bundles_take_turns_within_each_shape() -> None:
    recipe = BenchRecipe(prompt_tokens=(16, 32), gen_tokens=(4,), threads=(1, 2))
    cells = bench.plan(recipe, {"a": fake("a", ("ana",)), "b": fake("b")})
    speed = [(cell.n_prompt, cell.threads, cell.user, cell.name) for cell in cells if cell.kind == "speed"]
    assert speed[:6] == [
        (16, 1, None, "a"), (16, 1, None, "b"), (16, 1, "ana", "a"),
        (16, 2, None, "a"), (16, 2, None, "b"), (16, 2, "ana", "a"),
    ]  # fmt: skip
    assert [(cell.kind, cell.threads) for cell in cells[-5:-3]] == [("bandwidth", 1), ("bandwidth", 2)]
    assert [(cell.kind, cell.name) for cell in cells[-3:]] == [("load", "a"), ("load", "b"), ("swap", "a")]


def test_adapters_are_left_out_on_request() -> None:
    cells = bench.plan(replace(QUICK, adapter=False, bandwidth=False), {"a": fake("a", ("ana",))})
    assert [(cell.kind, cell.user) for cell in cells] == [("speed", None), ("load", None)]


def test_rows_carry_llama_benchs_fields_and_its_arithmetic() -> None:
    cell = bench.Cell("speed", "a", fake("a"), 2, 16, 4)
    found = {"prefill_ns": [10**7, 2 * 10**7, 3 * 10**7], "decode_ns": [10**8] * 3, "ttft_ns": [10**7] * 3}
    prompt, decode = speed_rows(cell, 7, "2026-01-01T00:00:00+00:00", found, {"cpu": "a CPU"})
    assert set(prompt) >= LLAMA_BENCH
    assert set(decode) >= LLAMA_BENCH
    assert (prompt["cell"], prompt["target"], prompt["quant"]) == (7, "gguf", "q4_0")
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_depth"]) == (16, 0, 0)
    assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 4, 16)
    assert prompt["avg_ns"] == 2 * 10**7
    assert prompt["samples_ts"] == pytest.approx([1600, 800, 533.33], rel=1e-4)
    assert prompt["avg_ts"] == pytest.approx(statistics.fmean(prompt["samples_ts"]))
    assert prompt["stddev_ts"] == pytest.approx(statistics.stdev(prompt["samples_ts"]))
    assert (prompt["median_ts"], decode["median_ts"]) == (800, 40)
    assert prompt["p90_ts"] < prompt["median_ts"]
    assert prompt["ttft_s"]["median"] == 0.01


@pytest.mark.slow
def test_a_cell_that_was_not_measured_says_so(tmp_path: Path) -> None:
    cell = bench.Cell("speed", "a", fake("a"), 2, 16, 4)
    rows = speed_rows(cell, 0, "now", {"error": "its process died of SIGILL"}, {"cpu": "a CPU"})
    result = {
        "comparable": True, "caveats": [], "machine": machine_card(), "recipe": {"repetitions": 3}, "results": rows,
        "source": "edgealign bench", "bandwidth": [],
        "bundles": [{
            "bundle": "a", "target": "gguf", "quant": "q4_0", "file_bytes": 10, "adapter_bytes": {}, "load_s": None,
            "load_threads": 2, "swap_s": None, "swap_threads": None, "adapter_load_s": None,
            "loaded_from": "page cache (warm)", "errors": ["no result after 600 s"],
            "fidelity": {"kl": None, "largest_logit_gap": None, "change_kept": {}, "origin": None},
            "token_bytes": {"bytes": None, "how": "not read"},
        }],
    }  # fmt: skip
    text = render(result)
    assert "not measured: its process died of SIGILL" in text
    assert "not measured: no result after 600 s" in text
    assert [check.passed for check in bench._checks(result)] == [False, True]
    draw(result, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_two_bundles_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("x", "y", "z"):
        (tmp_path / parent / "bundle").mkdir(parents=True)
    names = bench._names([tmp_path / parent / "bundle" for parent in ("x", "y", "z")])
    assert list(names) == ["bundle", "bundle-2", "bundle-3"]


def test_no_bundle_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="got no bundle"):
        bench.run(QUICK, bundles=[])


def test_an_existing_output_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        bench.run(QUICK, bundles=[tmp_path / "nothing"], out=tmp_path)


# --- with llama.cpp --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tiny_bundle: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("bench") / "report"
    made = bench.run(QUICK, bundles=[tiny_bundle("f32"), tiny_bundle("q4_0")], out=out)
    assert isinstance(made, Artifact)
    return made


@pytest.mark.runtime
def test_a_report_holds_table_data_and_picture(report: Artifact) -> None:
    assert open_artifact(report.path, kind="report").digest == report.digest
    assert {entry.path for entry in report.manifest.files} == {"result.json", "table.md", "speed.png", "front.png"}
    assert all((report.path / name).read_bytes().startswith(b"\x89PNG") for name in ("speed.png", "front.png"))
    table = (report.path / "table.md").read_text()
    for words in ("tiny-f32", "tiny-q4_0", "prefill tok/s", "first token ms", "page cache (warm)", "swap to an"):
        assert words in table
    for line in table.splitlines()[2:6]:
        *cells, kl = line.strip("| ").split(" | ")
        assert "not measured" not in cells
        assert kl == "not measured"  # these bundles were published without the gate
    assert all(check.passed for check in report.manifest.checks)


@pytest.mark.runtime
def test_every_measure_has_as_many_samples_as_repetitions(report: Artifact) -> None:
    result = json.loads((report.path / "result.json").read_text())
    assert len(result["results"]) == 8  # two bundles, with and without a user, prompt and decode
    for row in result["results"]:
        assert len(row["samples_ns"]) == 3
        assert row["avg_ts"] > 0
        assert row["peak_bytes"] > row["interpreter_bytes"] > 1_000_000
        assert row["extra_bufts"] in (True, False)
    assert {row["user"] for row in result["results"]} == {None, "ana"}
    for bundle in result["bundles"]:
        for measure in ("load_s", "adapter_load_s", "swap_s", "prompt_after_swap_s", "prompt_s"):
            assert bundle[measure]["n"] == 3
            assert bundle[measure]["median"] > 0
        assert bundle["file_bytes"] > 100_000
        assert set(bundle["adapter_bytes"]) == {"ana", "ben"}
    assert str(report.path.parent) not in json.dumps(result)


@pytest.mark.runtime
def test_without_an_output_the_result_comes_back_as_data(tiny_bundle: Bundles) -> None:
    recipe = replace(QUICK, adapter=False, repetitions=2)
    result = bench.run(recipe, bundles=[tiny_bundle("q4_0")])
    assert isinstance(result, dict)
    assert "prefill tok/s" in result["text"]
    assert json.dumps(result)


@pytest.mark.runtime
def test_targets_stand_in_one_table_and_extra_buffers_are_llama_cpps(
    tiny_bundle: Bundles, onnx_bundle: Bundles, tmp_path: Path
) -> None:
    recipe = replace(QUICK, repetitions=2, threads=(1, 2))
    made = bench.run(recipe, bundles=[tiny_bundle("q4_0"), onnx_bundle("int4")], out=tmp_path / "report")
    assert isinstance(made, Artifact)
    result = read_report(made.path).result
    assert {(row["target"], row["quant"], row["n_threads"], row["user"]) for row in result["results"]} == {
        (target, quant, threads, user)
        for target, quant in (("gguf", "q4_0"), ("onnx", "int4")) for threads in (1, 2) for user in (None, "ana")
    }  # fmt: skip
    assert all(row["error"] is None for row in result["results"])
    assert {row["extra_bufts"] is None for row in result["results"] if row["target"] == "onnx"} == {True}
    assert {row["extra_bufts"] is None for row in result["results"] if row["target"] == "gguf"} == {False}
    assert [entry["threads"] for entry in result["bandwidth"]] == [1, 2]
    assert all(1e8 < entry["bytes_per_s"] < 1e13 for entry in result["bandwidth"])
    assert all(bandwidth_share(result, row) for row in result["results"] if row["n_gen"])
    assert {bundle["load_threads"] for bundle in result["bundles"]} == {1}
    alone = bench.measure(replace(recipe, threads=(1,), adapter=False), {"o": read_bundle(onnx_bundle("int4"))})
    assert "extra buffers" not in render(alone)


@pytest.mark.runtime
def test_extra_buffers_off_is_recorded_and_nothing_to_compare_with(
    tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_extra_bufts", lambda bundles: False)
    result = bench.measure(replace(QUICK, adapter=False, repetitions=2), {"tiny": read_bundle(tiny_bundle("q4_0"))})
    assert not result["comparable"]
    assert "extra buffers off" in result["caveats"][0]
    assert all(row["extra_bufts"] is False for row in result["results"])
    assert "extra buffers off" in render(result)


@pytest.mark.runtime
def test_a_process_that_fails_leaves_a_hole_and_a_failed_check(tiny_bundle: Bundles, tmp_path: Path) -> None:
    facts = read_bundle(tiny_bundle("q4_0"))
    broken = replace(facts, model_file=tmp_path / "model.gguf", adapters={})
    broken.model_file.write_bytes(b"GGUF and nothing else, but long enough to look at")
    result = bench.measure(QUICK, {"sound": replace(facts, adapters={}), "broken": broken})
    by_name = {row["bundle"]: row for row in result["results"]}
    assert by_name["sound"]["error"] is None
    assert "GGUF version" in by_name["broken"]["error"]
    assert by_name["broken"]["median_ts"] is None
    assert "not measured" in render(result)


@pytest.mark.runtime
def test_a_process_past_its_time_limit_is_not_measured(tiny_bundle: Bundles) -> None:
    cell = bench.Cell("speed", "tiny", read_bundle(tiny_bundle("q4_0")), 1, 16, 4)
    found = bench.measure_cell(replace(QUICK, timeout_s=0.01), cell, True)
    assert found == {"error": "no result after 0.01 s"}


@pytest.mark.runtime
def test_the_overhead_benchmark_measures_both_loops(tiny_bundle: Bundles, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "session_overhead.py"
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_bundle("q4_0")), "--threads", "1", "--tokens", "16", "--rounds", "3",
         "--json", str(out)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert "Session / raw loop" in done.stdout
    result: dict[str, Any] = json.loads(out.read_text())
    assert {name: len(samples) for name, samples in result["samples_ns"].items()} == {"session": 3, "raw": 3}
    assert result["reached"] is (done.returncode == 0)
    assert 0.3 < result["ratio"]["median"] < 3
