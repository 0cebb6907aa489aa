"""`edgealign pairs sample` and `edgealign reward`: preference pairs from a model's own answers, and who judges them."""

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

app = typer.Typer(help="Preference pairs from a model's own answers.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Preference pairs from a model's own answers."""


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


@takes_recipe("reward")
def reward(
    *,
    model: ModelOption,
    data: Annotated[list[str], typer.Option("--data", help="preference pairs; repeatable")],
    out: OutOption,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Fit a reward head, a linear judge on a model's frozen states, to preference pairs."""
    cli_options.run_stage("reward", overrides, config, dry_run, json, model=model, data=data, out=out)
