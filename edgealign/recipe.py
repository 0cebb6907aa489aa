"""Recipes: frozen dataclasses whose spelling is TOML.

A field made with `option` carries its help, its bounds, its unit and where its default comes from.
`build` reports every mistake at once, with a suggestion for an unknown key. `edgealign config schema`
prints what `schema` returns.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from edgealign.errors import RecipeError
from edgealign.registry import suggest

R = TypeVar("R")
SCALARS = (int, float, str, bool)


def option(
    default: Any,
    *,
    help: str,
    source: str = "",
    unit: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] | None = None,
    resolve: Callable[[str], str] | None = None,
) -> Any:
    """A recipe field.

    Args:
        source: the paper, table or measurement behind the default.
        choices: all values that there are.
        resolve: the name that a value stands for; it raises a RecipeError where there is none.
    """
    bounds = {name: bound for name, bound in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if bound is not None}
    metadata = {"help": help, "source": source, "unit": unit, "bounds": bounds, "choices": choices,
                "resolve": resolve}  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type[R], values: Mapping[str, object], *, where: str) -> R:
    """Make the recipe from parsed TOML or command-line values (strings are converted).

    Raises:
        RecipeError: with all unknown keys, wrong types and out-of-range values in one line.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    mistakes: list[str] = []
    kept: dict[str, object] = {}
    for key, value in values.items():
        if key not in fields:
            mistakes.append(f"unknown key {key}{suggest(key, fields)}")
            continue
        try:
            kept[key] = _convert(value, hints[key])
            if resolve := fields[key].metadata.get("resolve"):
                kept[key] = resolve(str(kept[key]))
            _check_bounds(kept[key], fields[key])
        except RecipeError as error:
            mistakes.append(error.line())
        except ValueError as error:
            mistakes.append(f"{key} = {value!r} {error}")
    if mistakes:
        raise RecipeError(where, "; ".join(mistakes), "see: edgealign config schema")
    return cls(**kept)


def load(cls: type[R], file: Path | None, overrides: Mapping[str, object]) -> R:
    """A recipe from a TOML file (or the defaults) with named fields overridden; None overrides nothing."""
    values: dict[str, object] = dict(read_toml(file)) if file is not None else {}
    values.update({key: value for key, value in overrides.items() if value is not None})
    return build(cls, values, where=str(file) if file is not None else cls.__name__)


def read_toml(file: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        RecipeError: it is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(file, "no such file", "see: edgealign config schema") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(file, f"is not readable TOML ({error})", "see: edgealign config schema") from error


def to_dict(recipe: object) -> dict[str, Any]:
    """The resolved values, as a manifest stores them."""
    return dataclasses.asdict(recipe)  # type: ignore[call-overload,no-any-return]


def schema(cls: type) -> dict[str, dict[str, Any]]:
    """Each field's type, default, bounds, choices, unit, help and source."""
    hints = get_type_hints(cls)
    described = {}
    for entry in dataclasses.fields(cls):
        described[entry.name] = {
            "type": _type_name(hints[entry.name]),
            "default": list(entry.default) if isinstance(entry.default, tuple) else entry.default,
            **{key: value for key, value in entry.metadata.items() if value and key != "resolve"},
        }
    return described


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("nothing" if arg is type(None) else _type_name(arg) for arg in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {get_args(hint)[0].__name__}"
    return str(hint.__name__)


def _convert(value: object, hint: Any) -> object:
    """`value` as the field's type.

    Raises:
        ValueError: it is not one.
    """
    if get_origin(hint) in (Union, types.UnionType):
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _convert(value, inner[0])
    if get_origin(hint) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError("is not a list")
        return tuple(_convert(item.strip() if isinstance(item, str) else item, get_args(hint)[0]) for item in items)
    return _convert_scalar(value, hint)


def _convert_scalar(value: object, hint: type) -> object:
    wrong = ValueError(f"is not {'an' if hint is int else 'a'} {hint.__name__}")
    if hint is bool:
        spelled = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if isinstance(value, str) and value.lower() in spelled:
            return spelled[value.lower()]
        if isinstance(value, bool):
            return value
        raise wrong
    if hint is str:
        if isinstance(value, str):
            return value
        raise wrong
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        number = float(value)
        if hint is int and number != int(number):
            raise wrong
    except (ValueError, OverflowError) as error:
        raise wrong from error
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("is not a finite number")
    return int(number) if hint is int else number


def _check_bounds(value: object, entry: dataclasses.Field[Any]) -> None:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        choices = entry.metadata.get("choices")
        if choices and item not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}{suggest(str(item), choices)}")
        for name, bound in entry.metadata.get("bounds", {}).items():
            fine = {"ge": item >= bound, "gt": item > bound, "le": item <= bound, "lt": item < bound}[name]
            if not fine:
                raise ValueError(f"must be {words[name]} {bound}")
