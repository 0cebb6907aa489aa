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
FLOAT, BYTE = 6, 1  # ExecuTorch's scalar types


@dataclass(frozen=True)
class Stored:
    """One constant of the program: its values, and whether they are floats as they were."""

    values: Floats
    kept: bool


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
    program, plan, _ = _open(file)
    sizes: dict[str, int] = {}
    for delegate in plan.delegates:
        for entry in _read_graph(_payload(program, delegate))["constant_data"]:
            sizes[entry.get("named_key", "")] = int(entry.get("size", 0))
    total = sum(sizes.values())
    plain = [(tuple(tensor.sizes), int(tensor.scalar_type)) for _, tensor in _plain_constants(plan)]
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
        if entry.values.shape != wanted.shape or (kept is not None and entry.kept != kept):
            continue
        probed = slice(None) if wanted.ndim == 1 else slice(PROBED_ROWS)
        gap = float(np.linalg.norm(entry.values[probed] - wanted[probed]))
        if gap < least:
            best, least = entry, gap
    return best


def _constants(file: Path) -> Iterator[Stored]:
    """The program's own constants, then those of its delegates."""
    program, plan, named = _open(file)

    def stored(key: str) -> bytes:
        return bytes(named.buffers[named.pte_data[key].buffer_index])

    yield from _program_constants(program, plan)
    for delegate in plan.delegates:
        yield from _delegate_constants(_payload(program, delegate), stored)


def _open(file: Path) -> tuple[Any, Any, Any]:
    """The program, its plan for `forward`, and the data that its delegates ask for by name."""
    try:
        from executorch.exir._serialize._program import deserialize_pte_binary
    except ImportError as error:
        raise ToolMissing("executorch", "is needed to read it", "pip install 'edgealign[executorch]'") from error
    try:
        read = deserialize_pte_binary(file.read_bytes())
        plan = next(plan for plan in read.program.execution_plan if plan.name == FORWARD)
    except Exception as error:  # flatc and its reader raise what a damaged file makes them raise
        reason = f"is no readable ExecuTorch program with a method {FORWARD} ({type(error).__name__})"
        raise InputError(file, reason, "export it again: edgealign export --target executorch") from error
    return read.program, plan, read.named_data


def _payload(program: Any, delegate: Any) -> bytes:
    return bytes(program.backend_delegate_data[delegate.processed.index].data)


def _plain_constants(plan: Any) -> Iterator[tuple[int, Any]]:
    """The constant tensors outside of the delegates: place in the constant buffer, tensor."""
    for value in plan.values:
        tensor = value.val
        index = getattr(tensor, "data_buffer_idx", 0)
        if index and getattr(tensor, "allocation_info", None) is None:
            yield index, tensor


def _program_constants(program: Any, plan: Any) -> Iterator[Stored]:
    """Constant tensors: norms and taps in floats, and an embedding of bytes with a scale for each row."""
    tables: list[tuple[Any, Any]] = []
    scales: list[Any] = []
    for index, tensor in _plain_constants(plan):
        raw, sizes, kind = program.constant_buffer[index].storage, tuple(tensor.sizes), int(tensor.scalar_type)
        if kind == FLOAT:
            values = np.frombuffer(bytes(raw), np.float32, count=math.prod(sizes)).reshape(sizes)
            scales.append(values)
            yield Stored(values.reshape(-1) if values.ndim > 1 and 1 in values.shape else values, True)
        elif kind == BYTE and len(sizes) == 2:
            tables.append((np.frombuffer(bytes(raw), np.int8, count=math.prod(sizes)).reshape(sizes), sizes[0]))
    for table, rows in tables:
        scale = next((entry for entry in scales if entry.size == rows), None)
        if scale is not None:
            yield Stored(table.astype(np.float32) * scale.reshape(-1, 1), False)


def _delegate_constants(payload: bytes, stored: Callable[[str], bytes]) -> Iterator[Stored]:
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
        rows, columns = tensor["dims"]
        raw = stored(keys[index])
        if tensor["datatype"] == "xnn_datatype_fp32":
            yield Stored(np.frombuffer(raw, np.float32).reshape(rows, columns), True)
            continue
        assert scheme is not None, tensor
        numbers = _unpack(raw, rows, columns) if "int4" in tensor["datatype"] else np.frombuffer(raw, np.int8)
        scales = _scales(stored(keys[scheme["scale_buffer_idx"]]), int(scheme["num_scales"]))
        groups = numbers.reshape(rows, scales.size // rows, -1).astype(np.float32) * scales.reshape(rows, -1, 1)
        yield Stored(groups.reshape(rows, columns), False)


def _scales(raw: bytes, count: int) -> Floats:
    """Scales of groups are bfloat16, those of rows 32-bit floats."""
    if len(raw) >= 4 * count:
        return np.frombuffer(raw, np.float32)[:count]
    return (np.frombuffer(raw, np.uint16)[:count].astype(np.uint32) << 16).view(np.float32)


def _unpack(raw: bytes, rows: int, columns: int) -> npt.NDArray[np.int8]:
    """Two numbers in a byte, the low half first, stored with 8 added."""
    packed = np.frombuffer(raw, np.uint8).reshape(rows, -1)
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)[:, :columns]
    return np.asarray(pairs.astype(np.int8) - 8, dtype=np.int8)


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
