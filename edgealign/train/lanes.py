"""Passes side by side: each in a lane of its own, a thread with its share of the CPU threads.

Two threads that share a small model's operations wait for each other at every one of them, some hundreds of times a
pass, and on a busy machine each wait is long. Lanes wait for each other once a step (docs/performance.md has numbers).

In a lane log-probabilities are read and gradients taken, and nothing is changed. Gradients are added where the step is,
and losses taken in turn, both in the order of the passes, so that a run repeats bit by bit.

    with Lanes(2, tokens=2048) as lanes:
        for group, values in lanes.each(job, groups, n_tokens): ...        # job(group, turn) -> values
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from edgealign.train.precision import count_parameters

LANES = 2  # measured with two threads; of more threads each lane has several
LANE_TOKENS = 256  # at least: below it the products of a layer lose speed
LANE_GRADIENTS = 64 * 2**20  # bytes at most: every lane holds gradients of its own
CHANCE = ("drop", "jitter")  # what a setting is called that makes a forward pass draw
EVEN = 0.8  # the share of their time that lanes must be at work; below, all threads take one pass after the other

X = TypeVar("X")
Y = TypeVar("Y")
Gradients: TypeAlias = Sequence["Tensor | None"]  # of the parameters that learn, in the model's order


class Turn:
    """`with turn:` waits until the passes before this one have had theirs."""

    def __init__(self, before: Turn | None = None) -> None:
        self._before = before
        self._over = threading.Event()

    def __enter__(self) -> None:
        if self._before is not None:
            self._before._over.wait()
            self._before = None

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    def skip_if_cancelled(self, job: Future[Any]) -> None:
        """A job that will never come must not be waited for."""
        if job.cancelled():
            self._over.set()


Job: TypeAlias = Callable[[X, Turn], Y]


class Lanes:
    """Threads for passes side by side, while its `with` block lasts; with one lane, nothing but a loop."""

    def __init__(self, count: int, tokens: int) -> None:
        """`tokens`: what passes that are side by side may hold together."""
        self.count, self.tokens = count, tokens
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Lanes:
        if self.count > 1:
            self._threads = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(self.count, "lane", _use_threads, (max(1, self._threads // self.count),))
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._threads)  # what a lane has set is what threads yet to come would start with

    def each(self, job: Job[X, Y], items: Sequence[X], n_tokens: Sequence[int]) -> Iterator[tuple[X, Y]]:
        """What `job` finds in each pass; turns are taken in the order in which passes come out.

        Passes too large to be side by side come first, each with all threads. In a lane gradients are on and autocast
        is off, whatever they are here.
        """
        beside = side_by_side(n_tokens, self.tokens, self.count) if self._pool else []
        for i in sorted({*range(len(items))} - {*beside}):
            yield items[i], job(items[i], Turn())
        running: deque[tuple[X, Future[Y]]] = deque()
        turn = None
        for i in beside:
            assert self._pool is not None
            turn = Turn(turn)
            running.append((items[i], self._pool.submit(_in_turn, job, items[i], turn)))
            running[-1][1].add_done_callback(turn.skip_if_cancelled)
            if len(running) > self.count:
                yield _first(running)
        while running:
            yield _first(running)

    def carry_back(self, model: nn.Module, logps: Tensor, gradient: Tensor) -> Gradients:
        """The gradients of a pass, for `add`, by the loss's gradient by its log-probabilities.

        Two backward passes that add to one `.grad` at a time would lose some of it, so lanes hand theirs over; with one
        lane they are added at once, and nothing is left for `add`.
        """
        if self._pool is None:
            torch.autograd.backward(logps, gradient)
            return ()
        learned = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(logps, learned, gradient, allow_unused=True)


def add(model: nn.Module, gradients: Gradients) -> None:
    """Add what `carry_back` found in a pass."""
    if not gradients:
        return
    for p, part in zip((p for p in model.parameters() if p.requires_grad), gradients, strict=True):
        if part is None:
            continue
        if p.grad is None:  # laid out as its parameter is: torch's fused AdamW reads both in the order of memory
            p.grad = torch.zeros_like(p)
        p.grad.add_(part)


def lanes_of(model: nn.Module, tokens_per_pass: int, *, lora: bool) -> int:
    """How many passes of a training run may be side by side: several only where they cost little memory and lose no
    speed, which is a small model's case."""
    gradients = 0 if lora else 4 * count_parameters(model)
    if next(model.parameters()).is_cuda or gradients > LANE_GRADIENTS or _changes_its_positions(model):
        return 1
    return max(1, min(LANES, torch.get_num_threads(), tokens_per_pass // LANE_TOKENS))


def draws_chance(model: nn.Module) -> bool:
    """Whether a forward pass in training mode takes random numbers, of which there is one sequence for all lanes."""
    config: Any = getattr(model, "config", None)
    settings = config.get_text_config().to_dict() if config is not None else {}
    drawn = any(
        isinstance(value, int | float) and value > 0 and any(word in name for word in CHANCE)
        for name, value in settings.items()
    )
    return drawn or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def _changes_its_positions(model: nn.Module) -> bool:
    """Whether a forward pass writes into the model: some rotary embeddings keep what the last length asked for."""
    kinds = [getattr(module, "rope_type", "") for module in model.modules()]
    names = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(name == "longrope" or "dynamic" in str(name) for name in names)


def side_by_side(n_tokens: Sequence[int], tokens: int, count: int) -> list[int]:
    """Which passes run in lanes: those of which `count` fit `tokens`; none where lanes would mostly be idle."""
    small = [i for i, n in enumerate(n_tokens) if n * count <= tokens]
    busy_until = [0] * count
    for i in small:
        heapq.heappush(busy_until, heapq.heappop(busy_until) + n_tokens[i])
    return small if sum(busy_until) >= EVEN * count * max(busy_until) else []


def _first(running: deque[tuple[X, Future[Y]]]) -> tuple[X, Y]:
    """The oldest pass, of which nothing stays here."""
    item, done = running.popleft()
    return item, done.result()


def _use_threads(count: int) -> None:
    """In this thread, whose own number torch would otherwise take from the process at its first operation."""
    torch.get_num_threads()
    torch.set_num_threads(count)


def _in_turn(job: Job[X, Y], item: X, turn: Turn) -> Y:
    """The job; whether it comes to its turn or not, the next one may have its own."""
    try:
        return job(item, turn)
    finally:
        with turn:
            pass
