"""The one table and its pictures: every target beside every other, nothing invented, gaps named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edgealign.artifact import Check, open_artifact, publish
from edgealign.bench.picture import draw, draw_front
from edgealign.bench.report import COLUMNS, render
from edgealign.bench.result import titles
from edgealign.bench.rows import read_fidelity

MANY = {
    (target, quant): 10.0 + 7 * place
    for place, (target, quant) in enumerate(
        (target, quant) for target in ("gguf", "onnx", "executorch") for quant in ("exact", "small")
    )
}


def table(result: dict[str, Any]) -> list[dict[str, str]]:
    """The first table as dictionaries."""
    lines = render(result).split("\n\n")[0].splitlines()[2:]
    return [dict(zip(COLUMNS, line.strip("| ").split(" | "), strict=True)) for line in lines]


def test_one_table_has_every_target_quantisation_adapter_and_thread_count(make_result: Any) -> None:
    rows = table(make_result(MANY, threads=(1, 2)))
    assert len(rows) == 3 * 2 * 2 * 2
    seen = {(row["target"], row["quant"], row["adapter"], row["threads"]) for row in rows}
    assert len(seen) == len(rows)
    assert [row["bundle"] for row in rows] == [f"{target}-{quant}" for target, quant in MANY for _ in range(4)]
    first = rows[0]
    assert (first["prompt + new"], first["prefill tok/s"], first["decode tok/s"]) == (
        "512 + 100", "100 ± 1.58", "10.0 ± 0.16",
    )  # fmt: skip
    assert (first["share of bandwidth"], first["load ms"], first["swap ms"]) == ("5%", "100", "-")
    assert (first["peak MiB"], first["size MiB"], first["KL nat"]) == ("381", "191", "0.01")


def test_weights_that_fit_the_cache_are_not_held_against_the_memory(make_result: Any) -> None:
    small = make_result({("gguf", "q4_0"): 500.0}, card={"cache_bytes": 2**25}, bytes_per_token=2**24)
    assert table(small)[0]["share of bandwidth"] == "42% (cached)"
    large = make_result({("gguf", "q4_0"): 500.0}, card={"cache_bytes": 2**25}, bytes_per_token=2**26)
    assert table(large)[0]["share of bandwidth"] == "168%"


def test_loading_and_swapping_stand_where_they_were_measured(make_result: Any) -> None:
    rows = table(make_result({("gguf", "q4_0"): 10.0}, threads=(1, 2)))
    found = {(row["adapter"], row["threads"]): (row["load ms"], row["swap ms"]) for row in rows}
    assert found == {
        ("off", "1"): ("100", "-"), ("on: ana", "1"): ("1", "0.1"),
        ("off", "2"): ("not measured", "-"), ("on: ana", "2"): ("not measured", "not measured"),
    }  # fmt: skip


def test_the_kl_comes_from_the_gate_and_says_so(tmp_path: Path) -> None:
    checks = {
        "small": [Check("quant.kl", 0.0123, 0.25, True), Check("survival.ana", 0.97, 0.5, True)],
        "exact": [Check("logits.base", 1.5e-6, 1e-4, True)],
        "unverified": [],
    }
    found = {}
    for name, entries in checks.items():
        with publish(tmp_path / name, kind="bundle", format="gguf", stage="export", recipe={}) as draft:
            (draft.dir / "model.gguf").write_bytes(b"0")
            for entry in entries:
                draft.add_check(entry)
        found[name] = read_fidelity(open_artifact(tmp_path / name))
    assert (found["small"]["kl"], found["small"]["change_kept"]) == (0.0123, {"ana": 0.97})
    assert found["small"]["origin"] == "the parity gate, when the bundle was published (export)"
    assert (found["exact"]["kl"], found["exact"]["largest_logit_gap"]) == (None, 1.5e-6)
    assert found["unverified"] == {"kl": None, "largest_logit_gap": None, "change_kept": {}, "origin": None}


@pytest.mark.parametrize(("kl", "gap", "shown"), [(None, 1.5e-6, "logits ± 1.5e-06"), (None, None, "not measured")])
def test_a_bundle_without_a_kl_shows_what_there_is(kl: Any, gap: Any, shown: str, make_result: Any) -> None:
    result = make_result({("gguf", "f32"): 10.0}, kl=kl)
    result["bundles"][0]["fidelity"]["largest_logit_gap"] = gap
    off, on = table(result)
    assert (off["KL nat"], on["KL nat"]) == (shown, "not measured")


def test_extra_buffers_are_spoken_of_where_llama_cpp_ran(make_result: Any) -> None:
    result = make_result({("onnx", "int4"): 10.0})
    assert "extra buffers" not in render(result)
    result["results"][0]["extra_bufts"] = False
    assert "llama.cpp's extra buffers: OFF" in render(result)


def test_bundles_of_one_kind_are_told_apart_by_name(make_result: Any) -> None:
    result = make_result({("gguf", "q4_0"): 10.0, ("onnx", "int4"): 10.0})
    result["bundles"].append({**result["bundles"][0], "bundle": "another"})
    assert titles(result) == {
        "gguf-q4_0": "gguf q4_0: gguf-q4_0", "onnx-int4": "onnx int4", "another": "gguf q4_0: another",
    }  # fmt: skip


def drawn_texts(monkeypatch: pytest.MonkeyPatch, act: Any) -> tuple[list[str], list[Any]]:
    """What a drawing function writes, and the axes it writes on."""
    from matplotlib import pyplot

    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    act()
    monkeypatch.undo()
    (figure,) = kept
    texts = [text.get_text() for axis in figure.axes for text in (*axis.texts, *axis.get_yticklabels())]
    axes = list(figure.axes)
    pyplot.close(figure)
    return texts, axes


@pytest.mark.slow
def test_the_picture_has_a_line_for_each_row_and_none_over_another(
    make_result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = make_result(MANY, threads=(1, 2))
    result["results"][2]["median_ts"] = None
    texts, axes = drawn_texts(monkeypatch, lambda: draw(result, tmp_path / "speed.png"))
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert len(axes[0].get_yticks()) == 24
    assert texts.count("no adapter, 1 thread") == 6
    assert texts.count("adapter ana, 2 threads") == 6
    assert " not measured" in texts
    boxes = [label.get_window_extent() for label in axes[0].get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))


@pytest.mark.slow
def test_the_front_names_each_bundle_and_what_was_not_measured(
    make_result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = make_result(MANY, threads=(1, 2))
    result["bundles"][0]["fidelity"]["kl"] = None
    texts, axes = drawn_texts(monkeypatch, lambda: draw_front(result, tmp_path / "front.png"))
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert texts.count("executorch small") == 2
    assert texts.count("gguf exact") == 1
    assert "not measured: gguf exact" in texts
    assert "2 threads" in axes[0].get_xlabel()
    for axis in axes:
        names = [text.get_window_extent() for text in axis.texts if text.get_text() in titles(result).values()]
        assert not any(one.overlaps(other) for place, one in enumerate(names) for other in names[place + 1 :])
