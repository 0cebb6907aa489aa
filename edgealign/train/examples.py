"""From files to examples: read, encode, lay out as trees, hold some back. Nothing is left out without a count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgealign.artifact import MANIFEST, Input, file_input, open_artifact
from edgealign.data.encode import encode_conversations, encode_pairs, encode_text, encode_thumbs
from edgealign.data.mapping import parse_mapping
from edgealign.data.read import Loaded, read_all
from edgealign.errors import InputError
from edgealign.objectives.table import UNRELATED, of_sides
from edgealign.progress import say
from edgealign.train.beside import tree_of, with_unrelated
from edgealign.train.layout import Tree, document
from edgealign.train.recipes import TrainRecipe
from edgealign.train.thumbs import digest, pair_thumbs, prompts_of

# Trees, the place of each one's row in the source, how many were cut, and what was refused with the reason.
Encoding = tuple[list[Tree], list[int], int, list[tuple[int, str]]]
Encode = Callable[[Any, Loaded, int], Encoding]


@dataclass(frozen=True)
class Examples:
    """`train` and `held_out` share no prompt; `facts` are counts for the manifest."""

    train: Any  # tuple[Tree, ...], or `rows.Rows`
    held_out: Any
    facts: dict[str, int]
    inputs: tuple[Input, ...]
    licences: dict[str, str]
    origins: tuple[Origin, ...] = ()  # of `train`, where they were asked for


@dataclass(frozen=True)
class Origin:
    """Where an example comes from: the number of its source, the line in it, and the row as it was read."""

    source: int
    line: int
    row: Any  # data.forms.Row


def load_documents(
    sources: Sequence[str], tokenizer: Any, recipe: TrainRecipe, *, valid: Sequence[str] = (), origins: bool = False
) -> Examples:
    """Conversations, completions and plain text, for SFT; `origins`: remember the row of every training example.

    Raises:
        InputError: unreadable, empty, of another form, or with bad rows that the recipe does not allow for.
    """
    forms = ("conversation", "text")
    return _load(sources, valid, tokenizer, recipe, _encode_documents, forms, "edgealign dpo", origins)


def load_pairs(
    sources: Sequence[str],
    tokenizer: Any,
    recipe: TrainRecipe,
    *,
    valid: Sequence[str] = (),
    columns: Sequence[str] = (),
    texts: Sequence[str] = (),
    thumbs: bool = False,
) -> Examples:
    """Preference pairs, with what an objective reads beside them (`Objective.columns` and `Objective.texts`).

    Args:
        thumbs: single answers that were liked or not will do (`Objective.of_sides`).

    Raises:
        InputError: as `load_documents`.
    """
    encode = partial(_encode_pairs, columns=columns, texts=texts)
    forms = ("pair", "thumb") if thumbs else ("pair",)
    return _load(sources, valid, tokenizer, recipe, encode, forms, "edgealign sft")


def hold_out(trees: Sequence[Tree], *, fraction: float, limit: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out; examples of one prompt (or equal documents) stay together.

    Prompts are drawn by a hash of their tokens and the seed, so that more data moves no prompt to the other side
    more than it must. At least one example stays for training.
    """
    places = [[digest(ids, seed) for ids in prompts_of(tree)] for tree in trees]
    first = _linked(places)
    by_prompt: dict[str, list[int]] = {}
    for i, (place, *_) in enumerate(places):
        by_prompt.setdefault(first[place], []).append(i)
    wanted = min(limit, int(fraction * len(trees)))
    held: list[int] = []
    for place in sorted(by_prompt)[:-1]:
        group = by_prompt[place]
        if len(held) + len(group) <= wanted:
            held.extend(group)
    kept = set(range(len(trees))) - set(held)
    return sorted(kept), sorted(held)


def _linked(places: Sequence[Sequence[str]]) -> dict[str, str]:
    """Of every prompt the least one that it is linked to, by examples that hold both."""
    least: dict[str, str] = {}

    def find(place: str) -> str:
        while least.setdefault(place, place) != place:
            place = least[place]
        return place

    for linked in places:
        roots = sorted(map(find, linked))
        least.update(dict.fromkeys(roots, roots[0]))
    return {place: find(place) for place in list(least)}


def _load(
    sources: Sequence[str],
    valid: Sequence[str],
    tokenizer: Any,
    recipe: TrainRecipe,
    encode: Encode,
    forms: tuple[str, ...],
    other: str,
    origins: bool = False,
) -> Examples:
    if not sources:
        raise InputError("--data", "names no file", "give at least one --data FILE")
    mapping = parse_mapping(recipe.map)
    loaded = read_all([*sources, *valid], mapping=mapping, skip_bad=recipe.skip_bad, limit=recipe.limit)
    facts = {"rows": 0, "bad_rows": 0, "ties": 0, "cut": 0, "refused": 0}
    trees: list[list[Tree]] = []
    places: list[list[int]] = []
    for part in loaded:
        if part.form == "thumb" and "pair" in forms and "thumb" not in forms:
            reason = "holds thumbs, and this objective compares two answers to one prompt"
            raise InputError(part.source, reason, f"choose another --objective: {', '.join(of_sides())}")
        if part.form not in forms:
            reason = f"holds rows of the form {part.form}, not {' or '.join(forms)}"
            raise InputError(part.source, reason, f"see: {other} --help")
        made, kept, cut, refused = encode(tokenizer, part, recipe.max_tokens)
        facts["rows"] += part.total
        facts["bad_rows"] += len(part.bad)
        facts["ties"] += part.ties
        facts["cut"] += cut
        facts["refused"] += len(refused)
        _report(part, made, cut, refused, recipe.max_tokens)
        trees.append(made)
        places.append(kept)
    train = [tree for part in trees[: len(sources)] for tree in part]
    held = [tree for part in trees[len(sources) :] for tree in part][: recipe.valid_limit]
    found = _origins(loaded[: len(sources)], places) if origins else []
    if not valid:
        kept_at, held_at = hold_out(train, fraction=recipe.valid_fraction, limit=recipe.valid_limit, seed=recipe.seed)
        train, held = [train[i] for i in kept_at], [train[i] for i in held_at]
        found = [found[i] for i in kept_at] if origins else []
    facts |= {
        "train_examples": len(train),
        "held_out_examples": len(held),
        "train_tokens": sum(tree.n_tokens for tree in train),
        "learned_tokens": sum(tree.n_learned for tree in train),
    }
    inputs, licences = provenance(loaded, len(sources))
    return Examples(tuple(train), tuple(held), facts, inputs, licences, tuple(found))


def _origins(loaded: Sequence[Loaded], places: Sequence[Sequence[int]]) -> list[Origin]:
    return [
        Origin(number, part.lines[place] if part.lines else place + 1, part.rows[place])
        for number, part in enumerate(loaded)
        for place in places[number]
    ]


def _encode_documents(tokenizer: Any, part: Loaded, max_tokens: int) -> Encoding:
    rows: Any = part.rows  # one form per source
    if part.form == "text":
        made = [
            (place, document(piece.ids, piece.mask))
            for place, row in enumerate(rows)
            for piece in encode_text(tokenizer, row.text, max_tokens=max_tokens, name=f"text {place + 1}")
        ]
        return [tree for _, tree in made], [place for place, _ in made], 0, []
    encoded = encode_conversations(tokenizer, rows, max_tokens=max_tokens)
    trees = [document(row.ids, row.mask) for row in encoded.rows]
    return trees, list(encoded.kept), encoded.cut, list(encoded.refused)


def _encode_pairs(
    tokenizer: Any, part: Loaded, max_tokens: int, *, columns: Sequence[str], texts: Sequence[str]
) -> Encoding:
    if part.form == "thumb":
        trees, kept, cut, refused = _encode_thumbs(tokenizer, part, max_tokens)
    else:
        rows: Any = part.rows
        encoded = encode_pairs(tokenizer, rows, max_tokens=max_tokens)
        trees, kept, cut, refused = [], [], encoded.cut, list(encoded.refused)
        for ids, place in zip(encoded.rows, encoded.kept, strict=True):
            try:
                trees.append(tree_of(tokenizer, rows[place], ids, columns, texts, max_tokens))
                kept.append(place)
            except InputError as error:
                refused.append((place, error.line()))
    if UNRELATED in columns and trees:
        trees = with_unrelated(trees, max_tokens)
    return trees, kept, cut, sorted(refused)


def _encode_thumbs(tokenizer: Any, part: Loaded, max_tokens: int) -> Encoding:
    rows: Any = part.rows
    encoded = encode_thumbs(tokenizer, rows, max_tokens=max_tokens)
    if not encoded.rows:
        return [], [], encoded.cut, list(encoded.refused)
    labels = [rows[place].label for place in encoded.kept]
    made = pair_thumbs(encoded.rows, labels, part.source)
    say(f"{sum(labels)} liked and {len(labels) - sum(labels)} disliked answers meet in {len(made)} pairs")
    return [tree for tree, _ in made], [encoded.kept[i] for _, i in made], encoded.cut, list(encoded.refused)


def _report(part: Loaded, trees: Sequence[Tree], cut: int, refused: Sequence[tuple[int, str]], max_tokens: int) -> None:
    """Say what was shortened or could not be used, and refuse a file of which nothing is left."""
    if refused:
        place, reason = refused[0]
        line = part.lines[place] if part.lines else place + 1
        if not trees:
            raise InputError(part.source, f"none of its {len(part.rows)} rows can be used; line {line}: {reason}")
        say(f"{part.source}: {len(refused)} of {len(part.rows)} rows are not used; first, line {line}: {reason}")
    if cut:
        say(f"{part.source}: {cut} of {len(part.rows)} rows were cut to {max_tokens} tokens")


def provenance(loaded: Sequence[Loaded], n_train: int) -> tuple[tuple[Input, ...], dict[str, str]]:
    """Inputs by digest; a file of a published data set brings the set's licences."""
    inputs: list[Input] = []
    licences: dict[str, str] = {}
    for i, part in enumerate(loaded):
        role = "data" if i < n_train else "valid"
        path = Path(part.source)
        home = next((folder for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None)
        if home is not None:
            licences |= open_artifact(home, check_digests=False).manifest.licences
        inputs.append(file_input(role, path, part.digest))
    return tuple(inputs), licences
