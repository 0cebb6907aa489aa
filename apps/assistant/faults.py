"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}, without what was sent.

Source: the error object of the OpenAI API reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from edgealign.errors import EdgealignError, UsageError

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error",
}  # fmt: skip


class ErrorFacts(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorFacts


RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in TYPES}


class Fault(Exception):
    """A request that cannot be answered; `message` never holds a user's text."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(code)  # and not the message: a traceback prints this
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def fault_of(error: EdgealignError) -> Fault:
    """The library's error as an answer: wrong use is the request's, everything else the server's."""
    if isinstance(error, UsageError):
        return Fault(400, error.line(), code="unusable_input")
    return Fault(503, f"the model cannot answer: {error.reason}", code="runtime_failed")


def install(app: FastAPI) -> None:
    """Give every error of an app the same shape."""

    async def of_fault(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Fault)
        return error.response()

    async def of_library(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, EdgealignError)
        return fault_of(error).response()

    async def of_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return Fault(error.status_code, str(error.detail), headers=error.headers).response()

    async def of_form(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return of_validation(error).response()

    async def of_anything(_: Request, error: Exception) -> JSONResponse:
        return Fault(500, "internal error", code="internal_error").response()  # the guard logs where it was

    app.add_exception_handler(Exception, of_anything)
    app.add_exception_handler(Fault, of_fault)
    app.add_exception_handler(EdgealignError, of_library)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_form)


def of_validation(error: RequestValidationError) -> Fault:
    """The first mistake in a request, by the name of its field; never by its value."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return Fault(400, "the body is no valid JSON", code="invalid_json")
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return Fault(400, f"unknown parameter: {_short(param)}", code="unknown_parameter", param=_short(param))
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return Fault(400, f"{_short(param) or 'the body'}: {first['msg']}", code=code, param=_short(param))


def _short(name: str | None) -> str | None:
    """A field's name comes from the request too, so it may be anything."""
    return None if name is None else name.encode("utf-8", "replace").decode("utf-8")[:100]
