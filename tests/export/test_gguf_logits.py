"""llama.cpp computes torch's numbers from the converted files, in every architecture, with and without adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgealign.artifact import open_artifact
from edgealign.errors import InputError
from edgealign.models.load import load_tokenizer
from edgealign.runtimes.gguf_adapter import write_lora_gguf
from edgealign.runtimes.session import open_session, score

pytestmark = pytest.mark.runtime
SmallModel = Callable[[str], Path]
TOLERANCE = 1e-4
TEXT = "Hello! How are you today? It isn't far: 15 minutes, 240 boats.\n\nGrüße, 東京 🙂"


def tolerance(name: str) -> float:
    """llama.cpp looks Gemma's GELU up in a table of 16-bit floats; everything else is exact."""
    return 2e-3 if name == "gemma3" else TOLERANCE




@pytest.fixture
def converted(small_model: SmallModel, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    from gguf_model import write_model

    def make(name: str) -> tuple[Path, Path]:
        model, file = small_model(name), tmp_path / "model.gguf"
        write_model(model, file, digest=open_artifact(model).digest)
        return model, file

    return make


def logits(path: Path, tokens: list[int], adapter: Path | None = None) -> np.ndarray:
    options = {"exact": True, "context": 128} if path.suffix == ".gguf" else {}
    with closing(open_session(path, threads=1, **options)) as session:
        if adapter is not None:
            session.set_user(adapter)
        return score(session, tokens)


@pytest.mark.parametrize("name", ["lfm2", "lfm2-adjusted", "lfm2-moe", "llama", "llama-untied", "qwen3", "gemma3"])
def test_the_logits_are_torchs(name: str, converted: Callable[[str], tuple[Path, Path]]) -> None:
    model, file = converted(name)
    tokens = load_tokenizer(model)(TEXT).input_ids[:60]
    assert np.abs(logits(file, tokens) - logits(model, tokens)).max() <= tolerance(name)


@pytest.mark.parametrize("name", ["lfm2", "llama", "qwen3", "gemma3"])
def test_an_adapter_moves_the_logits_as_in_torch(
    name: str, converted: Callable[[str], tuple[Path, Path]], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    model, file = converted(name)
    adapter = tiny_lora(seed=7, base=model, strength=0.2)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_lora_gguf(adapter, tmp_path / "user.gguf", base_config=config)
    tokens = load_tokenizer(model)(TEXT).input_ids[:40]
    expected = logits(model, tokens, adapter)
    assert np.abs(expected - logits(model, tokens)).max() > 100 * TOLERANCE
    assert np.abs(logits(file, tokens, tmp_path / "user.gguf") - expected).max() <= tolerance(name)


def test_a_session_refuses_an_adapter_of_another_base(
    converted: Callable[[str], tuple[Path, Path]], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    model, file = converted("lfm2")
    stranger = tiny_lora(seed=7, base=model, base_digest="ef" * 32)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_lora_gguf(stranger, tmp_path / "user.gguf", base_config=config)
    with pytest.raises(InputError, match="was fitted on the model efefefefefef"):
        logits(file, [1, 5, 9], tmp_path / "user.gguf")


def test_llama_cpp_cuts_text_into_the_same_tokens(tiny_model: Path, tmp_path: Path) -> None:
    from gguf_model import write_model
    from hypothesis import given, settings
    from hypothesis import strategies as st

    write_model(tiny_model, tmp_path / "model.gguf", digest="d" * 64)
    tokenizer = load_tokenizer(tiny_model)
    alphabet = st.one_of(st.characters(codec="utf-8", exclude_characters="\0"), st.sampled_from("aeis '\n\r\t019.,<|>"))
    with closing(open_session(tmp_path / "model.gguf", threads=1, exact=True, context=64)) as session:

        @settings(max_examples=300, deadline=None, database=None, derandomize=True)
        @given(st.text(alphabet, max_size=40))
        def agree(text: str) -> None:
            assert session.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids

        agree()
        for text in (TEXT, "we've I'LL they'd", "  two  spaces ", "\r\n\r\n x", "<|im_start|>user\nhi<|im_end|>\n"):
            assert session.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids, text
