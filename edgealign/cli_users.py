"""`edgealign basis | lora-basis | start | personalize` fit; `edgealign users add | ask | list | show | ...` keep."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from edgealign import cli_options
from edgealign import recipe as recipes
from edgealign.cli_options import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    OutOption,
    Overrides,
    takes_recipe,
)
from edgealign.errors import RecipeError, UsageError
from edgealign.personalize.budget_recipe import BudgetRecipe

app = typer.Typer(help="The people of this machine and their adapters.", no_args_is_help=True, rich_markup_mode=None)
METHODS = {
    "lora": "personalize", "lore": "personalize_embedding", "fspo": "personalize_fspo",
    "direction": "personalize_direction", "lora-mix": "personalize_mix", "linear": "personalize_linear",
}  # fmt: skip
TAKES = {
    "lora": ("choices", "population", "start"), "lore": ("choices", "basis", "bundle"), "fspo": ("choices",),
    "direction": ("choices",), "lora-mix": ("choices", "basis", "bundle", "loras"), "linear": ("preference",),
}  # fmt: skip
BUDGETS = {
    "lora": ("kl_budget", "perplexity_budget"), "direction": ("kl_budget", "perplexity_budget"),
    "lora-mix": ("kl_budget", "perplexity_budget"), "lore": ("kl_budget",),
}  # fmt: skip
NEEDED = {  # of what a method takes; the others may be left out
    "choices": "give the user's choices: --choices PAIRS",
    "basis": "learn one: edgealign basis --model M --choices PAIRS --out DIR",
    "loras": "make them: edgealign lora-basis --model M --basis B --candidates C",
    "preference": "say what answers should be like: --preference TEXT",
}
NameArgument = Annotated[str, typer.Argument(help="whose: a name in the registry")]
RegistryOption = Annotated[
    Path | None, typer.Option("--registry", help="directory; none: EDGEALIGN_USERS, or this account's own")
]


@takes_recipe("basis")
def basis(
    *,
    model: ModelOption,
    choices: Annotated[list[str], typer.Option("--choices", help="many users' pairs with user_id; repeatable")],
    cache: Annotated[Path | None, typer.Option("--cache", help="keep features here, so answers are read once")] = None,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Learn what users have in common from many users' choices, for users as a few numbers."""
    cli_options.run_stage(
        "basis", overrides, config, dry_run, json, model=model, choices=choices, cache=cache, out=out
    )


@takes_recipe("start")
def start(
    *,
    model: ModelOption,
    adapter: Annotated[list[str], typer.Option("--adapter", help="a user's LoRA; repeatable, two or more")],
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Average several users' LoRAs into the start of new users': personalize --start."""
    cli_options.run_stage("start", overrides, config, dry_run, json, model=model, adapters=adapter, out=out)


@takes_recipe("lora_basis")
def lora_basis(
    *,
    model: ModelOption,
    basis: Annotated[
        str, typer.Option("--basis", help="whose directions: edgealign basis, or edgealign:starter-basis")
    ],
    candidates: Annotated[
        Path, typer.Option("--candidates", help="answers that differ: edgealign data candidates")
    ],
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Fit one LoRA for each direction of a basis; personalize --method lora-mix sums them for a user."""
    cli_options.run_stage(
        "lora_basis", overrides, config, dry_run, json, model=model, basis=basis, candidates=candidates, out=out
    )


@takes_recipe(*METHODS.values(), BudgetRecipe)
def personalize(
    *,
    model: ModelOption,
    out: OutOption,
    choices: Annotated[
        str | None, typer.Option("--choices", help="the user's choices: pairs as JSONL; not for linear")
    ] = None,
    user: Annotated[str, typer.Option("--user", help="whose choices: the user_id")],
    preference: Annotated[
        str | None, typer.Option("--preference", help="linear: what answers should be like, in words")
    ] = None,
    population: Annotated[
        Path | None, typer.Option("--population", help="lora: a LoRA fitted on many users, the start")
    ] = None,
    start: Annotated[Path | None, typer.Option("--start", help="lora: what several users' have in common")] = None,
    basis: Annotated[
        str | None,
        typer.Option("--basis", help="lore, lora-mix: what users have in common; edgealign:starter-basis is built in"),
    ] = None,
    loras: Annotated[Path | None, typer.Option("--loras", help="lora-mix: edgealign lora-basis")] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="lore, lora-mix: an export of the model that reads the answers")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="lora, lore (an embedding), lora-mix, fspo, direction, linear")
    ] = "lora",
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Fit one user: an embedding or a mix from 1 choice on, others from 4; published only if it does no harm."""
    if method not in METHODS:
        raise RecipeError(method, "is not a personalisation method", f"choose one of: {', '.join(METHODS)}")
    room = {name: overrides.pop(name) for name in BUDGETS.get(method, ()) if name in overrides}
    _refuse(method, _foreign(METHODS[method], overrides))
    given: dict[str, Any] = {
        "choices": choices, "population": population, "start": start, "basis": basis, "bundle": bundle,
        "loras": loras, "preference": preference,
    }  # fmt: skip
    own = TAKES[method]
    _refuse(method, {f"--{name}": value for name, value in given.items() if name not in own})
    for name in own:
        if given[name] is None and name in NEEDED:
            raise UsageError(f"--{name}", "is missing", NEEDED[name])
    arguments: dict[str, Any] = {"model": model, "user": user, "out": out} | {name: given[name] for name in own}
    if room:
        arguments["budget"] = recipes.build(BudgetRecipe, room, where="budget")
    cli_options.run_stage(METHODS[method], overrides, config, dry_run, json, **arguments)


@app.command()
def add(
    name: NameArgument,
    adapter: Annotated[Path, typer.Argument(help="what edgealign personalize published, of any method")],
    *,
    model: Annotated[
        str | None, typer.Option("--model", help="refuse it unless it belongs to this model, or bundle of it")
    ] = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Take a published adapter in as a user's next version, and use it: edgealign chat --user NAME."""
    from edgealign.personalize.adapter import check_adapter_place, open_user
    from edgealign.personalize.users import Users

    opened = open_user(adapter)
    if model is not None:
        check_adapter_place(opened, model)
    with Users(registry) as users:
        users.add_version(name, opened.path)
        row = _plain(users.user(name))
    cli_options.emit(row, json=json, text=_show_text)


@app.command()
def ask(
    name: NameArgument,
    *,
    model: ModelOption,
    basis: Annotated[
        str, typer.Option("--basis", help="what users have in common; edgealign:starter-basis is built in")
    ],
    candidates: Annotated[
        Path, typer.Option("--candidates", help="answers to choose between: edgealign data candidates")
    ],
    bundle: Annotated[Path | None, typer.Option("--bundle", help="an export of the model to read answers with")] = None,
    questions: Annotated[int, typer.Option("--questions", min=1, help="ask at most this many")] = 8,
    registry: RegistryOption = None,
) -> None:
    """Which of these two do you prefer? Asks what teaches most, and fits after every choice."""
    from edgealign.personalize import ask as asking
    from edgealign.personalize.users import Users

    with Users(registry) as users:
        asking.run(users, name, model=model, basis=basis, candidates=candidates, bundle=bundle, questions=questions)


@app.command("list")
def list_users(*, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Who is here, with how many choices and what they want."""
    from edgealign.personalize.users import Users

    with Users(registry) as users:
        rows = [_plain(users.user(name)) for name in users.names()]
    cli_options.emit({"users": rows}, json=json, text=_list_text)


@app.command()
def show(name: NameArgument, *, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """The versions of one user's adapter: from how many choices, held to what, in words."""
    from edgealign.personalize.users import Users

    with Users(registry) as users:
        row = _plain(users.user(name))
    cli_options.emit(row, json=json, text=_show_text)


@app.command()
def rollback(
    name: NameArgument,
    version: Annotated[int, typer.Argument(help="number of a version; 0: the model as it is for everybody")],
    *,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Make an earlier version of a user's adapter the one in use."""
    from edgealign.personalize.users import Users

    with Users(registry) as users:
        users.rollback(name, version)
        row = _plain(users.user(name))
    cli_options.emit(row, json=json, text=_show_text)


@app.command()
def forget(
    name: NameArgument,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    registry: RegistryOption = None,
) -> None:
    """Remove a user, their choices and adapters; no byte of them stays in the registry's files."""
    from edgealign.personalize.users import Users
    from edgealign.progress import say

    with Users(registry) as users:
        known = users.user(name)
        if not yes and not typer.confirm(
            f"forget {name}, {known.choices} choices and {len(known.versions)} versions, for good?", err=True
        ):
            raise UsageError(name, "was not forgotten", "answer y, or give --yes")
        users.forget(name)
    say(f"{name} is forgotten")


def _refuse(method: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None:
            raise UsageError(option, f"is not for --method {method}", "see: edgealign personalize --help")


def _foreign(stage: str, overrides: Overrides) -> dict[str, Any]:
    """The options that this stage's recipe does not have."""
    from edgealign import stages

    known = {field.name for field in dataclasses.fields(stages.recipe_class(stage))}
    return {f"--{name.replace('_', '-')}": value for name, value in overrides.items() if name not in known}


def _plain(user: Any) -> dict[str, Any]:
    versions = [
        {
            "version": each.number, "made": time.strftime("%Y-%m-%d %H:%M", time.localtime(each.made_s)),
            "method": each.method, "choices": each.choices, "words": each.words, "score": each.score,
            "population": each.population, "digest": each.digest, "folder": str(each.folder), **_facts(each.folder),
        }
        for each in user.versions
    ]  # fmt: skip
    return {"name": user.name, "choices": user.choices, "active": user.active, "versions": versions}


def _facts(folder: Path) -> dict[str, Any]:
    """What the manifest of a version says: its model, and what it was held to."""
    from edgealign.artifact import read_manifest
    from edgealign.errors import ArtifactError

    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        return {"model": "", "checks": [], "fault": error.line()}
    checks = [dataclasses.asdict(check) for check in manifest.checks]
    return {"model": str(manifest.meta.get("base_digest", "")), "checks": checks}


def _list_text(result: dict[str, Any]) -> str:
    if not result["users"]:
        return "nobody yet: edgealign users ask NAME"
    lines = []
    for row in result["users"]:
        words = next((each["words"] for each in row["versions"] if each["version"] == row["active"]), "")
        lines.append(f"{row['name']}: {_counted(row)} choices, version {row['active']}{f', {words}' if words else ''}")
    return "\n".join(lines)


def _show_text(row: dict[str, Any]) -> str:
    lines = [f"{row['name']}: {_counted(row)} choices"]
    lines.append(f"{'*' if row['active'] == 0 else ' '} 0  the model as it is for everybody")
    for each in row["versions"]:
        count = f" from {each['choices']} choices" if each["method"] != "linear" else ""
        words = each["words"] or ("as everybody" if each["method"] == "lore" else "")
        lines.append(
            f"{'*' if each['version'] == row['active'] else ' '} {each['version']}  {each['made']}, {each['method']}"
            f"{count}{': ' if words else ''}{words}  [{each['digest'][:12]}, of the model {each['model'][:12] or '?'}]"
        )
        lines += [f"       {_check_text(check)}" for check in each["checks"]]
        lines += [f"       {each['fault']}"] if "fault" in each else []
    return "\n".join(lines)


def _check_text(check: dict[str, Any]) -> str:
    value, bar = (("-" if check[name] is None else f"{check[name]:.3f}") for name in ("value", "tolerance"))
    return f"{check['name']} {value}, held to {bar}"


def _counted(row: dict[str, Any]) -> int:
    """Choices in the registry, or those that a version was fitted on, which may have come from a file."""
    return max(int(row["choices"]), *(int(each["choices"]) for each in row["versions"]), 0)
