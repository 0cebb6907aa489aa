"""A byte-level tokenizer with LFM2's markers and template, small enough to read its tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

SPECIAL = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
LFM2_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
NEWLINE = "\u010a"  # the byte as byte-level vocabularies spell it
WORDS = ("system", "user", "assistant", "tool")

MakeTokenizer = Callable[..., Any]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """`make_tokenizer(template, bos=..., split=True)`: role names and two newlines are a token, other bytes one each.

    `split=False` leaves out the splitting of words, so that tokens may reach across anything but special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(template: str = LFM2_TEMPLATE, *, bos: str | None = "<|startoftext|>", split: bool = True) -> Any:
        vocab = {token: number for number, token in enumerate(SPECIAL)}
        merges: list[tuple[str, str]] = []
        for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
            vocab[letter] = len(vocab)
        for word in WORDS:
            for end in range(2, len(word) + 1):
                if word[:end] not in vocab:
                    vocab[word[:end]] = len(vocab)
                    merges.append((word[: end - 1], word[end - 1]))
        vocab[NEWLINE * 2] = len(vocab)
        merges.append((NEWLINE, NEWLINE))
        raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
        raw.decoder = decoders.ByteLevel()
        if bos:
            raw.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, bos_token=bos, eos_token="<|im_end|>", pad_token="<|pad|>",
            additional_special_tokens=[token for token in SPECIAL if token not in (bos, "<|im_end|>", "<|pad|>")],
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> Any:
    return make_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`write_jsonl(rows, name="rows.jsonl")`: dictionaries are dumped, text and bytes are written as they are."""

    def write(rows: Sequence[Mapping[str, Any] | str | bytes], name: str = "rows.jsonl") -> Path:
        lines = [
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() + b"\n"
            for row in rows
        ]
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"".join(lines)) if name.endswith(".gz") else b"".join(lines))
        return path

    return write
