"""The log of a run: one JSON line per optimizer step, and the same numbers for TensorBoard.

Both are written while the run goes on, into the work directory. After a resume they are written anew from the
history that the checkpoint brought, so a log never has a gap or a step twice. TensorBoard's own writer puts the
host's name and the process id into its file name; these records go into a file with a plain one.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from transformers import TrainerCallback

from edgealign.progress import Advance

LOG_FILE = "log.jsonl"
TENSORBOARD_FILE = "tensorboard/events.out.tfevents.0.edgealign"
NOT_SCALARS = {"step", "epoch"}


class LogCallback(TrainerCallback):  # type: ignore[misc]
    """Writes what the trainer logs, and moves the progress bar."""

    def __init__(self, work: Path, advance: Advance) -> None:
        self.work, self.advance = work, advance
        self.lines: TextIO | None = None
        self.events: _Events | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lines = (self.work / LOG_FILE).open("w", encoding="utf-8")
        self.events = _Events(self.work / TENSORBOARD_FILE)
        for row in step_rows(state.log_history):
            self._write(row)
        self.advance(state.global_step, "")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if is_step(row):
            self._write(row)
            self.advance(1, f"loss {row['loss']:.4f}")

    def close(self) -> None:
        """Also after an error: whoever runs the trainer calls it."""
        if self.lines is not None:
            self.lines.close()
        if self.events is not None:
            self.events.close()

    def copy_to(self, folder: Path) -> None:
        """Put both files into a published directory."""
        shutil.copyfile(self.work / LOG_FILE, folder / LOG_FILE)
        (folder / TENSORBOARD_FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(self.work / TENSORBOARD_FILE, folder / TENSORBOARD_FILE)

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self.lines is not None
        assert self.events is not None
        self.lines.write(json.dumps(row, sort_keys=True) + "\n")
        self.lines.flush()
        self.events.add({k: float(v) for k, v in row.items() if k not in NOT_SCALARS}, step=int(row["step"]))


def is_step(row: Mapping[str, Any]) -> bool:
    """Whether a row of the history belongs to one optimizer step (the trainer adds a summary at the end)."""
    return "loss" in row and "step" in row


def step_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of optimizer steps, in order."""
    return [row for row in history if is_step(row)]


class _Events:
    """A TensorBoard event file at a path of our choice."""

    def __init__(self, file: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        file.parent.mkdir(exist_ok=True)
        self.stream: BinaryIO = file.open("wb")
        self.writer = RecordWriter(self.stream)
        self.writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def add(self, scalars: Mapping[str, float], *, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=f"train/{name}", simple_value=value) for name, value in sorted(scalars.items())]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self.writer.write(event.SerializeToString())
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
