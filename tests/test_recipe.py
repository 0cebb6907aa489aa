"""Recipes: every mistake at once, with a suggestion; TOML and command-line spellings agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from edgealign import stages
from edgealign.errors import RecipeError
from edgealign.recipe import build, load, option, schema, to_dict
from edgealign.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Example:
    learning_rate: float = option(1e-5, help="step size", gt=0.0, source="a table")
    steps: int = option(10, help="how many", ge=1)
    name: str = option("a", help="which", choices=("a", "b"))
    lora: bool = option(False, help="adapt")
    weights: tuple[float, ...] = option((0.5,), help="shares", ge=0.0)
    limit: int | None = option(None, help="at most", ge=1)


def test_strings_from_the_command_line_become_the_fields_types() -> None:
    values = {"learning_rate": "1e-4", "steps": "20", "lora": "true", "weights": "0.1,0.9", "limit": "5"}
    assert build(Example, values, where="x") == Example(
        learning_rate=1e-4, steps=20, lora=True, weights=(0.1, 0.9), limit=5
    )
    assert build(Example, {"limit": "none"}, where="x").limit is None


def test_all_mistakes_come_in_one_line_with_a_suggestion() -> None:
    values = {"learning_rat": 1, "steps": 0, "name": "c", "lora": "maybe", "weights": [-1.0], "limit": 2.5}
    with pytest.raises(RecipeError) as caught:
        build(Example, values, where="my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    for part in ("did you mean learning_rate?", "steps", "at least 1", "one of a, b", "lora", "weights", "limit"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), True, [1]])
def test_a_number_must_be_a_finite_number(value: object) -> None:
    with pytest.raises(RecipeError, match="learning_rate"):
        build(Example, {"learning_rate": value}, where="x")


def test_a_file_is_overridden_by_named_fields(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('steps = 3\nname = "b"\n', encoding="utf-8")
    assert to_dict(load(Example, file, {"steps": "4", "name": None}))["steps"] == 4
    assert load(Example, file, {}).name == "b"


@pytest.mark.parametrize("content", ["steps = ", "\x00", "[steps"])
def test_a_broken_file_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match="TOML"):
        load(Example, file, {})


@pytest.mark.parametrize("stage", stages.RECIPES.names())
def test_every_stage_has_a_recipe_whose_fields_are_explained(stage: str) -> None:
    assert stage in stages.STAGES
    assert stage in stages.RUNNERS.names()
    for name, entry in schema(stages.recipe_class(stage)).items():
        assert entry.get("help"), f"{stage}.{name} has no help"


@pytest.mark.parametrize("stage", stages.RUNNERS.names())
def test_every_stage_has_a_function_with_the_common_form(stage: str) -> None:
    import inspect

    parameters = inspect.signature(stages.RUNNERS.load(stage)).parameters
    assert next(iter(parameters)) == "recipe"
    assert parameters["out"].kind is inspect.Parameter.KEYWORD_ONLY


def test_an_unknown_name_in_a_table_suggests_the_closest() -> None:
    table = Registry("runtime", {"torch": "json:loads", "llama.cpp": "json:dumps"})
    with pytest.raises(RecipeError, match="did you mean torch"):
        table.load("troch")
