"""On-policy pairs: a model's own answers to given prompts, judged; the best against the worst.

    edgealign pairs sample --model M --data prompts.jsonl --judge reward:HEAD --out DIR

As the LFM2 report is said to do it (arXiv 2511.23404): N drawn answers a prompt; the data's own answers are candidates
too, one of a conversation, both of a pair; the highest number is chosen, the lowest rejected. Where numbers are equal
the model's own answer is taken, on both sides. A prompt whose best and worst are equally good gives no pair. Answers
that were cut, or hold a control token, are no candidates. Every pair keeps its gap as `margin`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.artifact import Artifact, file_input, open_artifact, open_model, publish, refuse_existing
from edgealign.data.encode import encode_prompt
from edgealign.data.forms import Conversation, Message, Pair, to_json
from edgealign.data.read import read_all
from edgealign.data.synthetic import write_jsonl
from edgealign.data.template import end_of_turn_id, facts_of
from edgealign.errors import InputError
from edgealign.judges.judge import Judge, open_judge
from edgealign.judges.recipes import SampleRecipe
from edgealign.judges.rejection import accept
from edgealign.models.load import load_tokenizer
from edgealign.progress import bar, say
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session, open_session
from edgealign.runtimes.together import generate_together


@dataclass(frozen=True)
class Candidate:
    """An answer, its number, and whether the model itself gave it."""

    text: str
    score: float
    own: bool


def run(
    recipe: SampleRecipe,
    *,
    model: str | Path,
    data: Sequence[str],
    judge: str,
    out: Path,
    bundle: Path | None = None,
) -> Artifact:
    """Sample, judge, publish pairs.

    Args:
        judge: what `open_judge` reads.
        bundle: an export of `model` to draw the answers with, in place of torch.

    Raises:
        InputError: the data have no prompts, no prompt gave a pair, or the bundle is of another model.
        UsageError: there is no such judge.
    """
    refuse_existing(Path(out))
    source = open_model(model)
    asked, inputs = [], [source.as_input("model")]
    if bundle is not None:
        inputs.append(_export_of(source, Path(bundle)).as_input("bundle"))
    for loaded in read_all(list(data), mapping={}, skip_bad=None):
        inputs.append(file_input("data", loaded.source, loaded.digest))
        asked += [found for row in loaded.rows if (found := question(row))]
    if not asked:
        raise InputError(", ".join(map(str, data)), "has no prompts", "give conversations or pairs")
    random.Random(recipe.seed).shuffle(asked)
    asked = asked[: recipe.limit]
    opened = open_judge(judge, threads=recipe.threads)
    drawn = _draw(recipe, source.path, bundle, [prompt for prompt, _ in asked])
    pairs, left_out = _judge(recipe, opened, asked, drawn)
    opened.close()
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        raise InputError(f"{len(asked)} prompts", f"gave no pair ({reasons})", "more --samples, or another judge")
    counts = ", ".join(f"{reason}: {number}" for reason, number in left_out.items())
    say(f"{len(pairs)} pairs of {len(asked)} prompts" + (f" ({counts})" if counts else ""))
    with publish(out, kind="dataset", format="jsonl", stage="pairs", recipe=recipe, inputs=inputs) as draft:
        write_jsonl(draft.dir / "train.jsonl", [to_json(pair) for pair, _, _ in pairs])
        draft.meta.update(
            rows={"train.jsonl": len(pairs)}, left_out=dict(left_out), judge=opened.name,
            own_chosen=sum(best.own for _, best, _ in pairs) / len(pairs),
            own_rejected=sum(worst.own for _, _, worst in pairs) / len(pairs),
        )  # fmt: skip
    return open_artifact(out)


def _export_of(model: Artifact, bundle: Path) -> Artifact:
    """The bundle, which must be of this model: its answers are read with the model's tokenizer."""
    opened = open_artifact(bundle, kind="bundle")
    digest = str(opened.meta.get("model_digest", ""))
    if digest != model.digest:
        reason = f"was exported from the model {digest[:12] or '(unnamed)'}, this one is {model.digest[:12]}"
        raise InputError(bundle, reason, f"export it: edgealign export --target gguf --model {model.path} --out DIR")
    return opened


def question(row: Any) -> tuple[tuple[Message, ...], tuple[str, ...]] | None:
    """The conversation up to an answer, and the answers that the data have for it."""
    if isinstance(row, Pair):
        return row.prompt, (row.chosen, row.rejected)
    if isinstance(row, Conversation):
        for place in range(len(row.messages) - 1, 0, -1):
            if row.messages[place].role == "assistant":
                return row.messages[:place], (row.messages[place].content,)
    return None


def best_and_worst(candidates: Sequence[Candidate], *, margin: float = 0.0) -> tuple[Candidate, Candidate] | None:
    """The pair to learn from; None where no two differ by more than `margin`. Ties go to the model's own answers."""
    if len(candidates) < 2:
        return None
    best = max(candidates, key=lambda each: (each.score, each.own))
    worst = min(candidates, key=lambda each: (each.score, not each.own))
    if best.score <= worst.score or best.score - worst.score < margin or best.text == worst.text:
        return None
    return best, worst


def _draw(
    recipe: SampleRecipe, model: Path, bundle: Path | None, prompts: Sequence[tuple[Message, ...]]
) -> list[list[str]]:
    """The model's answers to each prompt, without those that were cut and without doubles."""
    tokenizer = load_tokenizer(model)
    sampling = Sampling(temperature=recipe.temperature, min_p=recipe.min_p, max_tokens=recipe.max_new_tokens)
    asked = [
        [(messages, replace(sampling, seed=(recipe.seed * 1_000_003 + number) * 97 + place))
         for place in range(recipe.samples)]
        for number, messages in enumerate(prompts)
    ]  # fmt: skip
    session = open_session(bundle or model, threads=recipe.threads or None)
    try:
        return draw_answers(session, tokenizer, asked)
    finally:
        session.close()


def draw_answers(
    session: Session, tokenizer: Any, asked: Sequence[Sequence[tuple[Sequence[Message], Sampling]]], *,
    label: str = "drawing answers",
) -> list[list[str]]:
    """For each group of conversations the answers, without doubles, empty ones, and those that were cut or hold a
    control token."""
    flat = [each for group in asked for each in group]
    prompts = [encode_prompt(tokenizer, messages, typed=True) for messages, _ in flat]
    with bar(total=len(flat), label=label) as advance:
        drawn = generate_together(
            session, prompts, [sampling for _, sampling in flat], stop={end_of_turn_id(tokenizer)},
            on_answer=lambda: advance(1, ""),
        )  # fmt: skip
    control, answers = facts_of(tokenizer).control, iter(drawn)
    found = []
    for group in asked:
        ended = [said for said in islice(answers, len(group)) if said.finish == "stop"]
        texts = [str(tokenizer.decode(said.tokens)).strip() for said in ended]
        found.append(list(dict.fromkeys(text for text in texts if text and not control.search(text))))
    return found


def _judge(
    recipe: SampleRecipe,
    judge: Judge,
    asked: Sequence[tuple[tuple[Message, ...], tuple[str, ...]]],
    drawn: Sequence[Sequence[str]],
) -> tuple[list[tuple[Pair, Candidate, Candidate]], Counter[str]]:
    """All candidates are judged in one call: an endpoint and a reward head show their progress once."""
    texts = [[*dict.fromkeys([*own, *given])] for own, (_, given) in zip(drawn, asked, strict=True)]
    every = [(prompt, text) for (prompt, _), each in zip(asked, texts, strict=True) for text in each]
    scores = iter(judge.scores(every))
    pairs, left_out = [], Counter[str]()
    rng = np.random.default_rng(recipe.seed)
    for (prompt, _), each, own in zip(asked, texts, drawn, strict=True):
        candidates = [Candidate(text, next(scores), text in own) for text in each]
        if not own:
            left_out["no answer of the model ended"] += 1
            continue
        if recipe.rso:
            numbers = [candidate.score for candidate in candidates]
            places = accept(numbers, beta=recipe.rso_beta, count=recipe.rso, rng=rng)
            candidates = [candidates[place] for place in sorted(places)]
        found = best_and_worst(candidates, margin=recipe.margin)
        if found is None:
            left_out["equally good"] += 1
            continue
        best, worst = found
        pairs.append((Pair(prompt, best.text, worst.text, margin=best.score - worst.score), best, worst))
    return pairs, left_out
