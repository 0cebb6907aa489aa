"""The exception tree: every failure a user can meet is one line with the value, the reason and the next command.

EdgealignError
├── CheckFailed      exit 1   something was measured and fell short
├── UsageError       exit 2   wrong use, or input that cannot be used
│   ├── RecipeError           an unknown key, a value out of its range
│   ├── InputError            a file, its rows, a model
│   ├── ArtifactError         a manifest, a digest, the wrong kind of directory
│   └── OutputError           the place to write to: exists, no permission, disk full
└── ToolMissing      exit 3   an optional library or program, with its install line
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EdgealignError(Exception):
    """`value`: what was given; `reason`: why it cannot be; `fix`: the command or change that helps."""

    exit_code = 1

    def __init__(self, value: object, reason: str, fix: str = "") -> None:
        self.value = str(value)
        self.reason = reason
        self.fix = fix
        super().__init__(self.line())

    def line(self) -> str:
        """The whole message on one line, whatever the parts contain."""
        text = f"{self.value}: {self.reason}" + (f"; {self.fix}" if self.fix else "")
        return " ".join(text.split())

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Survive the trip out of a child process."""
        return type(self), (self.value, self.reason, self.fix)


class CheckFailed(EdgealignError):
    """A measured value missed its tolerance: nothing was published."""

    exit_code = 1


class UsageError(EdgealignError):
    """Wrong use, or input that cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """An unknown key or a value that a recipe does not allow; all of a recipe's mistakes come in one error."""


class InputError(UsageError):
    """A file, its rows or a model cannot be used."""


class ArtifactError(UsageError):
    """A directory is not the artifact it should be."""


class OutputError(UsageError):
    """The result cannot be written where it was asked for."""


class ToolMissing(EdgealignError):
    """An optional part is not installed; `fix` is the line that installs it."""

    exit_code = 3


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors below `path` into an `OutputError`.

    Raises:
        OutputError: no permission, no space, a read-only file system, a file where a folder is needed.
    """
    reasons = {
        errno.ENOSPC: ("the disk is full", "free some space or choose another --out"),
        errno.EDQUOT: ("the disk quota is used up", "free some space or choose another --out"),
        errno.EACCES: ("no permission to write here", "choose another --out"),
        errno.EPERM: ("no permission to write here", "choose another --out"),
        errno.EROFS: ("the file system is read-only", "choose another --out"),
        errno.EEXIST: ("a part of the path is a file, not a folder", "choose another --out"),
        errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another --out"),
    }
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        reason, fix = reasons[error.errno]
        raise OutputError(error.filename or path, reason, fix) from error
