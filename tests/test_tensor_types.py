"""Groups of tensors, mixtures by name, and the recipe fields that state them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgealign.errors import RecipeError
from edgealign.export_recipes import ExportRecipe, check_device, mixture_of, resolve
from edgealign.parity import quant_bits
from edgealign.runtimes.gguf_header import TENSOR_TYPES
from edgealign.runtimes.gguf_names import ARCHITECTURES
from edgealign.tensor_types import (
    GROUPS,
    SEARCHED,
    TYPES,
    Mixture,
    check_rows,
    count_types,
    group_of,
    parse_groups,
)


def test_a_mixture_is_called_by_all_of_its_types() -> None:
    assert Mixture("q4_0").label == "q4_0"
    assert Mixture("q4_0", "q8_0", ("attn=q6_k", "conv=f16")).label == "q4_0+head=q8_0+attn=q6_k+conv=f16"


def test_the_numbers_of_the_types_are_ggmls() -> None:
    for name, kind in TYPES.items():
        assert TENSOR_TYPES[kind.number][:2] == (name.upper(), kind.block)


def test_every_searched_base_and_head_has_its_gates() -> None:
    labels = [Mixture(base, head).label for base, heads in SEARCHED.items() for head in heads]
    assert len(set(labels)) == len(labels)
    assert all(quant_bits(label) in (4, 8) for label in labels)


@pytest.mark.parametrize(
    ("label", "bits"),
    [("q8_0", 8), ("q8_0+head=q4_0", 4), ("q8_0+head=q6_k+attn=f16", 8), ("q4_0+head=q8_0", 4), ("int4", 4),
     ("q8_0+attn=q5_k", 4), ("f32", 32), ("q3", None), ("q8_0+head=q9", None), ("q8_0+", None)],
)  # fmt: skip
def test_a_mixture_answers_to_the_gates_of_its_lowest_bits(label: str, bits: int | None) -> None:
    assert quant_bits(label) == bits


def test_every_matrix_that_a_lora_can_sit_on_is_in_a_group() -> None:
    for table in ARCHITECTURES.values():
        for row in table.rows:
            group = group_of(row.gguf.format(n=3), tied=True)
            assert (group in GROUPS) == (row.linear or row.rule == "expert"), row.gguf


def test_the_embedding_is_the_head_where_both_are_one() -> None:
    assert group_of("token_embd.weight", tied=True) == "head"
    assert group_of("token_embd.weight", tied=False) == "embedding"
    assert group_of("output.weight", tied=False) == "head"
    assert group_of("blk.0.shortconv.conv.weight", tied=True) == "other"


def test_types_are_counted_by_group_and_vectors_are_left_out() -> None:
    tensors = [("token_embd.weight", "Q6_K", 2), ("blk.0.ffn_down.weight", "Q4_K", 2),
               ("blk.1.ffn_down.weight", "Q6_K", 2), ("blk.0.attn_norm.weight", "F32", 1)]  # fmt: skip
    assert count_types(tensors) == {"head": {"q6_k": 1}, "ffn_down": {"q4_k": 1, "q6_k": 1}}
    assert count_types([*tensors, ("output.weight", "Q8_0", 2)])["embedding"] == {"q6_k": 1}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["attn"], "attn: is not group=type"),
        (["atn=q8_0"], r"names no group of tensors \(did you mean attn\?\)"),
        (["head=q8_0"], r"\(that is head_type\)"),
        (["attn=q8"], r"names no type \(did you mean q8_0\?\)"),
        (["attn=q8_0", " attn = q4_0"], "names attn a second time"),
    ],
)
def test_a_group_or_a_type_that_is_none_is_refused(entries: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_groups(entries)


def test_a_type_whose_blocks_do_not_fit_the_rows_is_refused_with_those_that_do() -> None:
    tensors = [("token_embd.weight", 64), ("blk.0.attn_q.weight", 512), ("blk.1.attn_q.weight", 64)]
    check_rows(Mixture("q8_0", "q4_0", ("attn=q8_0",)), tensors)
    words = "attn=q4_k: blk.1.attn_q.weight has rows of 64, no multiple of its blocks of 256; types that fit: f16, q8_0"
    with pytest.raises(RecipeError, match=re.escape(words)):
        check_rows(Mixture("q8_0", None, ("attn=q4_k",)), tensors)
    with pytest.raises(RecipeError, match=r"head=q6_k: token_embd\.weight has rows of 64"):
        check_rows(Mixture("q8_0", "q6_k"), tensors)
    with pytest.raises(RecipeError, match="conv=q8_0: this model has no such tensors; leave it out"):
        check_rows(Mixture("q8_0", None, ("conv=q8_0",)), tensors)


def test_no_quant_is_the_targets_default_and_auto_is_the_search() -> None:
    assert [resolve(ExportRecipe(), target).quant for target in ("gguf", "onnx", "executorch")] == [
        "q4_0", "int4", "8da4w",
    ]  # fmt: skip
    assert resolve(ExportRecipe(quant="auto"), "gguf").quant == "auto"


@pytest.mark.parametrize(
    ("recipe", "target", "words"),
    [
        (ExportRecipe(quant="auto"), "onnx", "auto: is for gguf, the types of onnx come whole; choose a quant: fp32"),
        (ExportRecipe(quant="auto"), "executorch", "choose a quant: fp32, 8da4w"),
        (ExportRecipe(quant="int4", head_type="q8_0"), "onnx", "head_type: is for gguf"),
        (ExportRecipe(quant="int4", tensor_types=("attn=q8_0",)), "onnx", "tensor_types: is for gguf"),
        (ExportRecipe(quant="auto", head_type="q8_0"), "gguf", "auto: searches head_type and tensor_types itself"),
        (ExportRecipe(quant="f16", head_type="q8_0"), "gguf", "f16: takes no head_type"),
        (ExportRecipe(quant="int4"), "gguf", "int4: is no quantisation of the target gguf"),
        (ExportRecipe(tensor_types=("attn=int4",)), "gguf", "attn=int4: names no type"),
    ],
)
def test_types_that_cannot_stand_together_are_refused_in_one_line(
    recipe: ExportRecipe, target: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        resolve(recipe, target)


def test_groups_have_one_order_so_that_one_mixture_has_one_name() -> None:
    recipe = resolve(ExportRecipe(quant="q8_0", tensor_types=("ffn_up=q4_0", "attn=q6_k")), "gguf")
    assert mixture_of(recipe).label == "q8_0+attn=q6_k+ffn_up=q4_0"


def test_a_device_is_refused_where_nothing_is_searched() -> None:
    check_device(ExportRecipe(quant="auto"), "card.json")
    with pytest.raises(RecipeError, match=r"card\.json: is a device, and quant q4_0 searches nothing"):
        check_device(ExportRecipe(quant="q4_0"), "card.json")


def test_a_dry_run_counts_the_search_and_estimates_its_time(tiny_model: Path) -> None:
    from edgealign.plan import plan_stage

    recipe = ExportRecipe(quant="auto")
    words = plan_stage("export", recipe, {"target": "gguf", "model": str(tiny_model)})["estimate"]["search"]
    assert re.match(r"about \d+ min: 18 mixtures or more compared with torch, up to 48 processes timed; 0\.0 GB", words)
    arguments = {"target": "gguf", "model": str(tiny_model), "device": "card.json"}
    assert "none timed" in plan_stage("export", recipe, arguments)["estimate"]["search"]
    assert "search" not in plan_stage("export", ExportRecipe(), {"model": str(tiny_model)})["estimate"]
