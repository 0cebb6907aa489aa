"""Model directories that must be refused: one line with the file and the reason, and nothing executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgealign.errors import InputError, OutputError, RecipeError
from edgealign.models import create
from edgealign.models.load import check_model, check_safetensors, load_model, load_tokenizer
from edgealign.models.recipes import InitRecipe
from edgealign.recipe import build


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "manifest.json").unlink()
    return folder


def edit(file: Path, **values: object) -> None:
    parsed = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(parsed | values), encoding="utf-8")


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


class Canary:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_pickled_weights_are_refused_unopened(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    canary = tmp_path / "executed"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    assert "pytorch_model.bin: is a pickle, which can run code when it is opened" in refused(lambda: load_model(model))
    assert not canary.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_code_that_comes_with_a_model_is_never_run(
    model: Path, tmp_path: Path, file: str, load: Callable[[Path], object]
) -> None:
    canary = tmp_path / "executed"
    (model / "canary.py").write_text(f"open({str(canary)!r}, 'w').close()\n", encoding="utf-8")
    edit(model / file, auto_map={"AutoModelForCausalLM": "canary.Model", "AutoTokenizer": ["canary.T", None]})
    assert f"{file}: asks to run code that comes with the model (auto_map)" in refused(lambda: load(model))
    assert not canary.exists()


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 3000, -1])
def test_truncated_safetensors_are_refused_with_the_file(model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors: " in refused(lambda: load_model(model))


def test_a_longer_safetensors_file_is_refused(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "truncated or damaged" in refused(lambda: load_model(model))


HEADERS: dict[str, object] = {
    "a hole": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "an overlap": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    },
    "a wrong size": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    "a negative length": {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
    "an unknown type": {"a": {"dtype": "F1", "shape": [2], "data_offsets": [0, 8]}},
    "a text as shape": {"a": {"dtype": "F32", "shape": "22", "data_offsets": [0, 8]}},
    "a huge shape": {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "a list": [1, 2],
    "a number as entry": {"a": 5},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_lying_safetensors_header_is_refused(tmp_path: Path, what: str) -> None:
    head = json.dumps(HEADERS[what]).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    assert "x.safetensors: " in refused(lambda: check_safetensors(file))


def test_a_header_longer_than_the_file_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "its header does not fit" in refused(lambda: check_safetensors(file))


def test_flipped_header_bytes_never_raise_anything_but_an_input_error(model: Path) -> None:
    import random

    file = model / "model.safetensors"
    chance = random.Random(0)
    with file.open("r+b") as handle:
        end = 8 + int.from_bytes(handle.read(8), "little")
        for _ in range(300):
            place = chance.randrange(end)
            handle.seek(place)
            byte = handle.read(1)[0]
            for written in (byte ^ 1 << chance.randrange(8), byte):
                handle.seek(place)
                handle.write(bytes([written]))
                handle.flush()
                if written != byte:
                    with contextlib.suppress(InputError):
                        check_safetensors(file)
    assert check_safetensors(file)


def test_a_missing_tensor_is_named(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.conv.in_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    text = refused(lambda: load_model(model))
    assert "lacks 1 tensors of its architecture, first model.layers.1.conv.in_proj.weight" in text


def test_a_foreign_tensor_is_named(model: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors") | {"model.layers.0.extra.weight": torch.zeros(2)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "does not have, first model.layers.0.extra.weight" in refused(lambda: load_model(model))


def test_weights_of_another_shape_are_refused(model: Path) -> None:
    edit(model / "config.json", intermediate_size=512)
    text = refused(lambda: load_model(model))
    assert "has 18 tensors of another shape than its config says, first model.layers.0.feed_forward.w1.weight" in text


def test_an_index_that_lists_an_absent_tensor_is_refused(model: Path) -> None:
    edit(model / "model.safetensors.index.json", weight_map={"lost.weight": "model-2.safetensors"})
    assert "lacks tensor lost.weight" in refused(lambda: load_model(model))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "architecture bert is no causal language model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "architecture t5 is no causal"),
        ({"model_type": "never-heard-of"}, "architecture never-heard-of is no causal"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "no language-model head"),
    ],
)
def test_another_architecture_is_refused(model: Path, config: dict[str, object], reason: str) -> None:
    edit(model / "config.json", **config)
    assert reason in refused(lambda: check_model(model))


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", '{"model_type": '])
def test_a_damaged_config_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json: is not" in refused(lambda: load_model(model))


def test_a_directory_without_config_or_weights_says_so(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json: not a model directory" in refused(lambda: load_model(tmp_path / "empty"))
    (model / "model.safetensors").unlink()
    assert "holds no weights" in refused(lambda: load_model(model))


def test_a_file_instead_of_a_directory_is_refused(model: Path) -> None:
    assert "is a file, a model is a directory" in refused(lambda: load_model(model / "model.safetensors"))


def test_a_damaged_or_absent_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer.json: cannot be read" in refused(lambda: load_tokenizer(model))
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(lambda: load_tokenizer(model))


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"", "a.txt", "holds no text"),
        (b"  \n\n", "a.txt", "holds no text"),
        (b"\xff\xfe\x00", "a.txt", "is not UTF-8 text"),
        (b'{"a": "b"}\n{"a": ', "a.jsonl", "a.jsonl:2: is not JSON"),
        (b"not gzip", "a.txt.gz", "cannot be read"),
    ],
)
def test_unusable_tokenizer_text_is_refused_and_leaves_nothing(
    tmp_path: Path, content: bytes, name: str, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    assert reason in refused(lambda: create.run(InitRecipe(), text=[tmp_path / name], out=out))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_missing_tokenizer_text_is_refused(tmp_path: Path) -> None:
    assert "no-such.txt: cannot be read" in refused(
        lambda: create.run(InitRecipe(), text=[tmp_path / "no-such.txt"], out=tmp_path / "out")
    )


def test_an_existing_output_is_refused_before_any_work(tiny_model: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        create.run(InitRecipe(shape="lfm2-8b-a1b"), text=[], out=tiny_model)


def test_an_unknown_recipe_key_and_a_bad_shape_are_told_together() -> None:
    with pytest.raises(RecipeError, match=r"unknown key sead \(did you mean seed\?\); shape = 'lfm3' is not one of"):
        build(InitRecipe, {"sead": 1, "shape": "lfm3"}, where="init")
