"""Does a model that was trained on shots follow a new person's choices? Against the same training without shots.

    edgealign run fspo --out runs/fspo
    python benchmarks/fspo.py --run runs/fspo --out docs/results/fspo

New people (no training file knows them) are asked on questions that nobody trained on. With k of their choices in
the prompt, two things are measured for every model of the preset, at the same k:

- ranking: the share of their choices that the implicit reward ranks as they did. The reward of an answer is the
  summed log-ratio to the model that the training started from, both with the same prompt; for models without one, the
  mean log-probability per token.
- generation: the planted reward of greedy answers, in standard deviations, by rule from the text: length, bullets,
  formality. One answer per question and model, so the sampling budget is equal.

Controls: another person's choices, and the person's own with preferred and not preferred by coin. What can be had: the
same shots, read by a fit on the very attributes that tastes are made of. Intervals are 95 % bootstrap intervals over
people, paired. A model's measurement is kept below --work and not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from fspo_people import CONTROLS, KS, Person, load_people, shots_for, told
from fspo_report import summarise, write

from edgealign.artifact import hash_json, open_artifact, open_model, write_atomic
from edgealign.bench.machine import machine_card
from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.errors import EdgealignError, InputError, writing
from edgealign.models.load import load_model, load_tokenizer
from edgealign.personalize import prompted
from edgealign.personalize.anchor import base_answers
from edgealign.personalize.attributes import reward
from edgealign.personalize.shots import describe, fit_shots, prefix_ids, with_shots, without_description
from edgealign.progress import say, track
from edgealign.train.layout import Tree
from edgealign.train.precision import fixed_threads
from edgealign.train.scoring import Passes, score

CONTROL_K = 4
BATCH = 16  # prompts that are answered together
DESCRIPTION_TOKENS = 32


@dataclass(frozen=True)
class Arm:
    """A model of the preset: what it is called, and the model that its log-ratios are taken to.

    `describes`: answers begin with a sentence about the person, which the model finds, or which a rule finds in the
    same shots (the one that its training data were made with).
    """

    label: str
    reference: str | None = None
    describes: Literal["no", "itself", "by rule"] = "no"
    folder: str = ""


ARMS: Mapping[str, Arm] = {
    "base": Arm("prompted only"),
    "few": Arm("few-shot SFT"),
    "plain": Arm("IPO without shots", "plain_sft"),
    "fspo": Arm("FSPO, IPO", "few"),
    "fspo_ln": Arm("FSPO, LN-DPO", "few"),
    "few_said": Arm("few-shot SFT, describes first", describes="itself"),
    "few_told": Arm("few-shot SFT, described by rule", describes="by rule", folder="few_said"),
    "fspo_said": Arm("FSPO, IPO, describes first", "few_said", "itself"),
    "fspo_told": Arm("FSPO, IPO, described by rule", "few_said", "by rule", "fspo_said"),
}


class Model:
    """A trained model with what scoring and answering need."""

    def __init__(self, folder: Path) -> None:
        self.tok: Any = load_tokenizer(folder)
        self.network: Any = load_model(folder)
        self.passes = Passes.reading(self.network)

    def answers(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> list[str]:
        """Greedy answers, shorter prompts with shorter ones."""
        found: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        end = end_of_turn_id(self.tok)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            said = base_answers(
                self.network, [prompts[i] for i in batch], n_tokens=n_tokens, end_id=end,
                pad_id=int(self.tok.pad_token_id or 0),
            )
            found.update({i: self.tok.decode([t for t in ids if t != end]) for i, ids in zip(batch, said, strict=True)})
        return [found[i] for i in range(len(prompts))]


def margins(model: Model, reference: Model | None, trees: Sequence[Tree]) -> list[list[float]]:
    """Per tree, one implicit-reward margin per question."""
    values = score(model.network, trees, model.passes, label="ranking").double()
    if reference is not None:
        values -= score(reference.network, trees, reference.passes, label="reference").double()
    return prompted.margins(values, trees, per_token=reference is None)


def measure(name: str, args: argparse.Namespace, people: Sequence[Person], scale: Any) -> dict[str, Any]:
    """Everything about one model: accuracy and planted reward of every person, by k and control."""
    arm = ARMS[name]
    model = Model(args.run / (arm.folder or name))
    reference = Model(args.run / arm.reference) if arm.reference else None
    cells: dict[str, Any] = {}
    conditions = [(k, "own") for k in args.k] + [(CONTROL_K, control) for control in CONTROLS]
    left_out = 0
    for k, condition in track(conditions, total=len(conditions), label=arm.label):
        trees, prompts, said = [], [], []
        for place, person in enumerate(people):
            wanted = shots_for(people, place, k, condition)
            shots = fit_shots(wanted, lambda kept: len(prefix_ids(model.tok, kept)) <= args.prefix_tokens)
            left_out += len(wanted) - len(shots)
            asked = [encode_prompt(model.tok, with_shots(row.prompt, shots)) for row in person.asked]
            words = [""] * len(asked)
            if arm.describes == "itself" and shots:
                answers = model.answers(asked, DESCRIPTION_TOKENS)
                words = [text.partition("\n\n")[0] for text in answers]
            elif arm.describes == "by rule" and shots:
                words = [describe(shots)] * len(asked)
                opening = model.tok.encode(f"{words[0]}\n\n", add_special_tokens=False)
                asked = [(*ids, *opening) for ids in asked]
            said.append(words[0])
            trees.append(prompted.questions(model.tok, shots, person.asked, words))
            prompts += asked[: args.prompts]
        found = margins(model, reference, trees)
        cell: dict[str, Any] = {
            "accuracy": [sum((m > 0) + 0.5 * (m == 0) for m in row) / len(row) for row in found], "margins": found,
        }
        if condition == "own" or args.generate_controls:
            texts = [without_description(text) for text in model.answers(prompts, args.new_tokens)]
            groups = [texts[i : i + args.prompts] for i in range(0, len(texts), args.prompts)]
            cell["reward"] = [
                sum(reward(text, person.taste, scale) for text in group) / len(group)
                for person, group in zip(people, groups, strict=True)
            ]
            cell["examples"] = texts[:2]
        if arm.describes != "no":
            cell["said"] = said[:4]
        cells[f"{k} {condition}"] = cell
    return {"arm": name, "cells": cells, "shots_left_out": left_out}


def remembered(name: str, args: argparse.Namespace, people: Sequence[Person], scale: Any) -> dict[str, Any]:
    """`measure`, or what is kept of it for the same models, people and settings."""
    arm = ARMS[name]
    digests = [open_model(args.run / part).digest for part in (arm.folder or name, arm.reference) if part]
    asked = [args.k, args.people, args.asked, args.prompts, args.new_tokens, args.prefix_tokens, args.generate_controls]
    key = hash_json([digests, open_artifact(args.run / "people").digest, asked, torch.__version__])
    file = args.work / f"{name}-{key[:12]}.json"
    if file.is_file():
        say(f"{arm.label}: measured already")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    result = measure(name, args, people, scale)
    with writing(file):
        args.work.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(result))
    return result


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All models, and what they say; written to `args.out`.

    Raises:
        InputError: the preset has not run there.
    """
    folders = {name: ARMS[name].folder or name for name in args.arms}
    missing = [folder for folder in folders.values() if not (args.run / folder).is_dir()]
    if missing:
        raise InputError(args.run, f"holds no {missing[0]}", f"make it with: edgealign run fspo --out {args.run}")
    people, scale = load_people(args.run / "people", people=args.people, asked=args.asked)
    with fixed_threads(args.threads) as threads:
        found = {name: remembered(name, args, people, scale) for name in args.arms}
    facts = {
        "people": len(people), "told": told(people, scale, args.k), "asked": args.asked, "prompts": args.prompts,
        "threads": threads, "k": list(args.k),
        "prefix_tokens": args.prefix_tokens,
        "models": {name: open_model(args.run / folder).digest for name, folder in folders.items()},
        "users": open_artifact(args.run / "people").manifest.recipe, "command": f"python {' '.join(sys.argv)}",
    }
    labels = {name: ARMS[name].label for name in args.arms}
    result = {**summarise(found, labels, args.k, CONTROL_K, CONTROLS), "facts": facts, "machine": machine_card()}
    write(result, args.out)
    return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="where the preset fspo ran")
    parser.add_argument("--out", type=Path, required=True, help="table.md, result.json and fspo.png go here")
    parser.add_argument("--work", type=Path, default=Path("runs/fspo-bench"), help="measurements are kept here")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--k", nargs="+", type=int, choices=KS, default=list(KS))
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--asked", type=int, default=12, help="choices each is asked to be ranked")
    parser.add_argument("--prompts", type=int, default=2, help="questions answered per person and k")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prefix-tokens", type=int, default=960, help="the oldest shots are left out beyond it")
    parser.add_argument("--generate-controls", action="store_true", help="answer with the controls' shots, too")
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        result = compare(parse(argv))
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(result["table"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
