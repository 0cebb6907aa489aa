"""Talk and progress on stderr: stdout is kept for data.

A bar appears once a loop has run for two seconds; without a terminal it is a plain line every ten seconds.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

SHOW_AFTER_S = 2.0
LINE_EVERY_S = 10.0

T = TypeVar("T")
Advance = Callable[[int, str], None]


def say(message: str) -> None:
    """Print one line of talk; of several processes (torchrun) only the first talks."""
    if is_first_process():
        print(message, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this is process 0 of its run, which alone talks and publishes (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def hush_libraries() -> None:
    """Drop what torchao says when PEFT or ExecuTorch imports it: its GPU kernels are missing, its enums odd."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(_is_an_error)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own, which it shows for every file it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def track(iterable: Iterable[T], *, total: int | None = None, label: str) -> Iterator[T]:
    """Yield the items and show how far the loop is."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(total=total, label=label) as advance:
        for item in iterable:
            yield item
            advance(1, "")


def _is_an_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def bar(*, total: int | None, label: str) -> Iterator[Advance]:
    """Yield `advance(steps, note)`; the note stands after the bar (a loss, a speed)."""
    shown = _Terminal(total, label) if sys.stderr.isatty() and is_first_process() else _Lines(total, label)
    try:
        yield shown.advance
    finally:
        shown.close()


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, total: int | None, label: str) -> None:
        self.total, self.label = total, label
        self.done = 0
        self.last_s = time.monotonic()

    def advance(self, steps: int, note: str) -> None:
        self.done += steps
        if time.monotonic() - self.last_s >= LINE_EVERY_S:
            self.last_s = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            say(f"{self.label}: {self.done}{of} {note}".rstrip())

    def close(self) -> None:
        """Nothing to clean up: lines stay."""


class _Terminal:
    """A rich bar that waits two seconds before it appears."""

    def __init__(self, total: int | None, label: str) -> None:
        self.total, self.label = total, label
        self.done = 0
        self.start_s = time.monotonic()
        self.live: _RichBar | None = None

    def advance(self, steps: int, note: str) -> None:
        self.done += steps
        if self.live is None and time.monotonic() - self.start_s >= SHOW_AFTER_S:
            self.live = _RichBar(self.total, self.label)
        if self.live is not None:
            self.live.set(self.done, note)

    def close(self) -> None:
        if self.live is not None:
            self.live.close()


class _RichBar:
    """rich.progress on stderr, imported only when a bar is really shown."""

    def __init__(self, total: int | None, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task(label, total=total, note="")
        self.progress.start()

    def set(self, done: int, note: str) -> None:
        self.progress.update(self.task, completed=done, note=note)

    def close(self) -> None:
        self.progress.stop()
