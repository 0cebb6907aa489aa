"""How fast training is against what the machine could do, and whether compiling the model is worth its minute.

Work per token: 6 operations per parameter (forward and backward of a multiply-add; a tied embedding counts once, for
the output projection) and 6 T d per attention layer for the scores and their sum, half a row on average. The peak is
measured, not looked up: one large matrix product in the training precision, on the device at hand.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgealign.train.recipes import PretrainRecipe, TrainRecipe
from edgealign.train.rows import Rows

PEAK_SIZE = 1536  # 7 GFLOP per product: long enough to be at full speed, short enough not to be noticed
PEAK_SECONDS = 0.4
COMPILE_WORTH_TOKENS = 1_000_000  # compiling takes about a minute on two cores and gains about a third


@dataclass(frozen=True)
class Speed:
    """`flops_per_token`: of one optimizer step; `peak_flops`: measured, 0 where it was not."""

    flops_per_token: float
    peak_flops: float

    @staticmethod
    def of(model: nn.Module, passes: Any, task: Any) -> Speed:
        """Measure the machine for a run on rows; other runs do not report a share."""
        rows = task.trees
        if not isinstance(rows, Rows):
            return Speed(0.0, 0.0)
        dtype = torch.bfloat16 if passes.precision.autocast else torch.float32
        return Speed(training_flops(model, rows.width), matmul_flops(next(model.parameters()).device, dtype))

    def share(self, tok_per_s: float) -> float:
        """Share of the measured peak, 0 where nothing was measured."""
        return self.flops_per_token * tok_per_s / self.peak_flops if self.peak_flops else 0.0


def training_flops(model: nn.Module, width: int) -> float:
    """Operations per token of a forward and backward pass over rows of `width` tokens."""
    config: Any = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attention = int(sum(kind != "conv" for kind in kinds))
    parameters = int(sum(p.numel() for p in model.parameters()))
    if not config.tie_word_embeddings:
        parameters -= int(config.vocab_size * config.hidden_size)
    return 6.0 * parameters + 6.0 * width * int(config.hidden_size) * attention


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product here and now."""
    left = torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=dtype, device=device)
    best = float("inf")
    until = time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < until:
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * PEAK_SIZE**3 / best


def wants_compiling(recipe: TrainRecipe, task: Any, n_steps: int) -> bool:
    """Whether this run compiles its model: asked for, or automatic, long enough and with a compiler at hand."""
    if not isinstance(recipe, PretrainRecipe) or recipe.compile == "off":
        return False
    if recipe.compile == "on":
        return True
    able = torch.cuda.is_available() or shutil.which("g++") is not None or shutil.which("clang++") is not None
    return able and n_steps * recipe.batch_size * recipe.max_tokens >= COMPILE_WORTH_TOKENS
