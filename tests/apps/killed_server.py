"""A server that is killed often: this program imports everything once and forks a fresh server for each line it reads.

    python killed_server.py HOME PORT < lines        the test's other side; answers each line with the server's pid

The session is scripted: what is tested is the store behind real HTTP, and a model would make each start last seconds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvicorn

from edgealign import apps

server = apps.load("assistant.server")

from assistant.engine import Engine  # noqa: E402
from assistant.metrics import Metrics  # noqa: E402
from assistant.store import Store  # noqa: E402

from edgealign.models.load import load_tokenizer  # noqa: E402
from edgealign.runtimes.scripted import ScriptedSession  # noqa: E402


def main(home: Path, port: int, token: str) -> None:
    tokenizer = load_tokenizer("starter")
    child = 0
    for _ in sys.stdin:
        if child:
            os.waitpid(child, 0)
        child = os.fork()
        if not child:
            serve(home, port, token, tokenizer)
        print(child, flush=True)
    if child:
        os.waitpid(child, 0)


def serve(home: Path, port: int, token: str, tokenizer: object) -> None:
    """The child: serve until it is killed."""
    engine = Engine(
        lambda: ScriptedSession(vocab=4096), name="script", tokenizers=(tokenizer, tokenizer), context=512, users={},
        metrics=Metrics(), facts={"runtime": "scripted", "digest": None, "adapters": {}}, queue=16,
    )  # fmt: skip
    with server._bound(port) as listening:
        app = server.create_app(engine, Store(home), port=port, token=token)
        uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, ws="none")).run(sockets=[listening])
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
