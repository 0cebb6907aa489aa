"""Does a user's adapter change answers the way the user wants, in torch and in what ships?

Two questions, each asked of the base, of the user's own adapter and of the other users' adapters (the control
that must not help), on prompts that nobody trained on:

1. Ranking: does the model rank the user's unseen choices as the user did?
2. Generation, where the user's taste is known (generated users): how far do sampled answers move along the taste?
   The reward is taste . z(answer) / |taste|, in standard deviations of the practice data; intervals are 95 %
   bootstrap intervals over prompts, paired with the base's answers to the same prompts.

Reward or ranking alone proves nothing about text, therefore both. The users directory holds `unseen_choices.jsonl`
and, for generated users, `users.json` and `prompts.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, Check, open_artifact, open_model, publish, refuse_existing
from edgealign.errors import InputError
from edgealign.personalize.attributes import ATTRIBUTES, measure, reward
from edgealign.personalize.evaluate_recipe import EvaluateRecipe
from edgealign.personalize.ranking import Triple, rank_choices
from edgealign.progress import bar, say

BASE = "base"


def run(
    recipe: EvaluateRecipe,
    *,
    bundle: Path,
    model: str | Path,
    adapters: Mapping[str, Path],
    users: Path,
    out: Path,
) -> Artifact:
    """Evaluate and publish a report with text, a table and a picture.

    Raises:
        InputError: an adapter is not in the bundle, or the users directory has nothing to ask.
    """
    from edgealign.data.encode import encode_pair, encode_prompt, end_of_turn_id
    from edgealign.data.forms import Message, Pair
    from edgealign.data.read import read
    from edgealign.models.load import load_tokenizer
    from edgealign.personalize.evaluate_report import write_report
    from edgealign.runtimes.session import open_session, read_bundle

    refuse_existing(Path(out))
    base = open_model(model)
    shipped = read_bundle(bundle)
    missing = sorted(set(adapters) - set(shipped.adapters))
    if missing:
        raise InputError(bundle, f"has no adapter for {', '.join(missing)}", "export them: --adapter NAME=DIR")
    tokenizer = load_tokenizer(base.path)
    planted = _read_json(Path(users) / "users.json")
    choices: dict[str, list[Triple]] = {}
    for row in read(Path(users) / "unseen_choices.jsonl", form="pair").rows:
        if isinstance(row, Pair) and row.user_id is not None:
            asked = choices.setdefault(row.user_id, [])
            if len(asked) < recipe.choices:
                asked.append(encode_pair(tokenizer, row, max_tokens=recipe.max_tokens))
    prompts: list[str] = []
    if planted:
        lines = (Path(users) / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines][: recipe.prompts]
    encoded = [encode_prompt(tokenizer, (Message("user", prompt),)) for prompt in prompts]

    result: dict[str, Any] = {"prompts": prompts, "runtimes": {}}
    sessions = {
        "torch": (base.path, {name: Path(path) for name, path in adapters.items()}),
        f"{shipped.target} {shipped.quant}": (shipped.path, dict(shipped.adapters)),
    }
    for label, (place, files) in sessions.items():
        session = open_session(place, threads=recipe.threads or None)
        try:
            found: dict[str, Any] = {"ranking": {}, "answers": {}}
            work = (len(adapters) + 1) * (len(encoded) * recipe.samples + sum(map(len, choices.values())))
            with bar(total=work, label=f"evaluate {label}") as advance:
                for name in (BASE, *adapters):
                    session.set_user(None if name == BASE else files[name])
                    found["ranking"][name] = {}
                    for user, triples in choices.items():
                        found["ranking"][name][user] = rank_choices(session, triples).margins
                        advance(len(triples), name)
                    answers = _answers(session, encoded, recipe, stop={end_of_turn_id(tokenizer)}, advance=advance)
                    found["answers"][name] = [[tokenizer.decode(ids) for ids in group] for group in answers]
        finally:
            session.close()
        result["runtimes"][label] = found
    result["ranking"] = _summarize_ranking(result["runtimes"], tuple(choices))
    if planted:
        result["users"] = {name: planted["users"][name] for name in adapters}
        result["movement"] = _summarize_movement(result, planted["scale"], recipe)
    inputs = [base.as_input("model"), open_artifact(bundle, check_digests=False).as_input("bundle")]
    with publish(out, kind="report", format="eval", stage="eval", recipe=recipe, inputs=inputs) as draft:
        for check in _checks(result):
            draft.add_check(check)
        (draft.dir / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        write_report(draft.dir, result, recipe, draft.checks)
    say(f"read {Path(out) / 'report.md'}")
    return open_artifact(out)


def _answers(
    session: Any, prompts: Sequence[Sequence[int]], recipe: EvaluateRecipe, *, stop: set[int], advance: Any
) -> list[list[Sequence[int]]]:
    """`samples` answers to every prompt; the same seeds for every adapter, so differences are the adapter's."""
    from edgealign.runtimes.recipes import Sampling
    from edgealign.runtimes.together import generate_together

    plan = [(number, sample) for number in range(len(prompts)) for sample in range(recipe.samples)]
    samplings = [
        Sampling(
            max_tokens=recipe.max_new_tokens, temperature=recipe.temperature, top_p=recipe.top_p, min_p=0.0,
            repetition_penalty=1.0, seed=recipe.seed + 1000 * number + sample,
        )
        for number, sample in plan
    ]  # fmt: skip
    said = generate_together(
        session, [prompts[number] for number, _ in plan], samplings, stop=stop, on_answer=lambda: advance(1, "")
    )
    answers: list[list[Sequence[int]]] = [[] for _ in prompts]
    for (number, _), each in zip(plan, said, strict=True):
        answers[number].append(each.tokens)
    return answers


def _summarize_ranking(runtimes: Mapping[str, Any], users: Sequence[str]) -> dict[str, Any]:
    """Accuracy per runtime and user: base, own adapter, mean over the others' adapters; None where there is none."""
    from edgealign.personalize.ranking import Ranking

    summary: dict[str, Any] = {}
    for label, found in runtimes.items():
        table = {
            name: {user: Ranking(tuple(margins)).accuracy for user, margins in row.items()}
            for name, row in found["ranking"].items()
        }
        summary[label] = {}
        for user in users:
            others = [table[name][user] for name in table if name not in (BASE, user)]
            summary[label][user] = {
                "choices": len(found["ranking"][BASE][user]),
                "base": table[BASE][user],
                "own": table[user][user] if user in table else None,
                "others": _mean(others) if others else None,
            }
    return summary


def _summarize_movement(result: Mapping[str, Any], scale: Mapping[str, Any], recipe: EvaluateRecipe) -> dict[str, Any]:
    """Per runtime and user: reward of base, own and others' adapters, and each attribute's shift in the wanted way."""
    summary: dict[str, Any] = {}
    for label, found in result["runtimes"].items():
        summary[label] = {}
        for user, known in result["users"].items():
            taste = known["taste"]
            by_name = {
                name: [_mean([reward(text, taste, scale) for text in group]) for group in groups]
                for name, groups in found["answers"].items()
            }
            gains = [own - base for own, base in zip(by_name[user], by_name[BASE], strict=True)]
            others = [name for name in result["users"] if name != user]
            shifts = {}
            for attribute, weight in taste.items():
                wanted = [
                    (_mean_attribute(own, attribute) - _mean_attribute(base, attribute)) / scale[attribute][1]
                    for own, base in zip(found["answers"][user], found["answers"][BASE], strict=True)
                ]
                shifts[attribute] = {"wanted": weight, "shift_sd": interval(wanted, recipe)}
            summary[label][user] = {
                "reward_base": _mean(by_name[BASE]),
                "reward_own": _mean(by_name[user]),
                "reward_others": _mean([_mean(by_name[name]) for name in others]) if others else None,
                "gain_sd": interval(gains, recipe),
                "attributes": shifts,
            }
    return summary


def interval(values: Sequence[float], recipe: EvaluateRecipe) -> dict[str, float]:
    """Mean and 95 % percentile bootstrap interval over the values."""
    import numpy as np

    rng = np.random.default_rng(recipe.seed)
    array = np.asarray(values)
    means = array[rng.integers(0, len(array), (recipe.bootstrap, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}


def _checks(result: Mapping[str, Any]) -> list[Check]:
    """Generated users are a gate: each must gain, in every runtime, with the whole interval above zero."""
    checks = []
    for label, users in result.get("movement", {}).items():
        for user, row in users.items():
            gain = row["gain_sd"]
            note = f"reward gain in sd, 95 % from {gain['low']:.2f} to {gain['high']:.2f}; the low end must exceed 0"
            checks.append(Check(f"{label}: {user} moves", gain["low"], 0.0, gain["low"] > 0, note))
    return checks


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _mean_attribute(texts: Sequence[str], attribute: str) -> float:
    assert attribute in ATTRIBUTES
    return _mean([measure(text)[attribute] for text in texts])


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(file, f"is not JSON ({error})", "make it again: edgealign data synth") from error
    return loaded if isinstance(loaded, dict) else {}
