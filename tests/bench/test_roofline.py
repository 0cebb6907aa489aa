"""Bytes read for a token, counted in files made for it; and what share of the bandwidth a speed is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.bench import worker
from edgealign.bench.cells import Cell
from edgealign.bench.roofline import bandwidth_share, count_token_bytes
from edgealign.bench.rows import describe_bandwidth
from edgealign.runtimes.session import Bundle, read_bundle

Bundles = Callable[[str], Path]
WIDTH, VOCAB, EXPERTS, USED = 32, 10, 4, 2


def write_gguf(file: Path, tensors: dict[str, tuple[int, ...]], *, experts: bool = False) -> Path:
    import gguf

    writer = gguf.GGUFWriter(file, "tiny")
    if experts:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(USED)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def bundle_of(file: Path, target: str) -> Bundle:
    return Bundle(file.parent, target, "f32", file, {})


@pytest.mark.runtime
def test_a_tied_embedding_is_read_whole_and_another_by_the_row(tmp_path: Path) -> None:
    from edgealign.runtimes.gguf_header import count_token_bytes as count

    embedding, layer = {"token_embd.weight": (VOCAB, WIDTH)}, {"blk.0.attn_q.weight": (WIDTH, WIDTH)}
    tied = write_gguf(tmp_path / "tied.gguf", {**embedding, **layer})
    assert count(tied) == 4 * (VOCAB * WIDTH + WIDTH * WIDTH)
    own = write_gguf(tmp_path / "own.gguf", {**embedding, **layer, "output.weight": (VOCAB, WIDTH)})
    assert count(own) == 4 * (WIDTH + WIDTH * WIDTH + VOCAB * WIDTH)


@pytest.mark.runtime
def test_of_experts_those_in_use_are_read_and_the_router_whole(tmp_path: Path) -> None:
    from edgealign.runtimes.gguf_header import count_token_bytes as count

    shapes = {"blk.0.ffn_up_exps.weight": (EXPERTS, 8, WIDTH), "blk.0.ffn_gate_inp.weight": (EXPERTS, WIDTH)}
    file = write_gguf(tmp_path / "moe.gguf", shapes, experts=True)
    assert count(file) == 4 * (USED * 8 * WIDTH + EXPERTS * WIDTH)


@pytest.mark.runtime
def test_a_gguf_bundle_is_counted_in_the_bytes_of_its_types(tiny_bundle: Bundles) -> None:
    from edgealign.runtimes.gguf_header import check_gguf

    for quant in ("f32", "q4_0"):
        bundle = read_bundle(tiny_bundle(quant))
        tensors = check_gguf(bundle.model_file).tensors
        counted = count_token_bytes(bundle)["bytes"]
        assert counted == sum(tensor.bytes for tensor in tensors)  # its head is tied: all is read
        assert 0.5 * bundle.model_bytes < counted < bundle.model_bytes


def write_onnx(file: Path, nodes: list[Any], weights: dict[str, np.ndarray[Any, Any]]) -> Path:
    from onnx import TensorProto, helper, numpy_helper, save

    initialisers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 1])]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, initialisers)), str(file))
    return file


def counted(file: Path) -> int:
    from edgealign.runtimes.onnx_weights import count_token_bytes as count

    return count(file)


@pytest.mark.runtime
def test_an_onnx_embedding_is_looked_up_and_a_head_is_read(onnx_tools: None, tmp_path: Path) -> None:
    from onnx.helper import make_node

    table, head = np.ones((VOCAB, WIDTH), np.float32), np.ones((WIDTH, VOCAB), np.float32)
    nodes = [make_node("Gather", ["table", "ids"], ["x"]), make_node("MatMul", ["x", "head"], ["out"])]
    file = write_onnx(tmp_path / "own.onnx", nodes, {"table": table, "head": head, "nobody": head})
    assert counted(file) == 4 * (WIDTH + WIDTH * VOCAB)


@pytest.mark.runtime
def test_a_quantised_head_that_is_the_embedding_too_is_counted_once(onnx_tools: None, tmp_path: Path) -> None:
    from onnx.helper import make_node

    packed, scales = np.ones((VOCAB, 1, WIDTH), np.uint8), np.ones((VOCAB, 1), np.float32)
    flat, ms = np.array([VOCAB, WIDTH]), {"domain": "com.microsoft"}
    nodes = [
        make_node("Reshape", ["packed", "flat"], ["rows"]),
        make_node("GatherBlockQuantized", ["rows", "ids", "scales"], ["x"], bits=8, block_size=WIDTH, **ms),
        make_node("MatMulNBits", ["x", "packed", "scales"], ["out"], bits=8, K=WIDTH, N=VOCAB, block_size=WIDTH, **ms),
    ]
    file = write_onnx(tmp_path / "tied.onnx", nodes, {"packed": packed, "scales": scales, "flat": flat})
    assert counted(file) == packed.nbytes + scales.nbytes


@pytest.mark.runtime
def test_onnx_experts_in_use_and_one_row_of_sines(onnx_tools: None, tmp_path: Path) -> None:
    from onnx.helper import make_node

    ms = {"domain": "com.microsoft"}
    weights = {
        "experts": np.ones((EXPERTS, 8, WIDTH), np.uint8), "scales": np.ones((EXPERTS, 8), np.float32),
        "cos_cache": np.ones((100, 4), np.float32), "sin_cache": np.ones((100, 4), np.float32),
    }  # fmt: skip
    nodes = [
        make_node("QMoE", ["ids", "ids", "experts", "scales"], ["x"], k=USED, **ms),
        make_node("GroupQueryAttention", ["x", "", "", "", "", "", "", "cos_cache", "sin_cache"], ["out"], **ms),
    ]
    file = write_onnx(tmp_path / "moe.onnx", nodes, weights)
    assert counted(file) == USED * 8 * WIDTH + USED * 8 * 4 + 2 * 4 * 4


@pytest.mark.runtime
def test_an_onnx_bundle_is_counted_within_its_files(onnx_bundle: Bundles) -> None:
    exact, four = (read_bundle(onnx_bundle(quant)) for quant in ("fp32", "int4"))
    whole, quarter = count_token_bytes(exact)["bytes"], count_token_bytes(four)["bytes"]
    weights = 1_019_136 * 4  # of the tiny model, in 32 bits, its tied embedding counted once
    assert weights <= whole < 1.02 * weights
    assert 0.12 * whole < quarter < 0.45 * whole


def test_a_target_without_a_reader_is_counted_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"0" * 1000)
    (tmp_path / "model.pte.data").write_bytes(b"0" * 24)
    found = count_token_bytes(bundle_of(tmp_path / "model.pte", "another"))
    assert found["bytes"] == 1024
    assert "upper bound" in found["how"]


def test_a_file_that_cannot_be_read_has_no_bytes_and_a_reason(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no model")
    found = count_token_bytes(bundle_of(tmp_path / "model.gguf", "gguf"))
    assert found["bytes"] is None
    assert "not a GGUF file" in found["how"]


def test_the_share_is_bytes_times_speed_over_the_bandwidth_of_as_many_threads(make_result: Any) -> None:
    result = make_result({("gguf", "q4_0"): 100.0}, threads=(1, 2), bytes_per_token=10**8)
    shares = {
        (row["user"], row["n_threads"]): bandwidth_share(result, row) for row in result["results"] if row["n_gen"]
    }
    assert shares[None, 1] == pytest.approx(1e8 * 100 / 2e10)
    assert shares[None, 2] == pytest.approx(1e8 * 160 / 4e10)
    assert shares["ana", 1] == pytest.approx((1e8 + 1e6) * 80 / 2e10)  # an adapter that is on is read too
    result["bandwidth"] = [entry for entry in result["bandwidth"] if entry["threads"] == 2]
    assert bandwidth_share(result, result["results"][1]) is None


def test_bandwidth_is_measured_by_reading_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LEAST_BUFFER", 2**22)
    monkeypatch.setattr(worker, "last_cache_bytes", lambda: 2**21)
    found = worker.work({"kind": "bandwidth", "threads": 1, "repetitions": 2})
    assert found["read_bytes"] == 4 * 2**21
    assert len(found["read_ns"]) == 2
    cell = Cell("bandwidth", "", None, 1)
    (entry,) = describe_bandwidth([(cell, "now", found)])
    assert entry["bytes_per_s"] == max(entry["samples"]) == found["read_bytes"] * 1e9 / min(found["read_ns"])
    (failed,) = describe_bandwidth([(cell, "now", {"error": "its process died of SIGKILL"})])
    assert (failed["bytes_per_s"], failed["error"]) == (None, "its process died of SIGKILL")
