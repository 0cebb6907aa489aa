"""What a bundle's tokenizer can do wrong, and the check that says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgealign.artifact import Check
from edgealign.errors import InputError
from edgealign.models.load import load_tokenizer
from edgealign.parity_strings import ORDINARY, look_alikes
from edgealign.parity_text import WORDS_PER_TEXT, check_text, control_tokens, vocabulary_texts
from edgealign.runtimes.llamacpp import LlamaSession
from edgealign.runtimes.onnx_session import OnnxSession
from edgealign.runtimes.process import ProcessSession

Bundles = Callable[[str], Path]
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1  # llama.cpp's token types
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def note(checks: list[Check], name: str) -> str:
    return next(check.note for check in checks if check.name == name)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose vocabulary was trained on the strings themselves: where text is cut shows in every string."""
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    folder = tmp_path_factory.mktemp("wide")
    (folder / "text.txt").write_text("\n".join(ORDINARY * 3), encoding="utf-8")
    recipe = InitRecipe(shape="tiny", seed=1, vocab_size=2560, context=512, dtype="float32")
    create.run(recipe, text=[folder / "text.txt"], out=folder / "model")
    return folder / "model"


def gguf_checks(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Mapping[str, Any]]
) -> list[Check]:
    """The checks of a GGUF file whose tokenizer was changed: `change` gets the sound one, gives other fields."""
    import gguf_model

    sound = gguf_model.read_vocab

    def changed(*arguments: Any, **options: Any) -> Any:
        vocab = sound(*arguments, **options)
        return replace(vocab, **change(vocab))

    monkeypatch.setattr(gguf_model, "read_vocab", changed)
    gguf_model.write_model(model, folder / "model.gguf", digest="0")
    with closing(LlamaSession(folder / "model.gguf", threads=1, extra_bufts=True)) as session:
        return check_text(model, model, session.tokenize, session.info())


def with_types(kind: int) -> Callable[[Any], Mapping[str, Any]]:
    return lambda vocab: {"types": tuple(kind if old == CONTROL else old for old in vocab.types)}


def without_a_merge(vocab: Any) -> Mapping[str, Any]:
    return {"merges": (*vocab.merges[:1500], *vocab.merges[1501:])}


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda vocab: {}, set()),
        (lambda vocab: {"rule": "qwen2"}, {"tokens.ids"}),
        (lambda vocab: {"rule": "gpt-2"}, {"tokens.ids"}),
        (lambda vocab: {"rule": "smollm"}, {"tokens.ids"}),
        (without_a_merge, {"tokens.ids"}),
        (lambda vocab: {"merges": vocab.merges[::-1]}, {"tokens.ids"}),
        (with_types(USER_DEFINED), {"tokens.ids", "tokens.typed"}),
        (with_types(NORMAL), {"tokens.ids"}),
        (lambda vocab: {"eos": 2}, {"tokens.end"}),
        (lambda vocab: {"template": vocab.template + " "}, {"template.embedded"}),
    ],
    ids=[
        "sound", "splits digits", "splits like GPT-2", "splits like SmolLM", "lacks a merge", "merges turned round",
        "control tokens are words", "control tokens are unknown", "another end of turn", "another template",
    ],
)  # fmt: skip
def test_each_way_to_break_the_tokenizer_in_a_gguf_file_is_caught(
    change: Callable[[Any], Mapping[str, Any]], expected: set[str], wide_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checks = gguf_checks(wide_model, tmp_path, monkeypatch, change)
    assert {check.name for check in checks} == {
        "template.rendered", "template.embedded", "tokens.files", "tokens.ids", "tokens.typed", "tokens.end",
    }  # fmt: skip
    assert failed(checks) == expected
    assert "conversations of 404" in note(checks, "template.rendered")
    assert "texts of 600" in note(checks, "tokens.typed")


def edited(bundle: Path, folder: Path, edit: Callable[[dict[str, Any]], None], *, name: str = "tokenizer.json") -> Path:
    """A copy of a bundle with one JSON file changed."""
    shutil.copytree(bundle, folder)
    parsed = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(parsed)
    (folder / name).write_text(json.dumps(parsed), encoding="utf-8")
    return folder


def flip_merges(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def drop_a_merge(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["merges"][100]


def lose_flags(tokenizer: dict[str, Any]) -> None:
    for token in tokenizer["added_tokens"]:
        token["special"] = False


def lose_one_flag(tokenizer: dict[str, Any]) -> None:
    """Not the end of a turn: transformers makes tokens special again that have a name."""
    next(token for token in tokenizer["added_tokens"] if token["content"] == "<|im_start|>")["special"] = False


def add_a_prefix_space(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def normalise(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "NFC"}


def end_elsewhere(config: dict[str, Any]) -> None:
    config["model"]["eos_token_id"] = 2


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda tokenizer: None, set()),
        (flip_merges, {"tokens.files"}),
        (drop_a_merge, {"tokens.files", "tokens.ids"}),
        (lose_flags, {"tokens.files", "tokens.ids", "tokens.typed"}),
        (lose_one_flag, {"tokens.files", "tokens.ids", "tokens.typed"}),
        (add_a_prefix_space, {"tokens.files", "tokens.ids", "tokens.typed"}),
        (normalise, {"tokens.files", "tokens.ids"}),
    ],
    ids=["sound", "two merges exchanged", "a merge lost", "flags lost", "one flag lost", "prefix space", "normalises"],
)
def test_each_way_to_break_the_tokenizer_of_an_onnx_bundle_is_caught(
    edit: Callable[[dict[str, Any]], None], expected: set[str], onnx_bundle: Bundles, tiny_model: Path, tmp_path: Path
) -> None:
    folder = edited(onnx_bundle("fp32"), tmp_path / "bundle", edit)
    with closing(OnnxSession(folder / "model.onnx", threads=1)) as session:
        checks = check_text(folder, tiny_model, session.tokenize, session.info())
    assert failed(checks) == expected


@pytest.mark.runtime
def test_another_end_of_turn_in_an_onnx_bundle_is_caught(
    onnx_bundle: Bundles, tiny_model: Path, tmp_path: Path
) -> None:
    folder = edited(onnx_bundle("fp32"), tmp_path / "bundle", end_elsewhere, name="genai_config.json")
    with closing(OnnxSession(folder / "model.onnx", threads=1)) as session:
        checks = check_text(folder, tiny_model, session.tokenize, session.info())
    assert failed(checks) == {"tokens.end"}


def test_a_runtime_that_always_reads_special_tokens_is_caught(tiny_model: Path) -> None:
    """The right ids for every text, and a user who types the end of a turn ends it."""
    tokenizer = load_tokenizer(tiny_model)

    def tokenize(text: str, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    facts = {"chat_template": tokenizer.chat_template, "eos": 7}
    checks = check_text(tiny_model, tiny_model, tokenize, facts)
    assert failed(checks) == {"tokens.ids", "tokens.typed"}
    assert "special token that the template did not write" in note(checks, "tokens.typed")


def test_a_runtime_that_drops_a_typed_token_is_caught(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)

    def tokenize(text: str, special: bool) -> list[int]:
        text = text if special else text.replace("<|im_end|>", "")
        options = {"add_special_tokens": False, "split_special_tokens": not special, "verbose": False}
        return list(tokenizer(text, **options)["input_ids"])

    facts = {"chat_template": tokenizer.chat_template, "eos": 7}
    assert failed(check_text(tiny_model, tiny_model, tokenize, facts)) == {"tokens.ids", "tokens.typed"}


@pytest.mark.runtime
def test_files_beside_a_sound_gguf_that_lost_a_flag_are_caught(
    tiny_bundle: Bundles, tiny_model: Path, tmp_path: Path
) -> None:
    """A chat with a bundle tokenises with these files, whatever the model file says."""
    folder = edited(tiny_bundle("f32"), tmp_path / "bundle", lose_one_flag)
    with closing(LlamaSession(folder / "model.gguf", threads=1, extra_bufts=True)) as session:
        checks = check_text(folder, tiny_model, session.tokenize, session.info())
    assert failed(checks) == {"tokens.files", "tokens.ids", "tokens.typed"}


@pytest.mark.runtime
def test_typed_text_is_text_through_the_child_process_too(tiny_bundle: Bundles, onnx_bundle: Bundles) -> None:
    for file in (tiny_bundle("f32") / "model.gguf", onnx_bundle("fp32") / "model.onnx"):
        tokenizer = load_tokenizer(file.parent)
        with ProcessSession(file, threads=1, timeout_s=60.0) as session:
            for text in look_alikes(control_tokens(tokenizer)):
                plain = session.tokenize(text, False)
                assert not set(plain) & set(tokenizer.all_special_ids)
                assert tokenizer.decode(plain) == text
            assert session.tokenize("<|im_end|>") == session.tokenize("<|im_end|>", True) == [7]


@pytest.mark.runtime
def test_a_tokenizer_file_that_cannot_be_read_is_one_line(onnx_bundle: Bundles, tmp_path: Path) -> None:
    for content in (b"", b"{", b"\xff\xfe"):
        folder = tmp_path / f"bundle{len(content)}"
        shutil.copytree(onnx_bundle("fp32"), folder)
        (folder / "tokenizer.json").write_bytes(content)
        with closing(OnnxSession(folder / "model.onnx", threads=1)) as session, pytest.raises(InputError) as caught:
            session.tokenize("a")
        assert "tokenizer.json: cannot be read" in caught.value.line()
        assert "\n" not in caught.value.line()


@pytest.mark.runtime
def test_what_genai_cannot_do_is_still_so(onnx_bundle: Bundles) -> None:
    """The check leaves these two out, and the support matrix says so: where genai learns them, both must change."""
    import onnxruntime_genai as genai

    tokenizer = genai.Tokenizer(genai.Model(str(onnx_bundle("fp32"))))
    assert 7 in list(tokenizer.encode("typed <|im_end|>"))
    assert list(tokenizer.encode("a\x00b")) == list(tokenizer.encode("a"))


def test_control_tokens_begin_with_the_end_of_a_turn(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert control_tokens(tokenizer) == ["<|im_end|>", "<|im_start|>", "<|startoftext|>", "<|pad|>"]


def test_the_vocabulary_is_tried_in_company(wide_model: Path) -> None:
    tokenizer = load_tokenizer(wide_model)
    texts = vocabulary_texts(tokenizer)
    lines = "\n".join(texts)
    for word in ("supercalifragilisticexpialidocious", " world", "\u65e5\u672c"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, "the test needs a word of one token"
        assert f"{word}{word.lstrip()}\n{word}q\n{word}\u00e9" in lines
    assert "reserved" not in lines
    assert "im_start" not in lines
    assert 2560 / WORDS_PER_TEXT * 0.5 < len(texts) <= 2560 / WORDS_PER_TEXT + 1
