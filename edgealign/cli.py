"""The command line: parse, dispatch lazily, print errors on one line.

stdout is data (text for people, or JSON with `--json`), stderr is talk. Exit codes: 0 done, 1 a check failed,
2 wrong use or unusable input, 3 a tool is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgealign import (
    __version__,
    cli_advise,
    cli_app,
    cli_bench,
    cli_chat,
    cli_data,
    cli_eval,
    cli_objectives,
    cli_options,
    cli_pairs,
    cli_users,
    pipeline,
    stages,
)
from edgealign.cli_options import (
    AdapterOption,
    ConfigOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    OutOption,
    Overrides,
    emit,
    takes_recipe,
)
from edgealign.errors import EdgealignError, writing
from edgealign.progress import hush_libraries

app = typer.Typer(
    name="edgealign",
    help="Align a small model, make it one person's, ship it, prove it, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Print what can be configured.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cli_data.app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(cli_eval.app, name="eval")
app.add_typer(cli_pairs.app, name="pairs")
app.command("reward")(cli_pairs.reward)
app.command()(cli_objectives.objectives)
app.command()(cli_users.basis)
app.command()(cli_users.start)
app.command()(cli_users.lora_basis)
app.command()(cli_users.personalize)
app.add_typer(cli_users.app, name="users")
app.add_typer(
    cli_bench.app, name="bench", help="Measure prefill, decode, time to first token, load, memory and adapter swap."
)

DataOption = Annotated[list[str], typer.Option("--data", help="data file, directory or hub id; repeatable")]
ValidOption = Annotated[
    list[str] | None, typer.Option("--valid", help="held-out data; without it a share of --data is held out")
]


def main() -> None:
    """Run the command line; every expected failure is one line on stderr and its exit code."""
    # Threads that wait without spinning: a neighbour on the same cores then costs its share, not ten times it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    hush_libraries()
    try:
        with writing(Path.cwd()):
            app(standalone_mode=False)
    except EdgealignError as error:
        print(f"edgealign: {error.line()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("edgealign: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.TyperException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group without its command: its help is the answer
            print(message, file=sys.stderr)
        else:
            print(f"edgealign: {' '.join(message.split())}; see: edgealign --help", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    preset: Annotated[str, typer.Argument(help=f"{', '.join(pipeline.preset_names())}, or a .toml file")],
    out: Annotated[Path | None, typer.Option("--out", help="where the stages go; default runs/PRESET")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="directory of real data, for presets that need it")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="start over")] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Run a whole preset; what is published already is skipped."""
    loaded = pipeline.load_preset(preset)
    target = out or Path("runs") / loaded.name
    if dry_run:
        plan = {"cost": loaded.cost, "stages": pipeline.plan_preset(loaded, out=target, data=data)}
        emit(plan, json=json, text=cli_options.plan_text)
        return
    result = pipeline.run_preset(loaded, out=target, data=data, force=force)
    emit(result, json=json, text=cli_options.run_text)


@app.command()
@takes_recipe("init")
def init(
    shape: Annotated[str | None, typer.Argument(help="a named shape; see: edgealign config schema init")] = None,
    *,
    out: OutOption,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="text to train the tokenizer on; repeatable")
    ] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Make a model with random weights from a named shape."""
    if shape is not None:
        overrides["shape"] = shape
    cli_options.run_stage("init", overrides, config, dry_run, json, text=text or [], out=out)


@app.command()
@takes_recipe("pretrain")
def pretrain(
    *,
    model: ModelOption,
    out: OutOption,
    data: DataOption,
    valid: ValidOption = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Next-token training on plain text: rows of one length, WSD or cosine, on a CPU, a GPU, or several (torchrun)."""
    cli_options.run_stage(
        "pretrain", overrides, config, dry_run, json, model=model, data=data, valid=valid or [], out=out
    )


@app.command()
@takes_recipe("distill")
def distill(
    *,
    model: ModelOption,
    teacher: Annotated[str, typer.Option("--teacher", help="the larger model, with the same vocabulary")],
    out: OutOption,
    data: DataOption,
    valid: ValidOption = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Next-token training with a teacher's top K beside the text; the teacher runs once and is cached."""
    cli_options.run_stage(
        "distill", overrides, config, dry_run, json,
        model=model, teacher=teacher, data=data, valid=valid or [], out=out,
    )


@app.command()
@takes_recipe("sft")
def sft(
    *,
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    valid: ValidOption = None,
    judge: Annotated[
        list[str] | None,
        typer.Option("--judge", help="model that scores difficulty for --order; repeatable; none: --model itself"),
    ] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Supervised fine-tuning on conversations, instructions or plain text; --order easy_to_hard is a curriculum."""
    cli_options.run_stage(
        "sft", overrides, config, dry_run, json,
        model=model, data=data, valid=valid or [], judges=judge or [], out=out,
    )


@app.command()
@takes_recipe("dpo")
def dpo(
    *,
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    valid: ValidOption = None,
    second: Annotated[
        str | None, typer.Option("--second", help="the other model of mrpo (a reference) and inpo_nash (the reference)")
    ] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Preference training on pairs, or on thumbs (--objective kto); the default is length-normalised DPO on pairs."""
    cli_options.run_stage(
        "dpo", overrides, config, dry_run, json, model=model, data=data, valid=valid or [], second=second, out=out
    )


@app.command()
@takes_recipe("merge")
def merge(
    *,
    model: Annotated[list[str], typer.Option("--model", help="models to merge; repeatable")],
    out: OutOption,
    base: Annotated[str | None, typer.Option("--base", help="their common base, for task vectors")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="a LoRA to merge into the one --model")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="held-out data that --search decides by")] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="--select judge: rule:NAME, reward:DIR, or the URL of an endpoint")
    ] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Merge models of one base, or a LoRA into its base; --search tries several and keeps the best."""
    cli_options.run_stage(
        "merge", overrides, config, dry_run, json,
        models=model, base=base, data=data or [], adapter=adapter, judge=judge, out=out,
    )


@app.command()
@takes_recipe("export")
def export(
    *,
    target: Annotated[str, typer.Option("--target", help="gguf, onnx or executorch")],
    model: ModelOption,
    out: OutOption,
    adapter: AdapterOption = None,
    calibration: Annotated[Path | None, typer.Option("--calibration", help="text for an importance matrix")] = None,
    python: Annotated[str | None, typer.Option("--python", help="the Python that has the exporter's tools")] = None,
    kit: Annotated[str | None, typer.Option("--kit", help="android: add scripts for a phone (gguf)")] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="--quant auto: predict for a bench report, a machine card, or bandwidth_gb_s=N"),
    ] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """Convert a model and its users' adapters for a runtime; published only if it behaves like torch."""
    cli_options.run_stage(
        "export",
        overrides,
        config,
        dry_run,
        json,
        target=target,
        model=model,
        adapters=cli_options.directories(adapter),
        calibration=calibration,
        python=python,
        kit=kit,
        device=device,
        out=out,
    )


@app.command()
@takes_recipe("verify")
def verify(
    bundle: Annotated[Path, typer.Argument(help="an exported bundle")],
    *,
    model: ModelOption,
    adapter: AdapterOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="publish the verdict as a report")] = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overrides: Overrides,
) -> None:
    """The parity gate: the bundle against the torch reference; exit 1 if it differs."""
    cli_options.run_stage(
        "verify",
        overrides,
        config,
        dry_run,
        json,
        bundle=bundle,
        model=model,
        adapters=cli_options.directories(adapter),
        out=out,
    )


app.command()(cli_advise.advise)
app.command()(cli_app.app)
app.command()(cli_chat.chat)
app.command()(cli_chat.package)


@app.command()
def show(
    directory: Annotated[str, typer.Argument(help="any artifact, or starter: the model that comes with edgealign")],
    digests: Annotated[bool, typer.Option("--digests/--no-digests", help="check every file's SHA-256")] = True,
    json: JsonOption = False,
) -> None:
    """An artifact's kind, checks, sizes and ancestry, without torch."""
    from edgealign import show as showing
    from edgealign.models.builtin import built_in

    found = built_in(directory) or Path(directory)
    emit(showing.describe(found, check_digests=digests), json=json, text=showing.render)


@config_app.command("schema")
def config_schema(
    stage: Annotated[str | None, typer.Argument(help="one stage; all without it")] = None, json: JsonOption = False
) -> None:
    """Every recipe's fields with type, default, bounds and where the default comes from."""
    from edgealign.recipe import schema

    names = stages.RECIPES.names() if stage is None else (stage,)
    emit({name: schema(stages.recipe_class(name)) for name in names}, json=json, text=cli_options.schema_text)
