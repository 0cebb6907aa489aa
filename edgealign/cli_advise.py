"""`edgealign advise`: what to ship to a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgealign import cli_options
from edgealign.cli_options import ConfigOption, DryRunOption, JsonOption, ModelOption, Overrides, takes_recipe
from edgealign.errors import UsageError


@takes_recipe("advise")
def advise(
    *,
    model: ModelOption,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="a user's LoRA, DIR or NAME=DIR; repeatable")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option("--bench", help="published report of edgealign bench; repeatable")
    ] = None,
    bundle: Annotated[
        list[Path] | None, typer.Option("--bundle", help="exported bundle: its size, KL, change kept; repeatable")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device", help="machine card as JSON, a report's directory, or NAME=VALUE (bandwidth_gb_s, ram_gb, "
            "cores, ...); repeatable; default: this machine",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="publish table, JSON and picture")] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:  # fmt: skip
    """Advise which target, quantisation and adapter carrier fit a device; exit 1 if none does."""
    cli_options.run_stage(
        "advise", overrides, config, dry_run, json, model=model, adapters=_named(adapter or []), reports=bench or [],
        bundles=bundle or [], device=device or [], out=out,
    )  # fmt: skip


def _named(items: list[str]) -> dict[str, Path]:
    """`NAME=DIR`, or DIR under its own name."""
    found: dict[str, Path] = {}
    for item in items:
        name, equals, place = item.partition("=")
        folder = Path(place if equals and name and place else item)
        name = name if equals and name and place else folder.resolve().name
        if name in found:
            raise UsageError(item, f"names {name} a second time", "give each adapter a name of its own: NAME=DIR")
        found[name] = folder
    return found
