"""The panel "Your taste": a choice says what it taught, strength and versions can be changed, all can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from assistant import tastes

from ..conftest import Served, until
from ..test_taste import teach
from .conftest import Talk, TalkMaker, bring, on_both
from .test_choices import ask_twice

pytestmark = pytest.mark.browser


@pytest.fixture
def taught(starter: Served) -> Iterator[Served]:
    """The starter's server, whose usual user has made three choices."""
    starter.http.delete("/api/users/me")
    teach(starter, "me", 3)
    yield starter
    starter.http.delete("/api/users/me")


def panel(talk: Talk) -> Talk:
    talk.side()
    talk.button("Your taste").click()
    talk.find("#taste[open]").wait_for()
    return talk


@on_both
def test_the_panel_says_what_was_learned_and_shows_how_well_it_foresees(taught: Served, tab: TalkMaker) -> None:
    talk = panel(tab(taught.url))
    talk.find("#words").filter(has_text="horter").wait_for()
    talk.find("#adapter").filter(has_text="You have a version of your own: starter@me").wait_for()
    assert talk.find("#foreseen .own").count() == 3
    assert "Version 3 foresees a choice" in talk.find("#foreseen figcaption").inner_text()
    assert talk.find("#taste-versions li").count() == 4
    box = talk.find("#foreseen svg").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= talk.page.viewport_size["width"]


def test_strength_and_versions_count_at_once_and_undo_is_one_press(taught: Served, tab: TalkMaker) -> None:
    talk = panel(tab(taught.url))
    slider = talk.page.get_by_label("Strength", exact=True)
    assert slider.get_attribute("aria-valuetext") == "1, the usual"
    slider.fill("0")
    assert slider.get_attribute("aria-valuetext") == "off"
    slider.fill("0.5")
    talk.find("#strength-row output").filter(has_text="0.5").wait_for()
    talk.button("Use version 1").click()
    talk.toasted("Version 1 answers now.")
    found = taught.http.get("/api/taste").json()
    assert (found["strength"], found["active"]) == (0.5, 1)
    talk.button("Use everybody's").click()
    talk.find("#adapter").filter(has_text="No version of your own is in use: starter answers").wait_for()
    assert talk.find("#strength-row").is_hidden()  # there is nothing that it could do
    assert taught.http.get("/api/taste").json()["active"] == 0


def test_the_last_of_two_quick_changes_counts(taught: Served, tab: TalkMaker) -> None:
    """The first is held up on its way: the second waits for it, where it could overtake it before."""
    talk = panel(tab(taught.url))
    held: list[Any] = []
    talk.page.route("**/api/taste/strength*", lambda route: held.append(route) if not held else route.continue_())
    slider = talk.page.get_by_label("Strength", exact=True)
    for value in ("0", "1.5"):
        slider.fill(value)
    until(lambda: talk.page.wait_for_timeout(20) or held)
    talk.page.wait_for_timeout(200)
    assert (len(held), slider.input_value()) == (1, "1.5")
    assert taught.http.get("/api/taste").json()["strength"] != 1.5  # not sent yet
    with talk.page.expect_response(lambda found: "strength" in found.url and "1.5" in (found.request.post_data or "")):
        held[0].continue_()
    assert taught.http.get("/api/taste").json()["strength"] == 1.5
    assert slider.input_value() == "1.5"


def test_a_strength_that_is_refused_is_not_on_show(taught: Served, tab: TalkMaker) -> None:
    talk = panel(tab(taught.url))
    refusal = {"error": {"message": "The disk is full."}}
    talk.page.route("**/api/taste/strength*", lambda route: route.fulfill(status=507, json=refusal))
    slider = talk.page.get_by_label("Strength", exact=True)
    slider.fill("0")
    talk.toasted("The disk is full.")
    assert (slider.input_value(), slider.get_attribute("aria-valuetext")) == ("1", "1, the usual")


def test_a_choice_says_what_it_taught(taught: Served, tab: TalkMaker) -> None:
    talk = tab(taught.url)
    ask_twice(talk, "Give me an idea.")
    talk.find(".side").first.get_by_role("button").click()
    talk.find("#toast.shown").wait_for()
    assert talk.find("#toast").inner_text().startswith(("So far: ", "Noted: "))


def test_opposite_thumbs_on_two_answers_say_what_they_taught(taught: Served, tab: TalkMaker) -> None:
    (key,) = bring(taught, ["Give me an idea.", "No."])
    talk = tab(taught.url)
    talk.open(f"#/c/{key}")
    talk.act(talk.find(".answer"), "down")
    talk.find("[data-act=down][aria-pressed=true]").wait_for()
    assert talk.find("#toast.shown").count() == 0  # one thumb is no choice
    talk.act(talk.find(".answer"), "again")
    talk.find(".versions .count").filter(has_text="2 of 2").wait_for()
    talk.act(talk.find(".answer"), "up")
    talk.find("#toast.shown").wait_for()
    assert talk.find("#toast").inner_text().startswith(("So far: ", "Noted: "))
    panel(talk).find("#counts strong").first.filter(has_text="4").wait_for()


def test_a_choice_that_takes_longer_is_said_when_it_is_learned(
    taught: Served, tab: TalkMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught.http.delete("/api/users/me")
    monkeypatch.setattr(tastes, "SOON_S", 0.0)  # the answer to a choice waits for nothing
    talk = tab(taught.url)
    own = talk.find("#model option[value='starter@me']")
    assert own.count() == 0
    ask_twice(talk, "Give me an idea.")
    talk.find(".side").first.get_by_role("button").click()
    talk.page.wait_for_function("() => /^(So far|Noted): /.test(document.querySelector('#toast').textContent)")
    own.wait_for(state="attached")  # a first version is another model to answer with


def test_the_end_of_a_training_is_heard_with_the_panel_closed_and_after_polls_that_failed(
    taught: Served, tab: TalkMaker
) -> None:
    teach(taught, "me", 4)
    talk = panel(tab(taught.url))
    talk.button("Train").click()
    talk.find("#training-progress").wait_for()
    talk.page.keyboard.press("Escape")
    talk.page.route("**/api/taste?*", lambda route: route.abort())
    talk.find("#banner").wait_for(state="visible")
    with talk.page.expect_request("**/api/taste?*"):
        pass  # the first one failed, and here is another
    talk.page.unroute("**/api/taste?*")
    taught.http.delete("/api/taste/training", params={"user": "me"}).raise_for_status()
    talk.toasted("Stopped; everything is as it was.")


def test_a_training_shows_its_progress_and_can_be_stopped(taught: Served, tab: TalkMaker) -> None:
    teach(taught, "me", 4)
    talk = panel(tab(taught.url))
    talk.button("Train").click()
    talk.find("#training-progress").wait_for()
    talk.button("Stop training").click()
    talk.find("#training-note").filter(has_text="Stopped; everything is as it was.").wait_for()
    assert talk.button("Train").is_enabled()
