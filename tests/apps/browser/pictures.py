"""The pictures of docs/assistant: the page's main states, with answers of whatever model the server has.

    edgealign app --home "$(mktemp -d)" --no-browser &
    python tests/apps/browser/pictures.py 'http://127.0.0.1:8765/?token=...' docs/assistant
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

WAIT_MS = 300_000
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
QUESTIONS = ("Hello! Who are you?", "What do people do at the sea?")
MORE = ("How do I clean a kettle?", "What should I cook today?", "How do I pack a lamp?", "Give me an idea.")


def main(address: str, folder: Path) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = opened(browser, address, color_scheme="light", viewport=DESKTOP)
        page.screenshot(path=folder / "new.png")
        for number, question in enumerate(QUESTIONS, start=1):
            ask(page, question)
            page.locator(".answer [data-act=again]:enabled").nth(number - 1).wait_for(state="attached")
        page.locator("[data-act=up]").last.click()
        page.locator(".why").wait_for()
        page.screenshot(path=folder / "chat.png")
        page.get_by_role("button", name="Two answers").click()
        ask(page, "How can I make a friend happy?")
        page.locator("#which").wait_for()
        page.mouse.move(700, 20)
        page.wait_for_timeout(500)
        page.screenshot(path=folder / "choose.png")
        shorter(page)
        for question in MORE:
            page.locator("#two[aria-pressed=false]").click()
            ask(page, question)
            page.locator("#which").wait_for()
            shorter(page)
        page.keyboard.press("Control+Shift+D")
        page.locator("#taste[open]").wait_for()
        page.wait_for_timeout(500)
        page.screenshot(path=folder / "taste.png")
        here = page.url
        for name, options in (("dark.png", DESKTOP), ("phone.png", PHONE)):
            page = opened(browser, address, color_scheme="dark" if name == "dark.png" else "light", viewport=options)
            page.goto(here)
            page.locator(".versions").last.wait_for()
            page.wait_for_timeout(500)
            page.screenshot(path=folder / name)
        browser.close()


def shorter(page: Any) -> None:
    """Choose the shorter of two answers: a taste for the panel to name."""
    left, right = page.locator(".side .text").all_inner_texts()
    page.locator("#which").press("1" if len(left) < len(right) else "2")
    page.locator("#which").wait_for(state="detached")


def opened(browser: Any, address: str, **options: Any) -> Any:
    page = browser.new_context(reduced_motion="reduce", **options).new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(address)
    page.wait_for_selector("body.ready")
    page.wait_for_timeout(500)
    return page


def ask(page: Any, text: str) -> None:
    page.locator("#field").fill(text)
    page.locator("#field").press("Enter")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
