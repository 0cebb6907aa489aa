"""A user's LoRA as an `.onnx_adapter` file: from PEFT's layout to onnxruntime's own format, and back. No torch.

The graph of a bundle takes every LoRA matrix as an input whose default has rank zero, so one graph serves everybody:
`y = x W + (x A) B`. Which inputs there are, and which modules each of them packs, stands beside the graph in
`adapter_inputs.json`. Where the graph packs several modules into one matrix, their A stand side by side and their B
along a diagonal. The scale is in B already (`lora_weights`).

The format has two numbers of its own; `model_version` holds the first 28 bits of the base model's digest, so that an
adapter of another model is refused. Source: onnxruntime 1.31, AdapterFormat; the design is that of Olive's adapters.

Shape legend: r rank, I in features, O out features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.errors import ArtifactError, InputError, ToolMissing, writing
from edgealign.runtimes.lora_weights import MERGE, LoraWeights, read_lora

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

INPUTS_FILE = "adapter_inputs.json"
VERSION = 1
DIGEST_DIGITS = 7  # of a digest, in hexadecimal: what fits into the format's signed 32-bit number


@dataclass(frozen=True)
class Part:
    """A module of the model, by its full name, and its out features."""

    module: str
    out: int


@dataclass(frozen=True)
class LoraInput:
    """One adaptable matrix of a graph: inputs `name`.lora_a (I, r) and `name`.lora_b (r, O); O is the parts' sum."""

    name: str
    columns: int
    parts: tuple[Part, ...]

    @property
    def a(self) -> str:
        return f"{self.name}.lora_a"

    @property
    def b(self) -> str:
        return f"{self.name}.lora_b"

    @property
    def out(self) -> int:
        return sum(part.out for part in self.parts)


@dataclass(frozen=True)
class OnnxAdapter:
    """An adapter file's contents: graph input -> onnxruntime's value; `base`: how the base's digest starts, or ''."""

    base: str
    values: Mapping[str, Any]


def write_inputs(file: Path, inputs: Sequence[LoraInput]) -> None:
    """Write a graph's adaptable matrices beside it."""
    text = json.dumps([asdict(entry) for entry in inputs], indent=1)
    with writing(file):
        file.write_text(text + "\n", encoding="utf-8")


def read_inputs(bundle: Path) -> tuple[LoraInput, ...]:
    """The adaptable matrices of a bundle's graph.

    Raises:
        ArtifactError: the bundle does not say, or its file is damaged.
    """
    file = bundle / INPUTS_FILE
    try:
        return tuple(
            LoraInput(str(entry["name"]), int(entry["columns"]), tuple(Part(**part) for part in entry["parts"]))
            for entry in json.loads(file.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(file, "is missing or damaged", "export the bundle again: edgealign export") from error


def write_lora_onnx(adapter: Path, out_file: Path, *, inputs: Sequence[LoraInput]) -> None:
    """Convert an adapter directory for the graph that has these inputs (`read_inputs`).

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


def pack(adapter: Path, lora: LoraWeights, inputs: Sequence[LoraInput]) -> dict[str, Floats]:
    """The graph's inputs for an adapter: A (I, r) and B (r, O) of every matrix that it adapts.

    Raises:
        InputError: it adapts what the graph has no input for, or has another shape.
    """
    import numpy as np

    left = set(lora.modules)
    values: dict[str, Floats] = {}
    for entry in inputs:
        present = [part for part in entry.parts if part.module in lora.modules]
        left -= {part.module for part in present}
        if not present:
            continue
        pairs = [lora.modules[part.module] for part in present]
        for part, pair in zip(present, pairs, strict=True):
            if (pair.a.shape[1], pair.b.shape[0]) != (entry.columns, part.out):
                raise InputError(
                    adapter, f"{part.module} is {pair.b.shape[0]} x {pair.a.shape[1]}, the model's matrix is "
                    f"{part.out} x {entry.columns}", "fit it on this model: edgealign personalize",
                )
        b = np.zeros((sum(pair.rank for pair in pairs), entry.out), dtype=np.float32)
        row = 0
        for part, pair in zip(present, pairs, strict=True):
            column = sum(other.out for other in entry.parts[: entry.parts.index(part)])
            b[row : row + pair.rank, column : column + part.out] = pair.b.T
            row += pair.rank
        values[entry.a] = np.ascontiguousarray(np.concatenate([pair.a for pair in pairs]).T)
        values[entry.b] = b
    if left:
        module = min(left)
        raise InputError(adapter, f"adapts {module}, {_why_not(module)}", MERGE)
    return values


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


def _why_not(module: str) -> str:
    if "embed" in module:
        return "the embedding, which the graph looks up in a quantised table"
    if "lm_head" in module:
        return "the head, whose weights are the embedding's when it is tied"
    if "norm" in module:
        return "a norm, which is no linear layer"
    return "for which the graph has no input"
