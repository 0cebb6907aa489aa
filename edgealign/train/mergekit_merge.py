"""One merge of models of one base: mergekit's methods through its Python API, or two of them by hand.

| method          | paper                             | needs a base |
|-----------------|-----------------------------------|--------------|
| linear          | model soups, arXiv 2203.05482     | no           |
| slerp           | spherical interpolation, 2 models | no           |
| task_arithmetic | arXiv 2212.04089                  | yes          |
| ties            | arXiv 2306.01708                  | yes          |
| dare_ties       | arXiv 2311.03099                  | yes          |
| della           | arXiv 2406.11617                  | yes          |

mergekit 0.1.5 knows `lfm2` but not `lfm2_moe`: it fuses the experts' names while writing, and the result would
not have the inputs' tensors. Of `lfm3` it leaves the head gates out. For such architectures `linear` and
`task_arithmetic` are computed here, tensor by tensor; the others are refused. Arithmetic is always in float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgealign.errors import InputError, RecipeError, ToolMissing

NEEDS_BASE = ("task_arithmetic", "ties", "dare_ties", "della")
SPARSE = ("ties", "dare_ties", "della")
NATIVE = ("linear", "task_arithmetic")
NOT_IN_MERGEKIT = ("lfm2_moe", "lfm3")
SHARD_BYTES = 4_000_000_000
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Merge:
    """One method with its numbers; `weights` has one entry per model."""

    method: str
    weights: tuple[float, ...]
    density: float = 1.0
    epsilon: float = 0.15
    t: float = 0.5
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Method and the numbers that it reads, as the table of candidates shows it."""
        parts = [self.method]
        if self.method == "slerp":
            parts.append(f"t={self.t:g}")
        else:
            parts.append("w=" + "/".join(f"{weight:.2g}" for weight in self.weights))
        if self.method in SPARSE:
            parts.append(f"density={self.density:g}")
        if self.method in NEEDS_BASE:
            parts.append(f"scale={self.scale:g}")
        return " ".join(parts)


def check_merge(merge: Merge, *, models: int, base: bool) -> None:
    """Refuse what mergekit would refuse later, or worse, accept.

    Raises:
        RecipeError: a number that the method cannot take.
        InputError: too few models, or no base where one is needed.
    """
    if merge.method == "slerp" and models != 2:
        raise InputError(f"{models} models", "slerp lies between exactly two", "give two, or use --method linear")
    if merge.method in NEEDS_BASE and not base:
        raise InputError(
            merge.method, "combines differences to a base, and no base is given", "give it with: --base DIR"
        )
    if len(merge.weights) != models:
        raise RecipeError(
            f"weights {list(merge.weights)}", f"there are {models} models", "give one weight per model, or none"
        )
    if merge.method in ("linear", "ties", "della") and abs(sum(merge.weights)) < 1e-6:
        raise RecipeError(f"weights {list(merge.weights)}", "sum to zero, and the method divides by the sum")
    low, high = merge.density - merge.epsilon, merge.density + merge.epsilon
    if merge.method == "della" and merge.density < 1 and not (low > 0 and high < 1):
        raise RecipeError(
            f"density {merge.density:g}, epsilon {merge.epsilon:g}",
            f"della drops with probabilities from {low:g} to {high:g}, which must lie inside (0, 1)",
            f"use an epsilon below {min(merge.density, 1 - merge.density):g}",
        )


def merge_weights(
    merge: Merge, models: Sequence[Path], base: Path | None, out: Path, *, model_type: str, dtype: str, seed: int
) -> None:
    """Write the merged tensors into `out` as safetensors, stored as `dtype` ("float32", "bfloat16", ...).

    Raises:
        InputError: the architecture has no such method.
        ToolMissing: mergekit is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    if model_type in NOT_IN_MERGEKIT:
        if merge.method not in NATIVE:
            raise InputError(
                f"{merge.method} of {model_type}", "mergekit does not know this architecture",
                f"use one of: {', '.join(NATIVE)}",
            )
        _merge_by_hand(merge, models, base, out, getattr(torch, dtype))
        return
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        _run_mergekit(merge, models, base, out, dtype)
    (out / "config.json").unlink()  # mergekit's own; the caller copies the complete one of the donor


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _run_mergekit(merge: Merge, models: Sequence[Path], base: Path | None, out: Path, dtype: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it reads numpy.core
            from mergekit.common import ModelPath, ModelReference
            from mergekit.config import InputModelDefinition, MergeConfiguration
            from mergekit.merge import run_merge
            from mergekit.options import MergeOptions
    except ImportError as error:
        raise ToolMissing("mergekit", "merging models needs it", "pip install mergekit==0.1.5") from error

    def reference(path: Path) -> Any:
        # The object form: in its string form mergekit reads "@" and "+" in a path as revision and LoRA.
        return ModelReference(model=ModelPath(path=str(path.resolve())))

    slerp = merge.method == "slerp"
    origin = models[0] if slerp else (base if merge.method in NEEDS_BASE else None)
    config = MergeConfiguration(
        merge_method=merge.method,
        base_model=reference(origin) if origin is not None else None,
        models=[
            InputModelDefinition(model=reference(path), parameters=None if slerp else {"weight": weight})
            for path, weight in zip(models, merge.weights, strict=True)
        ],
        parameters=_parameters(merge),
        dtype="float32",
        out_dtype=dtype,
    )
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, device="cpu", trust_remote_code=False,
        out_shard_size=SHARD_BYTES // (4 if dtype == "float32" else 2),
    )
    run_merge(config, str(out), options)


def _parameters(merge: Merge) -> dict[str, Any]:
    if merge.method == "slerp":
        return {"t": merge.t}
    if merge.method == "linear":
        return {"normalize": True}
    parameters: dict[str, Any] = {"lambda": merge.scale}
    if merge.method in SPARSE:
        parameters["density"] = merge.density
    if merge.method == "della":
        parameters["epsilon"] = merge.epsilon
        # DELLA ranks magnitudes along axis 1, which has length one in a depthwise kernel (D, 1, K): 0/0. These
        # kernels are 0.01 % of the weights; density 1 keeps them whole.
        parameters["density"] = [
            {"filter": "conv.conv.weight", "value": 1.0}, {"filter": "*", "value": merge.density}
        ]
    return parameters


def _merge_by_hand(merge: Merge, models: Sequence[Path], base: Path | None, out: Path, dtype: torch.dtype) -> None:
    """linear: sum_i w_i x_i / sum_i w_i. task_arithmetic: b + scale * sum_i w_i (x_i - b)."""
    total = sum(merge.weights)
    files = [tensor_files(path) for path in models]
    base_files = tensor_files(base) if base is not None else {}

    def combine(name: str) -> Tensor:
        tensors = [_read(found[name], name) for found in files]
        if merge.method == "linear":
            mixed = sum(tensor * (weight / total) for tensor, weight in zip(tensors, merge.weights, strict=True))
        else:
            origin = _read(base_files[name], name)
            moved = sum((tensor - origin) * weight for tensor, weight in zip(tensors, merge.weights, strict=True))
            mixed = origin + merge.scale * moved
        assert isinstance(mixed, Tensor)
        return mixed.to(dtype)

    names = sorted(files[0])
    for file in sorted({path.name for path in files[0].values()}):
        held = {name: combine(name) for name in names if files[0][name].name == file}
        save_file(held, out / file, metadata={"format": "pt"})
    index = models[0] / f"{WEIGHTS}.index.json"
    if index.is_file():
        (out / index.name).write_bytes(index.read_bytes())


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor.float()


@contextmanager
def _quiet() -> Iterator[None]:
    """mergekit and transformers talk through logging; their warnings repeat what is checked here."""
    from transformers.utils import logging as transformers_logging

    before: Mapping[str, int] = {"level": logging.root.manager.disable, "library": transformers_logging.get_verbosity()}
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.disable(before["level"])
        transformers_logging.set_verbosity(before["library"])
