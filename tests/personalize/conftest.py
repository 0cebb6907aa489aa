"""A person with a planted taste: short answers. The questions and words are made up, the texts are all different."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgealign.data.forms import Message, Pair, to_json
from edgealign.data.synthetic import write_jsonl
from edgealign.personalize.recipes import BasisRecipe, LoraRecipe

WORDS = ("red", "blue", "green", "tea", "milk", "bread", "rain", "snow", "sun", "wind", "moon", "sea")
FitRecipe = Callable[..., LoraRecipe]


@dataclass(frozen=True)
class Planted:
    """What tests do with choices."""

    likes_short: Callable[..., list[Pair]]
    flipped: Callable[[Sequence[Pair]], list[Pair]]
    write: Callable[[Sequence[Pair], Path], str]


def short_and_long(i: int) -> tuple[str, str]:
    """Two answers to question `i`: one word, and a sentence of several."""
    one, two, three = (WORDS[(i * step + step) % len(WORDS)] for step in (1, 5, 7))
    return f"{one}.", f"well, I would say {one} and {two}, then {three} and {two} once more."


def likes_short(n: int, user: str = "ana", *, start: int = 0) -> list[Pair]:
    """`n` choices of somebody who takes the short answer."""
    rows = []
    for i in range(start, start + n):
        short, long = short_and_long(i)
        rows.append(Pair((Message("user", f"what is number {i}?"),), short, long, user))
    return rows


def flipped(rows: Sequence[Pair]) -> list[Pair]:
    """The same questions, answered the other way."""
    return [Pair(row.prompt, row.rejected, row.chosen, row.user_id) for row in rows]


def write(rows: Sequence[Pair], file: Path) -> str:
    file.write_text("".join(json.dumps(to_json(row)) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def two_tastes(file: Path) -> Path:
    """Choices of twenty-four people; half of them take the short answer, half the long one."""
    rows: list[Pair] = []
    for number in range(24):
        own = likes_short(6, f"u{number}", start=3 * number)
        rows += flipped(own) if number % 2 else own
    write_jsonl(file, [to_json(row) for row in rows])
    return file


@pytest.fixture
def planted() -> Planted:
    return Planted(likes_short, flipped, write)


@pytest.fixture
def quick() -> FitRecipe:
    """A recipe for a model of two layers: a few seconds of learning in a fraction of one."""

    def make(**values: object) -> LoraRecipe:
        settings: dict[str, object] = {"learning_rate": 1e-2, "epochs": 4, "anchor_tokens": 6, "threads": 1}
        return LoraRecipe(**{**settings, **values})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four people; half of them take the short answer, half the long one."""
    return two_tastes(tmp_path_factory.mktemp("people") / "choices.jsonl")


@pytest.fixture(scope="session")
def basis(tiny_model: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What they have in common, as the tiny model reads it: two directions."""
    from edgealign.personalize import basis as bases

    out = tmp_path_factory.mktemp("basis") / "basis"
    bases.run(BasisRecipe(rank=2, components=12, threads=1), model=tiny_model, choices=[str(people)], out=out)
    return out
