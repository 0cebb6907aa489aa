"""Choices become a user's own answers: in words, by strength, undone, kept over a restart, forgotten, no other's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from assistant.tastes import open_tastes

from edgealign.artifact import read_manifest
from edgealign.data.forms import Message, Pair
from edgealign.errors import InputError
from edgealign.models.builtin import built_in
from edgealign.personalize.recipes import MAX_TASTE
from edgealign.personalize.users import Users

from .browser.conftest import archive
from .conftest import EngineMaker, Served, serving, until
from .test_page_api import answer, begin, events_of

Json = dict[str, Any]
QUESTIONS = ("How do I clean a kettle?", "How do I pack a lamp?", "How do I sell a drum?", "How do I paint a bench?")
SHORT = ("Wash it with warm water.", "Wrap it in paper.", "Ask a fair price.", "Put on two thin coats.")
LONG = tuple(
    f"There is a lot to say about this. First of all, take your time. {text} After that, look at it again from all"
    " sides, and let it rest for an hour. At the end, put everything back in its place. I hope that this long answer"
    " helps."
    for text in SHORT
)
CANARY = "canary-4471"


def choose(served: Served, user: str, question: str, chosen: str, rejected: str, *, by: str = "left") -> Json:
    """Bring a question with two answers, and prefer the first of them; what the server says that it learned."""
    document = archive([question, chosen], user=user)
    (talk,) = document["conversations"]
    _, said = talk["messages"]
    other = {**said, "id": uuid.uuid4().hex, "content": rejected}
    left, right = (said, other) if by == "left" else (other, said)
    talk["messages"].append(other)
    served.http.post("/api/import", json=document).raise_for_status()
    pair = served.http.post("/api/comparisons", json={"left": left["id"], "right": right["id"]}).json()
    made = served.http.put(f"/api/comparisons/{pair['id']}/choice", json={"choice": by})
    made.raise_for_status()
    return dict(made.json()["learned"] or {})


def teach(served: Served, user: str, count: int = 4) -> list[Json]:
    """Always the shorter answer."""
    rows = list(zip(QUESTIONS, SHORT, LONG, strict=True))[:count]
    return [choose(served, user, *row, by=("left", "right")[place % 2]) for place, row in enumerate(rows)]


def taste(served: Served, user: str, method: str = "GET", rest: str = "", **form: Any) -> Json:
    found = served.http.request(method, f"/api/taste{rest}", params={"user": user}, json=form or None)
    assert found.is_success, found.text
    return dict(found.json())


def say(served: Served, user: str, text: str = "How do I move a table?") -> Json:
    """An answer to a new conversation's question, without chance."""
    _, question = begin(served, text, user=user)
    return answer(served, question, temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def lia(served: Served) -> Iterator[Json]:
    """A user of the served starter who likes it short; what was learned after each choice."""
    learned = teach(served, "lia")
    yield {"learned": learned}
    served.http.delete("/api/users/lia")


@pytest.fixture
def quick(scripted: EngineMaker, tmp_path: Path) -> Iterator[Served]:
    """A server without a model that takes itself for the starter, so that the starter's basis is its own."""
    with serving(scripted(base_digest=starter_digest(), context=1024), tmp_path / "home") as found:
        yield found


def starter_digest() -> str:
    folder = built_in("starter")
    assert folder is not None
    return read_manifest(folder).digest


def test_a_planted_taste_is_named_after_a_few_choices_and_is_in_use(served: Served, lia: Json) -> None:
    learned = lia["learned"]
    assert [each["version"] for each in learned] == [1, 2, 3, 4]
    assert [each["choices"] for each in learned] == [1, 2, 3, 4]
    assert "shorter" in learned[-1]["words"]
    found = taste(served, "lia")
    assert (found["ready"], found["active"], found["choices"], found["simulated"]) == (True, 4, 4, True)
    assert "shorter" in found["words"]
    last = found["versions"][-1]
    assert (last["method"], last["choices"], last["active"]) == ("lore", 4, True)
    assert last["score"] < last["population"]  # each choice, predicted from the others
    assert f"{served.model}@lia" in [model.id for model in served.client.models.list()]


def test_strength_changes_answers_and_0_is_everybodys(served: Served, lia: Json) -> None:
    everybody = say(served, "nobody")
    said = {strength: None for strength in (0.0, 0.25, MAX_TASTE)}
    for strength in said:
        taste(served, "lia", "PUT", "/strength", strength=strength)
        assert f"{served.model}@lia" in [model.id for model in served.client.models.list()]  # also at 0
        said[strength] = say(served, "lia")
    taste(served, "lia", "PUT", "/strength", strength=taste(served, "lia")["usual_strength"])
    off, little, much = said.values()
    assert off["content"] == everybody["content"]
    assert "taste" not in off["facts"]
    assert much["content"] != everybody["content"]
    paid = [each["facts"]["taste"]["kl_nats"] for each in (little, much)]
    assert 0 < paid[0] < paid[1]
    assert much["facts"]["taste"]["version"] == 4


def test_undo_brings_back_earlier_answers_and_0_is_everybodys(served: Served, lia: Json) -> None:
    said = {}
    for version in (1, 4, 1, 0, 4):
        assert taste(served, "lia", "POST", "/active", version=version)["active"] == version
        found = say(served, "lia")
        said.setdefault(version, found["content"])
        assert found["content"] == said[version]
        assert found["facts"].get("taste", {}).get("version", 0) == version
    assert said[0] == say(served, "nobody")["content"]
    missing = served.http.post("/api/taste/active", params={"user": "lia"}, json={"version": 99})
    assert missing.status_code == 404


def test_an_empty_answer_is_no_alternative(quick: Served) -> None:
    """It taught nothing in numbers, and stopped a LoRA's training: nobody's choices may hold an empty answer."""
    assert choose(quick, "nil", QUESTIONS[0], SHORT[0], LONG[0])["choices"] == 1
    for chosen, rejected in ((SHORT[1], ""), ("", SHORT[2]), ("  \n", SHORT[3])):
        assert choose(quick, "nil", QUESTIONS[1], chosen, rejected)["choices"] == 1
    found = quick.http.get("/api/choices", params={"user": "nil"}).text.splitlines()
    assert [json.loads(line)["chosen"] for line in found] == [SHORT[0]]


def test_users_never_cross_in_either_api(served: Served, lia: Json) -> None:
    for row in zip(QUESTIONS, LONG, SHORT, strict=True):
        choose(served, "mia", *row)  # the opposite taste
    models = [served.model, *(f"{served.model}@{user}" for user in ("lia", "mia", "ana"))]
    prompt = "The best way to clean a kettle is"

    def ask(model: str) -> str:
        made = served.client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=16)
        return made.choices[0].text

    for user in ("lia", "mia"):
        taste(served, user, "PUT", "/strength", strength=MAX_TASTE)
    alone = {model: ask(model) for model in models}
    assert len({*alone.values()}) == len(models), "everybody's own answer is another one"
    digests = {user: say(served, user)["facts"]["taste"]["digest"] for user in ("lia", "mia")}
    assert digests == {user: served.engine.personal[user].facts["digest"] for user in digests}
    assert len({*digests.values()}) == len(digests)

    async def interleave() -> list[tuple[str, str]]:
        async with served.asynchronous() as client:
            async def one(model: str) -> tuple[str, str]:
                made = await client.completions.create(
                    model=model, prompt=prompt, temperature=0, max_tokens=16
                )
                return model, made.choices[0].text

            return await asyncio.gather(*(one(model) for model in models * 4))

    assert all(alone[model] == text for model, text in asyncio.run(interleave()))
    taste(served, "lia", "PUT", "/strength", strength=taste(served, "lia")["usual_strength"])
    served.http.delete("/api/users/mia").raise_for_status()


def test_two_answers_are_drawn_apart_where_a_user_can_be_learned(quick: Served) -> None:
    _, question = begin(quick, "Tell me of a fox.")
    last = events_of(quick, f"/api/messages/{question}/comparisons", {"max_tokens": 6})[-1]
    assert all(last[side]["facts"]["taste"]["asking"] for side in ("left", "right"))
    taste(quick, "me", "PUT", "/strength", strength=0)
    last = events_of(quick, f"/api/messages/{question}/comparisons", {"max_tokens": 6})[-1]
    assert not any("taste" in last[side]["facts"] for side in ("left", "right"))


def test_what_was_read_while_answers_were_shown_is_not_read_again(quick: Served) -> None:
    _, question = begin(quick, "Tell me of a fox.")
    last = events_of(quick, f"/api/messages/{question}/comparisons", {"max_tokens": 6})[-1]
    quick.http.put(f"/api/comparisons/{last['comparison']['id']}/choice", json={"choice": "right"}).raise_for_status()
    lent = quick.engine.lend
    quick.engine.lend = None  # type: ignore[assignment, method-assign]  # nothing may be read from here on
    again = quick.http.put(f"/api/comparisons/{last['comparison']['id']}/choice", json={"choice": "left"})
    quick.engine.lend = lent  # type: ignore[method-assign]
    assert again.json()["learned"]["version"] == 2


def test_a_tie_teaches_nothing_and_choices_that_contradict_each_other_keep_what_is_there(quick: Served) -> None:
    (first,) = teach(quick, "me", 1)
    assert first["version"] == 1
    row = QUESTIONS[1], SHORT[1], LONG[1]
    document = choose(quick, "me", *row)
    assert document["choices"] == 2
    # The same two answers the other way round, under other questions: no taste can foresee them all.
    found = [choose(quick, "me", f"{QUESTIONS[0]} {number}", LONG[1], SHORT[1]) for number in range(2)]
    found += [choose(quick, "me", f"{QUESTIONS[0]} again {number}", SHORT[1], LONG[1]) for number in range(2)]
    kept = [each for each in found if each["version"] is None]
    assert kept
    assert "kept as it is" in kept[-1]["reason"]


def test_versions_and_strength_survive_a_restart(scripted: EngineMaker, tmp_path: Path) -> None:
    options: Json = {"base_digest": starter_digest(), "context": 1024}
    with serving(scripted(**options), tmp_path / "home") as served:
        teach(served, "me", 2)
        taste(served, "me", "PUT", "/strength", strength=1.25)
        before, said = taste(served, "me"), say(served, "me")
    with serving(scripted(**options), tmp_path / "home") as served:
        assert taste(served, "me") == before
        again = say(served, "me")
    assert again["content"] == said["content"]
    assert again["facts"]["taste"] == said["facts"]["taste"]
    with Users(tmp_path / "home" / "users") as users:  # what `edgealign users` reads
        assert users.user("me").active == 2


def test_forgetting_leaves_no_byte_of_a_user(quick: Served, tmp_path: Path) -> None:
    name = f"{CANARY}-name"
    choose(quick, name, f"{QUESTIONS[0]} {CANARY}", SHORT[0], LONG[0])
    teach(quick, "me", 1)
    folder = next(each.folder for each in _versions(tmp_path, name))
    numbers = (folder / "preference.safetensors").read_bytes()[-40:]
    assert quick.http.delete(f"/api/users/{name}").json() == {"conversations": 1, "versions": 1}
    for file in (tmp_path / "home").rglob("*"):
        found = file.read_bytes() if file.is_file() else b""
        assert CANARY.encode() not in found, file
        assert numbers not in found, file
        assert CANARY not in str(file)
    with quick.store.read() as db:
        assert db.execute("SELECT count(*) FROM features").fetchone()[0] == 2  # the other user's
    assert taste(quick, name)["versions"] == []
    assert list(quick.engine.personal) == ["me"]
    assert [each.number for each in _versions(tmp_path, "me")] == [1]


def test_forgetting_takes_the_name_and_the_instructions_out_of_the_settings(quick: Served, tmp_path: Path) -> None:
    name, system = f"{CANARY}-name", f"Speak like {CANARY}"
    home = {"user": name, "system": system, "theme": "dark"}
    quick.http.put("/api/settings", json=home).raise_for_status()
    teach(quick, name, 1)
    quick.http.delete("/api/users/somebody-else").raise_for_status()
    assert quick.http.get("/api/settings").json()["system"] == system  # theirs stays
    quick.http.delete(f"/api/users/{name}").raise_for_status()
    for file in (tmp_path / "home").rglob("*"):
        assert CANARY.encode() not in (file.read_bytes() if file.is_file() else b""), file
    found = quick.http.get("/api/settings").json()
    assert (found["user"], found["system"], found["theme"]) == ("me", "", "dark")


def _versions(folder: Path, name: str) -> Any:
    with Users(folder / "home" / "users") as users:
        return users.user(name).versions


def test_a_damaged_version_is_said_and_the_user_still_answered(scripted: EngineMaker, tmp_path: Path) -> None:
    options: Json = {"base_digest": starter_digest(), "context": 1024}
    with serving(scripted(**options), tmp_path / "home") as served:
        teach(served, "me", 1)
    file = _versions(tmp_path, "me")[0].folder / "preference.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with serving(scripted(**options), tmp_path / "home") as served:
        assert "preference.safetensors" in taste(served, "me")["fault"]
        assert "taste" not in say(served, "me")["facts"]
        assert teach(served, "me", 2)[-1]["version"]  # and the next choice mends it
        assert taste(served, "me")["fault"] == ""


def test_a_damaged_registry_is_said_and_the_app_still_chats(scripted: EngineMaker, tmp_path: Path) -> None:
    users = tmp_path / "home" / "users"
    users.mkdir(parents=True)
    (users / "users.sqlite").write_bytes(b"no registry" * 100)
    with serving(scripted(base_digest=starter_digest(), context=1024), tmp_path / "home") as served:
        found = taste(served, "me")
        assert "is no registry" in found["fault"]
        assert not found["ready"]
        assert say(served, "me")["content"]
        _, question = begin(served)
        assert events_of(served, f"/api/messages/{question}/comparisons", {"max_tokens": 4})[-1]["type"] == "comparison"


def test_without_a_basis_it_says_how_to_make_one(scripted_server: Served) -> None:
    found = taste(scripted_server, "me")
    assert not found["ready"]
    assert "edgealign basis" in found["why_not"]
    assert taste(scripted_server, "ana")["versions"] == []


def test_a_user_whose_adapter_came_with_the_model_keeps_it(served: Served) -> None:
    found = taste(served, "ana")
    assert not found["ready"]
    assert "came with the model" in found["why_not"]


def test_a_basis_of_another_model_is_refused_with_both_digests(quick: Served, tmp_path: Path) -> None:
    quick.engine.facts["base_digest"] = "f" * 64
    with pytest.raises(InputError, match=f"{starter_digest()[:12]}.*ffffffffffff"):
        open_tastes(quick.engine, quick.store, tmp_path / "users", basis="edgealign:starter-basis")
    with pytest.raises(InputError, match="edgealign:starter-bases"):
        open_tastes(quick.engine, quick.store, tmp_path / "users", basis="edgealign:starter-bases")


def test_the_command_refuses_it_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "edgealign", "app", "--no-browser", "--port", "0", "--home", str(tmp_path / "home"),
            "--bundle", str(tiny_model), "--basis", "edgealign:starter-basis",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert starter_digest()[:12] in done.stderr


def rate(served: Served, message: str, rating: int | None) -> Json:
    path = f"/api/messages/{message}/feedback"
    found = served.http.put(path, json={"rating": rating}) if rating else served.http.delete(path)
    assert found.is_success, found.text
    return dict(found.json())


def two_answers(served: Served, user: str, question: str, one: str, other: str) -> tuple[str, str]:
    """A question with two answers that nobody has compared; their ids."""
    document = archive([question, one], user=user)
    (talk,) = document["conversations"]
    _, said = talk["messages"]
    second = {**said, "id": uuid.uuid4().hex, "content": other}
    talk["messages"].append(second)
    served.http.post("/api/import", json=document).raise_for_status()
    return said["id"], second["id"]


def preferred(served: Served, user: str) -> list[str]:
    lines = served.http.get("/api/choices", params={"user": user}).text.splitlines()
    return [json.loads(line)["chosen"] for line in lines]


def test_a_thumb_up_and_a_thumb_down_under_one_question_are_a_choice(quick: Served) -> None:
    short, long = two_answers(quick, "tim", QUESTIONS[0], SHORT[0], LONG[0])
    assert rate(quick, short, 1)["learned"] is None
    learned = rate(quick, long, -1)["learned"]
    assert (learned["choices"], learned["version"]) == (1, 1)
    assert preferred(quick, "tim") == [SHORT[0]]
    assert taste(quick, "tim")["active"] == 1
    rate(quick, short, -1)  # the newest verdict counts: both are down now
    assert preferred(quick, "tim") == []
    assert taste(quick, "tim")["active"] == 0
    rate(quick, long, 1)
    assert preferred(quick, "tim") == [LONG[0]]
    assert rate(quick, long, None)["learned"]["choices"] == 0
    assert preferred(quick, "tim") == []
    other = two_answers(quick, "tim", QUESTIONS[0], SHORT[1], LONG[1])  # the same words in another conversation
    rate(quick, other[0], 1)
    rate(quick, short, -1)
    assert preferred(quick, "tim") == []


def test_what_is_imported_or_deleted_is_learned_again(quick: Served) -> None:
    for row in zip(QUESTIONS, SHORT, LONG, strict=True):
        choose(quick, "imp", *row)
    document = quick.http.get("/api/export").json()
    mine = [each["id"] for each in document["conversations"] if each["user"] == "imp"]
    for talk in mine[:2]:
        quick.http.delete(f"/api/conversations/{talk}").raise_for_status()
    until(lambda: taste(quick, "imp")["versions"][-1]["choices"] == 2)
    quick.http.post("/api/import", json=document).raise_for_status()
    until(lambda: taste(quick, "imp")["versions"][-1]["choices"] == 4)
    for talk in mine:
        quick.http.delete(f"/api/conversations/{talk}").raise_for_status()
    until(lambda: taste(quick, "imp")["active"] == 0)


def test_the_page_and_the_terminal_learn_from_the_choices_of_both(quick: Served, tmp_path: Path) -> None:
    teach(quick, "ida", 3)
    with Users(tmp_path / "home" / "users") as users:
        assert [pair.chosen for pair in users.choices("ida")] == list(SHORT[:3])
        users.add_choice("ida", Pair((Message("user", QUESTIONS[3]),), SHORT[3], LONG[3]))
    assert taste(quick, "ida")["choices"] == 4
    learned = choose(quick, "ida", f"And {QUESTIONS[0]}", SHORT[0], LONG[0])
    assert (learned["choices"], learned["version"]) == (5, 4)
    talk = quick.http.get("/api/conversations", params={"user": "ida", "query": QUESTIONS[1]}).json()[0]["id"]
    quick.http.delete(f"/api/conversations/{talk}").raise_for_status()
    with Users(tmp_path / "home" / "users") as users:  # as soon as it is acknowledged, and the terminal's stays
        assert sorted(pair.chosen for pair in users.choices("ida")) == sorted([SHORT[0], SHORT[0], SHORT[2], SHORT[3]])
    for file in (tmp_path / "home").rglob("*"):
        assert QUESTIONS[1].encode() not in (file.read_bytes() if file.is_file() else b""), file
