"""What a person chooses at the terminal shapes their answers, and nobody else's; a real model, a real registry."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgealign.chat.conversation import Conversation, open_conversation
from edgealign.chat.recipes import ChatRecipe
from edgealign.chat.speakers import PERSONAL, Speakers
from edgealign.chat.taste import Taste, open_taste
from edgealign.data.forms import Message, Pair
from edgealign.errors import InputError, UsageError
from edgealign.personalize.basis import basis_of_model
from edgealign.personalize.users import PLACE, Users

from .test_terminal import PROMPT, Terminal

QUESTIONS = [
    "What is a fox?", "How can I fall asleep more easily?", "Tell me about the sea.", "What shall I cook?",
    "Why is the sky blue?", "Give me an idea for a walk.",
]  # fmt: skip
SHORT, LONG = "Yes, of course.", "Well, there is a lot to say about it, and I will say all of it to you now. " * 3


@pytest.fixture(scope="module")
def starter() -> Iterator[Conversation]:
    conversation = open_conversation(ChatRecipe(max_tokens=24, seed=1))
    yield conversation
    conversation.session.close()


@pytest.fixture
def users(tmp_path: Path) -> Iterator[Users]:
    with Users(tmp_path / "users") as found:
        yield found


@pytest.fixture
def ana(starter: Conversation, users: Users) -> Iterator[Taste]:
    starter.reset()
    yield open_taste(users, starter, "ana", None)
    starter.hooks = tuple


def said(conversation: Conversation) -> str:
    conversation.reset()
    return conversation.ask("How can I fall asleep more easily?", lambda piece: None).text


def test_choices_are_named_shape_answers_and_are_undone(starter: Conversation, users: Users, ana: Taste) -> None:
    before = said(starter)
    for question in QUESTIONS:
        starter.reset()
        learned = ana.choose(question, SHORT, LONG)
    assert learned.choices == len(QUESTIONS)
    assert learned.version is not None
    assert "shorter" in ana.why()[0]
    first = said(starter)
    assert first != before
    assert "nats a token" in ana.why()[-1]
    starter.reset()
    ana.choose("And now?", SHORT, LONG)
    assert ana.version is not None
    assert ana.version.number == learned.version.number + 1
    assert ana.undo() == learned.version
    assert said(starter) == first
    while ana.version is not None:
        ana.undo()
    assert said(starter) == before
    with pytest.raises(UsageError, match="no version in use"):
        ana.undo()
    assert users.user("ana").choices == len(QUESTIONS) + 1


def test_somebody_else_gets_what_everybody_gets(starter: Conversation, users: Users, ana: Taste) -> None:
    plain = said(starter)
    ana.choose("What is a fox?", SHORT, LONG)
    assert said(starter) != plain
    open_taste(users, starter, "ben", None)
    assert said(starter) == plain


def test_two_answers_differ_and_are_no_part_of_the_conversation(starter: Conversation, ana: Taste) -> None:
    starter.ask("What is a fox?", lambda piece: None)
    turns = list(starter.turns)
    first, second = ana.compare("How can I fall asleep more easily?")
    assert first != second
    assert starter.turns == turns


@pytest.mark.parametrize("drawn", [["", LONG], [SHORT, ""], [SHORT, SHORT]])
def test_of_an_empty_answer_or_two_that_are_alike_nothing_is_learned(
    starter: Conversation, tmp_path: Path, drawn: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "users"))
    monkeypatch.setattr(starter, "alternatives", lambda *_: drawn)
    with Speakers(starter, None) as speakers:
        speakers.switch("ana")
        PERSONAL["/compare"](speakers, QUESTIONS[0])
        assert "nothing was learned" in capsys.readouterr().err
        PERSONAL["/why"](speakers, "")
        assert "0 choices so far" in capsys.readouterr().err
    starter.hooks = tuple


def test_commands_need_somebody_and_something(
    starter: Conversation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "users"))
    starter.reset()
    with Speakers(starter, None) as speakers:
        for command in ("/compare", "/why", "/undo"):
            with pytest.raises(UsageError, match="/user NAME"):
                PERSONAL[command](speakers, "")
        with pytest.raises(UsageError, match="is no name"):
            PERSONAL["/user"](speakers, "a\x07b")
        PERSONAL["/user"](speakers, "ana")
        with pytest.raises(UsageError, match="no question to answer twice"):
            PERSONAL["/compare"](speakers, "")
    starter.hooks = tuple


def test_one_choice_does_not_replace_a_version_of_many(users: Users, ana: Taste) -> None:
    """The page's choices may not be in the registry yet."""
    for number, question in enumerate(QUESTIONS):
        users.mirror("ana", "page", [(float(place), pair(each)) for place, each in enumerate(QUESTIONS[: number + 1])])
        learned = ana.choose(question, SHORT, LONG)
    assert learned.version is not None
    assert learned.version.choices == learned.choices == len(QUESTIONS)
    before = learned.version
    for source in ("page", ""):
        users.mirror("ana", source, [])
    kept = ana.choose("And now?", SHORT, LONG)
    assert kept.version is None
    assert kept.reason.startswith(f"version {before.number} is of {before.choices} choices and stays: only 1 are in")
    assert ana.version == before


def pair(question: str) -> Pair:
    return Pair((Message("user", question),), SHORT, LONG)


def test_a_model_without_a_basis_says_how_to_make_one(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="edgealign basis"):
        basis_of_model("0" * 64)
    with pytest.raises(InputError, match="was learned on the model"):
        basis_of_model("0" * 64, "edgealign:starter-basis")


def test_the_loop_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask, compare, choose with an arrow key, undo, come back with what was typed, be forgotten."""
    place = tmp_path / "users"
    monkeypatch.setenv(PLACE, str(place))
    command = ["-m", "edgealign", "chat", "--user", "ana", "--max-tokens", "12"]
    window = Terminal(*command)
    window.wait_for(PROMPT)
    window.type("What is a purplefox?\n")
    window.wait_for(PROMPT)
    window.type("/compare\n")
    window.wait_for("q: enough")
    for _ in range(20):  # a key that comes just before the terminal gives single keys is lost
        window.type("\x1b[C")
        if window.waits_for("1 choice: ", patience_s=5.0):
            break
    window.wait_for(PROMPT)
    window.type("/why\n")
    window.wait_for("version 1, from 1 of 1 choices")
    window.wait_for(PROMPT)
    window.type("/undo\n")
    window.wait_for("as for everybody")
    window.type("/quit\n")
    assert window.end() == 0
    again = Terminal(*command)
    again.wait_for(PROMPT)
    again.type("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A")  # up: /quit, /undo, /why, /compare, and the question
    again.wait_for("What is a purplefox?")
    again.type("\x15/quit\n")
    assert again.end() == 0
    with Users() as users:
        assert users.user("ana").choices == 1
        assert users.user("ana").active == 0
        users.forget("ana")
    found = subprocess.run(["grep", "-r", "purplefox", place], capture_output=True, check=False)
    assert found.returncode == 1
    assert not list(place.rglob("typed"))
