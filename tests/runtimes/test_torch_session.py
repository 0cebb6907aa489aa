"""The oracle: splitting a prompt changes nothing, adapters attach wholly or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import InputError, UsageError
from edgealign.runtimes import probe
from edgealign.runtimes.session import Scorer, Session, open_session
from edgealign.runtimes.torch_session import TorchSession

TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 500, 40)]


@pytest.fixture
def session(tiny_model: Path) -> TorchSession:
    return TorchSession(tiny_model, threads=1)


@pytest.mark.parametrize(
    "cuts", [[40], [1] * 40, [1, 39], [2, 38], [1, 1, 38], [3, 37], [20, 1, 19], [20, 2, 18], [20, 1, 1, 18], [2] * 20]
)
def test_a_prompt_in_pieces_gives_the_logits_of_one_pass(session: TorchSession, cuts: list[int]) -> None:
    whole = session.score(TOKENS)
    start = 0
    for length in cuts:
        logits = session.prefill(TOKENS[start : start + length])
        start += length
        assert np.abs(logits - whole[start - 1]).max() < 1e-4
    assert whole.std() > 0.1


@pytest.fixture(scope="module")
def lfm3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolutions of width 7 and a window of 32 tokens, fewer than the test's."""
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    out = tmp_path_factory.mktemp("lfm3") / "model"
    create.run(InitRecipe(shape="tiny-lfm3", seed=1, vocab_size=512, dtype="float32", norm_noise=0.2), text=[], out=out)
    return out


@pytest.mark.parametrize(
    "cuts", [[120], [1] * 120, [1, 119], [5, 115], [6, 1, 113], [7, 113], [31, 1, 1, 87], [32, 88], [60, 1, 6, 53]]
)
def test_lfm3_in_pieces_below_its_convolution_and_beyond_its_window_gives_the_logits_of_one_pass(
    lfm3: Path, cuts: list[int]
) -> None:
    session = TorchSession(lfm3, threads=1)
    tokens = [int(token) for token in np.random.default_rng(1).integers(3, 500, 120)]
    whole, start = session.score(tokens), 0
    for length in cuts:
        logits = session.prefill(tokens[start : start + length])
        start += length
        assert np.abs(logits - whole[start - 1]).max() < 1e-4
    assert whole.std() > 0.1
    session.reset()  # a second conversation
    assert np.abs(session.prefill(tokens) - whole[-1]).max() < 1e-4


def test_an_lfm3_user_sees_nothing_of_the_one_before(lfm3: Path, tiny_lora: Callable[..., Path]) -> None:
    session = TorchSession(lfm3, threads=1)
    ana, ben = (tiny_lora(seed=seed, base=lfm3, strength=0.3) for seed in (1, 2))
    tokens = TOKENS * 2
    base = session.prefill(tokens)
    session.set_user(ana)
    fresh = session.prefill(tokens)
    session.set_user(ben)
    session.prefill(tokens)
    session.set_user(ana)
    assert np.array_equal(session.prefill(tokens), fresh)
    session.set_user(None)
    assert np.array_equal(session.prefill(tokens), base)
    assert np.abs(fresh - base).max() > 0.01


def test_a_model_directory_opens_in_torch_and_keeps_the_protocol(tiny_model: Path) -> None:
    session = open_session(tiny_model)
    assert isinstance(session, TorchSession)
    assert isinstance(session, Session)
    assert isinstance(session, Scorer)


def test_a_second_user_sees_nothing_of_the_first(session: TorchSession, tiny_lora: Callable[..., Path]) -> None:
    ana, ben = tiny_lora(seed=1), tiny_lora(seed=2)
    base = session.prefill(TOKENS)
    session.set_user(ana)
    fresh = session.prefill(TOKENS)
    session.set_user(ben)
    other = session.prefill(TOKENS)
    session.set_user(ana)
    again = session.prefill(TOKENS)
    session.set_user(None)
    assert np.array_equal(again, fresh)
    assert np.array_equal(session.prefill(TOKENS), base)
    assert np.abs(fresh - base).max() > 0.01
    assert np.abs(fresh - other).max() > 0.01


def test_merging_the_adapter_changes_nothing_it_did_not_change_before(
    session: TorchSession, tiny_lora: Callable[..., Path]
) -> None:
    session.set_user(tiny_lora(seed=1))
    adapted = session.score(TOKENS)
    session.merge_user()
    assert np.abs(session.score(TOKENS) - adapted).max() < 1e-4


def test_an_adapter_with_a_foreign_key_is_refused(
    session: TorchSession, tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "adapter"
    shutil.copytree(tiny_lora(seed=1), broken)
    (broken / "manifest.json").unlink()
    weights = load_file(broken / "adapter_model.safetensors")
    key = sorted(weights)[0]
    weights[key.replace("layers.", "layers.9")] = weights.pop(key)
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(InputError, match="only in part"):
        session.set_user(broken)
    session.set_user(tiny_lora(seed=1))  # the session is still of use


def test_an_adapter_of_another_base_is_refused_with_both_digests(
    session: TorchSession, tiny_lora: Callable[..., Path]
) -> None:
    stranger = tiny_lora(seed=1, base_digest="f" * 64)
    with pytest.raises(InputError, match=r"fitted on the model f{12}, this model is [0-9a-f]{12}"):
        session.set_user(stranger)


def test_an_adapter_whose_config_names_other_modules_is_refused(
    session: TorchSession, tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    broken = tmp_path / "adapter"
    shutil.copytree(tiny_lora(seed=1), broken)
    (broken / "manifest.json").unlink()
    config = json.loads((broken / "adapter_config.json").read_text())
    config["target_modules"] = ["o_proj", "gate_proj"]
    (broken / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not fit this model"):
        session.set_user(broken)


def test_a_directory_without_an_adapter_is_refused(session: TorchSession, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no adapter_model\.safetensors"):
        session.set_user(tmp_path)


@pytest.mark.parametrize("tokens", [[], [-1], [5, 10_000]])
def test_tokens_outside_the_vocabulary_are_refused(session: TorchSession, tokens: list[int]) -> None:
    with pytest.raises(UsageError):
        session.prefill(tokens)


def test_threads_that_nobody_names_are_no_more_than_a_container_grants(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(probe, "usable_cores", lambda: 1)
    try:
        torch.set_num_threads(2)
        assert TorchSession(tiny_model, threads=2).info()["n_threads"] == 2
        assert TorchSession(tiny_model).info()["n_threads"] == 1
    finally:
        torch.set_num_threads(before)
