"""`edgealign lora-basis`: one LoRA for each direction in which users differ; a user's LoRA is their weighted sum.

    edgealign lora-basis --model M --basis BASIS --candidates ANSWERS --out LORAS
    edgealign personalize --method lora-mix --basis BASIS --loras LORAS --choices ana.jsonl --user ana --out ana

The basis says what an answer is worth in each direction (lore.py). For direction b, of every prompt's answers the two
are taken that differ most in it and least in the others, and a LoRA is fitted on these pairs as on a person's choices
(fit.py). A user is a weighted sum of them (lora_mix.py).

Shape legend: A answers, B rank of the basis.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import Artifact, open_artifact, open_model, publish, refuse_existing
from edgealign.data.forms import Pair
from edgealign.errors import ArtifactError, InputError
from edgealign.objectives.table import check_beta, find
from edgealign.personalize.ask import every_pair
from edgealign.personalize.basis import OpenBasis, basis_folder, check_basis, open_basis
from edgealign.personalize.candidates import Candidates, read_answers, read_candidates
from edgealign.personalize.features import Cache
from edgealign.personalize.lora import adapted, encode_trees
from edgealign.personalize.lowrank import Factors, read_peft, write_peft
from edgealign.personalize.recipes import LoraBasisRecipe
from edgealign.progress import say
from edgealign.runtimes.session import open_session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


def run(recipe: LoraBasisRecipe, *, model: str | Path, basis: str | Path, candidates: Path, out: Path) -> Artifact:
    """Fit a LoRA for each direction and publish them together.

    Raises:
        InputError: a basis of another model; prompts whose answers do not differ.
    """
    from edgealign.models.load import load_tokenizer
    from edgealign.personalize.fit import fit
    from edgealign.plan import count_parameters
    from edgealign.train.precision import choose_precision, fixed_threads

    out = Path(out)
    refuse_existing(out)
    started_s = time.monotonic()
    base, place = open_model(model), basis_folder(basis)
    shared = open_basis(place)
    check_basis(shared, base.digest, basis)
    answers, rows = read_candidates(candidates)
    tokenizer: Any = load_tokenizer(base.path)
    session = open_session(base.path, threads=recipe.threads or None)
    try:
        found = read_answers(shared.folded, session, tokenizer, rows, Cache(None, ""))
    finally:
        session.close()
    objective = find(recipe.objective)
    beta = check_beta(objective, recipe.beta)
    inputs = [base.as_input("base"), open_artifact(place).as_input("basis"), answers.as_input("candidates")]
    facts = []
    with (
        fixed_threads(recipe.threads) as threads,
        publish(
            out, kind="adapter", format="lora_basis", stage="lora_basis", recipe=recipe, inputs=inputs,
            licences=base.manifest.licences,
        ) as draft,
    ):  # fmt: skip
        precision = choose_precision(recipe.precision, lora=True, n_parameters=count_parameters(base.path))
        for direction in range(shared.folded.rank):
            pairs = telling(rows, found, direction)[: recipe.pairs]
            network, layers, _ = adapted(recipe, base.path, precision.weights, {}, along=False)
            say(f"direction {direction + 1} of {shared.folded.rank}: {len(pairs)} pairs, {words_of(shared, direction)}")
            trees = encode_trees(tokenizer, pairs, recipe, speaker=network)
            parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
            steps = fit(network, parameters, trees, recipe, objective=objective, beta=beta)
            folder = draft.dir / str(direction)
            folder.mkdir()
            write_peft(folder, layers, alpha=recipe.alpha, base_name=base.digest)
            facts.append({
                "words": words_of(shared, direction), "pairs": len(pairs), "first_step": asdict(steps[0]),
                "last_step": asdict(steps[-1]),
            })  # fmt: skip
        draft.meta.update(
            base_digest=base.digest, basis_digest=shared.digest, rank=recipe.rank, directions=facts, threads=threads,
            seconds=round(time.monotonic() - started_s, 1),
        )  # fmt: skip
    return open_artifact(out)


def telling(rows: Sequence[Candidates], found: Floats, direction: int) -> list[Pair]:
    """Of each prompt the pair that tells most of one direction, the better answer chosen; the clearest first.

    Args:
        found: (A, B + 1) what each answer is worth to everybody and in each direction.

    Raises:
        InputError: no two answers differ in it.
    """
    pairs, gaps = every_pair(list(rows), found)
    own = gaps[:, 1 + direction]
    # How far apart in this direction, times the share of the difference that lies in it.
    clear = own**2 / np.maximum(np.linalg.norm(gaps[:, 1:], axis=1), 1e-12)
    best: dict[Any, int] = {}
    for number, pair in enumerate(pairs):
        if pair.prompt not in best or clear[number] > clear[best[pair.prompt]]:
            best[pair.prompt] = number
    chosen = []
    for number in sorted(best.values(), key=lambda each: -clear[each]):
        pair = pairs[number]
        if own[number]:
            chosen.append(pair if own[number] > 0 else Pair(pair.prompt, pair.rejected, pair.chosen))
    if not chosen:
        raise InputError(f"direction {direction + 1}", "is in no pair of these answers", "give other --candidates")
    return chosen


def words_of(basis: OpenBasis, direction: int) -> str:
    """What a direction means."""
    return basis.words(np.eye(basis.folded.rank)[direction]) or "no words for it"


def open_loras(folder: str | Path, basis: OpenBasis) -> tuple[Artifact, list[dict[str, Factors]]]:
    """The published LoRAs of a basis, one for each direction.

    Raises:
        ArtifactError: damaged, or another kind of thing.
        InputError: of another basis.
    """
    artifact = open_artifact(Path(folder), kind="adapter")
    fix = "make it: edgealign lora-basis"
    if artifact.manifest.format != "lora_basis":
        raise ArtifactError(folder, f"is a {artifact.manifest.format} adapter, no LoRAs of a basis", fix)
    known = str(artifact.meta.get("basis_digest", ""))
    if known != basis.digest:
        raise InputError(folder, f"is of the basis {known[:12]}, this one is {basis.digest[:12]}", fix)
    return artifact, [read_peft(artifact.path / str(direction)) for direction in range(basis.folded.rank)]
