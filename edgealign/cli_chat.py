"""`edgealign chat` talks to a model; `edgealign package` makes a trained one the model that comes with edgealign."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgealign import recipe as recipes
from edgealign.chat.recipes import ChatRecipe
from edgealign.cli_options import ConfigOption, JsonOption, OutOption, Overrides, emit, takes_recipe
from edgealign.models.recipes import PackageRecipe


@takes_recipe(ChatRecipe)
def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="ask once; without it: the terminal, or the lines of a pipe")
    ] = None,
    *,
    model: Annotated[str | None, typer.Option("--model", help="model directory or hub id; none: the starter")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="an exported bundle, in its own runtime")] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="what personalize published; or, with --bundle, one of its users")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="who is speaking, with their version in use (edgealign users)")
    ] = None,
    basis: Annotated[
        str | None,
        typer.Option("--basis", help="what people differ in (edgealign basis); none: the starter's"),
    ] = None,
    config: ConfigOption = None,
    json: Annotated[bool, typer.Option("--json", help="print a JSON line for each answer")] = False,
    overrides: Overrides,
) -> None:
    """Talk to a model in the terminal; without options to the starter that comes with edgealign."""
    recipe = recipes.load(ChatRecipe, config, overrides)
    from edgealign.chat import terminal

    terminal.run(recipe, prompt=prompt, model=model, bundle=bundle, adapter=adapter, user=user, basis=basis, json=json)


@takes_recipe(PackageRecipe)
def package(
    run: Annotated[Path, typer.Argument(help="directory of a finished edgealign run")],
    *,
    preset: Annotated[str, typer.Option("--preset", help="the preset it ran: names the data on the card")] = "starter",
    model: Annotated[str, typer.Option("--model", help="id of the stage whose model is shipped")] = "merged",
    report: Annotated[
        list[str] | None, typer.Option("--report", help="id or directory of a report for the card; repeatable")
    ] = None,
    out: OutOption,
    config: ConfigOption = None,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Round a finished run's model to bfloat16, write its model card, prove that it speaks: a folder to ship."""
    recipe = recipes.load(PackageRecipe, config, overrides)
    from edgealign import show
    from edgealign.models import package as packaging

    made = packaging.run(recipe, run_dir=run, preset=preset, model=model, out=out, reports=report or [])
    emit(show.describe(made.path, check_digests=False), json=json, text=show.render)
