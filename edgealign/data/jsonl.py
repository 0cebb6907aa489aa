"""Strict JSON Lines: every line is either one JSON object or a fault with its line number.

Python's own parser accepts NaN, keeps the last of two equal keys and lets half a surrogate pair through; each of
these has ended in a training set before (a NaN margin, a lost answer, a crash in the tokenizer hours later).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from edgealign.data.faults import RowFault
from edgealign.errors import InputError

MAX_LINE_BYTES = 64 * 2**20
SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")

_BOM = b"\xef\xbb\xbf"
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    """Yield (line number from 1, object or fault) for every line, blank ones included.

    Raises:
        InputError: the file cannot be opened, or is not gzip although its name says so.
    """
    number = 0
    try:
        with _open(path) as stream:
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    _skip_line(stream)
                    yield number, RowFault("huge", f"the line is longer than {MAX_LINE_BYTES / 2**20:g} MiB")
                    continue
                try:
                    yield number, parse_line(raw, first=number == 1)
                except RowFault as fault:
                    yield number, fault
    except EOFError:
        yield number + 1, RowFault("half", "the gzip data ends early: this row and all after it are lost")
    except (gzip.BadGzipFile, zlib.error):
        yield number + 1, RowFault("half", "the gzip data is damaged: this row and all after it are lost")
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror or error})", "give a readable file") from error


def parse_line(raw: bytes, *, first: bool = False) -> dict[str, Any]:
    """One line, with its newline, to one object.

    Raises:
        RowFault: anything but one JSON object on a line of UTF-8 that ends in LF.
    """
    whole = raw.endswith(b"\n")
    line = raw[:-1] if whole else raw
    if first and line.startswith(_BOM):
        raise RowFault("encoding", "starts with a byte-order mark: save the file as UTF-8 without BOM")
    if line.endswith(b"\r"):
        raise RowFault("encoding", "ends in CR LF: convert the line ends with dos2unix")
    if not line.strip():
        raise RowFault("json", "the line is blank")
    try:
        row = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        if not whole and error.reason == "unexpected end of data":
            raise RowFault("half", "half a line: the file ends inside a character") from error
        raise RowFault("encoding", f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start + 1}") from error
    except json.JSONDecodeError as error:
        if not whole:
            raise RowFault("half", "half a line: the file ends inside a JSON value") from error
        if first and line.startswith(b"["):
            raise RowFault("json", "a JSON array over many lines: make it JSON Lines with jq -c '.[]'") from error
        raise RowFault("json", f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise RowFault("json", "nested too deeply") from error
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise RowFault("json", "holds a number with thousands of digits") from error
    if not isinstance(row, dict):
        raise RowFault("json", f"a JSON {_json_type(row)}, not an object with columns")
    if _SURROGATE_ESCAPE.search(line) and not _encodable(row):
        raise RowFault("encoding", "holds a lone surrogate (half a character)")
    return cast(dict[str, Any], row)


def _open(path: Path) -> BinaryIO:
    if path.suffix != ".gz":
        return path.open("rb", buffering=2**20)
    with path.open("rb") as stream:
        magic = stream.read(2)
    if magic not in (b"", b"\x1f\x8b"):
        raise InputError(path, "is not gzip data", "rename it without .gz, or compress it again")
    # no buffer of ours around it: what was unpacked before a damaged place would be lost with it
    return cast(BinaryIO, gzip.open(path, "rb"))


def _skip_line(stream: BinaryIO) -> None:
    while (piece := stream.readline(2**20)) and not piece.endswith(b"\n"):
        pass


def _no_constant(name: str) -> NoReturn:
    raise RowFault("json", f"holds {name}, which is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        raise RowFault("json", "has the same key twice in one object")
    return built


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique_keys)


def _encodable(row: object) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)
