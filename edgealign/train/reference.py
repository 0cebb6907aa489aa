"""Reference log-probabilities: computed once per data set and model, kept beside the user's other caches.

The key covers everything that a value depends on: the model's digest, every token and mask of the data, the chat
template, the precision, and how the forward passes were cut (sums in another order differ in the last bit, and a
resumed run must see the very same numbers). Files are safetensors and appear atomically.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgealign.progress import say
from edgealign.train import processes
from edgealign.train.layout import Tree
from edgealign.train.scoring import Passes, score
from edgealign.train.tasks import PerToken

FORMAT = "reference-2"


def reference_scores(
    model: nn.Module, trees: Sequence[Tree], passes: Passes, *, model_digest: str, template_hash: str | None = None
) -> PerToken:
    """Log-probabilities of the learned tokens under `model` as it is now; from the cache where they are known.

    `model_digest` must identify the weights: the digest of the artifact that was loaded, untouched since.
    """
    file = cache_dir() / f"{cache_key(trees, passes, model_digest, template_hash)}.safetensors"
    found = cached(
        file, {"logprobs": sum(tree.n_learned for tree in trees)},
        lambda: {"logprobs": score(model, trees, passes, label="reference log-probabilities", shared=True)},
    )
    return PerToken.of(found["logprobs"], trees)


def cached(file: Path, sizes: Mapping[str, int], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of these names and sizes from `file`; where it is absent or damaged, computed and stored there.

    Of several processes all compute where one lacks them: `compute` may share the work out.
    """
    found = _read(file, sizes)
    if not all(processes.gather(found is not None)):
        found = compute()
        _store(file, found)
    assert found is not None
    return found


def _read(file: Path, sizes: Mapping[str, int]) -> dict[str, Tensor] | None:
    if not file.is_file():
        return None
    try:
        found: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError):
        found = {}
    if {name: values.numel() for name, values in found.items()} == dict(sizes):
        return found
    say(f"{file.name} in the {file.parent.name} cache is damaged: computing it again")
    return None


def cache_dir(name: str = "reference") -> Path:
    """`reference/` (or another name) below EDGEALIGN_CACHE, or below ~/.cache/edgealign."""
    root = os.environ.get("EDGEALIGN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "edgealign") / name


def cache_key(trees: Sequence[Tree], passes: Passes, model_digest: str, template_hash: str | None) -> str:
    """SHA-256 of everything that the values depend on."""
    digest = hashlib.sha256()
    settings = (
        FORMAT, torch.__version__, model_digest, template_hash, passes.precision, passes.tokens_per_pass,
        passes.lanes, torch.get_num_threads(),
    )
    digest.update(repr(settings).encode())
    for tree in trees:
        for segment in tree.segments:
            digest.update(np.asarray([len(segment.ids), segment.parent], dtype=np.int64).tobytes())
            digest.update(np.asarray(segment.ids, dtype=np.int64).tobytes())
            digest.update(np.asarray(segment.learned, dtype=bool).tobytes())
    return digest.hexdigest()


def _store(file: Path, found: Mapping[str, Tensor]) -> None:
    """Write beside and rename. A cache that cannot be written costs time next time, not this run."""
    part = file.with_name(f".{file.name}.part-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: values.contiguous() for name, values in found.items()}, part)
        os.replace(part, file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        say(f"the {file.parent.name} cache {file.parent} cannot be written ({error}): going on without it")
