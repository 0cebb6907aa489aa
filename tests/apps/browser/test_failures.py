"""When things go wrong: a server that is killed, restarted, was never there, or does not know this browser."""

from __future__ import annotations

import httpx
import pytest

from ..conftest import TOKEN, Served
from .conftest import Program, TalkMaker, on_both

pytestmark = pytest.mark.browser


@on_both
def test_a_server_killed_mid_answer_is_missed_and_found_again(program: Program, tab: TalkMaker, device: str) -> None:
    talk = tab(program.url)
    talk.send("Go on.")
    talk.page.wait_for_function("() => document.querySelector('.writing .text')?.textContent.length > 10")
    said = talk.find(".writing .text").inner_text()
    program.kill()
    talk.find(".problem").filter(has_text="cut off").wait_for()
    talk.find("#banner").filter(has_text="not running any more").wait_for()
    assert talk.find(".answer .text").inner_text().startswith(said[:10])  # what was said is still there to be read
    program.start()
    talk.find("#banner").wait_for(state="hidden")
    talk.button("Try again").click()
    talk.page.wait_for_function("() => document.querySelector('.writing .text')?.textContent.length > 10")
    talk.button("Stop").click()
    talk.find(".note").filter(has_text="Stopped.").wait_for()


def test_history_is_intact_after_a_kill_and_a_restart(program: Program, tab: TalkMaker) -> None:
    talk = tab(program.url)
    talk.send("Remember this.")
    talk.page.wait_for_function("() => document.querySelector('.writing .text')?.textContent.length > 10")
    talk.button("Stop").click()
    talk.find(".note").filter(has_text="Stopped.").wait_for()
    talk.act(talk.find(".answer"), "up")
    talk.find("[data-act=up][aria-pressed=true]").wait_for()
    answer = talk.answers.inner_text()
    program.kill()
    program.start()
    talk.page.reload()
    talk.answers.wait_for()
    assert talk.questions.all_inner_texts() == ["Remember this."]
    assert talk.answers.inner_text() == answer
    assert talk.find("[data-act=up][aria-pressed=true]").count() == 1
    assert talk.entries() == ["Remember this."]


def test_a_question_to_a_server_that_is_gone_stays_in_the_field(program: Program, tab: TalkMaker) -> None:
    talk = tab(program.url)
    program.kill()
    talk.send("Is anybody there?")
    talk.find("#banner").filter(has_text="not running any more").wait_for()
    talk.page.wait_for_function("() => document.querySelector('#field').value === 'Is anybody there?'")
    program.start()
    talk.find("#banner").wait_for(state="hidden")
    talk.field.press("Enter")
    talk.questions.filter(has_text="Is anybody there?").wait_for()
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert len(httpx.get(f"{program.url}/api/conversations", headers=headers).json()) == 1


def test_a_question_asked_before_is_not_lost_either(program: Program, tab: TalkMaker) -> None:
    talk = tab(program.url)
    talk.send("Yes")
    talk.page.wait_for_function("() => document.querySelector('.writing .text')?.textContent.length > 10")
    talk.button("Stop").click()
    talk.find(".note").filter(has_text="Stopped.").wait_for()
    program.kill()
    talk.send("Yes")
    talk.find("#banner").filter(has_text="not running any more").wait_for()
    talk.page.wait_for_function("() => document.querySelector('#field').value === 'Yes'")


def test_a_page_that_lost_its_cookie_says_how_to_get_in(starter: Served, tab: TalkMaker) -> None:
    talk = tab(starter.url)
    talk.page.context.clear_cookies()
    talk.send("Hello.")
    talk.find("#banner").filter(has_text="locked").wait_for()
    assert talk.field.input_value() == "Hello."
    assert starter.http.get("/api/conversations").json() == []


def test_without_the_token_there_is_no_page(starter: Served, tab: TalkMaker) -> None:
    talk = tab(starter.url, ready=False)
    assert talk.page.goto(starter.url).status == 401
    assert talk.find("#field").count() == 0
