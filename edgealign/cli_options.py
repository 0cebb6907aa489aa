"""What the commands share: recipe fields as options, printing, and running one stage."""

from __future__ import annotations

import dataclasses
import inspect
import json as jsonlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from edgealign import recipe as recipes
from edgealign import stages
from edgealign.errors import CheckFailed, UsageError
from edgealign.progress import is_first_process

F = TypeVar("F", bound=Callable[..., None])
Overrides = dict[str, Any]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="show the plan with time and memory, do nothing")]
OutOption = Annotated[Path, typer.Option("--out", help="directory to publish; it must not exist")]
MapOption = Annotated[list[str] | None, typer.Option("--map", help="theirs=ours, a column by another name")]
ModelOption = Annotated[str, typer.Option("--model", help="model directory, hub id, or the built-in starter")]
AdapterOption = Annotated[list[str] | None, typer.Option("--adapter", help="NAME=DIR; repeatable")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="recipe as TOML; options override it")]


def takes_recipe(*which: str | type[Any]) -> Callable[[F], F]:
    """Give a command one option for each field of the stages' recipes (or of these recipe classes), as `overrides`.

    Of fields that have one name the first speaks for all.
    """

    def wrap(command: F) -> F:
        fields: dict[str, dataclasses.Field[Any]] = {}
        for each in which:
            for entry in dataclasses.fields(stages.recipe_class(each) if isinstance(each, str) else each):
                fields.setdefault(entry.name, entry)
        own = inspect.signature(command, eval_str=True)
        parameters = [entry for name, entry in own.parameters.items() if name != "overrides"]
        taken = {entry.name for entry in parameters}
        added = [_parameter(entry) for entry in fields.values() if entry.name not in taken]
        names = {entry.name for entry in added}

        def wrapped(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(**values, overrides={name: value for name, value in given.items() if value is not None})

        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        signature = own.replace(parameters=[*parameters, *added])
        wrapped.__signature__ = signature  # type: ignore[attr-defined]
        wrapped.__annotations__ = {entry.name: entry.annotation for entry in signature.parameters.values()}
        return wrapped  # type: ignore[return-value]

    return wrap


def run_stage(
    stage: str, overrides: Overrides, config: Path | None, dry_run: bool, json: bool, **arguments: Any
) -> None:
    """Build the recipe, then plan or run the stage and print what it published."""
    recipe = recipes.load(stages.recipe_class(stage), config, overrides)
    if dry_run:
        from edgealign.plan import plan_stage

        emit({"stages": [plan_stage(stage, recipe, arguments)]}, json=json, text=plan_text)
        return
    print_result(stage, stages.RUNNERS.load(stage)(recipe, **arguments), json=json)


def print_result(stage: str, result: Any, *, json: bool) -> None:
    """Print the published artifact, or the result and its text when nothing was published.

    Raises:
        CheckFailed: one of its checks failed.
    """
    from edgealign.artifact import Artifact

    if isinstance(result, Artifact):
        from edgealign import show

        result = show.describe(result.path, check_digests=False)
        emit(result, json=json, text=show.render)
    else:
        emit(result, json=json, text=lambda value: str(value.get("text", "")))
    failed = [check["name"] for check in result.get("checks", []) if not check["passed"]]
    if failed:
        raise CheckFailed(stage, f"failed: {', '.join(failed)}", "the table above has the numbers")


def emit(value: Mapping[str, Any], *, json: bool, text: Callable[[Any], str]) -> None:
    """Print data on stdout: JSON, or its text form; of several processes (torchrun) the first."""
    if is_first_process():
        print(jsonlib.dumps(value, indent=2, sort_keys=True, default=str) if json else text(value))


def pairs(items: list[str] | None, name: str, form: str = "theirs=ours") -> dict[str, str]:
    """`a=b` items as a dictionary.

    Raises:
        UsageError: an item without "=", or a name given twice.
    """
    found: dict[str, str] = {}
    for item in items or []:
        left, equals, right = item.partition("=")
        if not (left and equals and right):
            raise UsageError(item, f"is not of the form {name} {form}", "see: edgealign --help")
        if left in found:
            raise UsageError(item, f"names {left} a second time", "give each name once")
        found[left] = right
    return found


def directories(items: list[str] | None) -> dict[str, Path]:
    """`NAME=DIR` items as paths by name."""
    return {name: Path(value) for name, value in pairs(items, "--adapter", "NAME=DIR").items()}


def plan_text(value: Mapping[str, Any]) -> str:
    lines = [f"measured: {value['cost']}"] if value.get("cost") else []
    for entry in value["stages"]:
        state = "published already" if entry.get("published") else "would run"
        lines.append(f"{entry.get('id', entry['run'])}: {entry['run']}, {state}")
        for name in ("inputs", "estimate"):
            lines += [f"    {key}: {item}" for key, item in entry.get(name, {}).items()]
        lines += [f"    {key} = {item}" for key, item in entry["recipe"].items()]
    return "\n".join(lines)


def run_text(value: Mapping[str, Any]) -> str:
    from edgealign import show

    lines = [f"{value['preset']}: {value['seconds']:.0f} s, report in {value['result']}"]
    report = Path(value["result"]) / "report.md"
    if report.is_file():
        lines += ["", report.read_text(encoding="utf-8")]
    else:
        lines.append(show.render(show.describe(Path(value["result"]), check_digests=False)))
    return "\n".join(lines)


def schema_text(value: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = []
    for stage, fields in value.items():
        lines.append(f"[{stage}]  {stages.STAGES[stage].help}")
        for name, entry in fields.items():
            bounds = ", ".join(f"{word} {bound}" for word, bound in entry.get("bounds", {}).items())
            choices = "one of " + ", ".join(entry["choices"]) if entry.get("choices") else ""
            facts = "; ".join(fact for fact in (entry["type"], entry.get("unit", ""), bounds, choices) if fact)
            source = f" [{entry['source']}]" if entry.get("source") else ""
            lines.append(f"  {name} = {entry['default']!r}  ({facts}) {entry.get('help', '')}{source}")
        lines.append("")
    return "\n".join(lines)


def _parameter(entry: dataclasses.Field[Any]) -> inspect.Parameter:
    default = ",".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
    help = f"{entry.metadata.get('help', '')} [default: {default}]"
    flag = "--" + entry.name.replace("_", "-")
    annotation: Any = Annotated[str | None, typer.Option(flag, help=help, metavar="VALUE")]
    if isinstance(entry.default, bool):
        annotation = Annotated[bool | None, typer.Option(f"{flag}/--no{flag[1:]}", help=help)]
    return inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
