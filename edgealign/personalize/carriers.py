"""From reward to words: how far does each carrier move what is said for a user, at what price?

Users fitted on 8 choices; for each carrier the true reward of sampled answers to unseen prompts, minus that of the
model's own answers with the same seeds; the KL it pays (nats a token, to the model's own next-token distribution), the
time of a token, and the passes: best of n says n answers, a tilt one.

Shape legend: U users, P prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.personalize.basis import OpenBasis, token_rewards, unfold
from edgealign.personalize.candidates import Candidates
from edgealign.personalize.few_shot_material import Material
from edgealign.personalize.lore import Basis
from edgealign.personalize.lore_head import Lore
from edgealign.personalize.planted import Person
from edgealign.personalize.recipes import FewShotRecipe
from edgealign.personalize.text_users import TextUsers, paired_gain
from edgealign.personalize.tilt import Tilt, sentence_ends, whole
from edgealign.progress import bar
from edgealign.runtimes.generate import generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

GIVEN = 8
MOST_USERS, MOST_PROMPTS = 24, 8


def tilt_report(
    recipe: FewShotRecipe, material: Material, session: Session, tokenizer: Any, head: Lore, people: Sequence[Person],
    users: TextUsers, asked: Sequence[Candidates], label: str,
) -> dict[str, Any]:  # fmt: skip
    """By strength: gain in reward with its interval over users, nats a token, milliseconds a token."""
    basis = open_head(head, material)
    prompts = [encode_prompt(tokenizer, each.prompt, typed=True) for each in asked[:MOST_PROMPTS]]
    end, few = end_of_turn_id(tokenizer), people[:MOST_USERS]
    closing = sentence_ends(tokenizer)
    said: dict[float, list[list[str]]] = {}
    kl: dict[float, list[float]] = {}
    cost: dict[float, list[float]] = {}
    weights = [head.fit(person.own.take(slice(GIVEN))).astype(np.float64) for person in few]
    strengths = (0.0, *recipe.strengths)
    with bar(total=len(strengths) * len(few) * len(prompts), label=f"{label}: tilting") as advance:
        for strength in strengths:
            for own in weights[:1] if strength == 0 else weights:
                texts = []
                for number, prompt in enumerate(prompts):
                    tilt = Tilt.of(basis, own, strength=strength)
                    sampling = Sampling(
                        temperature=recipe.temperature, min_p=0.05, max_tokens=recipe.max_new_tokens, seed=number
                    )
                    session.reset()
                    started_s = time.perf_counter()
                    hooks = [whole(tilt, [end], closing)]  # as the assistant speaks
                    found = generate(session, prompt, sampling=sampling, stop={end}, hooks=hooks)
                    spent_s = time.perf_counter() - started_s
                    cost.setdefault(strength, []).append(1000 * spent_s / max(1, len(found.tokens)))
                    kl.setdefault(strength, []).append(tilt.mean_kl_nats)
                    texts.append(str(tokenizer.decode(found.tokens)).strip())
                    advance(1, f"strength {strength:g}")
                said.setdefault(strength, []).append(texts)
    base = _worth(material, users, said[0.0] * len(few))
    report: dict[str, Any] = {}
    for strength in strengths:
        worth = base if strength == 0 else _worth(material, users, said[strength])
        report[f"{strength:g}"] = {
            "gain": paired_gain(worth, base, resamples=recipe.bootstrap),
            "kl_nats": float(np.mean(kl[strength])), "token_ms": float(np.median(cost[strength])),
            "empty": float(np.mean([not text for texts in said[strength] for text in texts])),
        }  # fmt: skip
    return report


def open_head(head: Lore, material: Material) -> OpenBasis:
    """A learned head as a basis in memory, with what a token is worth in it."""
    basis = unfold(Basis(*(np.asarray(each, dtype=np.float64) for each in (head.mean, head.directions, head.scale))),
                   material.components)  # fmt: skip
    tilt = token_rewards(basis, material.raw, material.features).astype(np.float32)
    nothing = np.zeros((head.state_size + 1, 0))
    return OpenBasis(material.features.fold(basis), tilt, "", "", nothing, ())


def _worth(material: Material, users: TextUsers, said: Sequence[Sequence[str]]) -> Floats:
    """(U,) mean true reward of each user's answers."""
    count = len(said[0])
    traits = material.whitening.read([text for texts in said for text in texts]).reshape(len(said), count, -1)
    return np.array([float(users.rewards(traits[user])[user].mean()) for user in range(len(said))])
