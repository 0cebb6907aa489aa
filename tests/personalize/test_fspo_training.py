"""FSPO's training, small: new people's shots come to help whatever their taste is, and another's do not.

Answers end in one of three marks, and a person likes one of them; no mark is better than another, so only the choices
in the prompt can tell.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgealign.data.forms import Message, Pair, to_json
from edgealign.personalize import fspo, lora, shot_data
from edgealign.personalize.choices import split
from edgealign.personalize.fspo_recipes import FspoRecipe, ShotsRecipe
from edgealign.train import preference
from edgealign.train.recipes import PreferenceRecipe

pytestmark = pytest.mark.slow
WORDS = ("red", "blue", "green", "tea", "milk", "bread", "rain", "snow", "sun", "wind", "moon", "sea")
MARKS = "!.?"


def likes(own: str, others: str, count: int, user: str, rng: random.Random) -> list[Pair]:
    """Choices of somebody who likes one mark better than the others."""
    rows = []
    for _ in range(count):
        word, asked = rng.choice(WORDS), (Message("user", f"number {rng.randrange(1000)}?"),)
        rows.append(Pair(asked, word + own, word + rng.choice(others), user))
    return rows


def write(rows: Sequence[Pair], file: Path) -> str:
    file.write_text("".join(json.dumps(to_json(row)) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after preference training on the shots of 24 people, eight for each mark."""
    folder = tmp_path_factory.mktemp("fspo")
    rng = random.Random(0)
    people = [(MARKS[i % 3], MARKS.replace(MARKS[i % 3], ""), f"u{i}") for i in range(24)]
    rows = [row for own, others, name in people for row in likes(own, others, 12, name, rng)]
    recipe = ShotsRecipe(shots=(3,), reshuffles=6, max_tokens=400)
    made = shot_data.run(recipe, model=tiny_model, data=[write(rows, folder / "pairs.jsonl")], out=folder / "shots")
    learn = PreferenceRecipe(
        objective="dpo", beta=0.5, learning_rate=1e-2, optimizer="muon", schedule="linear", warmup_share=0.05,
        epochs=2, max_tokens=400, threads=1,
    )  # fmt: skip
    files = {name: [str(made.path / f"{name}.jsonl")] for name in ("train", "valid")}
    preference.run(learn, model=tiny_model, data=files["train"], valid=files["valid"], out=folder / "model")
    return folder / "model"


@pytest.mark.parametrize("own", MARKS)
def test_new_people_are_ranked_by_their_shots_after_training_and_by_anothers_wrongly(
    trained: Path, tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their own shots all of the held-out choices are ranked right, with another's all of them wrong."""
    monkeypatch.setattr(lora, "gate", lambda *_: [])  # what is measured, not what is published
    another, third = MARKS.replace(own, "")
    rows = likes(own, another, 12, "ana", random.Random(1))
    recipe = FspoRecipe(threads=1, shots=3)
    shown = {row.prompt: row.chosen[:-1] for row in split(rows, share=recipe.held_out)[0]}
    wrong = [
        Pair(row.prompt, shown[row.prompt] + another, shown[row.prompt] + third, "ana") if row.prompt in shown else row
        for row in rows
    ]
    found = []
    for name, choices in (("own", rows), ("wrong", wrong)):
        file = write(choices, tmp_path / f"{name}.jsonl")
        made = fspo.run(recipe, model=trained, choices=file, user="ana", out=tmp_path / name)
        found.append(made.meta["held_out_after"])
    assert [each["accuracy"] for each in found] == [1.0, 0.0], found
    assert found[0]["margin"] > found[1]["margin"] + 1.0
