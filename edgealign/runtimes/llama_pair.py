"""Two streams in one llama.cpp context: one model, two sequences, both stepped by one ``llama_decode``.

LFM2's memory is hybrid, and llama.cpp keeps a KV cache and a convolution state for each sequence. One token of each
sequence in one batch reads every weight once for both, which is what decoding on a CPU waits for. Each sequence is fed
its beginning in batches of its own: a prompt is bound by arithmetic, and nothing would be shared.

Source: llama.h (llama_batch). Shape legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.runtimes.llamacpp import LlamaSession, load_library
from edgealign.runtimes.session import check_tokens

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits
    from edgealign.runtimes.streams import Both

STREAMS = 2


class LlamaPair:
    """A `LlamaSession` whose context holds two sequences; adapters, checks and errors are the session's own.

    Args:
        options: what `LlamaSession` takes; ``context`` counts the tokens of each stream.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self.session = LlamaSession(path, sequences=STREAMS, **options)
        self._filled = [0, 0]
        self._room = self.session._batch_size
        self._batch = load_library().llama_batch_init(self._room, 0, 1)

    @property
    def context(self) -> int:
        return self.session.context

    def prefill(self, first: Sequence[int], second: Sequence[int]) -> Both:
        self._check(0, first)
        if self._filled[1] or len(second):
            self._check(1, second)
        return self._feed(0, first), self._feed(1, second) if len(second) else None

    def step(self, token: int) -> Both:
        places = [stream for stream in range(STREAMS) if stream == 0 or self._filled[stream]]
        for stream in places:
            self._check(stream, (token,))
        for place, stream in enumerate(places):
            self._put(place, token, stream, last=True)
        self._run(len(places))
        logits = [self.session._logits(place).copy() for place in range(len(places))]
        return logits[0], logits[1] if len(logits) == STREAMS else None

    def set_user(self, adapter: Path | None) -> None:
        self.session.set_user(adapter)
        self._filled = [0, 0]

    def reset(self) -> None:
        self.session.reset()
        self._filled = [0, 0]

    def close(self) -> None:
        if self._room:
            load_library().llama_batch_free(self._batch)
            self._room = 0
        self.session.close()

    def _feed(self, stream: int, tokens: Sequence[int]) -> Logits:
        for start in range(0, len(tokens), self._room):
            part = tokens[start : start + self._room]
            for place, token in enumerate(part):
                self._put(place, token, stream, last=place == len(part) - 1)
            self._run(len(part))
        return self.session._logits(-1).copy()

    def _put(self, place: int, token: int, stream: int, *, last: bool) -> None:
        """Write one token of the batch; its position is the next of its stream."""
        batch = self._batch
        batch.token[place] = token
        batch.pos[place] = self._filled[stream]
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = stream
        batch.logits[place] = last
        self._filled[stream] += 1

    def _run(self, count: int) -> None:
        self._batch.n_tokens = count
        self.session._run(self._batch, count)

    def _check(self, stream: int, tokens: Sequence[int]) -> None:
        fix = "shorten the conversation or open the session with a larger context"
        filled = self._filled[stream]
        check_tokens(tokens, vocab=self.session.vocab, filled=filled, context=self.context, fix=fix)
