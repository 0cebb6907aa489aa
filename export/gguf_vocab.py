"""A Hugging Face tokenizer as GGUF metadata: tokens, their types, merges, the splitting rule, special ids, template.

Only byte-level BPE with a splitting rule that llama.cpp has by name is written; anything else is refused, because
llama.cpp would cut the same text into other tokens and nobody would notice. Source: llama.cpp src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgealign.errors import InputError
from edgealign.models.lint import rendered_end_of_turn
from edgealign.models.load import load_tokenizer
from edgealign.models.tokenizer import LLAMA3_SPLIT

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
RESERVED = re.compile(r"<\|reserved_\d+\|>")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
REGEX, BYTES, GPT2_BYTES, DIGITS = "split", "bytes", "gpt2 bytes", "digits"

# What the pre-tokenizer does, step by step -> llama.cpp's name for it. Its lfm2 rule is the Llama 3 rule.
SPLITTING_RULES: dict[tuple[tuple[str, ...], ...], str] = {
    ((REGEX, LLAMA3_SPLIT), (BYTES,)): "llama-bpe",
    ((REGEX, QWEN2_SPLIT), (BYTES,)): "qwen2",
    ((DIGITS,), (GPT2_BYTES,)): "smollm",
    ((GPT2_BYTES,),): "gpt-2",
}
WHOLE_WORDS = ("lfm2", "llama-bpe")  # rules with which llama.cpp takes a word that is a token whole (ignore_merges)


@dataclass(frozen=True)
class Vocab:
    """Everything the file says about the tokenizer."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    rule: str
    bos: int | None
    eos: int | None
    pad: int | None
    adds_bos: bool
    template: str | None


def read_vocab(folder: Path, *, rows: int, arch: str) -> Vocab:
    """Read a model's tokenizer for a GGUF file with `rows` embedding rows.

    Raises:
        InputError: no byte-level BPE, an unknown splitting rule, or more tokens than rows.
    """
    tokenizer = load_tokenizer(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(folder, "has no tokenizer.json", "save its tokenizer with transformers first")
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = raw["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise InputError(file, "is no byte-level BPE, the only kind that is exported", "use such a tokenizer")
    rule = _rule(file, raw, arch)
    tokens, types = _tokens(file, raw, rows)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    eos = rendered_end_of_turn(tokenizer) if template else tokenizer.eos_token_id
    bos = tokenizer.bos_token_id
    return Vocab(
        tokens=tokens,
        types=types,
        merges=tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]),
        rule=rule,
        bos=bos,
        eos=eos if eos is not None else tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        adds_bos=bos is not None and list(tokenizer("a").input_ids[:1]) == [bos],
        template=template,
    )


def add_vocab(writer: Any, vocab: Vocab) -> None:
    """Write the metadata keys with a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.rule)
    writer.add_token_list(list(vocab.tokens))
    writer.add_token_types(list(vocab.types))
    writer.add_token_merges(list(vocab.merges))
    if vocab.bos is not None:
        writer.add_bos_token_id(vocab.bos)
    if vocab.eos is not None:
        writer.add_eos_token_id(vocab.eos)
    if vocab.pad is not None:
        writer.add_pad_token_id(vocab.pad)
    writer.add_add_bos_token(vocab.adds_bos)
    if vocab.template:
        writer.add_chat_template(vocab.template)


def _tokens(file: Path, raw: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """One token and type per embedding row; rows without a token get an unused one."""
    tokens: list[str | None] = [None] * rows
    types = [UNUSED] * rows
    added = {int(entry["id"]): entry for entry in raw.get("added_tokens", [])}
    ids = {**{int(number): text for text, number in raw["model"]["vocab"].items()},
           **{number: entry["content"] for number, entry in added.items()}}  # fmt: skip
    if ids and max(ids) >= rows:
        raise InputError(
            file, f"has a token {max(ids)}, the embedding only {rows} rows", "resize the embedding or fix the tokenizer"
        )
    for number, text in ids.items():
        tokens[number] = text
        if number in added:
            types[number] = CONTROL if added[number].get("special") else USER_DEFINED
        elif not RESERVED.fullmatch(text):
            types[number] = NORMAL
    named = [text if text is not None else f"[PAD{number}]" for number, text in enumerate(tokens)]
    return tuple(named), tuple(types)


def _rule(file: Path, raw: dict[str, Any], arch: str) -> str:
    steps = tuple(_steps(raw.get("pre_tokenizer") or {}))
    rule = SPLITTING_RULES.get(steps)
    if rule is None:
        raise InputError(
            file, "splits text by a rule that llama.cpp is not known to have",
            f"known rules: {', '.join(SPLITTING_RULES.values())}",
        )
    if rule == "llama-bpe" and arch.startswith("lfm2"):
        rule = "lfm2"
    normalizer = (raw.get("normalizer") or {}).get("type")
    if normalizer is not None and (normalizer, rule) != ("NFC", "qwen2"):
        raise InputError(file, f"normalizes text ({normalizer}), llama.cpp does not", "use a tokenizer without")
    if bool(raw["model"].get("ignore_merges")) != (rule in WHOLE_WORDS):
        raise InputError(
            file, f"has ignore_merges {bool(raw['model'].get('ignore_merges'))}, which is not llama.cpp's {rule} rule",
            "train the tokenizer with: edgealign init",
        )
    return rule


def _steps(pre: dict[str, Any]) -> list[tuple[str, ...]]:
    kind = pre.get("type")
    if kind == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    if kind == "Split" and str(pre.get("behavior")).lower() == "isolated" and not pre.get("invert"):
        return [(REGEX, str(pre["pattern"].get("Regex")))]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return [(GPT2_BYTES,) if pre.get("use_regex", True) else (BYTES,)]
    if kind == "Digits" and pre.get("individual_digits"):
        return [(DIGITS,)]
    return [("other",)]
