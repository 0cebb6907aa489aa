"""Several answers of one model to each of many prompts: what planted users choose between.

    edgealign data candidates --model M questions.jsonl --out DIR

Most answers are drawn under a system turn that asks for a style, and are then held as answers to the plain prompt: a
person's choices can only show a taste where the answers differ. `candidates.jsonl` has one line per prompt:
{"prompt": [messages], "answers": [texts]}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import Artifact, file_input, open_artifact, open_model, publish, refuse_existing
from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.data.forms import Message
from edgealign.data.read import read_all
from edgealign.data.styles import STYLES
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import InputError
from edgealign.judges.sample import draw_answers, question
from edgealign.models.load import load_tokenizer
from edgealign.personalize.features import Cache, Features, Folded
from edgealign.personalize.recipes import CandidatesRecipe
from edgealign.progress import track
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session, open_session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

FILE = "candidates.jsonl"


@dataclass(frozen=True)
class Candidates:
    """Distinct answers, two or more, to one prompt."""

    prompt: tuple[Message, ...]
    answers: tuple[str, ...]


def run(
    recipe: CandidatesRecipe, *, model: str | Path, sources: Sequence[str | Path], out: Path, bundle: Path | None = None
) -> Artifact:
    """Draw the answers and publish them.

    Args:
        bundle: an export of `model` to draw with, in place of torch.

    Raises:
        InputError: the sources have no prompts, or no prompt got two answers.
    """
    refuse_existing(Path(out))
    source = open_model(model)
    tokenizer = load_tokenizer(source.path)
    known: dict[tuple[Message, ...], None] = {}
    inputs = [source.as_input("model")]
    for loaded in read_all(sources, mapping={}, skip_bad=None):
        inputs.append(file_input("data", loaded.source, loaded.digest))
        found = [question(row) for row in loaded.rows]
        known.update({each[0][-1:]: None for each in found if each and each[0][-1].role == "user"})
    if not known:
        raise InputError(", ".join(map(str, sources)), "has no prompts", "give conversations or pairs")
    prompts = list(known)
    rng = random.Random(recipe.seed)
    rng.shuffle(prompts)
    prompts = [prompt for prompt in prompts if len(prompt[-1].content) <= recipe.longest_prompt][: recipe.prompts]
    sampling = Sampling(temperature=recipe.temperature, min_p=recipe.min_p, max_tokens=recipe.max_new_tokens)
    asked: list[list[tuple[tuple[Message, ...], Sampling]]] = []
    for number, prompt in enumerate(prompts):
        asked.append([])
        for place in range(recipe.answers):
            styled = rng.random() < recipe.styled
            request = rng.choice(STYLES[rng.choice(list(STYLES))].requests) if styled else None
            messages = (Message("system", request), *prompt) if request else prompt
            asked[-1].append((messages, replace(sampling, seed=(recipe.seed * 1_000_003 + number) * 97 + place)))
    session = open_session(bundle or source.path, threads=recipe.threads or None)
    try:
        drawn = draw_answers(session, tokenizer, asked)
    finally:
        session.close()
    rows = [Candidates(prompt, tuple(texts)) for prompt, texts in zip(prompts, drawn, strict=True) if len(texts) > 1]
    if not rows:
        raise InputError(f"{len(prompts)} prompts", "got no two answers that end", "train the model more")
    with publish(out, kind="dataset", format="jsonl", stage="candidates", recipe=recipe, inputs=inputs) as draft:
        write_jsonl(draft.dir / FILE, [
            {"prompt": [message.as_dict() for message in row.prompt], "answers": list(row.answers)} for row in rows
        ])  # fmt: skip
        draft.meta.update(rows={FILE: len(rows)}, answers=sum(len(row.answers) for row in rows), asked=len(prompts))
    return open_artifact(out)


def read_candidates(folder: str | Path) -> tuple[Artifact, list[Candidates]]:
    """Open a published data set of candidates.

    Raises:
        ArtifactError: it is damaged, or another kind of thing.
        InputError: it holds no candidates.
    """
    artifact = open_artifact(Path(folder), kind="dataset")
    file = artifact.path / FILE
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [
            Candidates(
                tuple(Message(str(each["role"]), str(each["content"])) for each in line["prompt"]),
                tuple(map(str, line["answers"])),
            )
            for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(folder, "holds no candidates", "make them: edgealign data candidates") from error
    return artifact, rows


def read_answers(
    features: Features | Folded, session: Session, tokenizer: Any, rows: Sequence[Candidates], cache: Cache
) -> Floats:
    """(A, F) of all answers, in order; (A, B + 1) from a folded basis."""
    found = []
    for row in track(rows, total=len(rows), label="reading answers"):
        prompt = encode_prompt(tokenizer, row.prompt, typed=True)
        found += [cache.of(features, session, prompt, encode_answer(tokenizer, text)) for text in row.answers]
    return np.stack(found)


def encode_answer(tokenizer: Any, text: str) -> list[int]:
    """Tokens of an answer with its end of turn."""
    return [*tokenizer.encode(text, add_special_tokens=False), end_of_turn_id(tokenizer)]
