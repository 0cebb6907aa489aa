"""A conversation with a stated preference: followed in every turn, with any system turn, refused where it cannot be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgealign import cli
from edgealign.chat.conversation import Conversation, open_conversation
from edgealign.chat.recipes import ChatRecipe
from edgealign.chat.speakers import Speakers
from edgealign.chat.terminal import command
from edgealign.errors import InputError
from edgealign.personalize.linear import MixedSession, find_lead
from edgealign.runtimes.llama_pair import LlamaPair

WISH = "Answer with bullet points."
OPTIONS: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.3, "max_tokens": 12, "threads": 1}


def opened(model: Path, **options: Any) -> Conversation:
    return open_conversation(ChatRecipe(**OPTIONS, **options), model=str(model))


def texts(conversation: Conversation) -> list[str]:
    return [conversation.ask(text, lambda piece: None).text for text in ("Tell me of a fox.", "And a hen?")]


def test_strength_0_is_the_preference_as_a_system_turn(tiny_model: Path) -> None:
    assert texts(opened(tiny_model, preference=WISH, strength=0.0)) == texts(opened(tiny_model, system=WISH))
    both = opened(tiny_model, preference=WISH, strength=0.0, system="You are kind.")
    assert texts(both) == texts(opened(tiny_model, system=f"You are kind. {WISH}"))


def test_a_preference_is_followed_in_every_turn_and_by_a_fresh_conversation_alike(tiny_model: Path) -> None:
    kept = opened(tiny_model, preference=WISH, strength=3.0)
    assert isinstance(kept.session, MixedSession)
    said = texts(kept)
    assert said != texts(opened(tiny_model, preference=WISH, strength=0.0))
    fresh = opened(tiny_model, preference=WISH, strength=3.0)
    fresh.turns = kept.turns[:2]
    assert fresh.ask("And a hen?", lambda piece: None).text == said[1]
    kept.reset()
    assert texts(kept) == said


def test_another_system_turn_keeps_the_preference(tiny_model: Path) -> None:
    talk = opened(tiny_model, preference=WISH)
    session: Any = talk.session
    assert session.mixing.strength == 2.0
    before = texts(talk)
    command(Speakers(talk, None), "/system You are kind.")
    assert session.lead == find_lead(talk.tokenizer, WISH, "You are kind.")
    assert texts(talk) == texts(opened(tiny_model, preference=WISH, system="You are kind.")) != before
    command(Speakers(talk, None), "/system")
    assert texts(talk) == before


def test_a_system_turn_that_is_no_text_changes_nothing(tiny_model: Path) -> None:
    talk = opened(tiny_model, preference=WISH)
    before = texts(talk)
    with pytest.raises(InputError, match="system turn: is not UTF-8"):
        talk.reset(system="be \udcff nice")
    talk.reset()
    assert texts(talk) == before


@pytest.mark.runtime
def test_a_bundle_follows_a_preference_in_one_batch(tiny_bundle: Callable[[str], Path]) -> None:
    talk = open_conversation(
        ChatRecipe(**OPTIONS, preference=WISH), bundle=tiny_bundle("f32"), adapter="ana"
    )
    session: Any = talk.session
    assert isinstance(session.streams, LlamaPair)
    reply = talk.ask("Tell me of a fox.", lambda piece: None)
    assert reply.tokens > 0
    assert session.fed > 2 * reply.tokens
    session.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--preference", ""], "preference: is empty; say what answers should be like"),
        (["--preference", "  ", "--strength", "0"], "preference: is empty"),
        (["--preference", "Be brief.", "--strength", "-1"], "must be at least 0"),
        (["--preference", "Be brief.", "--strength", "nan"], "strength = 'nan' is not a finite number"),
        (["--preference", "Be brief.", "--strength", "inf"], "strength = 'inf' is not a finite number"),
        (["--preference", "Be brief.", "--strength", "21"], "must be at most 20"),
        (["--preference", "Be brief.", "--strength", "much"], "strength = 'much' is not a float"),
        (["--strength", "2"], "strength 2: has no preference to strengthen; add --preference TEXT"),
    ],
)
def test_what_cannot_be_followed_is_one_line(
    options: list[str], reason: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["edgealign", "chat", "Hi", "--model", str(tiny_model), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("edgealign: ")]
    assert reason in line


def test_a_template_without_system_turns_cannot_state_a_preference(tiny_model: Path) -> None:
    talk = opened(tiny_model)
    talk.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(InputError, match="does not keep a system turn apart"):
        find_lead(talk.tokenizer, WISH)
