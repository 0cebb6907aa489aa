"""Why a row cannot be used: a kind for counting, and a reason that never quotes the row's text."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {
    "json": "not one JSON object with plain values",
    "half": "the file was cut off here",
    "encoding": "byte-order mark, CR LF, not UTF-8, or half a character",
    "huge": "a line too long to be a row",
    "columns": "a column is missing, null or of the wrong type",
    "roles": "unknown roles, or turns that do not alternate",
    "empty": "a turn or answer without text",
    "same": "chosen equals rejected",
    "join": "the row it refers to does not exist",
}


class RowFault(Exception):
    """One row is unusable. Caught by the reader, never seen by a user as an exception."""

    def __init__(self, kind: str, reason: str) -> None:
        assert kind in KINDS, kind
        self.kind = kind
        self.reason = reason
        super().__init__(reason)


class Tie(Exception):
    """The row is sound and says that neither answer is better: counted, not a pair."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """`line` counts from 1, in JSONL the line and elsewhere the row; `file` where a source has several."""

    line: int
    reason: str
    kind: str = "json"
    file: str = ""

    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.file else f"line {self.line}"
