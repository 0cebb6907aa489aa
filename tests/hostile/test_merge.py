"""What `edgealign merge` refuses: one line with the value, the reason and the way out, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgealign.errors import EdgealignError, InputError, OutputError, RecipeError, ToolMissing
from edgealign.train import merge
from edgealign.train.merge_recipe import MergeRecipe


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model of the same shape and tokenizer, made from other random weights."""
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    out = tmp_path_factory.mktemp("stranger") / "model"
    create.run(InitRecipe(shape="tiny", seed=99, vocab_size=512, context=512, dtype="float32"), text=[], out=out)
    return out


def foreign(model: Path, folder: Path) -> Path:
    """The same directory without a manifest, as it comes from the hub."""
    shutil.copytree(model, folder)
    (folder / "manifest.json").unlink()
    return folder


def refused(recipe: MergeRecipe, tmp_path: Path, kind: type[EdgealignError], words: str, **inputs: object) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=words) as caught:
        merge.run(recipe, out=tmp_path / "merged", **inputs)  # type: ignore[arg-type]
    assert "\n" not in caught.value.line()
    assert caught.value.exit_code == (3 if kind is ToolMissing else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_one_model_alone_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    refused(MergeRecipe(), tmp_path, InputError, "1 model: merging takes two or more", models=[tiny_model])


def test_the_same_model_twice_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    refused(MergeRecipe(), tmp_path, InputError, "is given twice", models=[tiny_model, tiny_model])


def test_models_without_a_common_base_are_refused(tiny_model: Path, stranger: Path, tmp_path: Path) -> None:
    refused(MergeRecipe(), tmp_path, InputError, "have no base in common", models=[tiny_model, stranger])


def test_a_model_that_was_not_trained_from_the_given_base_is_refused(
    tiny_model: Path, stranger: Path, tmp_path: Path
) -> None:
    copy = foreign(tiny_model, tmp_path / "copy")
    refused(
        MergeRecipe(method="ties"), tmp_path, InputError,
        r"was not trained from model \([0-9a-f]{12}\); .*edgealign show", models=[stranger, copy], base=tiny_model,
    )


def test_task_arithmetic_without_a_base_is_refused(tiny_model: Path, stranger: Path, tmp_path: Path) -> None:
    models = [foreign(tiny_model, tmp_path / "a"), foreign(stranger, tmp_path / "b")]
    refused(MergeRecipe(method="ties"), tmp_path, InputError, "no base is given; give it with: --base", models=models)


def test_three_models_have_no_slerp(tiny_model: Path, stranger: Path, tmp_path: Path) -> None:
    models = [tiny_model, foreign(tiny_model, tmp_path / "a"), foreign(stranger, tmp_path / "b")]
    (tmp_path / "a" / "LICENSE").write_text("free", encoding="utf-8")
    recipe = MergeRecipe(method="slerp")
    refused(recipe, tmp_path, InputError, "3 models: slerp lies between exactly two", models=models)


def test_another_chat_template_is_refused(tiny_model: Path, stranger: Path, tmp_path: Path) -> None:
    other = foreign(stranger, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{# changed #}", encoding="utf-8")
    refused(MergeRecipe(), tmp_path, InputError, "has another chat template than model", models=[tiny_model, other])


def test_another_tokenizer_is_refused(tiny_model: Path, stranger: Path, tmp_path: Path) -> None:
    other = foreign(stranger, tmp_path / "other")
    parsed = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    parsed["model"]["merges"] = parsed["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(parsed), encoding="utf-8")
    refused(MergeRecipe(), tmp_path, InputError, "has another tokenizer than model", models=[tiny_model, other])


def test_another_architecture_is_refused(tiny_model: Path, stranger: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = foreign(stranger, tmp_path / "llama")
    (other / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(other)
    refused(MergeRecipe(), tmp_path, InputError, "is a llama, model is a lfm2", models=[tiny_model, other])


def test_a_truncated_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = foreign(tiny_model, tmp_path / "short")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(MergeRecipe(), tmp_path, InputError, "truncated", models=[tiny_model, other])


def test_an_adapter_of_another_model_is_refused_with_both_digests(
    tiny_model: Path, stranger: Path, tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    refused(
        MergeRecipe(), tmp_path, InputError,
        r"was fitted on the model [0-9a-f]{12}, this model is [0-9a-f]{12}; .*edgealign personalize --model",
        models=[stranger], adapter=tiny_lora(seed=1),
    )


def test_an_adapter_and_two_models_are_refused(
    tiny_model: Path, stranger: Path, tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = tiny_lora(seed=1)
    words = "a LoRA is merged into one model"
    refused(MergeRecipe(), tmp_path, InputError, words, models=[tiny_model, stranger], adapter=adapter)


def test_a_wrong_number_of_weights_is_refused(tiny_model: Path, stranger: Path, tmp_path: Path) -> None:
    models = [tiny_model, foreign(stranger, tmp_path / "b")]
    recipe = MergeRecipe(weights=(0.2, 0.3, 0.5))
    refused(recipe, tmp_path, RecipeError, "there are 2 models; give one weight per model", models=models)


def test_a_search_without_data_is_refused(tiny_model: Path, stranger: Path, tmp_path: Path) -> None:
    models = [tiny_model, foreign(stranger, tmp_path / "b")]
    refused(MergeRecipe(search=True), tmp_path, InputError, "needs held-out rows .*--data FILE", models=models)


def test_an_output_that_exists_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    refused(MergeRecipe(), tmp_path, OutputError, "exists already", models=[tiny_model, tmp_path / "absent"])


def test_without_mergekit_the_install_line_is_shown(
    tiny_model: Path, stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tiny_model, foreign(stranger, tmp_path / "b")]
    for name in ("mergekit", "mergekit.common", "mergekit.config", "mergekit.merge", "mergekit.options"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(MergeRecipe(), tmp_path, ToolMissing, "pip install mergekit==0.1.5", models=models)
