"""The GGUF header validator reads what is right; tests/hostile/test_export.py has what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.runtimes.gguf_header import TENSOR_TYPES, LongArray, check_gguf


def write(file: Path, tensors: dict[str, Any], **extra: Any) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "lfm2")
    for key, value in extra.items():
        getattr(writer, f"add_{key}")(*value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_metadata_and_tensors_are_read_as_written(tmp_path: Path) -> None:
    tensors = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.weight": np.ones(8, np.float16)}
    file = write(
        tmp_path / "x.gguf", tensors, block_count=(3,), rope_freq_base=(1e6,), add_bos_token=(True,),
        head_count_kv=([0, 2, 0],), name=("größe",),
    )
    info = check_gguf(file)
    assert (info.arch, info.version, info.n_tensors, info.is_adapter) == ("lfm2", 3, 2, False)
    assert info.metadata["lfm2.block_count"] == 3
    assert info.metadata["lfm2.attention.head_count_kv"] == (0, 2, 0)
    assert info.metadata["general.name"] == "größe"
    assert info.metadata["tokenizer.ggml.add_bos_token"] is True
    first = info.tensors[0]
    assert (first.name, first.shape, first.type, first.bytes) == ("a.weight", (4, 3), "F32", 48)
    data = file.read_bytes()
    assert np.array_equal(np.frombuffer(data, np.float32, 12, first.offset).reshape(3, 4), tensors["a.weight"])


def test_long_arrays_are_counted_and_not_kept(tmp_path: Path) -> None:
    file = write(tmp_path / "x.gguf", {}, token_list=([f"token {n}" for n in range(5000)],))
    assert check_gguf(file).metadata["tokenizer.ggml.tokens"] == LongArray(5000)


def test_another_alignment_is_followed(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.gguf", {"a": np.ones(3, np.float32), "b": np.full(3, 2, np.float32)}, custom_alignment=(64,)
    )
    second = check_gguf(file).tensors[1]
    assert second.offset % 64 == 0
    assert np.array_equal(np.frombuffer(file.read_bytes(), np.float32, 3, second.offset), [2, 2, 2])


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_block_sizes_are_those_of_the_gguf_package(kind: int) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name, per_block, block_bytes = TENSOR_TYPES[kind]
    assert GGMLQuantizationType(kind).name == name
    assert GGML_QUANT_SIZES[GGMLQuantizationType(kind)] == (per_block, block_bytes)
