"""A user's LoRA as an `.onnx_adapter` file: from PEFT's layout to onnxruntime's own format, and back. No torch.

The graph of a bundle takes every LoRA matrix as an input whose default has rank zero, so one graph serves everybody
(`lora_inputs`).

The format has two numbers of its own; `model_version` holds the first 28 bits of the base model's digest, so that an
adapter of another model is refused. Source: onnxruntime 1.31, AdapterFormat; the design is that of Olive's adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgealign.errors import InputError, ToolMissing, writing
from edgealign.runtimes.lora_inputs import LoraInput, pack
from edgealign.runtimes.lora_weights import read_lora

VERSION = 1
DIGEST_DIGITS = 7  # of a digest, in hexadecimal: what fits into the format's signed 32-bit number


@dataclass(frozen=True)
class OnnxAdapter:
    """An adapter file's contents: graph input -> onnxruntime's value; `base`: how the base's digest starts, or ''."""

    base: str
    values: Mapping[str, Any]


def write_lora_onnx(adapter: Path, out_file: Path, *, inputs: Sequence[LoraInput]) -> None:
    """Convert an adapter directory for the graph that has these inputs (`lora_inputs.read_inputs`).

    Raises:
        ArtifactError, InputError: the adapter cannot be exported, with the reason.
        OutputError: the file cannot be written.
        ToolMissing: onnxruntime is not installed.
    """
    runtime = load_onnxruntime()
    lora = read_lora(adapter)
    values = {}
    for name, value in pack(adapter, lora, inputs).items():
        values[name] = runtime.OrtValue.ortvalue_from_numpy(value)
    written = runtime.AdapterFormat()
    written.set_adapter_version(VERSION)
    written.set_model_version(int((lora.base_digest or "0")[:DIGEST_DIGITS], 16))
    written.set_parameters(values)
    with writing(out_file):
        out_file.parent.mkdir(parents=True, exist_ok=True)
        out_file.touch()  # onnxruntime's own message for a place that cannot be written says too little
        written.export_adapter(str(out_file))


def read_lora_onnx(file: Path) -> OnnxAdapter:
    """Read an adapter file back.

    Raises:
        InputError: it is not there, is damaged, or is no adapter.
    """
    runtime = load_onnxruntime()
    if not file.is_file():
        raise InputError(file, "no such adapter file", "export the user's adapter to ONNX first")
    try:
        read = runtime.AdapterFormat.read_adapter(str(file))
    except Exception as error:  # onnxruntime raises its own classes, which have no public base
        raise InputError(file, "is damaged, or is no .onnx_adapter file", "export the user's adapter again") from error
    version = int(read.get_model_version())
    return OnnxAdapter(f"{version:0{DIGEST_DIGITS}x}" if version else "", dict(read.get_parameters()))


def load_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        ToolMissing: it is not installed, or too old for adapters.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ToolMissing("onnxruntime", "is not installed", "pip install 'edgealign[onnx]'") from error
    if not hasattr(onnxruntime, "AdapterFormat"):
        reason = "knows no adapters"
        raise ToolMissing(f"onnxruntime {onnxruntime.__version__}", reason, "pip install 'edgealign[onnx]'")
    return onnxruntime
