"""Checkpoints of a run: whole or not there.

A kill can come while a checkpoint is written. So the last thing written into one is a `complete` marker, after
every file has been flushed to the disk; what has no marker is deleted and never read. Only when a new checkpoint
is complete does the old one go.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from edgealign.artifact import write_atomic
from edgealign.errors import OutputError
from edgealign.progress import is_first_process
from edgealign.train import processes

MARKER = "complete"
PREFIX = "checkpoint-"
STATE = "task_state.safetensors"
DISK_FULL_SIGNS = ("No space left", "os error 28", "PytorchStreamWriter failed", "inline_container.cc")
WORTH_KEEPING_S = 20.0  # a run shorter than this is repeated rather than saved at its end


def newest_complete(work: Path) -> Path | None:
    """The newest whole checkpoint below `work`; halves are deleted."""
    best: tuple[int, Path] | None = None
    for folder in sorted(work.glob(f"{PREFIX}*")):
        step = folder.name.removeprefix(PREFIX)
        if not step.isdigit() or not (folder / MARKER).is_file():
            shutil.rmtree(folder, ignore_errors=True)
        elif best is None or int(step) > best[0]:
            best = (int(step), folder)
    return None if best is None else best[1]


def read_state(checkpoint: Path) -> dict[str, Tensor]:
    """What the task remembered; nothing for most."""
    file = checkpoint / STATE
    found: dict[str, Tensor] = load_file(file) if file.is_file() else {}
    return found


def mark_complete(folder: Path) -> None:
    """Flush everything in a checkpoint, then say so, then remove the older ones."""
    for path in [*sorted(folder.rglob("*")), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    write_atomic(folder / MARKER, folder.name + "\n")
    for other in folder.parent.glob(f"{PREFIX}*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


@contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """torch and safetensors report a failed write in words of their own; here it is an `OutputError` like any other.

    Raises:
        OutputError: the disk below `out` is full.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in DISK_FULL_SIGNS):
            raise
        raise OutputError(out, "the disk is full", "free some space or choose another --out") from error


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Asks the trainer for a checkpoint when one is due, and marks it once it is whole.

    Args:
        state: what the task remembers besides the weights; written into every checkpoint.
    """

    def __init__(
        self, work: Path, *, every_s: float, every_steps: int, state: Mapping[str, Tensor] | None = None
    ) -> None:
        self.work, self.every_s, self.every_steps, self.state = work, every_s, every_steps, state
        self.started_s = self.saved_s = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started_s = self.saved_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now_s = time.monotonic()
        by_time = self.every_s > 0 and now_s - self.saved_s >= self.every_s
        by_steps = self.every_steps > 0 and state.global_step % self.every_steps == 0
        at_end = state.global_step >= state.max_steps and now_s - self.started_s >= WORTH_KEEPING_S
        if processes.first_says(by_time or by_steps or at_end):  # saving is done together
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes.wait()  # every process has written its part
        if is_first_process():
            if self.state:
                save_file(dict(self.state), self.work / f"{PREFIX}{state.global_step}" / STATE)
            mark_complete(self.work / f"{PREFIX}{state.global_step}")
        self.saved_s = time.monotonic()
