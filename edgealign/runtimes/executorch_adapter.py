"""A user's LoRA as the matrices that an ExecuTorch program takes: a safetensors file, written and read without torch.

The program's method `adapted` takes A (1, I, r) and B (1, r, O) of every adaptable matrix, in the order of
`adapter_inputs.json` and all of one rank; the scale is in B already (`lora_weights`). The file holds the matrices that
the user has, padded with zeros to one rank of at least two (an exported graph takes a dimension of one for a constant);
a session fills in zeros for the others. The digest of the base model is written beside, so that an adapter of another
model is refused.

Shape legend: r rank, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgealign.errors import InputError, writing
from edgealign.models.load import check_safetensors
from edgealign.runtimes.lora_inputs import LoraInput, pack
from edgealign.runtimes.lora_weights import read_lora

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

BASE_DIGEST = "edgealign.base_digest"
SMALLEST_RANK, LARGEST_RANK = 2, 256  # of a program; the largest is the exporter's bound on a dynamic dimension


@dataclass(frozen=True)
class ExecutorchAdapter:
    """An adapter file's contents: input -> matrix, all of `rank`; `base_digest` is the model it was fitted on."""

    base_digest: str | None
    rank: int
    values: Mapping[str, Floats]


def write_lora_executorch(adapter: Path, out_file: Path, *, inputs: Sequence[LoraInput]) -> None:
    """Convert an adapter directory for the program that has these inputs (`lora_inputs.read_inputs`).

    Raises:
        ArtifactError, InputError: the adapter cannot be exported, with the reason.
        OutputError: the file cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save_file

    lora = read_lora(adapter)
    packed = pack(adapter, lora, inputs)
    rank = max([SMALLEST_RANK, *(entry_rank(name, value) for name, value in packed.items())])
    if rank > LARGEST_RANK:
        reason = f"has rank {rank}, an ExecuTorch program takes at most {LARGEST_RANK}"
        raise InputError(adapter, reason, "merge it into the model instead: edgealign merge")
    values = {}
    for name, value in packed.items():
        missing = rank - entry_rank(name, value)
        width = ((0, 0), (0, missing)) if name.endswith(".lora_a") else ((0, missing), (0, 0))
        values[name] = np.ascontiguousarray(np.pad(value, width)[None])
    with writing(out_file):
        out_file.parent.mkdir(parents=True, exist_ok=True)
        save_file(values, out_file, metadata={BASE_DIGEST: lora.base_digest or ""})


def read_lora_executorch(file: Path) -> ExecutorchAdapter:
    """Read an adapter file back.

    Raises:
        InputError: it is not there, is damaged, or is no adapter.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError(file, "no such adapter file", "export the user's adapter to ExecuTorch first")
    check_safetensors(file)
    try:
        with safe_open(file, framework="np") as opened:
            base = (opened.metadata() or {}).get(BASE_DIGEST)
            values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(file, f"is damaged ({error})", "export the user's adapter again") from error
    ranks = {entry_rank(name, value[0]) if value.ndim == 3 else 0 for name, value in values.items()}
    named = all(name.endswith((".lora_a", ".lora_b")) for name in values)
    if base is None or not named or len(ranks) != 1 or not SMALLEST_RANK <= min(ranks) <= LARGEST_RANK:
        raise InputError(file, "is no adapter for an ExecuTorch program", "export the user's adapter again")
    return ExecutorchAdapter(base or None, ranks.pop(), values)


def entry_rank(name: str, value: Floats) -> int:
    """The rank of one matrix: A is (I, r), B is (r, O)."""
    return int(value.shape[1] if name.endswith(".lora_a") else value.shape[0])
