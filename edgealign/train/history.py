"""Held-out loss on the way: one JSON line per evaluation, so that a picture can show loss against tokens.

`history.jsonl` rows: `tokens` learned from so far, `seconds` of training (evaluations excluded), `loss` in nats per
token on the held-out rows, `step`. The first row is the untrained model's. After a resume the rows up to the
checkpoint stay and the rest are made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from edgealign.artifact import write_atomic
from edgealign.progress import is_first_process, say
from edgealign.train.log import is_step, step_rows
from edgealign.train.recipes import PretrainRecipe, TrainRecipe

HISTORY_FILE = "history.jsonl"


def history_steps(recipe: TrainRecipe) -> int:
    """Optimizer steps between evaluations; 0: none."""
    if not isinstance(recipe, PretrainRecipe) or not recipe.eval_every_tokens:
        return 0
    return max(1, round(recipe.eval_every_tokens / (recipe.batch_size * recipe.max_tokens)))


class HistoryCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates at the start, every `every` steps and at the end; of several processes the first writes."""

    def __init__(self, work: Path, every: int, evaluate: Callable[[], Mapping[str, float]]) -> None:
        self.file, self.every, self.evaluate = work / HISTORY_FILE, every, evaluate
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows = [row for row in read_history(self.file) if row["step"] <= state.global_step]
        if not self.rows:
            self._add(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Here and not at the end of a step: its row of the log, with its tokens, is there only now."""
        due = state.global_step % self.every == 0 and state.global_step < state.max_steps
        if due and is_step(state.log_history[-1]):
            self._add(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rows[-1]["step"] < state.global_step:
            self._add(state)

    def _add(self, state: Any) -> None:
        with torch.compiler.set_stance("force_eager"):  # another graph for a few passes costs more than it saves
            loss = self.evaluate()["loss"]
        past = step_rows(state.log_history)
        row = {
            "step": state.global_step,
            "tokens": round(sum(entry["tokens"] for entry in past)),
            "seconds": round(sum(entry["tokens"] / entry["tok_per_s"] for entry in past), 1),
            "loss": round(loss, 5),
        }
        self.rows.append(row)
        if not is_first_process():
            return
        write_atomic(self.file, "".join(json.dumps(entry) + "\n" for entry in self.rows))
        say(f"{row['tokens']:,} tokens, {row['seconds']:,.0f} s: held-out loss {row['loss']:.4f} nats per token")


def read_history(file: Path) -> list[dict[str, float]]:
    """The rows of a history file, none if there is no such file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


