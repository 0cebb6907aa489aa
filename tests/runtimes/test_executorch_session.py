"""ExecuTorch behind the session: torch's numbers, one program for everybody, no state across users."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgealign.errors import ArtifactError, InputError, ToolMissing, UsageError
from edgealign.runtimes import adapter_cache
from edgealign.runtimes.executorch_adapter import (
    BASE_DIGEST,
    SMALLEST_RANK,
    read_lora_executorch,
    write_lora_executorch,
)
from edgealign.runtimes.executorch_session import ExecutorchSession
from edgealign.runtimes.lora_inputs import LoraInput, Part, read_inputs
from edgealign.runtimes.lora_weights import read_lora
from edgealign.runtimes.session import bundle_adapter, open_session, runtime_of, score
from edgealign.runtimes.torch_session import TorchSession

Bundles = Callable[[str], Path]
TinyLora = Callable[..., Path]
TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 400, 60)]


@pytest.fixture
def session(executorch_bundle: Bundles) -> Iterator[ExecutorchSession]:
    with closing(ExecutorchSession(executorch_bundle("fp32"), threads=1)) as opened:
        yield opened


# --- adapters, without a program -------------------------------------------------------------------------------------


def entries(adapter: Path) -> list[LoraInput]:
    """A program's inputs as far as an adapter needs them."""
    return [
        LoraInput(name, pair.a.shape[1], (Part(name, pair.b.shape[0]),))
        for name, pair in read_lora(adapter).modules.items()
    ]


def test_the_file_holds_the_folded_matrices_and_the_bases_digest(tiny_lora: TinyLora, tmp_path: Path) -> None:
    adapter = tiny_lora(seed=3, rslora=True, rank=9, alpha=6.0)
    write_lora_executorch(adapter, tmp_path / "a.safetensors", inputs=entries(adapter))
    read, lora = read_lora_executorch(tmp_path / "a.safetensors"), read_lora(adapter)
    assert (read.base_digest, read.rank) == (lora.base_digest, 9)
    for name, pair in lora.modules.items():
        change = read.values[f"{name}.lora_a"][0] @ read.values[f"{name}.lora_b"][0]
        np.testing.assert_allclose(change.T, pair.b @ pair.a, atol=1e-6)


def test_unequal_and_small_ranks_are_padded_without_changing_anything(tiny_lora: TinyLora, tmp_path: Path) -> None:
    for number, options in enumerate(({"rank": 1}, {"rank": 3, "rank_pattern": {"q_proj": 5}})):
        adapter = tiny_lora(seed=4, **options)
        file = tmp_path / f"{number}.safetensors"
        write_lora_executorch(adapter, file, inputs=entries(adapter))
        read, lora = read_lora_executorch(file), read_lora(adapter)
        assert read.rank == (SMALLEST_RANK, 5)[number]
        assert {value.shape[2 if "lora_a" in name else 1] for name, value in read.values.items()} == {read.rank}
        name, pair = next(iter(lora.modules.items()))
        change = read.values[f"{name}.lora_a"][0] @ read.values[f"{name}.lora_b"][0]
        np.testing.assert_allclose(change.T, pair.b @ pair.a, atol=1e-6)


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_truncated_adapter_is_one_line(tiny_lora: TinyLora, tmp_path: Path, cut: int) -> None:
    adapter = tiny_lora(seed=3)
    write_lora_executorch(adapter, tmp_path / "whole", inputs=entries(adapter))
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:cut])
    with pytest.raises(InputError, match=r"a\.safetensors: "):
        read_lora_executorch(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no such adapter file"):
        read_lora_executorch(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("values", "metadata"),
    [
        ({"x.lora_a": (1, 6, 4)}, None),  # somebody else's file
        ({"x.weight": (1, 6, 4)}, {BASE_DIGEST: "ab"}),
        ({"x.lora_a": (6, 4)}, {BASE_DIGEST: "ab"}),
        ({"x.lora_a": (1, 6, 4), "x.lora_b": (1, 3, 6)}, {BASE_DIGEST: "ab"}),  # two ranks
        ({"x.lora_a": (1, 6, 1), "x.lora_b": (1, 1, 6)}, {BASE_DIGEST: "ab"}),
        ({}, {BASE_DIGEST: "ab"}),
    ],
)
def test_a_foreign_file_is_no_adapter(
    tmp_path: Path, values: dict[str, tuple[int, ...]], metadata: dict[str, str] | None
) -> None:
    tensors = {name: np.zeros(shape, np.float32) for name, shape in values.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="is no adapter for an ExecuTorch program"):
        read_lora_executorch(tmp_path / "a.safetensors")


def test_an_absent_library_is_a_missing_tool_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.delitem(sys.modules, "executorch.runtime", raising=False)
    with pytest.raises(ToolMissing, match=r"executorch: is not installed; pip install 'edgealign\[executorch\]'"):
        ExecutorchSession(tmp_path / "model.pte")


# --- the session -----------------------------------------------------------------------------------------------------


@pytest.mark.runtime
@pytest.mark.slow
def test_a_bundle_opens_in_executorch_by_its_manifest(executorch_bundle: Bundles) -> None:
    bundle = executorch_bundle("fp32")
    assert runtime_of(bundle) == runtime_of(bundle / "model.pte") == "executorch"
    with closing(open_session(bundle, threads=1)) as session:
        assert isinstance(session, ExecutorchSession)


@pytest.mark.runtime
@pytest.mark.slow
def test_the_program_gives_torchs_logits_with_and_without_a_user(
    session: ExecutorchSession, short_model: Path, executorch_bundle: Bundles, tiny_lora: TinyLora
) -> None:
    oracle = TorchSession(short_model, threads=1)
    adapters = {
        "ana": tiny_lora(seed=1, base=short_model, rank=4),
        "ben": tiny_lora(seed=2, base=short_model, rank=5, rslora=True),
    }
    for user in (None, "ana", "ben", None):
        oracle.set_user(None if user is None else adapters[user])
        session.set_user(None if user is None else bundle_adapter(executorch_bundle("fp32"), user))
        assert np.abs(score(session, TOKENS[:30]) - oracle.score(TOKENS[:30])).max() < 1e-5


@pytest.mark.runtime
@pytest.mark.slow
def test_a_user_who_adapts_a_few_modules_gets_zeros_for_the_others(
    session: ExecutorchSession, executorch_bundle: Bundles, short_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    adapter = tiny_lora(seed=8, base=short_model, targets=["q_proj", "w2"], rank=1, strength=0.5)
    write_lora_executorch(adapter, tmp_path / "a.safetensors", inputs=read_inputs(executorch_bundle("fp32")))
    oracle = TorchSession(short_model, threads=1)
    base = oracle.score(TOKENS)[-1]
    oracle.set_user(adapter)
    session.set_user(tmp_path / "a.safetensors")
    got = session.prefill(TOKENS)
    assert np.abs(got - oracle.score(TOKENS)[-1]).max() < 1e-5
    assert np.abs(got - base).max() > 0.01


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp32", "8da4w"])
def test_a_second_conversation_hears_nothing_of_the_first(executorch_bundle: Bundles, quant: str) -> None:
    """Upstream's short convolution keeps its state for ever: off by 0.01 to 0.03 on a model like this one."""
    with closing(ExecutorchSession(executorch_bundle(quant), threads=1)) as session:
        fresh = [session.prefill(TOKENS[:length]) for length in (1, 2, 3, 24) if session.reset() is None]
        session.reset()
        session.prefill(TOKENS[24:])
        for length, expected in zip((1, 2, 3, 24), fresh, strict=True):
            session.reset()
            assert np.array_equal(session.prefill(TOKENS[:length]), expected)


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp32", "8da4w"])
def test_all_ways_to_feed_a_prompt_agree(executorch_bundle: Bundles, quant: str) -> None:
    with closing(ExecutorchSession(executorch_bundle(quant), threads=1)) as session:
        singles = np.stack([session.step(token) for token in TOKENS])
        session.reset()
        pieces = [session.prefill(TOKENS[:2]), session.prefill(TOKENS[2:3]), session.prefill(TOKENS[3:])]
        session.batch = 7  # a long prompt goes in batches
        session.reset()
        pieces.append(session.prefill(TOKENS))
    assert np.abs(np.stack(pieces) - singles[[1, 2, 59, 59]]).max() < 1e-4


@pytest.mark.runtime
@pytest.mark.slow
def test_a_second_user_sees_nothing_of_the_first(session: ExecutorchSession, executorch_bundle: Bundles) -> None:
    ana, ben = (bundle_adapter(executorch_bundle("fp32"), user) for user in ("ana", "ben"))
    base = session.prefill(TOKENS)
    session.set_user(ana)
    fresh = session.prefill(TOKENS)
    session.set_user(ben)
    session.prefill(TOKENS)
    session.set_user(ana)
    assert np.array_equal(session.prefill(TOKENS), fresh)
    session.set_user(None)
    assert np.array_equal(session.prefill(TOKENS), base)
    assert np.abs(fresh - base).max() > 0.01


@pytest.mark.runtime
@pytest.mark.slow
def test_logits_are_copies_that_the_next_step_does_not_change(session: ExecutorchSession) -> None:
    first = session.step(4)
    kept = first.copy()
    session.step(5)
    assert np.array_equal(first, kept)


@pytest.mark.runtime
@pytest.mark.slow
def test_an_adapter_file_that_changed_is_read_again_and_old_ones_are_forgotten(
    session: ExecutorchSession, executorch_bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_cache, "KEPT", 2)
    file = tmp_path / "user.safetensors"
    seen = []
    for user in ("ana", "ben"):
        shutil.copyfile(bundle_adapter(executorch_bundle("fp32"), user), file)
        session.set_user(file)
        seen.append(session.prefill(TOKENS))
        session.set_user(bundle_adapter(executorch_bundle("fp32"), user))
        assert np.array_equal(session.prefill(TOKENS), seen[-1])
        assert len(session._adapters) <= 2
    assert not np.array_equal(*seen)


@pytest.mark.runtime
@pytest.mark.slow
def test_an_adapter_of_another_model_or_shape_is_refused(
    session: ExecutorchSession, executorch_bundle: Bundles, tiny_lora: TinyLora, short_model: Path, tmp_path: Path
) -> None:
    inputs = read_inputs(executorch_bundle("fp32"))
    stranger = tiny_lora(seed=9, base=short_model, base_digest="cd" * 32)
    write_lora_executorch(stranger, tmp_path / "a.safetensors", inputs=inputs)
    with pytest.raises(InputError, match=r"was fitted on the model cdcdcdcdcdcd, model\.pte is [0-9a-f]{12}"):
        session.set_user(tmp_path / "a.safetensors")
    name = inputs[0].name
    wrong = {f"{name}.lora_a": np.zeros((1, 5, 4), np.float32), f"{name}.lora_b": np.zeros((1, 4, 5), np.float32)}
    save_file(wrong, tmp_path / "b.safetensors", metadata={BASE_DIGEST: ""})
    with pytest.raises(InputError, match=r"lora_a as \[1, 5, 4\], the program's is"):
        session.set_user(tmp_path / "b.safetensors")
    other = {"x.lora_a": np.zeros((1, 5, 4), np.float32), "x.lora_b": np.zeros((1, 4, 5), np.float32)}
    save_file(other, tmp_path / "c.safetensors", metadata={BASE_DIGEST: ""})
    with pytest.raises(InputError, match=r"holds x\.lora_a, for which the program has no input"):
        session.set_user(tmp_path / "c.safetensors")


@pytest.mark.runtime
@pytest.mark.slow
def test_the_facts_and_the_tokenizer_are_those_of_the_model(session: ExecutorchSession, short_model: Path) -> None:
    from edgealign.models.load import load_tokenizer

    tokenizer = load_tokenizer(short_model)
    for text in ("Hello  world\n", "naïve 🙂 日本", "<|im_start|>user\nhi<|im_end|>", ""):
        assert session.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    info = session.info()
    assert (info["runtime"], info["n_threads"], info["vocab"], info["eos"]) == ("executorch", 1, 400, 7)
    assert (info["n_ctx"], info["n_batch"]) == (256, 255)
    assert info["model_size"] == session.file.stat().st_size


@pytest.mark.runtime
@pytest.mark.slow
def test_a_full_context_is_an_error_and_a_reset_mends_it(executorch_bundle: Bundles) -> None:
    with closing(ExecutorchSession(executorch_bundle("fp32"), context=32, threads=1)) as session:
        with pytest.raises(UsageError, match="60 tokens: do not fit the context of 32"):
            session.prefill(TOKENS)
        session.prefill(TOKENS[:32])
        with pytest.raises(UsageError, match="33 tokens: do not fit"):
            session.step(1)
        session.reset()
        session.prefill(TOKENS[:32])
        for tokens in ([], [-1], [400]):
            with pytest.raises(UsageError):
                session.prefill(tokens)


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 4, 300, 60_000, 200_000])
def test_a_truncated_program_is_one_line_and_no_crash(executorch_bundle: Bundles, tmp_path: Path, keep: int) -> None:
    shutil.copytree(executorch_bundle("fp32"), tmp_path / "b")
    whole = (tmp_path / "b/model.pte").read_bytes()
    (tmp_path / "b/model.pte").write_bytes(whole[:keep])
    with pytest.raises(ArtifactError, match="is not the file that was published"):
        ExecutorchSession(tmp_path / "b")
    with pytest.raises(InputError, match=r"model\.pte: (is no ExecuTorch program|executorch 1\.5\.1 cannot open it)"):
        ExecutorchSession(tmp_path / "b/model.pte")


@pytest.mark.runtime
@pytest.mark.slow
def test_a_foreign_program_or_a_missing_list_of_inputs_is_one_line(
    executorch_bundle: Bundles, tmp_path: Path
) -> None:
    shutil.copytree(executorch_bundle("fp32"), tmp_path / "b")
    (tmp_path / "b/adapter_inputs.json").write_text(json.dumps({"no": "list"}))
    with pytest.raises(ArtifactError, match=r"adapter_inputs\.json: is missing or damaged"):
        ExecutorchSession(tmp_path / "b/model.pte")
    (tmp_path / "b/model.pte").write_bytes(b"GGUF" * 100)
    with pytest.raises(InputError, match="is no ExecuTorch program"):
        ExecutorchSession(tmp_path / "b/model.pte")
