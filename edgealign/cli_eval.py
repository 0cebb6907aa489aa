"""`edgealign eval personalization | adapters | steering | language | chat | preferences`: reports with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgealign import cli_options
from edgealign.cli_options import (
    AdapterOption,
    ConfigOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    OutOption,
    Overrides,
    takes_recipe,
)

app = typer.Typer(
    help="Reports with pictures: personalisation, language, conversation.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
@takes_recipe("eval")
def adapters(
    *,
    bundle: Annotated[Path, typer.Option("--bundle", help="an exported bundle with the users' adapters")],
    model: ModelOption,
    out: OutOption,
    adapter: AdapterOption = None,
    users: Annotated[
        Path, typer.Option("--users", help="dataset with unseen prompts and the users' tastes or choices")
    ],
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Report whether each adapter moves answers in its user's direction, in torch and as shipped."""
    cli_options.run_stage(
        "eval",
        overrides,
        config,
        dry_run,
        json,
        bundle=bundle,
        model=model,
        adapters=cli_options.directories(adapter),
        users=users,
        out=out,
    )


@app.command()
@takes_recipe("eval_few_shot")
def personalization(
    *,
    model: ModelOption,
    candidates: Annotated[
        Path, typer.Option("--candidates", help="answers to choose between: edgealign data candidates")
    ],
    bundle: Annotated[
        list[Path] | None, typer.Option("--bundle", help="an exported bundle of the model; repeatable")
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="keep features here, so answers are read once")] = None,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Users with planted tastes: accuracy by number of choices, controls that must not help, what is said."""
    cli_options.run_stage(
        "eval_few_shot", overrides, config, dry_run, json,
        model=model, candidates=candidates, bundles=bundle or [], cache=cache, out=out,
    )  # fmt: skip


@app.command()
@takes_recipe("eval_language")
def language(
    *,
    model: Annotated[list[str], typer.Option("--model", help="NAME=DIR, a model and its name; repeatable")],
    data: Annotated[list[str], typer.Option("--data", help="the models' training text, for the baselines; repeatable")],
    valid: Annotated[list[str], typer.Option("--valid", help="held-out text; repeatable")],
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Held-out perplexity of models, beside a unigram and a Kneser-Ney 5-gram model of the same text."""
    cli_options.run_stage(
        "eval_language",
        overrides,
        config,
        dry_run,
        json,
        models=cli_options.pairs(model, "--model", "NAME=DIR"),
        data=data,
        valid=valid,
        out=out,
    )


@app.command()
@takes_recipe("eval_chat")
def chat(
    *,
    model: ModelOption,
    out: OutOption,
    bundle: Annotated[
        list[Path] | None, typer.Option("--bundle", help="an exported bundle of the model; repeatable")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="training text, for the known words; repeatable")
    ] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Forty fixed prompts: does it end its turn, keep to a story, follow a style, and say the same once exported?"""
    cli_options.run_stage(
        "eval_chat", overrides, config, dry_run, json, model=model, bundles=bundle or [], data=data or [], out=out
    )


@app.command()
@takes_recipe("eval_preferences")
def preferences(
    *,
    model: Annotated[list[str], typer.Option("--model", help="NAME=DIR; the first is what others are compared with")],
    data: Annotated[list[str], typer.Option("--data", help="held-out preference pairs; repeatable")],
    judge: Annotated[
        str | None, typer.Option("--judge", help="rule:NAME, reward:DIR, or the URL of an endpoint")
    ] = None,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Ranking accuracy and displacement on held-out pairs; with a judge, win rates with length taken out."""
    models = cli_options.pairs(model, "--model", "NAME=DIR")
    cli_options.run_stage(
        "eval_preferences", overrides, config, dry_run, json, models=models, data=data, judge=judge, out=out
    )


@app.command()
@takes_recipe("eval_steering")
def steering(
    *,
    model: ModelOption,
    out: OutOption,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="an exported bundle of the model: answers of its runtime")
    ] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Linear alignment at several strengths: how far answers move beyond the prompt, and what that costs."""
    cli_options.run_stage("eval_steering", overrides, config, dry_run, json, model=model, bundle=bundle, out=out)
