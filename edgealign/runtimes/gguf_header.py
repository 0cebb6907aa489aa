"""Prove a GGUF header before any native code reads the file.

llama.cpp declares untrusted files out of its scope, and the `gguf` package walks whatever length an array declares.
This reader is bounded: every count and length is held against the bytes that are left before anything is read,
nothing is allocated from a declared size, and each tensor must lie inside the file, aligned, without overlap.
A hostile file costs milliseconds. Layout: the GGUF specification, versions 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgealign.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_TENSORS = MOST_KEYS = 65_536
LONGEST_NAME = 4096  # bytes, of a key or tensor name
LONGEST_STRING = 16_000_000  # bytes, of one value; a chat template has some thousand
MOST_STRINGS = 2_000_000  # in all arrays together; the largest vocabularies with their merges have 800,000
KEPT_ITEMS = 4096  # longer arrays (tokens, merges) are walked, not kept

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# ggml tensor types: id -> (name, weights per block, bytes per block).
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape` is in GGUF order: the row length first. `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class LongArray:
    """Stands for an array that is too long to keep."""

    count: int


@dataclass(frozen=True)
class GgufInfo:
    """What the header says. `metadata` holds scalars, strings, short arrays as tuples, and `LongArray`."""

    arch: str
    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def n_tensors(self) -> int:
        return len(self.tensors)

    @property
    def is_adapter(self) -> bool:
        return self.metadata.get("general.type") == "adapter"


def check_gguf(path: str | Path) -> GgufInfo:
    """Read and prove the header of a GGUF file.

    Raises:
        InputError: one line with the file, the byte offset and the reason.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise InputError(file, "is not a file", "give a .gguf file")
        if size < 24:
            raise InputError(file, f"is not a GGUF file ({size} bytes)", "export it again: edgealign export")
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(file, data, size).read()
    except OSError as error:
        raise InputError(file, f"cannot be read ({error.strerror or error})", "check the path") from error


class _Reader:
    """A cursor over the mapped file that never passes its end."""

    def __init__(self, file: Path, data: mmap.mmap, size: int) -> None:
        self.file, self.data, self.size = file, data, size
        self.at = 0
        self.strings_left = MOST_STRINGS

    def read(self) -> GgufInfo:
        if self.data[:4] != MAGIC:
            self.fail("is not a GGUF file (wrong magic)")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            self.fail(f"has GGUF version {version}, known are 2 and 3")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        # The smallest key and the smallest tensor entry take 13 and 33 bytes.
        if n_keys > min(MOST_KEYS, self.left() // 13):
            self.fail(f"declares {n_keys:,} metadata keys, more than it can hold")
        if n_tensors > min(MOST_TENSORS, self.left() // 33):
            self.fail(f"declares {n_tensors:,} tensors, more than it can hold")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string(LONGEST_NAME)
            if key in metadata:
                self.fail(f"declares {key} twice")
            metadata[key] = self.value(self.number("I"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 65_536 or alignment % 8:
            self.fail(f"has the alignment {alignment}")
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            self.fail("names no architecture")
        raw = [self.tensor(alignment) for _ in range(n_tensors)]
        start = -(-self.at // alignment) * alignment
        return GgufInfo(arch, version, metadata, self.place(raw, start))

    def tensor(self, alignment: int) -> TensorInfo:
        name = self.string(LONGEST_NAME)
        n_dims = self.number("I")
        if not 1 <= n_dims <= 4:
            self.fail(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dims))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in TENSOR_TYPES:
            self.fail(f"tensor {name} has the unknown type {kind}")
        type_name, per_block, block_bytes = TENSOR_TYPES[kind]
        count = 1
        for length in shape:
            count *= length
        if count < 1 or count > 8 * self.size:
            self.fail(f"tensor {name} has the shape {list(shape)}, more than the file can hold")
        if shape[0] % per_block:
            self.fail(f"tensor {name} has rows of {shape[0]}, no multiple of {type_name}'s {per_block}")
        if offset % alignment:
            self.fail(f"tensor {name} is not aligned")
        return TensorInfo(name, shape, type_name, offset, count // per_block * block_bytes)

    def place(self, raw: list[TensorInfo], start: int) -> tuple[TensorInfo, ...]:
        """Offsets from the file's start; inside the file, no two over each other, no name twice."""
        placed = tuple(TensorInfo(t.name, t.shape, t.type, start + t.offset, t.bytes) for t in raw)
        if len({t.name for t in placed}) != len(placed):
            self.fail("declares a tensor twice")
        end = start
        for tensor in sorted(placed, key=lambda t: t.offset):
            if tensor.offset < end:
                self.fail(f"tensor {tensor.name} lies over another one")
            end = tensor.offset + tensor.bytes
            if end > self.size:
                self.fail(f"is truncated: tensor {tensor.name} ends at {end:,}, the file at {self.size:,}")
        return placed

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string(LONGEST_STRING)
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind == BOOL:
            byte = self.number("B")
            if byte > 1:
                self.fail(f"has a truth value {byte}")
            return bool(byte)
        if kind not in SCALARS:
            self.fail(f"has a value of unknown type {kind}")
        return self.number(SCALARS[kind])

    def array(self, kind: int, count: int) -> Any:
        if kind == STRING:
            if count > min(self.strings_left, self.left() // 8):
                self.fail(f"declares an array of {count:,} strings, more than it can hold")
            self.strings_left -= count
            if count <= KEPT_ITEMS:
                return tuple(self.string(LONGEST_STRING) for _ in range(count))
            for _ in range(count):
                self.skip(self.number("Q"))
            return LongArray(count)
        if kind not in SCALARS:
            self.fail(f"has an array of unknown or nested type {kind}")
        width = struct.calcsize(f"<{SCALARS[kind]}")
        if count > self.left() // width:
            self.fail(f"declares an array of {count:,} items, more than it can hold")
        if count > KEPT_ITEMS:
            self.skip(count * width)
            return LongArray(count)
        values = struct.unpack_from(f"<{count}{SCALARS[kind]}", self.data, self.at)
        self.at += count * width
        return values

    def string(self, limit: int) -> str:
        length = self.number("Q")
        if length > min(limit, self.left()):
            self.fail(f"declares a text of {length:,} bytes, more than it can hold")
        start = self.at
        self.at += length
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            self.at = start
            self.fail("has a text that is not UTF-8")

    def number(self, form: str) -> Any:
        width = struct.calcsize(f"<{form}")
        if width > self.left():
            self.fail("ends inside its header: it is truncated")
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += width
        return value

    def skip(self, length: int) -> None:
        if length > self.left():
            self.fail(f"declares {length:,} bytes, more than it can hold")
        self.at += length

    def left(self) -> int:
        return self.size - self.at

    def fail(self, reason: str) -> NoReturn:
        raise InputError(self.file, f"{reason} (byte {self.at:,})", "get or export the file again")


def count_token_bytes(path: str | Path) -> int:
    """Bytes of weights that one decoded token reads: all but the embedding rows and the experts not in use.

    Without a head of its own the embedding table is the head as well, and is read whole.
    """
    info = check_gguf(path)
    experts, used = (info.metadata.get(f"{info.arch}.{key}") for key in ("expert_count", "expert_used_count"))
    tied = all(tensor.name != "output.weight" for tensor in info.tensors)
    total = 0
    for tensor in info.tensors:
        if tensor.name == "token_embd.weight" and not tied:
            total += tensor.bytes // tensor.shape[-1]
        elif "_exps." in tensor.name and isinstance(experts, int) and isinstance(used, int) and experts > 0:
            total += tensor.bytes * min(used, experts) // experts
        else:
            total += tensor.bytes
    return total
