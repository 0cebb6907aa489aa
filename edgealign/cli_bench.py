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


@app.command("compare")
def compare(
    reports: Annotated[list[Path], typer.Argument(help="published reports of edgealign bench; the first is the base")],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="also where machines, versions or models differ; says in what")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="publish table, JSON and picture")] = None,
    json: JsonOption = False,
) -> None:
    """Hold reports against the first: ratios of medians with intervals; refuses what is not comparable."""
    from edgealign.bench import compare as comparing

    cli_options.print_result("bench compare", comparing.run(reports, anyway=anyway, out=out), json=json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="what llama-bench -o json printed, or the log of ExecuTorch's runner")],
    *,
    out: OutOption,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="machine card as JSON, or a fact as name=value (cpu, os, ...); repeatable"),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="the bundle that ran: its size, KL and bytes per token")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="of ExecuTorch's runner, whose log does not say")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a report of another program's measurements, so that a phone stands beside the laptop."""
    from edgealign.bench import imports

    made = imports.run(file, device=device or [], out=out, bundle=bundle, threads=threads)
    cli_options.print_result("bench import", made, json=json)
