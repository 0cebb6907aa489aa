"""A control vector is a user like any other: the same in torch and llama.cpp, switched, refused where it is foreign."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.artifact import open_artifact
from edgealign.errors import InputError
from edgealign.runtimes.control_vector import read_control_vector, write_control_vector
from edgealign.runtimes.llamacpp import LlamaSession
from edgealign.runtimes.torch_session import TorchSession

PROMPT, ANSWER = tuple(range(5, 30)), (40, 41, 300)
LAYERS, WIDTH = 6, 128


def directions(*layers: int, seed: int = 0, size: float = 0.05) -> dict[int, Any]:
    rng = np.random.default_rng(seed)
    return {layer: (size * rng.normal(size=WIDTH)).astype(np.float32) for layer in layers}


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, found: dict[int, Any], digest: str = "") -> Path:
        file = tmp_path / f"{name}.gguf"
        digest = digest or open_artifact(tiny_model).digest
        write_control_vector(found, file, base_digest=digest, model_type="lfm2")
        return file

    return write


def walk(session: Any) -> Any:
    return np.stack([session.prefill(PROMPT), *(session.step(token) for token in ANSWER)])


@pytest.mark.runtime
def test_llama_cpp_adds_what_torch_adds_in_every_layer_and_leaves_nothing_behind(
    tiny_model: Path, tiny_bundle: Callable[[str], Path], tiny_lora: Any, made: Callable[..., Path]
) -> None:
    users = {str(layer): made(str(layer), directions(layer)) for layer in range(1, LAYERS)}
    users["several"] = made("several", directions(1, 3, 4, seed=1))
    bundle = tiny_bundle("f32")
    with (
        closing(TorchSession(tiny_model, threads=1)) as torch,
        closing(LlamaSession(bundle, threads=1, exact=True, extra_bufts=True)) as llama,
    ):
        base, lora = walk(llama), tiny_lora(seed=1)
        seen = []
        for name, file in users.items():
            for session in (torch, llama):
                session.set_user(file)
            own, reference = walk(llama), walk(torch)
            assert np.abs(own - reference).max() < 1e-4, name
            assert np.abs(own - base).max() > 0.05, name
            seen.append(own)
        assert all(np.abs(one - other).max() > 0.01 for one, other in pairwise(seen))
        torch.set_user(lora)  # a vector makes room for a LoRA, a LoRA for a vector
        llama.set_user(bundle / "adapters" / "ana.gguf")
        with_lora = walk(llama)
        assert np.abs(with_lora - walk(torch)).max() < 1e-4
        for session in (torch, llama):
            session.set_user(users["1"])
            assert np.abs(walk(session) - seen[0]).max() < 1e-4
            session.set_user(None)
        assert np.array_equal(walk(llama), base)
        assert np.abs(walk(torch) - base).max() < 1e-4


@pytest.mark.runtime
def test_a_state_under_one_vector_is_not_taken_under_another(
    tiny_bundle: Callable[[str], Path], made: Callable[..., Path]
) -> None:
    one, other = made("one", directions(2)), made("other", directions(2, seed=1))
    with closing(LlamaSession(tiny_bundle("f32"), threads=1, exact=True, extra_bufts=True)) as session:
        session.set_user(one)
        session.prefill(PROMPT)
        state, wanted = session.snapshot(), session.step(ANSWER[0])
        for wrong in (other, None):
            session.set_user(wrong)
            with pytest.raises(InputError):
                session.restore(state)
        session.set_user(one)
        session.restore(state)
        assert np.array_equal(session.step(ANSWER[0]), wanted)


@pytest.mark.parametrize("runtime", ["torch", pytest.param("llama.cpp", marks=pytest.mark.runtime)])
def test_a_vector_of_another_model_or_a_damaged_one_is_one_line_and_changes_nothing(
    runtime: str, tiny_model: Path, request: pytest.FixtureRequest, made: Callable[..., Path]
) -> None:
    session: Any = (
        TorchSession(tiny_model, threads=1) if runtime == "torch"
        else LlamaSession(request.getfixturevalue("tiny_bundle")("f32"), threads=1, exact=True, extra_bufts=True)
    )
    good = made("good", directions(2))
    cut = made("cut", directions(2))
    cut.write_bytes(cut.read_bytes()[:-64])
    bad = {
        made("foreign", directions(2), digest="f" * 64): "was fitted on the model ffffffffffff",
        made("deep", directions(LAYERS)): "this model has layers 1 to 5 of 128",
        made("narrow", {2: np.zeros(64)}): "64 numbers behind layer 2",
        made("nan", {2: np.full(WIDTH, np.nan)}): "values that are no numbers",
        cut: "cut.gguf",
    }
    with closing(session):
        session.set_user(good)
        before = walk(session)
        session.set_user(None)
        for file, words in bad.items():
            with pytest.raises(InputError, match=words) as caught:
                session.set_user(file)
            assert "\n" not in caught.value.line()
        session.set_user(good)
        assert np.array_equal(walk(session), before)


def test_what_is_written_is_read_again(made: Callable[..., Path]) -> None:
    wanted = directions(1, 4)
    found = read_control_vector(made("x", wanted), layers=LAYERS, width=WIDTH)
    assert {layer: values.tolist() for layer, values in found.directions.items()} == (
        {layer: values.tolist() for layer, values in wanted.items()}
    )
    rows = found.rows(LAYERS)
    assert rows.shape == (LAYERS - 1, WIDTH)
    assert np.flatnonzero(rows.any(1)).tolist() == [0, 3]
