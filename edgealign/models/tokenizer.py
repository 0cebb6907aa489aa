"""A byte-level BPE tokenizer in LFM2's layout, trained on given text, and its ChatML template.

The special tokens stand at the ids that LFM2 gives them; the text is split by the Llama 3 expression, which LFM2
uses too, so llama.cpp's `lfm2` pre-tokenizer cuts the same text in the same places. A vocabulary that came out
smaller than the model's embedding is filled with `<|reserved_N|>` entries: no merge leads to them, so no text
ever encodes to one, and every row of the embedding has a name (a GGUF file needs one per row).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgealign.errors import InputError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>",
    "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|tool_response_start|>", "<|tool_response_end|>",
)  # ids 0 to 13
RESERVED = "<|reserved_{}|>"
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # the specials and every byte

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for turn in messages -%}
    {%- if turn.role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('a turn has the unknown role ' ~ turn.role) -}}
    {%- endif -%}
    {%- if turn.role == 'system' and not loop.first -%}
        {{- raise_exception('the system turn must come first') -}}
    {%- endif -%}
    {%- if turn.tool_calls -%}
        {{- raise_exception('this template has no tool calls: put the call into the content') -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

BUILT_IN_TEXT = """\
A small model on your own machine can still be a good companion. You ask a question, and the answer comes back while
you are still thinking about the next one. It writes a note to a friend, it makes a list of things to buy, it tells
you how to cook rice, how to water a plant, how to plan a weekend in the hills. It does not know everything, and it
should say so. When the answer is short, that is often a kindness: one sentence, one number, one clear next step. When
the answer is long, it should still be easy to read. Some people like bullet points, others like flowing prose; some
want a formal letter, others a casual hello. That is why it listens to what you choose.

Hello! How are you today? I'm fine, thanks. What's the plan for this morning? First we'll have breakfast, then we'll
walk to the market and look for apples, bread, cheese and some flowers. It isn't far, about 15 minutes. Don't forget
the umbrella: they've said that it could rain at 11 o'clock. If it does, we can wait in the library, where it is warm
and quiet, and read the newspapers. In the afternoon there is time for the garden, for music, or for a game of chess.

- Read the question twice before you answer it.
- Give the most important point first.
- Use simple words, and explain the ones that are not simple.
- Stop when you have said enough.

Dear Sir or Madam, thank you for your letter of 3 March. We are pleased to confirm that your order has been received
and will be sent within 2 working days. Please let us know if anything is missing. Yours faithfully, the shop.

Once upon a time there was a girl who lived by a river. Every day she counted the boats, and every evening she wrote
the number in a book: 12 boats, 7 boats, 240 boats on the day of the fair. One winter the river froze and no boats
came at all. So she wrote down the names of the birds that walked on the ice instead, and that was the better book.
"""


def train_tokenizer(text: Sequence[Path], *, vocab_size: int, context: int, max_bytes: int) -> PreTrainedTokenizerFast:
    """Train on files (or on a built-in page of text when there are none) and fill up to `vocab_size`.

    Raises:
        InputError: a file is missing, is not UTF-8 text or JSONL, or holds no text; the vocabulary is too small.
    """
    from tokenizers import Tokenizer, decoders, models, processors, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            vocab_size, f"is too small a vocabulary: the bytes and special tokens take {SMALLEST_VOCABULARY}",
            "raise vocab_size",
        )
    raw = Tokenizer(models.BPE(ignore_merges=True))
    raw.pre_tokenizer = _pre_tokenizer()
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=_byte_alphabet(),
        min_frequency=2, show_progress=False,
    )
    raw.train_from_iterator(read_texts(text, max_bytes) if text else iter([BUILT_IN_TEXT]), trainer)
    raw = Tokenizer.from_str(_fill(raw.to_str(), vocab_size))
    bos = SPECIAL_TOKENS[1]
    raw.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 1)]
    )
    return _wrap(raw, context)


def read_texts(files: Sequence[Path], max_bytes: int) -> Iterator[str]:
    """The text of all files line by line, cut after `max_bytes`; of JSONL rows every string value.

    Raises:
        InputError: a file is missing, is not UTF-8 text or JSONL, or all of them are empty.
    """
    left, any_text = max_bytes, False
    for file in files:
        for piece in _pieces(Path(file)):
            if left <= 0:
                return
            any_text = any_text or bool(piece.strip())
            yield piece
            left -= len(piece.encode("utf-8", errors="replace"))
    if not any_text:
        raise InputError(", ".join(map(str, files)), "holds no text", "give a file of plain text or JSONL")


def _wrap(raw: object, context: int) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL_TOKENS[1], eos_token=SPECIAL_TOKENS[7], pad_token=SPECIAL_TOKENS[0],
        model_max_length=context, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _pre_tokenizer() -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _fill(tokenizer_json: str, vocab_size: int) -> str:
    """Name the rows that training left over."""
    parsed = json.loads(tokenizer_json)
    vocab = parsed["model"]["vocab"]
    for number, row in enumerate(range(len(vocab), vocab_size)):
        vocab[RESERVED.format(number)] = row
    return json.dumps(parsed, ensure_ascii=False)


def _pieces(file: Path) -> Iterator[str]:
    name = file.name.removesuffix(".gz")
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not name.endswith((".jsonl", ".ndjson")):
                    yield line
                elif line.strip():
                    yield from _strings(_row(line, file, number))
    except UnicodeDecodeError as error:
        raise InputError(file, "is not UTF-8 text", "give plain text or JSONL") from error
    except OSError as error:
        raise InputError(file, f"cannot be read ({error.strerror or error})", "give an existing text file") from error


def _row(line: str, file: Path, number: int) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{file}:{number}", "is not JSON", f"check it with: edgealign data check {file}") from error


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
