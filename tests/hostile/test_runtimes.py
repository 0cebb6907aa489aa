"""Bad files and bad bundles meet the runtimes: one line with the value, the reason and what to do; nothing crashes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.errors import ArtifactError, EdgealignError, InputError, RecipeError, UsageError
from edgealign.runtimes.llamacpp import LlamaSession
from edgealign.runtimes.process import ProcessSession
from edgealign.runtimes.session import open_session, read_bundle, runtime_of

Bundles = Callable[[str], Path]
OPTIONS: dict[str, Any] = {"threads": 1, "extra_bufts": True}


def one_line(error: EdgealignError, *parts: str) -> None:
    line = error.line()
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.fixture
def session(tiny_bundle: Bundles) -> Iterator[LlamaSession]:
    with closing(LlamaSession(tiny_bundle("f32"), **OPTIONS)) as opened:
        yield opened


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_session(tmp_path / "nothing")
    one_line(caught.value, "nothing", "neither a bundle, a model directory nor a model file", "check the path")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no manifest\.json and no config\.json"):
        runtime_of(tmp_path)


def test_an_adapter_is_neither_model_nor_bundle(tiny_lora: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="is an artifact of kind adapter, not a model or a bundle"):
        runtime_of(tiny_lora(seed=1))


def test_an_unknown_runtime_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean llama\.cpp"):
        open_session(tmp_path, runtime="llamacpp")


@pytest.mark.runtime
def test_a_bundle_whose_manifest_lacks_its_model_is_refused(tiny_bundle: Bundles, tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("f32"), broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    del manifest["meta"]["model_file"]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="its manifest lacks 'model_file'; export the bundle again"):
        read_bundle(broken)


@pytest.mark.runtime
@pytest.mark.parametrize("keep", [0, 3, 500, 0.5, -1])
def test_a_truncated_model_is_refused_before_native_code(keep: float, tiny_bundle: Bundles, tmp_path: Path) -> None:
    data = (tiny_bundle("f32") / "model.gguf").read_bytes()
    file = tmp_path / "model.gguf"
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(InputError) as caught:
        LlamaSession(file, **OPTIONS)
    one_line(caught.value, "model.gguf")


@pytest.mark.runtime
def test_a_text_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("This is a letter, not a model. " * 10)
    with pytest.raises(InputError, match="wrong magic"):
        LlamaSession(file, **OPTIONS)


@pytest.mark.runtime
def test_a_model_that_llama_cpp_refuses_carries_its_reason(tiny_bundle: Bundles, tmp_path: Path) -> None:
    data = (tiny_bundle("f32") / "model.gguf").read_bytes()
    file = tmp_path / "model.gguf"
    file.write_bytes(data.replace(b"\x04\x00\x00\x00\x00\x00\x00\x00lfm2", b"\x04\x00\x00\x00\x00\x00\x00\x00abcd", 1))
    with pytest.raises(InputError) as caught:
        LlamaSession(file, **OPTIONS)
    one_line(caught.value, "llama.cpp cannot load it", "abcd", "export it again")


def write_adapter(file: Path, tensors: dict[str, tuple[int, ...]], arch: str = "lfm2", **metadata: str) -> Path:
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


PAIR = {"blk.0.ffn_up.weight.lora_a": (4, 128), "blk.0.ffn_up.weight.lora_b": (256, 4)}
BAD_ADAPTERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "a tensor of another shape": ({**PAIR, "blk.0.ffn_up.weight.lora_a": (4, 64)}, "llama.cpp refuses it"),
    "a layer that is not there": (
        {name.replace("blk.0", "blk.77"): shape for name, shape in PAIR.items()}, "llama.cpp refuses it"),
    "half a pair": ({"blk.0.ffn_up.weight.lora_a": (4, 128)}, "llama.cpp refuses it"),
    "the tied embedding": (
        {"token_embd.weight.lora_a": (4, 512), "token_embd.weight.lora_b": (128, 4)}, "which kills llama.cpp"),
}  # fmt: skip


@pytest.mark.runtime
@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_and_the_session_lives(name: str, session: LlamaSession, tmp_path: Path) -> None:
    tensors, reason = BAD_ADAPTERS[name]
    before = session.prefill([5, 6, 7])
    with pytest.raises(InputError) as caught:
        session.set_user(write_adapter(tmp_path / "user.gguf", tensors))
    one_line(caught.value, "user.gguf", reason)
    session.reset()
    assert np.array_equal(session.prefill([5, 6, 7]), before)


@pytest.mark.runtime
def test_a_sound_adapter_of_the_same_making_is_taken(session: LlamaSession, tmp_path: Path) -> None:
    before = session.prefill([5, 6, 7])
    session.set_user(write_adapter(tmp_path / "user.gguf", PAIR))
    assert not np.array_equal(session.prefill([5, 6, 7]), before)


@pytest.mark.runtime
def test_an_adapter_of_another_architecture_is_refused(session: LlamaSession, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"llama\.cpp refuses it for model\.gguf"):
        session.set_user(write_adapter(tmp_path / "user.gguf", PAIR, arch="llama"))


@pytest.mark.runtime
def test_an_adapter_of_another_base_is_refused_with_both_digests(session: LlamaSession, tmp_path: Path) -> None:
    stranger = write_adapter(tmp_path / "user.gguf", PAIR, edgealign__base_digest="f" * 64)
    with pytest.raises(InputError, match=r"was fitted on the model f{12}, model\.gguf is [0-9a-f]{12}; fit it again"):
        session.set_user(stranger)


@pytest.mark.runtime
@pytest.mark.parametrize("keep", [0, 100, 0.7])
def test_a_truncated_adapter_is_refused(
    keep: float, session: LlamaSession, tiny_bundle: Bundles, tmp_path: Path
) -> None:
    data = (tiny_bundle("f32") / "adapters" / "ana.gguf").read_bytes()
    file = tmp_path / "user.gguf"
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(InputError) as caught:
        session.set_user(file)
    one_line(caught.value, "user.gguf")


@pytest.mark.runtime
def test_an_adapter_that_does_not_exist_is_refused(session: LlamaSession, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such adapter file; export the user's adapter first"):
        session.set_user(tmp_path / "nobody.gguf")


@pytest.mark.runtime
def test_errors_come_out_of_a_child_process_unchanged(tiny_bundle: Bundles, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("no model at all, only text")
    with pytest.raises(InputError, match="wrong magic"):
        ProcessSession(file, **OPTIONS)
    with ProcessSession(tiny_bundle("f32"), **OPTIONS) as session:
        with pytest.raises(InputError, match="is a GGUF file, but no adapter"):
            session.set_user(tiny_bundle("f32") / "model.gguf")
        with pytest.raises(UsageError, match="is outside the vocabulary"):
            session.step(10**6)
        assert session.prefill([5]).shape == (512,)
