"""How well models rank and write what people prefer: `edgealign eval preferences`.

    edgealign eval preferences --model before=M --model dpo=N --data held_out.jsonl --judge reward:HEAD --out R

The first model is what the others are compared with, and their reference. On held-out pairs:

- ranking accuracy, by summed and by mean log-probabilities, of the model alone and of its log-ratios to the first
  (arXiv 2405.19534 finds most models below 60 %); ties count half;
- displacement: how much less likely the chosen answers have become, in nats per token (margins can grow while both
  sides fall), and the k3 estimate of the KL divergence on the data's own tokens.

With a judge, on the prompts of those pairs: every model answers greedily; the win rate over the first model, raw and
with length taken out (`win_rate`), the mean length of the answers, and the share of doom loops (`loops`).
Shape legend: P pairs, S = 2 P sequences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.artifact import Artifact, file_input, open_artifact, open_model, publish, refuse_existing
from edgealign.data.forms import Message, Pair
from edgealign.errors import InputError, UsageError
from edgealign.evaluate.chat_measures import bootstrap_mean
from edgealign.evaluate.loops import is_doom_loop, repeated_share
from edgealign.evaluate.recipes import PreferencesRecipe
from edgealign.evaluate.win_rate import win_rate
from edgealign.judges.judge import open_judge, verdict
from edgealign.progress import bar


def run(
    recipe: PreferencesRecipe, *, models: Mapping[str, str | Path], data: Sequence[str], judge: str | None, out: Path
) -> Artifact:
    """Measure and publish `result.json`, `table.md`, `preferences.png` and, with a judge, `answers.jsonl`.

    Raises:
        InputError: no pairs, or models whose tokens differ.
        UsageError: no model, or no such judge.
    """
    from edgealign.data.read import read_all
    from edgealign.evaluate.preferences_report import write_report

    refuse_existing(Path(out))
    if not models:
        raise UsageError("--model", "names none", "give at least one --model NAME=DIR")
    opened = {name: open_model(path) for name, path in models.items()}
    asker = open_judge(judge, threads=recipe.threads) if judge else None
    inputs = [artifact.as_input(name) for name, artifact in opened.items()]
    pairs: list[Pair] = []
    for loaded in read_all(list(data), form="pair", mapping={}, skip_bad=recipe.skip_bad):
        inputs.append(file_input("data", loaded.source, loaded.digest))
        pairs += [row for row in loaded.rows if isinstance(row, Pair)]
    pairs = pairs[: recipe.limit]
    if not pairs:
        raise InputError(", ".join(map(str, data)), "holds no pairs", "give preference pairs")
    ranked = measure_ranking({name: artifact.path for name, artifact in opened.items()}, pairs, recipe)
    result: dict[str, Any] = {"pairs": len(pairs), "ranking": ranked, "writing": None, "judge": None}
    answers: dict[str, list[dict[str, Any]]] = {}
    if asker is not None:
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: recipe.prompts]
        answers = {name: answer_all(artifact.path, prompts, recipe) for name, artifact in opened.items()}
        graded = {
            name: asker.scores([(prompt, row["text"]) for prompt, row in zip(prompts, rows, strict=True)])
            for name, rows in answers.items()
        }
        asker.close()
        result.update(judge=asker.name, prompts=len(prompts), writing=measure_writing(answers, graded, recipe))
    with publish(out, kind="report", format="preferences", stage="eval_preferences", recipe=recipe,
                 inputs=inputs) as draft:  # fmt: skip
        (draft.dir / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_report(draft.dir, result)
        if answers:
            rows = [json.dumps({"model": name, **row}) for name, each in answers.items() for row in each]
            (draft.dir / "answers.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return open_artifact(out)


def measure_ranking(
    models: Mapping[str, Path], pairs: Sequence[Pair], recipe: PreferencesRecipe
) -> dict[str, dict[str, Any]]:
    """By model: accuracies with their intervals, log-probabilities of both sides, displacement and KL to the first."""
    import torch

    from edgealign.data.encode import encode_pairs
    from edgealign.models.load import load_model, load_tokenizer
    from edgealign.objectives.loss import pair_metrics
    from edgealign.objectives.scores import Ragged, Scores, pad_ragged
    from edgealign.objectives.table import find
    from edgealign.train.layout import pair
    from edgealign.train.precision import choose_precision, count_parameters, fixed_threads
    from edgealign.train.reference import reference_scores
    from edgealign.train.scoring import Passes, score

    encoded: dict[str, tuple[Any, ...]] = {}
    for name, path in models.items():
        encoded[name] = encode_pairs(load_tokenizer(path), pairs, max_tokens=recipe.max_tokens).rows
        if encoded[name] != next(iter(encoded.values())):
            raise InputError(path, "has another tokenizer than the first model", "compare it in a report of its own")
    trees = [pair(*row) for row in next(iter(encoded.values()))]
    lengths = torch.tensor([len(side) for _, *sides in next(iter(encoded.values())) for side in sides])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    found: dict[str, dict[str, Any]] = {}
    reference: Scores | None = None
    for name, path in models.items():
        network = load_model(path)
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        precision = choose_precision(recipe.precision, lora=False, n_parameters=count_parameters(network))
        with fixed_threads(recipe.threads):
            passes = Passes.of(network, precision, tokens_per_pass=recipe.tokens_per_pass)
            if reference is None:  # many models are compared with one
                values = reference_scores(network, trees, passes, model_digest=open_model(path).digest).values
            else:
                values = score(network, trees, passes, label=f"{name}: ranking {len(trees)} pairs")
        policy = pad_ragged(Ragged(values, sequence, lengths))
        metrics = {key: pair_metrics(find(key), policy, reference) for key in ("dpo", "ln_dpo")}
        shares = {"sum_free": metrics["dpo"]["hit_free"], "mean_free": metrics["ln_dpo"]["hit_free"]}
        if reference is not None:
            shares |= {"sum": metrics["dpo"]["hit"], "mean": metrics["ln_dpo"]["hit"]}
        one = metrics["ln_dpo"]
        found[name] = {
            "accuracy": {key: _share(value.tolist(), recipe) for key, value in shares.items()},
            "logp_chosen": float(one["logp_chosen"].mean()), "logp_rejected": float(one["logp_rejected"].mean()),
            "displacement": float(one["ratio_chosen"].mean()) if reference is not None else None,
            "kl_on_data": float(one["kl"].mean()) if reference is not None else None,
            "margin_mean": float(one["margin_mean"].mean()) if reference is not None else None,
        }  # fmt: skip
        reference = reference or policy
    return found


def answer_all(
    model: Path, prompts: Sequence[Sequence[Message]], recipe: PreferencesRecipe
) -> list[dict[str, Any]]:
    """A greedy answer to every prompt: its text, length in tokens, whether it ended, and whether it loops."""
    from edgealign.data.encode import encode_prompt, end_of_turn_id
    from edgealign.models.load import load_tokenizer
    from edgealign.runtimes.generate import GREEDY
    from edgealign.runtimes.session import open_session
    from edgealign.runtimes.together import generate_together

    tokenizer = load_tokenizer(model)
    asked = [encode_prompt(tokenizer, prompt, typed=True) for prompt in prompts]
    samplings = [replace(GREEDY, max_tokens=recipe.max_new_tokens)] * len(asked)
    session = open_session(model, threads=recipe.threads or None)
    try:
        with bar(total=len(prompts), label="answering") as advance:
            answers = generate_together(
                session, asked, samplings, stop={end_of_turn_id(tokenizer)}, on_answer=lambda: advance(1, "")
            )
    finally:
        session.close()
    return [
        {
            "prompt": prompt[-1].content, "text": str(tokenizer.decode(said.tokens)).strip(),
            "tokens": len(said.tokens), "ended": said.finish == "stop", "loop": is_doom_loop(said.tokens),
            "repeated": repeated_share(said.tokens),
        }
        for prompt, said in zip(prompts, answers, strict=True)
    ]  # fmt: skip


def measure_writing(
    answers: Mapping[str, Sequence[Mapping[str, Any]]], grades: Mapping[str, Sequence[float]], recipe: PreferencesRecipe
) -> dict[str, dict[str, Any]]:
    """By model: lengths, loops, grades, and the win rate over the first model."""
    first = next(iter(answers))
    found: dict[str, dict[str, Any]] = {}
    for name, rows in answers.items():
        lengths = [row["tokens"] for row in rows]
        found[name] = {
            "tokens": _share(lengths, recipe), "ended": float(np.mean([row["ended"] for row in rows])),
            "doom_loops": float(np.mean([row["loop"] for row in rows])),
            "repeated": float(np.mean([row["repeated"] for row in rows])), "grade": float(np.mean(grades[name])),
            "win_rate": None,
        }  # fmt: skip
        if name != first and len(rows) > 1:
            wins = [verdict(ours, theirs) for ours, theirs in zip(grades[name], grades[first], strict=True)]
            theirs = [row["tokens"] for row in answers[first]]
            found[name]["win_rate"] = asdict(
                win_rate(wins, lengths, theirs, resamples=recipe.bootstrap, seed=recipe.seed)
            )
    return found


def _share(values: Sequence[float], recipe: PreferencesRecipe) -> dict[str, float]:
    low, high = bootstrap_mean(values, resamples=recipe.bootstrap, seed=recipe.seed)
    return {"value": float(np.mean(values)), "low": low, "high": high}
