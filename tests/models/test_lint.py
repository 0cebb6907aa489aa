"""The lint: LoRA targets exist, coverage is told, and every part ends a turn with the same token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgealign.errors import RecipeError
from edgealign.models.lint import default_targets, describe, lint, lora_targets
from edgealign.models.load import load_model


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    (folder / "manifest.json").unlink()
    return folder


def edit(file: Path, **values: object) -> None:
    parsed = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(parsed | values), encoding="utf-8")


def failed(folder: Path) -> set[str]:
    return {check.name for check in lint(folder) if not check.passed}


def test_the_default_targets_reach_every_linear_layer(tiny_model: Path) -> None:
    coverage = lora_targets(load_model(tiny_model))
    assert coverage.share == 1.0
    assert coverage.matched["out_proj"] == 6  # 2 attention blocks and 4 convolutions
    assert "model.layers.0.conv.in_proj" in coverage.modules
    assert "lm_head" not in coverage.modules


def test_names_of_another_architecture_are_refused_with_lfm2s_own(tiny_model: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        lora_targets(load_model(tiny_model), ["q_proj", "o_proj", "gate_proj"])
    assert str(caught.value) == (
        "o_proj, gate_proj: match no layer of this lfm2 model; use out_proj instead of o_proj, w1 instead of gate_proj"
    )


def test_an_unknown_name_is_refused_with_the_names_there_are(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match=r"layers are called: in_proj, k_proj, out_proj, q_proj, v_proj, w1, w2, w3"):
        lora_targets(load_model(tiny_model), ["attention"])


def test_a_name_matches_whole_parts_only(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    with pytest.raises(RecipeError, match="proj: matches no layer"):
        lora_targets(model, ["proj"])
    only_conv = lora_targets(model, ["conv.out_proj"])
    assert all(".conv.out_proj" in name for name in only_conv.modules)


def test_coverage_is_told_in_one_line(tiny_model: Path) -> None:
    coverage = lora_targets(load_model(tiny_model), ["q_proj", "v_proj"])
    assert 0 < coverage.share < 0.1
    assert describe(coverage).startswith("LoRA on 4 layers (q_proj 2, v_proj 2): ")


def test_an_architecture_without_a_table_asks_for_names() -> None:
    with pytest.raises(RecipeError, match="mamba: has no default LoRA targets here"):
        default_targets("mamba")


def test_a_fresh_model_passes(tiny_model: Path) -> None:
    assert failed(tiny_model) == set()


@pytest.mark.parametrize(
    ("file", "check"),
    [("config.json", "turn end in config"), ("generation_config.json", "turn end in generation config")],
)
def test_a_turn_end_that_differs_is_found(copied: Path, file: str, check: str) -> None:
    edit(copied / file, eos_token_id=2)  # what Lfm2Config fills in by itself
    assert failed(copied) == {check}


def test_a_list_of_end_tokens_passes_if_the_turn_end_is_one_of_them(copied: Path) -> None:
    edit(copied / "generation_config.json", eos_token_id=[2, 7])
    assert failed(copied) == set()


def test_another_eos_in_the_tokenizer_is_found(copied: Path) -> None:
    edit(copied / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert failed(copied) == {"turn end in tokenizer"}


def test_a_template_without_a_turn_end_is_found(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8"
    )
    assert "turn end in template" in failed(copied)


def test_a_doubled_beginning_is_found(copied: Path) -> None:
    template = (copied / "chat_template.jinja").read_text(encoding="utf-8")
    (copied / "chat_template.jinja").write_text("{{ bos_token }}" + template, encoding="utf-8")
    assert failed(copied) == {"one beginning of text"}
