"""onnxruntime behind the session: torch's numbers, one graph for everybody, no state across users."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import ArtifactError, InputError, ToolMissing, UsageError
from edgealign.runtimes import adapter_cache, onnx_adapter
from edgealign.runtimes.lora_inputs import LoraInput, Part, pack, read_inputs
from edgealign.runtimes.lora_weights import LoraWeights, LowRank, read_lora
from edgealign.runtimes.onnx_adapter import read_lora_onnx, write_lora_onnx
from edgealign.runtimes.onnx_session import OnnxSession
from edgealign.runtimes.session import Scorer, bundle_adapter, open_session, runtime_of
from edgealign.runtimes.torch_session import TorchSession

Bundles = Callable[[str], Path]
TinyLora = Callable[..., Path]
TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 500, 80)]
PACKED = LoraInput("m.attn.qkv_proj", 6, (Part("m.q", 4), Part("m.k", 2), Part("m.v", 2)))


@pytest.fixture
def session(onnx_bundle: Bundles) -> Iterator[OnnxSession]:
    with closing(OnnxSession(onnx_bundle("fp32"), threads=1)) as opened:
        yield opened


# --- adapters, without a graph ---------------------------------------------------------------------------------------


def pair(rank: int, out: int, seed: int) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.normal(size=(rank, 6)).astype(np.float32), rng.normal(size=(out, rank)).astype(np.float32))


@pytest.mark.parametrize("modules", [("m.q", "m.k", "m.v"), ("m.k",), ("m.q", "m.v")])
def test_packed_modules_share_one_input_with_b_along_the_diagonal(modules: tuple[str, ...]) -> None:
    widths = {"m.q": 4, "m.k": 2, "m.v": 2}
    pairs = {name: pair(rank, widths[name], rank) for rank, name in enumerate(modules, start=1)}
    values = pack(Path("a"), LoraWeights(pairs, None), [PACKED])
    x = np.random.default_rng(9).normal(size=(3, 6)).astype(np.float32)
    expected = np.zeros((3, 8), dtype=np.float32)
    for name, place in (("m.q", slice(0, 4)), ("m.k", slice(4, 6)), ("m.v", slice(6, 8))):
        if name in pairs:
            expected[:, place] = x @ (pairs[name].b @ pairs[name].a).T
    np.testing.assert_allclose(x @ values[PACKED.a] @ values[PACKED.b], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "reason"),
    [("model.embed_tokens", "the embedding"), ("lm_head", "the head"), ("m.norm", "a norm"), ("m.other", "no input")],
)
def test_what_the_graph_cannot_adapt_is_refused_with_the_way_out(module: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"adapts {module}, .*{reason}.*edgealign merge"):
        pack(Path("a"), LoraWeights({module: pair(1, 4, 0)}, None), [PACKED])


def test_an_adapter_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"m\.k is 3 x 6, the model's matrix is 2 x 6"):
        pack(Path("a"), LoraWeights({"m.k": pair(1, 3, 0)}, None), [PACKED])


@pytest.mark.runtime
@pytest.mark.parametrize("option", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_dora_and_whole_modules_are_refused(
    onnx_tools: None, tiny_lora: TinyLora, tmp_path: Path, option: dict[str, object]
) -> None:
    shutil.copytree(tiny_lora(seed=3), tmp_path / "adapter")
    (tmp_path / "adapter/manifest.json").unlink()
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | option), encoding="utf-8")
    with pytest.raises(InputError, match="which no runtime adapter can hold; merge it"):
        write_lora_onnx(tmp_path / "adapter", tmp_path / "a.onnx_adapter", inputs=[PACKED])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.runtime
def test_the_file_holds_the_folded_matrices_and_the_bases_digest(
    onnx_bundle: Bundles, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    adapter = tiny_lora(seed=3, rslora=True, rank=9, alpha=6.0)
    inputs = read_inputs(onnx_bundle("fp32"))
    write_lora_onnx(adapter, tmp_path / "a.onnx_adapter", inputs=inputs)
    read, lora = read_lora_onnx(tmp_path / "a.onnx_adapter"), read_lora(adapter)
    assert lora.base_digest is not None
    assert read.base == lora.base_digest[:7]
    entry = next(entry for entry in inputs if len(entry.parts) == 1)
    delta = read.values[entry.a].numpy() @ read.values[entry.b].numpy()
    expected = lora.modules[entry.parts[0].module]
    np.testing.assert_allclose(delta.T, expected.b @ expected.a, atol=1e-6)


@pytest.mark.runtime
def test_writing_an_adapter_needs_no_torch(onnx_bundle: Bundles, tiny_lora: TinyLora, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from edgealign.runtimes.lora_inputs import read_inputs\n"
        "from edgealign.runtimes.onnx_adapter import write_lora_onnx\n"
        "write_lora_onnx(Path(sys.argv[1]), Path(sys.argv[2]), inputs=read_inputs(Path(sys.argv[3])))\n"
        "assert not {'torch', 'transformers', 'peft', 'onnx'} & set(sys.modules), sorted(sys.modules)\n"
    )
    out = tmp_path / "a.onnx_adapter"
    subprocess.run([sys.executable, "-c", code, tiny_lora(), out, onnx_bundle("fp32")], check=True)
    assert read_lora_onnx(out).values


@pytest.mark.runtime
@pytest.mark.parametrize("data", [b"", b"no adapter at all", b"\0" * 4096])
def test_a_damaged_adapter_is_one_line(onnx_tools: None, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.onnx_adapter").write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged, or is no \.onnx_adapter file"):
        read_lora_onnx(tmp_path / "a.onnx_adapter")
    with pytest.raises(InputError, match="no such adapter file"):
        read_lora_onnx(tmp_path / "absent.onnx_adapter")


def test_an_absent_library_is_a_missing_tool_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ToolMissing, match=r"onnxruntime: is not installed; pip install 'edgealign\[onnx\]'"):
        onnx_adapter.load_onnxruntime()


# --- the session -----------------------------------------------------------------------------------------------------


@pytest.mark.runtime
def test_a_bundle_opens_in_onnxruntime_by_its_manifest(onnx_bundle: Bundles) -> None:
    bundle = onnx_bundle("fp32")
    assert runtime_of(bundle) == runtime_of(bundle / "model.onnx") == "onnxruntime"
    with closing(open_session(bundle, threads=1)) as session:
        assert isinstance(session, OnnxSession)
        assert isinstance(session, Scorer)


@pytest.mark.runtime
def test_the_graph_gives_torchs_logits_with_and_without_a_user(
    session: OnnxSession, tiny_model: Path, onnx_bundle: Bundles, tiny_lora: TinyLora
) -> None:
    oracle = TorchSession(tiny_model, threads=1)
    for adapter, user in ((None, None), (tiny_lora(seed=1), "ana")):
        oracle.set_user(adapter)
        session.set_user(None if user is None else bundle_adapter(onnx_bundle("fp32"), user))
        assert np.abs(session.score(TOKENS) - oracle.score(TOKENS)).max() < 1e-5


@pytest.mark.runtime
@pytest.mark.parametrize("quant", ["fp32", "int4_k"])  # in the others the embedding is another tensor afterwards
def test_without_an_adapter_the_logits_are_bit_for_bit_those_of_the_builders_graph(
    onnx_bundle: Bundles, tiny_model: Path, tmp_path: Path, quant: str
) -> None:
    from genai_model import build

    bundle = onnx_bundle(quant)
    build(tiny_model, tmp_path / "built", quant=quant, context=None)
    with closing(OnnxSession(bundle, threads=1)) as ours, closing(
        OnnxSession(tmp_path / "built/model.onnx", threads=1)
    ) as theirs:  # fmt: skip
        assert len(ours._inputs) > len(theirs._inputs)
        assert np.array_equal(ours.score(TOKENS), theirs.score(TOKENS))
        assert np.array_equal(ours.step(5), theirs.step(5))


@pytest.mark.runtime
@pytest.mark.parametrize("quant", ["fp32", "int8"])
def test_all_ways_to_feed_a_prompt_agree(onnx_bundle: Bundles, quant: str) -> None:
    with closing(OnnxSession(onnx_bundle(quant), threads=1, exact=True)) as session:
        rows = session.score(TOKENS)
        singles = np.stack([session.step(token) for token in TOKENS])
        session.reset()
        pieces = [session.prefill(TOKENS[:2]), session.prefill(TOKENS[2:3]), session.prefill(TOKENS[3:])]
    assert np.abs(singles - rows).max() < 1e-5
    assert np.abs(np.stack(pieces) - rows[[1, 2, 79]]).max() < 1e-5


@pytest.mark.runtime
def test_logits_are_copies_that_the_next_step_does_not_change(session: OnnxSession) -> None:
    first = session.step(4)
    kept = first.copy()
    session.step(5)
    assert np.array_equal(first, kept)


@pytest.mark.runtime
def test_a_second_user_sees_nothing_of_the_first(session: OnnxSession, onnx_bundle: Bundles) -> None:
    ana, ben = (bundle_adapter(onnx_bundle("fp32"), user) for user in ("ana", "ben"))
    base = session.prefill(TOKENS)
    session.set_user(ana)
    assert not any(buffer.any() for state in session._states for buffer in state.buffers)
    fresh = session.prefill(TOKENS)
    session.set_user(ben)
    session.prefill(TOKENS)
    session.set_user(ana)
    assert np.array_equal(session.prefill(TOKENS), fresh)
    session.set_user(None)
    assert np.array_equal(session.prefill(TOKENS), base)
    assert np.abs(fresh - base).max() > 0.01


@pytest.mark.runtime
def test_an_adapter_file_that_changed_is_read_again_and_old_ones_are_forgotten(
    session: OnnxSession, onnx_bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_cache, "KEPT", 2)
    file = tmp_path / "user.onnx_adapter"
    seen = []
    for user in ("ana", "ben"):
        shutil.copyfile(bundle_adapter(onnx_bundle("fp32"), user), file)
        session.set_user(file)
        seen.append(session.prefill(TOKENS))
        session.set_user(bundle_adapter(onnx_bundle("fp32"), user))
        assert np.array_equal(session.prefill(TOKENS), seen[-1])
        assert len(session._adapters) <= 2
    assert not np.array_equal(*seen)


@pytest.mark.runtime
def test_an_adapter_of_another_model_is_refused_with_both_digests(
    session: OnnxSession, onnx_bundle: Bundles, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    stranger = tmp_path / "a.onnx_adapter"
    write_lora_onnx(tiny_lora(seed=9, base_digest="cd" * 32), stranger, inputs=read_inputs(onnx_bundle("fp32")))
    with pytest.raises(InputError, match=r"was fitted on the model cdcdcdc, model\.onnx is [0-9a-f]{7}"):
        session.set_user(stranger)


@pytest.mark.runtime
def test_the_tokenizer_is_that_of_the_model(session: OnnxSession, tiny_model: Path) -> None:
    from edgealign.models.load import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    for text in ("Hello  world\n", "naïve 🙂 日本", "<|im_start|>user\nhi<|im_end|>", ""):
        assert session.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    info = session.info()
    assert (info["runtime"], info["n_threads"], info["vocab"], info["eos"]) == ("onnxruntime", 1, 512, 7)
    assert info["model_size"] > 1_000_000


@pytest.mark.runtime
def test_a_full_context_is_an_error_and_a_reset_mends_it(onnx_bundle: Bundles) -> None:
    with closing(OnnxSession(onnx_bundle("fp32"), context=32, threads=1)) as session:
        with pytest.raises(UsageError, match="80 tokens: do not fit the context of 32"):
            session.prefill(TOKENS)
        session.prefill(TOKENS[:32])
        with pytest.raises(UsageError, match="33 tokens: do not fit"):
            session.step(1)
        session.reset()
        session.prefill(TOKENS[:32])
        for tokens in ([], [-1], [512]):
            with pytest.raises(UsageError):
                session.prefill(tokens)


@pytest.mark.runtime
def test_a_folder_without_its_config_or_with_a_broken_graph_is_one_line(onnx_bundle: Bundles, tmp_path: Path) -> None:
    shutil.copytree(onnx_bundle("fp32"), tmp_path / "b")
    (tmp_path / "b/model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="is not the file that was published"):
        OnnxSession(tmp_path / "b")
    with pytest.raises(InputError, match=r"onnxruntime 1\.\d+\.\d+ cannot open it"):
        OnnxSession(tmp_path / "b/model.onnx")
    (tmp_path / "b/genai_config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(InputError, match=r"genai_config\.json: is missing or damaged"):
        OnnxSession(tmp_path / "b/model.onnx")
    (tmp_path / "b/adapter_inputs.json").unlink()
    with pytest.raises(ArtifactError, match=r"adapter_inputs\.json: is missing or damaged"):
        read_inputs(tmp_path / "b")
