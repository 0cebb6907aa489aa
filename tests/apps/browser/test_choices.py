"""Choosing: two answers side by side, thumbs with reasons, edits that are preferred, and what is known of a taste."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ..conftest import Served, until
from .conftest import Talk, bring, on_both

pytestmark = pytest.mark.browser


def choices(served: Served, form: str = "pair") -> list[dict[str, object]]:
    lines = served.http.get("/api/choices", params={"form": form}).text.splitlines()
    return [json.loads(line) for line in lines]


def ask_twice(talk: Talk, text: str) -> None:
    talk.button("Two answers").click()
    talk.send(text)
    talk.find("#which").wait_for()


@on_both
@pytest.mark.parametrize("way", ["button", "key"])
def test_the_chosen_answer_stays_and_the_choice_is_kept(talk: Talk, starter: Served, way: str) -> None:
    ask_twice(talk, "Give me an idea.")
    left, right = talk.find(".side .text").all_inner_texts()
    if way == "button":
        talk.find(".side").nth(1).get_by_role("button").click()
    else:
        talk.page.wait_for_function("() => document.activeElement.id === 'which'")
        talk.page.keyboard.press("2")
    talk.find(".note").filter(has_text="You chose this one.").wait_for()
    assert talk.answers.inner_text() == right
    (row,) = choices(starter)
    assert str(row["chosen"]).split() == right.split()
    assert str(row["rejected"]).split() == left.split()
    assert talk.find(".versions .count").inner_text() == "2 of 2"


def test_about_the_same_is_no_preference(talk: Talk, starter: Served) -> None:
    ask_twice(talk, "Give me an idea.")
    talk.button("About the same", exact=False).click()
    talk.find(".versions").wait_for()
    assert choices(starter) == []


def test_a_choice_put_off_can_be_made_after_a_reload(talk: Talk, starter: Served) -> None:
    ask_twice(talk, "Give me an idea.")
    talk.button("Not now").click()
    talk.find(".versions").wait_for()
    talk.page.reload()
    talk.find("#which").wait_for()
    talk.find(".side").first.get_by_role("button").click()
    talk.find(".note").filter(has_text="You chose this one.").wait_for()
    assert len(choices(starter)) == 1


def test_every_nth_answer_asks_for_a_choice(talk: Talk, starter: Served) -> None:
    starter.http.put("/api/settings", json={"compare_every": 2})
    talk.page.reload()
    talk.page.wait_for_selector("body.ready")
    talk.ask("Hello.")
    talk.send("And now?")
    talk.find("#which").wait_for()


def test_two_versions_that_are_there_can_be_compared(talk: Talk, starter: Served) -> None:
    talk.ask("Give me an idea.")
    talk.act(talk.find(".answer"), "again")
    talk.find(".versions .count").filter(has_text="2 of 2").wait_for()
    talk.act(talk.find(".answer"), "two")
    talk.find("#which").wait_for()
    talk.find(".side").first.get_by_role("button").click()
    talk.find(".versions .count").filter(has_text="1 of 2").wait_for()
    (entry,) = starter.http.get("/api/conversations").json()
    (pair,) = starter.http.get(f"/api/conversations/{entry['id']}").json()["comparisons"]
    assert (pair["source"], pair["choice"]) == ("compare", "left")


def test_an_earlier_answer_is_compared_in_its_place_and_what_follows_stays(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["First question", "First answer", "Second question", "Second answer"])
    talk.open(f"#/c/{key}")
    talk.act(talk.find(".answer").first, "again")
    talk.find(".versions .count").filter(has_text="2 of 2").wait_for()
    talk.button("Earlier version").click()
    talk.questions.nth(1).wait_for()
    talk.act(talk.find(".answer").first, "two")
    talk.find("#log > .question + .pair + .question + .answer").wait_for()
    held: list[Any] = []
    turning = re.compile(rf"/api/conversations/{key}$")
    talk.page.route(turning, lambda route: held.append(route) if route.request.method == "PATCH" else route.fallback())
    talk.find(".pair .side").first.get_by_role("button").click()
    until(lambda: talk.page.wait_for_timeout(20) or held)
    assert talk.questions.all_inner_texts() == ["First question", "Second question"]  # at no moment less than it was
    held.pop().continue_()
    talk.page.unroute(turning)
    talk.find(".note").filter(has_text="You chose this one.").wait_for()
    assert talk.questions.all_inner_texts() == ["First question", "Second question"]
    assert talk.answers.all_inner_texts() == ["First answer", "Second answer"]
    (row,) = choices(starter)
    assert row["chosen"] == "First answer"
    talk.act(talk.find(".answer").first, "two")
    talk.find(".pair").wait_for()
    talk.button("About the same", exact=False).click()  # no reason to leave what is on show
    talk.find(".pair").wait_for(state="detached")
    assert talk.answers.all_inner_texts() == ["First answer", "Second answer"]


@on_both
def test_a_thumb_counts_at_once_and_its_reasons_are_added(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["A question", "An answer"])
    talk.open(f"#/c/{key}")
    talk.act(talk.find(".answer"), "down")
    talk.find(".why").wait_for()
    (row,) = choices(starter, "thumb")
    assert (row["completion"], row["label"]) == ("An answer", False)
    talk.button("Too long").click()
    talk.page.get_by_label("Why, in your own words").fill("Get to the point")
    talk.button("Done").click()
    talk.find(".why").wait_for(state="detached")
    wanted = {"rating": -1, "reasons": ["too_long"], "comment": "Get to the point"}

    def stored() -> bool:
        feedback = starter.http.get(f"/api/conversations/{key}").json()["messages"][1]["feedback"]
        return {name: feedback[name] for name in wanted} == wanted

    until(stored)
    assert talk.button("Bad answer").get_attribute("aria-pressed") == "true"


def test_words_go_on_where_they_were_when_a_reason_is_stored_meanwhile(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["A question", "An answer"])
    talk.open(f"#/c/{key}")
    talk.act(talk.find(".answer"), "down")
    talk.find(".why").wait_for()
    held: list[Any] = []
    talk.page.route("**/feedback", lambda route: route.continue_() if held else held.append(route))
    talk.button("Too long").click()
    until(lambda: talk.page.wait_for_timeout(20) or held)
    words = talk.page.get_by_label("Why, in your own words")
    words.click()
    talk.page.keyboard.type("Get to ")
    held[0].continue_()
    talk.find("[data-act=why-too_long][aria-pressed=true]").wait_for()
    talk.page.keyboard.type("the point")
    assert words.input_value() == "Get to the point"


def test_a_thumb_is_taken_back_by_pressing_it_again(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["A question", "An answer"])
    talk.open(f"#/c/{key}")
    for wanted in ("true", "false"):
        talk.act(talk.find(".answer"), "up")
        talk.find(f"[data-act=up][aria-pressed={wanted}]").wait_for()
    assert choices(starter, "thumb") == []


@on_both
def test_an_edited_answer_is_preferred_to_the_one_it_replaces(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["A question", "A stiff answer"])
    talk.open(f"#/c/{key}")
    talk.act(talk.find(".answer"), "edit")
    talk.page.get_by_label("The answer as it should have been").fill("A kind answer")
    talk.button("Save").click()
    talk.find(".note").filter(has_text="your own words").wait_for()
    assert talk.answers.all_inner_texts() == ["A kind answer"]
    (row,) = choices(starter)
    assert (row["chosen"], row["rejected"]) == ("A kind answer", "A stiff answer")


def test_the_taste_panel_counts_and_says_what_choices_have_in_common(talk: Talk, starter: Served) -> None:
    for number in range(4):
        (key,) = bring(starter, [f"Question {number}", f"A long and winding answer that never ends {number}"])
        answer = starter.http.get(f"/api/conversations/{key}").json()["messages"][1]
        starter.http.post(f"/api/messages/{answer['id']}/edit", json={"content": f"Short {number}"})
    talk.side()
    talk.button("Your taste").click()
    panel = talk.find("#taste")
    panel.get_by_text("You took the shorter answer in 4 of the 4 choices").wait_for()
    assert panel.locator("#counts strong").all_inner_texts() == ["4", "0", "0"]
    assert "You have a version of your own: starter@me" in panel.inner_text()
    with talk.page.expect_download() as downloading:
        talk.button("Download choices").click()
    rows = downloading.value.path().read_text(encoding="utf-8").splitlines()
    assert [json.loads(row) for row in rows] == choices(starter)


def test_a_user_with_an_adapter_is_told_of_it_and_answered_by_it(talk: Talk, starter: Served) -> None:
    talk.page.get_by_label("Speaking").select_option("ana")
    talk.page.wait_for_function("() => document.querySelector('#user').value === 'ana'")
    talk.button("Your taste").click()
    talk.find("#taste").get_by_text("You have a version of your own: starter@ana").wait_for()
    talk.page.keyboard.press("Escape")
    talk.ask("Hello.")
    assert talk.find(".facts").inner_text().startswith("starter@ana")
    talk.page.get_by_label("Answering").select_option("starter")
    talk.button("Your taste").click()
    talk.find("#adapter").filter(has_text="It does not answer now: starter was chosen").wait_for()


def test_forgetting_a_user_leaves_the_others(talk: Talk, starter: Served) -> None:
    bring(starter, ["Mine", "Yes"])
    bring(starter, ["Hers", "Yes"], user="ana")
    talk.side()
    talk.button("Your taste").click()
    talk.button("Forget me").click()
    talk.button("Forget me", within="dialog.small").click()
    talk.toasted("Forgotten: 1 conversation")
    assert [entry["title"] for entry in starter.http.get("/api/conversations").json()] == ["Hers"]
