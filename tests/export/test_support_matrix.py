"""export/README.md is what the tables in the code say."""

from __future__ import annotations

from edgealign.export_recipes import QUANTS
from edgealign.runtimes.gguf_names import ARCHITECTURES
from edgealign.targets import TARGETS


def test_the_readme_is_the_generated_text() -> None:
    from support_matrix import README, readme

    assert README.read_text(encoding="utf-8") == readme(), "run: python export/support_matrix.py --write"


def test_the_readme_has_a_row_for_every_target_quantisation_and_architecture() -> None:
    from support_matrix import readme

    text = readme()
    assert all(f"| {target} | {quant}: " in text for target in TARGETS for quant in QUANTS)
    assert all(f"| {kind} | {table.name} |" in text for kind, table in ARCHITECTURES.items())


def test_every_recipe_quantisation_has_a_file_type() -> None:
    from gguf_quantize import FTYPES
    from support_matrix import BITS
    from to_gguf import SHARE

    assert set(FTYPES) == set(BITS) == set(SHARE) == set(QUANTS)
