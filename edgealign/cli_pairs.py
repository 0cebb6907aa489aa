"""`edgealign pairs sample | filter | revise` and `edgealign reward`: where pairs come from, and who judges them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgealign import cli_options
from edgealign.cli_options import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    OutOption,
    Overrides,
    takes_recipe,
)

app = typer.Typer(
    help="Make preference pairs: sampled, filtered by judges, revised.", no_args_is_help=True, rich_markup_mode=None
)
PairsOption = Annotated[list[str], typer.Option("--data", help="preference pairs; repeatable")]


@app.command()
@takes_recipe("pairs")
def sample(
    *,
    model: ModelOption,
    data: Annotated[list[str], typer.Option("--data", help="prompts: conversations or pairs; repeatable")],
    judge: Annotated[str, typer.Option("--judge", help="rule:NAME, reward:DIR, or the URL of an endpoint")],
    out: OutOption,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="an export of the model to draw with")] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Draw answers to each prompt, judge them, and keep the best against the worst."""
    cli_options.run_stage(
        "pairs", overrides, config, dry_run, json, model=model, data=data, judge=judge, bundle=bundle, out=out
    )


@app.command("filter")
@takes_recipe("pairs_filter")
def filter_pairs(
    *,
    data: PairsOption,
    judge: Annotated[
        list[str] | None, typer.Option("--judge", help="rule:NAME, reward:DIR, or an endpoint's URL; repeatable")
    ] = None,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Turn round, leave out or order pairs by what several judges think of them."""
    cli_options.run_stage("pairs_filter", overrides, config, dry_run, json, data=data, judges=judge or [], out=out)


@app.command()
@takes_recipe("pairs_revise")
def revise(
    *,
    data: Annotated[list[str], typer.Option("--data", help="pairs or conversations; repeatable")],
    endpoint: Annotated[str, typer.Option("--endpoint", help="URL of an OpenAI-compatible endpoint, or MODEL@URL")],
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Let a stronger model mend answers with few changes; the mended one is chosen (CLAIR)."""
    cli_options.run_stage("pairs_revise", overrides, config, dry_run, json, data=data, endpoint=endpoint, out=out)


@takes_recipe("reward")
def reward(
    *,
    model: ModelOption,
    data: PairsOption,
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Fit a reward head, a linear judge on a model's frozen states, to preference pairs."""
    cli_options.run_stage("reward", overrides, config, dry_run, json, model=model, data=data, out=out)
