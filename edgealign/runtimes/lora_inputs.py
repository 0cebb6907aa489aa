"""Which matrices of an exported graph a user's LoRA goes into, and the LoRA packed for them. No torch, no runtime.

ONNX graphs and ExecuTorch programs take the matrices A and B of every adaptable layer as inputs: `y = x W + (x A) B`.
Which inputs there are, and which modules each of them packs, stands beside the graph in `adapter_inputs.json`. Where
the graph packs several modules into one matrix, their A stand side by side and their B along a diagonal. The scale is
in B already (`lora_weights`).

Shape legend: r rank, I in features, O out features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgealign.errors import ArtifactError, InputError, writing
from edgealign.runtimes.lora_weights import MERGE, LoraWeights

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

INPUTS_FILE = "adapter_inputs.json"


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


def _why_not(module: str) -> str:
    if "embed" in module:
        return "the embedding, which the graph looks up in a quantised table"
    if "lm_head" in module:
        return "the head, whose weights are the embedding's when it is tied"
    if "norm" in module:
        return "a norm, which is no linear layer"
    return "for which the graph has no input"
