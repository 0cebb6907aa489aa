"""A session without a model: logits are a fixed function of the tokens and the user, or follow a script.

It is the double for tests of generation, parity and the child process. ``fault`` rehearses what goes wrong in
real runtimes: state that survives a swap, an adapter that is loaded and ignored, a native crash.
"""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.errors import RecipeError, UsageError
from edgealign.registry import suggest

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

FAULTS = ("", "stale_after_swap", "stale_after_reset", "ignored_adapter", "crash", "hang")


class ScriptedSession:
    """Logits (V,) that depend on every token of the state and on the user, bit for bit reproducible.

    Args:
        script: tokens to favour, in the order of the calls since the state was emptied.
        fault: one of ``FAULTS``; ``crash`` kills this process with SIGSEGV once the state has ``fault_after`` tokens.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        vocab: int = 32,
        script: Sequence[int] = (),
        fault: str = "",
        fault_after: int = 0,
    ) -> None:
        if fault not in FAULTS:
            raise RecipeError(fault, f"is not a known fault{suggest(fault, FAULTS)}", f"choose one of: {FAULTS}")
        self.path = path
        self.vocab = vocab
        self.script = tuple(script)
        self.fault, self.fault_after = fault, fault_after
        self.user = ""
        self.tokens: list[int] = []
        self.calls = 0

    def prefill(self, tokens: Sequence[int]) -> Logits:
        if not tokens:
            raise UsageError("prefill", "got no tokens", "give at least one")
        for token in tokens:
            if not 0 <= token < self.vocab:
                raise UsageError(token, f"is outside the vocabulary of {self.vocab}", "encode with this tokenizer")
        self.tokens.extend(tokens)
        self._misbehave()
        logits = self._logits()
        self.calls += 1
        return logits

    def step(self, token: int) -> Logits:
        return self.prefill((token,))

    def set_user(self, adapter: Path | None) -> None:
        if self.fault != "ignored_adapter":
            self.user = "" if adapter is None else Path(adapter).name
        if self.fault != "stale_after_swap":
            self._empty()

    def reset(self) -> None:
        if self.fault != "stale_after_reset":
            self._empty()

    def close(self) -> None:
        self._empty()

    def info(self) -> dict[str, Any]:
        return {"runtime": "scripted", "vocab": self.vocab}

    def _empty(self) -> None:
        self.tokens.clear()
        self.calls = 0

    def _logits(self) -> Logits:
        seed = zlib.crc32(repr((self.user, self.tokens)).encode())
        logits = np.random.default_rng(seed).standard_normal(self.vocab, dtype=np.float32)
        if self.calls < len(self.script):
            logits[self.script[self.calls]] += 100.0
        return logits

    def _misbehave(self) -> None:
        if len(self.tokens) < self.fault_after:
            return
        if self.fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.fault == "hang":
            signal.pause()
