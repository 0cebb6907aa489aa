"""Does a start from other users' LoRAs help a new user's? Planted tastes, few choices, three ways to begin.

    edgealign data users --out runs/people
    python benchmarks/lora_start.py --model starter --choices runs/people/choices.jsonl --out docs/results/lora_start

The first people of the file have their LoRAs fitted, and `edgealign start` makes a start of them. Each of the next is
fitted on k choices from zero, from the mean of the others (`--population`) and along it (`--start`), and ranks choices
of theirs that no fit has seen. Nothing is refused here: the gate of `edgealign personalize` would keep the population
where a fit does not help. Differences are paired, over people; intervals are 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fspo_report import interval
from result_files import write_results

from edgealign.artifact import open_model
from edgealign.bench.machine import machine_card
from edgealign.data.forms import Pair
from edgealign.data.read import read
from edgealign.errors import EdgealignError, InputError
from edgealign.models.lint import lora_targets
from edgealign.models.load import load_model, load_tokenizer
from edgealign.objectives.table import find
from edgealign.personalize.fit import fit
from edgealign.personalize.lora import encode_trees
from edgealign.personalize.lowrank import Factors, scale_user, wrap
from edgealign.personalize.recipes import LoraRecipe
from edgealign.personalize.start import average
from edgealign.progress import hush_libraries, say, track
from edgealign.train.held_out import rank_pairs
from edgealign.train.precision import fixed_threads
from edgealign.train.scoring import Passes

WAYS = ("from zero", "from the mean", "along the mean")
OBJECTIVE = find("ln_dpo")
BETA = 5.0


def adapted(model: Path, recipe: LoraRecipe, common: Mapping[str, Factors] | None, *, along: bool) -> tuple[Any, Any]:
    network: Any = load_model(model)
    layers = wrap(
        network, lora_targets(network).modules, rank=recipe.rank, scale=recipe.alpha / recipe.rank, seed=recipe.seed,
        population=common, along=along,
    )
    return network, layers


def learn(
    model: Path, tok: Any, recipe: LoraRecipe, rows: Sequence[Pair], common: Mapping[str, Factors] | None = None,
    *, along: bool = False,
) -> tuple[Any, Any]:
    """A network with a user's LoRA, fitted and shrunk as `edgealign personalize` does; without rows the common part."""
    network, layers = adapted(model, recipe, common, along=along)
    if rows:
        trees = encode_trees(tok, rows, recipe, speaker=network)
        parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
        fit(network, parameters, trees, recipe, objective=OBJECTIVE, beta=BETA)
        scale_user(layers, len(trees) / (len(trees) + recipe.prior_strength))
    return network, layers


def by_person(file: str) -> list[list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for row in read(file, form="pair").rows:
        if isinstance(row, Pair) and row.user_id:
            found.setdefault(row.user_id, []).append(row)
    return list(found.values())


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All people in all ways.

    Raises:
        InputError: too few people in the file.
    """
    model = open_model(args.model)
    tok: Any = load_tokenizer(model.path)
    people = by_person(args.choices)
    if len(people) < args.seen + args.new:
        raise InputError(args.choices, f"has {len(people)} people, {args.seen + args.new} are needed", "make more")
    recipe = LoraRecipe(learning_rate=args.learning_rate, threads=args.threads)
    with fixed_threads(args.threads) as threads:
        users = []
        for rows in track(people[: args.seen], total=args.seen, label="people who were here before"):
            _, layers = learn(model.path, tok, recipe, rows[: args.choices_before])
            users.append({name: layer.user for name, layer in layers.items()})
        common, kept, trust = average(users, recipe.rank)
        say(f"{recipe.rank} directions a layer hold {kept:.0%} of {len(users)} people's additions, t is {trust:.2f}")
        cells: dict[str, dict[str, list[float]]] = {}
        for rows in track(people[args.seen : args.seen + args.new], total=args.new, label="new people"):
            held_out = encode_trees(tok, rows[-args.asked :], recipe)
            for k in (0, *args.k):
                for way in WAYS if k else WAYS[:2]:
                    start = None if way == WAYS[0] else common
                    network, _ = learn(model.path, tok, recipe, rows[:k], start, along=way == WAYS[2])
                    passes = Passes.reading(network)
                    found = rank_pairs(network, held_out, passes)
                    cell = cells.setdefault(f"{k} {way}", {"accuracy": [], "margin": []})
                    cell["accuracy"].append(found.accuracy)
                    cell["margin"].append(found.margin)
    return {
        "cells": cells, "share_kept": kept, "mean_trusted": trust, "k": list(args.k), "machine": machine_card(),
        "facts": {
            "model": model.digest, "seen": args.seen, "choices_before": args.choices_before, "new": args.new,
            "asked": args.asked, "learning_rate": args.learning_rate, "threads": threads,
            "command": f"python {' '.join(sys.argv)}",
        },
    }


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    facts = result["facts"]
    lines = [
        f"{facts['seen']} people of {facts['choices_before']} choices before, {facts['new']} new ones who rank "
        f"{facts['asked']} choices each; rate {facts['learning_rate']:g}. Mean over people with the 95 % bootstrap "
        f"interval. The start's directions hold {result['share_kept']:.0%} of the earlier people's additions; "
        f"{result['mean_trusted']:.0%} of their mean is kept.",
    ]
    for measure, words in (("accuracy", "ranked right"), ("margin", "margin, nats per token")):
        head = " | ".join(("choices", *WAYS, "mean against zero", "along against zero"))
        lines += ["", f"## {words}", "", f"| {head} |", "|---" * 6 + "|"]
        for k in (0, *result["k"]):
            values = [np.asarray(result["cells"].get(f"{k} {way}", {}).get(measure, [])) for way in WAYS]
            shown = [_cell(value) if value.size else "as the mean" for value in values]
            gains = [_cell(value - values[0], sign=True) if value.size else "as the mean" for value in values[1:]]
            lines.append(f"| {k} | {' | '.join([*shown, *gains])} |")
    return "\n".join([*lines, "", f"`{facts['command']}`; {result['machine']['cpu']}, {facts['threads']} threads.", ""])


def _cell(values: Any, *, sign: bool = False) -> str:
    row, form = interval(values), "+.3f" if sign else ".3f"
    return f"{row['mean']:{form}} ({row['low']:{form}} to {row['high']:{form}})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--choices", required=True, help="many people's pairs with user_id: edgealign data users")
    parser.add_argument("--out", type=Path, required=True, help="table.md and result.json go here")
    parser.add_argument("--seen", type=int, default=12, help="people who were here before")
    parser.add_argument("--choices-before", type=int, default=16, help="of each of them")
    parser.add_argument("--new", type=int, default=12)
    parser.add_argument("--asked", type=int, default=12, help="choices of a new one that no fit sees")
    parser.add_argument("--k", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    hush_libraries()
    try:
        result = compare(args)
        text = render(result)
        write_results(args.out, result, text)
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
