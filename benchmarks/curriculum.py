"""Does it help to fine-tune from easy to hard? Shuffled, easy to hard, and hard to easy, over seeds, with equal steps.

    python benchmarks/curriculum.py --model M --data train.jsonl --valid valid.jsonl --seeds 3 \\
        --runs runs/curriculum --out docs/results/curriculum --set epochs=2 --set learning_rate=1e-3

Every run starts from the same weights and sees the same examples; a seed decides the order within the shuffle and the
chance that the curricula mix in (`--set mixing=...`). Compared is the loss on held-out rows, per learned token, also
on their easy, middle and hard thirds by the same judges (`--judge`, none: the model itself before training).

Two intervals go with each difference from the shuffled order: over seeds (Student's t on the paired differences: would
another run of this training say the same?) and over held-out examples (bootstrap on the mean over seeds: would other
rows?). A run that is finished is not made again, one that was interrupted goes on. `--out` gets table.md, result.json
and curriculum.png; `--runs` keeps one small file per run, and the models with --keep.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_files import write_results

from edgealign import recipe as recipes
from edgealign.artifact import Artifact, hash_json, open_artifact, open_model, write_atomic
from edgealign.bench.machine import machine_card
from edgealign.errors import CheckFailed, EdgealignError, RecipeError, writing
from edgealign.models.load import load_model, load_tokenizer
from edgealign.progress import say
from edgealign.train import processes, sft
from edgealign.train.curriculum import epoch_order, unit_of
from edgealign.train.difficulty import Difficulty, Floats, grade, judge, open_judges
from edgealign.train.examples import Examples, load_documents
from edgealign.train.log import LOG_FILE
from edgealign.train.precision import choose_precision, count_parameters, fixed_threads
from edgealign.train.recipes import SftRecipe
from edgealign.train.scoring import Passes, tokens_of_pass

ORDERS = ("shuffled", "easy_to_hard", "hard_to_easy")
PARTS = ("all", "easy", "middle", "hard")
# 97.5 % quantile of Student's t by degrees of freedom; from 10 on the one of 10, which is a little too wide.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Material:
    """What all runs share. `parts`: the held-out examples of each third, and all of them."""

    source: Artifact
    judges: tuple[Artifact, ...]
    held_out: Examples
    difficulty: Difficulty
    parts: dict[str, list[int]]
    key: str


def prepare(args: argparse.Namespace, recipe: SftRecipe) -> Material:
    """Read the held-out rows and let the judges say how difficult they are."""
    source, judges = open_model(args.model), open_judges(args.judge)
    tokenizer = load_tokenizer(source.path)
    whole = dataclasses.replace(recipe, valid_fraction=0.0)
    held_out = load_documents(args.valid, tokenizer, whole, origins=True)
    model, passes = _load(source, recipe)
    difficulty = judge(
        judges, held_out.train, held_out.origins, base=(source, model, tokenizer), passes=passes,
        max_tokens=recipe.max_tokens, precision=recipe.precision, success_accuracy=recipe.success_accuracy,
    )
    ranked = epoch_order(difficulty, by=recipe.difficulty, easy_first=True, mixing=0.0, seed=0, epoch=0)
    thirds = [part.tolist() for part in np.array_split(np.asarray(ranked), 3)]
    key = hash_json(
        {
            "recipe": recipes.to_dict(recipe), "model": source.digest, "judges": [entry.digest for entry in judges],
            "data": [entry.digest for entry in load_documents(args.data, tokenizer, whole).inputs],
            "valid": [entry.digest for entry in held_out.inputs], "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
    )
    parts = dict(zip(PARTS, [list(range(len(ranked))), *thirds], strict=True))
    return Material(source, judges, held_out, difficulty, parts, key)


def train(order: str, seed: int, args: argparse.Namespace, recipe: SftRecipe, material: Material) -> dict[str, Any]:
    """One run, or what is remembered of it: held-out nats per example, the training loss of every step."""
    folder = Path(args.runs) / material.key[:12]
    name = f"{order}-{seed}"
    known = folder / f"{name}.json"
    if known.is_file():
        say(f"{name}: finished already")
        remembered: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return remembered
    out = folder / name
    if not out.exists():
        say(f"{name}: training")
        run_recipe = dataclasses.replace(recipe, order=order, seed=seed)
        judges = [] if order == "shuffled" else args.judge
        sft.run(run_recipe, model=args.model, data=args.data, valid=args.valid, judges=judges, out=out)
    made = open_artifact(out, kind="model")
    rows = [json.loads(line) for line in (out / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    result = {
        "order": order, "seed": seed, "steps": made.meta["steps"], "seconds": made.meta["seconds"],
        "warnings": made.meta["warnings"], "nats": held_out_nats(made, recipe, material).tolist(),
        "training_loss": [round(row["loss"], 5) for row in rows if "loss" in row],
    }
    with writing(known):
        write_atomic(known, json.dumps(result))
    if not args.keep:
        shutil.rmtree(out)
    return result


def held_out_nats(made: Artifact, recipe: SftRecipe, material: Material) -> Floats:
    """(n,) summed negative log-likelihood of the held-out examples."""
    model, passes = _load(made, recipe)
    return grade(model, material.held_out.train, passes, digest=made.digest).nats


def summarise(runs: Sequence[dict[str, Any]], before: Floats, tokens: Floats, parts: dict[str, list[int]]) -> Any:
    """Loss by order and part: mean and sd over seeds, and paired differences from shuffled with both intervals.

    Raises:
        CheckFailed: the runs are not of equally many steps.
    """
    steps = {run["steps"] for run in runs}
    if len(steps) != 1:
        raise CheckFailed(sorted(steps), "steps: the runs are not equally long", "start with another --runs")
    seeds = sorted({run["seed"] for run in runs})
    nats = {(run["order"], run["seed"]): np.asarray(run["nats"]) for run in runs}
    table: dict[str, Any] = {}
    for order in ORDERS:
        table[order] = {}
        for part, places in parts.items():
            divisor = tokens[places].sum()
            losses = [float(nats[order, seed][places].sum() / divisor) for seed in seeds]
            entry: dict[str, Any] = {"losses": losses, "mean": float(np.mean(losses)), "sd": _sd(losses)}
            if order != ORDERS[0]:
                plain = [float(nats[ORDERS[0], seed][places].sum() / divisor) for seed in seeds]
                gaps = [one - other for one, other in zip(losses, plain, strict=True)]
                mean_gap = np.mean([nats[order, seed] - nats[ORDERS[0], seed] for seed in seeds], axis=0)
                entry |= {
                    "difference": float(np.mean(gaps)), "over_seeds": over_seeds(gaps),
                    "over_examples": over_examples(mean_gap[places], tokens[places]),
                }
            table[order][part] = entry
    return {
        "orders": table, "seeds": seeds, "steps": steps.pop(),
        "before": {part: float(before[places].sum() / tokens[places].sum()) for part, places in parts.items()},
        "held_out": {part: len(places) for part, places in parts.items()},
    }


def over_seeds(gaps: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean of paired differences, by Student's t; None for a single pair."""
    if len(gaps) < 2:
        return None
    half = T_QUANTILES[min(len(gaps) - 2, len(T_QUANTILES) - 1)] * _sd(gaps) / len(gaps) ** 0.5
    mean = float(np.mean(gaps))
    return [mean - half, mean + half]


def over_examples(gaps: Floats, tokens: Floats) -> list[float]:
    """95 % interval of the difference per token, by resampling examples. gaps (n,) summed nats, tokens (n,)."""
    random = np.random.default_rng(0)
    drawn = [random.integers(0, len(gaps), len(gaps)) for _ in range(RESAMPLES)]
    values = [gaps[places].sum() / max(tokens[places].sum(), 1.0) for places in drawn]
    return [float(value) for value in np.quantile(values, (0.025, 0.975))]


def render(result: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    before = " | ".join(f"{result['before'][part]:.4f}" for part in PARTS)
    lines = [
        "| order | held-out loss, mean (sd over seeds) | easy third | middle third | hard third |",
        "|---|---|---|---|---|", f"| before training | {before} |",
    ]
    for order, entries in result["orders"].items():
        cells = [f"{entries[part]['mean']:.4f} ({entries[part]['sd']:.4f})" for part in PARTS]
        lines.append(f"| {order.replace('_', ' ')} | {' | '.join(cells)} |")
    lines += [
        "", "Difference from shuffled (below zero is better), with 95 % intervals over seeds and over examples:", "",
        "| order | part | difference | over seeds | over examples |", "|---|---|---|---|---|",
    ]
    for order in ORDERS[1:]:
        for part in PARTS:
            entry = result["orders"][order][part]
            cells = [f"{entry['difference']:+.4f}", _interval(entry["over_seeds"]), _interval(entry["over_examples"])]
            lines.append(f"| {order.replace('_', ' ')} | {part} | {' | '.join(cells)} |")
    facts = result["facts"]
    changed = ", ".join(f"{name} = {value}" for name, value in facts["recipe"].items()) or "all defaults"
    lines += [
        "",
        f"Nats per learned token. {len(result['seeds'])} seeds, {result['steps']} steps each from the same weights; "
        f"{result['held_out']['all']} held-out examples. Difficulty: {facts['difficulty']}. Recipe: {changed}. "
        f"{result['machine']['cpu']}, {facts['threads']} threads, {facts['precision']}, "
        f"torch {result['machine']['versions'].get('torch')}.",
        "An interval that contains zero shows no difference.",
        *(f"Warning: {warning}." for warning in facts["warnings"]),
    ]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Training loss by order, held-out loss of every run, and the differences on the thirds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for i, order in enumerate(ORDERS):
        name = order.replace("_", " ")
        curve = np.mean([run["training_loss"] for run in runs if run["order"] == order], axis=0)
        window = max(1, len(curve) // 30)
        smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
        left.plot(np.arange(len(smooth)) + window, smooth, color=f"C{i}", linewidth=1, label=name)
        losses = result["orders"][order]["all"]["losses"]
        middle.plot([i] * len(losses), losses, "o", color=f"C{i}", alpha=0.6)
        middle.plot([i - 0.2, i + 0.2], [np.mean(losses)] * 2, color=f"C{i}")
        if i:
            for j, part in enumerate(PARTS):
                entry = result["orders"][order][part]
                low, high = entry["over_seeds"] or entry["over_examples"]
                place = j + 0.2 * (i - 1.5)
                right.plot([place, place], [low, high], color=f"C{i}", linewidth=1)
                right.plot(place, entry["difference"], "o", color=f"C{i}", markersize=4, label=name if not j else None)
    left.set_title("training loss, mean over seeds, running mean", fontsize=10)
    left.set_xlabel("optimizer step")
    left.set_ylabel("nats per token")
    left.legend(fontsize=8)
    middle.set_title("held-out loss, one dot per seed", fontsize=10)
    middle.set_xticks(range(len(ORDERS)), [order.replace("_", " ") for order in ORDERS])
    middle.ticklabel_format(axis="y", useOffset=False)
    middle.set_ylabel("nats per token")
    which = "seeds" if len(result["seeds"]) > 1 else "examples"
    right.set_title(f"difference from shuffled, 95 % over {which}", fontsize=10)
    right.axhline(0.0, color="grey", linestyle=":", linewidth=1)
    right.set_xticks(range(len(PARTS)), PARTS)
    right.set_ylabel("nats per token; below zero is better")
    right.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what they say; written to `args.out`."""
    recipe = _recipe(args)
    card = machine_card()
    with fixed_threads(recipe.threads) as threads:
        material = prepare(args, recipe)
        runs = [train(order, seed, args, recipe, material) for seed in range(args.seeds) for order in ORDERS]
        before = held_out_nats(material.source, recipe, material)
        _, passes = _load(material.source, recipe)
    tokens = np.asarray([tree.n_learned for tree in material.held_out.train], dtype=np.float64)
    judges = f"{len(material.judges)} judges" if material.judges else "the model itself before training"
    default = recipes.to_dict(SftRecipe())
    facts = {
        "difficulty": f"{recipe.difficulty}, {unit_of(material.difficulty, recipe.difficulty)}, by {judges}",
        "recipe": {name: value for name, value in recipes.to_dict(recipe).items() if value != default[name]},
        "threads": threads, "precision": passes.precision.name, "model": material.source.digest,
        "warnings": sorted({warning for run in runs for warning in run["warnings"]}),
    }
    result = {**summarise(runs, before, tokens, material.parts), "facts": facts, "machine": card}
    pictures = {"curriculum.png": lambda file: draw(result, runs, file)}
    write_results(args.out, result, render(result), pictures=pictures)
    return result


def _recipe(args: argparse.Namespace) -> SftRecipe:
    overrides: dict[str, object] = {}
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals or name in ("order", "seed"):
            raise RecipeError(item, "is not name=value of something that stays the same in all runs", "see --help")
        overrides[name] = value
    loaded = recipes.load(SftRecipe, args.config, overrides)
    return dataclasses.replace(loaded, order="shuffled", seed=0)


def _load(source: Artifact, recipe: SftRecipe) -> tuple[Any, Passes]:
    model: Any = load_model(source.path)
    model.to(processes.device())
    precision = choose_precision(recipe.precision, lora=False, n_parameters=count_parameters(model))
    tokens = recipe.tokens_per_pass or tokens_of_pass(model, lora=recipe.lora)
    return model, Passes.of(model, precision, tokens_per_pass=tokens)


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _interval(bounds: Sequence[float] | None) -> str:
    return "one seed only" if bounds is None else f"{bounds[0]:+.4f} to {bounds[1]:+.4f}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="where every run starts")
    parser.add_argument("--data", nargs="+", required=True, help="what is trained on")
    parser.add_argument("--valid", nargs="+", required=True, help="what is held out")
    parser.add_argument("--judge", action="append", default=[], help="model that scores difficulty; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="table.md, result.json and curriculum.png go here")
    parser.add_argument("--runs", type=Path, default=Path("runs/curriculum"), help="finished runs are kept here")
    parser.add_argument("--config", type=Path, help="an SFT recipe as TOML")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the SFT recipe")
    parser.add_argument("--keep", action="store_true", help="keep the trained models, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.seeds < 1:
            raise RecipeError(args.seeds, "seeds: at least one is needed", "three or more give an interval")
        result = compare(args)
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
