"""The page in a real browser: the system's Chromium, driven by Playwright, over real servers.

    python -m pytest tests/apps/browser

Playwright brings no browser of its own here: the one of the distribution is used (`apt-get install
chromium-headless-shell`, or `chromium`). Every test also fails if its page asks for anything beyond the server's own
address, throws, or breaks its security policy.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from ..conftest import TOKEN, Served, serving, until
from .chromium import MISSING, find

DEVICES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
CLIPBOARD = ["clipboard-read", "clipboard-write"]
WAIT_MS = 60_000
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
on_both = pytest.mark.parametrize("device", list(DEVICES))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser, for one module: Playwright keeps an event loop in this thread, which other tests need."""
    program = find()
    missing = None if program else MISSING
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing = missing or "playwright is not installed: pip install 'edgealign[dev]'"
    if missing:
        (pytest.fail if os.environ.get("CI", "").lower() == "true" else pytest.skip)(missing)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Talk:
    """One tab and what a person does in it; `asked` are the addresses it requested, `broken` what went wrong in it."""

    page: Any
    url: str
    phone: bool
    asked: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def open(self, place: str = "") -> None:
        self.page.goto(f"{self.url}/{place}")
        self.page.wait_for_selector("body.ready")

    def find(self, selector: str) -> Any:
        return self.page.locator(selector)

    def button(self, name: str, *, within: str = "body", exact: bool = True) -> Any:
        return self.find(within).get_by_role("button", name=name, exact=exact)

    @property
    def field(self) -> Any:
        return self.page.get_by_label("Your question", exact=True)

    @property
    def answers(self) -> Any:
        return self.find(".answer:not(.writing) > .text")

    @property
    def questions(self) -> Any:
        return self.find(".question > .text")

    def ask(self, text: str) -> None:
        """Ask, and wait until the answer is complete."""
        before = self.answers.count()
        self.send(text)
        self.find(".answer:not(.writing) [data-act=again]:enabled").nth(before).wait_for(state="attached")

    def send(self, text: str) -> None:
        self.field.fill(text)
        self.field.press("Enter")

    def act(self, turn: Any, name: str) -> None:
        """Press a button below a question or an answer."""
        turn.hover()
        turn.locator(f"[data-act={name}]").click()

    def side(self) -> Any:
        """The list of conversations, opened where it is a drawer."""
        if "closed" in (self.find("body").get_attribute("class") or ""):
            self.button("Conversations").click()
        return self.find("#side")

    def entries(self) -> list[str]:
        return [link.inner_text() for link in self.find("#conversations a").all()]

    def toasted(self, text: str) -> None:
        self.find("#toast.shown").filter(has_text=text).wait_for()


TalkMaker = Callable[..., Talk]


@pytest.fixture
def device() -> str:
    return "desktop"


@pytest.fixture
def tab(chromium: Any, device: str) -> Iterator[TalkMaker]:
    """`tab(url)`: a fresh browser profile, logged in and open; `beside=talk` is another tab of the same profile."""
    contexts: list[Any] = []
    talks: list[Talk] = []

    def make(url: str, *, beside: Talk | None = None, ready: bool = True, on: str = device, **options: Any) -> Talk:
        context = beside.page.context if beside else chromium.new_context(
            **{"reduced_motion": "reduce", "permissions": CLIPBOARD, **DEVICES[on], **options}
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        talk = Talk(page, url, on == "phone")
        talks.append(talk)
        page.on("request", lambda request: talk.asked.append(request.url))
        page.on("pageerror", lambda error: talk.broken.append(str(error)))
        page.on("console", lambda line: "Content Security" in line.text and talk.broken.append(line.text))
        if ready:
            talk.open(f"?token={TOKEN}" if beside is None else "")
        return talk

    yield make
    for talk in talks:
        assert talk.broken == []
        foreign = {at for at in talk.asked if urlsplit(at).netloc != urlsplit(talk.url).netloc}
        assert {at for at in foreign if not at.startswith(("blob:", "data:"))} == set()
    for context in dict.fromkeys(contexts):
        context.close()


@pytest.fixture
def starter(served: Served) -> Served:
    """The starter model behind a server without conversations, with the settings it comes with; short answers."""
    clear(served.http)
    served.http.put("/api/settings", json={"max_tokens": 16}).raise_for_status()
    return served


@pytest.fixture
def talk(starter: Served, tab: TalkMaker) -> Talk:
    """The page over the starter model."""
    return tab(starter.url)


def clear(http: httpx.Client) -> None:
    names = [name for name in http.get("/api/settings").json()]
    http.put("/api/settings", json=dict.fromkeys(names)).raise_for_status()
    for entry in http.get("/api/conversations", params={"limit": 1000}).json():
        http.delete(f"/api/conversations/{entry['id']}").raise_for_status()
    http.delete("/api/users/me").raise_for_status()  # and what was learned of them


@pytest.fixture
def held(scripted: Any, gate: Any, tmp_path: Path) -> Iterator[Served]:
    """A server whose answers never end and whose every step waits for `gate.permit()`."""
    gate.held = True
    with serving(scripted(gate, queue=1, context=512), tmp_path / "held") as served:
        yield served
        gate.permit(1000)  # so that a step which waits can see that it is not wanted any more


def archive(*talks: list[str], title: str = "", user: str = "me", days_ago: float = 0) -> dict[str, Any]:
    """Conversations as `/api/import` takes them: texts of questions and answers in turn."""
    found = []
    for number, texts in enumerate(talks):
        key, above, messages = uuid.uuid4().hex, None, []
        now_s = time.time() - 86_400 * days_ago - number
        for place, content in enumerate(texts):
            message = {
                "id": uuid.uuid4().hex, "conversation": key, "parent": above, "created_s": now_s, "feedback": None,
                "role": ("user", "assistant")[place % 2], "content": content, "facts": {},
            }  # fmt: skip
            messages.append(message)
            above = message["id"]
        found.append({
            "id": key, "title": title or texts[0][:60], "user": user, "system": "", "created_s": now_s,
            "updated_s": now_s, "head": above, "messages": messages, "comparisons": [],
        })  # fmt: skip
    return {"format": "edgealign.conversations", "version": 1, "conversations": found}


def bring(served: Served, *talks: list[str], **options: Any) -> list[str]:
    """Put conversations into a server; their ids."""
    document = archive(*talks, **options)
    served.http.post("/api/import", json=document).raise_for_status()
    return [entry["id"] for entry in document["conversations"]]


class Program:
    """A server in a process of its own, to be killed and started again over one folder and port."""

    def __init__(self, forks: subprocess.Popen[str], home: Path) -> None:
        self.forks, self.home, self.pid = forks, home, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        assert self.forks.stdin
        assert self.forks.stdout
        print(self.home, self.port, sep="\t", file=self.forks.stdin, flush=True)
        self.pid = int(self.forks.stdout.readline())
        until(self._answers)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.pid = 0
        until(lambda: not self._answers())

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").is_success
        except httpx.TransportError:
            return False


@pytest.fixture(scope="session")
def forks() -> Iterator[subprocess.Popen[str]]:
    """The program that forks servers; it imports everything once."""
    program = str(Path(__file__).with_name("paced_server.py"))
    command = [sys.executable, program, TOKEN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        yield running


@pytest.fixture
def program(chromium: Any, forks: subprocess.Popen[str], tmp_path: Path) -> Iterator[Program]:
    running = Program(forks, tmp_path / "home")
    try:
        running.start()
        yield running
    finally:
        if running.pid:
            os.kill(running.pid, signal.SIGKILL)
