"""`edgealign personalize --method lore`: one user as some tens of bytes, from the first choice on.

    choices -> features, read by the model or a bundle of it -> weights by MAP -> checked by leaving one out
    -> how strongly they may tilt answers -> publish

The weights are those of a published basis (basis.py), with its prior: few choices move a user a little. Every choice
is predicted by the weights that the others give; published is only what predicts them at least as well as the
population does (mean log-loss). One choice cannot be checked in this way, and the prior alone answers for it.

Some of the choices' questions are answered as `chat` would, tilted (tilt.py) with its default strength: where that pays
more KL a token than the budget, the user's strength is halved until it does not. Any `--taste` is multiplied by that.

An adapter is `preference.safetensors` (weights and posterior covariance, 4 bytes a number) and `preference.json`.
Shape legend: k choices, B rank.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgealign.artifact import Artifact, Check, Input, open_artifact, open_model, publish, refuse_existing, write_atomic
from edgealign.data.forms import Pair
from edgealign.errors import ArtifactError, CheckFailed, InputError
from edgealign.personalize.basis import OpenBasis, basis_folder, check_basis, open_basis
from edgealign.personalize.budget_recipe import BudgetRecipe
from edgealign.personalize.candidates import encode_answer
from edgealign.personalize.choices import read_choices
from edgealign.personalize.lora import slug
from edgealign.personalize.lore import Fitted, fit_users
from edgealign.personalize.recipes import TASTE, EmbeddingRecipe
from edgealign.personalize.tilt import Tilt, sentence_ends, within_budget
from edgealign.progress import say, track
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session, open_session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

WEIGHTS, FACTS = "preference.safetensors", "preference.json"
ANSWERS, ANSWER_TOKENS = 4, 48  # that the price of a tilt is measured on


@dataclass(frozen=True)
class Preference:
    """A user on a basis: (B,) weights, (B, B) posterior covariance, the basis's digest, and what is left of a tilt's
    strength within the budget."""

    weights: Floats
    covariance: Floats
    basis_digest: str
    scale: float = 1.0

    @property
    def fitted(self) -> Fitted:
        return Fitted(self.weights[None], self.covariance[None])


def run(
    recipe: EmbeddingRecipe,
    *,
    model: str | Path,
    basis: str | Path,
    choices: str | Path,
    user: str,
    out: Path,
    bundle: Path | None = None,
    budget: BudgetRecipe | None = None,
) -> Artifact:
    """Fit one user and publish the adapter at `out`.

    Args:
        choices: preference pairs with `user_id`.
        bundle: an export of `model` that reads the answers in place of torch, as a device would.
        budget: None is the default one.

    Raises:
        InputError: no choices, or a basis of another model.
        CheckFailed: the user's choices are not predicted as well as by the population, or answers that follow them even
            a little are over budget; nothing is published.
    """
    out = Path(out)
    refuse_existing(out)
    started_s = time.monotonic()
    read = read_user(recipe, model=model, basis=basis, choices=choices, user=user, bundle=bundle)
    made = publish_user(
        recipe, read.basis, read.projected, user=user, out=out, inputs=read.inputs, licences=read.licences,
        facts={"choices": read.facts, "seconds": round(time.monotonic() - started_s, 2)},
        afford=partial(_afford, read, bundle, recipe.threads, budget or BudgetRecipe(), slug(user)),
    )  # fmt: skip
    say(f"user {slug(user)}: {len(read.projected)} choices, {made.meta['words'] or 'as everybody'}")
    return made


@dataclass(frozen=True)
class Read:
    """A user's choices (k, B + 1) as a basis reads them, and where they come from."""

    base: Artifact
    basis: OpenBasis
    prompts: list[tuple[int, ...]]
    projected: Floats
    inputs: list[Input]
    licences: Mapping[str, str]
    facts: Mapping[str, Any]


def read_user(
    recipe: EmbeddingRecipe, *, model: str | Path, basis: str | Path, choices: str | Path, user: str,
    bundle: Path | None,
) -> Read:  # fmt: skip
    """Open everything and read a user's choices.

    Raises:
        InputError: no choices, or a basis of another model.
    """
    from edgealign.data.encode import encode_prompt
    from edgealign.models.load import load_tokenizer

    base, place = open_model(model), basis_folder(basis)
    shared = open_basis(place)
    check_basis(shared, base.digest, basis)
    tokenizer = load_tokenizer(base.path)
    own, facts, provenance = read_choices(choices, user, tokenizer, recipe, least=1)
    session = open_session(bundle or base.path, threads=recipe.threads or None)
    try:
        projected = np.stack([
            project(shared, session, tokenizer, pair, recipe.max_tokens)
            for pair in track(own, total=len(own), label="reading answers")
        ])  # fmt: skip
    finally:
        session.close()
    inputs = [base.as_input("base"), open_artifact(place).as_input("basis"), provenance]
    prompts = [encode_prompt(tokenizer, pair.prompt, typed=True)[-recipe.max_tokens :] for pair in own]
    return Read(base, shared, prompts, projected, inputs, base.manifest.licences, facts)


def publish_user(
    recipe: EmbeddingRecipe, basis: OpenBasis, projected: Floats, *, user: str, out: Path, inputs: Sequence[Input],
    licences: Mapping[str, str], facts: Mapping[str, Any],
    afford: Callable[[Floats], tuple[float, Check]] | None = None,
) -> Artifact:  # fmt: skip
    """Fit a user on (k, B + 1) choices and publish the adapter.

    Args:
        afford: what is left of a tilt's strength for these weights, and what it costs; None: all of it, unmeasured.

    Raises:
        CheckFailed: the choices are not predicted as well as by the population; nothing is published.
    """
    fitted, checks = checked(projected, recipe.prior_precision, user)
    scale = 1.0
    if afford is not None:
        scale, price = afford(fitted.weights[0])
        checks.append(price)
    with publish(
        out, kind="adapter", format="preference", stage="personalize_embedding", recipe=recipe, inputs=inputs,
        licences=licences,
    ) as draft:  # fmt: skip
        write_preference(draft.dir, Preference(fitted.weights[0], fitted.covariance[0], basis.digest, scale))
        for check in checks:
            draft.add_check(check)
        draft.meta.update(
            base_digest=basis.model_digest, basis_digest=basis.digest, user=slug(user), method="lore",
            fitted=len(projected), words=basis.words(fitted.weights[0]), bytes=4 * len(fitted.weights[0]),
            scale=scale, **facts,
        )  # fmt: skip
    return open_artifact(out)


def _afford(
    read: Read, bundle: Path | None, threads: int, budget: BudgetRecipe, user: str, weights: Floats
) -> tuple[float, Check]:
    """How far answers may be tilted: what is left of the strength, and the check of what it costs.

    Raises:
        CheckFailed: even little of it is over budget.
    """
    from edgealign.data.encode import end_of_turn_id
    from edgealign.models.load import load_tokenizer

    tokenizer = load_tokenizer(read.base.path)
    tilt = Tilt.of(read.basis, weights, strength=TASTE)
    session = open_session(bundle or read.base.path, threads=threads or None)
    try:
        kept, paid = within_budget(
            tilt, session, list(dict.fromkeys(read.prompts))[:ANSWERS], Sampling(max_tokens=ANSWER_TOKENS),
            stop=[end_of_turn_id(tokenizer)], closing=sentence_ends(tokenizer), budget=budget.kl_budget,
        )  # fmt: skip
    except CheckFailed as error:
        reason = f"answers that follow it, at {error.line()}"
        raise CheckFailed(f"user {user}", reason, "not published") from error
    finally:
        session.close()
    scale = kept.strength / TASTE
    left = "" if scale == 1.0 else f"; scaled back to {scale:g} of the strength"
    note = f"nats a token of answers that follow it with strength {TASTE:g}, at most{left}"
    return scale, Check("KL to the base", paid, budget.kl_budget, True, note)


def checked(projected: Floats, precision: float, user: str) -> tuple[Fitted, list[Check]]:
    """The fit on (k, B + 1) choices, and the checks that it passed.

    Raises:
        CheckFailed: the choices are not predicted as well as by the population.
    """
    checks = gate(projected, precision)
    if not all(check.passed for check in checks):
        raise CheckFailed(
            f"user {slug(user)}", f"{len(projected)} choices are predicted worse than by the population "
            f"(log-loss {checks[0].value:.3f}, population {checks[0].tolerance:.3f}): not published",
            "collect more choices; until then the population's answers are this user's",
        )
    return fit_users(torch.from_numpy(projected)[None], precision=precision), checks


def project(basis: OpenBasis, session: Session, tokenizer: Any, pair: Pair, max_tokens: int) -> Floats:
    """(B + 1,) of a choice: the chosen answer's projection minus the rejected one's."""
    from edgealign.data.encode import encode_prompt

    prompt = encode_prompt(tokenizer, pair.prompt, typed=True)[-max_tokens:]
    sides = [
        basis.folded.of(session, prompt, encode_answer(tokenizer, text)[:max_tokens])
        for text in (pair.chosen, pair.rejected)
    ]
    return sides[0] - sides[1]


def gate(projected: Floats, precision: float = 1.0) -> list[Check]:
    """Each choice (k, B + 1), predicted from the others: at least as well as by the population."""
    count = len(projected)
    every = torch.from_numpy(projected).expand(count, count, -1)
    weights = fit_users(every, 1 - torch.eye(count, dtype=every.dtype), precision=precision).weights  # (k, B)
    margins = projected[:, 0] + (projected[:, 1:] * weights).sum(1)
    population = float(np.logaddexp(0, -projected[:, 0]).mean())
    own = float(np.logaddexp(0, -margins).mean())
    note = f"mean log-loss of {count} choices, each predicted from the others; tolerance: the population's"
    return [Check("choices predicted", own, population, own <= population + 1e-9, note)]


def write_preference(folder: Path, preference: Preference) -> None:
    """The two files of an adapter."""
    from safetensors.numpy import save_file

    arrays = {"weights": preference.weights, "covariance": preference.covariance}
    save_file({name: values.astype(np.float32) for name, values in arrays.items()}, folder / WEIGHTS)
    facts = {"basis_digest": preference.basis_digest, "method": "lore", "scale": preference.scale}
    write_atomic(folder / FACTS, json.dumps(facts) + "\n")


def read_preference(folder: Path | str, basis: OpenBasis) -> Preference:
    """A published user of this basis.

    Raises:
        ArtifactError: damaged, or no preference.
        InputError: of another basis.
    """
    from safetensors.numpy import load_file

    artifact = open_artifact(Path(folder), kind="adapter")
    fix = "make it again: edgealign personalize --method lore"
    if artifact.manifest.format != "preference":
        raise ArtifactError(folder, f"is a {artifact.manifest.format} adapter, no preference embedding", fix)
    try:
        arrays: Mapping[str, Any] = load_file(artifact.path / WEIGHTS)
        facts = json.loads((artifact.path / FACTS).read_text(encoding="utf-8"))
        weights, covariance = (arrays[name].astype(np.float64) for name in ("weights", "covariance"))
        found = Preference(weights, covariance, str(facts["basis_digest"]), float(facts.get("scale", 1.0)))
        rank = basis.folded.rank
        fits = found.weights.shape == (rank,) and found.covariance.shape == (rank, rank)
        fits = fits and all(bool(np.isfinite(values).all()) for values in arrays.values())
        fits = fits and 0.0 < found.scale <= 1.0
    except Exception as error:  # safetensors raises a class of its own for each kind of damage
        raise ArtifactError(folder, "is no readable preference", fix) from error
    if found.basis_digest != basis.digest:
        reason = f"is of the basis {found.basis_digest[:12]}, this one is {basis.digest[:12]}"
        raise InputError(folder, reason, "fit the user again on this basis: edgealign personalize --method lore")
    if not fits:
        raise ArtifactError(folder, "does not fit its basis", fix)
    return found


def rank_answers(
    basis: OpenBasis, weights: Floats, session: Session, prompt: Sequence[int], answers: Sequence[Sequence[int]]
) -> Floats:
    """(n,) a user's reward of each answer's tokens to one prompt."""
    found = np.stack([basis.folded.of(session, prompt, answer) for answer in answers])
    rewards: Floats = found[:, 0] + found[:, 1:] @ weights
    return rewards
