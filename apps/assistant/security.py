"""Who may talk to the server: this machine's user, from the page that it served or with the token, and nobody else.

Loopback is no boundary: every page in the user's browser can send requests to 127.0.0.1, and a name that resolves to
it (DNS rebinding) makes them same-origin. So each request, whatever its method, must have

1. a Host of ours: 127.0.0.1 or localhost, with our port;
2. no Origin, or the very origin that its Host names; and no Sec-Fetch-Site of another site;
3. the token (`Authorization: Bearer`), or the cookie that the token bought. With the cookie, everything but GET and
   HEAD must have an Origin, so that no other page's form can use it; there are no CORS headers at all;
4. JSON as its body, of limited size, within limited time.

`/health` alone needs no token. Websockets are closed. What an answer's content may do is limited by its headers.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import sys
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assistant.faults import Fault
from edgealign.errors import InputError

BODY_BYTES, IMPORT_BYTES, IMPORT_PATH = 1 << 20, 64 << 20, "/api/import"
BODY_S = 30.0
TOKEN_CHARACTERS = 16
COOKIE_S = 30 * 24 * 3600  # how long a browser is known; then the printed address opens the page again
OPEN_PATHS = ("/health",)
SAFE_METHODS = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOCKED = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>edgealign assistant</title>
<h1>This page is locked</h1>
<p>Run <code>edgealign app</code> and open the address that it prints. If it is running, that is the line that begins
with <code>page</code>.</p>
</html>
"""
Headers: TypeAlias = MutableMapping[str, list[str]]


def read_token(file: Path, given: str | None) -> str:
    """The given token, or the one of this folder; made at the first start, readable by its owner only.

    Raises:
        InputError: too short, or not plain printable characters.
    """
    if given is None and file.is_file():
        given = file.read_text(encoding="utf-8").strip() or None
    if given is None:
        given = secrets.token_urlsafe(32)
        file.touch(mode=0o600)
        file.write_text(given + "\n", encoding="utf-8")
    if len(given) < TOKEN_CHARACTERS or not all("!" <= character <= "~" for character in given):
        fix = f"leave it out and {file.name} is made with a good one"
        raise InputError("token", f"is not {TOKEN_CHARACTERS} or more printable ASCII characters", fix)
    return given


class Guard:
    """ASGI middleware around the whole app. `port` is the server's own; the token's cookie has its name."""

    def __init__(self, app: ASGIApp, *, port: int, token: str) -> None:
        self.app = app
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.cookie = f"edgealign-{port}"  # browsers share cookies among the ports of a host
        self._token = token.encode()
        self._badge = hmac.new(self._token, b"cookie", hashlib.sha256).hexdigest()
        self._codes: set[str] = set()

    def login_code(self) -> str:
        """A code that buys the cookie once: a browser's command line is no place for the token."""
        code = secrets.token_urlsafe(32)
        self._codes.add(code)
        return code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started = False

        async def send_safe(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = {name for name, _ in message["headers"]}
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in own)]
            await send(message)

        headers = _by_name(scope)
        try:
            if (login := self._login(scope, headers)) is not None:
                return await login(scope, receive, send_safe)
            self._check(scope, headers)
            receive = await _whole_body(scope, headers, receive)
            await self.app(scope, receive, send_safe)
        except Fault as fault:
            page = fault.status == 401 and "text/html" in ",".join(headers.get("accept", []))
            await (HTMLResponse(LOCKED, 401, fault.headers) if page else fault.response())(scope, receive, send_safe)
        except Exception as error:
            _log(error)
            if not started:
                await Fault(500, "internal error", code="internal_error").response()(scope, receive, send_safe)

    def _check(self, scope: Scope, headers: Headers) -> None:
        self._check_sender(headers)
        if scope["path"] in OPEN_PATHS and scope["method"] in SAFE_METHODS:
            return
        given = headers.get("authorization", [])
        if given:
            word, _, token = given[0].partition(" ")
            if len(given) > 1 or word.lower() != "bearer" or not hmac.compare_digest(_raw(token.strip()), self._token):
                raise _unauthorised("wrong token")
            return
        if not hmac.compare_digest(_raw(_cookie(headers, self.cookie)), _raw(self._badge)):
            raise _unauthorised("a token is needed: open the address that edgealign app printed, or send it as Bearer")
        if scope["method"] not in SAFE_METHODS and not headers.get("origin"):
            raise Fault(403, "a request with the cookie must name its origin", code="origin_missing")

    def _check_sender(self, headers: Headers) -> None:
        """Host, Origin and Sec-Fetch-Site."""
        host = headers.get("host", [])
        if len(host) != 1 or host[0] not in self.hosts:
            raise Fault(403, "this name of the server is not allowed; use 127.0.0.1", code="host_not_allowed")
        origin = headers.get("origin", [])
        if origin and origin != [f"http://{host[0]}"]:
            raise Fault(403, "requests from other pages are not allowed", code="origin_not_allowed")
        if any(site not in ("same-origin", "none") for site in headers.get("sec-fetch-site", [])):
            raise Fault(403, "requests from other sites are not allowed", code="origin_not_allowed")

    def _login(self, scope: Scope, headers: Headers) -> RedirectResponse | None:
        """`/?token=...` or `/?code=...` in the address bar becomes the cookie, and leaves the address."""
        if scope["path"] != "/" or scope["method"] != "GET" or not scope["query_string"]:
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        token, code = query.get("token", [""])[0], query.get("code", [""])[0]
        if not token and not code:
            return None
        self._check_sender(headers)
        if code in self._codes:
            self._codes.discard(code)
        elif not hmac.compare_digest(_raw(token), self._token):
            raise _unauthorised("wrong token, or a code that was used already")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self.cookie, self._badge, httponly=True, samesite="strict", path="/", max_age=COOKIE_S)
        return answer


async def _whole_body(scope: Scope, headers: Headers, receive: Receive) -> Receive:
    """Read the body, if it is JSON, not too long and not too slow; then hand it on in one piece."""
    if headers.get("content-length", ["0"]) == ["0"] and "transfer-encoding" not in headers:
        return receive
    if headers.get("content-type", [""])[0].partition(";")[0].strip().lower() != "application/json":
        raise Fault(415, "the body must be application/json", code="content_type")
    limit = IMPORT_BYTES if scope["path"] == IMPORT_PATH else BODY_BYTES
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Fault(400, "the client left", code="disconnected")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise Fault(413, f"the body is larger than {limit:,} bytes", code="body_too_large")
                more = message.get("more_body", False)
    except TimeoutError:
        raise Fault(408, f"the body took longer than {BODY_S:g} s", code="body_too_slow") from None
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()  # later calls wait for the client to leave
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replay


def _by_name(scope: Scope) -> Headers:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _cookie(headers: Headers, name: str) -> str:
    """One cookie's value. By hand: http.cookies gives up at another local program's odd cookie before ours."""
    for part in ";".join(headers.get("cookie", [])).split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return ""


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _unauthorised(message: str) -> Fault:
    return Fault(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _log(error: Exception) -> None:
    """Where it happened, without the error's own words: they may be the user's."""
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-4:]]
    print(f"edgealign: internal error {type(error).__name__} at {' < '.join(reversed(places))}", file=sys.stderr)
