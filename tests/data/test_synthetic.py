"""Generated data: reproducible, balanced, unseen questions unseen, tastes recoverable."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from edgealign.artifact import open_artifact
from edgealign.data import prepare, synthetic
from edgealign.data.grammar import STYLES, Question, answer, questions
from edgealign.data.recipes import PrepareRecipe, SynthRecipe
from edgealign.errors import InputError
from edgealign.personalize.attributes import bullet_share, formality, log_words, reward

SMALL = SynthRecipe(conversations=800, pairs=40, choices=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "data"
    synthetic.run(SMALL, out=out)
    return out


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_same_seed_gives_the_same_digest(data: Path, tmp_path: Path) -> None:
    again = synthetic.run(SMALL, out=tmp_path / "again")
    assert again.digest == open_artifact(data).digest
    other = synthetic.run(SynthRecipe(conversations=800, pairs=40, choices=16, seed=1), out=tmp_path / "other")
    assert other.digest != again.digest


def test_unseen_questions_are_in_no_training_file(data: Path) -> None:
    def asked(prompt: str) -> Question:
        found = [entry for entry in questions() if f"{entry.action} a {entry.thing}" in prompt]
        assert len(found) == 1
        return found[0]

    unseen = {asked(str(row["prompt"])) for row in rows(data / "prompts.jsonl")}
    seen = {asked(row["messages"][0]["content"]) for row in rows(data / "train.jsonl")}  # type: ignore[index]
    seen |= {asked(str(row["prompt"])) for name in ("pairs", "choices") for row in rows(data / f"{name}.jsonl")}
    assert not unseen & seen
    assert unseen == {asked(str(row["prompt"])) for row in rows(data / "unseen_choices.jsonl")} | unseen


def test_the_three_switches_of_a_style_move_their_own_attribute_only() -> None:
    import random

    rng = random.Random(0)
    for name, attribute in (("long", log_words), ("bullets", bullet_share), ("formal", formality)):
        on, off = (
            [
                attribute(answer(question, style, rng))
                for style in STYLES
                if getattr(style, name) is switch
                for question in questions()[::12]
            ]
            for switch in (True, False)
        )
        assert min(on) > max(off), name


def test_choices_follow_the_planted_taste_more_often_than_another_users(data: Path) -> None:
    known = json.loads((data / "users.json").read_text(encoding="utf-8"))
    agreed: Counter[tuple[str, str]] = Counter()
    for row in rows(data / "choices.jsonl") + rows(data / "unseen_choices.jsonl"):
        for user, facts in known["users"].items():
            chosen, rejected = (
                reward(str(row[side]), facts["taste"], known["scale"]) for side in ("chosen", "rejected")
            )
            agreed[str(row["user_id"]), user] += chosen > rejected
    assert all(agreed["ada", "ada"] > agreed["ada", other] for other in ("bo", "cleo"))
    assert agreed["bo", "bo"] >= 28
    assert agreed["bo", "ada"] <= 6


def test_prepare_counts_what_it_leaves_out_and_splits_by_prompt(data: Path, tmp_path: Path) -> None:
    recipe = PrepareRecipe(leave_out="kettle", max_chars=500, valid=0.3)
    made = prepare.run(recipe, sources=[data / "train.jsonl"], out=tmp_path / "prepared")
    left_out = made.meta["left_out"]
    total = sum(made.meta["rows"].values()) + sum(left_out.values())
    assert total == SMALL.conversations
    assert left_out["matches leave_out"] > 0
    sides = [
        {row["messages"][0]["content"] for row in rows(made.path / name)}  # type: ignore[index]
        for name in ("train.jsonl", "valid.jsonl")
    ]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_prepare_keeps_the_users_with_the_most_choices_and_unseen_prompts(data: Path, tmp_path: Path) -> None:
    recipe = PrepareRecipe(form="pair", top_users=2, max_choices=8)
    made = prepare.run(recipe, sources=[data / "choices.jsonl"], out=tmp_path / "voters")
    kept, unseen = rows(made.path / "choices.jsonl"), rows(made.path / "unseen_choices.jsonl")
    assert Counter(row["user_id"] for row in kept) == {"ada": 8, "bo": 8}
    for user in ("ada", "bo"):
        asked = [{str(row["prompt"]) for row in part if row["user_id"] == user} for part in (kept, unseen)]
        assert not asked[0] & asked[1]


def test_nothing_left_after_filtering_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row left"):
        prepare.run(PrepareRecipe(leave_out="."), sources=[data / "train.jsonl"], out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
