"""The last users' adapters, as a runtime has read them: switching back to one reads no file."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from edgealign.errors import InputError

KEPT = 16
Adapter = TypeVar("Adapter")


class AdapterCache(Generic[Adapter]):
    """At most `KEPT` adapters; a file that has changed since is another one.

    Args:
        read: makes an adapter of its file.
        free: gives back what `read` took, where forgetting it is not enough.
    """

    def __init__(self, read: Callable[[Path], Adapter], free: Callable[[Adapter], None] = lambda _: None) -> None:
        self._read, self._free = read, free
        self._kept: collections.OrderedDict[tuple[str, int, int], Adapter] = collections.OrderedDict()

    def get(self, path: Path) -> Adapter:
        """The adapter of a file, read if it is not here.

        Raises:
            InputError: there is no such file.
        """
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(path, "no such adapter file", "export the user's adapter first") from error
        key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        adapter = self._kept[key] = self._read(path)
        if len(self._kept) > KEPT:
            self._free(self._kept.popitem(last=False)[1])
        return adapter

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all of them."""
        while self._kept:
            self._free(self._kept.popitem()[1])


def check_base(path: Path, fitted: str, base: str, model: Path) -> None:
    """Refuse an adapter of another model; an empty digest is an unknown one.

    Args:
        fitted: digest of the model that the adapter was fitted on, or how it begins.
        base: digest of `model`.
    """
    if fitted and base and not base.startswith(fitted):
        reason = f"was fitted on the model {fitted[:12]}, {model.name} is {base[:12]}"
        raise InputError(path, reason, "fit it again on this model: edgealign personalize")
