"""Any readable source to rows of one form; nothing is dropped without being counted.

A row is used, or it is a tie (counted), or it is bad: then it has a line number and a reason, and the whole source is
refused until somebody says how many rows may be lost (`skip_bad`, on the command line `--skip-bad N`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from edgealign.data.convert import SHAPES, Shape
from edgealign.data.faults import BadRow, RowFault, Tie
from edgealign.data.forms import FORMS, Row
from edgealign.data.mapping import ColumnMap
from edgealign.data.sources import Record, Source, open_source
from edgealign.errors import InputError

__all__ = ["BadRow", "Loaded", "read", "read_all", "scan"]

SAMPLE_ROWS = 64  # how many rows vote on the shape of a file
PLURALS = {"conversation": "conversations", "text": "plain text", "pair": "preference pairs", "thumb": "thumbs"}


@dataclass(frozen=True)
class Loaded:
    """What a source holds. `lines[i]` is where `rows[i]` stands; `ties` are sound rows that prefer neither answer."""

    form: str
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    source: str
    digest: str
    ties: int = 0
    lines: tuple[int, ...] = ()
    shape: str = ""
    unused: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All rows of the source: used, tied and bad."""
        return len(self.rows) + self.ties + len(self.bad)


def read(
    source: str | Path,
    *,
    form: str | None = None,
    mapping: Mapping[str, str] | None = None,
    skip_bad: int | None = None,
    limit: int | None = None,
) -> Loaded:
    """Read JSONL, Parquet, a Hugging Face dataset directory or a hub id (`NAME:SPLIT` picks a split).

    `form`: refuse any other. `mapping`: their column to ours; dots reach inside, "-" hides the column.
    `skip_bad`: exactly how many bad rows may be left out. `limit`: look at the first rows only.

    Raises:
        InputError: no such source, no row, unknown columns, another form, or bad rows that nobody has accepted.
    """
    loaded = scan(source, form=form, mapping=mapping, limit=limit)
    _accept([loaded], skip_bad)
    return loaded


def read_all(
    sources: Sequence[str | Path],
    *,
    form: str | None = None,
    mapping: Mapping[str, str] | None = None,
    skip_bad: int | None = None,
    limit: int | None = None,
) -> tuple[Loaded, ...]:
    """Several sources; `skip_bad` counts the bad rows of all of them together."""
    loaded = tuple(scan(source, form=form, mapping=mapping, limit=limit) for source in sources)
    _accept(loaded, skip_bad)
    return loaded


def scan(
    source: str | Path, *, form: str | None = None, mapping: Mapping[str, str] | None = None, limit: int | None = None
) -> Loaded:
    """Like `read`, but bad rows are only listed: what `edgealign data check` looks at.

    Raises:
        InputError: no such source, no row at all, unknown columns, another form than asked for.
    """
    if form is not None and form not in FORMS:
        raise InputError(form, "is not a form of data", f"choose one of {', '.join(FORMS)}")
    opened = open_source(source)
    columns = ColumnMap(mapping or {})
    records = (_mapped(record, columns) for record in islice(opened.records(), limit))
    sample = list(islice(records, SAMPLE_ROWS))
    if not sample:
        raise InputError(source, "is empty: it has no rows", "give a file with one JSON object per line")
    shape = _choose_shape(source, form, sample, columns)
    loaded = _convert(opened, shape, chain(sample, records))
    columns.check(source)
    return loaded


def _mapped(record: Record, columns: ColumnMap) -> Record:
    if isinstance(record.value, RowFault):
        return record
    return Record(record.file, record.line, columns.apply(record.value))


def _choose_shape(source: str | Path, form: str | None, sample: Sequence[Record], columns: ColumnMap) -> Shape:
    """The shape that most of the first rows have, so that one incomplete row does not decide."""
    rows = [record.value for record in sample if not isinstance(record.value, RowFault)]
    if not rows:  # not one could be parsed: all of them will be listed as bad
        return next(shape for shape in SHAPES if form in (None, shape.form))
    votes: Counter[int] = Counter()
    for row in rows:
        fitting = next((rank for rank, shape in enumerate(SHAPES) if shape.fits(row)), None)
        if fitting is not None:
            votes[fitting] += 1
    if not votes:
        columns.check(source)
        known = "; ".join(sorted({"+".join(shape.required) for shape in SHAPES if shape.common}))
        raise InputError(
            source, f"the columns {', '.join(sorted(rows[0])) or '(none)'} are no known form ({known})",
            "name the columns with --map THEIRS=OURS",
        )
    shape = SHAPES[min(votes, key=lambda rank: (-votes[rank], rank))]
    if form is not None and shape.form != form:
        raise InputError(
            source, f"holds {PLURALS[shape.form]} ({', '.join(shape.required)}), not {PLURALS[form]}",
            "give another file, or rename columns with --map THEIRS=OURS (THEIRS=- hides a column)",
        )
    return shape


def _convert(opened: Source, shape: Shape, records: Iterable[Record]) -> Loaded:
    rows: list[Row] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    ties = 0
    seen: set[str] = set()
    partner, digest = _partner(opened, shape)
    for record in records:
        if isinstance(record.value, RowFault):
            bad.append(_bad(record, record.value))
            continue
        seen.update(record.value)
        try:
            rows.append(shape.convert(shape.join(record.value, partner)))
            lines.append(record.line)
        except Tie:
            ties += 1
        except RowFault as fault:
            bad.append(_bad(record, fault))
    unused = tuple(sorted(seen - set(shape.required) - set(shape.optional)))
    return Loaded(
        shape.form, tuple(rows), tuple(bad), opened.name, digest, ties, tuple(lines), shape.name, unused
    )


def _partner(opened: Source, shape: Shape) -> tuple[dict[Any, Mapping[str, Any]], str]:
    """The rows of the file that this one refers to, by key, and the digest of what was read in all."""
    if shape.partner is None:
        return {}, opened.digest()
    beside = opened.beside(shape.partner)
    joined: dict[Any, Mapping[str, Any]] = {
        record.value[shape.key]: record.value
        for record in beside.records()
        if not isinstance(record.value, RowFault) and isinstance(record.value.get(shape.key), str)
    }
    both = f"{opened.digest()} {beside.digest()}"
    return joined, hashlib.sha256(both.encode()).hexdigest()


def _bad(record: Record, fault: RowFault) -> BadRow:
    return BadRow(record.line, fault.reason, fault.kind, record.file)


def _accept(loaded: Sequence[Loaded], skip_bad: int | None) -> None:
    """Refuse bad rows unless exactly their number is accepted, and refuse when no row is left."""
    bad = sum(len(one.bad) for one in loaded)
    where = ", ".join(one.source for one in loaded)
    if bad and bad != skip_bad:
        first = next(one for one in loaded if one.bad)
        row = first.bad[0]
        total = sum(one.total for one in loaded)
        counted = f"{bad} of {total} rows {'is' if bad == 1 else 'are'} bad"
        if skip_bad is not None:
            counted += f", not the {skip_bad} that --skip-bad accepts"
        raise InputError(
            first.source, f"{counted}; the first is {row.where()} ({row.reason})",
            f"list them with: edgealign data check {first.source} , then mend them or leave them out with "
            f"--skip-bad {bad}",
        )
    if skip_bad and not bad:
        raise InputError(where, f"no row is bad, but --skip-bad accepts {skip_bad}", "leave --skip-bad out")
    for one in loaded:
        if not one.rows:
            raise InputError(one.source, "no usable row is left", f"look at: edgealign data check {one.source}")
