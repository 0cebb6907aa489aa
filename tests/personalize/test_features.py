"""What personal rewards see of an answer: true states, the same from every runtime, and folded without loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import ArtifactError, UsageError
from edgealign.personalize.features import Cache, Features, Folded, main_components, pool
from edgealign.personalize.lore import Basis
from edgealign.runtimes.session import open_session

Bundles = Callable[[str], Path]
PROMPT, ANSWER = (1, 9, 30, 44, 7), (12, 250, 31, 31, 8, 400, 5)


def some_basis(size: int, rank: int = 3) -> Basis:
    rng = np.random.default_rng(4)
    return Basis(rng.normal(size=size), rng.normal(size=(size, rank)), rng.uniform(0.5, 2.0, size))


def test_states_that_are_read_from_logits_are_those_of_the_network(tiny_model: Path) -> None:
    import torch

    from edgealign.models.load import load_model

    features = Features.of_model(tiny_model)
    with closing(open_session(tiny_model, threads=1)) as session:
        found = features.of(session, PROMPT, ANSWER)
    network = load_model(tiny_model)
    with torch.inference_mode():
        ids = torch.tensor([[*PROMPT, *ANSWER]])
        states = network.base_model(input_ids=ids).last_hidden_state[0, len(PROMPT) :].numpy()
        logits = network(input_ids=ids).logits[0].log_softmax(-1)
    width = states.shape[1]
    np.testing.assert_allclose(found[:width], states.mean(0), atol=1e-3)
    np.testing.assert_allclose(found[width : 2 * width], states[-1], atol=1e-3)
    bag = network.get_input_embeddings().weight[list(ANSWER)].mean(0).detach().numpy()
    np.testing.assert_allclose(found[2 * width : 3 * width], bag, atol=1e-6)
    told = [float(logits[len(PROMPT) - 1 + place, token]) for place, token in enumerate(ANSWER)]
    np.testing.assert_allclose(found[-2:], [np.log1p(len(ANSWER)), np.mean(told)], atol=1e-4)


def test_a_folded_basis_gives_the_same_rewards_as_the_features(tiny_model: Path, tmp_path: Path) -> None:
    features = Features.of_model(tiny_model)
    basis = some_basis(features.size)
    features.fold(basis).save(tmp_path / "basis.safetensors")
    folded = Folded.load(tmp_path / "basis.safetensors")
    weights = np.array([0.5, -1.0, 2.0])
    with closing(open_session(tiny_model, threads=1)) as session:
        phi, projected = features.of(session, PROMPT, ANSWER), folded.of(session, PROMPT, ANSWER)
    wanted = basis.reward(phi, weights)
    assert projected[0] + projected[1:] @ weights == pytest.approx(wanted, abs=1e-3 * max(1.0, abs(wanted)))
    assert folded.rank == 3


@pytest.mark.runtime
@pytest.mark.parametrize("target", ["gguf", "onnx", "executorch"])
def test_every_runtime_reads_what_torch_reads(target: str, request: pytest.FixtureRequest) -> None:
    made: Bundles = request.getfixturevalue({"gguf": "tiny_bundle"}.get(target, f"{target}_bundle"))
    model: Path = request.getfixturevalue("short_model" if target == "executorch" else "tiny_model")
    bundle = made("f32" if target == "gguf" else "fp32")
    features = Features.of_model(model)
    answer = [token % 400 for token in ANSWER]
    found = []
    for place in (model, bundle):
        with closing(open_session(place, threads=1)) as session:
            found.append(features.of(session, PROMPT, answer))
    np.testing.assert_allclose(found[1], found[0], atol=2e-3)


def test_another_answer_has_other_features_and_the_state_is_left_empty(tiny_model: Path) -> None:
    features = Features.of_model(tiny_model)
    with closing(open_session(tiny_model, threads=1)) as session:
        first = features.of(session, PROMPT, ANSWER)
        features.of(session, PROMPT, (99, 98, 97))
        np.testing.assert_array_equal(features.of(session, PROMPT, ANSWER), first)
        assert np.abs(features.of(session, PROMPT, ANSWER[::-1]) - first).max() > 1e-3


def test_an_answer_or_a_prompt_without_tokens_is_refused(tiny_model: Path) -> None:
    with closing(open_session(tiny_model, threads=1)) as session:
        for prompt, answer, what in ((PROMPT, (), "answer"), ((), ANSWER, "prompt")):
            with pytest.raises(UsageError, match=f"{what}: has no tokens"):
                pool(session, prompt, answer)


def test_a_basis_over_other_features_is_not_folded(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="are not this model's"):
        Features.of_model(tiny_model).fold(some_basis(10))


def test_features_are_read_once_and_a_damaged_entry_is_read_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, cache = Features.of_model(tiny_model), Cache(tmp_path, "digest")
    with closing(open_session(tiny_model, threads=1)) as session:
        first = cache.of(features, session, PROMPT, ANSWER)
        with monkeypatch.context() as patched:
            patched.setattr(Features, "of", lambda *_: pytest.fail("was read again"))
            np.testing.assert_array_equal(cache.of(features, session, PROMPT, ANSWER), first)
        file = next(tmp_path.rglob("*.npy"))
        file.write_bytes(file.read_bytes()[:40])
        np.testing.assert_array_equal(cache.of(features, session, PROMPT, ANSWER), first)
        assert Cache(tmp_path, "other")._file("Features", PROMPT, ANSWER) != file


def test_main_components_are_uncorrelated_and_leave_out_what_never_varies() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 9))
    features[:, 3] = 7.0
    found = main_components(features, 3)
    assert found.shape == (9, 3)
    assert not found[3].any()
    covariance = np.cov((features @ found).T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-9


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "foreign", "shape", "nan"])
def test_a_damaged_basis_is_one_line(damage: str, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    features = Features.of_model(tiny_model)
    file = tmp_path / "basis.safetensors"
    features.fold(some_basis(features.size)).save(file)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "foreign":
        save_file({"weights": np.zeros(3)}, file)
    else:
        arrays = load_file(file)
        if damage == "shape":
            arrays["tokens"] = arrays["tokens"][:-1]
        else:
            arrays["scalars"] = arrays["scalars"] * np.nan
        save_file(arrays, file)
    with pytest.raises(ArtifactError, match="basis"):
        Folded.load(file)
