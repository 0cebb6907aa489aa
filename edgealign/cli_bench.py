"""`edgealign bench BUNDLE...`, `edgealign bench compare` and `edgealign bench import`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgealign import cli_options
from edgealign.cli_options import ConfigOption, DryRunOption, JsonOption, OutOption, Overrides, takes_recipe

MEASURE = "measure"


class BenchGroup(TyperGroup):
    """Whatever does not begin with a subcommand's name is a list of bundles to measure."""

    def parse_args(self, ctx: Any, args: Sequence[str]) -> list[str]:
        rest = list(args)
        if not rest or rest[0] not in self.list_commands(ctx):
            # Help asked for after a bundle is the same help.
            rest = ["--help"] if "--help" in rest else [MEASURE, *rest]
        return super().parse_args(ctx, rest)

    def list_commands(self, ctx: Any) -> list[str]:
        """The subcommands that can be named: measuring has no name, and takes no bundle's."""
        return [name for name in super().list_commands(ctx) if name != MEASURE]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of measuring, and the subcommands below it."""
        measure = self.commands[MEASURE]
        with type(ctx)(measure, info_name=ctx.info_name, parent=ctx.parent) as own:
            measure.format_help(own, formatter)
        self.format_commands(ctx, formatter)


app = typer.Typer(cls=BenchGroup, rich_markup_mode=None)


@app.command(MEASURE)
@takes_recipe("bench")
def measure(
    bundles: Annotated[list[Path], typer.Argument(help="exported bundles; one named compare: ./compare")],
    *,
    out: Annotated[Path | None, typer.Option("--out", help="publish table, JSON and pictures")] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Measure bundles in one table: prefill, first token, decode, load, swap, memory, size, KL; share of bandwidth.

    Every cell runs in a fresh process, and the bundles take turns.
    """
    cli_options.run_stage("bench", overrides, config, dry_run, json, bundles=bundles, out=out)
