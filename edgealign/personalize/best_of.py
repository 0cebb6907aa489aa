"""What choices are worth for the text that is said: best of n answers by a user's reward, in torch and as shipped.

Every runtime draws n plain answers to unseen prompts itself and reads their features itself. A user's reward, fitted on
k choices, picks one of each n; the planted taste says what the pick is worth. All picks come from the same answers, so
the budget is equal: the base picks blindly (the mean of the n), the population with 0 choices, the oracle by the true
taste. Best of n moves the answers' distribution by at most ln n - (n - 1) / n nats (KL to the model's own).

Shape legend: U users, P prompts, n answers of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.judges.sample import draw_answers
from edgealign.personalize.candidates import Candidates, read_answers
from edgealign.personalize.carriers import tilt_report
from edgealign.personalize.features import Cache
from edgealign.personalize.few_shot import NEW, SEEN, learn
from edgealign.personalize.few_shot_material import Material
from edgealign.personalize.heads import HEADS, Choices, Head
from edgealign.personalize.lore_head import Lore
from edgealign.personalize.planted import Person, accuracy
from edgealign.personalize.recipes import FewShotRecipe
from edgealign.personalize.text_users import TextUsers, paired_gain
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session, open_session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

KIND = "signed-0.1"
GIVEN = (0, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Drawn:
    """A runtime's answers: (P, n, C) components and (P, n, J) attributes."""

    components: Floats
    traits: Floats


def best_of_report(
    recipe: FewShotRecipe, material: Material, sessions: Mapping[str, Path], tokenizer: Any
) -> dict[str, Any]:
    """Gains of every head in every runtime, for new users with distinct tastes."""
    seed = recipe.seed
    seen_prompts, new_prompts = material.pool.split(recipe.seen_prompts, seed)
    users = TextUsers.draw(material.pool, KIND, recipe.new_users, seed=seed, part=NEW)
    people = users.people(seen_prompts, new_prompts, asked=recipe.asked, flips=recipe.flips, seed=seed)
    teachers = TextUsers.draw(material.pool, KIND, recipe.users, seed=seed, part=SEEN)
    taught, _ = teachers.choose(seen_prompts, recipe.pairs, seed=seed, flips=recipe.flips)
    heads: dict[str, Head] = {name: learn(HEADS.load(name), taught, recipe, seed) for name in recipe.heads}
    states = {name: [[head.fit(each.own.take(slice(k))) for each in people] for k in GIVEN]
              for name, head in heads.items()}  # fmt: skip
    asked = [material.rows[number] for number in new_prompts[: recipe.drawn_prompts]]
    _, shown = users.choose(new_prompts, recipe.asked, seed=seed + 1, noiseless=True)
    report: dict[str, Any] = {"kind": KIND, "prompts": len(asked), "n": recipe.drawn, "runtimes": {}}
    report["kl_nats"] = float(np.log(recipe.drawn) - (recipe.drawn - 1) / recipe.drawn)
    for label, place in sessions.items():
        session = open_session(place, threads=recipe.threads or None)
        try:
            drawn = draw(recipe, material, session, tokenizer, asked, label)
            row: dict[str, Any] = {
                name: gains(head, states[name], users, drawn, recipe) for name, head in heads.items()
            }
            lore = heads.get("lore")
            row["tilt"] = (
                tilt_report(recipe, material, session, tokenizer, lore, people, users, asked, label)
                if isinstance(lore, Lore) else {}
            )
            row["accuracy"] = read_again(recipe, material, session, tokenizer, heads[recipe.heads[0]], people, shown)
        finally:
            session.close()
        report["runtimes"][label] = row
    return report


def draw(
    recipe: FewShotRecipe, material: Material, session: Session, tokenizer: Any, asked: list[Candidates], label: str
) -> Drawn:
    """n answers of this runtime to each prompt, read by itself; a prompt that gives fewer is left out."""
    sampling = Sampling(temperature=recipe.temperature, min_p=0.05, max_tokens=recipe.max_new_tokens)
    plan = [
        [(each.prompt, replace(sampling, seed=(recipe.seed * 1_000_003 + number) * 997 + place))
         for place in range(2 * recipe.drawn)]
        for number, each in enumerate(asked)
    ]  # fmt: skip
    drawn = draw_answers(session, tokenizer, plan, label=f"{label}: drawing")
    rows = [
        Candidates(each.prompt, tuple(answers[: recipe.drawn]))
        for each, answers in zip(asked, drawn, strict=True) if len(answers) >= recipe.drawn
    ]  # fmt: skip
    shape = (len(rows), recipe.drawn, -1)
    if not rows:
        return Drawn(np.zeros((0, recipe.drawn, 1)), np.zeros((0, recipe.drawn, 1)))
    found = read_answers(material.features, session, tokenizer, rows, Cache(None, ""))
    traits = material.whitening.read([text for row in rows for text in row.answers])
    return Drawn((found @ material.components).reshape(shape), traits.reshape(shape))


def gains(
    head: Head, states: Sequence[Sequence[Any]], users: TextUsers, drawn: Drawn, recipe: FewShotRecipe
) -> dict[str, Any]:
    """Mean true reward of what is picked after k choices, minus that of a blind pick; and the oracle's.

    Args:
        states: what was fitted to each user's first k choices, in the order of `GIVEN`.
    """
    prompts, count, _ = drawn.traits.shape
    worth = users.rewards(drawn.traits.reshape(prompts * count, -1)).reshape(users.count, prompts, count)
    blind = worth.mean((1, 2))
    picked: dict[int, Floats] = {}
    wrong: dict[int, Floats] = {}
    for k, fitted in zip(GIVEN, states, strict=True):
        for found, shift in ((picked, 0), (wrong, 1)):
            places = [pick(head, fitted[user - shift], drawn.components) for user in range(users.count)]
            found[k] = np.array([_at(worth[user], place) for user, place in enumerate(places)])
    best = worth.max(2).mean(1) - blind
    return {
        "gain": {k: paired_gain(value, blind, resamples=recipe.bootstrap) for k, value in picked.items()},
        "wrong": {k: float((value - blind).mean()) for k, value in wrong.items()},
        "oracle": float(best.mean()),
    }


def pick(head: Head, state: Any, components: Floats) -> npt.NDArray[np.int64]:
    """(P,) the answer that beats the others by most, summed over all of them; for a reward, the highest."""
    prompts, count, size = components.shape
    left = np.repeat(components, count, axis=1).reshape(-1, size)
    right = np.tile(components, (1, count, 1)).reshape(-1, size)
    pairs = Choices(left, right, np.zeros(len(left), dtype=np.int64))
    margins = np.asarray(head.margins(state, pairs)).reshape(prompts, count, count)
    found: npt.NDArray[np.int64] = margins.sum(2).argmax(1)
    return found


def _at(worth: Floats, places: npt.NDArray[np.int64]) -> float:
    return float(np.take_along_axis(worth, places[:, None], 1).mean())


def read_again(
    recipe: FewShotRecipe, material: Material, session: Session, tokenizer: Any, head: Head, people: list[Person],
    shown: npt.NDArray[np.int64],
) -> float:  # fmt: skip
    """Users' mean accuracy after 8 choices, on held-out pairs (U n, 2) whose answers this runtime reads itself."""
    prompts = np.unique(material.pool.prompts[shown[:, 0]])[: recipe.drawn_prompts]
    rows = [material.rows[number] for number in prompts]
    components = np.full_like(material.pool.features, np.nan)
    read = np.isin(material.pool.prompts, prompts)
    components[read] = read_answers(material.features, session, tokenizer, rows, Cache(None, "")) @ material.components
    scores = []
    for user, (person, own) in enumerate(zip(people, np.split(shown, len(people)), strict=True)):
        mine = own[read[own[:, 0]]]
        pairs = Choices(components[mine[:, 0]], components[mine[:, 1]], np.full(len(mine), user))
        if len(mine):
            scores.append(accuracy(head, head.fit(person.own.take(slice(8))), pairs))
    return float(np.mean(scores)) if scores else 0.0
