"""Read the weights inside an ONNX graph back as 32-bit floats, in the model's own layout. Needs onnx_ir, no torch.

Shape legend: I in features, O out features, N blocks of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.errors import InputError, ToolMissing
from edgealign.runtimes.lora_inputs import read_inputs
from edgealign.runtimes.onnx_names import LAYER_NODE, OnnxArchitecture

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

# Nodes that look up the sines and cosines of a position, and nodes that hold experts.
ROTARY = ("GroupQueryAttention", "RotaryEmbedding")
EXPERTS = ("QMoE", "MoE")


def stored_weights(file: Path, table: OnnxArchitecture | None) -> Iterator[tuple[str, bool, Floats]]:
    """Each weight of a bundle's graph: the model's name for it, is it kept in floats, its values as in the model.

    Args:
        table: None where the graph keeps the model's own names (`export/general_model.py`).
    """
    import onnx_ir as ir

    graph = ir.load(file).graph
    parts = {entry.name: entry.parts for entry in read_inputs(file.parent)}
    for node in graph:
        named = LAYER_NODE.fullmatch(node.name or "")
        entry = parts.get(f"model.layers.{named[1]}.{named[2].replace('/', '.')}") if named else None
        if entry is not None:
            values, row = matrix(node), 0
            for part in entry:
                yield f"{part.module}.weight", node.op_type == "MatMul", values[row : row + part.out]
                row += part.out
        elif node.name and node.name.startswith("/lm_head/MatMul"):
            kept = node.op_type == "MatMul"
            tied = not any(name.startswith("model.embed_tokens.weight") for name in graph.initializers)
            yield "model.embed_tokens.weight" if tied else "lm_head.weight", kept, matrix(node)
    values_by_name: dict[str, Any] = dict(graph.initializers)
    for name, value in values_by_name.items():
        hf = name if table is None else _kept_name(name, table)
        if hf is not None and value.const_value is not None:
            values = np.asarray(value.const_value.numpy())
            less_one = table is not None and table.plus_one and "norm" in hf
            yield hf, True, values.astype(np.float32) - (1 if less_one else 0)


def matrix(node: Any) -> Floats:
    """The weights (O, I) of an onnx_ir node MatMul or MatMulNBits.

    A block of MatMulNBits is `scale * (stored - zero)`; without a zero point it is the middle of the stored numbers.
    """
    weight = node.inputs[1].const_value.numpy()
    if node.op_type == "MatMul":
        return np.asarray(weight, dtype=np.float32).T
    bits, rows, columns = (node.attributes[name].as_int() for name in ("bits", "N", "K"))
    blocks = weight.shape[1]
    stored = _unpack(weight.reshape(rows, -1), bits).reshape(rows, blocks, -1).astype(np.float32)
    scale = node.inputs[2].const_value.numpy().astype(np.float32).reshape(rows, blocks, 1)
    zero: Any = np.float32(2 ** (bits - 1))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        raw = node.inputs[3].const_value.numpy()
        if raw.dtype == np.uint8:
            raw = _unpack(raw.reshape(rows, -1), bits)[:, :blocks]
        zero = raw.astype(np.float32).reshape(rows, blocks, 1)
    return np.ascontiguousarray(((stored - zero) * scale).reshape(rows, -1)[:, :columns])


def _kept_name(name: str, table: OnnxArchitecture) -> str | None:
    """The model's name of a tensor that the graph keeps in floats; None for what the model does not have."""
    if name == "model.embed_tokens.weight":
        return name
    found = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
    if found is None:
        return None
    if found[2] == "final_norm_layernorm.weight":
        return table.final_norm
    return found[1] + table.kept[found[2]] if found[2] in table.kept else None


def _unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The numbers in each row of bytes; of two in a byte the low half comes first."""
    if bits == 8:
        return packed
    assert bits == 4, bits
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def count_token_bytes(file: Path) -> int:
    """Bytes of weights that one decoded token reads, by what the graph does with each of them.

    A looked-up table gives one row (the embedding, sines and cosines), experts those in use; everything else, a head
    that shares its table with the embedding included, is read whole. The runtime may keep weights in another layout of
    about the same size.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise ToolMissing("onnx-ir", "is needed to read the graph", "pip install 'edgealign[onnx]'") from error
    try:
        graph = ir.load(file).graph
    except Exception as error:  # a damaged protobuf and its neighbours raise classes of many libraries
        raise InputError(file, f"is no readable ONNX graph ({type(error).__name__})", "export it again") from error
    total = 0
    for value in graph.initializers.values():
        size = value.const_value.nbytes if value.const_value is not None else 0
        total += round(size * max((_touched(node, place, value) for node, place in value.uses()), default=0.0))
    return total


def _touched(node: Any, place: int, value: Any) -> float:
    """The share of a weight that a node reads for one token when it is the node's input number `place`."""
    rows = value.shape[0] if value.shape is not None and len(value.shape) else 1
    lookup = node.op_type in ("Gather", "GatherBlockQuantized") and place != 1
    if lookup or (node.op_type in ROTARY and "cache" in (value.name or "")):
        return 1 / max(int(rows), 1)
    if node.op_type == "Reshape":  # the quantised head as the embedding sees it: its lookup reads one row
        return 0.0
    if node.op_type in EXPERTS and len(value.shape) > 1 and "k" in node.attributes:
        return min(1.0, float(node.attributes["k"].as_int()) / max(int(rows), 1))
    return 1.0
