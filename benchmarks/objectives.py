"""What does each preference objective do to a model? On real pairs, clean and with flipped labels, over seeds.

    python benchmarks/objectives.py --data ../shared/data --work runs/objectives --out docs/results/objectives
    python benchmarks/objectives.py --data ../shared/data --objectives ln_dpo dpo ld_dpo --seeds 1 --pairs 100
    python benchmarks/objectives.py --from docs/results/objectives/result.json more/result.json     # no training

What an objective reads beside a pair is made of labels, judge and starting model (objectives_pairs.py). The second
model of mrpo, and the iterate that inpo_nash goes on from, is the starter after dpo on other pairs.

Every run starts from the same model (the starter), sees the same pairs of UKPConvArg1 and HH (a seed draws which, and
which labels are flipped) for the same number of steps at the same learning rate, and has its objective's own defaults.
Measured on held-out, clean pairs: ranking accuracy; on their prompts, greedy answers: length, doom loops, and the win
rate over the starting model with length taken out, judged by a reward head that was fitted on other pairs; and how far
the model has gone: KL on the data's tokens, displacement of the chosen answers, perplexity of other text.

A run on the shared data takes about 90 seconds of one core; two processes can share a --work once it holds pairs,
text, judge and model "other". A run that is finished is not made again, and a directory of runs is kept for the
settings that made them. `--out` gets table.md, result.json and objectives.png. `--from` makes them again of results,
or of several that have settings, start and judge in common.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from objectives_pairs import add_columns, columns_of, draw_pairs, remember
from objectives_report import merge, render, write

from edgealign.artifact import open_artifact, open_model, write_atomic
from edgealign.bench.machine import machine_card
from edgealign.data import prepare
from edgealign.data.forms import Pair, to_json
from edgealign.data.read import read
from edgealign.data.recipes import PrepareRecipe
from edgealign.errors import CheckFailed, EdgealignError, InputError, UsageError
from edgealign.evaluate.language import _score as predict
from edgealign.evaluate.preferences import answer_all, measure_ranking, measure_writing
from edgealign.evaluate.recipes import PreferencesRecipe
from edgealign.judges import reward
from edgealign.judges.judge import Judge, open_judge
from edgealign.judges.recipes import RewardRecipe
from edgealign.objectives.table import Objective, find, trainable, trainable_name
from edgealign.progress import say
from edgealign.train import preference
from edgealign.train.recipes import PreferenceRecipe

SOURCES = ("ukpconvarg1/majority_pairs_dpo.jsonl.gz", "hh_rlhf/dev_pairs.jsonl.gz")
TEXT = "storybooks_en/stories.jsonl.gz"
FLIPPED = (0.0, 0.2)
# Of the starter, 24 steps of 16 clean pairs: at 5e-5 log-ratios moved by 0.004 nats a token and answers hardly; at 2e-4
# dpo, ln_dpo and hinge rank 67, 62 and 67 % of held-out pairs right by their own log-ratios, while the perplexity of
# stories stays within 3 % and loops are no more than before; at 5e-4 ln_dpo ranks 60 % right, and KL on the data is
# 17 times as large.
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Run:
    """One training run."""

    objective: str
    flipped: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.flipped:g}-{self.seed}"


def material(args: argparse.Namespace) -> dict[str, Path]:
    """Pairs to train on, pairs to fit the judge on, pairs to measure on, text, a second model; prepared once."""
    found = {name: args.work / name for name in ("pairs", "text", "judge", "other")}
    if not found["pairs"].is_dir():
        recipe = PrepareRecipe(form="pair", limit=args.drawn, max_chars=args.max_chars, valid=0.25, skip_bad=9)
        prepare.run(recipe, sources=[args.data / name for name in SOURCES], out=found["pairs"])
    if not found["text"].is_dir():
        recipe = PrepareRecipe(form="text", limit=60, valid=0.5)
        prepare.run(recipe, sources=[args.data / TEXT], out=found["text"])
    rows = _rows(found["pairs"] / "train.jsonl")
    half = len(rows) // 2
    if half < args.pairs:
        raise InputError(f"{half} pairs", f"are fewer than the {args.pairs} of a run", "raise --drawn or --max-chars")
    for name, part in (("train", rows[:half]), ("judge", rows[half:])):
        _write_rows(args.work / f"{name}.jsonl", part)
    if not found["judge"].is_dir():
        settings = RewardRecipe(threads=args.threads)
        reward.run(settings, model=args.model, data=[str(args.work / "judge.jsonl")], out=found["judge"])
    if not found["other"].is_dir() and any(find(name).second_model for name in args.objectives):
        _write_rows(args.work / "other.jsonl", rows[half : half + args.pairs])
        data = [str(args.work / "other.jsonl")]
        preference.run(recipe_of("dpo", 0, args), model=args.model, data=data, out=found["other"])
    return {**found, "train": args.work / "train.jsonl"}


def measure(run: Run, args: argparse.Namespace, given: Mapping[str, Path], start: Mapping[str, Any]) -> dict[str, Any]:
    """Train and measure; what is known is not done again."""
    file = _result_file(run, args)
    if file.is_file():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return known
    entry, out = find(run.objective), args.work / "models" / run.name
    model, second = (args.model, given["other"]) if entry.second_model else (args.model, None)
    if entry.second_model == "previous":  # the iterate to go on from
        model, second = second, model
    result: dict[str, Any] = {"objective": run.objective, "flipped": run.flipped, "seed": run.seed, "failed": None}
    try:
        shutil.rmtree(out, ignore_errors=True)
        made = preference.run(
            recipe_of(run.objective, run.seed, args), model=model, data=[str(rows_of(run, entry, args, given, start))],
            out=out, second=second,
        )  # fmt: skip
        result["beta"] = made.meta["beta"]
        result.update(look(out, args, given, start))
    except CheckFailed as error:
        result["failed"] = error.line()
    shutil.rmtree(out, ignore_errors=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(result) + "\n")
    return result


def recipe_of(objective: str, seed: int, args: argparse.Namespace) -> PreferenceRecipe:
    """The same for all, but for what an objective's own defaults are."""
    return PreferenceRecipe(
        objective=objective, epochs=1, batch_size=16, learning_rate=args.learning_rate, max_tokens=512,
        valid_fraction=0.0, seed=seed, threads=args.threads,
    )  # fmt: skip


def rows_of(
    run: Run, entry: Objective, args: argparse.Namespace, given: Mapping[str, Path], start: Mapping[str, Any]
) -> Path:
    """The file of a run's pairs, with the columns that its objective reads."""
    columns = columns_of(entry)
    file: Path = args.work / "data" / ("-".join([f"{run.flipped:g}", str(run.seed), *columns]) + ".jsonl")
    if not file.is_file():
        pairs = draw_pairs(_rows(given["train"]), args.pairs, run.flipped, run.seed)
        _write_rows(file, add_columns(pairs, columns, start["judge"], start["say_own"]) if columns else pairs)
    return file


def look(
    model: Path, args: argparse.Namespace, given: Mapping[str, Path], start: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that is measured of one model against the starting one."""
    settings: PreferencesRecipe = start["settings"]
    ranked = measure_ranking({"start": start["path"], "model": model}, start["held_out"], settings)["model"]
    answers = {"start": start["answers"], "model": answer_all(model, start["prompts"], settings)}
    judge: Judge = start["judge"]
    grades = {
        "start": start["grades"],
        "model": judge.scores([(prompt, row["text"]) for prompt, row in
                               zip(start["prompts"], answers["model"], strict=True)]),
    }  # fmt: skip
    return {
        "ranking": ranked, "writing": measure_writing(answers, grades, settings)["model"],
        "perplexity": perplexity(model, given["text"], args.threads),
    }  # fmt: skip


def begin(args: argparse.Namespace, given: Mapping[str, Path]) -> dict[str, Any]:
    """The starting model's own answers and numbers, and the judge."""
    path = open_model(args.model).path
    held_out = [row for row in read(given["pairs"] / "valid.jsonl", form="pair").rows if isinstance(row, Pair)]
    held_out = held_out[: args.held_out]
    prompts = list(dict.fromkeys(pair.prompt for pair in held_out))[: args.prompts]
    settings = PreferencesRecipe(threads=args.threads, max_new_tokens=args.max_new_tokens, bootstrap=200)
    answers = answer_all(path, prompts, settings)
    judge = open_judge(f"reward:{given['judge']}", threads=args.threads)
    grades = judge.scores([(prompt, row["text"]) for prompt, row in zip(prompts, answers, strict=True)])
    say_own = remember(
        args.work / "own_answers.json", lambda asked: [row["text"] for row in answer_all(path, asked, settings)]
    )
    return {
        "path": path, "held_out": held_out, "prompts": prompts, "settings": settings, "answers": answers,
        "judge": judge, "grades": grades, "say_own": say_own,
    }  # fmt: skip


def perplexity(model: Path, text: Path, threads: int) -> float:
    """Of held-out stories, per token."""
    from edgealign.evaluate.language import HeldOut, _hold
    from edgealign.evaluate.recipes import LanguageRecipe
    from edgealign.models.load import load_tokenizer

    recipe = LanguageRecipe(valid_tokens=8000, threads=threads)
    texts = [row.text for row in read(text / "valid.jsonl", form="text").rows if hasattr(row, "text")]
    held: HeldOut = _hold(texts, load_tokenizer(model), recipe)
    return float(np.exp(predict(model, held, recipe)[0].mean()))


def longer_is_chosen(model: Path, pairs: Sequence[Pair]) -> float:
    """The share of pairs whose chosen answer has more tokens, ties half: what ranking by length alone would reach."""
    from edgealign.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    gaps = [len(tokenizer(pair.chosen)["input_ids"]) - len(tokenizer(pair.rejected)["input_ids"]) for pair in pairs]
    return float(np.mean([0.5 * (1 + np.sign(gap)) for gap in gaps]))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, then their summary."""
    for name in args.objectives:
        trainable_name(name)
    args.work.mkdir(parents=True, exist_ok=True)
    claim(args)
    given = material(args)
    start = begin(args, given)
    plan = [Run(name, flipped, seed) for seed in range(args.seeds) for flipped in FLIPPED for name in args.objectives]
    rows, spent_s = [], list[float]()
    for place, run in enumerate(plan, start=1):
        known, start_s = _result_file(run, args).is_file(), time.monotonic()
        rows.append(measure(run, args, given, start))
        if not known:
            spent_s.append(time.monotonic() - start_s)
        left = (len(plan) - place) * float(np.mean(spent_s)) / 60 if spent_s else 0.0
        took = "known" if known else f"in {spent_s[-1]:.0f} s"
        say(f"{run.name}: {place} of {len(plan)} {took}, {left:.0f} min left")
    head = open_artifact(given["judge"])
    ranked = measure_ranking({"start": start["path"]}, start["held_out"], start["settings"])["start"]
    result = {
        "schema": 1, "machine": machine_card(), "runs": rows,
        "settings": {
            "pairs": args.pairs, "seeds": args.seeds, "learning_rate": args.learning_rate,
            "held_out": len(start["held_out"]), "prompts": len(start["prompts"]), "max_chars": args.max_chars,
        },
        "judge": {"held_out_accuracy": head.meta["held_out_accuracy"], "pairs": head.meta["pairs"]},
        "start": {
            "perplexity": perplexity(start["path"], given["text"], args.threads),
            "tokens": float(np.mean([row["tokens"] for row in start["answers"]])),
            "doom_loops": float(np.mean([row["loop"] for row in start["answers"]])),
            "longer_is_chosen": longer_is_chosen(start["path"], start["held_out"]),
            "accuracy": {name: found["value"] for name, found in ranked["accuracy"].items()},
        },
    }  # fmt: skip
    write(result, args.out)
    return result


def claim(args: argparse.Namespace) -> None:
    """Finished runs count only for the settings that they were made with.

    Raises:
        InputError: the work directory belongs to others.
    """
    names = ("model", "pairs", "drawn", "max_chars", "held_out", "prompts", "max_new_tokens", "learning_rate")
    settings = {name: getattr(args, name) for name in names}
    file = args.work / "settings.json"
    if not file.is_file():
        write_atomic(file, json.dumps(settings, indent=1) + "\n")
    known = json.loads(file.read_text(encoding="utf-8"))
    other = [f"{name} {known.get(name)}" for name in names if known.get(name) != settings[name]]
    if other:
        raise InputError(args.work, f"holds runs with {', '.join(other)}", "give another --work, or those settings")


def _result_file(run: Run, args: argparse.Namespace) -> Path:
    file: Path = args.work / "runs" / f"{run.name}.json"
    return file


def _rows(file: Path) -> list[Pair]:
    return [row for row in read(file, form="pair").rows if isinstance(row, Pair)]


def _write_rows(file: Path, rows: Sequence[Pair]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "".join(json.dumps(to_json(row)) + "\n" for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the real data")
    parser.add_argument("--from", dest="known", type=Path, nargs="+", metavar="RESULT", help="train nothing")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--objectives", nargs="+", default=list(trainable()), metavar="KEY")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=320, help="of one run")
    parser.add_argument("--drawn", type=int, default=1600, help="rows drawn from each source")
    parser.add_argument("--max-chars", type=int, default=900, help="longest row")
    parser.add_argument("--held-out", type=int, default=200, help="pairs to rank")
    parser.add_argument("--prompts", type=int, default=32, help="prompts to answer")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="finished runs are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/results/objectives"))
    args = parser.parse_args(argv)
    try:
        if args.known:
            result = merge(args.known)
            write(result, args.out)
        elif args.data:
            result = compare(args)
        else:
            raise UsageError("--data", "is missing", "give the directory of the real data, or --from RESULT")
        print(render(result))
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
