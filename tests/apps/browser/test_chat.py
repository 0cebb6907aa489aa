"""Talking: questions, answers as they grow, stopping, other versions, edits, copies."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from ..conftest import Gate, Served, until
from .conftest import Talk, TalkMaker, bring, on_both

pytestmark = pytest.mark.browser


@on_both
def test_a_question_is_answered_and_both_are_kept(talk: Talk, starter: Served) -> None:
    talk.ask("Tell me about the sea.")
    assert talk.questions.all_inner_texts() == ["Tell me about the sea."]
    stored = starter.http.get("/api/conversations").json()
    assert [entry["title"] for entry in stored] == ["Tell me about the sea."]
    messages = starter.http.get(f"/api/conversations/{stored[0]['id']}").json()["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert talk.answers.inner_text().split() == messages[1]["content"].split()
    assert talk.find("#title").inner_text() == "Tell me about the sea."
    assert stored[0]["id"] in talk.page.url


@on_both
def test_a_second_question_follows_the_first_answer(talk: Talk, starter: Served) -> None:
    talk.ask("Hello.")
    talk.ask("And what else?")
    assert talk.questions.all_inner_texts() == ["Hello.", "And what else?"]
    (entry,) = starter.http.get("/api/conversations").json()
    messages = starter.http.get(f"/api/conversations/{entry['id']}").json()["messages"]
    assert [message["parent"] for message in messages] == [None, *(message["id"] for message in messages[:-1])]


def test_a_suggestion_fills_the_field_and_is_sent_by_hand(talk: Talk) -> None:
    talk.find(".starters button").first.click()
    assert talk.field.input_value() == "Tell me a short story about a fox."
    talk.button("Send").click()
    talk.answers.first.wait_for()
    assert talk.questions.all_inner_texts() == ["Tell me a short story about a fox."]


@on_both
def test_an_answer_is_shown_as_it_grows(held: Served, tab: TalkMaker, gate: Gate) -> None:
    talk = tab(held.url)
    talk.send("Go on.")
    writing = talk.find(".writing .text")
    talk.find(".writing .dots").wait_for()
    lengths = []
    for _ in range(3):
        gate.permit(6)
        talk.page.wait_for_function(
            "least => document.querySelector('.writing .text').textContent.length > least",
            arg=lengths[-1] if lengths else 0,
        )
        lengths.append(len(writing.inner_text()))
    assert lengths == sorted(set(lengths))
    assert talk.find(".writing .dots").is_hidden()
    assert talk.find("#log").get_attribute("aria-busy") == "true"


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stopping_keeps_what_was_said(held: Served, tab: TalkMaker, gate: Gate, way: str) -> None:
    talk = tab(held.url)
    talk.send("Go on.")
    gate.permit(8)
    talk.page.wait_for_function("() => document.querySelector('.writing .text')?.textContent.length > 10")
    if way == "button":
        talk.button("Stop").click()
    else:
        talk.page.keyboard.press("Escape")
    gate.permit(3)
    talk.find(".note").filter(has_text="Stopped.").wait_for()
    (entry,) = held.http.get("/api/conversations").json()
    answer = held.http.get(f"/api/conversations/{entry['id']}").json()["messages"][1]
    assert answer["facts"]["finish"] == "cancelled"
    assert answer["content"]
    assert talk.button("Send").is_visible()


def test_stopping_before_the_first_word_leaves_a_question_that_can_be_answered(
    held: Served, tab: TalkMaker, gate: Gate
) -> None:
    talk = tab(held.url)
    talk.send("Go on.")
    talk.find(".writing .dots").wait_for()
    talk.button("Stop").click()
    gate.permit(1)
    talk.find(".problem").filter(has_text="no answer yet").wait_for()
    while not held.engine.metrics.registry.get_sample_value("edgealign_answers_total", {"finish": "cancelled"}):
        gate.permit(1)  # until the server, too, has seen that nobody waits: permits are for the next answer
        time.sleep(0.02)
    gate.permit(40)
    talk.button("Answer it").click()
    talk.page.wait_for_function("() => document.querySelector('.writing .text')?.textContent.length > 10")


def test_an_answer_goes_on_while_another_conversation_is_read(held: Served, tab: TalkMaker, gate: Gate) -> None:
    bring(held, ["An old question", "An old answer"])
    talk = tab(held.url)
    talk.send("Go on.")
    talk.find(".writing .dots").wait_for()
    talk.find("#conversations a").filter(has_text="An old question").click()
    talk.answers.filter(has_text="An old answer").wait_for()
    assert talk.find(".writing").count() == 0
    gate.permit(8)
    talk.find("#conversations a").filter(has_text="Go on.").click()
    talk.page.wait_for_function("() => document.querySelector('.writing .text')?.textContent.length > 10")


@on_both
def test_another_answer_is_another_version(talk: Talk, starter: Served) -> None:
    talk.ask("Give me an idea.")
    first = talk.answers.inner_text()
    talk.act(talk.find(".answer"), "again")
    talk.find(".versions .count").filter(has_text="2 of 2").wait_for()
    second = talk.answers.inner_text()
    talk.button("Earlier version").click()
    talk.find(".versions .count").filter(has_text="1 of 2").wait_for()
    assert talk.answers.inner_text() == first
    talk.page.reload()
    talk.find(".versions .count").filter(has_text="1 of 2").wait_for()
    talk.button("Later version").click()
    talk.find(".versions .count").filter(has_text="2 of 2").wait_for()
    assert talk.answers.inner_text() == second


@on_both
def test_a_question_asked_in_other_words_is_a_branch_and_the_old_one_stays(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["First question", "First answer", "Second question", "Second answer"])
    talk.open(f"#/c/{key}")
    talk.answers.nth(1).wait_for()
    talk.act(talk.find(".question").first, "edit")
    talk.page.get_by_label("The question in other words").fill("First question, better")
    talk.button("Ask again").click()
    talk.find(".question .count").filter(has_text="2 of 2").wait_for()
    talk.find(".answer:not(.writing) [data-act=again]:enabled").wait_for(state="attached")
    assert talk.questions.all_inner_texts() == ["First question, better"]
    talk.button("Earlier version", within=".question").click()
    talk.answers.nth(1).wait_for()
    assert talk.questions.all_inner_texts() == ["First question", "Second question"]
    assert talk.answers.all_inner_texts() == ["First answer", "Second answer"]


def test_an_edit_that_is_cancelled_changes_nothing(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["A question", "An answer"])
    talk.open(f"#/c/{key}")
    talk.act(talk.find(".question"), "edit")
    talk.find(".editor textarea").fill("Something else")
    talk.page.keyboard.press("Escape")
    assert talk.questions.all_inner_texts() == ["A question"]
    assert talk.page.evaluate("document.activeElement.dataset.act") == "edit"
    assert len(starter.http.get(f"/api/conversations/{key}").json()["messages"]) == 2


def test_an_edit_survives_answers_other_conversations_and_a_save_that_fails(
    talk: Talk, starter: Served, tab: TalkMaker
) -> None:
    key, other = bring(starter, ["A question", "A stiff answer"], ["Elsewhere", "Yes"])
    talk.open(f"#/c/{key}")
    talk.act(talk.find(".answer"), "edit")
    field = talk.page.get_by_label("The answer as it should have been")
    field.fill("A kind answer")
    talk.ask("And a second question?")
    assert field.input_value() == "A kind answer"
    talk.find(f"#conversations [data-id='{other}'] a").click()
    talk.questions.filter(has_text="Elsewhere").wait_for()
    assert field.count() == 0
    talk.page.reload()
    talk.find(f"#conversations [data-id='{key}'] a").click()
    field.wait_for()
    assert field.input_value() == "A kind answer"
    talk.page.route("**/edit", lambda route: route.abort())
    seen = "new MutationObserver(() => banner.hidden || found()).observe(banner, {attributes: true})"
    talk.page.evaluate(f"() => {{ window.gone = new Promise(found => {seen}); }}")  # on show for a moment only
    talk.button("Save").click()
    talk.toasted("not answering")
    talk.page.evaluate("() => window.gone")
    talk.find("#banner").wait_for(state="hidden")  # the server was found again, and everything drawn anew
    assert field.input_value() == "A kind answer"
    talk.page.unroute("**/edit")
    talk.button("Save").click()
    talk.find(".note").filter(has_text="your own words").wait_for()
    assert field.count() == 0
    assert talk.page.evaluate("Object.keys(sessionStorage)") == []


def test_a_question_sent_before_the_one_before_it_is_stored_waits(talk: Talk, starter: Served) -> None:
    held: list[Any] = []
    talk.page.route("**/messages", lambda route: held.append(route))
    talk.send("First")
    until(lambda: talk.page.wait_for_timeout(20) or held)
    talk.send("Second")
    assert talk.field.input_value() == "Second"
    held[0].continue_()
    talk.find("[data-act=again]:enabled").wait_for(state="attached")
    assert (len(held), talk.field.input_value()) == (1, "Second")
    assert talk.questions.all_inner_texts() == ["First"]
    (entry,) = starter.http.get("/api/conversations").json()
    assert entry["messages"] == 2


@on_both
def test_answers_and_code_are_copied_as_they_were_written(talk: Talk, starter: Served) -> None:
    text = "Some *markdown*:\n\n```python\nprint('a < b')\n```"
    (key,) = bring(starter, ["A question", text])
    talk.open(f"#/c/{key}")
    talk.act(talk.find(".answer"), "copy")
    talk.toasted("Copied.")
    assert talk.page.evaluate("navigator.clipboard.readText()") == text
    talk.button("Copy code").click()
    talk.page.wait_for_function("() => navigator.clipboard.readText().then(text => text === \"print('a < b')\")")


def test_a_long_conversation_is_followed_to_its_end_and_not_against_the_readers_will(
    held: Served, tab: TalkMaker, gate: Gate
) -> None:
    (key,) = bring(held, [f"Paragraph {number}\n\n" * 10 for number in range(12)], title="Long")
    talk = tab(held.url)
    talk.open(f"#/c/{key}")
    talk.questions.nth(5).wait_for()
    at_end = "(it => it.scrollHeight - it.scrollTop - it.clientHeight < 5)(document.querySelector('#scroll'))"
    talk.page.wait_for_function(f"() => {at_end}")
    talk.page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    talk.button("To the end").wait_for()
    assert not talk.page.evaluate(at_end)
    talk.button("To the end").click()
    talk.page.wait_for_function(f"() => {at_end}")
    talk.find("#bottom").wait_for(state="hidden")  # the browser tells of scrolling with its next frame


def test_a_question_belongs_to_the_conversation_that_is_being_opened(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["First", "An answer"])
    held: list[Any] = []
    place = re.compile(rf"/api/conversations/{key}$")
    talk.page.route(place, lambda route: route.continue_() if held else held.append(route))
    talk.open(f"#/c/{key}")
    until(lambda: talk.page.wait_for_timeout(20) or held)
    talk.send("Second")
    talk.page.wait_for_timeout(100)
    held[0].continue_()
    talk.find(".answer:not(.writing) [data-act=again]:enabled").nth(1).wait_for(state="attached")
    assert talk.questions.all_inner_texts() == ["First", "Second"]
    assert len(starter.http.get("/api/conversations").json()) == 1


def test_turns_that_no_longer_fit_are_mentioned(talk: Talk, starter: Served) -> None:
    words = "word " * 900
    (key,) = bring(starter, [words, words] * 4, title="Long")
    talk.open(f"#/c/{key}")
    talk.ask("Short question?")
    talk.find(".note").filter(has_text="outgrown the context").wait_for()


def test_a_question_that_is_too_long_says_so_and_is_not_lost(talk: Talk) -> None:
    talk.send("word " * 30_000)
    problem = talk.find(".problem")
    problem.wait_for()
    assert "context" in problem.inner_text().lower() or "tokens" in problem.inner_text().lower()
    assert talk.button("Try again").is_visible()
    assert talk.questions.count() == 1


def test_a_problem_is_announced_once(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["A question", "An answer"])
    talk.open(f"#/c/{key}")
    talk.answers.wait_for()
    talk.send("word " * 30_000)
    problem = talk.find(".problem[role=alert]")
    problem.wait_for()
    problem.evaluate("node => (node.dataset.seen = 'yes')")
    talk.act(talk.find(".answer").first, "up")
    talk.find("[data-act=up][aria-pressed=true]").wait_for()
    assert problem.get_attribute("data-seen") == "yes"  # a new node would be read out again


def test_the_answers_model_and_speed_are_told(talk: Talk) -> None:
    talk.ask("Hello.")
    assert talk.find(".facts").inner_text().startswith("starter · ")
    assert "tokens/s" in talk.find(".facts").inner_text()


def test_the_chosen_model_answers(talk: Talk, starter: Served) -> None:
    talk.page.get_by_label("Answering").select_option("starter@ana")
    talk.ask("Hello.")
    assert talk.find(".facts").inner_text().startswith("starter@ana · ")
    (entry,) = starter.http.get("/api/conversations").json()
    answer: Any = starter.http.get(f"/api/conversations/{entry['id']}").json()["messages"][1]
    assert answer["facts"]["adapter"] == starter.engine.facts["adapters"]["ana"]


@on_both
def test_a_chosen_model_is_said_and_is_nobody_elses(talk: Talk, starter: Served) -> None:
    talk.side().get_by_label("Answering").select_option("starter@ana")
    if talk.phone:
        talk.page.keyboard.press("Escape")
    talk.find("#chosen").filter(has_text="starter@ana answers").wait_for()
    talk.button("Two answers").click()
    talk.send("Hello.")  # a choice is between two answers of the chosen model too
    talk.find("#which").wait_for()
    (entry,) = starter.http.get("/api/conversations").json()
    said: Any = starter.http.get(f"/api/conversations/{entry['id']}").json()["messages"][1:]
    assert [each["facts"]["model"] for each in said] == ["starter@ana"] * 2
    talk.side().get_by_label("Speaking").select_option("ben")
    talk.find(".welcome").wait_for()
    assert talk.find("#chosen").is_hidden()
    talk.ask("Hello.")
    assert talk.find(".facts").inner_text().startswith("starter@ben · ")
    talk.side().get_by_label("Speaking").select_option("me")
    talk.find("#chosen").filter(has_text="starter@ana answers").wait_for()
    if talk.phone:
        talk.page.keyboard.press("Escape")
    talk.button("Back to automatic").click()
    assert talk.find("#chosen").is_hidden()
    assert talk.page.get_by_label("Answering").input_value() == ""
