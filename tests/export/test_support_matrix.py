"""export/README.md is what the tables in the code say."""

from __future__ import annotations

from edgealign.export_recipes import QUANTS
from edgealign.runtimes import onnx_names
from edgealign.runtimes.gguf_names import ARCHITECTURES
from edgealign.targets import TARGETS


def test_the_readme_is_the_generated_text() -> None:
    from support_matrix import README, readme

    assert README.read_text(encoding="utf-8") == readme(), "run: python export/support_matrix.py --write"


def test_the_readme_has_a_row_for_every_target_quantisation_and_architecture() -> None:
    from support_matrix import readme

    text = readme()
    assert all(f"| {target} | {quant}: " in text for target in TARGETS for quant in QUANTS[target])
    assert all(f"| {kind} | {table.name} |" in text for kind, table in ARCHITECTURES.items())
    assert set(onnx_names.ARCHITECTURES) == set(ARCHITECTURES), "the matrix has one table for both targets"


def test_every_recipe_quantisation_has_a_file_type() -> None:
    from genai_model import OPTIONS
    from gguf_quantize import FTYPES
    from support_matrix import MEANING
    from to_gguf import SHARE
    from to_onnx import PER_WEIGHT

    from edgealign.parity import BITS

    assert set(FTYPES) == set(SHARE) == set(QUANTS["gguf"])
    assert set(OPTIONS) == set(PER_WEIGHT) == set(QUANTS["onnx"])
    assert set(MEANING) == {quant for quants in QUANTS.values() for quant in quants} <= set(BITS)
