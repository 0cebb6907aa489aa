"""Quantising through llama.cpp's library, and the importance matrix from torch hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import EdgealignError, InputError
from edgealign.models.load import load_model, load_tokenizer
from edgealign.models.tokenizer import BUILT_IN_TEXT
from edgealign.runtimes.gguf_header import GgufInfo

SmallModel = Callable[[str], Path]


@pytest.fixture(scope="session")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gguf_model import write_model

    file = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_model(tiny_model, file, digest="d" * 64)
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(BUILT_IN_TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def types(info: GgufInfo) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in info.tensors}


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("quant", "matrix"), [("f16", "F16"), ("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("q4_k_m", "Q4_K")]
)
def test_matrices_are_quantised_and_norms_and_convolutions_are_not(
    whole: Path, tmp_path: Path, quant: str, matrix: str
) -> None:
    from gguf_quantize import FTYPES, quantize

    info = quantize(whole, tmp_path / "small.gguf", quant, importance=None, threads=1)
    found = types(info)
    assert found["blk.0.ffn_down.weight"] == matrix  # its rows are 256 wide: no fallback
    assert found["blk.0.shortconv.conv.weight"] == found["blk.0.attn_norm.weight"] == "F32"
    assert info.metadata["general.file_type"] == FTYPES[quant]
    assert info.metadata["edgealign.model_digest"] == "d" * 64
    assert (tmp_path / "small.gguf").stat().st_size < whole.stat().st_size


@pytest.mark.runtime
def test_quantising_twice_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    from gguf_quantize import quantize

    for name, threads in (("a", 1), ("b", 2)):
        quantize(whole, tmp_path / name, "q4_0", importance=None, threads=threads)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.runtime
def test_a_file_that_llama_cpp_cannot_read_is_an_error_with_its_words(tmp_path: Path) -> None:
    from gguf_quantize import quantize

    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(EdgealignError, match=r"llama\.cpp could not quantise to q4_0 \(.+\)"):
        quantize(tmp_path / "bad.gguf", tmp_path / "out.gguf", "q4_0", importance=None, threads=1)


def test_the_importance_matrix_is_the_mean_square_of_every_linear_input(tiny_model: Path, text: Path) -> None:
    import torch
    from gguf_quantize import measure_importance

    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    measured = measure_importance(model, tokenizer, text, tokens=64, window=32)
    assert (measured.tokens, measured.windows) == (64, 2)
    assert len(measured.values) == 34 + 1  # every LoRA target and the tied head
    ids = tokenizer(BUILT_IN_TEXT, add_special_tokens=False).input_ids
    seen = []
    handle = model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for start in (0, 32):
            model(torch.tensor([[1, *ids[start : start + 32]]]))
    handle.remove()
    expected = torch.cat(seen).pow(2).mean(0).numpy()
    np.testing.assert_allclose(measured.values["blk.2.attn_q.weight"], expected, rtol=1e-4)


def test_hooks_are_gone_afterwards(tiny_model: Path, text: Path) -> None:
    from gguf_quantize import measure_importance

    model = load_model(tiny_model)
    measure_importance(model, load_tokenizer(tiny_model), text, tokens=16, window=8)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_are_weighed_by_the_tokens_they_get(small_model: SmallModel, text: Path) -> None:
    from gguf_quantize import measure_importance

    folder = small_model("lfm2-moe")
    values = measure_importance(load_model(folder), load_tokenizer(folder), text, tokens=64, window=32).values
    assert values["blk.1.ffn_gate_exps.weight"].shape == (4 * 64,)
    assert values["blk.1.ffn_down_exps.weight"].shape == (4 * 64,)
    assert "blk.0.ffn_gate.weight" in values
    assert (values["blk.1.ffn_down_exps.weight"] > 0).all()
    experts = values["blk.1.ffn_gate_exps.weight"].reshape(4, 64)
    assert not np.allclose(experts[0], experts[1])


def test_too_little_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from gguf_quantize import measure_importance

    (tmp_path / "t.txt").write_text("a", encoding="utf-8")
    with pytest.raises(InputError, match="too few to calibrate on"):
        measure_importance(load_model(tiny_model), load_tokenizer(tiny_model), tmp_path / "t.txt", tokens=9, window=8)


@pytest.mark.runtime
@pytest.mark.parametrize("quant", ["q4_0", "q4_k_m"])
def test_the_matrix_lowers_the_weighted_error_and_is_recorded(
    whole: Path, tiny_model: Path, text: Path, tmp_path: Path, quant: str
) -> None:
    from gguf import GGUFReader, dequantize
    from gguf_quantize import measure_importance, quantize

    importance = measure_importance(load_model(tiny_model), load_tokenizer(tiny_model), text, tokens=400, window=100)
    quantize(whole, tmp_path / "plain.gguf", quant, importance=None, threads=1)
    info = quantize(whole, tmp_path / "weighed.gguf", quant, importance=importance, threads=1)
    assert info.metadata["quantize.imatrix.entries_count"] == 35
    assert info.metadata["quantize.imatrix.chunks_count"] == importance.windows
    assert info.metadata["quantize.imatrix.dataset"] == importance.text_digest
    exact = {t.name: np.array(t.data) for t in GGUFReader(whole).tensors}

    def error(file: Path) -> float:
        total = 0.0
        for tensor in GGUFReader(file).tensors:
            if tensor.name in importance.values and "ffn" in tensor.name:
                difference = dequantize(tensor.data, tensor.tensor_type) - exact[tensor.name]
                total += float((importance.values[tensor.name] * difference**2).sum())
        return total

    assert error(tmp_path / "weighed.gguf") < 0.97 * error(tmp_path / "plain.gguf")


@pytest.mark.runtime
def test_a_mixture_of_experts_takes_its_matrix(small_model: SmallModel, text: Path, tmp_path: Path) -> None:
    from gguf_model import write_model
    from gguf_quantize import measure_importance, quantize

    folder = small_model("lfm2-moe")
    write_model(folder, tmp_path / "whole.gguf", digest="d" * 64)
    importance = measure_importance(load_model(folder), load_tokenizer(folder), text, tokens=64, window=32)
    info = quantize(tmp_path / "whole.gguf", tmp_path / "small.gguf", "q4_0", importance=importance, threads=1)
    found = types(info)
    assert found["blk.1.ffn_gate_exps.weight"] == "Q4_0"
    assert found["blk.1.ffn_gate_inp.weight"] == found["blk.1.exp_probs_b.bias"] == "F32"
