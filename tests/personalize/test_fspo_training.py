"""FSPO's training, small: new people's shots come to help whatever their taste is, and wrong ones do not."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgealign.data.forms import Message, Pair, to_json
from edgealign.errors import CheckFailed
from edgealign.personalize import fspo, shot_data
from edgealign.personalize.choices import split
from edgealign.personalize.fspo_recipes import FspoRecipe, ShotsRecipe
from edgealign.train import preference
from edgealign.train.recipes import PreferenceRecipe

pytestmark = pytest.mark.slow
WORDS = ("red", "blue", "green", "tea", "milk", "bread", "rain", "snow", "sun", "wind", "moon", "sea")


def likes(short: bool, count: int, user: str, rng: random.Random) -> list[Pair]:
    """Choices of somebody who takes the short answer, or the long one."""
    rows = []
    for _ in range(count):
        number, words = rng.randrange(1000), rng.sample(WORDS, 3)
        sides = (f"{words[0]}.", f"well, I would say {words[0]} and {words[1]}, then {words[2]}.")
        rows.append(Pair((Message("user", f"what is number {number}?"),), *(sides if short else sides[::-1]), user))
    return rows


def write(rows: Sequence[Pair], file: Path) -> str:
    file.write_text("".join(json.dumps(to_json(row)) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after preference training on people who like short answers and people who like long ones."""
    folder = tmp_path_factory.mktemp("fspo")
    rng = random.Random(0)
    rows = [row for i in range(40) for row in likes(i % 2 == 0, 8, f"u{i}", rng)]
    recipe = ShotsRecipe(shots=(1, 2, 3), reshuffles=4, max_tokens=400)
    made = shot_data.run(recipe, model=tiny_model, data=[write(rows, folder / "pairs.jsonl")], out=folder / "shots")
    learn = PreferenceRecipe(
        objective="ln_dpo", beta=2.0, learning_rate=3e-3, epochs=2, batch_size=16, max_tokens=400, threads=1,
    )  # fmt: skip
    files = {name: [str(made.path / f"{name}.jsonl")] for name in ("train", "valid")}
    preference.run(learn, model=tiny_model, data=files["train"], valid=files["valid"], out=folder / "model")
    return folder / "model"


@pytest.mark.parametrize("short", [True, False])
def test_shots_help_people_of_either_taste_after_training_and_wrong_ones_do_not(
    trained: Path, tmp_path: Path, short: bool
) -> None:
    rows = likes(short, 12, "ana", random.Random(1))
    recipe = FspoRecipe(threads=1, shots=3)
    own = fspo.run(recipe, model=trained, choices=write(rows, tmp_path / "own.jsonl"), user="ana", out=tmp_path / "own")
    assert own.meta["held_out_after"]["margin"] > own.meta["held_out_before"]["margin"]
    fitted, held_out = split(rows, share=recipe.held_out)
    wrong = {row.prompt: Pair(row.prompt, row.rejected, row.chosen, "ana") for row in fitted}
    mixed = write([wrong.get(row.prompt, row) for row in rows], tmp_path / "wrong.jsonl")
    with pytest.raises(CheckFailed, match="not published"):
        fspo.run(recipe, model=trained, choices=mixed, user="ana", out=tmp_path / "wrong")
    assert len(held_out) == 3
