"""A session's state as bytes, and the refusal of every state that is not this session's.

    magic, version        16 bytes
    length of the header   4 bytes, little-endian
    header                JSON: what the state belongs to (model, user, runtime, cache), tokens, SHA-256 of the rest
    state                 the runtime's own bytes, or safetensors

A state under one user's weights is noise under another's, and native code reads these bytes without looking: so
everything is compared before any of it is loaded. Nothing is pickled. A state holds what the model remembers of its
tokens: keep it where the text itself might be kept.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

from edgealign.artifact import digest_files, list_files, sha256_file
from edgealign.errors import InputError, UsageError

MAGIC = b"edgealign state1"
LENGTH = struct.Struct("<I")
AGAIN = "feed the prompt again"
# In this order they are compared, so that the message names what matters most.
WORDS = {"runtime": "runtime", "model": "model", "user": "user", "version": "version", "cache": "cache"}


def pack(identity: Mapping[str, str], tokens: int, state: bytes) -> bytes:
    """A state with what it belongs to."""
    header = {**identity, "tokens": tokens, "sha256": hashlib.sha256(state).hexdigest()}
    raw = json.dumps(header, sort_keys=True).encode()
    return b"".join((MAGIC, LENGTH.pack(len(raw)), raw, state))


def unpack(data: bytes, identity: Mapping[str, str], *, context: int | None = None) -> tuple[int, bytes]:
    """The number of tokens and the state, if it belongs to `identity` and fits `context`.

    Raises:
        InputError: no state, a damaged one, or one of another model, user, runtime, version or kind of cache.
    """
    start = len(MAGIC) + LENGTH.size
    if not data.startswith(MAGIC):
        raise InputError("state", "these bytes are no session's state", AGAIN)
    try:
        (length,) = LENGTH.unpack(data[len(MAGIC) : start])
        header = json.loads(data[start : start + length])
        found = {name: str(header[name]) for name in WORDS}
        tokens, digest = int(header["tokens"]), str(header["sha256"])
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("state", "its header is damaged or cut off", AGAIN) from error
    for name, word in WORDS.items():
        if found[name] != identity[name]:
            reason = f"is of the {word} {_short(found[name])}, this session has {_short(identity[name])}"
            raise InputError("state", reason, AGAIN)
    state = data[start + length :]
    if hashlib.sha256(state).hexdigest() != digest:
        raise InputError("state", f"is damaged or cut off: its {len(state)} bytes have another digest", AGAIN)
    if context is not None and not 0 < tokens <= context:
        raise InputError("state", f"its {tokens} tokens do not fit the context of {context}", "open a larger context")
    return tokens, state


class UserMark:
    """Which adapter is on, by content; the digest is taken when it is needed, and only of what was switched on."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._stat: tuple[int, int] | None = None

    def set(self, path: Path | None) -> None:
        """Remember the adapter that was just switched on."""
        self._path, self._stat = path, None if path is None else _stat(path)

    def digest(self) -> str:
        """SHA-256 of the adapter, "" for the base.

        Raises:
            UsageError: its file has changed since: the weights that are on are no longer there to be named.
        """
        if self._path is None:
            return ""
        if _stat(self._path) != self._stat:
            raise UsageError(self._path, "has changed since it was switched on", "switch to it again")
        return _content(self._path)


def _content(path: Path) -> str:
    """SHA-256 of a file, or over a directory's files."""
    return sha256_file(path) if path.is_file() else digest_files(list(list_files(path, links=True)))


def _stat(path: Path) -> tuple[int, int]:
    newest = max([path, *path.iterdir()] if path.is_dir() else [path], key=lambda entry: entry.stat().st_mtime_ns)
    return newest.stat().st_mtime_ns, newest.stat().st_size


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value or "base"
