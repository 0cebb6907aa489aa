"""Which choices are learned and which check the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgealign.data.forms import Message, Pair
from edgealign.models.load import load_tokenizer
from edgealign.personalize.choices import drop_repetitions, load_choices, question_key, split


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def test_a_retry_keeps_the_split_whatever_was_chosen_and_in_which_order(planted: Any) -> None:
    rows = planted.likes_short(16)
    fitted, held_out = split(rows, share=0.25)
    assert (len(fitted), len(held_out)) == (12, 4)
    again = split(list(reversed(planted.flipped(rows))), share=0.25)[1]
    assert {question_key(row) for row in again} == {question_key(row) for row in held_out}


def test_more_choices_keep_most_of_the_held_out_ones(planted: Any) -> None:
    before = {question_key(row) for row in split(planted.likes_short(40), share=0.25)[1]}
    after = {question_key(row) for row in split(planted.likes_short(44), share=0.25)[1]}
    assert len(before & after) >= 8


@pytest.mark.parametrize(("n", "held_out"), [(4, 1), (5, 1), (6, 2), (8, 2), (64, 16)])
def test_at_least_one_choice_is_held_out(n: int, held_out: int, planted: Any) -> None:
    assert len(split(planted.likes_short(n), share=0.25)[1]) == held_out


def test_choices_on_one_prompt_go_to_one_side() -> None:
    rows = [
        Pair((Message("user", f"prompt {i // 4}"),), f"good {i}", f"bad {i}", "ana") for i in range(16)
    ]
    fitted, held_out = split(rows, share=0.25)
    assert not {row.prompt for row in fitted} & {row.prompt for row in held_out}


def test_the_last_word_counts(planted: Any) -> None:
    rows = planted.likes_short(5)
    changed = planted.flipped(rows[:2])
    kept, repeated, overridden = drop_repetitions([*rows, rows[4], *changed])
    assert (len(kept), repeated, overridden) == (5, 1, 2)
    assert kept[-2:] == changed


def test_the_newest_64_are_used_and_said(
    planted: Any, quick: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = planted.likes_short(70)
    own = load_choices(planted.write(rows, tmp_path / "c.jsonl"), "ana", tokenizer, quick())
    assert own.total == 64
    assert {question_key(row) for row in (*own.fitted, *own.held_out)} == {question_key(row) for row in rows[6:]}
    assert "user ana: 70 choices, the newest 64 are used" in capsys.readouterr().err


def test_only_this_users_choices_are_read(planted: Any, quick: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [*planted.likes_short(6), *planted.flipped(planted.likes_short(9, user="bo"))]
    own = load_choices(planted.write(rows, tmp_path / "c.jsonl"), "ana", tokenizer, quick())
    assert own.facts["rows"] == 6
    assert all(row.user_id == "ana" for row in (*own.fitted, *own.held_out))
