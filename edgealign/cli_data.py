"""`edgealign data`: check, synth, users, shots, prepare, reading, styles, answers, candidates, tastes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgealign import cli_options
from edgealign.cli_options import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    MapOption,
    ModelOption,
    OutOption,
    Overrides,
    emit,
    takes_recipe,
)
from edgealign.errors import CheckFailed

app = typer.Typer(
    help="Look at training data before it is used, and make it.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("check")
def check(
    file: Annotated[str, typer.Argument(help="data file, directory or hub id")],
    model: Annotated[str | None, typer.Option("--model", help="count tokens with this model's tokenizer")] = None,
    context: Annotated[int | None, typer.Option("--context", help="context length in tokens")] = None,
    map: MapOption = None,
    json: JsonOption = False,
) -> None:
    """Count rows, list every bad one, report length bias, duplicates and foreign templates."""
    from edgealign.data.check import check, render

    report = check(file, model=model, mapping=cli_options.pairs(map, "--map"), context=context)
    emit(report, json=json, text=render)
    if report["bad_rows"]:
        raise CheckFailed(file, f"{len(report['bad_rows'])} bad rows", "mend them, or train with --skip-bad N")


@app.command("synth")
@takes_recipe("synth")
def synth(
    *,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Write the generated practice data: conversations, pairs and three users with planted tastes."""
    cli_options.run_stage("synth", overrides, config, dry_run, json, out=out)


@app.command("users")
@takes_recipe("users")
def users(
    *,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Write many generated people's choices: tastes planted by a random map, and new people to try them on."""
    cli_options.run_stage("users", overrides, config, dry_run, json, out=out)


@app.command("shots")
@takes_recipe("shots")
def shots(
    source: Annotated[list[str], typer.Argument(help="pairs of many people, with user_id")],
    *,
    model: ModelOption,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Make pairs whose prompt begins with other choices of the same person (FSPO), for sft and dpo."""
    cli_options.run_stage("shots", overrides, config, dry_run, json, model=model, data=source, out=out)


@app.command("prepare")
@takes_recipe("prepare")
def prepare(
    source: Annotated[list[str], typer.Argument(help="data files, directories or hub ids")],
    *,
    out: OutOption,
    map: MapOption = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Collect, filter and split rows of any readable form into train.jsonl and valid.jsonl."""
    cli_options.run_stage(
        "prepare", overrides, config, dry_run, json, sources=source, mapping=cli_options.pairs(map, "--map"), out=out
    )


@app.command("reading")
@takes_recipe("reading")
def reading(
    source: Annotated[list[str], typer.Argument(help="stories in plain English: data files or directories")],
    *,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Ask questions about short passages of stories by rule, answered in the passages' own words."""
    cli_options.run_stage("reading", overrides, config, dry_run, json, sources=source, out=out)


@app.command("styles")
@takes_recipe("styles")
def styles(
    source: Annotated[list[str] | None, typer.Argument(help="data files, directories or hub ids")] = None,
    *,
    out: OutOption,
    map: MapOption = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Make answers in seven styles, each under a system turn that asks for it, from real conversations."""
    cli_options.run_stage(
        "styles", overrides, config, dry_run, json,
        sources=source or [], mapping=cli_options.pairs(map, "--map"), out=out,
    )


@app.command("answers")
@takes_recipe("own_answers")
def answers(
    source: Annotated[list[str] | None, typer.Argument(help="conversations whose prompts are asked")] = None,
    *,
    model: ModelOption,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="an export of the model to generate with")] = None,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """A model's own answers to the prompts, the best of a few that pass the rules: to make it surer of itself."""
    cli_options.run_stage(
        "own_answers", overrides, config, dry_run, json, model=model, sources=source or [], bundle=bundle, out=out
    )


@app.command("candidates")
@takes_recipe("candidates")
def candidates(
    source: Annotated[list[str] | None, typer.Argument(help="conversations or pairs whose prompts are asked")] = None,
    *,
    model: ModelOption,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="an export of the model to generate with")] = None,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Several answers to each prompt, in different styles: what planted users choose between (eval personalization)."""
    cli_options.run_stage(
        "candidates", overrides, config, dry_run, json, model=model, sources=source or [], bundle=bundle, out=out
    )


@app.command("tastes")
@takes_recipe("tastes")
def tastes(
    candidates: Annotated[Path, typer.Argument(help="answers to choose between: edgealign data candidates")],
    *,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Choices of simulated users with planted tastes between a model's answers, for a basis without real users."""
    cli_options.run_stage("tastes", overrides, config, dry_run, json, candidates=candidates, out=out)
