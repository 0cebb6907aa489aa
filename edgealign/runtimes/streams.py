"""Two states of one model that go on with the same tokens after different beginnings.

    streams = open_streams("bundle")
    left, right = streams.prefill(prompt_with_a_wish, prompt_without_it)     # (V,) each
    left, right = streams.step(token)                                        # the token goes to both

Any runtime can do that with two sessions on a file (`TwoSessions`), in ONNX on one opened model; llama.cpp does it with
one model and one context that holds two sequences and steps both in one batch (`llama_pair`). An empty second beginning
leaves the second stream out until the state is emptied: then a step costs one pass.

Shape legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from edgealign.models.builtin import built_in
from edgealign.runtimes.session import Session, open_session, runtime_of

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

    Both: TypeAlias = tuple[Logits, Logits | None]


class Streams(Protocol):
    """What decode-time mixing knows about a runtime. The second logits are None where that stream is left out."""

    @property
    def context(self) -> int | None:
        """Tokens that each stream can hold; None where the runtime names no limit."""

    def prefill(self, first: Sequence[int], second: Sequence[int]) -> Both:
        """Append tokens to each state; logits (V,) after the last of each."""

    def step(self, token: int) -> Both:
        """Append one token to both."""

    def set_user(self, adapter: Path | None) -> None:
        """One user's adapter on both, or the base for None. Empties both states."""

    def reset(self) -> None:
        """Empty both states."""

    def close(self) -> None:
        """Free the model."""


class TwoSessions:
    """Two sessions on the same model: any runtime; twice the memory where a session has no `twin`."""

    def __init__(self, first: Session, second: Session) -> None:
        self.sessions = (first, second)
        self._both = False

    @property
    def context(self) -> int | None:
        return getattr(self.sessions[0], "context", None)

    def prefill(self, first: Sequence[int], second: Sequence[int]) -> Both:
        left = self.sessions[0].prefill(first)
        self._both = self._both or len(second) > 0
        return left, self.sessions[1].prefill(second) if self._both else None

    def step(self, token: int) -> Both:
        left = self.sessions[0].step(token)
        return left, self.sessions[1].step(token) if self._both else None

    def set_user(self, adapter: Path | None) -> None:
        for session in self.sessions:
            session.set_user(adapter)
        self._both = False

    def reset(self) -> None:
        for session in self.sessions:
            session.reset()
        self._both = False

    def close(self) -> None:
        for session in self.sessions:
            session.close()


def open_streams(path: str | Path, *, one_batch: bool = True, **options: Any) -> Streams:
    """Two streams over a model directory, a bundle or a model file; ``options`` go to its session.

    Args:
        one_batch: step both streams in one pass where the runtime can (llama.cpp); False opens two sessions.
    """
    if one_batch and (opener := _IN_ONE_BATCH.get(runtime_of(path))):
        return opener(built_in(path) or Path(path), options)
    first = open_session(path, **options)
    try:
        twin = getattr(first, "twin", None)
        return TwoSessions(first, twin() if twin else open_session(path, **options))
    except BaseException:
        first.close()
        raise


def _open_llama_pair(path: Path, options: Mapping[str, Any]) -> Streams:
    from edgealign.runtimes.llama_pair import LlamaPair

    return LlamaPair(path, **options)


_IN_ONE_BATCH: Mapping[str, Callable[[Path, Mapping[str, Any]], Streams]] = {"llama.cpp": _open_llama_pair}
