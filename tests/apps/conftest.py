"""The assistant as its users meet it: a real uvicorn on a free port, over a real model or over a scripted session."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from edgealign import apps

server_module = apps.load("assistant.server")

from assistant import tastes  # noqa: E402  (importable since the line above)
from assistant.engine import Engine, open_engine  # noqa: E402
from assistant.metrics import Metrics  # noqa: E402
from assistant.store import Store  # noqa: E402

from edgealign.models.builtin import built_in  # noqa: E402
from edgealign.models.load import load_tokenizer  # noqa: E402
from edgealign.runtimes.scripted import ScriptedSession  # noqa: E402

TOKEN = "a-token-for-tests-0123456789"
PATIENCE_S = 120.0
tastes.SOON_S = PATIENCE_S  # no test shall depend on how quickly something is learned
USERS = ("ana", "ben")


@dataclass(frozen=True)
class Served:
    """A running server. `http` has the token already."""

    port: int
    engine: Engine
    store: Store
    http: httpx.Client
    client: openai.OpenAI

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def model(self) -> str:
        return self.engine.name

    def asynchronous(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=PATIENCE_S)


@contextmanager
def serving(engine: Engine, home: Path, *, basis: Path | None = None) -> Iterator[Served]:
    """The app over this engine until the block ends; the engine is closed then."""
    with server_module._bound(0) as listening, closing(Store(home)) as store, closing(engine):
        port = listening.getsockname()[1]
        own = tastes.open_tastes(engine, store, home / "users", basis=str(basis)) if basis else None
        app = server_module.create_app(engine, store, port=port, token=TOKEN, tastes=own)
        running = uvicorn.Server(uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, proxy_headers=False, ws="none",
            timeout_graceful_shutdown=1,
        ))  # fmt: skip
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: running.started)
            url, headers = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {TOKEN}"}
            with (
                httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S) as http,
                openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=PATIENCE_S) as client,
            ):
                yield Served(port, engine, store, http, client)
        finally:
            running.should_exit = True
            thread.join()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come.

    Raises:
        TimeoutError: it did not.
    """
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError
        time.sleep(0.01)


class Gate(ScriptedSession):
    """A scripted session that never ends an answer and can be held: then each call needs a `permit`."""

    def __init__(self, vocab: int, end: int) -> None:
        super().__init__(vocab=vocab)
        self.end, self.steps = end, 0
        self.held = False
        self.entered = threading.Event()
        self._permits = threading.Semaphore(0)

    def prefill(self, tokens: Sequence[int]) -> Any:
        self.entered.set()
        if self.held:
            assert self._permits.acquire(timeout=PATIENCE_S)
        self.steps += 1
        return super().prefill(tokens)

    def permit(self, count: int = 1) -> None:
        self._permits.release(count)

    def _logits(self) -> np.ndarray[Any, Any]:
        logits = super()._logits()
        logits[self.end] = -100.0
        return logits


EngineMaker = Callable[..., Engine]


@pytest.fixture
def scripted() -> EngineMaker:
    """`scripted(session, users=(...), queue=...)`: an engine over a session in this process."""

    def make(
        session: Any = None, *, users: Sequence[str] = (), queue: int = 16, context: int = 512,
        reopen: Callable[[], Any] | None = None, base_digest: str | None = None,
    ) -> Engine:  # fmt: skip
        tokenizer = load_tokenizer("starter")
        made = session or ScriptedSession(vocab=len(tokenizer))
        return Engine(
            reopen or (lambda: made), name="script", tokenizers=(tokenizer, load_tokenizer("starter")),
            context=context, users={user: Path(user) for user in users}, metrics=Metrics(), queue=queue,
            facts={"runtime": "scripted", "digest": "0" * 64, "adapters": {}, "base_digest": base_digest},
        )  # fmt: skip

    return make


@pytest.fixture
def gate() -> Gate:
    from edgealign.data.encode import end_of_turn_id

    tokenizer = load_tokenizer("starter")
    return Gate(len(tokenizer), end_of_turn_id(tokenizer))


@pytest.fixture
def scripted_server(scripted: EngineMaker, tmp_path: Path) -> Iterator[Served]:
    """A server without a model: quick, and its answers are a fixed function of prompt and user."""
    with serving(scripted(users=USERS), tmp_path / "home") as served:
        yield served


@pytest.fixture(scope="module")
def served(running: Served) -> Served:
    """The starter behind a server that knows nobody but ana and ben, whichever tests ran before."""
    for model in running.client.models.list().data:
        user = model.id.partition("@")[2]
        if user and user not in USERS:
            running.http.delete(f"/api/users/{quote(user, safe='')}").raise_for_status()
    return running


@pytest.fixture(scope="session")
def running(tiny_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The starter in torch, in its own process, with adapters of random weights for ana and ben."""
    starter = built_in("starter")
    assert starter is not None
    adapters = {user: tiny_lora(seed=seed, base=starter) for seed, user in enumerate(USERS, start=1)}
    with serving(open_engine("starter", adapters=adapters), tmp_path_factory.mktemp("home")) as started:
        yield started
