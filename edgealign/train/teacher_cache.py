"""A teacher's top K per token, stored sparsely: a large teacher runs over a data set once, for any number of students.

`<cache>/teacher/<key>/00000.ids.npy`, `.logprobs.npy` and `.json`: one shard for every SHARD_ROWS rows.
Log-probabilities are float16 and normalised over the whole vocabulary; ids are uint16, or uint32 for a vocabulary above
65,536. K = 32 takes 128 bytes per token (a full row of float16 logits of a 65,536-token vocabulary takes 131,072). The
JSON file, written last, holds the SHA-256 of both arrays: what is damaged, or half written when the power went, is made
again. The key covers the teacher's weights, every token of the rows, K, and the arithmetic, and nothing of the student.

Of several processes (torchrun) on one machine each makes its share of the shards and waits for the others.

Shape legend: N learned tokens of some rows, K tokens kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgealign.artifact import sha256_file, write_atomic
from edgealign.errors import OutputError
from edgealign.progress import bar, say
from edgealign.train import processes
from edgealign.train.gather import likeliest
from edgealign.train.layout import Batch
from edgealign.train.logprobs import chunk_rows, hidden_states, output_projection
from edgealign.train.reference import cache_dir
from edgealign.train.rows import Rows
from edgealign.train.scoring import Passes
from edgealign.train.shortconv import kernel_width, tree_rows

FORMAT = "teacher-2"
SHARD_ROWS = 1024
SMALL_VOCABULARY = 2**16
WAIT_S = 0.2  # between looks at what other processes make


@dataclass(frozen=True)
class TaughtRows(Rows):
    """Rows whose batches bring the teacher's top K along."""

    shards: tuple[tuple[np.ndarray, np.ndarray], ...]  # per shard: ids and log-probabilities, (N, K) each
    starts: np.ndarray  # (rows + 1,) where a row's tokens begin among all learned tokens
    shard_starts: np.ndarray  # the same for the first row of each shard

    def batch(self, indices: Sequence[int], *, kernel: int) -> Batch:
        plain = super().batch(indices, kernel=kernel)
        ids, logps = zip(*(self._row(i) for i in indices), strict=True)
        return Batch(
            **{**vars(plain), "candidates": torch.from_numpy(np.concatenate(ids).astype(np.int64)),
               "teacher": torch.from_numpy(np.concatenate(logps).astype(np.float32))}
        )

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        number = index // SHARD_ROWS
        part = slice(*(int(self.starts[index + i] - self.shard_starts[number]) for i in (0, 1)))
        ids, logps = self.shards[number]
        return ids[part], logps[part]


def teach(
    rows: Rows, load_teacher: Any, *, teacher_digest: str, vocab_size: int, k: int, passes: Passes
) -> tuple[TaughtRows, dict[str, Any]]:
    """Rows with the teacher's top K, from the cache where they are known, and facts for the manifest.

    Args:
        load_teacher: called without arguments when something is missing; gives the model, ready to run.
        vocab_size: ids from here on are no tokens, whatever the teacher's head has there.
        passes: how the teacher runs; the kernel width is taken from the teacher itself.

    Raises:
        OutputError: the cache cannot be written.
    """
    folder = cache_dir("teacher") / _key(rows, teacher_digest, vocab_size, k, passes)
    counts = rows.learned_counts()
    starts = np.concatenate([[0], np.cumsum(counts)])
    n_shards = -(-len(rows) // SHARD_ROWS)
    wanted = [int(starts[min((i + 1) * SHARD_ROWS, len(rows))] - starts[i * SHARD_ROWS]) for i in range(n_shards)]
    missing = [i for i in range(n_shards) if not _is_whole(folder, i, (wanted[i], k))]
    mine = [i for i in missing if i % processes.local_count() == processes.local_rank()]
    if mine:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _fill(folder, mine, rows, load_teacher(), passes, k, vocab_size)
    _wait_for(folder, {i: (wanted[i], k) for i in missing if i not in mine})
    if not missing:
        say(f"the teacher's top {k} of {starts[-1]:,} tokens are in the cache")
    shards = tuple((_open(folder, i, "ids"), _open(folder, i, "logprobs")) for i in range(n_shards))
    taught = TaughtRows(rows.ids, rows.document, rows.width, shards, starts, starts[::SHARD_ROWS])
    size = sum(_file(folder, i, name).stat().st_size for i in range(n_shards) for name in ("ids", "logprobs"))
    mass = float(np.mean([np.exp(np.asarray(logps[:4096], dtype=np.float32)).sum(1).mean() for _, logps in shards]))
    return taught, {
        "teacher_tokens": int(starts[-1]), "teacher_bytes": size, "teacher_shards_made": len(missing),
        "teacher_mass": round(mass, 4),
    }


def _fill(
    folder: Path, missing: Sequence[int], rows: Rows, teacher: nn.Module, passes: Passes, k: int, vocab_size: int
) -> None:
    passes = replace(passes, kernel=kernel_width(teacher), lanes=1)  # the student's may be others
    ids_dtype = np.uint16 if vocab_size <= SMALL_VOCABULARY else np.uint32
    device = next(teacher.parameters()).device
    weight, bias = output_projection(teacher)
    total = sum(min(SHARD_ROWS, len(rows) - i * SHARD_ROWS) for i in missing)
    with bar(total=total, label="teacher") as advance, torch.no_grad(), tree_rows(teacher):
        for number in missing:
            found: list[tuple[np.ndarray, np.ndarray]] = []
            mine = range(number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, len(rows)))
            for group in passes.groups(rows, mine):
                batch = passes.batch(rows, group, device)
                with passes.precision.context(device):
                    hidden = hidden_states(teacher, batch).flatten(0, 1).index_select(0, batch.source)
                    logps, ids = likeliest(hidden, weight, bias, k, chunk_rows(weight.shape[0]), n_tokens=vocab_size)
                found.append((ids.cpu().numpy().astype(ids_dtype), logps.cpu().numpy().astype(np.float16)))
                advance(len(group), "")
            arrays = {"ids": np.concatenate([a for a, _ in found]), "logprobs": np.concatenate([b for _, b in found])}
            with _writing(folder):
                _store(folder, number, arrays)


def _store(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        part = folder / f".{name}.part-{os.getpid()}.npy"
        try:
            np.save(part, array, allow_pickle=False)
            os.replace(part, _file(folder, number, name))
        finally:
            part.unlink(missing_ok=True)
    digests = {name: sha256_file(_file(folder, number, name)) for name in arrays}
    write_atomic(_marker(folder, number), json.dumps(digests))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            folder, f"the teacher's cache cannot be written ({error.strerror or error})",
            "set EDGEALIGN_CACHE to a folder with room",
        ) from error


def _wait_for(folder: Path, shapes: dict[int, tuple[int, int]]) -> None:
    """Until other processes have made these shards; if one of them dies, torchrun ends this one too."""
    for number, shape in shapes.items():
        while not _is_whole(folder, number, shape, quiet=True):
            time.sleep(WAIT_S)


def _is_whole(folder: Path, number: int, shape: tuple[int, int], *, quiet: bool = False) -> bool:
    """Whether a shard is there, of this shape, and undamaged."""
    if not _marker(folder, number).is_file():
        return False
    try:
        digests = json.loads(_marker(folder, number).read_text(encoding="utf-8"))
        whole = all(
            sha256_file(_file(folder, number, name)) == digests[name]
            and _open(folder, number, name).shape == shape
            for name in ("ids", "logprobs")
        )
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole and not quiet:
        say(f"shard {number} of the teacher's cache {folder.name[:12]} is damaged: making it again")
    return whole


def _open(folder: Path, number: int, name: str) -> np.ndarray:
    array: np.ndarray = np.load(_file(folder, number, name), mmap_mode="r", allow_pickle=False)
    return array


def _file(folder: Path, number: int, name: str) -> Path:
    return folder / f"{number:05d}.{name}.npy"


def _marker(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"


def _key(rows: Rows, teacher_digest: str, vocab_size: int, k: int, passes: Passes) -> str:
    settings = (
        FORMAT, torch.__version__, teacher_digest, vocab_size, k, rows.width, passes.precision, passes.tokens_per_pass,
    )
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(np.ascontiguousarray(rows.ids).tobytes())
    digest.update(np.ascontiguousarray(rows.document).tobytes())
    return digest.hexdigest()
