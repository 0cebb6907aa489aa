"""Read the weights inside an ExecuTorch program back as 32-bit floats, under the model's names. Needs executorch.

A program names nothing: a weight is a constant of XNNPACK's graphs, found by the digest of its bytes, and XNNPACK's
order is not the model's. So each of the model's tensors is looked for among the stored ones of its shape, and the
nearest is its counterpart: rounding to 4 bits leaves an error of a tenth, another matrix is off by more than all of it.
Which matrix is multiplied where is not seen here; that is what comparing logits is for. Layouts: executorch 1.5.1,
`backends/xnnpack/serialization/schema.fbs`, read with its own `flatc`.

Shape legend: I in features, O out features, G groups of a row.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.errors import InputError, ToolMissing
from edgealign.runtimes.executorch_names import FORWARD, ExecutorchArchitecture

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

PROBED_ROWS = 8  # of a matrix, to find its counterpart; the caller compares all of it
HEADER_BYTES = 256  # at least as long as the header of any version
FLOAT, BYTE = 6, 1  # ExecuTorch's scalar types


@dataclass(frozen=True)
class Stored:
    """One constant of the program, read when asked for: a program's weights as floats are several times its file."""

    shape: tuple[int, ...]
    kept: bool  # as floats, as they were
    read: Callable[[int], Floats]  # its first rows

    @property
    def values(self) -> Floats:
        return self.read(self.shape[0])


@dataclass(frozen=True)
class Opened:
    """A program, its plan for `forward`, and the file's pages, of which nothing is copied."""

    program: Any
    plan: Any
    pages: npt.NDArray[np.uint8]
    base: int  # where segments begin

    def segment(self, index: int) -> npt.NDArray[np.uint8]:
        found = self.program.segments[index]
        start = self.base + found.offset
        if start + found.size > len(self.pages):
            raise ValueError(f"segment {index} ends beyond the file")
        return self.pages[start : start + found.size]

    def constant(self, index: int) -> npt.NDArray[np.uint8]:
        """A tensor of the program's own, by its place in the constant buffer; it may be followed by others."""
        inline = self.program.constant_segment
        if not inline.offsets:
            return np.frombuffer(bytes(self.program.constant_buffer[index].storage), np.uint8)
        return self.segment(inline.segment_index)[inline.offsets[index] :]

    def payload(self, delegate: Any) -> bytes:
        """What a delegate keeps: its graph."""
        from executorch.exir.schema import DataLocation

        place = delegate.processed
        if place.location == DataLocation.INLINE:
            return bytes(self.program.backend_delegate_data[place.index].data)
        return self.segment(place.index).tobytes()

    def named(self) -> dict[str, npt.NDArray[np.uint8]]:
        """The weights that delegates ask for by name."""
        return {entry.key: self.segment(entry.segment_index) for entry in self.program.named_data or []}


def stored_weights(
    file: Path, table: ExecutorchArchitecture | None, own: Mapping[str, Callable[[], Floats]]
) -> Iterator[tuple[str, bool, Floats]]:
    """Each of the model's tensors that the program holds: its name, is it kept in floats, the stored values.

    A head that shares the embedding's weights is stored beside it: the name comes twice.

    Args:
        table: None for a program that was recorded from the model's own modules.
        own: the model's tensors by name, each to be called for its values.
    """
    constants = list(_constants(file))
    for name, load in own.items():
        places = (name,) if table is None else table.targets(name)
        if not places:
            continue
        values = load()
        flat = values.reshape(len(values), -1)
        if table is None and values.ndim == 3:  # a convolution as torch has it, which `_program_constants` makes flat
            found = [_nearest(values.reshape(-1), constants, kept=True)]
            if found[0] is not None:
                yield name, True, found[0].values.reshape(values.shape)
            continue
        if "conv" in places[0] and values.ndim == 3:  # a short convolution (D, 1, L) is kept as L rows of D
            found = [_nearest(row, constants, kept=True) for row in flat.T]
            if all(found):
                yield name, True, np.stack([entry.values for entry in found if entry], axis=1).reshape(values.shape)
            continue
        parts = [_nearest(part, constants) for part in np.array_split(values, len(places))]
        if not all(parts):
            continue
        yield name, all(part.kept for part in parts if part), np.concatenate([part.values for part in parts if part])
        if name.endswith("embed_tokens.weight") and "lm_head.weight" not in own:
            first = parts[0]
            head = _nearest(values, (entry for entry in constants if entry is not first))
            if head is not None:
                yield name, head.kept, head.values


def count_token_bytes(file: Path) -> int:
    """Bytes of weights that one decoded token reads: every constant of `forward`, and one row of the embedding
    and of its scales."""
    opened = _open(file)
    sizes: dict[str, int] = {}
    for delegate in opened.plan.delegates:
        for entry in _read_graph(opened.payload(delegate))["constant_data"]:
            sizes[entry.get("named_key", "")] = int(entry.get("size", 0))
    total = sum(sizes.values())
    plain = [(tuple(tensor.sizes), int(tensor.scalar_type)) for _, tensor in _plain_constants(opened.plan)]
    tables = {shape[0] for shape, kind in plain if kind == BYTE and len(shape) == 2}
    for shape, kind in plain:
        count = math.prod(shape) * (4 if kind == FLOAT else 1)
        lookup = (len(shape) == 2 and shape[0] > shape[1]) or (len(shape) == 1 and shape[0] in tables)
        total += count // shape[0] if lookup else count
    return total


def _nearest(wanted: Floats, constants: Iterable[Stored], *, kept: bool | None = None) -> Stored | None:
    """The stored tensor of this shape whose first rows are closest; None where no shape fits."""
    best, least = None, np.inf
    for entry in constants:
        if entry.shape != wanted.shape or (kept is not None and entry.kept != kept):
            continue
        rows = len(wanted) if wanted.ndim == 1 else min(PROBED_ROWS, len(wanted))
        gap = float(np.linalg.norm(entry.read(rows) - wanted[:rows]))
        if gap < least:
            best, least = entry, gap
    return best


def _constants(file: Path) -> Iterator[Stored]:
    """The program's own constants, then those of its delegates."""
    opened = _open(file)
    named = opened.named()
    yield from _program_constants(opened)
    for delegate in opened.plan.delegates:
        yield from _delegate_constants(opened.payload(delegate), named)


def _open(file: Path) -> Opened:
    """executorch's own reader copies every segment three times; this takes the file's pages as they are."""
    try:
        from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
        from executorch.exir._serialize._program import _get_extended_header
    except ImportError as error:
        raise ToolMissing("executorch", "is needed to read it", "pip install 'edgealign[executorch]'") from error
    try:
        pages = np.memmap(file, np.uint8, mode="r")
        header = _get_extended_header(pages[:HEADER_BYTES].tobytes())
        whole = header is None or not header.is_valid()
        size, base = (len(pages), 0) if whole else (header.program_size, header.segment_base_offset)
        program = _flatbuffer_to_program(pages[:size].tobytes())
        plan = next(plan for plan in program.execution_plan if plan.name == FORWARD)
        opened = Opened(program, plan, pages, base)
        for index in range(len(program.segments)):
            opened.segment(index)
    except Exception as error:  # its reader raises what a damaged file makes it raise
        reason = f"is no readable ExecuTorch program with a method {FORWARD} ({type(error).__name__})"
        raise InputError(file, reason, "export it again: edgealign export --target executorch") from error
    return opened


def _plain_constants(plan: Any) -> Iterator[tuple[int, Any]]:
    """The constant tensors outside of the delegates: place in the constant buffer, tensor."""
    for value in plan.values:
        tensor = value.val
        index = getattr(tensor, "data_buffer_idx", 0)
        if index and getattr(tensor, "allocation_info", None) is None:
            yield index, tensor


def _program_constants(opened: Opened) -> Iterator[Stored]:
    """Constant tensors: norms and taps in floats, and an embedding of bytes with a scale for each row."""
    tables: list[npt.NDArray[np.int8]] = []
    scales: list[Floats] = []
    for index, tensor in _plain_constants(opened.plan):
        sizes, kind = tuple(tensor.sizes), int(tensor.scalar_type)
        if kind == FLOAT:
            values = opened.constant(index)[: 4 * math.prod(sizes)].view(np.float32).reshape(sizes)
            scales.append(values)
            yield _whole(values.reshape(-1) if values.ndim > 1 and 1 in values.shape else values)
        elif kind == BYTE and len(sizes) == 2:
            tables.append(opened.constant(index)[: math.prod(sizes)].view(np.int8).reshape(sizes))
    for table in tables:
        scale = next((entry for entry in scales if entry.size == len(table)), None)
        if scale is not None:
            yield _scaled(table.shape, scale.reshape(-1, 1), _rows(table))


def _delegate_constants(payload: bytes, named: Mapping[str, npt.NDArray[np.uint8]]) -> Iterator[Stored]:
    """The matrices of one XNNPACK graph."""
    graph = _read_graph(payload)
    keys = [entry.get("named_key", "") for entry in graph["constant_data"]]
    for value in graph["xvalues"]:
        tensor, scheme = value["xvalue_union"], None
        if value["xvalue_union_type"] == "XNNQuantizedTensorValue":
            scheme, tensor = tensor["quant_params"], tensor["tensor_value"]
        index = tensor.get("constant_buffer_idx", 0)
        if not index or len(tensor["dims"]) != 2:
            continue
        shape = (int(tensor["dims"][0]), int(tensor["dims"][1]))
        raw = named[keys[index]]
        if tensor["datatype"] == "xnn_datatype_fp32":
            yield _whole(raw[: 4 * math.prod(shape)].view(np.float32).reshape(shape))
            continue
        assert scheme is not None, tensor
        scales = _scales(named[keys[scheme["scale_buffer_idx"]]], int(scheme["num_scales"])).reshape(shape[0], -1)
        whole = "int4" not in tensor["datatype"]
        read = _rows(raw[: math.prod(shape)].view(np.int8).reshape(shape)) if whole else _nibbles(raw, shape)
        yield _scaled(shape, scales, read)


def _whole(values: Floats) -> Stored:
    return Stored(values.shape, True, lambda rows: values[:rows])


def _scaled(shape: tuple[int, ...], scales: Floats, numbers: Callable[[int], npt.NDArray[np.int8]]) -> Stored:
    """Whole numbers (O, I) with scales (O, G)."""

    def read(rows: int) -> Floats:
        groups = numbers(rows).reshape(rows, scales.shape[1], -1).astype(np.float32)
        groups *= scales[:rows, :, None]
        return groups.reshape(rows, shape[1])

    return Stored(shape, False, read)


def _rows(table: npt.NDArray[np.int8]) -> Callable[[int], npt.NDArray[np.int8]]:
    return lambda rows: table[:rows]


def _scales(raw: npt.NDArray[np.uint8], count: int) -> Floats:
    """Scales of groups are bfloat16, those of rows 32-bit floats."""
    if len(raw) >= 4 * count:
        return raw[: 4 * count].view(np.float32)
    return (raw[: 2 * count].view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _nibbles(raw: npt.NDArray[np.uint8], shape: tuple[int, int]) -> Callable[[int], npt.NDArray[np.int8]]:
    """Two numbers in a byte, the low half first, stored with 8 added."""

    def read(rows: int) -> npt.NDArray[np.int8]:
        packed = raw.reshape(shape[0], -1)[:rows]
        pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)[:, : shape[1]]
        return np.asarray(pairs.astype(np.int8) - 8, dtype=np.int8)

    return read


def _read_graph(payload: bytes) -> dict[str, Any]:
    """The flatbuffer behind the delegate's header, as JSON."""
    import executorch.backends.xnnpack.serialization as schemas
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    head = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    body = payload[head.flatbuffer_offset : head.flatbuffer_offset + head.flatbuffer_size]
    with tempfile.TemporaryDirectory() as scratch:
        schema = Path(scratch, "schema.fbs")
        schema.write_bytes(importlib.resources.files(schemas).joinpath("schema.fbs").read_bytes())
        Path(scratch, "graph.bin").write_bytes(body)
        _flatc_decompile(scratch, str(schema), str(Path(scratch, "graph.bin")), ["--raw-binary"])
        graph: dict[str, Any] = json.loads(Path(scratch, "graph.json").read_text(encoding="utf-8"))
    return graph
