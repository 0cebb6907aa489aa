"""The weights inside a quantised file, one by one, and the oracle with exactly those weights.

Quantisation noise hides a broken layer: in a 4-bit file of a small model, two swapped matrices change the logits less
than 4 bits do. So the noise is taken out twice. Each stored tensor is dequantised and held against the model's own
(rounding to 4 bits leaves an error of a tenth, another tensor is off by more than all of it). Then the dequantised
weights are put into torch, and the runtime must agree with that: what is left is the rounding of activations, and a
wrong rotary base or a wrong order of convolution parts stands out.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import Check
from edgealign.models.load import read_config, resolve_model
from edgealign.runtimes.gguf_names import architecture, expand, permute

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


KEPT_TOLERANCE = 1e-6


def check_weights(file: Path, model: str | Path, tolerance: float, put: Mapping[str, Any]) -> tuple[list[Check], int]:
    """Compare every tensor of a bundle's model file with the model's; copy it into `put`, a torch model's parameters.

    Args:
        tolerance: for the error of a rounded tensor, relative to its size; those kept in 32 bits must be equal.
        put: parameters by the names that the model's files use.

    Returns:
        The checks, and how many parameters of `put` the file has no counterpart for.
    """
    import torch

    worst = {True: (0.0, "none"), False: (0.0, "none")}
    counts, left = {True: 0, False: 0}, set(put)
    for name, kept, stored, own in _pairs(file, resolve_model(model), put):
        gap = float(np.linalg.norm(stored - own)) / max(float(np.linalg.norm(own)), 1e-30)
        if not gap <= worst[kept][0]:  # also when it is not a number
            worst[kept] = (gap, name)
        counts[kept] += 1
        if name in put:
            with torch.no_grad():
                put[name].copy_(torch.from_numpy(stored))
            left.discard(name)
    checks = []
    for kept, check, allowed in ((True, "weights.kept", KEPT_TOLERANCE), (False, "weights.rounded", tolerance)):
        value, where = worst[kept]
        finite = bool(np.isfinite(value))
        how = "kept in 32 bits" if kept else "rounded"
        note = f"largest error of {counts[kept]} tensors {how}, relative to their size: {where}"
        checks.append(Check(check, value if finite else None, allowed, finite and value <= allowed, note))
    return checks, len(left)


def _pairs(file: Path, folder: Path, put: Mapping[str, Any]) -> Iterator[tuple[str, bool, Floats, Floats]]:
    """Each stored tensor by the model's name for it: is it kept in 32 bits, its values, the model's values.

    A model's files may have other names than its modules (transformers renames LFM3's head gates): then the values
    are those of `put`, which still holds the model.
    """
    from safetensors import safe_open

    config = read_config(folder)
    where: dict[str, Any] = {}
    for part in sorted(folder.glob("*.safetensors")):
        opened = safe_open(str(part), framework="pt")
        names: list[str] = opened.keys()  # type: ignore[no-untyped-call]
        where.update(dict.fromkeys(names, opened))
    if file.suffix == ".pte":
        found = _read_executorch(file, config, where, put)
    else:
        read = _read_onnx if file.suffix == ".onnx" else _read_gguf
        found = read(file, config, {*where, *put})
    for name, kept, values in found:
        own = where[name].get_tensor(name).float().numpy() if name in where else put[name].detach().numpy().copy()
        # Tensors in 32 bits come as read-only pages of the file.
        yield name, kept, np.require(values.reshape(own.shape), np.float32, ["C", "W"]), own


def _read_gguf(file: Path, config: dict[str, Any], known: Container[str]) -> Iterator[tuple[str, bool, Floats]]:
    """The tensors of a GGUF file that the model knows, in its layout."""
    from gguf import GGMLQuantizationType, GGUFReader, dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(str(file)).tensors}
    table = architecture(str(config["model_type"]))
    rows = expand(table, int(config["num_hidden_layers"]), int(config.get("num_experts") or 0))
    places: dict[str, int] = {}
    for row in rows:
        if row.hf not in known or row.gguf not in stored:
            continue
        tensor = stored[row.gguf]
        data = tensor.data
        if row.rule == "expert":
            data = data[places.get(row.gguf, 0)]
            places[row.gguf] = places.get(row.gguf, 0) + 1
        values = np.asarray(dequantize(data, tensor.tensor_type), dtype=np.float32)
        yield row.hf, tensor.tensor_type == GGMLQuantizationType.F32, _undo(row.rule, values, config)


def _read_onnx(file: Path, config: dict[str, Any], known: Container[str]) -> Iterator[tuple[str, bool, Floats]]:
    """The weights of an ONNX graph that the model knows."""
    from edgealign.runtimes import onnx_names
    from edgealign.runtimes.onnx_weights import stored_weights

    for name, kept, values in stored_weights(file, onnx_names.ARCHITECTURES.get(str(config["model_type"]))):
        if name in known:
            yield name, kept, values


def _read_executorch(
    file: Path, config: dict[str, Any], where: Mapping[str, Any], put: Mapping[str, Any]
) -> Iterator[tuple[str, bool, Floats]]:
    """The weights of an ExecuTorch program that the model knows; one without a table is stored as its modules are."""
    from edgealign.runtimes.executorch_names import ARCHITECTURES
    from edgealign.runtimes.executorch_weights import stored_weights

    table = ARCHITECTURES.get(str(config["model_type"]))

    def load(name: str) -> Floats:
        value = put[name].detach() if table is None else where[name].get_tensor(name)
        return np.array(value.float().numpy(), dtype=np.float32)

    own = {name: functools.partial(load, name) for name in (put if table is None else where)}
    yield from stored_weights(file, table, own)


def _undo(rule: str, values: Floats, config: dict[str, Any]) -> Floats:
    """The table's rule backwards."""
    if rule == "plus_one":
        return values - np.float32(1.0)
    if rule in ("permute_q", "permute_k"):
        heads = int(config["num_attention_heads"])
        if rule == "permute_k":
            heads = int(config.get("num_key_value_heads") or heads)
        # The rows' old places, permuted like the rows, say where each one came from.
        origin = permute(np.arange(len(values)), heads)
        restored = np.empty_like(values)
        restored[origin] = values
        return restored
    return values
