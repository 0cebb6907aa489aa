"""A server in its own process whose answers never end: 20 tokens a second, until the context is full.

    python paced_server.py HOME PORT TOKEN

What is tested with it is the page when the server is killed; a model would end its answers when it likes.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from edgealign import apps

server = apps.load("assistant.server")

from assistant.engine import Engine  # noqa: E402
from assistant.metrics import Metrics  # noqa: E402
from assistant.store import Store  # noqa: E402

from edgealign.data.encode import end_of_turn_id  # noqa: E402
from edgealign.models.load import load_tokenizer  # noqa: E402
from edgealign.runtimes.scripted import ScriptedSession  # noqa: E402

STEP_S = 0.05


class Paced(ScriptedSession):
    def __init__(self, vocab: int, end: int) -> None:
        super().__init__(vocab=vocab)
        self.end = end

    def step(self, token: int) -> Any:
        time.sleep(STEP_S)
        return super().step(token)

    def _logits(self) -> np.ndarray[Any, Any]:
        logits = super()._logits()
        logits[self.end] = -100.0
        return logits


def main(home: Path, port: int, token: str) -> None:
    tokenizer = load_tokenizer("starter")
    engine = Engine(
        lambda: Paced(len(tokenizer), end_of_turn_id(tokenizer)), name="paced", tokenizers=(tokenizer, tokenizer),
        context=4096, users={}, metrics=Metrics(), facts={"runtime": "scripted", "digest": None, "adapters": {}},
    )  # fmt: skip
    with server._bound(port) as listening, closing(Store(home)) as store, closing(engine):
        app = server.create_app(engine, store, port=port, token=token)
        uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, ws="none")).run(sockets=[listening])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
