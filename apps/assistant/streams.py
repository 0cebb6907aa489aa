"""Server-sent events, and answers in one piece: either way a client that leaves stops the decoding."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from assistant.faults import Fault
from assistant.pieces import Answer, Event, Piece, Scored

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Events from an async generator, which is closed the moment the response ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        self._events: Any = events
        super().__init__(events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def first_of(events: AsyncGenerator[str, None], request: Request) -> AsyncGenerator[str, None]:
    """The same events, after waiting for the first: until then an error can still be a status.

    Raises:
        Fault: before the first event; also when the client left.
    """
    return _again(await unless_gone(anext(events), request), events)


async def _again(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events) as rest:
        yield first
        try:
            async for event in rest:
                yield event
        except Fault as fault:  # the status is sent already
            yield f"data: {json.dumps(fault.body())}\n\n"


async def collect(events: AsyncGenerator[Event, None], request: Request) -> tuple[Answer, list[Scored]]:
    """The whole answer.

    Raises:
        Fault: the model failed, or the client left.
    """
    return await unless_gone(_drain(events), request)


async def unless_gone(work: Awaitable[T], request: Request) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        Fault: the client left; nobody reads this.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Fault(400, "the client left", code="disconnected")
        return task.result()
    finally:
        for pending in (task, leaving):
            pending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _drain(events: AsyncGenerator[Event, None]) -> tuple[Answer, list[Scored]]:
    tokens: list[Scored] = []
    async with aclosing(events) as inner:
        async for event in inner:
            if isinstance(event, Piece):
                tokens += event.tokens
            else:
                return event, tokens
    raise AssertionError("an engine's events end with an answer")


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
