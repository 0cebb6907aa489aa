"""How well do models predict held-out text, beside n-gram models of the same training text?

    edgealign eval language --model hybrid=runs/A --model llama=runs/B --data train.jsonl --valid valid.jsonl --out R

Everybody predicts the same tokens: documents cut into pieces of `max_tokens`, each after the begin token, which is
given and not predicted. The n-gram models are trained on the same tokenizer's tokens of `--data`, whole and in parts
(each half of the next), so that a model in training has a baseline of its own size. Nats per token and perplexity
compare models of one tokenizer; bits per byte also compare with others.

Intervals are 95 % bootstrap intervals over documents, paired: both models predict the same ones.

Shape legend: D documents, T predicted tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgealign.artifact import Artifact, Check, Input, file_input, open_artifact, open_model, publish, refuse_existing
from edgealign.data.mapping import parse_mapping
from edgealign.data.read import Loaded, read_all
from edgealign.errors import InputError
from edgealign.evaluate import ngram
from edgealign.evaluate.learning_curve import learning_curve
from edgealign.evaluate.recipes import LanguageRecipe
from edgealign.progress import say, track

Floats = npt.NDArray[np.float64]
UNIGRAM = "unigram"
FEW_DOCUMENTS = 30  # below this, pieces are resampled: a handful of books gives no interval
TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class HeldOut:
    """Pieces of documents as token ids, begin token first; `unit[i]` is what piece i is resampled with."""

    pieces: tuple[ngram.Ids, ...]
    unit: npt.NDArray[np.int64]
    resampled: str
    documents: int
    bytes: int

    @property
    def tokens(self) -> int:
        return sum(len(ids) - 1 for ids in self.pieces)

    def per_unit(self, nll: Floats) -> Floats:
        """nll (T,) of all predicted tokens in order -> (D,) sums."""
        lengths = [len(ids) - 1 for ids in self.pieces]
        return np.bincount(np.repeat(self.unit, lengths), weights=nll).astype(np.float64)


def run(
    recipe: LanguageRecipe,
    *,
    models: Mapping[str, str | Path],
    data: Sequence[str | Path],
    valid: Sequence[str | Path],
    out: Path,
) -> Artifact:
    """Evaluate and publish a report: `result.json`, `table.md`, `perplexity.png`.

    Args:
        models: name in the tables -> model directory; one that was pre-trained brings its `history.jsonl`.
        data: the models' training text, for the baselines.
        valid: held-out text.

    Raises:
        InputError: no model, no text, two tokenizers, or held-out documents that are in the training text.
    """
    from edgealign.evaluate.language_report import write_report
    from edgealign.models.load import load_tokenizer

    refuse_existing(Path(out))
    if not models or not data or not valid:
        raise InputError("eval language", "needs models, data and held-out text", "give --model, --data and --valid")
    opened = {name: open_model(path) for name, path in models.items()}
    first = next(iter(opened.values()))
    tokenizer = load_tokenizer(first.path)
    loaded = read_all(
        [*data, *valid], mapping=parse_mapping(recipe.map), skip_bad=recipe.skip_bad, limit=recipe.limit
    )
    training = _texts(loaded[: len(data)], ("text", "conversation"))
    held = _texts(loaded[len(data) :], ("text",))
    _refuse_overlap(training, held)
    held_out = _hold(held, tokenizer, recipe)
    vocab = _vocabulary(first, tokenizer)

    nll: dict[str, Floats] = {}
    result: dict[str, Any] = {"models": {}, "baselines": {}}
    valid_digests = {part.digest for part in loaded[len(data) :]}
    for name, artifact in opened.items():
        if artifact is not first:
            _refuse_other_tokenizer(artifact, tokenizer, held)
        losses, parameters = _score(artifact.path, held_out, recipe)
        nll[name] = held_out.per_unit(losses)
        result["models"][name] = _measures(losses, held_out) | learning_curve(artifact, valid_digests)
        result["models"][name]["parameters"] = parameters
        say(f"{name}: {result['models'][name]['nats_per_token']:.4f} nats per token")
    order = min(recipe.order, ngram.longest_order(vocab))
    curves, baselines, n_training = _baselines(training, tokenizer, held_out, vocab=vocab, order=order, recipe=recipe)
    for name, losses in baselines.items():
        nll[name] = held_out.per_unit(losses)
        result["baselines"][name] = _measures(losses, held_out) | {"curve": curves[name]}
    tokens = held_out.per_unit(np.ones(held_out.tokens))
    result["differences"] = _differences(nll, tokens, result["models"], recipe)
    result["held_out"] = {
        "documents": held_out.documents, "tokens": held_out.tokens, "bytes": held_out.bytes,
        "pieces": len(held_out.pieces), "resampled": held_out.resampled,
    }
    result["training"] = {"documents": len(training), "tokens": n_training, "vocabulary": vocab, "order": order}
    inputs = [artifact.as_input(f"model {name}") for name, artifact in opened.items()]
    inputs += _file_inputs(loaded, len(data))
    with publish(
        out, kind="report", format="eval", stage="eval_language", recipe=recipe, inputs=inputs
    ) as draft:
        for check in _checks(result, recipe):
            draft.add_check(check)
        (draft.dir / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        write_report(draft.dir, result, recipe)
    say(f"read {Path(out) / 'table.md'}")
    return open_artifact(out)


def _texts(parts: Sequence[Loaded], forms: Sequence[str]) -> list[str]:
    """The text of every row; of a conversation, its turns, one to a line."""
    from edgealign.data.forms import texts

    for part in parts:
        if part.form not in forms:
            reason = f"holds rows of the form {part.form}, not {' or '.join(forms)}"
            raise InputError(part.source, reason, "give plain text: rows with a column text")
    return ["\n".join(texts(row)) for part in parts for row in part.rows]


def _refuse_overlap(training: Sequence[str], held: Sequence[str]) -> None:
    """A baseline that has read the held-out text would win by memory."""
    known = set(map(hash, training))
    shared = sum(hash(text) in known for text in held)
    if shared:
        raise InputError("--valid", f"{shared} of {len(held)} held-out documents are in --data", "hold them out")


def _hold(texts: Sequence[str], tokenizer: Any, recipe: LanguageRecipe) -> HeldOut:
    """Documents in an order drawn with the seed, up to `valid_tokens`; the last one may be cut there."""
    order = np.random.default_rng(recipe.seed).permutation(len(texts)).tolist()
    pieces: list[ngram.Ids] = []
    owner: list[int] = []
    room, n_bytes = recipe.valid_tokens, 0.0
    for number, place in enumerate(order):
        whole = _pieces([texts[place]], tokenizer, recipe.max_tokens)
        n_whole, before = sum(len(ids) - 1 for ids in whole), room
        for ids in whole:
            if room > 0:
                pieces.append(ids[: room + 1])
                owner.append(number)
                room -= len(pieces[-1]) - 1
        n_bytes += len(texts[place].encode()) * (before - room) / max(n_whole, 1)
        if room <= 0:
            break
    if not pieces:
        raise InputError("--valid", "holds no token to predict", "give more text")
    unit, documents, resampled = np.asarray(owner), len(set(owner)), "documents"
    if documents < FEW_DOCUMENTS:
        unit, resampled = np.arange(len(pieces)), f"pieces of {recipe.max_tokens} tokens"
    else:
        unit = np.unique(unit, return_inverse=True)[1]
    return HeldOut(tuple(pieces), unit, resampled, documents, round(n_bytes))


def _pieces(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[ngram.Ids]:
    """Token ids in pieces of `max_tokens`, the begin token first in each; as `encode.encode_texts`, but in parallel."""
    begin = tokenizer.bos_token_id
    if begin is None:
        raise InputError("tokenizer", "has no begin token to predict the first word after", "use an LFM2 tokenizer")
    pieces: list[ngram.Ids] = []
    size = max_tokens - 1
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = list(texts[start : start + TEXTS_AT_ONCE])
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces += [np.asarray([begin, *ids[at : at + size]], dtype=np.int32) for at in range(0, len(ids), size)]
    return pieces


def _vocabulary(model: Artifact, tokenizer: Any) -> int:
    """The number of tokens that a model of this tokenizer can predict."""
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    return max(int(config.get("vocab_size", 0)), len(tokenizer))


def _refuse_other_tokenizer(model: Artifact, tokenizer: Any, texts: Sequence[str]) -> None:
    from edgealign.models.load import load_tokenizer

    some = list(texts[:TEXTS_AT_ONCE])
    other = load_tokenizer(model.path)
    same = [tok(some, add_special_tokens=False, verbose=False)["input_ids"] for tok in (tokenizer, other)]
    if same[0] != same[1] or tokenizer.bos_token_id != other.bos_token_id:
        raise InputError(model.path, "has another tokenizer than the first model", "compare it in a report of its own")


def _score(model: Path, held_out: HeldOut, recipe: LanguageRecipe) -> tuple[Floats, int]:
    """(T,) negative log-likelihoods in nats, and the number of parameters."""
    import torch

    from edgealign.models.load import load_model
    from edgealign.train.layout import document
    from edgealign.train.precision import choose_precision, count_parameters, fixed_threads
    from edgealign.train.scoring import Passes, score

    network = load_model(model)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = count_parameters(network)
    precision = choose_precision(recipe.precision, lora=False, n_parameters=parameters)
    trees = [document(ids.tolist(), [False] + [True] * (len(ids) - 1)) for ids in held_out.pieces]
    with fixed_threads(recipe.threads):
        passes = Passes.of(network, precision, tokens_per_pass=recipe.tokens_per_pass)
        values = score(network, trees, passes, label=f"predicting {held_out.tokens:,} tokens")
    return -values.double().numpy(), parameters


def _baselines(
    texts: Sequence[str], tokenizer: Any, held_out: HeldOut, *, vocab: int, order: int, recipe: LanguageRecipe
) -> tuple[dict[str, list[dict[str, float]]], dict[str, Floats], int]:
    """Curves by size, and each baseline's (T,) negative log-likelihoods when it has read everything."""
    shuffled = [texts[i] for i in np.random.default_rng((recipe.seed, 1)).permutation(len(texts))]
    pieces: list[ngram.Ids] = []
    starts = range(0, len(shuffled), TEXTS_AT_ONCE)
    for start in track(starts, total=len(starts), label="encoding the training text"):
        pieces += _pieces(shuffled[start : start + TEXTS_AT_ONCE], tokenizer, recipe.max_tokens)
    keys = ngram.pack(pieces, vocab=vocab, order=order)
    asked = ngram.pack(held_out.pieces, vocab=vocab, order=order)
    n_total = len(keys)
    sizes = sorted({n_total >> halvings for halvings in range(recipe.points)} - {0})
    names = {UNIGRAM: 1, f"{order}-gram": order}
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    last: dict[str, Floats] = {}
    for size in track(sizes, total=len(sizes), label="n-gram baselines"):
        for name, m in names.items():
            part = keys[:size] & np.uint64((1 << (ngram.bits_of(vocab) * m)) - 1)
            model = ngram.train(part, vocab=vocab, order=m)
            last[name] = -np.log(ngram.probabilities(model, asked))
            curves[name].append({"tokens": size, "nats_per_token": float(last[name].mean())})
    return curves, last, n_total


def _measures(nll: Floats, held_out: HeldOut) -> dict[str, float]:
    mean = float(nll.mean())
    bits = float(nll.sum()) / math.log(2) / held_out.bytes
    return {"nats_per_token": mean, "perplexity": math.exp(mean), "bits_per_byte": bits}


def _differences(
    nll: Mapping[str, Floats], tokens: Floats, models: Mapping[str, Any], recipe: LanguageRecipe
) -> list[dict[str, Any]]:
    """Every model against every later model and every baseline: how many nats per token the other one needs more."""
    rng = np.random.default_rng((recipe.seed, 2))
    drawn = rng.integers(0, len(tokens), (recipe.bootstrap, len(tokens)))
    found = []
    names = list(nll)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            if name not in models:
                continue
            gain = nll[other] - nll[name]
            means = gain[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
            low, high = np.quantile(means, [0.025, 0.975])
            mean = float(gain.sum() / tokens.sum())
            found.append({"model": name, "other": other, "nats": mean, "low": float(low), "high": float(high)})
    return found


def _checks(result: Mapping[str, Any], recipe: LanguageRecipe) -> list[Check]:
    if recipe.must_beat == "nothing":
        return []
    wanted = UNIGRAM if recipe.must_beat == "unigram" else f"{result['training']['order']}-gram"
    return [
        Check(
            f"{row['model']} beats the {wanted}", row["low"], 0.0, row["low"] > 0,
            f"nats per token saved, 95 % from {row['low']:.3f} to {row['high']:.3f}; the low end must exceed 0",
        )
        for row in result["differences"]
        if row["other"] == wanted
    ]


def _file_inputs(loaded: Sequence[Loaded], n_data: int) -> list[Input]:
    return [
        file_input("data" if place < n_data else "valid", part.source, part.digest) for place, part in enumerate(loaded)
    ]
