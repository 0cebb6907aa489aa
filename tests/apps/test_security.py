"""Who is not the user gets nothing: every combination of Host, Origin, method and token, bodies, cookies, headers."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from assistant.security import IMPORT_BYTES, read_token
from assistant.store import Store

from edgealign.errors import InputError

from .conftest import TOKEN, EngineMaker, Served, serving

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from assistant.engine import Engine
    from assistant.metrics import Metrics

    from edgealign.models.load import load_tokenizer
    from edgealign.runtimes.scripted import ScriptedSession

    engine = Engine(
        lambda: ScriptedSession(vocab=4096), name="script",
        tokenizers=(load_tokenizer("starter"), load_tokenizer("starter")), context=512, users={}, metrics=Metrics(),
        facts={"runtime": "scripted", "digest": None, "adapters": {}}, queue=16,
    )  # fmt: skip
    with serving(engine, tmp_path_factory.mktemp("guarded")) as served:
        yield served


def send(
    served: Served, method: str, path: str, headers: Mapping[str, str | None], body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """A request with exactly these headers: a None leaves the header out, Host too."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def cookie_of(served: Served) -> str:
    status, headers, _ = send(served, "GET", f"/?token={TOKEN}", {"host": f"127.0.0.1:{served.port}"})
    assert status == 303
    return headers["set-cookie"].partition(";")[0]


def combinations(served: Served) -> Iterator[tuple[str, dict[str, str | None], bool]]:
    """(method, headers, whether this may be served), all of them."""
    port = served.port
    good_hosts = [f"127.0.0.1:{port}", f"localhost:{port}"]
    bad_hosts = [f"evil.example:{port}", "127.0.0.1", f"0.0.0.0:{port}", f"[::1]:{port}", ""]
    origins = [None, "own", f"http://localhost:{port + 1}", "http://evil.example", "null", ""]
    tokens: list[tuple[str, dict[str, str]]] = [
        ("none", {}), ("basic", {"authorization": f"Basic {TOKEN}"}), ("query", {}),
        ("short", {"authorization": f"Bearer {TOKEN[:-1]}"}), ("bearer", {"authorization": f"Bearer {TOKEN}"}),
        ("cookie", {"cookie": cookie_of(served)}), ("raw cookie", {"cookie": f"edgealign-{port}={TOKEN}"}),
    ]  # fmt: skip
    for host, origin, method, (kind, sent) in itertools.product(
        [*good_hosts, *bad_hosts], origins, METHODS, tokens
    ):
        named = f"http://{host}" if origin == "own" else origin
        allowed = host in good_hosts and (origin in (None, "own", "")) and kind in ("bearer", "cookie")
        if kind == "cookie" and method not in ("GET", "HEAD") and origin != "own":
            allowed = False
        if origin == "":
            allowed = False  # an empty Origin is no origin of ours
        yield method, {"host": host, "origin": named, "x-kind": kind, **sent}, allowed


def test_no_combination_of_host_origin_method_and_token_is_served_that_should_not_be(guarded: Served) -> None:
    made = guarded.http.post("/api/conversations", json={"title": "kept"}).json()["id"]
    path = f"/api/conversations/{made}"
    tried = wrong = served = 0
    for method, headers, allowed in combinations(guarded):
        if method == "DELETE" and allowed:
            continue  # it would be, and then nothing would be left to try
        asked = path + (f"?token={TOKEN}" if headers["x-kind"] == "query" else "")
        body = json.dumps({"title": "changed"}).encode() if method in ("POST", "PUT", "PATCH") and not allowed else None
        status, answered, _ = send(guarded, method, asked, {"content-type": "application/json", **headers}, body)
        tried += 1
        served += status == 200
        # 400 is uvicorn's own word for a broken Host, and the form's for an allowed PATCH without a body.
        wrong += status in (401, 403) if allowed else status not in (400, 401, 403)
        assert "access-control-allow-origin" not in answered
    assert tried >= 300
    assert served > 0
    assert wrong == 0
    found = guarded.http.get(path).json()
    assert found["title"] == "kept"
    assert len(guarded.http.get("/api/conversations").json()) == 1


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_another_sites_fetch_is_refused_even_with_the_cookie(guarded: Served, site: str) -> None:
    headers = {"host": f"127.0.0.1:{guarded.port}", "cookie": cookie_of(guarded), "sec-fetch-site": site}
    assert send(guarded, "GET", "/v1/models", headers)[0] == 403
    assert send(guarded, "GET", "/v1/models", headers | {"sec-fetch-site": "same-origin"})[0] == 200


def test_two_hosts_or_two_origins_are_refused(guarded: Served) -> None:
    host = f"Host: 127.0.0.1:{guarded.port}\r\n"
    bearer = f"Authorization: Bearer {TOKEN}\r\n"
    for extra in (host, f"Origin: http://127.0.0.1:{guarded.port}\r\n" * 2):
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as raw:
            raw.sendall(f"GET /v1/models HTTP/1.1\r\n{host}{extra}{bearer}\r\n".encode())
            status = int(raw.recv(64).split()[1])
        assert status in (400, 403)


@pytest.mark.parametrize("path", ["/", "/v1/models", "/api/state", "/metrics", "/openapi.json", "/x", "//health"])
def test_everything_but_health_needs_the_token(guarded: Served, path: str) -> None:
    status, headers, body = send(guarded, "GET", path, {"host": f"127.0.0.1:{guarded.port}"})
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert json.loads(body)["error"]["type"] == "authentication_error"


def test_a_browser_without_the_token_is_told_what_to_do(guarded: Served) -> None:
    accept = "text/html,application/xhtml+xml,*/*;q=0.8"
    host = {"host": f"127.0.0.1:{guarded.port}"}
    status, headers, body = send(guarded, "GET", "/", {**host, "accept": accept})
    assert status == 401
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["www-authenticate"] == "Bearer"
    assert b"<code>edgealign app</code>" in body
    other = send(guarded, "GET", "/", {"host": "evil.example", "accept": accept})
    assert (other[0], json.loads(other[2])["error"]["code"]) == (403, "host_not_allowed")


def test_health_needs_no_token_but_our_name(guarded: Served) -> None:
    assert send(guarded, "GET", "/health", {"host": f"127.0.0.1:{guarded.port}"})[0] == 200
    assert send(guarded, "GET", "/health", {"host": "evil.example"})[0] == 403
    assert send(guarded, "POST", "/health", {"host": f"127.0.0.1:{guarded.port}"})[0] == 401


def test_the_token_in_the_address_buys_a_strict_cookie_and_leaves_the_address(guarded: Served) -> None:
    host = {"host": f"127.0.0.1:{guarded.port}"}
    status, headers, _ = send(guarded, "GET", f"/?token={TOKEN}", host)
    assert (status, headers["location"]) == (303, "/")
    for word in ("HttpOnly", "SameSite=strict", "Path=/"):
        assert word in headers["set-cookie"]
    assert TOKEN not in headers["set-cookie"]
    assert f"Max-Age={30 * 24 * 3600}" in headers["set-cookie"]  # a closed browser is known again
    assert send(guarded, "GET", "/?token=" + "x" * 30, host)[0] == 401
    assert send(guarded, "GET", f"/?token={TOKEN}", {"host": "evil.example"})[0] == 403


def test_another_programs_cookies_do_not_hide_ours(guarded: Served) -> None:
    cookies = f'odd={{"a": 1}}; =; {cookie_of(guarded)}; b="'
    headers = {"host": f"127.0.0.1:{guarded.port}", "cookie": cookies}
    assert send(guarded, "GET", "/v1/models", headers)[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_forms_content_type_is_refused(guarded: Served, kind: str | None) -> None:
    headers = {
        "host": f"127.0.0.1:{guarded.port}", "authorization": f"Bearer {TOKEN}", "content-type": kind,
    }  # fmt: skip
    assert send(guarded, "POST", "/api/conversations", headers, b'{"title": "form"}')[0] == 415


def test_bodies_are_limited_with_and_without_a_length(guarded: Served) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    big = b'{"title": "' + b"a" * (2 << 20) + b'"}'
    assert guarded.http.post("/api/conversations", content=big, headers=headers).status_code == 413
    chunks = (big[start : start + 65536] for start in range(0, len(big), 65536))
    assert guarded.http.post("/api/conversations", content=chunks, headers=headers).status_code == 413
    assert IMPORT_BYTES > 2 << 20
    assert guarded.http.post("/api/import", content=big, headers=headers).status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"NaN", b'{"title": "\\ud800"}', b'{"title": 1e999}']
)
def test_a_body_that_is_no_form_is_a_400(guarded: Served, body: bytes) -> None:
    answer = guarded.http.post("/api/conversations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_answer_has_the_headers_that_keep_a_page_in_its_box(guarded: Served) -> None:
    for path in ("/v1/models", "/health", "/nowhere"):
        headers = guarded.http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_errors_do_not_repeat_what_was_sent(guarded: Served) -> None:
    canary = "canary-7391"
    bodies = ({"title": [canary]}, {"user": canary * 20}, {"title": {canary: 1}})
    for body in bodies:
        answer = guarded.http.post("/api/conversations", json=body)
        assert answer.status_code == 400
        assert canary not in answer.text


def test_websockets_are_not_accepted(guarded: Served) -> None:
    headers = {
        "host": f"127.0.0.1:{guarded.port}", "connection": "Upgrade", "upgrade": "websocket",
        "sec-websocket-version": "13", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    assert send(guarded, "GET", "/v1/models", headers)[0] == 401


def test_a_login_code_works_once(scripted: EngineMaker, tmp_path: Path) -> None:
    import asyncio

    from assistant.server import create_app

    engine, store = scripted(), Store(tmp_path)
    guard = create_app(engine, store, port=80, token=TOKEN)
    code = guard.login_code()

    async def status() -> int:
        sent: list[int] = []

        async def send_message(message: object) -> None:
            assert isinstance(message, dict)
            if message["type"] == "http.response.start":
                sent.append(message["status"])

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b""}

        scope = {
            "type": "http", "method": "GET", "path": "/", "query_string": f"code={code}".encode(),
            "headers": [(b"host", b"127.0.0.1:80")],
        }  # fmt: skip
        await guard(scope, receive, send_message)  # type: ignore[arg-type]
        return sent[0]

    assert [asyncio.run(status()) for _ in range(2)] == [303, 401]
    engine.close()
    store.close()


def test_the_token_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "token"
    token = read_token(file, None)
    assert len(token) >= 43
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_token(file, None) == token
    assert read_token(file, "another-token-of-mine") == "another-token-of-mine"
    for bad in ("short", "with a space in the middle", "ümläute-in-the-token"):
        with pytest.raises(InputError, match="token"):
            read_token(file, bad)
