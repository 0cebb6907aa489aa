"""Servers to be killed, whose answers never end: 20 tokens a second, until the context is full.

    python paced_server.py TOKEN < lines        each line, HOME tab PORT, forks a server; answered with its pid

What is tested with it is the page when the server is killed; a model would end its answers when it likes, and its
start would last seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
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


def main(token: str) -> None:
    tokenizer = load_tokenizer("starter")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    for line in sys.stdin:
        home, port = line.rstrip("\n").split("\t")
        child = os.fork()
        if not child:
            serve(Path(home), int(port), token, tokenizer)
        print(child, flush=True)


def serve(home: Path, port: int, token: str, tokenizer: Any) -> None:
    """The child: serve until it is killed."""
    engine = Engine(
        lambda: Paced(len(tokenizer), end_of_turn_id(tokenizer)), name="paced", tokenizers=(tokenizer, tokenizer),
        context=4096, users={}, metrics=Metrics(), facts={"runtime": "scripted", "digest": None, "adapters": {}},
        queue=16,
    )  # fmt: skip
    with server._bound(port) as listening:
        app = server.create_app(engine, Store(home), port=port, token=token)
        uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, ws="none")).run(sockets=[listening])
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
