"""Repairs of real rows: what is broken is mended, what is sound stays; bare answers become sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgealign.data import prepare
from edgealign.data.english import as_sentence, contract, expand, sentences, topic
from edgealign.data.forms import Conversation, Message, ToolCall
from edgealign.data.full_answer import full_answer, past
from edgealign.data.mend import mend, tidy
from edgealign.data.recipes import PrepareRecipe


@pytest.mark.parametrize(
    ("raw", "better"),
    [
        ("the goat", "The goat."),
        ("42", "42."),
        ("Done!", "Done!"),
        ('He said "no"', 'He said "no".'),
        ("iPhone", "iPhone."),
        ("https://example.org", "https://example.org."),
        ("one,", "One."),
        ("", ""),
        ("- a\n- b", "- a\n- b"),
    ],
)
def test_a_bare_answer_gets_a_capital_letter_and_an_end_mark(raw: str, better: str) -> None:
    assert as_sentence(raw) == better


@pytest.mark.parametrize(
    ("raw", "better"),
    [
        ("her\relder sister\r\rThen", "her elder sister\n\nThen"),
        ("a long line of prose that was wrapped by an editor\nin the middle.",
         "a long line of prose that was wrapped by an editor in the middle."),
        ("First sentence.\nSecond one.", "First sentence. Second one."),
        ("Two things:\n- a\n- b", "Two things:\n- a\n- b"),
        ("Red\nGreen\nBlue", "Red\nGreen\nBlue"),
        ("Bring: - a rope - a lamp", "Bring:\n- a rope\n- a lamp"),
        ("- a rope - a lamp", "- a rope\n- a lamp"),
        ("Steps: 1. Sit. 2. Eat.", "Steps:\n1. Sit.\n2. Eat."),
        ("Hello , you !", "Hello, you!"),
        ("it is n't the king 's", "it isn't the king's"),
        ("So 2*3=<<2*3=6>>6.\n#### 6", "So 2*3=6. The answer is 6."),
        ("def f():\n    return {}", "def f():\n    return {}"),
    ],
)
def test_lines_and_spaces_are_tidied_and_code_is_not(raw: str, better: str) -> None:
    assert tidy(raw) == better


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_mending_twice_is_mending_once_and_never_empties_a_turn(text: str) -> None:
    row = Conversation((Message("user", text or "?"), Message("assistant", text or "?")))
    mended = mend(row)
    assert mend(mended).messages[1].content.strip() == mended.messages[1].content.strip() or "\r" in text
    if text.strip():
        assert all(message.content.strip() for message in mended.messages)


def test_tool_calls_and_system_turns_stay() -> None:
    call = Message("assistant", "calling", (ToolCall("find", '{"a": 1}'),))
    row = Conversation((Message("system", "be brief"), Message("user", "go"), call))
    assert mend(row).messages[0].content == "be brief"
    assert mend(row).messages[2] == call


def test_sentences_end_at_ends_only() -> None:
    assert sentences("Mr. Gray came at 3.5 p.m. He left. \"Why?\" she asked. No. 7 won!") == [
        "Mr. Gray came at 3.5 p.m. He left.", "\"Why?\" she asked.", "No. 7 won!"
    ]
    assert sentences("- one\n2. two\n\nthree") == ["one", "two", "three"]


def test_contracting_and_expanding_leave_possessives_and_sentence_ends() -> None:
    assert contract("Yes, it is. I cannot go, and they will not.") == "Yes, it is. I can't go, and they will not."
    assert expand("Won't you say what's Tom's? He'd better go; I'd like it.") == (
        "Will you not say what is Tom's? He had better go; I would like it."
    )


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (("What did the little fox do at the mill?",), "the little fox"),
        (("He went home.", "They sailed to Norway."), "Norway"),
        (("What is the best way to go?",), None),
        (("Why did the king's cook cry?",), None),
        (("I like the Princess, and you?",), "the princess"),
    ],
)
def test_the_topic_is_a_noun_or_nothing(texts: tuple[str, ...], found: str | None) -> None:
    assert topic(texts) == found


@pytest.mark.parametrize(
    ("question", "bare", "full"),
    [
        ("Where did the potter go?", "to the river", "The potter went to the river."),
        ("Why did the smith stop working?", "he was tired", "The smith stopped working because he was tired."),
        ("Why did she carry a lamp?", "to see the road", "She carried a lamp to see the road."),
        ("Who found the ring?", "a crow", "A crow found the ring."),
        ("How did the twins feel when it rained?", "Happy.", "The twins felt happy."),
        ("How will Ada feel?", "proud", "Ada will feel proud."),
        ("What did the tailor do with the coat?", "sold it", "The tailor sold it."),
        ("What will he do next?", "run away", "He will run away."),
        ("What did the goat eat?", "a hat", "The goat ate a hat."),
        ("What did the guard want to do?", "Sleep", "The guard wanted to sleep."),
        ("When did the ship come?", "in the spring", "The ship came in the spring."),
        ("Who was it?", "he", None),
        ("What did the girl say?", "nothing", None),
        ("Where did he go after he met the bear?", "home", None),
        ("Is it far?", "no", None),
        ("", "", None),
    ],
)
def test_a_bare_answer_and_its_question_make_a_sentence(question: str, bare: str, full: str | None) -> None:
    assert full_answer(question, bare) == full


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["Who", "What did", "Where did the cat", "Why did he go", "How did it feel", "When did"]),
    st.text(max_size=60), st.text(max_size=60),
)
def test_no_question_or_answer_breaks_the_rules(start: str, more: str, bare: str) -> None:
    made = full_answer(f"{start} {more}?", bare)
    assert made is None or len(made) > len(bare.strip().rstrip("."))


def test_a_verb_that_nobody_knows_has_no_past() -> None:
    assert (past("carry"), past("stop"), past("bake"), past("go"), past("zzz")) == (
        "carried", "stopped", "baked", "went", None
    )


def test_prepare_mends_and_leaves_out_bare_answers(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    file = write_jsonl([{"question": "Why?", "answer": "no"}, {"question": "Who  is it ?", "answer": "a very old man"}])
    made = prepare.run(PrepareRecipe(mend=True, min_chars=6, valid=0.0), sources=[file], out=tmp_path / "out")
    rows = [json.loads(line) for line in (made.path / "train.jsonl").read_text().splitlines()]
    assert [[turn["content"] for turn in row["messages"]] for row in rows] == [["Who is it?", "A very old man."]]
    assert made.meta["left_out"] == {"shorter than min_chars": 1}


def test_prepare_splits_a_conversation_by_what_the_user_says(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """The same question under many system turns stays on one side, different questions under one do not."""
    rows = [
        {"messages": [{"role": "system", "content": f"style {style}"}, {"role": "user", "content": f"question {n}"},
                      {"role": "assistant", "content": "yes"}]}
        for n in range(30) for style in range(3)
    ]
    made = prepare.run(PrepareRecipe(valid=0.4), sources=[write_jsonl(rows)], out=tmp_path / "out")
    asked = [
        {json.loads(line)["messages"][1]["content"] for line in (made.path / name).read_text().splitlines()}
        for name in ("train.jsonl", "valid.jsonl")
    ]
    assert asked[0]
    assert asked[1]
    assert not asked[0] & asked[1]
