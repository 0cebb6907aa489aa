"""Other programs' measurements as our report: llama-bench's JSON, ExecuTorch's statistics, and what is neither."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgealign.artifact import open_artifact
from edgealign.bench import imports
from edgealign.bench.foreign import LARGEST_FILE, read_foreign
from edgealign.bench.published import read_report
from edgealign.errors import ArtifactError, InputError, OutputError, UsageError

Rows = Callable[..., dict[str, Any]]
Stats = Callable[..., str]
LlamaFile = Callable[..., Path]
PHONE = ["device=A phone", "cores_usable=8", "os=Android 16", "cpu_busy_before=0.01"]


# --- llama-bench -----------------------------------------------------------------------------------------------------


def test_a_llama_bench_file_becomes_a_report(llama_file: LlamaFile, tmp_path: Path) -> None:
    made = imports.run(llama_file(), device=PHONE, out=tmp_path / "phone")
    assert {entry.path for entry in made.manifest.files} == {"result.json", "table.md", "speed.png", "front.png"}
    assert (made.manifest.format, made.manifest.inputs[0].role) == ("bench", "llama-bench")
    result = read_report(made.path).result
    prompt, decode = result["results"]
    assert (prompt["cell"], prompt["n_prompt"], decode["cell"], decode["n_gen"], decode["n_depth"]) == (
        0, 512, 0, 100, 512,
    )  # fmt: skip
    assert (prompt["target"], prompt["quant"], prompt["bundle"]) == ("gguf", "q4_0", "model")
    assert prompt["median_ts"] == pytest.approx(100, rel=1e-3)
    assert prompt["build_version"] == result["machine"]["versions"]["llama.cpp"] == "b7321 (a1b2c3d4)"
    assert (result["source"], result["comparable"], result["caveats"]) == ("llama-bench", True, [])
    card = result["machine"]
    assert (card["device"], card["cpu"], card["cores_usable"], card["os"]) == ("A phone", "Cortex-X9", 8, "Android 16")
    assert card["ram_bytes"] is card["governor"] is card["flags"] is None
    table = (made.path / "table.md").read_text(encoding="utf-8")
    line = table.splitlines()[2]
    assert line.startswith("| gguf | q4_0 | model | off | 4 | 512 + 100 | 100 ± ")
    # first token, share of bandwidth, load, peak memory and KL: the file does not say them
    assert line.count("not measured") == 5
    assert "measured by: llama-bench" in table
    assert "/data/local" not in json.dumps(result)


def test_how_busy_the_device_was_must_be_said_to_compare(llama_file: LlamaFile, tmp_path: Path) -> None:
    silent = read_report(imports.run(llama_file(), device=[], out=tmp_path / "a").path).result
    assert not silent["comparable"]
    assert "how busy the device was is not known" in silent["caveats"][0]
    loud = read_report(imports.run(llama_file(), device=["cpu_busy_before=0.4"], out=tmp_path / "b").path).result
    assert not loud["comparable"]
    assert "40%" in loud["caveats"][0]


def test_prompt_and_decode_share_a_row_only_where_one_followed_the_other(llama_file: LlamaFile, rows: Rows) -> None:
    file = llama_file(
        rows(512, 0), rows(0, 100), rows(0, 100, 512), rows(512, 0, n_threads=2), rows(0, 50, 512, n_threads=2),
        rows(0, 60, 512, n_threads=2),
    )  # fmt: skip
    found = [(row["n_threads"], row["n_prompt"], row["n_gen"], row["n_depth"]) for row in read_foreign(file).rows]
    cells = [row["cell"] for row in read_foreign(file).rows]
    together = {cell: [row for row, own in zip(found, cells, strict=True) if own == cell] for cell in cells}
    assert sorted(map(tuple, together.values())) == sorted([
        ((4, 512, 0, 0), (4, 0, 100, 512)), ((4, 0, 100, 0),), ((2, 512, 0, 0), (2, 0, 50, 512)), ((2, 0, 60, 512),),
    ])  # fmt: skip


def test_what_is_not_a_prompt_or_a_decode_is_left_out_and_said(llama_file: LlamaFile, rows: Rows) -> None:
    foreign = read_foreign(llama_file(rows(512, 0), rows(512, 128)))
    assert len(foreign.rows) == 1
    assert "1 rows that time prompt and generation together" in foreign.notes[0]
    with pytest.raises(InputError, match="only together"):
        read_foreign(llama_file(rows(512, 128)))


def test_another_processor_than_the_cpu_is_a_reason_not_to_compare(llama_file: LlamaFile, rows: Rows) -> None:
    assert "Vulkan" in read_foreign(llama_file(rows(512, 0, backends="Vulkan,CPU"))).caveats[0]


@pytest.mark.parametrize(
    ("description", "quant"),
    [("lfm2 1.2B Q4_K - Medium", "q4_k_m"), ("lfm2 350M BF16", "bf16"), ("lfm2 350M F16", "f16"),
     ("llama ?B all F32", "f32"), ("lfm2 350M IQ2_XXS", "iq2_xxs"), ("", None)],
)  # fmt: skip
def test_quantisations_get_our_names(description: str, quant: str | None, llama_file: LlamaFile, rows: Rows) -> None:
    assert read_foreign(llama_file(rows(512, 0, model_type=description))).rows[0]["quant"] == quant


HOSTILE = [
    ({"samples_ns": []}, "no samples_ns"),
    ({"samples_ns": None}, "no samples_ns"),
    ({"samples_ns": [10**9] * 2000}, "no samples_ns"),
    ({"samples_ns": [0]}, "samples_ns = 0"),
    ({"samples_ns": [-5]}, "samples_ns = -5"),
    ({"samples_ns": [1.5e9]}, "no whole number"),
    ({"samples_ns": [True]}, "no whole number"),
    ({"samples_ns": ["1"]}, "no whole number"),
    ({"samples_ns": [10**400]}, "outside"),
    ({"avg_ts": -1.0}, "avg_ts = -1"),
    ({"avg_ts": 1e300}, "outside"),
    ({"avg_ts": 250.0}, "its samples say"),
    ({"n_prompt": -512}, "n_prompt = -512"),
    ({"n_prompt": 10**12}, "outside"),
    ({"n_prompt": 0}, "has no tokens"),
    ({"n_prompt": None}, "lacks n_prompt"),
    ({"n_threads": 0}, "n_threads = 0"),
    ({"model_size": -1}, "model_size"),
    ({"model_filename": "x" * 10_000}, "no short text"),
    ({"cpu_info": 7}, "no short text"),
]


@pytest.mark.parametrize(("change", "reason"), HOSTILE, ids=lambda value: str(value)[:40])
def test_numbers_that_no_machine_measures_are_refused(
    change: dict[str, Any], reason: str, llama_file: LlamaFile, rows: Rows, tmp_path: Path
) -> None:
    file = llama_file(rows(256, 0), rows(512, 0) | change)
    with pytest.raises(InputError, match="row 2") as caught:
        imports.run(file, device=[], out=tmp_path / "out")
    assert reason in caught.value.line()
    assert len(caught.value.line()) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_not_a_number_is_refused(word: str, llama_file: LlamaFile, rows: Rows) -> None:
    file = llama_file(rows(512, 0, avg_ts=12345.5))
    file.write_text(file.read_text(encoding="utf-8").replace("12345.5", word), encoding="utf-8")
    with pytest.raises(InputError):
        read_foreign(file)


FOREIGN = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "truncated": (b'[{"n_prompt": 512, "n_ge', "no whole JSON"),
    "object": (b'{"results": []}', "no list of llama-bench rows"),
    "no rows": (b"[]", "no list of llama-bench rows"),
    "numbers": (b"[1, 2, 3]", "row 1 is no row of fields"),
    "other rows": (b'[{"prompt": "a", "completion": "b"}]', "lacks n_prompt"),
    "markdown": b"| model | size |\n|---|---|\n",
    "deep": (b"[" * 100_000, "no whole JSON"),
    "not text": (b"\xff\xfe\x00\x01" * 100, "no text in UTF-8"),
    "half a line": (b'PyTorchObserver {"prompt_tokens": 5', "line 1 is no whole JSON"),
    "no statistics": (b"PyTorchObserver [1]", "line 1 is no row of fields"),
    "other statistics": (b'PyTorchObserver {"type": "x", "value": 3}', "lacks model_load_start_ms"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_that_holds_no_measurements_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    entry = FOREIGN[case]
    content, reason = entry if isinstance(entry, tuple) else (entry, "no whole JSON")
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_foreign(tmp_path / "file")
    assert reason in caught.value.line()
    assert len(caught.value.line()) < 400


def test_a_missing_file_and_a_huge_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_foreign(tmp_path / "nowhere")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(InputError, match="64 MiB"):
        read_foreign(tmp_path / "huge")


def test_one_shape_measured_twice_is_refused(llama_file: LlamaFile, rows: Rows) -> None:
    with pytest.raises(InputError, match=r"512 \+ 0 tokens after 0 with 4 threads twice"):
        read_foreign(llama_file(rows(512, 0), rows(512, 0, type_k="q8_0")))


def test_text_from_a_file_breaks_no_table_and_no_terminal(llama_file: LlamaFile, rows: Rows, tmp_path: Path) -> None:
    odd = rows(512, 0, cpu_info="a | b\x1b[31m\n<b>c</b>", model_filename="/tmp/../a|b.gguf")
    made = imports.run(llama_file(odd), device=["os=x|y\x07"], out=tmp_path / "out")
    result = read_report(made.path).result
    assert result["machine"]["cpu"] == "a b [31m b c /b"
    assert result["machine"]["os"] == "x y"
    assert result["results"][0]["model_filename"] == "a b.gguf"


# --- ExecuTorch's runner ---------------------------------------------------------------------------------------------


def test_the_runners_statistics_become_samples(stats: Stats, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    runs = [stats(start_ms=10_000 + 10_000 * place, prompt_ms=800 + place) for place in range(3)]
    log.write_text("I 00:00:00 loading\n" + "I 00:00:05 answers\n".join(runs), encoding="utf-8")
    result = read_report(imports.run(log, device=PHONE, out=tmp_path / "out", threads=4).path).result
    prompt, decode = result["results"]
    assert prompt["samples_ns"] == [800 * 10**6, 801 * 10**6, 802 * 10**6]
    assert prompt["median_ts"] == pytest.approx(512 / 0.801)
    assert decode["median_ts"] == pytest.approx(50)
    assert prompt["ttft_s"]["median"] == pytest.approx(0.806)
    assert (prompt["target"], prompt["quant"], prompt["n_threads"]) == ("executorch", None, 4)
    assert result["bundles"][0]["load_s"]["median"] == pytest.approx(0.5)
    assert result["bundles"][0]["load_s"]["n"] == 3
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table.splitlines()[2].startswith("| executorch | not known | model | off | 4 | 512 + 100 | 639 ± ")
    assert "whole milliseconds" in table


def test_one_process_that_answers_twice_was_loaded_once(stats: Stats, tmp_path: Path) -> None:
    load = {"model_load_start_ms": 100, "model_load_end_ms": 400}
    (tmp_path / "log").write_text(stats(start_ms=1000, **load) + stats(start_ms=9000, **load), encoding="utf-8")
    foreign = read_foreign(tmp_path / "log")
    assert foreign.load_ns == [300 * 10**6]
    assert len(foreign.rows[0]["samples_ns"]) == 2


def test_a_single_run_shows_no_deviation(stats: Stats, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(stats(), encoding="utf-8")
    made = imports.run(tmp_path / "log", device=[], out=tmp_path / "out")
    line = (made.path / "table.md").read_text(encoding="utf-8").splitlines()[2]
    assert "640 (one sample)" in line
    assert "±" not in line


def test_what_took_less_than_a_millisecond_was_not_measured(stats: Stats, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(stats(prompt_ms=0, prompt_tokens=3, first_token_ms=0), encoding="utf-8")
    foreign = read_foreign(tmp_path / "log")
    assert foreign.rows[0]["samples_ns"] is None
    assert foreign.rows[1]["median_ts"] == pytest.approx(50)
    assert "less than a millisecond" in foreign.notes[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens = 0"), ({"prompt_tokens": -1}, "prompt_tokens = -1"),
        ({"generated_tokens": 10**18}, "outside"), ({"inference_start_ms": 10**30}, "outside"),
        ({"inference_end_ms": 5}, "run backwards"), ({"model_load_end_ms": 5}, "run backwards"),
        ({"first_token_ms": 7}, "run backwards"), ({"prompt_eval_end_ms": 1.5}, "no whole number"),
        ({"SCALING_FACTOR_UNITS_PER_SECOND": 1}, "milliseconds"), ({"prompt_tokens": "512"}, "no whole number"),
    ],
    ids=str,
)  # fmt: skip
def test_statistics_that_cannot_be_are_refused(
    change: dict[str, Any], reason: str, stats: Stats, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("talk\n" + stats(**change), encoding="utf-8")
    with pytest.raises(InputError, match="line 2") as caught:
        read_foreign(tmp_path / "log")
    assert reason in caught.value.line()


# --- the device and the bundle ---------------------------------------------------------------------------------------


def test_a_card_comes_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    card = {"cpu": "A CPU", "flags": ["asimd"], "ram_bytes": 2**33, "versions": {"a": "1"}, "governor": None}
    (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    found = imports.read_card([str(tmp_path / "card.json"), "cpu=Another", "flags=asimd i8mm", "virtual_machine=no"])
    assert found == {
        "cpu": "Another", "flags": ["asimd", "i8mm"], "ram_bytes": 2**33, "versions": {"a": "1"},
        "virtual_machine": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "item",
    ["core_usable=8", "cores_usable=eight", "cores_usable=-1", "cores_usable=true", "ram_bytes=1e99", "ram_bytes=NaN",
     "cpu_busy_before=2", "cpu_busy_before=nan", "bandwidth_gb_s=1e999", "cores_usable=" + "9" * 5000, "=",
     "versions=[1]", "virtual_machine=maybe"],
)  # fmt: skip
def test_facts_that_no_card_has_are_refused(item: str) -> None:
    with pytest.raises(UsageError):
        imports.read_card([item])


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "[" * 100_000, '{"cpu": 7}', '{"colour": "red"}', '{"flags": [[1]]}', '{"cpu": "a"'],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_files_that_are_no_cards_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError):
        imports.read_card([str(tmp_path / "card.json")])


def test_a_misspelt_fact_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean cores_usable"):
        imports.read_card(["core_usable=8"])


@pytest.mark.runtime
def test_with_its_bundle_a_phones_row_has_size_and_roof(
    tiny_bundle: Callable[[str], Path], llama_file: LlamaFile, rows: Rows, tmp_path: Path
) -> None:
    from edgealign.runtimes.gguf_header import check_gguf

    bundle = tiny_bundle("q4_0")
    weights = sum(tensor.bytes for tensor in check_gguf(bundle / "model.gguf").tensors)
    file = llama_file(rows(512, 0, model_size=weights), rows(0, 100, 512, model_size=weights))
    made = imports.run(file, device=["bandwidth_gb_s=0.05"], out=tmp_path / "out", bundle=bundle)
    line = (made.path / "table.md").read_text(encoding="utf-8").splitlines()[2]
    share = round(100 * weights * 10 / 0.05e9)
    assert line.startswith("| gguf | q4_0 | tiny-q4_0 | off | 4 | 512 + 100 |")
    assert f"| {share}% |" in line
    assert read_report(made.path).result["bundles"][0]["digest"] == open_artifact(bundle).digest
    with pytest.raises(InputError, match=r"bytes of weights, what was measured 219,000,000"):
        imports.run(llama_file(), device=[], out=tmp_path / "other", bundle=bundle)


@pytest.mark.runtime
def test_the_runtimes_statistics_are_of_another_kind_of_bundle(
    tiny_bundle: Callable[[str], Path], stats: Stats, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text(stats(), encoding="utf-8")
    with pytest.raises(InputError, match="is a bundle for gguf"):
        imports.run(tmp_path / "log", device=[], out=tmp_path / "out", bundle=tiny_bundle("q4_0"))


def test_an_output_that_exists_and_a_bundle_that_does_not_are_refused(llama_file: LlamaFile, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError):
        imports.run(llama_file(), device=[], out=tmp_path / "there")
    with pytest.raises(ArtifactError):
        imports.run(llama_file(), device=[], out=tmp_path / "out", bundle=tmp_path / "nowhere")
