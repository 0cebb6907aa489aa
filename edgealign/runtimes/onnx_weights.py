"""Read the weights inside an ONNX graph back as 32-bit floats, in the model's own layout. Needs onnx_ir, no torch.

Shape legend: I in features, O out features, N blocks of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


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


def _unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The numbers in each row of bytes; of two in a byte the low half comes first."""
    if bits == 8:
        return packed
    assert bits == 4, bits
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
