"""`edgealign data shots`: from many people's pairs to pairs whose prompt begins with other choices of the same person.

    edgealign data shots users/choices.jsonl --model M --out shots
    edgealign sft --model M    --data shots/preferred.jsonl --out few           stage 1: the preferred answers only
    edgealign dpo --model few  --data shots/train.jsonl --objective ipo_sum --out fspo     stage 2

That is all of FSPO's training: a person is a task, and the loss is an ordinary preference loss of the answer given the
person's shots and the question. `ipo_sum` is the paper's, (h - 1/(2 beta))^2 on summed log-ratios.

Each person's choices are shuffled and cut into windows of k + 1, several times; the last of a window is the target,
the others are its shots, and k is drawn for each. Of what a person was asked twice the last word counts, and no
target has its own question among its shots.

    train.jsonl, valid.jsonl                      pairs; the people of valid.jsonl are in no other file
    preferred.jsonl, preferred_valid.jsonl        the same windows as conversations, with the preferred answer

Source: FSPO, arXiv 2502.19312, eq. 5 and 6.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, open_artifact, open_model, publish, refuse_existing
from edgealign.data.forms import Conversation, Message, Pair, to_json
from edgealign.data.mapping import parse_mapping
from edgealign.data.read import read_all
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import InputError
from edgealign.personalize.choices import drop_repetitions
from edgealign.personalize.fspo_recipes import ShotsRecipe
from edgealign.personalize.shots import describe, fit_shots, with_shots
from edgealign.progress import say, track


def run(recipe: ShotsRecipe, *, model: str | Path, data: Sequence[str | Path], out: Path) -> Artifact:
    """Publish the data set; `model` is only asked for its tokenizer.

    Raises:
        InputError: no pairs, pairs of nobody, nobody with two choices where shots are asked for, nothing that fits.
    """
    from edgealign.data.encode import encode_pair
    from edgealign.models.load import load_tokenizer
    from edgealign.train.examples import provenance

    refuse_existing(Path(out))
    base = open_model(model)
    tok: Any = load_tokenizer(base.path)
    loaded = read_all(data, form="pair", mapping=parse_mapping(recipe.map), skip_bad=recipe.skip_bad)
    counts: Counter[str] = Counter()
    people = by_person([row for part in loaded for row in part.rows if isinstance(row, Pair)], loaded[0].source, counts)
    most = max(map(len, people.values()))
    if max(recipe.shots) and most < 2:
        raise InputError(loaded[0].source, "nobody in it made two choices, so there are no shots", "collect more")
    unseen = held_out_people(people, recipe.valid, recipe.seed)
    parts: dict[str, list[Pair]] = {"train": [], "valid": []}
    drawn: Counter[int] = Counter()

    def fits(target: Pair, shots: Sequence[Pair]) -> bool:
        asked = replace(target, prompt=with_shots(target.prompt, shots))
        prompt, chosen, rejected = encode_pair(tok, asked)
        return len(prompt) + max(len(chosen), len(rejected)) <= recipe.max_tokens

    for person, rows in track(people.items(), total=len(people), label="windows"):
        words = describe(rows)
        for shots, target in windows(rows, recipe, person):
            counts["windows"] += 1
            try:
                kept = fit_shots(shots, lambda part, target=target: fits(target, part))  # type: ignore[misc]
                if not kept and not fits(target, ()):
                    counts["too_long"] += 1
                    continue
            except InputError as error:
                counts["unusable"] += 1
                if counts["unusable"] == 1:
                    say(f"a choice of {loaded[0].source} cannot be used: {error.line()}")
                continue
            counts["shots_left_out"] += len(shots) - len(kept)
            counts["shortened"] += len(shots) != len(kept)
            drawn[len(kept)] += 1
            made = replace(target, prompt=with_shots(target.prompt, kept))
            if recipe.describe and kept:
                made = replace(made, chosen=f"{words}\n\n{made.chosen}", rejected=f"{words}\n\n{made.rejected}")
            parts["valid" if person in unseen else "train"].append(made)
    if not parts["train"]:
        raise InputError(loaded[0].source, f"no choice fits {recipe.max_tokens} tokens", "raise --max-tokens")
    for name, rows in parts.items():  # so that the first rows (--limit) are not the first people's
        random.Random(f"{recipe.seed}/{name}").shuffle(rows)
    inputs, licences = provenance(loaded, len(loaded))
    with publish(
        out, kind="dataset", format="jsonl", stage="shots", recipe=recipe, licences=licences,
        inputs=[base.as_input("tokenizer"), *inputs],
    ) as draft:
        for name, rows in parts.items():
            write_jsonl(draft.dir / f"{name}.jsonl", map(to_json, rows))
            preferred = "preferred.jsonl" if name == "train" else f"preferred_{name}.jsonl"
            write_jsonl(draft.dir / preferred, (to_json(_preferred(row)) for row in rows))
        draft.meta |= {
            "people": len(people), "held_out_people": len(unseen), "counts": dict(sorted(counts.items())),
            "pairs": {name: len(rows) for name, rows in parts.items()},
            "pairs_by_shots": {str(k): drawn[k] for k in sorted(drawn)},
        }
    left_out = counts["shots_left_out"]
    say(
        f"{len(parts['train'])} pairs of {len(people) - len(unseen)} people, {len(parts['valid'])} of {len(unseen)} "
        f"others; {left_out} shots left out of {counts['shortened']} prompts to fit {recipe.max_tokens} tokens, "
        f"{counts['too_long'] + counts['unusable']} windows unusable"
    )
    return open_artifact(out)


def by_person(rows: Sequence[Pair], source: str | Path, counts: Counter[str]) -> dict[str, list[Pair]]:
    """Everybody's choices in order, each question once; `counts` says what was left out.

    Raises:
        InputError: a row that is nobody's.
    """
    found: dict[str, list[Pair]] = {}
    for row in rows:
        if row.user_id is None:
            nobodys = sum(row.user_id is None for row in rows)
            reason = f"{nobodys} of {len(rows)} rows have no user_id"
            raise InputError(source, reason, "name it with: --map THEIRS=user_id")
        found.setdefault(row.user_id, []).append(row)
    for person, own in found.items():
        found[person], repeated, overridden = drop_repetitions(own)
        counts["repeated"] += repeated
        counts["contradicted"] += overridden
    return found


def held_out_people(people: Mapping[str, object], share: float, seed: int) -> set[str]:
    """Who is kept for validation, by a hash of the name, so that more people move hardly anybody to the other side."""
    wanted = min(round(share * len(people)), len(people) - 1)
    return set(sorted(people, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())[:wanted])


def windows(rows: Sequence[Pair], recipe: ShotsRecipe, person: str) -> Iterator[tuple[tuple[Pair, ...], Pair]]:
    """(shots, target) from each shuffle of one person's choices; a target's question is not among its shots'."""
    rng = random.Random(f"{recipe.seed}/{person}")
    for _ in range(recipe.reshuffles):
        shuffled = rng.sample(list(rows), len(rows))
        start = 0
        while start < len(shuffled):
            k = rng.choice(recipe.shots)
            left = len(shuffled) - start - 1
            if k > left and start:  # a remainder would make few shots likelier than they were drawn
                break
            k = min(k, left)
            *shots, target = shuffled[start : start + k + 1]
            start += k + 1
            yield tuple(shot for shot in shots if shot.prompt != target.prompt), target


def _preferred(row: Pair) -> Conversation:
    return Conversation((*row.prompt, Message("assistant", row.chosen)), row.user_id)
