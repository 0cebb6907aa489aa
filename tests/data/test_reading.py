"""Questions by rule: the answer stands in the sentence, the whole sentence can be told back, splits leak nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgealign.artifact import open_artifact
from edgealign.data import reading
from edgealign.data.full_answer import full_answer
from edgealign.data.reading import Asked, ask, questions
from edgealign.data.recipes import ReadingRecipe
from edgealign.errors import EdgealignError, InputError

STORY = (
    "A potter lived near a dry plain. One day the potter found a broken jar in the river. The heron was on a rock. "
    "Then Mina carried the jar to her grandmother, and the old woman mended the jar. Mina was very happy."
)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The fox saw some grapes on the wall.", [
            Asked("What did the fox see on the wall?", "some grapes"),
            Asked("Where did the fox see some grapes?", "on the wall"),
            Asked("Who saw some grapes on the wall?", "the fox"),
        ]),
        ("Then Mina gave it to her uncle.", [
            Asked("Where did Mina give it?", "to her uncle"), Asked("Who gave it to her uncle?", "Mina"),
        ]),
        ("The two boys were very happy.", [Asked("How did the two boys feel?", "very happy")]),
        ("The heron was on a rock.", [Asked("Where was the heron?", "on a rock")]),
        ("The ball rolled under the bed.", [
            Asked("Where did the ball roll?", "under the bed"), Asked("What rolled under the bed?", "the ball"),
        ]),
    ],
)  # fmt: skip
def test_questions_of_a_sentence(sentence: str, expected: list[Asked]) -> None:
    assert list(ask(sentence)) == expected


@pytest.mark.parametrize(
    "sentence",
    [
        '"The fox saw some grapes," said the crow.',
        "He sang in the morning.",  # a time, not a place
        "The fox lay on the wall.",  # of lie, or of lay
        "The boys drew a long, grateful breath.",  # the noun comes after the comma
        "This made a noise.",
        "She took down her hat.",
        "Suddenly came the king.",
    ],
)
def test_sentences_that_fit_no_pattern_give_nothing(sentence: str) -> None:
    assert list(ask(sentence)) == []


def test_answers_stand_in_the_passage_and_make_whole_sentences() -> None:
    found = list(questions(STORY, 60, random.Random(0)))
    assert len(found) >= 7
    for row in found:
        passage, _, question = row.messages[0].content.rpartition("\n\n")
        answer = row.messages[1].content.rstrip(".")
        assert answer.lower() in passage.lower()
        full = full_answer(question, row.messages[1].content)
        assert full is None or set(full.lower().rstrip(".").split()) & set(passage.lower().replace(".", "").split())
    assert any(full_answer(row.messages[0].content.rpartition("\n\n")[2], row.messages[1].content) for row in found)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.integers(12, 80))
def test_any_text_gives_questions_within_the_limit_or_none(text: str, most: int) -> None:
    for row in questions(f"{text} {STORY}", most, random.Random(1)):
        assert len(row.messages[0].content.rpartition("\n\n")[0].split()) <= 2 * most
        assert row.messages[0].content.endswith("?")


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_the_stage_splits_by_document_and_repeats_itself(tmp_path: Path) -> None:
    names = ("Mina", "Otto", "Sara", "Emil", "Nora", "Karl", "Lena", "Hugo", "Ines", "Paul")
    source = write(tmp_path / "stories.jsonl", [{"text": STORY.replace("Mina", name)} for name in names])
    recipe = ReadingRecipe(valid=0.4)
    artifact = reading.run(recipe, sources=[source], out=tmp_path / "a")
    again = reading.run(recipe, sources=[source], out=tmp_path / "b")
    assert artifact.manifest.files == again.manifest.files
    train, valid = ((artifact.path / f"{side}.jsonl").read_text("utf-8") for side in ("train", "valid"))
    assert train
    assert valid
    assert not any(name in train and name in valid for name in names)
    kept = open_artifact(tmp_path / "a").manifest.meta
    assert kept["rows"]["train.jsonl"] + kept["rows"]["valid.jsonl"] == sum(kept["questions"].values())
    few = reading.run(ReadingRecipe(limit=5, valid=0.0), sources=[source], out=tmp_path / "c")
    assert few.manifest.meta["rows"] == {"train.jsonl": 5, "valid.jsonl": 0}


def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    plain = write(tmp_path / "facts.jsonl", [{"text": "Water is wet."}])
    with pytest.raises(InputError, match="no sentence that a question can be made of"):
        reading.run(ReadingRecipe(), sources=[plain], out=tmp_path / "out")
    for bad in (write(tmp_path / "empty.jsonl", []), tmp_path / "missing.jsonl"):
        with pytest.raises(EdgealignError):
            reading.run(ReadingRecipe(), sources=[bad], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
