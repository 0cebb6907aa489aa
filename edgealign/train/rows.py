"""Plain text for next-token training: documents end to end, cut into rows of one fixed length.

The documents of a run form one stream of tokens. Row `i` reads tokens `i T` to `(i + 1) T` of it and predicts the
token after each, so every token but the first of a document is learned exactly once per epoch, whatever the
lengths. A row may hold the end of one document and the start of the next: attention, positions and short
convolutions stop at the boundary, and no row predicts the first token of a document from the one before it.

All rows have one shape, which is what `torch.compile` wants. `Rows` stands in for the list of trees that other
tasks have (`tasks.py`): an index is a row.

Shape legend: B rows, T tokens in a row, K kernel width of the short convolution, N learned tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgealign.data.encode import encode_conversations
from edgealign.data.mapping import parse_mapping
from edgealign.data.read import Loaded, read_all
from edgealign.errors import InputError
from edgealign.progress import say, track
from edgealign.train.examples import Examples, provenance
from edgealign.train.layout import Batch
from edgealign.train.recipes import PretrainRecipe

TEXTS_AT_ONCE = 256  # the tokenizer works on this many in parallel


@dataclass(frozen=True)
class Rows:
    """A stream of documents, read `width` tokens at a time; `len` counts whole rows."""

    ids: np.ndarray  # (L,) int32: every document's tokens, one after the other
    document: np.ndarray  # (L,) int32: which document a token belongs to
    width: int

    def __len__(self) -> int:
        return max(0, (len(self.ids) - 1) // self.width)

    def __getitem__(self, index: int) -> np.ndarray:
        """(T,) the tokens of one row."""
        start = index * self.width
        row: np.ndarray = self.ids[start : start + self.width]
        return row

    def n_learned(self, index: int) -> int:
        """Predictions that row `index` makes: those whose next token is of the same document."""
        start = index * self.width
        return int((np.diff(self.document[start : start + self.width + 1]) == 0).sum())

    def learned_counts(self) -> np.ndarray:
        """(rows,) `n_learned` of every row."""
        same = np.diff(self.document[: len(self) * self.width + 1]) == 0
        counts: np.ndarray = same.reshape(len(self), self.width).sum(1)
        return counts

    def head(self, n_rows: int) -> Rows:
        """The first rows, as a stream of their own."""
        end = min(n_rows, len(self)) * self.width + 1
        return Rows(self.ids[:end], self.document[:end], self.width)

    def groups(self, indices: Sequence[int], tokens_per_pass: int, *, parts: int = 1) -> list[list[int]]:
        """`indices` in passes of as many rows as fit, at least one; of fewer, so that `parts` divides the passes."""
        n = max(1, tokens_per_pass // self.width)
        if parts == 1:
            return [list(indices[i : i + n]) for i in range(0, len(indices), n)]
        count = min(len(indices), parts * -(-len(indices) // (n * parts)))
        bounds = [i * len(indices) // count for i in range(count + 1)]
        return [list(indices[start:end]) for start, end in pairwise(bounds)]

    def batch(self, indices: Sequence[int], *, kernel: int) -> Batch:
        """The rows as tensors, in the layout that every loss reads (see `layout.Batch`)."""
        width = self.width
        starts = np.asarray(indices, dtype=np.int64)[:, None] * width
        window = self.ids[starts + np.arange(width + 1)]  # (B, T+1)
        owner = self.document[starts + np.arange(width + 1)]
        own = owner[:, :-1]  # (B, T)
        n_flat = own.size
        same = np.zeros_like(own, dtype=bool)
        same[:, 1:] = own[:, 1:] == own[:, :-1]
        place = np.broadcast_to(np.arange(width), own.shape)
        begin = np.maximum.accumulate(np.where(same, 0, place), axis=1)
        position = place - begin
        flat = np.arange(n_flat).reshape(own.shape)
        taps = np.stack([np.where(position >= d, flat - d, n_flat).ravel() for d in range(1, kernel)]) if kernel > 1 \
            else np.empty((0, n_flat), dtype=np.int64)
        learned = (owner[:, 1:] == own).ravel()
        source = np.flatnonzero(learned)
        lengths = learned.reshape(own.shape).sum(1)
        document = torch.from_numpy(own)
        allowed = (document[:, :, None] == document[:, None, :]).tril_()
        return Batch(
            input_ids=torch.from_numpy(window[:, :-1].astype(np.int64)),
            position_ids=torch.from_numpy(position.astype(np.int64)),
            allowed=allowed[:, None],
            taps=torch.from_numpy(taps),
            source=torch.from_numpy(source),
            target=torch.from_numpy(window[:, 1:].ravel()[source].astype(np.int64)),
            sequence=torch.from_numpy(np.repeat(np.arange(len(indices)), lengths)),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            n_tokens=n_flat,
        )


@dataclass(frozen=True)
class PretrainTask:
    """Next-token loss on rows; implements `tasks.Task` with rows in the place of trees."""

    trees: Any  # Rows

    def weight(self, index: int) -> int:
        n: int = self.trees.n_learned(index)
        return n

    def loss(self, logps: Tensor, batch: Batch, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        return -logps.sum(), {}


def load_rows(sources: Sequence[str], tokenizer: Any, recipe: PretrainRecipe, *, valid: Sequence[str] = ()) -> Examples:
    """Read and encode texts (and conversations, every token of which is learned) as rows.

    Without `valid`, whole documents are held out: those with the smallest hash, up to `valid_fraction` of the tokens.

    Raises:
        InputError: unreadable, empty, of another form, or too short for one row.
    """
    if not sources:
        raise InputError("--data", "names no file", "give at least one --data FILE")
    loaded = read_all(
        [*sources, *valid], mapping=parse_mapping(recipe.map), skip_bad=recipe.skip_bad, limit=recipe.limit
    )
    parts = [_documents(part, tokenizer) for part in loaded]
    train = [ids for part in parts[: len(sources)] for ids in part]
    held = [ids for part in parts[len(sources) :] for ids in part]
    if not valid:
        train, held = _hold_out(train, fraction=recipe.valid_fraction, seed=recipe.seed)
    train_rows = _rows(train, recipe.max_tokens, seed=recipe.seed)
    held_rows = _rows(held, recipe.max_tokens, seed=recipe.seed, limit=recipe.valid_limit)
    if not len(train_rows):
        n = sum(map(len, train))
        raise InputError(
            "--data", f"holds {n} tokens, less than one row of {recipe.max_tokens}",
            "give more text or lower --max-tokens",
        )
    facts = {
        "rows": sum(part.total for part in loaded), "bad_rows": sum(len(part.bad) for part in loaded),
        "documents": len(train), "train_examples": len(train_rows), "held_out_examples": len(held_rows),
        "train_tokens": len(train_rows.ids), "held_out_tokens": len(held_rows) * recipe.max_tokens,
    }
    inputs, licences = provenance(loaded, len(sources))
    say(f"{len(train):,} documents, {facts['train_tokens']:,} tokens: {len(train_rows):,} rows of {recipe.max_tokens}")
    return Examples(train_rows, held_rows, facts, inputs, licences)


def _documents(part: Loaded, tokenizer: Any) -> list[np.ndarray]:
    """Every row of a source as the token ids of one document, the begin token first."""
    rows: Any = part.rows
    if part.form == "conversation":
        encoded = encode_conversations(tokenizer, rows)
        return [np.asarray(row.ids, dtype=np.int32) for row in encoded.rows]
    if part.form != "text":
        raise InputError(
            part.source, f"holds rows of the form {part.form}, not text or conversation", "see: edgealign dpo --help"
        )
    first = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    documents: list[np.ndarray] = []
    starts = range(0, len(rows), TEXTS_AT_ONCE)
    for start in track(starts, total=len(starts), label="encoding"):
        texts = [row.text for row in rows[start : start + TEXTS_AT_ONCE]]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            documents.append(np.asarray([*first, *ids], dtype=np.int32))
    return documents


def _hold_out(
    documents: list[np.ndarray], *, fraction: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    room = fraction * sum(map(len, documents))
    order = sorted(range(len(documents)), key=lambda i: hashlib.sha256(b"%d/" % seed + documents[i].tobytes()).digest())
    held: set[int] = set()
    for i in order[:-1]:
        if len(documents[i]) <= room:
            held.add(i)
            room -= len(documents[i])
    kept = [ids for i, ids in enumerate(documents) if i not in held]
    return kept, [documents[i] for i in sorted(held)]


def _rows(documents: Sequence[np.ndarray], width: int, *, seed: int, limit: int | None = None) -> Rows:
    """Documents in an order drawn with the seed, so that neighbours in a row are of different sources.

    With `limit`, that many rows from evenly spaced places, so that one long book does not stand for all.
    """
    if not documents:
        return Rows(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32), width)
    order = np.random.default_rng((seed, len(documents))).permutation(len(documents))
    chosen = [documents[i] for i in order]
    ids = np.concatenate(chosen)
    document = np.repeat(np.arange(len(chosen), dtype=np.int32), [len(part) for part in chosen])
    n = (len(ids) - 1) // width
    if limit is None or n <= limit:
        return Rows(ids, document, width)
    places = np.arange(limit) * n // limit
    taken = places[:, None] * width + np.arange(width)
    apart = document[taken] + places[:, None].astype(np.int32) * len(chosen)  # rows that were no neighbours
    _, number = np.unique(apart, return_inverse=True)
    last = ids[places[-1] * width + width]
    return Rows(
        np.append(ids[taken].ravel(), last).astype(np.int32), np.append(number.ravel(), -1).astype(np.int32), width
    )
