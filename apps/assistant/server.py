"""The app: routes behind the guard, served on 127.0.0.1 and nowhere else.

    edgealign app --bundle runs/bundle          or: serve(engine, store, ...) from Python

`create_app` is all of it as an ASGI app; `serve` adds the socket, the browser and an orderly end. `static/`, if it is
there, is the page.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assistant import chat_api, faults, openai_api, taste_api
from assistant.answers import Answerer
from assistant.engine import Engine, open_engine
from assistant.metrics import Metrics
from assistant.security import OPEN_PATHS, Guard, read_token
from assistant.starter import starter_in
from assistant.store import LOCK, Store
from assistant.tastes import Tastes, open_tastes
from assistant.training import Trainer
from edgealign import __version__
from edgealign.chat.recipes import AppRecipe
from edgealign.errors import UsageError
from edgealign.models.builtin import NAMES
from edgealign.personalize.users import users_folder

HOST = "127.0.0.1"
STATIC = Path(__file__).resolve().parent / "static"
ADDRESS = "address"  # in the home folder: the page of the app that serves it
ENDING_S = 3  # for answers that are being written when the server is told to end


@dataclass(frozen=True)
class Address:
    """Where the server is."""

    url: str
    token: str

    @property
    def page(self) -> str:
        return f"{self.url}/?token={self.token}"


def create_app(
    engine: Engine, store: Store, *, port: int, token: str, recipe: AppRecipe | None = None,
    tastes: Tastes | None = None, started: Callable[[Guard], object] = lambda guard: None,
) -> Guard:  # fmt: skip
    """The whole app behind its guard; the engine and the store are closed by who opened them.

    Args:
        tastes: none: those of `open_tastes`, beside the store.
        started: called in a thread of its own when the app begins to serve.
    """
    recipe = recipe or AppRecipe()
    tastes = tastes or open_tastes(engine, store, users_folder(store.file.parent))
    trainer = Trainer(tastes)
    answerer = Answerer(engine, store, recipe, tastes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=started, args=(guard,), daemon=True).start()
        yield
        tastes.close()
        await trainer.close()

    app = FastAPI(
        lifespan=lifespan, title="edgealign assistant", version=__version__, docs_url=None, redoc_url=None,
        responses=faults.RESPONSES, description="OpenAI's API under /v1, the page's own under /api.",
    )  # fmt: skip
    faults.install(app)
    app.include_router(openai_api.routes(engine, recipe))
    app.include_router(chat_api.routes(engine, store, answerer, engine.metrics, tastes, trainer))
    app.include_router(taste_api.routes(answerer, tastes, trainer))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers. Needs no token, says nothing else."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if STATIC.is_dir():
        app.mount("/", StaticFiles(directory=STATIC, html=True))
    app.openapi = functools.partial(_describe, app)  # type: ignore[method-assign]
    guard = Guard(_Counted(app, engine.metrics), port=port, token=token)
    return guard


def serve(
    *, source: str | Path | None, adapters: dict[str, Path], home: Path, port: int, token: str | None, browser: bool,
    recipe: AppRecipe, ready: Callable[[Address], object], basis: str | None = None, users: Path | None = None,
) -> None:  # fmt: skip
    """Open everything, serve until Ctrl-C or SIGTERM, close everything. `ready` is called when requests are answered.

    Args:
        source: a bundle or a model; None: the starter, in llama.cpp where that is installed and no adapter is given.
        users: the registry of users; None: the one in `home`.

    Raises:
        UsageError: the port or the folder is taken, the model cannot be opened, the token is too short, the basis is
            another model's.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises its signals again: both end alike
    if other := served_at(home):
        raise UsageError(home, "is open in another edgealign app", f"use that one: {other}")
    with _bound(port) as listening, suppress(KeyboardInterrupt):
        port = int(listening.getsockname()[1])
        with closing(Store(home)) as store:
            token = read_token(home / "token", token)
            address = Address(f"http://{HOST}:{port}", token)
            _publish(address, home)
            source = source or (NAMES[0] if adapters else starter_in(home))  # PEFT is torch's format
            opened = open_engine(
                source, adapters=adapters, threads=recipe.threads or None, context=recipe.context, queue=recipe.queue
            )
            with closing(opened) as engine:
                app = create_app(
                    engine, store, port=port, token=token, recipe=recipe,
                    tastes=open_tastes(engine, store, users or users_folder(home), basis=basis),
                    started=lambda guard: _greet(address, guard, browser, ready),
                )  # fmt: skip
                config = uvicorn.Config(
                    app, log_level="error", access_log=False,  # an access log would hold the first request's token
                    server_header=False, proxy_headers=False, timeout_graceful_shutdown=ENDING_S, ws="none",
                    lifespan="on",
                )  # fmt: skip
                uvicorn.Server(config).run(sockets=[listening])


def served_at(home: Path) -> str:
    """The page's address if an app serves this home just now, else empty."""
    try:
        with (home / LOCK).open() as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        file = home / ADDRESS
        return file.read_text(encoding="utf-8").strip() if file.is_file() else "its address is being made"
    except OSError:
        return ""
    return ""


def _publish(address: Address, home: Path) -> None:
    """Leave the address where a second app finds it; it opens the page, so only its owner may read it."""
    file = home / ADDRESS
    file.touch(mode=0o600)
    file.write_text(address.page + "\n", encoding="utf-8")


class _Counted:
    """ASGI middleware that counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, send_counted)


def _bound(port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before a model is loaded.

    Raises:
        UsageError: somebody listens there, or the number is none.
    """
    # With the protocol named asyncio sets TCP_NODELAY on what it accepts; otherwise a kept connection waits 40 ms for
    # the client's delayed acknowledgement before the first token leaves.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = f"cannot be listened on ({getattr(error, 'strerror', None) or error})"
        raise UsageError(f"port {port}", reason, "choose another: --port 0 takes a free one") from error
    return listening


def _greet(address: Address, guard: Guard, browser: bool, ready: Callable[[Address], object]) -> None:
    ready(address)
    # Without a screen a text browser would take the terminal.
    screen = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if browser and screen and STATIC.is_dir():
        webbrowser.open(f"{address.url}/?code={guard.login_code()}")


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description: with the token, and without FastAPI's own validation error, which nobody gets here."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path, methods in found["paths"].items():
            for method in methods.values():
                method["responses"].pop("422", None)
                method["security"] = [] if path in OPEN_PATHS else [{"token": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = found
    return app.openapi_schema
