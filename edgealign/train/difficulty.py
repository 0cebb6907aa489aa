"""How hard is each example? Judged by one or more small models, teacher-forced, in one forward pass each.

Loss: the judges' mean negative log-likelihood of what is learned. Where all judges read the very tokens that will be
trained, in nats per token. Where one has a tokenizer of its own, tokens cannot be compared: then in nats per symbol,
a symbol being one UTF-8 byte of the answer or the end of a turn, for all judges alike.

Success: the share of judges that get an answer right. The LFM2 report orders its data by the success rate of an
ensemble of twelve models with binary correctness (arXiv 2511.23404; a classifier then predicts it from the text, which
is left out here). What counts as correct without a checker for every task is our own reading, not the report's: a
judge is right when its greedy next token, given the true answer so far, is the true one for at least
`success_accuracy` of the answer's tokens.

What a judge says is computed once per model and data and cached beside the reference log-probabilities: three numbers
per example, from which either difficulty follows.

Shape legend: n examples, N learned tokens of a pass, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgealign.artifact import Artifact, open_model
from edgealign.data.encode import encode_conversation, encode_text, end_of_turn_id
from edgealign.data.forms import Text
from edgealign.errors import InputError
from edgealign.models.load import check_model, load_model, load_tokenizer, resolve_model
from edgealign.progress import say, track
from edgealign.train import processes
from edgealign.train.examples import Origin
from edgealign.train.layout import Tree, document
from edgealign.train.logprobs import check_layout, chunk_rows, hidden_states, output_projection
from edgealign.train.precision import choose_precision, count_parameters
from edgealign.train.reference import cache_dir, cache_key, cached
from edgealign.train.scoring import Passes
from edgealign.train.shortconv import tree_rows

FORMAT = "difficulty-1"
SLACK_BYTES = 8  # a token cut in the middle of a character decodes to other bytes than the character's
PER_TOKEN = "nats per token"
PER_SYMBOL = "nats per UTF-8 byte"

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Grades:
    """One judge on n examples: summed nats, first guesses that were right, and what they are divided by; NaN: unread.

    `symbols` are bytes of the answer and ends of turns. A judge with a tokenizer of its own is graded on whole rows:
    a text that fills several examples gives all of them the same grade.
    """

    nats: Floats  # (n,)
    hits: Floats  # (n,)
    tokens: Floats  # (n,)
    symbols: Floats | None  # (n,); None: the judge reads the very tokens that are trained


@dataclass(frozen=True)
class Difficulty:
    """`losses`: mean over the judges, in `unit`; `success`: share of the judges that are right."""

    losses: Floats  # (n,)
    success: Floats  # (n,)
    unit: str
    n_judges: int
    unread: int = 0  # examples that no judge could read; they got the median


def open_judges(sources: Sequence[str | Path]) -> tuple[Artifact, ...]:
    """The judges' directories, checked so far that a wrong one is refused before anything is computed.

    Raises:
        InputError: one is not a model, has no usable tokenizer, or is there twice.
        ArtifactError: one is damaged.
    """
    found: list[Artifact] = []
    for source in sources:
        folder = resolve_model(source)
        check_model(folder)
        end_of_turn_id(load_tokenizer(folder))
        artifact = open_model(source)
        if artifact.digest in {entry.digest for entry in found}:
            raise InputError(source, "is the same model as a --judge before it", "name each judge once")
        found.append(artifact)
    return tuple(found)


def judge(
    judges: Sequence[Artifact],
    trees: Sequence[Tree],
    origins: Sequence[Origin],
    *,
    base: tuple[Artifact, nn.Module, Any],
    passes: Passes,
    max_tokens: int,
    precision: str = "auto",
    success_accuracy: float = 0.5,
) -> Difficulty:
    """The difficulty of every example; without judges by the model that will be trained, as it is now.

    Args:
        trees: what will be trained, in the tokens of `base`'s tokenizer; `origins`: the row of each.
        base: the model that will be trained: its directory, its untouched weights, its tokenizer.
        passes: how its forward passes are cut; a judge that is not the base has its own precision.
        max_tokens: longest example of the training, and of a judge, unless its context is shorter.

    Scores are rounded to six digits, so that the order does not hang on the last bit of a sum.

    Raises:
        InputError: a judge cannot read any row, or cannot be loaded.
    """
    source, model, tokenizer = base
    graded = []
    for entry in judges or (source,):
        if entry.digest == source.digest:
            graded.append(grade(model, trees, passes, digest=entry.digest))
        else:
            graded.append(_grade_by(entry, trees, origins, tokenizer, passes, precision, max_tokens))
    shared = all(grades.symbols is None for grades in graded)
    symbols = None if shared else np.asarray([float(_symbols(tree, tokenizer)) for tree in trees])
    losses, right = [], []
    for grades in graded:
        divisor = grades.tokens if symbols is None else symbols if grades.symbols is None else grades.symbols
        losses.append(grades.nats / np.maximum(divisor, 1.0))
        accuracy = grades.hits / np.maximum(grades.tokens, 1.0)
        right.append(np.where(np.isnan(accuracy), np.nan, accuracy >= success_accuracy))
    mean, unread = _mean_over_judges(np.stack(losses))
    success, _ = _mean_over_judges(np.stack(right))
    if unread:
        say(f"difficulty: no judge could read {unread} of {len(trees)} examples; they count as of median difficulty")
    return Difficulty(_rounded(mean), _rounded(success), PER_TOKEN if shared else PER_SYMBOL, len(graded), unread)


def grade(model: nn.Module, trees: Sequence[Tree], passes: Passes, *, digest: str) -> Grades:
    """One judge on examples in its own tokens; from the cache where they are known. `digest` identifies the weights."""
    n = len(trees)
    key = hashlib.sha256(f"{FORMAT} {cache_key(trees, passes, digest, None)}".encode()).hexdigest()
    found = cached(
        cache_dir("difficulty") / f"{key}.safetensors", {"nats": n, "hits": n},
        lambda: _grade_all(model, trees, passes),
    )
    tokens = np.asarray([tree.n_learned for tree in trees], dtype=np.float64)
    return Grades(found["nats"].numpy(), found["hits"].numpy(), tokens, None)


def _grade_by(
    judge: Artifact,
    trees: Sequence[Tree],
    origins: Sequence[Origin],
    tokenizer: Any,
    passes: Passes,
    precision: str,
    max_tokens: int,
) -> Grades:
    """The grades of a model other than the base: loaded, asked and dropped again."""
    say(f"difficulty: judged by {judge.path.name}")
    own = load_tokenizer(judge.path)
    model: Any = load_model(judge.path)
    model.to(processes.device())
    check_layout(model)
    its_precision = choose_precision(precision, lora=False, n_parameters=count_parameters(model))
    its_passes = Passes.of(
        model, its_precision, tokens_per_pass=passes.tokens_per_pass, pad_id=int(own.pad_token_id or 0)
    )
    context = int(getattr(model.config, "max_position_embeddings", 0) or 2**30)
    read = _read(judge, trees, origins, tokenizer, own, max_tokens=max_tokens, context=context)
    if read.same:
        return grade(model, trees, its_passes, digest=judge.digest)
    grades = grade(model, read.trees, its_passes, digest=judge.digest)
    symbols = np.asarray([float(_symbols(tree, own)) for tree in read.trees])
    spread = []
    for values in (grades.nats, grades.hits, grades.tokens, symbols):
        sums = np.zeros(read.n_rows)
        np.add.at(sums, read.row_of_tree, values)
        unread = np.bincount(read.row_of_tree, minlength=read.n_rows) == 0
        spread.append(np.where(unread, np.nan, sums)[read.row_of_example])
    return Grades(*spread)


@dataclass(frozen=True)
class _Reading:
    """The rows of the examples as a judge reads them. `same`: in the tokens that are trained, one by one."""

    trees: tuple[Tree, ...]
    row_of_tree: np.ndarray[Any, np.dtype[np.int64]]
    row_of_example: np.ndarray[Any, np.dtype[np.int64]]
    n_rows: int
    same: bool


def _read(
    judge: Artifact,
    trees: Sequence[Tree],
    origins: Sequence[Origin],
    tokenizer: Any,
    own: Any,
    *,
    max_tokens: int,
    context: int,
) -> _Reading:
    numbers: dict[int, int] = {}
    row_of_example = [numbers.setdefault(id(origin.row), len(numbers)) for origin in origins]
    readings: list[list[Tree] | None] = [None] * len(numbers)
    reasons: list[str] = []
    same = True
    for number, tree, origin in zip(row_of_example, trees, origins, strict=True):
        made = readings[number]
        if made is None:
            try:
                made = _in_tokens_of(own, tree, origin, tokenizer, max_tokens=max_tokens, context=context)
            except InputError as error:
                reasons.append(error.line())
                made = []
            readings[number] = made
        same = same and tree in made
    row_of_tree = [number for number, made in enumerate(readings) for _ in made or ()]
    if not row_of_tree:
        raise InputError(judge.path, f"as a judge it can read none of the rows; first: {reasons[0]}")
    if reasons:
        say(f"{judge.path.name} cannot read {len(reasons)} of {len(trees)} examples; first: {reasons[0]}")
    return _Reading(
        tuple(tree for made in readings for tree in made or ()),
        np.asarray(row_of_tree, dtype=np.int64), np.asarray(row_of_example, dtype=np.int64), len(numbers), same,
    )


def _in_tokens_of(
    own: Any, tree: Tree, origin: Origin, tokenizer: Any, *, max_tokens: int, context: int
) -> list[Tree]:
    """The row in the judge's tokens. What was cut off for training is cut off here too, at the same byte."""
    size = min(max_tokens, context)
    if isinstance(origin.row, Text):
        return [document(piece.ids, piece.mask) for piece in encode_text(own, origin.row.text, max_tokens=size)]
    encoded = encode_conversation(own, origin.row.messages, max_tokens=context)
    found = document(encoded.ids[:size], encoded.mask[:size])
    if found == tree:
        return [found]
    found = document(encoded.ids, encoded.mask)
    allowed = _symbols(tree, tokenizer)
    if _symbols(found, own) <= allowed + SLACK_BYTES:
        return [found]
    learned = [place for place, flag in enumerate(encoded.mask) if flag]
    low, high = 1, len(learned)  # the most learned tokens that are within; at least one
    while low < high:
        middle = (low + high + 1) // 2
        end = learned[middle - 1] + 1
        if _symbols(document(encoded.ids[:end], encoded.mask[:end]), own) <= allowed:
            low = middle
        else:
            high = middle - 1
    end = learned[low - 1] + 1
    return [document(encoded.ids[:end], encoded.mask[:end])]


def _symbols(tree: Tree, tokenizer: Any) -> int:
    """UTF-8 bytes of the learned text, and one for every end of a turn."""
    end = end_of_turn_id(tokenizer)
    ids = [i for segment in tree.segments for i, flag in zip(segment.ids, segment.learned, strict=True) if flag]
    text = tokenizer.decode([i for i in ids if i != end], clean_up_tokenization_spaces=False)
    return len(text.encode()) + ids.count(end)


def _grade_all(model: nn.Module, trees: Sequence[Tree], passes: Passes) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    passes = replace(passes, lanes=1)  # one after the other
    nats = torch.zeros(len(trees), dtype=torch.float64)
    hits = torch.zeros(len(trees), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        groups = passes.groups(trees, range(len(trees)))
        for group in track(groups, total=len(groups), label="difficulty"):
            batch = passes.batch(trees, group, device)
            with torch.no_grad(), tree_rows(model), passes.precision.context(device):
                logps, right = _first_guesses(model, batch)
            lengths = batch.lengths.tolist()  # one sequence per document
            parts = zip(group, torch.split(logps, lengths), torch.split(right, lengths), strict=True)
            for i, logp, hit in parts:
                nats[i], hits[i] = -logp.sum(), hit.sum()
    finally:
        model.train(was_training)
    return {"nats": nats, "hits": hits}


def _first_guesses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(N,) log-probability of every learned token, and (N,) whether it is the most likely one; float64 on the CPU."""
    picked = hidden_states(model, batch).flatten(0, 1).index_select(0, batch.source)  # (N, D)
    weight, bias = output_projection(model)
    chunk = chunk_rows(weight.shape[0])
    logps, hits = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.float64)]
    for start in range(0, picked.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = nn.functional.linear(picked[part].to(weight.dtype), weight, bias).float()  # (chunk, V)
        target = batch.target[part]
        logps.append(torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1).double().cpu())
        hits.append((logits.argmax(-1) == target).double().cpu())
    return torch.cat(logps), torch.cat(hits)


def _mean_over_judges(values: Floats) -> tuple[Floats, int]:
    """(judges, n) -> (n,), leaving out judges that could not read a row; and how many nobody could read."""
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    means = np.where(known, values, 0.0).sum(axis=0) / np.maximum(counts, 1)
    unread = int((counts == 0).sum())
    if unread:
        means[counts == 0] = np.median(means[counts > 0])
    return means, unread


def _rounded(values: Floats) -> Floats:
    return np.asarray([float(f"{value:.6g}") for value in values])
