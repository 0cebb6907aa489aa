"""A user as a control vector: one (D,) per layer that is added to what the layer passes on. The format is llama.cpp's.

    write_control_vector(directions, file, base_digest=..., model_type="lfm2")      # {layer: (D,)}, layers from 1
    session.set_user(file)          # or the adapter directory that holds it; torch and llama.cpp, None takes it off

llama.cpp adds `direction.N` to the residual stream behind layer N, counted from 0; behind layer 0 it adds nothing, so
there is no `direction.0`. llama.cpp's own programs read the file as well (`--control-vector`). The digest of the base
model is written beside, so that a session can refuse the vector of another. Format: common/common.cpp
(`common_control_vector_load`), src/llama-adapter.cpp.

Shape legend: D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.errors import InputError, ToolMissing, writing
from edgealign.runtimes.gguf_adapter import BASE_DIGEST
from edgealign.runtimes.gguf_header import GgufInfo, check_gguf

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

ARCH = "controlvector"
FILE = "direction.gguf"  # in an adapter directory
FIX = "fit it again: edgealign personalize --method direction"


@dataclass(frozen=True)
class ControlVector:
    """`directions`: layer -> (D,) float32."""

    directions: Mapping[int, Floats]
    base_digest: str

    @property
    def width(self) -> int:
        return len(next(iter(self.directions.values())))

    def rows(self, layers: int) -> Floats:
        """(L - 1, D) for layers 1 to L - 1, zeros where there is no direction: what llama.cpp takes."""
        found = np.zeros((layers - 1, self.width), dtype=np.float32)
        for layer, direction in self.directions.items():
            found[layer - 1] = direction
        return found


def write_control_vector(
    directions: Mapping[int, npt.ArrayLike], file: Path, *, base_digest: str, model_type: str
) -> GgufInfo:
    """Write a file; returns what it says of itself.

    Raises:
        OutputError: the file cannot be written.
        ToolMissing: the gguf package is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ModuleNotFoundError as error:
        raise ToolMissing("gguf", "is not installed", "install it with: pip install gguf") from error
    assert directions, "no layer"
    assert min(directions) >= 1, "llama.cpp adds nothing behind layer 0"
    with writing(file):
        writer = GGUFWriter(str(file), ARCH)
        writer.add_string(f"{ARCH}.model_hint", model_type)
        writer.add_uint32(f"{ARCH}.layer_count", len(directions))
        writer.add_string(BASE_DIGEST, base_digest)
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(direction, dtype=np.float32))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return check_gguf(file)


def find_control_vector(adapter: Path) -> Path | None:
    """The file, where this is a control vector or an adapter directory with one; None where it is another adapter."""
    if (adapter / FILE).is_file():
        return adapter / FILE
    return adapter if adapter.is_file() and adapter.suffix == ".gguf" and check_gguf(adapter).arch == ARCH else None


def read_control_vector(file: Path, *, layers: int, width: int) -> ControlVector:
    """The directions of a file, for a model of this many layers and this hidden size.

    Raises:
        InputError: it is damaged, no control vector, or of a model of another shape.
    """
    header = check_gguf(file)
    if header.arch != ARCH:
        raise InputError(file, f"is a GGUF file of {header.arch}, not a control vector", FIX)
    data = np.memmap(file, np.uint8, mode="r")
    found: dict[int, Floats] = {}
    for tensor in header.tensors:
        name, _, number = tensor.name.partition(".")
        if name != "direction" or not number.isdecimal() or tensor.type != "F32" or len(tensor.shape) != 1:
            raise InputError(file, f"holds {tensor.name[:60]!r} ({tensor.type}), which is no direction", FIX)
        layer = int(number)
        if not 1 <= layer < layers or tensor.shape[0] != width:
            reason = f"has a direction of {tensor.shape[0]} numbers behind layer {layer}; this model has layers 1 to "
            raise InputError(file, f"{reason}{layers - 1} of {width}", "fit it on this model")
        values = np.array(data[tensor.offset : tensor.offset + tensor.bytes]).view(np.float32)
        if not np.isfinite(values).all():
            raise InputError(file, f"{tensor.name} has values that are no numbers", FIX)
        found[layer] = values
    if not found:
        raise InputError(file, "holds no direction", FIX)
    return ControlVector(found, str(header.metadata.get(BASE_DIGEST) or ""))


def steer(model: Any, directions: Mapping[int, npt.ArrayLike]) -> list[Any]:
    """Hooks that add the directions in a transformers model; each is taken out with its `remove()`."""
    import torch

    layers = next(module for name, module in model.named_modules() if name.endswith("model.layers") or name == "layers")

    def adding(direction: npt.ArrayLike) -> Any:
        def hook(layer: Any, _: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            moved = first + torch.as_tensor(direction, dtype=first.dtype, device=first.device)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    return [layers[layer].register_forward_hook(adding(direction)) for layer, direction in directions.items()]
