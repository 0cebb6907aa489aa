"""`edgealign basis`: what users have in common, learned from many users' choices, as a device keeps it.

    edgealign basis --model M --choices pairs.jsonl --out BASIS

Answers are read once (features.py), a reward basis is learned by LoRe with signed weights and a prior (lore.py), and
both are folded into one number per token and direction: `basis.safetensors`. A fifth of the users is held out: learned
from the others, the basis must rank a held-out user's choices at least as well after some of them as after none. Then
it is learned from all of them.

The manifest says what the directions mean in words: how each one's reward goes with attributes of the text (traits.py)
over the answers. No text and no user's name is in it.

Shape legend: N choices, F features, C components, B rank, J attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import (
    MANIFEST,
    Artifact,
    Check,
    file_input,
    open_artifact,
    open_model,
    publish,
    read_manifest,
    refuse_existing,
)
from edgealign.data.forms import Pair
from edgealign.errors import ArtifactError, InputError
from edgealign.models.builtin import BASES, PREFIX, built_in
from edgealign.personalize.candidates import encode_answer
from edgealign.personalize.features import Cache, Features, Folded, main_components
from edgealign.personalize.lore import Basis, fit_users, learn_basis
from edgealign.personalize.recipes import BasisRecipe
from edgealign.personalize.traits import TRAITS, in_words, known_traits
from edgealign.progress import say, track
from edgealign.runtimes.session import open_session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

WEIGHTS, TILT = "basis.safetensors", "tilt.safetensors"
TILT_RIDGE = 0.1  # of the tokens' share in a reward, relative to their variance
HELD_OUT_USERS = 0.2
LEAST_MEANING = 0.02  # log-odds per deviation of an attribute; below it there is nothing to say
HARM = 0.01  # of accuracy: what held-out users may lose


@dataclass(frozen=True)
class OpenBasis:
    """A published basis: the folded reward, whose model it reads, and what its directions mean."""

    folded: Folded
    tilt: npt.NDArray[np.float32]  # (V, B): what a token is worth in each direction, for tilt.py
    digest: str
    model_digest: str
    meaning: Floats  # (B + 1, J), see `describe`; everybody's direction first
    attributes: tuple[str, ...]
    simulated: bool = False  # learned from simulated users (`edgealign data tastes`)

    def words(self, weights: Floats, most: int = 3) -> str:
        """What a user wants more than everybody does: "shorter, more bullets"; empty where it is nothing."""
        found = weights @ self.meaning[1:]
        largest = float(np.abs(found).max(initial=0.0))
        if largest < LEAST_MEANING:
            return ""
        order = [place for place in np.argsort(-np.abs(found))[:most] if abs(found[place]) >= largest / 3]
        return ", ".join(in_words(self.attributes[place], bool(found[place] > 0)) for place in order)


def run(
    recipe: BasisRecipe, *, model: str | Path, choices: Sequence[str], out: Path, cache: Path | None = None
) -> Artifact:
    """Learn a basis and publish it.

    Args:
        choices: files of pairs with `user_id`.
        cache: a directory for features, so that answers are read once.

    Raises:
        InputError: no pairs with users, or fewer users than directions.
        UsageError: an attribute that is not known.
    """
    from edgealign.data.read import read_all
    from edgealign.models.load import load_tokenizer

    refuse_existing(Path(out))
    named = known_traits(recipe.traits)
    source = open_model(model)
    inputs, pairs, simulated = [source.as_input("model")], list[Pair](), False
    for loaded in read_all(list(choices), form="pair", mapping={}, skip_bad=recipe.skip_bad):
        simulated |= (home := Path(loaded.source).parent / MANIFEST).is_file() and bool(
            read_manifest(home.parent).meta.get("simulated")
        )
        inputs.append(file_input("choices", loaded.source, loaded.digest))
        pairs += [row for row in loaded.rows if isinstance(row, Pair) and row.user_id is not None]
    people = sorted({str(pair.user_id) for pair in pairs})
    if len(people) <= recipe.rank:
        reason = f"are too few to show {recipe.rank} directions in which people differ"
        raise InputError(f"{len(people)} users", reason, "give choices of more users, or a smaller --rank")
    features = Features.of_model(source.path)
    sides = _read(recipe, source, load_tokenizer(source.path), features, pairs, cache)
    texts = [[pair.chosen for pair in pairs], [pair.rejected for pair in pairs]]
    components = main_components(np.unique(np.concatenate(sides), axis=0), recipe.components)
    gaps = (sides[0] - sides[1]) @ components
    who = np.array([people.index(str(pair.user_id)) for pair in pairs])
    checks = check_held_out(gaps, who, recipe)
    basis = learn_basis(gaps, who, rank=recipe.rank, seed=recipe.seed)
    unfolded = unfold(basis, components)
    meaning = describe(unfolded, np.concatenate(sides), texts[0] + texts[1], named)
    with publish(
        out, kind="basis", format="lore", stage="basis", recipe=recipe, inputs=inputs,
        licences=source.manifest.licences,
    ) as draft:  # fmt: skip
        features.fold(unfolded).save(draft.dir / WEIGHTS)
        save_tilt(token_rewards(unfolded, np.concatenate(sides), features), draft.dir / TILT)
        for check in checks:
            draft.add_check(check)
        draft.meta.update(
            base_digest=source.digest, rank=recipe.rank, users=len(people), choices=len(pairs),
            attributes=list(named), meaning=np.round(meaning, 3).tolist(), simulated=simulated,
        )  # fmt: skip
    for check in checks:
        say(f"{check.name}: {check.value:+.3f}")
    return open_artifact(out)


def basis_folder(source: str | Path) -> Path:
    """Where a basis lies: a path, or `edgealign:starter-basis`."""
    return built_in(source, BASES) or Path(source)


def open_basis(path: str | Path) -> OpenBasis:
    """Open a published basis, or the built-in one.

    Raises:
        ArtifactError: damaged, or another kind of thing.
    """
    artifact = open_artifact(basis_folder(path), kind="basis")
    fix = "make one: edgealign basis"
    if artifact.manifest.format != "lore":
        raise ArtifactError(path, f"is a {artifact.manifest.format}, no basis of users", fix)
    folded = Folded.load(artifact.path / WEIGHTS)
    tilt = load_tilt(artifact.path / TILT, folded)
    try:
        meaning, names = np.array(artifact.meta["meaning"], dtype=np.float64), tuple(artifact.meta["attributes"])
        model = str(artifact.meta["base_digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(path, "its manifest is not that of a basis", fix) from error
    if meaning.shape != (folded.rank + 1, len(names)):
        raise ArtifactError(path, "its manifest does not belong to its weights", fix)
    return OpenBasis(folded, tilt, artifact.digest, model, meaning, names, bool(artifact.meta.get("simulated")))


def basis_of_model(digest: str | None, given: str | Path | None = None) -> OpenBasis:
    """The basis for users of a model: the given one, or the one that comes with the starter.

    Args:
        digest: of the model in torch; None where nobody knows it.

    Raises:
        InputError: it is of another model, or none is given and the model is not the starter.
    """
    shared = open_basis(PREFIX + BASES[0] if given is None else given)
    if given is None and shared.model_digest != digest:
        how = "learn one from many users' choices (edgealign basis), and give it as --basis DIR"
        raise InputError("this model", "has no basis for users yet", how)
    if given is not None and digest is None:
        raise InputError(given, "is of a model whose digest this one does not say", "export it: edgealign export")
    if given is not None:
        check_basis(shared, str(digest), given)
    return shared


def check_basis(basis: OpenBasis, model_digest: str, path: Path | str) -> None:
    """Refuse a basis that reads another model's states.

    Raises:
        InputError: both digests, and the command that makes another.
    """
    if basis.model_digest != model_digest:
        reason = f"was learned on the model {basis.model_digest[:12]}, this model is {model_digest[:12]}"
        raise InputError(path, reason, "learn it again: edgealign basis --model MODEL --choices PAIRS")


def unfold(basis: Basis, components: Floats) -> Basis:
    """A basis over main components as one over the features themselves."""
    mean, directions = basis.mean / basis.scale, basis.directions / basis.scale[:, None]
    return Basis(components @ mean, components @ directions, np.ones(len(components)))


def check_held_out(gaps: Floats, who: npt.NDArray[np.int64], recipe: BasisRecipe) -> list[Check]:
    """Do users who taught nothing gain from their own choices? The later half of them is what is asked."""
    count = int(who.max()) + 1
    order = np.random.default_rng(recipe.seed).permutation(count)
    held = order[: round(HELD_OUT_USERS * count)]
    taught = ~np.isin(who, held)
    if len(np.unique(who[taught])) <= recipe.rank or not len(held):
        return []
    basis = learn_basis(gaps[taught], who[taught], rank=recipe.rank, seed=recipe.seed)
    before, after = [], []
    for user in held:
        projected = basis.project(gaps[who == user])
        half = len(projected) // 2
        if not half:
            continue
        weights = fit_users(projected[None, :half]).weights[0]
        asked = projected[half:].numpy()
        before.append(float((asked[:, 0] > 0).mean()))
        after.append(float((asked[:, 0] + asked[:, 1:] @ weights > 0).mean()))
    if not before:
        return []
    gain = float(np.mean(after) - np.mean(before))
    note = f"accuracy gained by {len(before)} held-out users' first half of choices, from {np.mean(before):.3f}"
    return [Check("held-out users", gain, -HARM, gain >= -HARM, note)]


def token_rewards(basis: Basis, features: Floats, source: Features) -> Floats:
    """(V, B): each direction's reward as a sum over an answer's tokens, by ridge regression on their mean embedding.

    What a reward sees in states can only be steered by saying other words; this is the part of it that words explain.
    """
    d = source.inverse.shape[1]
    bags = features[:, 2 * d : 3 * d] - features[:, 2 * d : 3 * d].mean(0)
    rewards = (features - features.mean(0)) @ basis.directions
    gram = bags.T @ bags / len(bags)
    gram += TILT_RIDGE * np.trace(gram) / d * np.eye(d)
    found: Floats = source.embedding @ np.linalg.solve(gram, bags.T @ rewards / len(bags))
    return found


def save_tilt(tilt: Floats, file: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"tilt": tilt.astype(np.float32)}, file)


def load_tilt(file: Path, folded: Folded) -> npt.NDArray[np.float32]:
    """(V, B).

    Raises:
        ArtifactError: missing, damaged, or of another basis.
    """
    from safetensors.numpy import load_file

    try:
        tilt: npt.NDArray[np.float32] = load_file(file)["tilt"]
    except Exception as error:  # safetensors raises a class of its own for each kind of damage
        raise ArtifactError(file, "is no readable part of a basis", "learn it again: edgealign basis") from error
    if tilt.shape != (len(folded.mean), folded.rank) or not np.isfinite(tilt).all():
        raise ArtifactError(file, "does not belong to its basis", "learn it again: edgealign basis")
    return tilt


def describe(basis: Basis, features: Floats, texts: Sequence[str], among: Sequence[str] = tuple(TRAITS)) -> Floats:
    """(B + 1, J): covariance of each direction's reward with each standardised attribute over these answers."""
    rewards = np.concatenate([features @ basis.mean[:, None], features @ basis.directions], 1)
    traits = np.array([[trait(text) for trait in map(TRAITS.__getitem__, among)] for text in texts])
    deviation = traits.std(0)
    standard = (traits - traits.mean(0)) / np.where(deviation > 1e-9, deviation, np.inf)
    found: Floats = (rewards - rewards.mean(0)).T @ standard / len(texts)
    return found


def _read(
    recipe: BasisRecipe, source: Artifact, tokenizer: Any, features: Features, pairs: Sequence[Pair], cache: Path | None
) -> list[Floats]:
    """(N, F) of the chosen and of the rejected answers."""
    from edgealign.data.encode import encode_prompt

    kept, known = Cache(cache, source.digest), dict[tuple[Any, str], Any]()
    session = open_session(source.path, threads=recipe.threads or None)
    try:
        for pair in track(pairs, total=len(pairs), label="reading answers"):
            for text in (pair.chosen, pair.rejected):
                if (pair.prompt, text) not in known:
                    prompt = encode_prompt(tokenizer, pair.prompt, typed=True)[-recipe.max_tokens :]
                    answer = encode_answer(tokenizer, text)[: recipe.max_tokens]
                    known[pair.prompt, text] = kept.of(features, session, prompt, answer)
    finally:
        session.close()
    return [
        np.stack([known[pair.prompt, pair.chosen] for pair in pairs]),
        np.stack([known[pair.prompt, pair.rejected] for pair in pairs]),
    ]
