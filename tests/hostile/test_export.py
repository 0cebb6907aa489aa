"""Files that must be refused before native code sees them, and exports that must leave nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.errors import EdgealignError, InputError, OutputError
from edgealign.runtimes.gguf_adapter import write_lora_gguf
from edgealign.runtimes.gguf_header import check_gguf
from edgealign.runtimes.lora_weights import read_lora

TinyLora = Callable[..., Path]
EXPORT = str(Path(__file__).resolve().parents[2] / "export")
U32, F32, STRING, ARRAY = 4, 6, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


ARCH = text("general.architecture") + struct.pack("<I", STRING) + text("lfm2")


def head(*, tensors: int = 0, keys: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(*parts: bytes, data: int = 64) -> bytes:
    body = b"".join(parts)
    return body + bytes(-len(body) % 32) + bytes(data)


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is not a GGUF file (0 bytes)"),
    "another format": (b"\x7fELF" + bytes(60), "wrong magic"),
    "an old version": (gguf(head(version=1), ARCH), "GGUF version 1"),
    "a big-endian version": (gguf(head(version=3 << 24), ARCH), "GGUF version"),
    "2^63 tensors": (gguf(head(tensors=1 << 63), ARCH), "more than it can hold"),
    "2^63 keys": (gguf(head(keys=1 << 63), ARCH), "more than it can hold"),
    "a key of 2^60 bytes": (gguf(head(), struct.pack("<Q", 1 << 60)), "a text of"),
    "an array of 2^40 numbers": (
        gguf(head(), text("x") + struct.pack("<IIQ", ARRAY, U32, 1 << 40)), "an array of 1,099,511,627,776 items"),
    "an array of 2^40 texts": (
        gguf(head(), text("x") + struct.pack("<IIQ", ARRAY, STRING, 1 << 40)), "1,099,511,627,776 strings"),
    "an array of arrays": (gguf(head(), text("x") + struct.pack("<IIQ", ARRAY, ARRAY, 1)), "nested type 9"),
    "a value of unknown type": (gguf(head(), text("x") + struct.pack("<I", 77)), "unknown type 77"),
    "a truth value of 7": (gguf(head(), text("x") + struct.pack("<IB", 7, 7)), "truth value 7"),
    "a text that is not UTF-8": (gguf(head(), text(b"\xff\xfe") + struct.pack("<II", U32, 1)), "not UTF-8"),
    "a key twice": (gguf(head(keys=2), ARCH, ARCH), "general.architecture twice"),
    "no architecture": (gguf(head(), text("x") + struct.pack("<II", U32, 1)), "names no architecture"),
    "an alignment of zero": (
        gguf(head(keys=2), ARCH, text("general.alignment") + struct.pack("<II", U32, 0)), "the alignment 0"),
    "five dimensions": (gguf(head(tensors=1), ARCH, tensor("a", (1, 1, 1, 1, 1))), "5 dimensions"),
    "an empty dimension": (gguf(head(tensors=1), ARCH, tensor("a", (4, 0))), "the shape [4, 0]"),
    "dimensions that overflow": (gguf(head(tensors=1), ARCH, tensor("a", (1 << 62, 1 << 62))), "more than the file"),
    "an unknown tensor type": (gguf(head(tensors=1), ARCH, tensor("a", (4,), kind=99)), "unknown type 99"),
    "a removed tensor type": (gguf(head(tensors=1), ARCH, tensor("a", (32,), kind=4)), "unknown type 4"),
    "rows that fit no block": (gguf(head(tensors=1), ARCH, tensor("a", (33,), kind=2)), "no multiple of Q4_0's 32"),
    "a crooked offset": (gguf(head(tensors=1), ARCH, tensor("a", (4,), offset=8)), "is not aligned"),
    "an offset past the end": (gguf(head(tensors=1), ARCH, tensor("a", (4,), offset=1 << 40)), "is truncated"),
    "a tensor past the end": (gguf(head(tensors=1), ARCH, tensor("a", (17,))), "is truncated"),
    "a tensor over another": (
        gguf(head(tensors=2), ARCH, tensor("a", (16,)), tensor("b", (4,), offset=32)), "lies over another"),
    "a tensor twice": (
        gguf(head(tensors=2), ARCH, tensor("a", (4,)), tensor("a", (4,), offset=32)), "declares a tensor twice"),
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_a_lying_gguf_header_is_refused_with_its_reason(tmp_path: Path, what: str) -> None:
    data, reason = LIES[what]
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    start_s = time.perf_counter()
    with pytest.raises(InputError) as caught:
        check_gguf(file)
    assert time.perf_counter() - start_s < 0.05
    assert str(file) in str(caught.value)
    assert reason in str(caught.value)


def test_an_honest_small_file_passes(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf(head(tensors=2), ARCH, tensor("a", (8,)), tensor("b", (32,), kind=2, offset=32)))
    assert [entry.bytes for entry in check_gguf(file).tensors] == [32, 18]


def test_a_missing_file_or_a_directory_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read|is not a file"):
            check_gguf(path)


@pytest.fixture(scope="module")
def real_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    sys.path.insert(0, EXPORT)
    from gguf_model import write_model

    file = tmp_path_factory.mktemp("real") / "model.gguf"
    write_model(tiny_model, file, digest="d" * 64)
    return file.read_bytes()


def test_a_file_cut_anywhere_is_refused(real_file: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(real_file)
    for kept in sorted(range(0, len(real_file), 4096), reverse=True):
        os.truncate(file, kept)
        with pytest.raises(InputError, match=r"x\.gguf"):
            check_gguf(file)


def test_a_thousand_mutants_never_crash_hang_or_fill_the_memory(real_file: bytes, tmp_path: Path) -> None:
    chance = random.Random(0)
    file = tmp_path / "x.gguf"
    file.write_bytes(real_file)
    header = min(t.offset for t in check_gguf(file).tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    with file.open("r+b") as handle:
        for _ in range(1000):
            place = chance.randrange(header)
            span = chance.choice((1, 4, 8))
            original = real_file[place : place + span]
            handle.seek(place)
            handle.write(chance.choice((bytes(span), b"\xff" * span, chance.randbytes(span)))[: len(original)])
            handle.flush()
            start_s = time.perf_counter()
            try:
                check_gguf(file)
            except InputError:
                refused += 1
            assert time.perf_counter() - start_s < 2.0
            handle.seek(place)
            handle.write(original)
            handle.flush()
    assert refused > 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def config_of(model: Path) -> dict[str, object]:
    return dict(json.loads((model / "config.json").read_text(encoding="utf-8")))


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "a DoRA": ({"use_dora": True}, "is a DoRA"),
    "the embedding": ({"targets": ["embed_tokens"]}, "adapts the embedding, which would abort"),
    "saved modules": ({"modules_to_save": ["embedding_norm"]}, "replaces whole modules"),
    "trained biases": ({"bias": "lora_only"}, "trains biases"),
    "biases of its own": ({"targets": ["q_proj"], "lora_bias": True, "bias": "none"}, "has biases"),
    "rows of the embedding": ({"trainable_token_indices": {"embed_tokens": [3]}}, "rows of the embedding"),
}


@pytest.mark.parametrize("what", ADAPTERS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_with_more_than_low_rank_pairs_is_refused(
    what: str, tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    fields, reason = ADAPTERS[what]
    adapter = tiny_lora(**fields)
    with pytest.raises(InputError, match=reason) as caught:
        write_lora_gguf(adapter, tmp_path / "a.gguf", base_config=config_of(tiny_model))
    assert "merge" in caught.value.fix
    assert not (tmp_path / "a.gguf").exists()


def damaged(adapter: Path, how: str) -> None:
    from safetensors.numpy import load_file, save_file

    (adapter / "manifest.json").unlink()
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors = load_file(weights)
    name = next(iter(tensors))
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "not finite":
        tensors[name] = np.full_like(tensors[name], np.nan)
        save_file(tensors, weights)
    elif how == "half a pair":
        save_file({key: value for key, value in tensors.items() if key != name}, weights)
    elif how == "empty":
        save_file({}, weights)
    elif how == "the head":
        pair = {f"base_model.model.lm_head.lora_{side}.weight": np.ones((4, 4), np.float32) for side in "AB"}
        save_file(tensors | pair, weights)
    elif how == "a layer that is not there":
        save_file({key.replace("in_proj", "o_proj"): value for key, value in tensors.items()}, weights)
    elif how == "another rank":
        config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"r": 5}), encoding="utf-8")
    elif how == "another kind":
        config.write_text(json.dumps({"peft_type": "PREFIX_TUNING"}), encoding="utf-8")
    elif how == "a broken config":
        config.write_text("{", encoding="utf-8")
    elif how == "no config":
        config.unlink()
    elif how == "a pickle":
        weights.unlink()
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "is truncated or damaged"),
        ("not finite", "numbers that are not finite"),
        ("half a pair", "has no matching pair"),
        ("empty", "holds no LoRA weights"),
        ("the head", "the head, which llama.cpp cannot adapt"),
        ("a layer that is not there", "which is no linear layer of this architecture"),
        ("another rank", "has rank 4, its config says 5"),
        ("another kind", "is a PREFIX_TUNING adapter"),
        ("a broken config", "adapter_config.json: is damaged"),
        ("no config", "has no adapter_config.json"),
        ("a pickle", r"is a pickle \(adapter_model.bin\)"),
    ],
)
def test_a_damaged_adapter_is_refused(
    how: str, reason: str, tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    adapter = tiny_lora(seed=11)
    damaged(adapter, how)
    with pytest.raises(InputError, match=reason):
        write_lora_gguf(adapter, tmp_path / "a.gguf", base_config=config_of(tiny_model))


def test_an_adapter_for_an_architecture_without_a_table_is_refused(tiny_lora: TinyLora, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mamba: has no GGUF tensor table here; exportable are: lfm2, lfm2_moe"):
        write_lora_gguf(tiny_lora(), tmp_path / "a.gguf", base_config={"model_type": "mamba"})


def test_weights_beyond_16_bits_are_refused_as_f16_and_kept_as_f32(
    tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    adapter = tiny_lora(strength=1e6)
    with pytest.raises(InputError, match="beyond the range of 16-bit floats; use adapter_type f32"):
        write_lora_gguf(adapter, tmp_path / "a.gguf", base_config=config_of(tiny_model), dtype="f16")
    write_lora_gguf(adapter, tmp_path / "a.gguf", base_config=config_of(tiny_model), dtype="f32")
    assert read_lora(adapter).modules


def run_export(model: Path, out: Path) -> None:
    sys.path.insert(0, EXPORT)
    from to_gguf import export

    from edgealign.export_recipes import ExportRecipe

    export(ExportRecipe(), model=model, adapters={}, out=out, calibration=None)


def test_a_disk_that_fills_up_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from gguf import GGUFWriter

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match="the disk is full"):
        run_export(tiny_model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_untouched(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"):
        run_export(tiny_model, tmp_path / "bundle")
    assert (tmp_path / "bundle/mine.txt").read_text(encoding="utf-8") == "keep"


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "gpt2: has no GGUF tensor table"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "normalizes text"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "a rule that llama.cpp is not known to have"),
    ],
)
def test_a_model_that_gguf_cannot_hold_is_refused(
    tiny_model: Path, tmp_path: Path, file: str, change: dict[str, object], reason: str
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "manifest.json").unlink()
    parsed = json.loads((model / file).read_text(encoding="utf-8"))
    (model / file).write_text(json.dumps(parsed | change), encoding="utf-8")
    with pytest.raises(EdgealignError, match=reason):
        run_export(model, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tampered_model_is_refused_before_it_is_read(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    with (model / "model.safetensors").open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x01")
    with pytest.raises(EdgealignError, match="is not the file that was published"):
        run_export(model, tmp_path / "bundle")
