"""For everybody: axe finds nothing in any view, light or dark; keys do everything; screen readers are told."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest

from ..conftest import Gate, Served
from ..test_taste import teach
from .conftest import Talk, TalkMaker, bring, on_both

pytestmark = pytest.mark.browser
RICH = (
    "# Title\n\nSome *text* with `code` and [a link](https://example.org/).\n\n- one\n- two\n\n"
    "```python\nprint(1)\n```\n\n> quoted\n\n| a | b |\n|---|---|\n| 1 | 2 |"
)
VIEWS = ["new", "talk", "editing", "why", "choice", "side", "settings", "taste", "keys", "question", "problem"]


def show(talk: Talk, served: Served, view: str) -> None:
    """Bring a page to one of its views."""
    if view == "new":
        return
    (key,) = bring(served, ["A question", RICH, "Another", "Yes"])
    if view == "choice":
        last = served.http.get(f"/api/conversations/{key}").json()["messages"][2]
        served.http.post(f"/api/messages/{last['id']}/comparisons", json={"max_tokens": 3}).raise_for_status()
    if view == "problem":
        served.http.post(
            f"/api/conversations/{key}/messages", json={"content": "word " * 30_000, "parent": None}
        ).raise_for_status()
    talk.open(f"?{view}#/c/{key}")  # another address, so that it is loaded anew
    talk.page.wait_for_selector("#which" if view == "choice" else ".problem" if view == "problem" else ".answer")
    if view in ("editing", "why"):
        talk.act(talk.find(".answer").last, "edit" if view == "editing" else "down")
    elif view == "problem":
        talk.button("Answer it").click()
        talk.button("Try again").wait_for()
    elif view in ("side", "settings", "taste", "keys", "question"):
        if view == "taste":
            teach(served, "me", 2)
        talk.side()
        if view == "question":
            talk.find("#conversations li").first.hover()
            talk.find("[data-act=delete]").first.click()
        elif view != "side":
            talk.button({"settings": "Settings", "taste": "Your taste", "keys": "Keys"}[view]).click()
        if view != "side":
            talk.page.wait_for_selector("dialog[open]")


@on_both
def test_axe_finds_nothing(starter: Served, tab: TalkMaker, device: str) -> None:
    script = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    # Axe has to be put in by evaluation, which the policy rightly refuses to a page.
    talk = tab(starter.url, on=device, bypass_csp=True)
    for view in VIEWS:
        show(talk, starter, view)
        talk.page.evaluate(script)
        for scheme, rules in (("light", ""), ("dark", ", runOnly: ['color-contrast']")):  # dark is colours, no more
            talk.page.emulate_media(color_scheme=scheme)
            result = talk.page.evaluate(f"axe.run(document, {{resultTypes: ['violations']{rules}}})")
            assert len(result["passes"]) > (0 if rules else 10)
            found |= {
                f"{view}, {scheme}: {rule['id']}": [node["html"] for node in rule["nodes"]]
                for rule in result["violations"]
            }
        talk.page.emulate_media(color_scheme="light")
    assert found == {}


def test_axe_finds_what_is_wrong(talk: Talk, tab: TalkMaker, starter: Served) -> None:
    """The control: a button without a name."""
    script = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    bare = tab(starter.url, bypass_csp=True)
    bare.page.evaluate(script)
    for name in ("aria-label", "title"):
        bare.find("#light").evaluate("(button, name) => button.removeAttribute(name)", name)
    result = bare.page.evaluate("axe.run()")
    assert [rule["id"] for rule in result["violations"]] == ["button-name"]


def test_a_whole_conversation_by_keyboard(talk: Talk, starter: Served) -> None:
    press = talk.page.keyboard.press
    assert talk.page.evaluate("document.activeElement.id") == "field"
    talk.page.keyboard.type("Hello.")
    press("Enter")
    talk.find("[data-act=again]:enabled").wait_for(state="attached")
    assert talk.page.evaluate("document.activeElement.id") == "field"
    press("ArrowUp")
    talk.find(".editor textarea").wait_for()
    talk.page.keyboard.type(" Again.")
    press("Control+Enter")
    talk.find(".question .count").wait_for()
    talk.find("[data-act=again]:enabled").wait_for(state="attached")
    assert talk.questions.all_inner_texts() == ["Hello. Again."]
    talk.find("[data-act=up]").focus()
    press("Enter")
    talk.find("[data-act=up][aria-pressed=true]").wait_for()
    assert talk.page.evaluate("document.activeElement.dataset.act") == "up"  # the focus is where it was
    press("Control+Shift+O")
    talk.find(".welcome").wait_for()
    press("Control+k")
    assert talk.page.evaluate("document.activeElement.id") == "search"
    press("ArrowDown")
    press("Enter")
    talk.answers.wait_for()
    press("Control+/")
    talk.find("#keys[open]").wait_for()
    press("Escape")
    talk.find("#keys[open]").wait_for(state="detached")
    press("Control+,")
    talk.find("#settings[open]").wait_for()
    press("Escape")
    press("Control+b")
    talk.find("body.closed").wait_for()
    press("Control+Shift+D")
    talk.find("#taste[open]").wait_for()


def test_every_key_that_the_page_knows_is_in_its_list(talk: Talk) -> None:
    talk.button("Keys").click()
    listed = talk.find("#keys kbd").all_inner_texts()
    assert {"Enter", "Esc", "↑", "1", "2", "0", "O", "K", "B", "D", ",", "/"} <= set(listed)


def test_the_order_of_the_tab_key_is_the_order_on_the_page(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["A question", "An answer"])
    talk.open(f"#/c/{key}")
    talk.answers.wait_for()
    talk.page.wait_for_selector("#conversations a")
    talk.find(".skip").focus()
    seen = ["skip"]
    for _ in range(40):
        talk.page.keyboard.press("Tab")
        name = "(at => at.id || at.dataset.act || at.className)(document.activeElement)"
        seen.append(talk.page.evaluate(name))
        if seen[-1] == "send":
            break
    wanted = [
        "skip", "new", "search", "open", "rename", "export", "delete", "user", "model", "open-taste", "open-settings",
        "open-keys", "toggle", "light", "copy", "edit", "up", "down", "copy", "edit", "again", "field", "two",
        "send",
    ]  # fmt: skip
    assert [name for name in seen if name in wanted] == wanted


def test_the_drawer_of_a_phone_holds_the_focus_and_gives_it_back(starter: Served, tab: TalkMaker) -> None:
    talk = tab(starter.url, on="phone")
    assert talk.find("#side").evaluate("side => side.inert")
    talk.button("Conversations").click()
    assert talk.page.evaluate("document.activeElement.id") == "new"
    assert talk.find("#main").evaluate("main => main.inert")
    talk.page.keyboard.press("Escape")
    assert talk.find("#side").evaluate("side => side.inert")
    assert talk.page.evaluate("document.activeElement.id") == "toggle"


def test_nothing_is_wider_than_a_phone(starter: Served, tab: TalkMaker) -> None:
    long = "word" * 200 + "\n\n```\n" + "x" * 500 + "\n```\n\n" + "| a |" * 30 + "\n" + "|---|" * 30
    (key,) = bring(starter, [long, long], title="t" * 190)
    for width in (320, 390):
        talk = tab(starter.url, on="phone", viewport={"width": width, "height": 700})
        talk.open(f"#/c/{key}")
        talk.answers.wait_for()
        assert talk.page.evaluate("document.documentElement.scrollWidth") == width
        assert talk.find("#scroll").evaluate("it => it.scrollWidth - it.clientWidth") == 0


def test_an_answer_is_announced_once_and_only_when_it_is_complete(talk: Talk) -> None:
    talk.page.evaluate(
        "window.said = []; new MutationObserver(() => { const text = document.querySelector('#said').textContent;"
        " if (text) window.said.push(text); }).observe(document.querySelector('#said'), {childList: true})"
    )
    talk.ask("Hello.")
    talk.page.wait_for_function("() => window.said.length")
    said = talk.page.evaluate("window.said")
    assert len(said) == 1
    assert said[0].split() == ["Answer:", *talk.answers.inner_text().split()]


@pytest.mark.parametrize("event", [{"isComposing": True}, {"keyCode": 229}], ids=["composing", "229"])
def test_enter_that_ends_a_composition_does_not_send(held: Served, tab: TalkMaker, event: dict[str, Any]) -> None:
    talk = tab(held.url)
    talk.field.fill("に")
    enter = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...more})"
    talk.field.evaluate(f"(field, more) => field.dispatchEvent({enter})", event)
    assert talk.field.input_value() == "に"
    assert held.http.get("/api/conversations").json() == []
    talk.field.press("Shift+Enter")
    assert talk.field.input_value() == "に\n"
    talk.field.press("Enter")
    talk.find(".writing").wait_for()


def test_enter_while_an_answer_is_written_sends_nothing(held: Served, tab: TalkMaker, gate: Gate) -> None:
    talk = tab(held.url)
    talk.send("Go on.")
    talk.find(".writing").wait_for()
    talk.send("The next thought")
    assert talk.field.input_value() == "The next thought"
    (entry,) = held.http.get("/api/conversations").json()
    assert entry["messages"] == 1
