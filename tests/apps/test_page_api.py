"""The page's API: conversations as trees, answers that are stored with where they came from, choices, settings."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.data.encode import end_of_turn_id
from edgealign.errors import EdgealignError
from edgealign.models.load import load_tokenizer
from edgealign.runtimes.scripted import ScriptedSession

from .conftest import PATIENCE_S, TOKEN, USERS, EngineMaker, Gate, Served, serving, until

Json = dict[str, Any]


def events_of(served: Served, path: str, form: Json) -> list[Json]:
    answer = served.http.post(path, json=form)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]


def begin(served: Served, text: str = "Tell me of a fox.", **form: str) -> tuple[str, str]:
    """A conversation and its first question."""
    made = served.http.post("/api/conversations", json=form).json()["id"]
    return made, ask(served, made, text)


def ask(served: Served, conversation: str, text: str, parent: str | None = None) -> str:
    sent = served.http.post(f"/api/conversations/{conversation}/messages", json={"content": text, "parent": parent})
    assert sent.status_code == 201, sent.text
    return str(sent.json()["id"])


def answer(served: Served, question: str, **form: Any) -> Json:
    body = {"stream": False, "max_tokens": 6, "seed": 1, **form}
    sent = served.http.post(f"/api/messages/{question}/answers", json=body)
    assert sent.status_code == 200, sent.text
    return dict(sent.json())


def test_a_question_is_answered_in_events_and_stored(scripted_server: Served) -> None:
    conversation, question = begin(scripted_server)
    events = events_of(scripted_server, f"/api/messages/{question}/answers", {"max_tokens": 8, "seed": 4})
    assert events[0]["type"] == "start"
    assert {event["type"] for event in events[1:-1]} == {"token"}
    message = events[-1]["message"]
    assert message["id"] == events[0]["message"]
    assert message["content"] == "".join(event["text"] for event in events[1:-1]).rstrip()
    facts = message["facts"]
    assert (facts["model"], facts["sampling"]["seed"], facts["tokens"]) == ("script", 4, 8)
    assert facts["digest"] == "0" * 64
    found = scripted_server.http.get(f"/api/conversations/{conversation}").json()
    assert [entry["id"] for entry in found["messages"]] == [question, message["id"]]
    assert found["head"] == message["id"]
    assert found["title"] == "Tell me of a fox."


def test_regenerating_and_asking_otherwise_make_branches_and_the_head_chooses(scripted_server: Served) -> None:
    conversation, question = begin(scripted_server)
    first, second = (answer(scripted_server, question, seed=seed, temperature=2) for seed in (1, 2))
    assert first["parent"] == second["parent"] == question
    assert first["content"] != second["content"]
    other = ask(scripted_server, conversation, "Of a hen, then.", first["id"])
    otherwise = ask(scripted_server, conversation, "Of a bear, then.", first["id"])
    answer(scripted_server, otherwise)
    path = f"/api/conversations/{conversation}"
    assert scripted_server.http.patch(path, json={"head": other}).json()["head"] == other
    elsewhere = begin(scripted_server)[1]
    assert scripted_server.http.patch(path, json={"head": elsewhere}).status_code == 400
    parents = {entry["id"]: entry["parent"] for entry in scripted_server.http.get(path).json()["messages"]}
    assert (parents[other], parents[otherwise]) == (first["id"], first["id"])


def test_the_model_sees_the_branch_and_the_system_turn(scripted_server: Served) -> None:
    conversation, question = begin(scripted_server, system="Be brief.")
    first = answer(scripted_server, question, temperature=2)
    following = ask(scripted_server, conversation, "Why?", first["id"])
    second = answer(scripted_server, following)
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of a fox."},
        {"role": "assistant", "content": first["content"]}, {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    sampling = {"temperature": 0.3, "seed": 1, "max_tokens": 6}
    direct = scripted_server.http.post(
        "/v1/chat/completions", json={"model": "script", "messages": turns, **sampling}
    ).json()
    assert direct["choices"][0]["message"]["content"].rstrip() == second["content"]
    assert direct["usage"]["prompt_tokens"] == second["facts"]["prompt_tokens"]


def test_a_conversation_is_answered_by_its_users_adapter(scripted_server: Served) -> None:
    said = {}
    for user in (*USERS, "nobody"):
        made = answer(scripted_server, begin(scripted_server, user=user)[1])
        said[user] = made["content"]
        assert made["facts"]["model"] == (f"script@{user}" if user in USERS else "script")
    assert len(set(said.values())) == 3
    question = begin(scripted_server, user="ana")[1]
    assert answer(scripted_server, question, model="script")["content"] == said["nobody"]
    assert scripted_server.http.post(f"/api/messages/{question}/answers", json={"model": "x"}).status_code == 404


def test_the_oldest_turns_go_when_the_context_is_full(scripted_server: Served) -> None:
    conversation, question = begin(scripted_server, "word " * 150)
    first = answer(scripted_server, question)
    following = ask(scripted_server, conversation, "word " * 150, first["id"])
    assert answer(scripted_server, following, max_tokens=250)["facts"]["dropped"] == 2
    too_long = begin(scripted_server, "word " * 1000)[1]
    refused = scripted_server.http.post(f"/api/messages/{too_long}/answers", json={})
    assert refused.status_code == 400
    assert "leave no room" in refused.json()["error"]["message"]


def test_two_answers_are_compared_and_the_choice_is_a_pair(scripted_server: Served) -> None:
    conversation, question = begin(scripted_server, user="ana")
    events = events_of(scripted_server, f"/api/messages/{question}/comparisons", {"max_tokens": 6, "seed": 1})
    assert {event.get("side") for event in events} == {None, "left", "right"}
    last = events[-1]
    assert last["left"]["content"] != last["right"]["content"]
    pair = last["comparison"]
    assert (pair["prompt"], pair["choice"], pair["left"]) == (question, None, last["left"]["id"])
    path = f"/api/comparisons/{pair['id']}/choice"
    for choice in ("left", "right", "right"):
        assert scripted_server.http.put(path, json={"choice": choice}).json()["choice"] == choice
    assert scripted_server.http.put(path, json={"choice": "both"}).status_code == 400
    (row,) = map(json.loads, scripted_server.http.get("/api/choices?user=ana").text.splitlines())
    assert (row["chosen"], row["rejected"]) == (last["right"]["content"], last["left"]["content"])
    assert row["user_id"] == "ana"
    found = scripted_server.http.get(f"/api/conversations/{conversation}").json()
    assert found["head"] == last["right"]["id"]
    assert len(found["comparisons"]) == 1


class Saying(ScriptedSession):
    """Says the given answers in turn; None is a failure of the model."""

    def __init__(self, answers: Sequence[str | None]) -> None:
        tokenizer = load_tokenizer("starter")
        super().__init__(vocab=len(tokenizer))
        end = end_of_turn_id(tokenizer)
        self.answers = iter([
            None if text is None else [*tokenizer.encode(text, add_special_tokens=False), end] for text in answers
        ])  # fmt: skip
        self.rest: Iterator[int] = iter(())
        self.begun, self.may_begin = threading.Semaphore(0), threading.Semaphore(100)

    def prefill(self, tokens: Sequence[int]) -> Any:
        if not self.tokens:
            self.begun.release()
            assert self.may_begin.acquire(timeout=PATIENCE_S)
            answer = next(self.answers)
            if answer is None:
                raise EdgealignError("the model", "is broken")
            self.rest = iter(answer)
        return super().prefill(tokens)

    def _logits(self) -> Any:
        logits = np.zeros(self.vocab, dtype=np.float32)
        logits[next(self.rest)] = 50.0
        return logits


@pytest.mark.parametrize(
    ("answers", "again", "shown"),
    [
        (["One.", "Two."], [], ["One.", "Two."]),
        (["", "One.", "One.", " ", "Two."], ["left", "right", "right"], ["One.", "Two."]),
        (["One.", "", "One.", ""], ["right"] * 2, ["One."]),
        (["", "", "", "Two."], ["left"] * 2, ["Two."]),
        ([""] * 6, ["left", "left", "right", "right"], [""]),
    ],
)
def test_an_empty_side_or_one_like_the_other_is_drawn_again_and_not_offered(
    scripted: EngineMaker, tmp_path: Path, answers: list[str], again: list[str], shown: list[str]
) -> None:
    with serving(scripted(Saying(answers)), tmp_path) as served:
        conversation, question = begin(served)
        events = events_of(served, f"/api/messages/{question}/comparisons", {"max_tokens": 6})
        found = served.http.get(f"/api/conversations/{conversation}").json()
    assert [event["side"] for event in events if event["type"] == "again"] == again
    last = events[-1]
    assert last["type"] == ("comparison" if len(shown) == 2 else "answer")
    said = [last[side] for side in ("left", "right")] if len(shown) == 2 else [last["message"]]
    assert [message["content"] for message in said] == shown
    assert [message["content"] for message in found["messages"][1:]] == shown  # and nothing that was not shown
    assert len(found["comparisons"]) == (len(shown) == 2)


def test_of_two_answers_the_first_is_kept_when_the_second_fails(scripted: EngineMaker, tmp_path: Path) -> None:
    with serving(scripted(Saying(["One.", None])), tmp_path) as served:
        conversation, question = begin(served)
        events = events_of(served, f"/api/messages/{question}/comparisons", {"max_tokens": 6})
        assert events[-1]["error"]["code"] == "runtime_failed"

        def messages() -> list[Json]:
            return list(served.http.get(f"/api/conversations/{conversation}").json()["messages"])

        until(lambda: len(messages()) == 2)
        assert (messages()[1]["content"], messages()[1]["parent"]) == ("One.", question)


def test_of_two_answers_the_first_is_kept_when_the_second_is_stopped(scripted: EngineMaker, tmp_path: Path) -> None:
    session = Saying(["One.", "Two."])
    session.may_begin = threading.Semaphore(1)
    with serving(scripted(session), tmp_path) as served:
        conversation, question = begin(served)
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        connection.request("POST", f"/api/messages/{question}/comparisons", "{}", headers)
        assert connection.getresponse().read(6) == b"data: "
        for _ in range(2):
            assert session.begun.acquire(timeout=PATIENCE_S)
        connection.close()
        path = f"/api/conversations/{conversation}"
        until(lambda: len(served.http.get(path).json()["messages"]) == 2)
        session.may_begin.release()
        found = served.http.get(path).json()
        assert (found["messages"][1]["content"], found["comparisons"]) == ("One.", [])


def test_two_models_are_compared_in_random_places(scripted_server: Served) -> None:
    places = set()
    for _ in range(12):
        question = begin(scripted_server)[1]
        form = {"models": ["script", "script@ana"], "max_tokens": 3, "seed": 1}
        last = events_of(scripted_server, f"/api/messages/{question}/comparisons", form)[-1]
        models = [last[side]["facts"]["model"] for side in ("left", "right")]
        assert sorted(models) == ["script", "script@ana"]
        places.add(models[0])
    assert len(places) == 2  # all in one place: 1 in 2048


def test_regenerated_answers_can_be_compared_too(scripted_server: Served) -> None:
    question = begin(scripted_server)[1]
    left, right = (answer(scripted_server, question, seed=seed, temperature=2)["id"] for seed in (1, 2))
    made = scripted_server.http.post("/api/comparisons", json={"left": left, "right": right})
    assert (made.status_code, made.json()["prompt"]) == (201, question)
    other = answer(scripted_server, begin(scripted_server)[1])["id"]
    assert scripted_server.http.post("/api/comparisons", json={"left": left, "right": other}).status_code == 400
    assert scripted_server.http.post("/api/comparisons", json={"left": left, "right": left}).status_code == 400


def test_an_edited_answer_is_preferred_to_the_old_one(scripted_server: Served) -> None:
    _, question = begin(scripted_server, user="ben")
    old = answer(scripted_server, question)
    edited = scripted_server.http.post(f"/api/messages/{old['id']}/edit", json={"content": "A clever animal."}).json()
    assert edited["message"]["facts"]["edited_from"] == old["id"]
    assert (edited["comparison"]["choice"], edited["comparison"]["source"]) == ("left", "edit")
    same = scripted_server.http.post(f"/api/messages/{old['id']}/edit", json={"content": old["content"]})
    assert same.status_code == 400
    assert scripted_server.http.post(f"/api/messages/{question}/edit", json={"content": "x"}).status_code == 404


def test_thumbs_with_reasons_are_kept_and_taken_back(scripted_server: Served) -> None:
    _, question = begin(scripted_server)
    said = answer(scripted_server, question)["id"]
    path = f"/api/messages/{said}/feedback"
    form = {"rating": -1, "reasons": ["too_long", "incorrect"], "comment": "Foxes bark."}
    kept = scripted_server.http.put(path, json=form).json()["feedback"]
    assert {name: kept[name] for name in form} == form
    (row,) = map(json.loads, scripted_server.http.get("/api/choices?form=thumb").text.splitlines())
    assert row["label"] is False
    assert scripted_server.http.delete(path).json()["feedback"] is None
    assert scripted_server.http.put(f"/api/messages/{question}/feedback", json=form).status_code == 404
    assert scripted_server.http.put(path, json={"rating": 0}).status_code == 400
    assert scripted_server.http.put(path, json={"rating": 1, "reasons": ["because"]}).status_code == 400


def test_settings_are_in_force_and_go_back(scripted_server: Served) -> None:
    http = scripted_server.http
    plain = http.get("/api/settings").json()
    assert (plain["user"], plain["theme"]) == ("me", "system")
    changed = http.put("/api/settings", json={"user": "ana", "max_tokens": 3, "system": "Be brief."}).json()
    assert changed == plain | {"user": "ana", "max_tokens": 3, "system": "Be brief."}
    made, question = begin(scripted_server)
    found = http.get(f"/api/conversations/{made}").json()
    assert (found["user"], found["system"]) == ("ana", "Be brief.")
    assert answer(scripted_server, question, max_tokens=None)["facts"]["tokens"] == 3
    back = http.put("/api/settings", json={"user": None, "max_tokens": None, "system": None}).json()
    assert back == plain
    assert http.put("/api/settings", json={"temperature": 9}).status_code == 400
    assert http.get("/api/state").json()["settings"] == plain


def test_rename_search_delete_and_forget(scripted_server: Served) -> None:
    http = scripted_server.http
    kept = begin(scripted_server, "Where do bears sleep?")[0]
    gone = begin(scripted_server, "And hens?", user="ana")[0]
    assert http.patch(f"/api/conversations/{kept}", json={"title": "Bears"}).json()["title"] == "Bears"
    assert [entry["id"] for entry in http.get("/api/conversations?query=sleep").json()] == [kept]
    assert [entry["id"] for entry in http.get("/api/conversations?user=ana").json()] == [gone]
    assert [entry["id"] for entry in http.get("/api/conversations?limit=1&offset=1").json()] == [kept]
    assert http.delete("/api/users/ana").json() == {"conversations": 1, "versions": 0}
    assert http.get(f"/api/conversations/{gone}").status_code == 404
    assert http.delete(f"/api/conversations/{kept}").status_code == 204
    assert http.delete(f"/api/conversations/{kept}").status_code == 404
    assert http.get("/api/conversations").json() == []


def test_export_and_import_over_http(scripted_server: Served, scripted: EngineMaker, tmp_path: Path) -> None:
    _, question = begin(scripted_server)
    said = answer(scripted_server, question)["id"]
    scripted_server.http.put(f"/api/messages/{said}/feedback", json={"rating": 1})
    archive = scripted_server.http.get("/api/export").json()
    with serving(scripted(), tmp_path / "other") as other:
        assert other.http.post("/api/import", json=archive).json() == {"imported": 1, "skipped": 0}
        assert other.http.get("/api/export").json() == archive
        assert other.http.post("/api/import", json={**archive, "version": 2}).status_code == 400


def test_what_was_said_before_the_page_left_is_kept(scripted: EngineMaker, gate: Gate, tmp_path: Path) -> None:
    with serving(scripted(gate), tmp_path) as served:
        conversation, question = begin(served)
        gate.held = True
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        connection.request("POST", f"/api/messages/{question}/answers", json.dumps({"temperature": 2}), headers)
        gate.permit(20)
        until(lambda: gate.steps >= 20)
        start = json.loads(connection.getresponse().readline().removeprefix(b"data: "))
        connection.close()
        path = f"/api/conversations/{conversation}"
        until(lambda: gate.permit() or len(served.http.get(path).json()["messages"]) == 2)
        kept = served.http.get(path).json()["messages"][1]
    assert kept["id"] == start["message"]
    assert kept["facts"]["finish"] == "cancelled"
    assert kept["content"]


def test_a_full_queue_is_a_429_for_the_page_too(scripted: EngineMaker, gate: Gate, tmp_path: Path) -> None:
    with serving(scripted(gate, queue=0), tmp_path) as served:
        question = begin(served)[1]
        gate.held = True
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        connection.request("POST", f"/api/messages/{question}/answers", "{}", headers)
        until(gate.entered.is_set)
        for path in ("answers", "comparisons"):
            refused = served.http.post(f"/api/messages/{question}/{path}", json={})
            assert refused.status_code == 429
        connection.close()
        gate.held = False
        gate.permit()


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH"])
@pytest.mark.parametrize("key", ["0" * 32, "nothing", "..", "%00", "0" * 32 + "'--"])
def test_ids_that_are_none_are_refused(scripted_server: Served, method: str, key: str) -> None:
    answer = scripted_server.http.request(
        method, f"/api/conversations/{key}", **({"json": {}} if method == "PATCH" else {})
    )
    assert answer.status_code in (400, 404, 405)
    assert "error" in answer.json()
