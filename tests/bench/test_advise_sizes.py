"""Computed sizes against bundles that were really exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgealign.advise.sizes import STORAGE, adapter_bytes, model_size, read_facts, supports
from edgealign.bench.roofline import count_token_bytes
from edgealign.errors import InputError
from edgealign.export_recipes import QUANTS
from edgealign.models.load import resolve_model
from edgealign.runtimes.session import read_bundle

MakeBundle = Callable[[str], Path]


def compare(bundle: Path, model: Path, *, beside: int) -> None:
    """Bytes of a token to 1 %, where they are counted; the file within `beside` bytes: tokenizer, graph, tables."""
    opened = read_bundle(bundle)
    size = model_size(read_facts(model), opened.target, opened.quant)
    assert size is not None
    counted = count_token_bytes(opened)
    if counted["how"] == "weights that a token touches":
        assert size.token_bytes == pytest.approx(counted["bytes"], rel=0.01)
    assert 0 <= opened.model_bytes - size.file_bytes <= beside


@pytest.mark.runtime
@pytest.mark.parametrize("quant", QUANTS["gguf"])
def test_a_gguf_file_is_as_large_as_computed(quant: str, tiny_bundle: MakeBundle, tiny_model: Path) -> None:
    if ("gguf", quant) in STORAGE:
        compare(tiny_bundle(quant), tiny_model, beside=100_000)


@pytest.mark.runtime
@pytest.mark.parametrize("quant", QUANTS["onnx"])
def test_an_onnx_model_is_as_large_as_computed(quant: str, onnx_bundle: MakeBundle, tiny_model: Path) -> None:
    compare(onnx_bundle(quant), tiny_model, beside=1_500_000)


@pytest.mark.runtime
@pytest.mark.parametrize("quant", QUANTS["executorch"])
def test_an_executorch_program_is_as_large_as_computed(
    quant: str, executorch_bundle: MakeBundle, short_model: Path
) -> None:
    compare(executorch_bundle(quant), short_model, beside=400_000)


def test_the_starter_has_the_bytes_of_its_published_bundles() -> None:
    facts = read_facts(resolve_model("starter"))
    assert facts.parameters == 6_035_968
    found = {key: model_size(facts, *key) for key in (("gguf", "q4_0"), ("gguf", "q8_0"), ("onnx", "int4"))}
    assert {key: size.token_bytes for key, size in found.items() if size} == {
        ("gguf", "q4_0"): 3_688_448, ("gguf", "q8_0"): 6_432_768, ("onnx", "int4"): 4_319_232,
    }  # fmt: skip


def test_every_known_quantisation_has_a_rule_and_another_one_has_none(tiny_model: Path) -> None:
    facts = read_facts(tiny_model)
    known = {(target, quant) for target, quants in QUANTS.items() for quant in quants}
    assert set(STORAGE) <= known
    assert all(model_size(facts, *key) for key in STORAGE)
    assert model_size(facts, "gguf", "iq1_s") is None


def test_an_adapter_counts_its_numbers_and_a_folder_without_one_is_refused(tiny_lora: object, tmp_path: Path) -> None:
    folder = tiny_lora(seed=1)  # type: ignore[operator]
    assert adapter_bytes(folder, "gguf", "f32") == 2 * adapter_bytes(folder, "gguf", "q4_0")
    assert adapter_bytes(folder, "onnx", "int4") == adapter_bytes(folder, "gguf", "f32")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        adapter_bytes(tmp_path, "gguf", "q4_0")


def test_a_target_without_the_architecture_is_left_out(tiny_model: Path) -> None:
    facts = read_facts(tiny_model)
    assert all(supports(facts, target) for target in QUANTS)
