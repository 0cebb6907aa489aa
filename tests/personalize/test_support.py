"""Which way of being personal works in which runtime: every cell of the table in docs/personalization.md is tried."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgealign.artifact import open_artifact
from edgealign.errors import InputError
from edgealign.models.load import read_config
from edgealign.personalize.basis import OpenBasis
from edgealign.personalize.features import Features, Folded
from edgealign.personalize.fspo import enter
from edgealign.personalize.linear import Lead, MixedSession, Mixing
from edgealign.personalize.lora_mix import mix
from edgealign.personalize.lore import Basis, fit_users
from edgealign.personalize.lowrank import read_peft, write_factors
from edgealign.personalize.neighbours import best_of_neighbours
from edgealign.personalize.rerank import best_of
from edgealign.personalize.tilt import Tilt
from edgealign.runtimes.control_vector import write_control_vector
from edgealign.runtimes.executorch_adapter import write_lora_executorch
from edgealign.runtimes.generate import generate
from edgealign.runtimes.gguf_adapter import write_lora_gguf
from edgealign.runtimes.lora_inputs import read_inputs
from edgealign.runtimes.onnx_adapter import write_lora_onnx
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session, Snapshots, bundle_adapter, open_session
from edgealign.runtimes.streams import open_streams

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "export"))
import personal_matrix

PROMPT = (1, 9, 30, 44, 7)
PAIRS = [((12, 250, 31), (8, 300, 5, 17)), ((40, 41), (77, 78, 79)), ((9, 390), (201,)), ((3, 100, 90), (14, 15))]
LEAD = Lead((1, 6, 90, 91, 92, 93), (1,))
QUESTION = (20, 33, 250, 7)
SHORT = Sampling(temperature=0.0, min_p=0.0, repetition_penalty=1.0, max_tokens=6)
DRAWN = Sampling(temperature=1.0, min_p=0.0, repetition_penalty=1.0, max_tokens=4, seed=5)
FINE = 2e-3
Place = tuple[Path, Path, Path, Path]  # model, its LoRA, what the runtime opens, its LoRA there


@pytest.fixture(params=list(personal_matrix.RUNTIMES))
def place(request: pytest.FixtureRequest, tiny_lora: Any) -> tuple[str, Place]:
    target = str(request.param)
    model: Path = request.getfixturevalue("short_model" if target == "executorch" else "tiny_model")
    lora = tiny_lora(seed=1, base=model)
    if target == "torch":
        return target, (model, lora, model, lora)
    made: Callable[[str], Path] = request.getfixturevalue({"gguf": "tiny_bundle"}.get(target, f"{target}_bundle"))
    bundle = made("f32" if target == "gguf" else "fp32")
    return target, (model, lora, bundle, bundle_adapter(bundle, "ana"))


@pytest.mark.runtime
def test_every_way_does_in_every_runtime_what_the_table_says(
    place: tuple[str, Place], tiny_lora: Any, tmp_path: Path
) -> None:
    target, (model, torchs_lora, opened, its_lora) = place
    source = Features.of_model(model)
    rng = np.random.default_rng(4)
    folded = source.fold(
        Basis(rng.normal(size=source.size), rng.normal(size=(source.size, 3)), rng.uniform(0.5, 2.0, source.size))
    )
    config = read_config(model)
    vector = tmp_path / "direction.gguf"
    write_control_vector(
        {1: 0.1 * rng.normal(size=config["hidden_size"])}, vector, base_digest=open_artifact(model).digest,
        model_type=config["model_type"],
    )
    results = []
    for states, where, lora in (("reference", model, torchs_lora), ("own", opened, its_lora)):
        with closing(open_session(where, threads=1)) as session:
            found = {name: way(session, folded) for name, way in WAYS.items()}
            found["lora"] = switch(session, lora)
            found["mix"] = switch(session, mixed_lora(model, tiny_lora, target, where, tmp_path / states))
            found["direction"] = try_to_switch(session, vector)
        with closing(MixedSession(open_streams(where, threads=1), LEAD, Mixing(2.0))) as mixed:
            found["linear"] = generate(mixed, (*LEAD.preferred, *QUESTION), sampling=SHORT).tokens
        with closing(open_session(where, threads=1)) as session:
            found["fspo"], how = prefixed(session, tmp_path / states)
            found["prefix state"] = how
            assert isinstance(session, Snapshots) == (how == ["stored", "restored"])
        results.append(found)
    reference, own = results
    works = {
        name: agree(own[name], reference[name]) if name != "prefix state" else own[name] == ["stored", "restored"]
        for name in personal_matrix.WAYS
    }
    stated = json.loads(personal_matrix.SUPPORT.read_text(encoding="utf-8"))
    assert works == {name: cells[target] for name, cells in stated.items()}


def test_the_page_has_the_table_of_now() -> None:
    text = personal_matrix.PAGE.read_text(encoding="utf-8")
    assert personal_matrix.page(text) == text, "run: python export/personal_matrix.py --write"


def fit(session: Session, folded: Folded) -> Any:
    """A user's weights from four choices that this session reads."""
    gaps = [folded.of(session, PROMPT, one) - folded.of(session, PROMPT, other) for one, other in PAIRS]
    weights = fit_users(torch.from_numpy(np.stack(gaps))[None]).weights[0]
    assert np.abs(weights).max() > 10 * FINE
    return weights


def choose(session: Session, folded: Folded) -> Any:
    """The best of four answers by the reward of a user."""
    answers = best_of(session, PROMPT, 4, lambda answer: float(folded.of(session, PROMPT, answer)[0]), sampling=DRAWN)
    assert len(answers) > 1
    return answers[0].tokens


def tilt(session: Session, _: Folded) -> Any:
    """An answer whose tokens are tilted towards some, which it does not have without."""
    rewards = np.random.default_rng(0).normal(size=(400, 1)).astype(np.float32)
    basis = OpenBasis(None, rewards, "", "", np.zeros((2, 0)), ())  # type: ignore[arg-type]
    said = []
    for strength in (0.0, 1.0):
        session.reset()
        hook = Tilt.of(basis, np.ones(1), strength=strength)
        said.append(generate(session, PROMPT, sampling=SHORT, hooks=[hook]).tokens)
    assert said[0] != said[1]
    return said[1]


def ask_neighbours(session: Session, folded: Folded) -> Any:
    """The best of four answers, each tilted for another neighbour."""
    rewards = np.random.default_rng(0).normal(size=(400, folded.rank)).astype(np.float32)
    basis = OpenBasis(folded, rewards, "", "", np.zeros((4, 0)), ())
    weights = np.array([1.0, -1.0, 0.5])
    sure = replace(DRAWN, temperature=0.2)  # neighbours differ, and rounding decides no draw
    found = best_of_neighbours(basis, weights, session, PROMPT, 4, strength=1.0, sampling=sure, stop=(2,))
    assert len(found) > 1
    return found[0].tokens


def switch(session: Session, lora: Path) -> Any:
    """(3, V): the base, the user's, the base again."""
    found = []
    for user in (None, lora, None):
        session.set_user(user)
        found.append(session.prefill(PROMPT)[:400])
    assert np.array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 10 * FINE
    return np.stack(found)


def mixed_lora(model: Path, tiny_lora: Any, target: str, opened: Path, folder: Path) -> Path:
    """A weighted sum of two LoRAs as the runtime that opens `opened` takes it."""
    parts = [read_peft(tiny_lora(seed=seed, base=model)) for seed in (1, 2)]
    folder.mkdir(exist_ok=True)
    write_factors(folder, mix(parts, np.array([0.7, -0.4])), alpha=None, base_name=open_artifact(model).digest)
    if opened == model:
        return folder
    file = folder / {"gguf": "mix.gguf", "onnx": "mix.onnx_adapter", "executorch": "mix.ptd"}[target]
    if target == "gguf":
        write_lora_gguf(folder, file, base_config=read_config(model))
    elif target == "onnx":
        write_lora_onnx(folder, file, inputs=read_inputs(opened))
    else:
        write_lora_executorch(folder, file, inputs=read_inputs(opened))
    return file


def try_to_switch(session: Session, adapter: Path) -> Any:
    """As `switch`; None where the runtime refuses such an adapter."""
    try:
        return switch(session, adapter)
    except InputError:
        return None


def prefixed(session: Session, states: Path) -> tuple[Any, list[str]]:
    """What is said behind a prefix of choices, twice, and how it was entered."""
    prefix = tuple(range(20, 60))
    how, said = [], []
    for _ in range(2):
        how.append(enter(session, prefix, states=states))
        said.append(generate(session, QUESTION, sampling=SHORT, before=prefix).tokens)
    assert said[0] == said[1]
    return said[0], how


def agree(one: Any, other: Any) -> bool:
    if one is None:
        return False
    return one == other if isinstance(one, tuple) else bool(np.abs(one - other).max() < FINE)


WAYS: dict[str, Callable[[Session, Folded], Any]] = {
    "lore": fit, "best of n": choose, "tilt": tilt, "neighbours": ask_neighbours
}  # fmt: skip
