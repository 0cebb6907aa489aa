"""`edgealign users ask`: which of these two do you prefer? The question that teaches most, then the next.

In a terminal the arrow keys choose (left or up: the first, right or down: the second; s: neither, q: enough); from a
pipe a line a question: 1, 2, s or q. Every choice is kept before the next question is asked, and the user is fitted
again after each; at the end the fit is published into the registry as a new version.

Shape legend: A answers of the pool, M pairs, B rank.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgealign.artifact import open_model
from edgealign.data.forms import Pair, to_json
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import CheckFailed
from edgealign.personalize import embedding
from edgealign.personalize.basis import check_basis, open_basis
from edgealign.personalize.candidates import Candidates, read_answers, read_candidates
from edgealign.personalize.features import Cache
from edgealign.personalize.lore import Fitted, fit_users, next_question
from edgealign.personalize.recipes import EmbeddingRecipe
from edgealign.personalize.users import Users
from edgealign.progress import say
from edgealign.runtimes.session import open_session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

MOST_PROMPTS = 48  # whose answers are read before the first question
KEYS = {
    "\x1b[D": "1", "\x1b[A": "1", "\x1bOD": "1", "\x1bOA": "1", "\x1b[C": "2", "\x1b[B": "2", "\x1bOC": "2",
    "\x1bOB": "2", "1": "1", "2": "2", "s": "s", "q": "q", "\x03": "q", "\x04": "q",
}  # fmt: skip


def run(
    users: Users, name: str, *, model: str, basis: str | Path, candidates: Path, bundle: Path | None, questions: int
) -> None:
    """Ask, remember, fit; publish a version at the end.

    Raises:
        InputError: a basis of another model, or no candidates.
    """
    from edgealign.models.load import load_tokenizer

    base, shared = open_model(model), open_basis(basis)
    check_basis(shared, base.digest, basis)
    answers, rows = read_candidates(candidates)
    tokenizer = load_tokenizer(base.path)
    rows = [rows[number] for number in np.random.default_rng(0).permutation(len(rows))[:MOST_PROMPTS]]
    session = open_session(bundle or base.path)
    try:
        cache = Cache(users.folder / "cache", f"{shared.digest} {answers.digest} {bundle}")
        found = read_answers(shared.folded, session, tokenizer, rows, cache)
    finally:
        session.close()
    pairs, gaps = every_pair(rows, found)
    known = {(pair.prompt, pair.chosen, pair.rejected): place for place, pair in enumerate(pairs)}
    said: list[Floats] = []
    asked: set[int] = set()
    for pair in users.choices(name) if name in users.names() else []:
        for place, sign in ((known.get((pair.prompt, pair.chosen, pair.rejected)), 1.0),
                            (known.get((pair.prompt, pair.rejected, pair.chosen)), -1.0)):  # fmt: skip
            if place is not None:
                asked.add(place)
                said.append(sign * gaps[place])
    for number in range(questions):
        fitted = _fit(said, shared.folded.rank)
        left = [place for place in range(len(pairs)) if place not in asked]
        if not left:
            break
        place = left[next_question(gaps[left], fitted)]
        asked.add(place)
        heading = f"[{number + 1} of {questions}] {pairs[place].prompt[-1].content}"
        answer = which(heading, pairs[place].chosen, pairs[place].rejected)
        if answer == "q":
            break
        if answer == "s":
            continue
        pair = pairs[place] if answer == "1" else Pair(pairs[place].prompt, pairs[place].rejected, pairs[place].chosen)
        users.add_choice(name, pair)
        said.append(gaps[place] if answer == "1" else -gaps[place])
        words = shared.words(_fit(said, shared.folded.rank).weights[0])
        say(f"so far: {words or 'as everybody'}")
    if said:
        publish(users, name, model=model, basis=basis, bundle=bundle)


def publish(users: Users, name: str, *, model: str, basis: str | Path, bundle: Path | None) -> None:
    """Fit on all that somebody chose, and add the version if it does no harm."""
    with users.scratch(name) as scratch:
        file = scratch / "choices.jsonl"
        write_jsonl(file, [to_json(pair) for pair in users.choices(name)])
        try:
            made = embedding.run(
                EmbeddingRecipe(), model=model, basis=basis, bundle=bundle, choices=str(file), user=name,
                out=scratch / "adapter",
            )  # fmt: skip
        except CheckFailed as error:
            say(error.line())
            return
        version = users.add_version(name, made.path)
    say(f"version {version.number} of {name}: {version.words or 'as everybody'}; see: edgealign users show {name}")


def every_pair(rows: list[Candidates], found: Floats) -> tuple[list[Pair], Floats]:
    """All pairs of answers to one prompt, and (M, B + 1) their gaps."""
    pairs: list[Pair] = []
    gaps: list[Floats] = []
    start = 0
    for row in rows:
        count = len(row.answers)
        for first in range(count):
            for second in range(first + 1, count):
                pairs.append(Pair(row.prompt, row.answers[first], row.answers[second]))
                gaps.append(found[start + first] - found[start + second])
        start += count
    return pairs, np.stack(gaps)


def _fit(said: list[Floats], rank: int) -> Fitted:
    projected = np.stack(said) if said else np.zeros((0, rank + 1))
    return fit_users(torch.from_numpy(projected)[None])


def which(heading: str, first: str, second: str) -> str:
    """Which of the two is preferred: 1, 2, s (neither) or q (enough), by an arrow key or, from a pipe, a line."""
    terminal = sys.stdin.isatty()
    print(f"\n{heading}\n", file=sys.stderr)
    for mark, text in (("1 ←", first), ("2 →", second)):
        print(f"  {mark}  {text}\n", file=sys.stderr)
    if not terminal:
        line = sys.stdin.readline()
        return KEYS.get(line.strip(), "s") if line else "q"
    import click

    print("which is more you? ← or →, s: neither, q: enough", file=sys.stderr)
    while True:
        try:
            key = click.getchar()
        except (KeyboardInterrupt, EOFError):
            return "q"
        if key in KEYS:
            return KEYS[key]
