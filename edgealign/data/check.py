"""`edgealign data check`: what is in a source, what is wrong with it, and what training on it would teach by accident.

Nothing here changes the data. Bad rows are reported, not raised: a source is refused only where nothing can be read.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.data.forms import Pair, Row, Thumb, texts, user_of
from edgealign.data.lengths import Size, length_bias, measure, percentiles, thumb_bias
from edgealign.data.markers import MARKERS, find_markers
from edgealign.data.read import Loaded, scan
from edgealign.data.report import render
from edgealign.errors import InputError
from edgealign.progress import track

__all__ = ["check", "render"]


def check(
    source: str | Path,
    *,
    model: str | Path | None = None,
    mapping: Mapping[str, str] | None = None,
    context: int | None = None,
    form: str | None = None,
) -> dict[str, Any]:
    """Look at every row; the result is JSON and holds no text of the data.

    With a `model` lengths are tokens of its template and rows that the template refuses are listed; `context` is
    the length to compare with (default: the model's own).

    Raises:
        InputError: nothing readable, no row at all, or columns that are no known form.
    """
    loaded = scan(source, form=form, mapping=mapping)
    tok = _tokenizer(model)
    measured = [measure(tok, row) for row in track(loaded.rows, total=len(loaded.rows), label="measuring")]
    sized = [(row, size) for row, size in zip(loaded.rows, measured, strict=True) if isinstance(size, Size)]
    kinds = Counter(row.kind for row in loaded.bad)
    report: dict[str, Any] = {
        "source": loaded.source,
        "digest": loaded.digest,
        "form": loaded.form,
        "shape": loaded.shape,
        "total": loaded.total,
        "rows": len(loaded.rows),
        "ties": loaded.ties,
        "bad_rows": [
            {"file": row.file, "line": row.line, "kind": row.kind, "reason": row.reason} for row in loaded.bad
        ],
        "bad_kinds": dict(sorted(kinds.items())),
        "chosen_equals_rejected": kinds["same"],
        "empty_turns": kinds["empty"],
        "duplicates": _duplicates(loaded),
        "contradictions": _contradictions(loaded),
        "markers": _markers(loaded, tok),
        "unused_columns": list(loaded.unused),
        "model": None if model is None else str(model),
        "unit": "words" if tok is None else "tokens",
        "refused_by_template": [
            {"line": line, "reason": size.line()}
            for line, size in zip(loaded.lines, measured, strict=True)
            if isinstance(size, InputError)
        ],
        "lengths": _lengths([size for _, size in sized], context if context is not None else _context(model)),
        "length_bias": _length_bias(sized),
        "users": _users(loaded.rows),
    }
    report["ok"] = not (report["bad_rows"] or report["refused_by_template"]) and bool(loaded.rows)
    return report


def _tokenizer(model: str | Path | None) -> Any | None:
    if model is None:
        return None
    from edgealign.models.load import load_tokenizer

    return load_tokenizer(model)


def _context(model: str | Path | None) -> int | None:
    """The longest input that the model's config names."""
    if model is None:
        return None
    from edgealign.models.load import resolve_model

    config = resolve_model(model) / "config.json"
    if not config.is_file():
        return None
    length = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def _lengths(sizes: Sequence[Size], context: int | None) -> dict[str, Any] | None:
    if not sizes:
        return None
    wholes = [size.whole for size in sizes]
    return {
        **percentiles(wholes),
        "sum": sum(wholes),
        "context": context,
        "over_context": None if context is None else sum(whole > context for whole in wholes),
    }


def _length_bias(sized: Sequence[tuple[Row, Size]]) -> dict[str, Any] | None:
    pairs = [(size.answers[0], size.answers[1]) for row, size in sized if isinstance(row, Pair)]
    if pairs:
        return length_bias(pairs)
    thumbs = [(row.label, size.answers[0]) for row, size in sized if isinstance(row, Thumb)]
    return thumb_bias([label for label, _ in thumbs], [size for _, size in thumbs]) if thumbs else None


def _duplicates(loaded: Loaded) -> dict[str, Any]:
    """Rows that are equal in everything that training sees (the user included)."""
    places: dict[Row, list[int]] = defaultdict(list)
    for row, line in zip(loaded.rows, loaded.lines, strict=True):
        places[row].append(line)
    groups = [lines for lines in places.values() if len(lines) > 1]
    return {"rows": sum(len(lines) - 1 for lines in groups), "groups": groups}


def _contradictions(loaded: Loaded) -> list[list[int]]:
    """Pairs of one person (or of nobody) that prefer both of two answers."""
    first: dict[tuple[object, ...], int] = {}
    found = []
    for row, line in zip(loaded.rows, loaded.lines, strict=True):
        if isinstance(row, Pair):
            first.setdefault((row.user_id, row.prompt, row.chosen, row.rejected), line)
            opposite = first.get((row.user_id, row.prompt, row.rejected, row.chosen))
            if opposite is not None:
                found.append([opposite, line])
    return found


def _markers(loaded: Loaded, tok: Any | None) -> list[dict[str, Any]]:
    """Chat-template markers in the text, with the number of rows and the first line of each."""
    rows: Counter[str] = Counter()
    first: dict[str, int] = {}
    for row, line in zip(loaded.rows, loaded.lines, strict=True):
        for marker in {marker for text in texts(row) for marker in find_markers(text)}:
            rows[marker] += 1
            first.setdefault(marker, line)
    own = set() if tok is None else {str(token) for token in tok.added_tokens_decoder.values()}
    return [
        {
            "marker": marker, "template": MARKERS[marker], "rows": count, "first_line": first[marker],
            "token_of_this_model": marker in own,
        }
        for marker, count in sorted(rows.items(), key=lambda found: (-found[1], found[0]))
    ]


def _users(rows: Sequence[Row]) -> dict[str, Any] | None:
    choices = Counter(user for row in rows if (user := user_of(row)) is not None)
    if not choices:
        return None
    counts = sorted(choices.values())
    return {
        "count": len(counts),
        "choices_min": counts[0],
        "choices_median": statistics.median(counts),
        "choices_max": counts[-1],
        "with_at_least_4": sum(count >= 4 for count in counts),
        "with_at_least_20": sum(count >= 20 for count in counts),
        "rows_without_user": sum(user_of(row) is None for row in rows),
    }
