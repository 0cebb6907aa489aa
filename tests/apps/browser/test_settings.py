"""Settings: each says what it does, counts at once, stays, and goes back to its default; light and dark."""

from __future__ import annotations

import pytest

from ..conftest import Served, until
from .conftest import Talk, TalkMaker, on_both

pytestmark = pytest.mark.browser
GROUND = "getComputedStyle(document.body).backgroundColor"


def open_settings(talk: Talk) -> None:
    talk.side()
    talk.button("Settings").click()
    talk.find("#settings[open]").wait_for()


def change(talk: Talk, name: str, value: str) -> None:
    field = talk.find(f"#set-{name}")
    field.fill(value)
    with talk.page.expect_response("**/api/settings"):
        field.dispatch_event("change")


@on_both
def test_every_setting_is_explained_and_stored(talk: Talk, starter: Served) -> None:
    open_settings(talk)
    values = {
        "temperature": 0.5, "top_p": 0.8, "min_p": 0.1, "top_k": 40, "repetition_penalty": 1.3, "max_tokens": 12,
        "compare_every": 3, "system": "Answer briefly.",
    }  # fmt: skip
    for name, value in values.items():
        help_text = talk.find(f"#{talk.find(f'#set-{name}').get_attribute('aria-describedby')}")
        assert len(help_text.inner_text()) > 20
        change(talk, name, str(value))

    def stored() -> bool:
        known = starter.http.get("/api/settings").json()
        return {name: known[name] for name in values} == values

    until(stored)
    talk.page.reload()
    open_settings(talk)
    assert float(talk.find("#set-temperature").input_value()) == 0.5
    talk.button("Back to the defaults").click()
    talk.toasted("Back to the defaults.")
    defaults = starter.http.get("/api/settings").json()
    assert all(defaults[name] != value for name, value in values.items())


def test_instructions_are_the_system_turn_of_new_conversations(talk: Talk, starter: Served) -> None:
    open_settings(talk)
    change(talk, "system", "Answer in bullets.")
    talk.page.keyboard.press("Escape")
    talk.ask("Hello.")
    (entry,) = starter.http.get("/api/conversations").json()
    assert entry["system"] == "Answer in bullets."


def test_the_longest_answer_is_obeyed_and_the_page_says_why_it_ends(talk: Talk, starter: Served) -> None:
    open_settings(talk)
    change(talk, "max_tokens", "2")
    talk.page.keyboard.press("Escape")
    talk.ask("Tell me a long story.")
    talk.find(".note").filter(has_text="length limit").wait_for()


@pytest.mark.parametrize("value", ["", "-3", "2.5"])
def test_an_impossible_number_is_refused(talk: Talk, starter: Served, value: str) -> None:
    open_settings(talk)
    before = starter.http.get("/api/settings").json()
    talk.find("#set-max_tokens").fill(value)
    talk.find("#set-max_tokens").dispatch_event("change")
    talk.toasted("whole number")
    assert starter.http.get("/api/settings").json() == before
    assert talk.find("#set-max_tokens").input_value() == str(before["max_tokens"])


@on_both
@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_page_follows_the_system_until_it_is_told_otherwise(
    starter: Served, tab: TalkMaker, system: str, device: str
) -> None:
    talk = tab(starter.url, color_scheme=system)
    as_system = talk.page.evaluate(GROUND)
    talk.button("Light or dark").click()
    talk.page.wait_for_function(f"() => {GROUND} !== '{as_system}'")
    other = "dark" if system == "light" else "light"
    assert starter.http.get("/api/settings").json()["theme"] == other
    talk.page.reload()
    assert talk.page.evaluate(GROUND) != as_system  # before anything has been asked of the server
    talk.page.wait_for_selector("body.ready")
    open_settings(talk)
    talk.find("#settings").get_by_text("System", exact=True).click()
    talk.page.wait_for_function(f"() => {GROUND} === '{as_system}'")


def test_another_tab_changes_its_colours_too(talk: Talk, tab: TalkMaker, starter: Served) -> None:
    other = tab(starter.url, beside=talk)
    before = other.page.evaluate(GROUND)
    talk.button("Light or dark").click()
    other.page.wait_for_function(f"() => {GROUND} !== '{before}'")


def test_the_settings_name_model_version_and_context(talk: Talk, starter: Served) -> None:
    open_settings(talk)
    about = talk.find("#about").inner_text()
    assert all(part in about for part in ("edgealign", "starter", f"{starter.engine.context:,}"))
