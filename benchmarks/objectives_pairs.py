"""The pairs of a run of benchmarks/objectives.py: drawn, some labels flipped, and what objectives read beside them.

That is made of what is there: people's labels, the judge, the starting model.

    margin                  the judge's gap, in deviations over the pairs; below 0 where it contradicts the label
    epsilon, score          the chance that the label is wrong by that gap (as `pairs filter --soften` writes it); the
                            chance that it is right, less a half
    advantage(_rejected)    the judge's number of each answer, in deviations from the mean of all
    gold                    of the chosen answers to the same prompt, the one that the judge likes best
    base, calibration       the starting model's own greedy answer
    others, grades          that answer too: people's label puts 1 before 0.5, and it gets 0
    rationale               a sentence on the attribute in which the two differ most; nobody wrote it
    rejected_prompt         the rejected side is another pair's, with its prompt

Labels may be flipped: what belongs to a side follows the label, what the judge says does not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgealign.artifact import write_atomic
from edgealign.data.forms import Fact, Message, Pair
from edgealign.errors import InputError
from edgealign.judges.filter import chance_of_a_wrong_label
from edgealign.judges.judge import Judge
from edgealign.objectives.table import MADE, Objective
from edgealign.personalize.attributes import measure, standardize

Prompts = Sequence[tuple[Message, ...]]
BY_JUDGE = frozenset({"margin", "epsilon", "score", "advantage", "advantage_rejected", "gold"})
BY_MODEL = frozenset({"base", "calibration", "grades"})
REASONS: Mapping[str, tuple[str, str]] = {
    "length": ("It is longer.", "It is shorter."), "bullets": ("It is a list.", "It is no list."),
    "formality": ("It is more formal.", "It is more casual."),
}  # fmt: skip


def columns_of(objective: Objective) -> tuple[str, ...]:
    """What its rows must have that neither `draw_pairs` nor the trainer gives."""
    given = {"user", "base_reference", objective.second_model, *MADE}
    return tuple(name for name in objective.columns if name not in given)


def draw_pairs(rows: Sequence[Pair], count: int, flipped: float, seed: int) -> list[Pair]:
    """`count` of the rows in a seed's order, a share with their sides exchanged; a source is an annotator."""
    rng = random.Random(seed)
    chosen = rng.sample(list(rows), count)
    wrong = set(rng.sample(range(count), round(flipped * count)))
    return [
        Pair(row.prompt, row.rejected if i in wrong else row.chosen, row.chosen if i in wrong else row.rejected,
             user_id="ukp" if row.margin is not None else "hh")
        for i, row in enumerate(chosen)
    ]  # fmt: skip


def add_columns(
    pairs: Sequence[Pair], columns: Sequence[str], judge: Judge, say_own: Callable[[Prompts], Sequence[str]]
) -> list[Pair]:
    """The pairs with what `columns` names.

    Args:
        say_own: the starting model's answers to prompts.
    """
    if "rejected_prompt" in columns:
        return across_prompts(pairs)
    found: dict[str, Sequence[Fact]] = {}
    if BY_JUDGE.intersection(columns):
        found |= by_judge(pairs, judge)
    if BY_MODEL.intersection(columns):
        own = list(say_own([pair.prompt for pair in pairs]))
        found |= {"base": own, "calibration": own, "others": [(text,) for text in own]}
        found |= {"grades": [(1.0, 0.5, 0.0)] * len(pairs)}
    if "rationale" in columns:
        found |= {"rationale": reasons(pairs)}
    names = [*columns, *(["others"] if "grades" in columns else [])]
    rows = []
    for i, pair in enumerate(pairs):
        facts = {name: found[name][i] for name in names if name != "margin"}
        margin = float(found["margin"][i]) if "margin" in columns else None  # type: ignore[arg-type]
        rows.append(replace(pair, facts=facts, margin=margin))
    return rows


def by_judge(pairs: Sequence[Pair], judge: Judge) -> dict[str, Sequence[Fact]]:
    """The columns that a judge's numbers make."""
    chosen, rejected = (
        np.asarray(judge.scores([(pair.prompt, text) for pair, text in zip(pairs, texts, strict=True)]))
        for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    )
    gap = (chosen - rejected) / max(float((chosen - rejected).std()), 1e-12)
    everything = np.concatenate([chosen, rejected])
    mean, deviation = float(everything.mean()), max(float(everything.std()), 1e-12)
    best: dict[tuple[Message, ...], int] = {}
    for i, pair in enumerate(pairs):
        if pair.prompt not in best or chosen[i] > chosen[best[pair.prompt]]:
            best[pair.prompt] = i
    return {
        "margin": gap.tolist(), "epsilon": [chance_of_a_wrong_label(value) for value in gap.tolist()],
        "score": [float(np.tanh(value / 2) / 2) for value in gap],  # sigmoid(gap) - 1/2
        "advantage": ((chosen - mean) / deviation).tolist(),
        "advantage_rejected": ((rejected - mean) / deviation).tolist(),
        "gold": [pairs[best[pair.prompt]].chosen for pair in pairs],
    }  # fmt: skip


def reasons(pairs: Sequence[Pair]) -> list[str]:
    """Why each chosen answer is better: the attribute with the largest gap in deviations over all answers."""
    scale = standardize([text for pair in pairs for text in (pair.chosen, pair.rejected)])
    texts = []
    for pair in pairs:
        chosen, rejected = measure(pair.chosen), measure(pair.rejected)
        gaps = {name: (chosen[name] - rejected[name]) / scale[name][1] for name in REASONS}
        name = max(gaps, key=lambda each: abs(gaps[each]))
        texts.append(REASONS[name][0 if gaps[name] >= 0 else 1])
    return texts


def across_prompts(pairs: Sequence[Pair]) -> list[Pair]:
    """Each chosen answer beside the rejected one of the next pair that asks in one message and asks something else.

    Raises:
        InputError: no other pair does.
    """
    rows = []
    for i, pair in enumerate(pairs):
        following = (pairs[(i + step) % len(pairs)] for step in range(1, len(pairs)))
        other = next((row for row in following if len(row.prompt) == 1 and row.prompt != pair.prompt), None)
        if other is None:
            raise InputError(f"{len(pairs)} pairs", "have no two prompts of one message", "give more")
        facts = {"rejected_prompt": other.prompt[0].content}
        rows.append(replace(pair, rejected=other.rejected, facts=facts))
    return rows


def remember(file: Path, answer: Callable[[Prompts], Sequence[str]]) -> Callable[[Prompts], list[str]]:
    """`answer`, asked once for every prompt; what it said is kept in a file."""

    def known(prompts: Prompts) -> list[str]:
        said: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        wanted = {json.dumps([message.as_dict() for message in prompt]): prompt for prompt in prompts}
        missing = {key: prompt for key, prompt in wanted.items() if key not in said}
        if missing:
            said |= dict(zip(missing, answer(list(missing.values())), strict=True))
            write_atomic(file, json.dumps(said) + "\n")
        return [said[json.dumps([message.as_dict() for message in prompt])] for prompt in prompts]

    return known
