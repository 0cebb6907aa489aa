"""What is kept: conversations found, renamed, deleted, carried out and in, seen by two tabs, by their user only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Gate, Served, until
from .conftest import Talk, TalkMaker, archive, bring, on_both

pytestmark = pytest.mark.browser


def wait_for_entries(talk: Talk, titles: list[str]) -> None:
    talk.page.wait_for_function(
        "wanted => [...document.querySelectorAll('#conversations a')].map(a => a.textContent).join('|') === wanted",
        arg="|".join(titles),
    )


@on_both
def test_search_finds_titles_and_what_was_said(talk: Talk, starter: Served) -> None:
    bring(starter, ["Cooking", "Boil the noodles"], ["Travel", "Take a train"])
    side = talk.side()
    for query, found in (("NOODLE", ["Cooking"]), ("travel", ["Travel"]), ("%", []), ("", ["Cooking", "Travel"])):
        side.get_by_role("searchbox").fill(query)
        wait_for_entries(talk, found)
    side.get_by_role("searchbox").fill("nothing like it")
    side.get_by_text("Nothing found.").wait_for()


@on_both
def test_a_conversation_is_renamed(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["Old name", "Yes"])
    talk.open(f"#/c/{key}")
    talk.answers.wait_for()
    talk.side().get_by_role("link", name="Old name").hover()
    talk.button("Rename Old name").click()
    talk.page.get_by_label("Title").fill("New name")
    talk.page.keyboard.press("Enter")
    wait_for_entries(talk, ["New name"])
    assert talk.find("#title").inner_text() == "New name"
    assert [entry["title"] for entry in starter.http.get("/api/conversations").json()] == ["New name"]


@on_both
def test_a_conversation_is_deleted_after_a_question(talk: Talk, starter: Served) -> None:
    keys = bring(starter, ["Keep", "Yes"], ["Drop", "Yes"])
    talk.open(f"#/c/{keys[1]}")
    talk.answers.wait_for()
    for answer in ("Cancel", "Delete"):
        talk.side().get_by_role("link", name="Drop").hover()
        talk.button("Delete Drop").click()
        talk.button(answer, within="dialog.small").click()
        talk.find("dialog.small").wait_for(state="detached")
    wait_for_entries(talk, ["Keep"])
    talk.find(".welcome").wait_for()
    assert [entry["id"] for entry in starter.http.get("/api/conversations").json()] == keys[:1]


def test_drafts_go_with_their_conversation_and_their_user(talk: Talk, starter: Served) -> None:
    key, _ = bring(starter, ["Mine", "Yes"], ["Mine too", "Yes"])
    talk.page.reload()
    talk.page.wait_for_selector("body.ready")
    talk.field.fill("Of nobody's business")
    talk.open(f"#/c/{key}")
    talk.answers.wait_for()
    talk.field.fill("Half a thought")
    talk.act(talk.find(".answer"), "edit")
    talk.find(".editor textarea").fill("Other words")
    kept = "Object.keys(sessionStorage).length"
    assert talk.page.evaluate(kept) == 3
    talk.find(f"#conversations [data-id='{key}']").hover()
    talk.button("Delete Mine").click()
    talk.button("Delete", within="dialog.small").click()
    talk.toasted("Deleted.")
    assert talk.page.evaluate(kept) == 1
    talk.page.get_by_label("Speaking").select_option("ana")
    talk.page.wait_for_function("() => document.querySelector('#field').value === ''")
    talk.page.get_by_label("Speaking").select_option("me")
    talk.page.wait_for_function("() => document.querySelector('#field').value.startsWith('Of nobody')")
    talk.button("Your taste").click()
    talk.button("Forget me").click()
    talk.button("Forget me", within="dialog.small").click()
    talk.toasted("Forgotten")
    assert talk.page.evaluate(kept) == 0


def test_without_hovering_every_conversation_can_be_renamed_and_deleted(starter: Served, tab: TalkMaker) -> None:
    bring(starter, ["One", "Yes"], ["Two", "Yes"])
    tablet = {"viewport": {"width": 1024, "height": 768}, "has_touch": True, "is_mobile": True}
    for talk in (tab(starter.url, on="phone"), tab(starter.url, **tablet)):
        talk.side()
        for name in ("Rename One", "Delete One", "Rename Two", "Delete Two"):
            talk.button(name).wait_for()
        talk.button("Delete Two").tap()
        talk.button("Cancel", within="dialog.small").tap()


def test_export_and_import_bring_everything_back(talk: Talk, starter: Served, tmp_path: Path) -> None:
    bring(starter, ["One", "Yes", "More", "No"], ["Two", "Yes"])
    before = starter.http.get("/api/export").json()
    talk.side()
    talk.button("Settings").click()
    with talk.page.expect_download() as downloading:
        talk.button("Export all").click()
    file = tmp_path / "all.json"
    downloading.value.save_as(file)
    assert json.loads(file.read_text(encoding="utf-8")) == before
    for entry in before["conversations"][:1]:
        starter.http.delete(f"/api/conversations/{entry['id']}")
    talk.page.set_input_files("#file", file)
    talk.toasted("1 imported, 1 were here already.")
    assert starter.http.get("/api/export").json() == before


def test_one_conversation_is_exported(talk: Talk, starter: Served) -> None:
    keys = bring(starter, ["One", "Yes"], ["Two", "Yes"])
    talk.page.reload()
    talk.side().get_by_role("link", name="Two").hover()
    with talk.page.expect_download() as downloading:
        talk.button("Export Two").click()
    assert downloading.value.suggested_filename == "edgealign-Two.json"
    found = json.loads(downloading.value.path().read_text(encoding="utf-8"))
    assert [entry["id"] for entry in found["conversations"]] == keys[1:]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no json", "is no JSON file"),
        (b"[]", "body"),
        (b'{"format": "other", "version": 1, "conversations": []}', "format"),
    ],
)
def test_a_file_that_is_no_export_is_refused_and_nothing_changes(
    talk: Talk, starter: Served, tmp_path: Path, content: bytes, said: str
) -> None:
    bring(starter, ["One", "Yes"])
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    talk.page.set_input_files("#file", file)
    talk.toasted(said)
    assert len(starter.http.get("/api/conversations").json()) == 1


def test_a_bad_conversation_in_a_file_brings_nothing_in(talk: Talk, starter: Served, tmp_path: Path) -> None:
    document = archive(["Good", "Yes"], ["Bad", "Yes"])
    document["conversations"][1]["messages"][1]["parent"] = None
    file = tmp_path / "half.json"
    file.write_text(json.dumps(document))
    talk.page.set_input_files("#file", file)
    talk.toasted("take turns")
    assert starter.http.get("/api/conversations").json() == []


def test_days_are_headings_and_the_list_grows_on_demand(talk: Talk, starter: Served) -> None:
    bring(starter, *([f"Talk {number}", "Yes"] for number in range(65)))
    bring(starter, ["Long ago", "Yes"], days_ago=400)
    talk.page.reload()
    talk.page.wait_for_selector("#conversations a")
    assert talk.find("#conversations h3").first.inner_text() == "Today"
    assert len(talk.entries()) == 60
    talk.button("Show more").click()
    talk.page.wait_for_function("() => document.querySelectorAll('#conversations a').length === 66")
    assert len(talk.find("#conversations h3").all()) == 2


def test_everybody_sees_their_own_conversations(talk: Talk, starter: Served) -> None:
    bring(starter, ["Mine", "Yes"])
    bring(starter, ["Hers", "Yes"], user="ana")
    talk.page.reload()
    wait_for_entries(talk, ["Mine"])
    talk.page.get_by_label("Speaking").select_option("ana")
    wait_for_entries(talk, ["Hers"])
    talk.page.get_by_label("Speaking").select_option(label="Somebody new…")
    talk.page.get_by_label("Name", exact=True).fill("Zoë")
    talk.page.keyboard.press("Enter")
    wait_for_entries(talk, [])
    assert starter.http.get("/api/settings").json()["user"] == "Zoë"
    talk.ask("Hello.")
    (entry,) = starter.http.get("/api/conversations", params={"user": "Zoë"}).json()
    assert entry["title"] == "Hello."


def test_back_and_forward_walk_through_conversations(talk: Talk, starter: Served) -> None:
    bring(starter, ["One", "First answer"], ["Two", "Second answer"])
    talk.page.reload()
    talk.side().get_by_role("link", name="One").click()
    talk.answers.filter(has_text="First answer").wait_for()
    talk.side().get_by_role("link", name="Two").click()
    talk.answers.filter(has_text="Second answer").wait_for()
    talk.page.go_back()
    talk.answers.filter(has_text="First answer").wait_for()
    talk.page.go_forward()
    talk.answers.filter(has_text="Second answer").wait_for()


def test_quick_clicks_end_where_the_last_one_went(talk: Talk, starter: Served) -> None:
    slow, quick = bring(starter, ["Slow", "First answer"], ["Quick", "Second answer"])
    talk.page.reload()
    held: list[Any] = []
    talk.page.route(f"**/api/conversations/{slow}", lambda route: held.append(route))
    side = talk.side()
    for name in ("Slow", "Quick", "Slow"):  # asked for, on show, and asked for while something else is on show
        side.get_by_role("link", name=name).click()
        if name == "Quick":
            talk.answers.filter(has_text="Second answer").wait_for()
    side.get_by_role("link", name="Quick").click()
    until(lambda: talk.page.wait_for_timeout(20) or len(held) == 2)
    for each in held:
        with talk.page.expect_response(f"**/api/conversations/{slow}"):
            each.continue_()
    talk.page.wait_for_timeout(100)
    assert len(held) == 2
    assert talk.answers.all_inner_texts() == ["Second answer"]
    assert quick in talk.page.url


def test_an_address_of_a_conversation_that_is_gone_shows_a_new_one(talk: Talk) -> None:
    talk.open(f"#/c/{'0' * 32}")
    talk.find(".welcome").wait_for()
    talk.page.wait_for_function("() => !location.hash")


def test_a_draft_survives_a_reload_and_a_look_elsewhere(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["One", "Yes"])
    talk.field.fill("Half a thought")
    talk.open(f"#/c/{key}")
    talk.answers.wait_for()
    assert talk.field.input_value() == ""
    talk.button("New conversation").click()
    talk.find(".welcome").wait_for()
    assert talk.field.input_value() == "Half a thought"
    talk.page.reload()
    talk.page.wait_for_selector("body.ready")
    assert talk.field.input_value() == "Half a thought"


def test_a_new_conversation_is_there_before_anything_can_be_typed(talk: Talk, starter: Served) -> None:
    (key,) = bring(starter, ["One", "Yes"])
    talk.open(f"#/c/{key}")
    talk.answers.wait_for()
    kept = talk.page.evaluate(
        "() => { document.querySelector('#new').click();"
        " const field = document.querySelector('#field'); field.value = 'Next';"
        " field.dispatchEvent(new Event('input')); return Object.keys(sessionStorage); }"
    )
    assert [name.split(":")[2] for name in kept] == ["new"]
    talk.page.go_back()
    talk.answers.wait_for()


def test_two_tabs_see_each_others_conversations(talk: Talk, tab: TalkMaker, starter: Served) -> None:
    other = tab(starter.url, beside=talk)
    talk.ask("Hello from the first.")
    wait_for_entries(other, ["Hello from the first."])
    other.find("#conversations a").click()
    other.questions.wait_for()
    talk.ask("A second question.")
    other.questions.filter(has_text="A second question.").wait_for()
    other.answers.nth(1).wait_for()
    assert other.answers.all_inner_texts() == talk.answers.all_inner_texts()


def test_what_one_tab_deletes_leaves_the_other(talk: Talk, tab: TalkMaker, starter: Served) -> None:
    (key,) = bring(starter, ["Going", "Yes"])
    talk.open(f"#/c/{key}")
    other = tab(starter.url, beside=talk)
    wait_for_entries(other, ["Going"])
    other.find("#conversations li").hover()
    other.button("Delete Going").click()
    other.button("Delete", within="dialog.small").click()
    talk.find(".welcome").wait_for()
    wait_for_entries(talk, [])


def test_two_tabs_ask_at_once_and_a_third_is_told_to_wait(held: Served, tab: TalkMaker, gate: Gate) -> None:
    tabs = [tab(held.url)]
    tabs += [tab(held.url, beside=tabs[0]) for _ in range(2)]
    for number, talk in enumerate(tabs):
        talk.send(f"Question {number}")
        if number == 0:
            until(gate.entered.is_set)
        if number == 1:
            until(lambda: held.engine.metrics.waiting._value.get() == 1)
    problem = tabs[2].find(".problem")
    problem.filter(has_text="waiting already").wait_for()
    assert "Try again in about" in problem.inner_text()
