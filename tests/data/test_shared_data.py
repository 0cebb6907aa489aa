"""Every real file is read whole: used, tied and bad rows add up to what its page says it holds.

The files lie beside the repository; EDGEALIGN_DATA names another place. In CI their absence is a failure.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from edgealign.data import restyle
from edgealign.data.check import check
from edgealign.data.forms import Conversation, Pair, Thumb, texts
from edgealign.data.read import scan
from edgealign.data.recipes import StylesRecipe
from edgealign.data.styles import STYLES, follows

pytestmark = pytest.mark.slow  # every file of the real data: some seconds

DATA = Path(os.environ.get("EDGEALIGN_DATA") or Path(__file__).parents[3] / "shared" / "data")

# file, rows on its page (None: it gives words), form, ties, bad rows by kind
FILES: list[tuple[str, int | None, str, int, dict[str, int]]] = [
    ("ukpconvarg1/majority_pairs_dpo", 8500, "pair", 0, {}),
    ("hh_rlhf/dev_pairs", 3489, "pair", 0, {"roles": 9}),
    ("ultrafeedback_1k/train", 1000, "pair", 0, {"same": 4, "empty": 2}),
    ("taskmaster_reward/TM-3-2020", 3667, "thumb", 0, {"empty": 200}),
    ("taskmaster_reward/TM-4-2024", 3228, "thumb", 0, {"empty": 6}),
    ("ukpconvarg1/pairs", 14342, "pair", 2023, {"same": 3}),
    ("ukpconvarg1/votes", 54760, "pair", 13067, {"same": 3}),
    ("anthropic_evals_persona/dev_benign", 13483, "thumb", 0, {}),
    ("synthetic_persona_chat/valid", 1000, "conversation", 0, {"roles": 23, "empty": 3}),
    ("dolly_noctx/sft", 5986, "conversation", 0, {}),
    ("fairytaleqa/qa_train", 8548, "conversation", 0, {}),
    ("fairytaleqa/qa_val", 1025, "conversation", 0, {}),
    ("gsm8k/train", 7473, "conversation", 0, {}),
    ("p3_permissive/p3_subset", 11222, "conversation", 0, {}),
    ("p3_permissive/self_instruct_seed_tasks", 175, "conversation", 0, {}),
    ("sgd/train", 12174, "conversation", 0, {}),
    ("sgd/dev", 2098, "conversation", 0, {}),
    ("tm4_coffee/dialogs", 3710, "conversation", 0, {}),
    ("topical_chat/valid", 1078, "conversation", 0, {}),
    ("disfl_qa/train", 7182, "conversation", 0, {"empty": 1}),
    ("disfl_qa/dev", 1000, "conversation", 0, {}),
    ("classic_books/children", None, "text", 0, {}),
    ("classic_books/simple_general", None, "text", 0, {}),
    ("enwiki_leads/leads", None, "text", 0, {}),
    ("fairytaleqa/stories_train", None, "text", 0, {}),
    ("storybooks_en/stories", None, "text", 0, {}),
    ("onestop/texts", None, "text", 0, {}),
]


@pytest.fixture(scope="module")
def data() -> Path:
    if not DATA.is_dir():
        reason = f"no real data at {DATA}: set EDGEALIGN_DATA"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return DATA


def test_every_file_there_has_a_line_here(data: Path) -> None:
    found = {path.relative_to(data).as_posix().removesuffix(".jsonl.gz") for path in data.rglob("*.jsonl.gz")}
    assert found == {name for name, *_ in FILES}


@pytest.mark.parametrize(("name", "rows", "form", "ties", "bad"), FILES, ids=[entry[0] for entry in FILES])
def test_a_file_is_read_whole(
    data: Path, name: str, rows: int | None, form: str, ties: int, bad: dict[str, int]
) -> None:
    loaded = scan(data / f"{name}.jsonl.gz")
    assert loaded.form == form
    assert loaded.ties == ties
    assert Counter(row.kind for row in loaded.bad) == bad
    assert loaded.rows
    if rows is not None:
        assert loaded.total == rows


def test_the_books_hold_as_many_words_as_their_page_says(data: Path) -> None:
    loaded = scan(data / "classic_books" / "children.jsonl.gz")
    words = sum(len(text.split()) for row in loaded.rows for text in texts(row))
    assert words / 1e6 == pytest.approx(3.7, abs=0.1)


def test_the_voters_are_those_of_the_page(data: Path) -> None:
    loaded = scan(data / "ukpconvarg1" / "votes.jsonl.gz")
    choices = Counter(row.user_id for row in loaded.rows if isinstance(row, Pair))
    assert len(choices) == 3659
    # the 3 votes between two equal arguments are bad rows, so a count may be one lower than on the page
    assert sum(count >= 10 for count in choices.values()) == pytest.approx(687, abs=3)
    assert sum(count >= 20 for count in choices.values()) == pytest.approx(289, abs=3)


def test_the_majority_pairs_are_those_that_the_votes_give(data: Path) -> None:
    """Our conversion of the raw pairs agrees with the data's own, prompt and all."""
    ours = {row for row in scan(data / "ukpconvarg1" / "pairs.jsonl.gz").rows if isinstance(row, Pair)}
    theirs = [row for row in scan(data / "ukpconvarg1" / "majority_pairs_dpo.jsonl.gz").rows if isinstance(row, Pair)]
    assert sum(row in ours for row in theirs) == len(theirs)


def test_the_longer_answer_wins_as_often_as_the_page_says(data: Path) -> None:
    helpful = check(data / "hh_rlhf" / "dev_pairs.jsonl.gz")["length_bias"]
    assert helpful["longer_wins_share"] == pytest.approx(0.505, abs=0.01)
    debates = check(data / "ukpconvarg1" / "majority_pairs_dpo.jsonl.gz")["length_bias"]
    assert debates["longer_wins_share"] == pytest.approx(0.756, abs=0.015)
    assert debates["label_length_correlation"] > 0.3


def test_dialogues_answer_as_the_assistant(data: Path) -> None:
    first = scan(data / "tm4_coffee" / "dialogs.jsonl.gz", limit=1).rows[0]
    assert isinstance(first, Conversation)
    assert [message.role for message in first.messages] == ["user", "assistant", "user", "assistant"]


def test_api_calls_are_written_as_json_text(data: Path) -> None:
    first = scan(data / "taskmaster_reward" / "TM-4-2024.jsonl.gz", limit=1).rows[0]
    assert isinstance(first, Thumb)
    assert first.completion == '{"get_menu_items": {"query": "espresso"}}'
    assert first.label


def test_styles_of_real_answers_follow_their_style(data: Path, tmp_path: Path) -> None:
    """Over real stories, instructions and dialogues: every style is made often, and none says what it should not."""
    sources = [data / f"{name}.jsonl.gz" for name in ("fairytaleqa/qa_val", "dolly_noctx/sft", "tm4_coffee/dialogs")]
    recipe = StylesRecipe(limit=400, story_words=60, share=1.0, plain=1.0, neutral=0.0, valid=0.0, max_words=500)
    made = restyle.run(recipe, sources=sources, out=tmp_path / "styles")
    assert min(made.meta["styles"][name] for name in STYLES) > 200
    plain: dict[str, str] = {}
    styled = []
    requests = {request: name for name, style in STYLES.items() for request in style.requests}
    for row in scan(made.path / "train.jsonl").rows:
        assert isinstance(row, Conversation)
        if row.messages[0].role == "system":
            styled.append(row.messages)
        else:
            plain[row.messages[0].content] = row.messages[1].content
    seen_once = [turns for turns in styled if turns[1].content in plain]
    follow = sum(follows(requests[turns[0].content], turns[2].content, plain[turns[1].content]) for turns in seen_once)
    assert follow / len(seen_once) > 0.97  # a prompt with two answers in the data may be compared with the other one
