"""A state kept as bytes: the same logits to the last bit, and no state of anybody else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.errors import InputError, UsageError
from edgealign.runtimes.llamacpp import LlamaSession
from edgealign.runtimes.onnx_session import OnnxSession
from edgealign.runtimes.scripted import ScriptedSession
from edgealign.runtimes.session import Snapshots, bundle_adapter
from edgealign.runtimes.snapshots import LENGTH, MAGIC
from edgealign.runtimes.torch_session import TorchSession

Bundles = Callable[[str], Path]
TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 500, 60)]
PREFIX, ASKED = TOKENS[:50], TOKENS[50:]
LLAMA = {"threads": 1, "extra_bufts": True}


@pytest.fixture(params=["torch", *(pytest.param(name, marks=pytest.mark.runtime) for name in ("llama.cpp", "onnx"))])
def make(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Callable[[], Any]]:
    opened: list[Any] = []

    def open_one() -> Any:
        if request.param == "torch":
            opened.append(TorchSession(tiny_model, threads=1))
        elif request.param == "onnx":
            opened.append(OnnxSession(request.getfixturevalue("onnx_bundle")("fp32"), threads=1))
        else:
            opened.append(LlamaSession(request.getfixturevalue("tiny_bundle")("f32"), **LLAMA))
        return opened[-1]

    yield open_one
    for session in opened:
        session.close()


@pytest.fixture
def users(make: Any, tiny_lora: Any) -> tuple[Path, Path]:
    session = make()
    if isinstance(session, TorchSession):
        return tiny_lora(seed=1), tiny_lora(seed=2)
    ana, ben = (bundle_adapter(session.file.parent, user) for user in ("ana", "ben"))
    return ana, ben


def go_on(session: Any) -> list[Any]:
    """Logits of a piece and of single steps."""
    return [session.prefill(ASKED[:4]), *(session.step(token) for token in ASKED[4:])]


def test_a_restored_state_gives_the_logits_of_one_that_was_fed_to_the_last_bit(make: Any) -> None:
    first, second = make(), make()
    assert isinstance(first, Snapshots)
    first.prefill(PREFIX)
    kept = first.snapshot()
    wanted = go_on(first)
    for session in (second, first):
        session.restore(kept)
        assert all(np.array_equal(a, b) for a, b in zip(go_on(session), wanted, strict=True))
    assert wanted[-1].std() > 0.1
    fresh = make()
    assert not np.array_equal(go_on(fresh)[-1], wanted[-1])  # the prefix does say something


def test_a_state_of_fewer_tokens_than_the_convolution_is_wide_is_kept_too(make: Any) -> None:
    first, second = make(), make()
    first.prefill(PREFIX[:1])
    second.restore(first.snapshot())
    assert all(np.array_equal(a, b) for a, b in zip(go_on(second), go_on(first), strict=True))


def test_a_state_taken_after_restoring_and_going_on_is_the_whole_conversation(make: Any) -> None:
    first, second = make(), make()
    first.prefill(PREFIX)
    second.restore(first.snapshot())
    second.prefill(ASKED[:5])
    first.prefill(ASKED[:5])
    third = make()
    third.restore(second.snapshot())
    assert np.array_equal(third.step(7), first.step(7))


def test_users_take_turns_and_each_gets_their_own_state_back(make: Any, users: tuple[Path, Path]) -> None:
    session, states, wanted = make(), [], []
    for user in users:
        session.set_user(user)
        session.prefill(PREFIX)
        states.append(session.snapshot())
        wanted.append(session.step(9))
    assert not np.array_equal(*wanted)
    for turn in (0, 1, 0):
        session.set_user(users[turn])
        session.restore(states[turn])
        assert np.array_equal(session.step(9), wanted[turn])


def test_another_users_state_is_refused_and_leaves_the_session_empty(make: Any, users: tuple[Path, Path]) -> None:
    session = make()
    empty = session.prefill(ASKED)
    session.set_user(users[0])
    session.prefill(PREFIX)
    kept = session.snapshot()
    session.set_user(users[1])
    with pytest.raises(InputError, match=r"^state: is of the user [0-9a-f]{12}, this session has [0-9a-f]{12}; feed"):
        session.restore(kept)
    session.set_user(None)
    with pytest.raises(InputError, match="this session has base"):
        session.restore(kept)
    assert np.array_equal(session.prefill(ASKED), empty)


def test_an_adapter_that_changed_since_names_no_state(make: Any, users: tuple[Path, Path], tmp_path: Path) -> None:
    mine = tmp_path / users[0].name
    shutil.copytree(users[0], mine) if users[0].is_dir() else shutil.copy(users[0], mine)
    session = make()
    session.set_user(mine)
    session.prefill(PREFIX)
    changed = next(mine.glob("*.safetensors")) if mine.is_dir() else mine
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(UsageError, match="has changed since it was switched on"):
        session.snapshot()


def test_an_empty_state_is_not_kept(make: Any) -> None:
    with pytest.raises(UsageError, match="nothing to keep"):
        make().snapshot()


@pytest.mark.parametrize("keep", [0, 10, len(MAGIC), len(MAGIC) + 2, 60, 400, -1])
def test_a_state_that_was_cut_off_is_refused_in_one_line(make: Any, keep: int) -> None:
    session = make()
    session.prefill(PREFIX)
    kept = session.snapshot()
    with pytest.raises(InputError) as caught:
        session.restore(kept[:keep])
    assert caught.value.line().startswith("state: ")
    assert "\n" not in caught.value.line()


def test_a_flipped_byte_anywhere_is_refused(make: Any) -> None:
    session = make()
    session.prefill(PREFIX)
    kept = session.snapshot()
    for place in (3, len(MAGIC) + 1, 40, len(kept) // 2, len(kept) - 1):
        damaged = bytearray(kept)
        damaged[place] ^= 0xFF
        with pytest.raises(InputError):
            session.restore(bytes(damaged))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "0" * 64, "is of the model 000000000000"),
        ("runtime", "another", "is of the runtime another"),
        ("version", "0.0", "is of the version 0.0"),
        ("cache", "q8", "is of the cache q8"),
    ],
)
def test_a_state_of_something_else_is_refused_by_name(make: Any, field: str, value: str, message: str) -> None:
    session = make()
    session.prefill(PREFIX)
    with pytest.raises(InputError, match=message):
        session.restore(forge(session.snapshot(), **{field: value}))


def test_bytes_with_a_right_digest_that_are_no_cache_are_refused(make: Any) -> None:
    session = make()
    session.prefill(PREFIX)
    for content in (b"", b"\0" * 8, b"\xff" * 64, b'{"a": 1}'):
        with pytest.raises(InputError, match=r"^state: "):
            session.restore(forge(session.snapshot(), content=content))
        session.reset()
        session.prefill(PREFIX)


@pytest.mark.runtime
def test_a_state_of_another_quantisation_is_refused(tiny_bundle: Bundles) -> None:
    with (
        closing(LlamaSession(tiny_bundle("f32"), **LLAMA)) as first,
        closing(LlamaSession(tiny_bundle("q8_0"), **LLAMA)) as second,
    ):
        first.prefill(PREFIX)
        with pytest.raises(InputError, match="is of the model"):
            second.restore(first.snapshot())


@pytest.mark.runtime
def test_a_state_longer_than_the_context_is_refused(tiny_bundle: Bundles) -> None:
    with (
        closing(LlamaSession(tiny_bundle("f32"), **LLAMA)) as first,
        closing(LlamaSession(tiny_bundle("f32"), context=32, **LLAMA)) as second,
    ):
        first.prefill(PREFIX)
        with pytest.raises(InputError, match="its 50 tokens do not fit the context of 32"):
            second.restore(first.snapshot())


def test_lfm3s_windows_and_wide_convolutions_are_kept(tmp_path: Path) -> None:
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    recipe = InitRecipe(shape="tiny-lfm3", seed=1, vocab_size=512, dtype="float32", norm_noise=0.2)
    create.run(recipe, text=[], out=tmp_path / "model")
    first, second = (TorchSession(tmp_path / "model", threads=1) for _ in range(2))
    first.prefill(TOKENS)  # longer than the window of 32
    second.restore(first.snapshot())
    assert all(np.array_equal(a, b) for a, b in zip(go_on(second), go_on(first), strict=True))


def test_a_runtime_without_states_does_not_claim_them() -> None:
    assert not issubclass(ScriptedSession, Snapshots)


def forge(kept: bytes, content: bytes | None = None, **fields: str) -> bytes:
    """A state with another header, and with another content under its right digest."""
    start = len(MAGIC) + LENGTH.size
    (length,) = LENGTH.unpack(kept[len(MAGIC) : start])
    header = json.loads(kept[start : start + length]) | fields
    state = kept[start + length :] if content is None else content
    header["sha256"] = hashlib.sha256(state).hexdigest()
    raw = json.dumps(header).encode()
    return MAGIC + LENGTH.pack(len(raw)) + raw + state
