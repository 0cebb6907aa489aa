"""Many generated people whose taste is known, for meta-training over users and for trying it on new ones.

    edgealign data users --out users

    train.jsonl           conversations for supervised fine-tuning, all eight styles equally often
    choices.jsonl         the people to learn from: their choices between two styles of answer to seen questions
    new_choices.jsonl     the same of new people: the shots of the evaluation
    unseen_choices.jsonl  new people on unseen questions, without noise: what the evaluation asks
    prompts.jsonl         the unseen questions
    users.json            everybody's description and taste, and the scale of the attributes

A description is a few traits ("plays chess"). What a trait means for style is a random vector that the seed draws, so
the words themselves say nothing: only somebody's choices do, and no stereotype can help (the indirection of APM).

    taste = sum of the traits' vectors,   vector = +-1 x Dirichlet(alpha)

With signs every trait has its opposite, so tastes are balanced and a model that knows nobody has to guess; without them
everybody likes the same things, more or less.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, open_artifact, publish
from edgealign.data.grammar import STYLES, answer, split_questions
from edgealign.data.recipes import UsersRecipe
from edgealign.data.synthetic import LICENCE, user_choices, write_jsonl
from edgealign.errors import RecipeError
from edgealign.personalize.attributes import ATTRIBUTES, standardize

TRAITS = (
    "plays chess", "lives by the sea", "keeps bees", "rides a bicycle to work", "collects stamps", "sings in a choir",
    "bakes bread", "walks in the mountains", "repairs old radios", "grows tomatoes", "has two cats", "paints birds",
    "reads at breakfast", "works at night", "speaks three languages", "builds kites", "studies law", "drives a tram",
    "knits socks", "teaches swimming",
)  # fmt: skip
SURE = 1e9  # a chooser without noise


def run(recipe: UsersRecipe, *, out: Path) -> Artifact:
    """Publish the data set. The same seed gives the same bytes.

    Raises:
        RecipeError: more traits for one person than there are; a long answer that is not longer than a short one.
    """
    steps_of = (recipe.short_steps, recipe.long_steps)
    if recipe.traits_per_user > recipe.traits:
        raise RecipeError("traits_per_user", f"is {recipe.traits_per_user} of only {recipe.traits} traits", "use fewer")
    if steps_of[0] >= steps_of[1]:
        raise RecipeError("short_steps", f"is {steps_of[0]}, and long_steps is {steps_of[1]}", "make the long longer")
    rng = random.Random(recipe.seed)
    seen, unseen = split_questions(recipe.unseen, rng)
    train = []
    for question in (rng.choice(seen) for _ in range(recipe.conversations)):
        said = answer(question, rng.choice(STYLES), rng, steps_of)
        turns = [{"role": "user", "content": question.text(rng)}, {"role": "assistant", "content": said}]
        train.append({"messages": turns})
    scale = standardize([row["messages"][1]["content"] for row in train])
    pulls = meanings(recipe, rng)
    known = draw_people(recipe.users, "u", recipe, pulls, rng)
    new = draw_people(recipe.new_users, "n", recipe, pulls, rng)

    def choose(people: Mapping[str, Any], questions: list[Any], count: int, noise: float) -> list[dict[str, Any]]:
        return [
            row for name, person in people.items()
            for row in user_choices(
                name, person["taste"], scale, questions, rng, count=count, noise=noise, steps_of=steps_of
            )
        ]

    files: dict[str, Sequence[Mapping[str, Any]]] = {
        "train.jsonl": train,
        "choices.jsonl": choose(known, seen, recipe.choices, recipe.noise),
        "new_choices.jsonl": choose(new, seen, recipe.choices, recipe.noise),
        "unseen_choices.jsonl": choose(new, unseen, recipe.asked, SURE),
        "prompts.jsonl": [{"prompt": question.text(rng)} for question in unseen],
    }
    with publish(
        out, kind="dataset", format="jsonl", stage="users", recipe=recipe, licences={"data": LICENCE}
    ) as draft:
        for name, rows in files.items():
            write_jsonl(draft.dir / name, rows)
        described = {"users": {**known, **new}, "new": list(new), "scale": scale, "recipe": dataclasses.asdict(recipe)}
        (draft.dir / "users.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        draft.meta["rows"] = {name: len(rows) for name, rows in files.items()}
    return open_artifact(out)


def meanings(recipe: UsersRecipe, rng: random.Random) -> dict[str, dict[str, float]]:
    """What each trait pulls a taste towards, drawn anew for every seed. With signs, every second trait is the opposite
    of the one before it, so that all tastes together are balanced: no answer is liked by most."""
    found: dict[str, dict[str, float]] = {}
    pull: dict[str, float] = {}
    for place, trait in enumerate(rng.sample(TRAITS, recipe.traits)):
        if recipe.signed and place % 2:
            pull = {name: -value for name, value in pull.items()}
        else:
            sizes = [rng.gammavariate(recipe.alpha, 1.0) + 1e-12 for _ in ATTRIBUTES]  # over their sum: Dirichlet
            signs = [rng.choice((-1.0, 1.0)) if recipe.signed else 1.0 for _ in ATTRIBUTES]
            drawn = zip(ATTRIBUTES, signs, sizes, strict=True)
            pull = {name: sign * size / sum(sizes) for name, sign, size in drawn}
        found[trait] = pull
    return found


def draw_people(
    count: int, prefix: str, recipe: UsersRecipe, pulls: Mapping[str, Mapping[str, float]], rng: random.Random
) -> dict[str, dict[str, Any]]:
    """People by id, each with traits, a description and a taste of length 1."""
    people: dict[str, dict[str, Any]] = {}
    while len(people) < count:
        traits = sorted(rng.sample(sorted(pulls), recipe.traits_per_user))
        taste = {name: sum(pulls[trait][name] for trait in traits) for name in ATTRIBUTES}
        size = math.hypot(*taste.values())
        if size < 1e-3:  # two traits that cancel: somebody without a taste chooses nothing
            continue
        words = f"somebody who {' and '.join(traits)}"
        taste = {name: value / size for name, value in taste.items()}
        people[f"{prefix}{len(people):04d}"] = {"taste": taste, "words": words, "traits": traits}
    return people
