"""llama.cpp behind the session: torch's numbers, no state across users, errors instead of crashes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import ArtifactError, InputError, ToolMissing, UsageError
from edgealign.runtimes import adapter_cache, llamacpp
from edgealign.runtimes.llamacpp import LlamaSession
from edgealign.runtimes.session import Scorer, bundle_adapter, open_session, read_bundle, runtime_of
from edgealign.runtimes.torch_session import TorchSession

pytestmark = pytest.mark.runtime
Bundles = Callable[[str], Path]
TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 500, 40)]
EXACT = {"threads": 1, "exact": True, "extra_bufts": True}


@pytest.fixture
def session(tiny_bundle: Bundles) -> Iterator[LlamaSession]:
    with closing(LlamaSession(tiny_bundle("f32"), **EXACT)) as opened:
        yield opened


def test_a_bundle_opens_in_llama_cpp_by_its_manifest(tiny_bundle: Bundles) -> None:
    bundle = tiny_bundle("f32")
    assert runtime_of(bundle) == "llama.cpp"
    assert runtime_of(bundle / "model.gguf") == "llama.cpp"
    with closing(open_session(bundle, threads=1, extra_bufts=True)) as session:
        assert isinstance(session, LlamaSession)
        assert isinstance(session, Scorer)


def test_exact_mode_gives_torchs_logits_with_and_without_a_user(
    session: LlamaSession, tiny_model: Path, tiny_bundle: Bundles, tiny_lora: Callable[..., Path]
) -> None:
    oracle = TorchSession(tiny_model, threads=1)
    for adapter, user in ((None, None), (tiny_lora(seed=1), "ana")):
        oracle.set_user(adapter)
        session.set_user(None if user is None else bundle_adapter(tiny_bundle("f32"), user))
        assert np.abs(session.score(TOKENS) - oracle.score(TOKENS)).max() < 1e-5


def test_all_ways_to_feed_a_prompt_agree(session: LlamaSession) -> None:
    rows = session.score(TOKENS)
    singles = np.stack([session.step(token) for token in TOKENS])
    session.reset()
    pieces = [session.prefill(TOKENS[:2]), session.prefill(TOKENS[2:21]), session.prefill(TOKENS[21:])]
    assert np.abs(singles - rows).max() < 1e-5
    assert np.abs(np.stack(pieces) - rows[[1, 20, 39]]).max() < 1e-5


def test_a_prompt_longer_than_the_batch_is_fed_in_parts(tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(LlamaSession(tiny_bundle("f32"), **EXACT)) as whole:
        expected = whole.prefill(TOKENS * 3)
    monkeypatch.setattr(llamacpp, "BATCH", 16)
    with closing(LlamaSession(tiny_bundle("f32"), **EXACT)) as session:
        assert np.abs(session.prefill(TOKENS * 3) - expected).max() < 1e-5
        assert np.abs(session.score(TOKENS * 3)[-1] - expected).max() < 1e-5


def test_logits_are_copies_that_the_next_step_does_not_change(session: LlamaSession) -> None:
    first = session.prefill(TOKENS)
    kept = first.copy()
    session.step(5)
    assert np.array_equal(first, kept)


def test_a_second_user_sees_nothing_of_the_first(session: LlamaSession, tiny_bundle: Bundles) -> None:
    ana, ben = (bundle_adapter(tiny_bundle("f32"), user) for user in ("ana", "ben"))
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


def test_an_adapter_file_that_changed_is_read_again(
    session: LlamaSession, tiny_bundle: Bundles, tmp_path: Path
) -> None:
    bundle = tiny_bundle("f32")
    file = tmp_path / "user.gguf"
    seen = []
    for user in ("ana", "ben"):
        shutil.copyfile(bundle_adapter(bundle, user), file)
        session.set_user(file)
        seen.append(session.prefill(TOKENS))
        session.set_user(bundle_adapter(bundle, user))
        assert np.array_equal(session.prefill(TOKENS), seen[-1])
    assert not np.array_equal(*seen)


def test_old_adapters_are_freed_and_come_back(
    session: LlamaSession, tiny_bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_cache, "KEPT", 2)
    source = bundle_adapter(tiny_bundle("f32"), "ana")
    session.set_user(source)
    expected = session.prefill(TOKENS)
    for number in range(5):
        copy = tmp_path / f"{number}.gguf"
        shutil.copyfile(source, copy)
        session.set_user(copy)
        assert np.array_equal(session.prefill(TOKENS), expected)
        assert len(session._adapters) <= 2
    session.unload_adapters()
    session.set_user(source)
    assert np.array_equal(session.prefill(TOKENS), expected)


def test_the_tokenizer_is_that_of_the_model(session: LlamaSession, tiny_model: Path) -> None:
    from edgealign.models.load import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    for text in ("Hello  world\n", "naïve 🙂 日本", "<|im_start|>user\nhi<|im_end|>", ""):
        assert session.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_info_has_what_a_benchmark_records(session: LlamaSession) -> None:
    info = session.info()
    assert (info["type_k"], info["flash_attn"], info["extra_bufts"], info["n_threads"]) == ("f32", "off", True, 1)
    assert info["vocab"] == 512
    assert info["eos"] == 7
    assert info["model_n_params"] > 1_000_000


def test_a_full_context_is_an_error_and_a_reset_mends_it(tiny_bundle: Bundles) -> None:
    with closing(LlamaSession(tiny_bundle("f32"), context=32, **EXACT)) as session:
        with pytest.raises(UsageError, match="40 tokens: do not fit the context of 32"):
            session.prefill(TOKENS)
        session.prefill(TOKENS[:32])
        with pytest.raises(UsageError, match="33 tokens: do not fit"):
            session.step(1)
        session.reset()
        session.prefill(TOKENS[:32])


@pytest.mark.parametrize("tokens", [[], [-1], [512]])
def test_tokens_outside_the_vocabulary_are_refused(session: LlamaSession, tokens: list[int]) -> None:
    with pytest.raises(UsageError):
        session.prefill(tokens)


def test_an_unknown_user_is_refused_with_the_known_ones(tiny_bundle: Bundles) -> None:
    with pytest.raises(UsageError, match=r"eve: is no user of tiny-f32 \(users: ana, ben\)"):
        bundle_adapter(tiny_bundle("f32"), "eve")


def test_a_bundle_with_a_flipped_byte_is_not_opened(tiny_bundle: Bundles, tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("f32"), broken)
    data = bytearray((broken / "model.gguf").read_bytes())
    data[-100] ^= 1
    (broken / "model.gguf").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.gguf is not the file that was published"):
        LlamaSession(broken, **EXACT)


def test_a_bundle_for_a_target_without_runtime_is_refused(tiny_bundle: Bundles, tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("f32"), broken)
    manifest = broken / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"target": "gguf"', '"target": "paper"'))
    with pytest.raises(ArtifactError, match="exported for 'paper', which no runtime here opens"):
        runtime_of(broken)
    assert read_bundle(broken, check_digests=False).target == "paper"


def test_an_absent_library_is_a_missing_tool_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(llamacpp.importlib, "import_module", absent)
    with pytest.raises(ToolMissing, match=r"is not installed; install it with: CMAKE_ARGS=.* llama-cpp-python==0\.3"):
        llamacpp.load_library.__wrapped__()


def test_a_library_with_another_api_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "NEEDED", (*llamacpp.NEEDED, "llama_of_the_future"))
    with pytest.raises(ToolMissing, match="lacks llama_of_the_future, which edgealign calls"):
        llamacpp.load_library.__wrapped__()


def test_a_model_directory_is_no_adapter(session: LlamaSession, tiny_bundle: Bundles) -> None:
    with pytest.raises(InputError, match="is a GGUF file, but no adapter"):
        session.set_user(tiny_bundle("f32") / "model.gguf")
