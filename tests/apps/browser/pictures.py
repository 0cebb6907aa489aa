"""The pictures of docs/assistant: the page's main states over a real bundle, with whatever the app really says.

    edgealign export --target gguf --model edgealign:starter --quant q8_0 --out runs/starter
    python tests/apps/browser/pictures.py runs/starter docs/assistant

The server is held for a moment (SIGSTOP) while an answer that is being written is taken, and killed for the last one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chromium import find  # beside this file
from playwright.sync_api import sync_playwright

WAIT_MS = 300_000
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844}, "color_scheme": "light", "has_touch": True, "is_mobile": True,
    "device_scale_factor": 2,
}  # fmt: skip
FIRST = ("Hello! Who are you?", "What do people do at the sea?")
STORY = "Tell me a long story about a fox."
CHOICES = (
    "How can I make a friend happy?", "How do I clean a kettle?", "What should I cook today?", "How do I pack a lamp?",
    "Give me an idea for a rainy day.", "How do I sell a drum?", "How can I fall asleep?", "What is a good present?",
)  # fmt: skip
BEGUN = 30  # characters of an answer that is taken while it is written
TRIES = 8
ON_ITS_WAY_MS = 500


def main(bundle: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as home, serving(bundle, Path(home)) as (address, server),
        sync_playwright() as driver,
    ):  # fmt: skip
        browser = driver.chromium.launch(executable_path=find(), args=["--no-sandbox"])
        take(browser, address, server, folder)
        browser.close()


def take(browser: Any, address: str, server: int, folder: Path) -> None:
    page = opened(browser, address, **DESKTOP)

    def picture(name: str, of: Any = page) -> None:
        of.mouse.move(700, 5)  # nothing is under the pointer
        of.wait_for_timeout(500)
        of.screenshot(path=folder / f"{name}.png")

    picture("new")
    for question in FIRST:
        ask(page, question)
    page.locator("[data-act=up]").last.click()
    page.locator(".why").wait_for()
    picture("chat")
    talk = page.url
    page.get_by_role("button", name="New conversation", exact=True).click()
    hold(page, STORY, server)
    picture("streaming")
    os.killpg(server, signal.SIGCONT)
    page.locator("[data-act=again]:enabled").last.wait_for(state="attached")
    for number, question in enumerate(CHOICES):
        page.get_by_role("button", name="New conversation", exact=True).click()
        page.get_by_role("button", name="Two answers").click()
        send(page, question)
        page.locator("#which").wait_for()
        if not number:
            picture("choose")
        shorter(page)
    page.locator("#toast.shown").wait_for()
    page.keyboard.press("Control+Shift+D")
    page.locator("#taste[open]").wait_for()
    page.wait_for_function("() => !document.querySelector('#toast.shown')", timeout=WAIT_MS)
    picture("taste")
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_role("button", name="Stop training", exact=True).wait_for()
    stopped = "document.querySelector('#stop-training').hidden"
    page.wait_for_function(f"() => document.querySelector('#training-progress').value > 0 || {stopped}")
    if page.evaluate(stopped):
        raise RuntimeError(f"the training has ended: {page.locator('#training-note').inner_text()}")
    page.locator("#training").scroll_into_view_if_needed()
    picture("training")
    page.get_by_role("button", name="Stop training", exact=True).click()
    page.get_by_role("button", name="Train", exact=True).wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings", exact=True).click()
    page.locator("#settings[open]").wait_for()
    picture("settings")
    for name, options in (("dark", {**DESKTOP, "color_scheme": "dark"}), ("phone", PHONE)):
        other = opened(browser, address, **options)
        other.goto(talk)
        other.locator(".answer [data-act=again]").last.wait_for(state="attached")
        picture(name, other)
        other.context.close()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="New conversation", exact=True).click()
    hold(page, STORY, server)
    os.killpg(server, signal.SIGKILL)
    page.locator(".problem").filter(has_text="cut off").wait_for()
    page.locator("#banner").wait_for(state="visible")
    picture("problem")


@contextmanager
def serving(bundle: Path, home: Path) -> Iterator[tuple[str, int]]:
    """`edgealign app` in a process group of its own, until the block ends: the page's address, and the group."""
    command = [sys.executable, "-m", "edgealign", "app", "--bundle", str(bundle), "--home", str(home), "--port", "0"]
    command += ["--no-browser", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            assert running.stdout is not None
            yield json.loads(running.stdout.readline())["page"], running.pid
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGTERM)


def opened(browser: Any, address: str, **options: Any) -> Any:
    page = browser.new_context(reduced_motion="reduce", **options).new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(address)
    page.wait_for_selector("body.ready")
    return page


def send(page: Any, text: str) -> None:
    page.locator("#field").fill(text)
    page.locator("#field").press("Enter")


def ask(page: Any, text: str) -> None:
    """Ask, and wait until the answer is complete."""
    before = page.locator(".answer:not(.writing)").count()
    send(page, text)
    page.locator(".answer:not(.writing) [data-act=again]:enabled").nth(before).wait_for(state="attached")


def hold(page: Any, text: str, server: int) -> None:
    """Ask, and stop the server in the middle of the answer.

    Raises:
        RuntimeError: every answer was over before that.
    """
    page.evaluate("localStorage.setItem('answers', 0)")  # not the one that is answered twice, for a choice
    send(page, text)
    long = f"document.querySelector('.writing .text')?.textContent.length > {BEGUN}"
    for _ in range(TRIES):
        page.wait_for_function(f"() => {long} || document.querySelector('[data-act=again]:enabled')")
        if page.evaluate(long):
            os.killpg(server, signal.SIGSTOP)
            page.wait_for_timeout(ON_ITS_WAY_MS)  # the end may have left the server before
            if page.locator(".writing").count():
                return
            os.killpg(server, signal.SIGCONT)
        page.locator("[data-act=again]:enabled").last.click()
    raise RuntimeError(f"no answer to {text!r} took long enough")


def shorter(page: Any) -> None:
    """Choose the shorter of two answers: a taste for the panel to name."""
    left, right = page.locator(".side .text").all_inner_texts()
    page.locator("#which").press("1" if len(left) < len(right) else "2")
    page.locator("#which").wait_for(state="detached")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
