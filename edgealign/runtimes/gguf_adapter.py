"""A user's LoRA as a GGUF file: the writer and the reader of llama.cpp's adapter format. No torch.

llama.cpp multiplies an adapter by `alpha / rank` unless alpha is 0; the scale is in B already, so alpha is 0. It checks
only architecture and shapes, so the digest of the base model is written beside (`edgealign.base_digest`), and a
session can refuse an adapter of another model. Format: llama.cpp src/llama-adapter.cpp, convert_lora_to_gguf.py.

Shape legend: r rank, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.errors import InputError, ToolMissing, writing
from edgealign.runtimes.gguf_header import GgufInfo, check_gguf
from edgealign.runtimes.gguf_names import Row, adapter_row, architecture, permute
from edgealign.runtimes.lora_weights import MERGE, LowRank, read_lora

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BASE_DIGEST = "edgealign.base_digest"
ALPHA = "adapter.lora.alpha"
F16_LIMIT = 65_504.0


@dataclass(frozen=True)
class GgufAdapter:
    """An adapter file's contents: GGUF tensor name (without `.lora_a`) -> pair, and the model it belongs to."""

    arch: str
    base_digest: str | None
    modules: Mapping[str, LowRank]


def write_lora_gguf(
    adapter: Path, out_file: Path, *, base_config: Mapping[str, Any], dtype: str = "f32"
) -> GgufInfo:
    """Convert an adapter directory; returns what the written file says of itself.

    Args:
        base_config: the base model's `config.json`, parsed; its model type names the tensor table.
        dtype: f32 or f16.

    Raises:
        ArtifactError, InputError: the adapter cannot be exported, with the reason.
        OutputError: the file cannot be written.
        ToolMissing: the gguf package is not installed.
    """
    assert dtype in ("f32", "f16"), dtype
    table = architecture(str(base_config.get("model_type", "")))
    lora = read_lora(adapter)
    writer = _writer(out_file, table.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(ALPHA, 0.0)
    if lora.base_digest:
        writer.add_string(BASE_DIGEST, lora.base_digest)
    for module, pair in sorted(lora.modules.items()):
        row = adapter_row(table, module)
        if row is None:
            raise InputError(adapter, f"adapts {module}, {_why_not(module)}", MERGE)
        pair = _in_runtime_order(row, pair, base_config)
        writer.add_tensor(f"{row.gguf}.lora_a", _stored(adapter, module, pair.a, dtype))
        writer.add_tensor(f"{row.gguf}.lora_b", _stored(adapter, module, pair.b, dtype))
    with writing(out_file):
        out_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return check_gguf(out_file)


def read_lora_gguf(file: Path) -> GgufAdapter:
    """Read an adapter file back, in the runtime's tensor order, as float32.

    Raises:
        InputError: it is damaged, or is no LoRA in this format.
    """
    import numpy as np

    info = check_gguf(file)
    if not info.is_adapter or info.metadata.get("adapter.type") != "lora":
        raise InputError(file, "is no LoRA adapter", "make one with: edgealign export --adapter USER=DIR")
    alpha = float(info.metadata.get(ALPHA, 0.0))
    data = np.memmap(file, np.uint8, mode="r")
    sides: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    for tensor in info.tensors:
        name, _, side = tensor.name.rpartition(".lora_")
        if side not in ("a", "b") or tensor.type not in ("F32", "F16"):
            raise InputError(file, f"holds {tensor.name} ({tensor.type}), which is no LoRA tensor", "export it again")
        raw = np.array(data[tensor.offset : tensor.offset + tensor.bytes])
        value = raw.view(np.float32 if tensor.type == "F32" else np.float16).astype(np.float32)
        sides.setdefault(name, {})[side] = value.reshape(tensor.shape[::-1])
    modules = {}
    for name, pair in sides.items():
        if set(pair) != {"a", "b"} or pair["b"].shape[1] != pair["a"].shape[0]:
            raise InputError(file, f"{name} has no matching pair of matrices", "export it again")
        scale = np.float32(alpha / pair["a"].shape[0] if alpha else 1.0)
        modules[name] = LowRank(pair["a"], pair["b"] * scale)
    digest = info.metadata.get(BASE_DIGEST)
    return GgufAdapter(info.arch, str(digest) if digest else None, modules)


def _in_runtime_order(row: Row, pair: LowRank, config: Mapping[str, Any]) -> LowRank:
    """Where the base matrix has its rows reordered, B has too: (P W + P B A) = P (W + B A)."""
    if row.rule not in ("permute_q", "permute_k"):
        return pair
    heads = int(config["num_attention_heads"])
    if row.rule == "permute_k":
        heads = int(config.get("num_key_value_heads") or heads)
    return LowRank(pair.a, permute(pair.b, heads))


def _stored(adapter: Path, module: str, value: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    import numpy as np

    if dtype == "f32":
        return value
    if float(np.abs(value).max(initial=0.0)) > F16_LIMIT:
        raise InputError(adapter, f"{module} has weights beyond the range of 16-bit floats", "use adapter_type f32")
    return value.astype(np.float16)


def _why_not(module: str) -> str:
    if "embed" in module:
        return "the embedding: llama.cpp aborts on it when the head is tied"
    if "lm_head" in module:
        return "the head, which llama.cpp cannot adapt when it is tied"
    if "norm" in module:
        return "a norm, which llama.cpp ignores silently"
    return "which is no linear layer of this architecture"


def _writer(file: Path, arch: str) -> Any:
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ToolMissing("gguf", "is needed to write GGUF files", "pip install 'edgealign[gguf]'") from error
    return GGUFWriter(str(file), arch)
