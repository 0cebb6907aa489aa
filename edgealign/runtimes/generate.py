"""One generation loop over any session: logits hooks, penalties, sampling, stop tokens, timing.

The order is that of transformers (hooks, repetition penalty, temperature, top-k, top-p, min-p), so that a
recommended setting means the same here as where it was published. The loop feeds every token but the last:
after ``generate`` the session's state holds the prompt and ``tokens[:-1]``.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgealign.errors import UsageError
from edgealign.runtimes.recipes import Sampling

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.runtimes.session import Logits, Session

# A hook sees the tokens so far (prompt included) and the logits (V,), and returns the logits to use.
LogitsHook: TypeAlias = "Callable[[Sequence[int], Logits], Logits]"

GREEDY = Sampling(temperature=0.0, min_p=0.0, repetition_penalty=1.0)


@dataclass(frozen=True)
class Generated:
    """New tokens (the stop token is not among them), why it ended, and how long it took."""

    tokens: tuple[int, ...]
    finish: str  # "stop", "length" or "cancelled"
    stop_token: int | None
    prompt_tokens: int
    ttft_s: float
    decode_s: float

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens after the first, per second; 0 where there were none."""
        steps = len(self.tokens) - 1 + (self.stop_token is not None)
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else 0.0


def generate(
    session: Session,
    prompt: Sequence[int],
    *,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    hooks: Iterable[LogitsHook] = (),
    on_token: Callable[[int], bool | None] | None = None,
    before: Sequence[int] = (),
) -> Generated:
    """Feed ``prompt`` to the session and draw tokens until a stop token, the limit, or ``on_token`` returns False.

    The session is not reset: a prompt continues what is in its state. ``before`` names the tokens that are in it, so
    that hooks and the repetition penalty see the same history as if all had been fed at once.
    """
    if not prompt:
        raise UsageError("prompt", "is empty", "give at least one token")
    rng = np.random.default_rng(sampling.seed)
    hooks = tuple(hooks)
    history, tokens = [*before, *prompt], list[int]()
    finish, stop_token = "length", None
    start_s = time.perf_counter()
    first_s = start_s
    logits = session.prefill(prompt)
    while True:
        for hook in hooks:
            logits = hook(history, logits)
        token = draw(logits, history, sampling, rng)
        if not tokens:
            first_s = time.perf_counter()
        if token in stop:
            finish, stop_token = "stop", token
            break
        tokens.append(token)
        history.append(token)
        if on_token is not None and on_token(token) is False:
            finish = "cancelled"
            break
        if len(tokens) >= sampling.max_tokens:
            break
        logits = session.step(token)
    end_s = time.perf_counter()
    return Generated(tuple(tokens), finish, stop_token, len(prompt), first_s - start_s, end_s - first_s)


def draw(logits: Logits, history: Sequence[int], sampling: Sampling, rng: np.random.Generator) -> int:
    """One token from logits (V,)."""
    if sampling.repetition_penalty != 1.0:
        logits = penalise(logits, history, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return int(np.argmax(logits))
    kept, probabilities = distribution(logits, sampling)
    # The inverse of the distribution function, so that one draw costs one random number on any platform.
    place = np.searchsorted(np.cumsum(probabilities), rng.random(), side="right")
    return int(kept[min(int(place), len(kept) - 1)])


def penalise(logits: Logits, history: Sequence[int], penalty: float) -> Logits:
    """Divide positive and multiply negative logits of seen tokens by ``penalty``."""
    seen = np.unique(np.asarray(history, dtype=np.int64))
    logits = logits.copy()
    values = logits[seen]
    logits[seen] = np.where(values < 0, values * penalty, values / penalty)
    return logits


def distribution(
    logits: Logits, sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that the filters keep, likeliest first, and their probabilities (they add up to 1)."""
    scaled = logits.astype(np.float64) / sampling.temperature
    count = min(sampling.top_k, len(scaled)) if sampling.top_k else len(scaled)
    if sampling.min_p > 0.0 and sampling.top_p >= 1.0:
        # min-p alone needs no sorted vocabulary: everything it drops is below a known logit.
        floor = float(scaled.max()) + float(np.log(sampling.min_p))
        candidates = np.flatnonzero(scaled >= floor)
    else:
        candidates = np.flatnonzero(~np.isneginf(scaled))  # what a hook has ruled out has no chance at all
    order = candidates[np.argsort(-scaled[candidates], kind="stable")][:count]
    probabilities = _softmax(scaled[order])
    if sampling.top_p < 1.0:
        before = np.cumsum(probabilities) - probabilities
        order = order[before < sampling.top_p]
        probabilities = _softmax(scaled[order])
    if sampling.min_p > 0.0:
        order = order[probabilities >= sampling.min_p * probabilities[0]]
        probabilities = _softmax(scaled[order])
    return order, probabilities


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights: npt.NDArray[np.float64] = np.exp(values - values.max())
    weights /= weights.sum()
    return weights
