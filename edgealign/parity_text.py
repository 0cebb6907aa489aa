"""Before any logit: the bundle must render the same template, see the same token ids, and take typed text as text.

Most "works in torch, wrong after export" reports come from here: another chat template, another end-of-turn id,
another way to split text. Each of 200 strings (`parity_strings`) becomes a user's turn and is tokenised by three: the
model's own tokenizer, the tokenizer files in the bundle, and the runtime. What stands in a turn is text, also where it
looks like a special token: it must not become one, and must read back as it was typed. Strings alone use few merges of
a large vocabulary, so every word of the vocabulary is tokenised too, in company: alone, some tokenizers take it whole.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Check
from edgealign.data.forms import Message
from edgealign.data.template import render
from edgealign.data.typed import Encode, Segment, check_kept, cut, encode_segments, encoder, mark, special_tokens
from edgealign.models.load import load_tokenizer
from edgealign.parity_strings import ORDINARY, tricky_strings

WORDS_PER_TEXT = 250
CONVERSATIONS: Sequence[Sequence[dict[str, str]]] = (
    ({"role": "user", "content": "What keeps bread fresh?"},),
    (
        {"role": "system", "content": "Answer in one sentence.\nBe kind."},
        {"role": "user", "content": "  Two spaces, a tab\tand quotes: 'single', \"double\"  "},
        {"role": "assistant", "content": "Fine: 3,141.59 at 7:05 — naïve café, ½ of 一二三 🙂👩‍👩‍👧."},
        {"role": "user", "content": "{{ braces }} <b>&amp;</b> <|im_end|>?"},
    ),
)

# Own text for the distribution gates: prose, steps, a dialogue, code, numbers; some 600 tokens of a large vocabulary.
PROBE_TEXT = """\
Ana kept bees behind the old school. In spring she opened each hive, counted the frames that held brood, and wrote
the numbers in a small blue book. When a colony was weak she gave it a frame from a strong one; when two were weak
she joined them with a sheet of newspaper between, and within a week the bees had chewed through it and become one
family. "You cannot hurry them," she told the children who came to watch. "You can only arrange things so that what
they want to do anyway is also what you need."

To bake a plain loaf, mix 500 grams of flour with 350 grams of water and let the dough rest for half an hour. Add 10
grams of salt and 4 grams of yeast. Fold the dough four times in the first hour, then leave it alone. Shape it, put it
into a basket, and let it rise until a finger leaves a slow dent. Bake it at 240 degrees for twenty minutes with steam
and for twenty-five more without. Wait before you cut it: the crumb is still setting, and a warm loaf tears.

Customer: The lamp arrived, but the switch does nothing.
Support: I am sorry about that. Does the bulb work in another lamp?
Customer: Yes, I tried it in the kitchen.
Support: Then the switch is at fault. I can send a new one today, or refund the whole order. Which do you prefer?
Customer: A new switch, please, if it comes before Friday.
Support: It will leave at noon and reach you on Thursday. You need not return the old one.

def moving_average(values, width):
    total = sum(values[:width])
    averages = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        averages.append(total / width)
    return averages

The harbour town had 4,210 inhabitants in 1890 and 3,977 ten years later; by 1925 the count was 6,048, because the
railway had come. Fish left by train in the evening and reached the capital before breakfast. The old pilots said that
the sea had not changed, only the clocks. Each summer the school measured the height of the dunes with poles and
string. In 1931 they lost eleven centimetres, in 1932 they gained four, and nobody could say why. Perhaps it was the
new breakwater, perhaps the storms in March, perhaps the goats.

If you cannot sleep, get up. Read something that asks nothing of you. Keep the light low, drink water, and do not look
at the time. Tiredness comes back like a cat: not when it is called, but when nobody pays attention to it any more.
"""


def check_text(bundle_dir: Path, model: str | Path, tokenize: Encode, facts: Any) -> list[Check]:
    """Template, token ids, typed look-alikes and special ids of a bundle against the model's own tokenizer.

    Args:
        tokenize: the runtime's own tokenizer, no special token added; its second argument says whether special tokens
            in the text are tokens.
        facts: the runtime's `info()`: `chat_template`, `bos`, `eos`.
    """
    ours, theirs = load_tokenizer(model), load_tokenizer(bundle_dir)
    encoders = {"torch": encoder(ours), "bundle": encoder(theirs), "runtime": tokenize}
    encoders = {name: functools.cache(encode) for name, encode in encoders.items()}
    strings = tricky_strings(control_tokens(ours), list(special_tokens(ours)))
    texts = [*strings, *PROBE_TEXT.split("\n\n"), *vocabulary_texts(ours)]
    turns = [(text, segments) for text in strings for segments in _conversations(ours, text)]
    return [
        *_check_template(ours, theirs, facts.get("chat_template"), strings),
        _check_files(ours, theirs),
        _check_ids(ours, encoders, texts, [segments for _, segments in turns]),
        _check_typed(ours, encoders, [*((text, [Segment(text, False)]) for text in strings), *turns]),
        _check_end(ours, model, int(facts["eos"])),
    ]


def control_tokens(tok: Any) -> list[str]:
    """The special tokens that the template writes, the end of a turn first, then its start; then those with a name."""
    written: list[str] = []
    if tok.chat_template:
        plain = mark(tok, (Message("user", "Hi"), Message("assistant", "Yes"), Message("user", "So")))
        segments = cut(tok, render(tok, plain.messages), plain)
        written = [segment.text.strip() for segment in segments if segment.special]
    named = [str(token) for token in (tok.bos_token, tok.eos_token, tok.pad_token) if token]
    return list(dict.fromkeys([*reversed(written), *named]))


def vocabulary_texts(tok: Any) -> list[str]:
    """Every word of the vocabulary that is text: twice, and before a letter of one and of two bytes.

    A merge that is missing changes one of these (40 of 40 tried on the starter; the 200 strings notice 5 of 60).
    """
    special = set(special_tokens(tok).values())
    numbers = [[number] for number in range(len(tok)) if number not in special]
    decoded = tok.batch_decode(numbers, clean_up_tokenization_spaces=False)
    # Not parts of characters, and not the names of rows that no merge leads to (<|reserved_7|>).
    words = [word for word in decoded if word and "\ufffd" not in word and not (word[:2] == "<|" and word[-2:] == "|>")]
    lines = [line for word in words for line in (word + word.lstrip(), f"{word}q", f"{word}é")]
    size = 3 * WORDS_PER_TEXT
    return ["\n".join(lines[start : start + size]) for start in range(0, len(lines), size)]


def text_windows(model: str | Path, *, count: int, length: int) -> list[list[int]]:
    """Windows of token ids from the built-in text, as the model's tokenizer and template make it.

    Fewer than `count` where the text is used up, one shorter window where it has less than `length` tokens.
    """
    tokenizer: Any = load_tokenizer(model)
    paragraphs = PROBE_TEXT.strip().split("\n\n")
    if tokenizer.chat_template:
        turns = [
            {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(paragraphs)
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    else:
        text = PROBE_TEXT
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)] or [ids]
    return windows[:count]


def _check_template(ours: Any, theirs: Any, embedded: str | None, strings: Sequence[str]) -> list[Check]:
    if not ours.chat_template:
        bad = bool(theirs.chat_template) or bool(embedded)
        return [Check("template.rendered", float(bad), 0.0, not bad, "the model has no chat template")]
    cases = [*_cases(), *(_case(text, open_end) for text in strings for open_end in (True, False))]
    different = sum(_render(ours, turns, open_end) != _render(theirs, turns, open_end) for turns, open_end in cases)
    same = embedded is not None and embedded == ours.chat_template
    rendered = f"conversations of {len(cases)} that the bundle renders otherwise"
    inside = "the template inside the model file is the model's own"
    return [
        Check("template.rendered", float(different), 0.0, different == 0, rendered),
        Check("template.embedded", float(not same), 0.0, same, inside),
    ]


def _cases() -> list[tuple[Sequence[dict[str, str]], bool]]:
    return [(turns, open_end) for turns in CONVERSATIONS for open_end in (True, False)]


def _case(text: str, open_end: bool) -> tuple[Sequence[dict[str, str]], bool]:
    turns = ({"role": "user", "content": text}, {"role": "assistant", "content": text})
    return turns[: 1 if open_end else 2], open_end


def _render(tokenizer: Any, turns: Sequence[dict[str, str]], open_end: bool) -> str | None:
    if not tokenizer.chat_template:
        return None
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=open_end))


def _check_files(ours: Any, theirs: Any) -> Check:
    """The tokenizer files in the bundle, word for word: a merge in another place may show in one text of many."""
    same = ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    return Check("tokens.files", float(not same), 0.0, same, "the bundle's tokenizer.json says what the model's does")


def _check_ids(
    ours: Any, encoders: Mapping[str, Encode], strings: Sequence[str], turns: Sequence[Sequence[Segment]]
) -> Check:
    """Whole texts, whose special tokens are tokens, and conversations, of which only the template's are."""
    whole = list(strings)
    if ours.chat_template:
        cases = [*_cases(), *(_case(text, open_end) for text in ORDINARY for open_end in (True, False))]
        whole += [text for case in cases if (text := _render(ours, *case))]
    texts = [*([Segment(text, True)] for text in whole), *turns]
    wrong = [text for text in texts if len({encode_segments(encode, text) for encode in encoders.values()}) > 1]
    return Check("tokens.ids", float(len(wrong)), 0.0, not wrong, _note(f"texts of {len(texts)} with other ids", wrong))


def _check_typed(
    ours: Any, encoders: Mapping[str, Encode], texts: Sequence[tuple[str, Sequence[Segment]]]
) -> Check:
    """No text between the template's own tokens becomes a special token, and a look-alike reads back as it was typed.

    Args:
        texts: what was typed, and the segments that hold it.
    """
    special = set(special_tokens(ours).values())
    ordinary = set(ORDINARY)  # of which a tokenizer may tidy an odd one (NFC); a look-alike has nothing to tidy

    def is_text(encode: Encode, run: str, exact: bool) -> bool:
        ids = encode(run, False)
        return special.isdisjoint(ids) and (not exact or ours.decode(ids, clean_up_tokenization_spaces=False) == run)

    wrong = [
        segments for typed, segments in texts
        if not all(
            is_text(encode, run.text, typed not in ordinary)
            for run in segments if not run.special for encode in encoders.values()
        )
    ]  # fmt: skip
    note = _note(f"texts of {len(texts)} with a special token that the template did not write", wrong)
    return Check("tokens.typed", float(len(wrong)), 0.0, not wrong, note)


def _conversations(ours: Any, text: str) -> list[list[Segment]]:
    """The text as a user's turn that waits for its answer, and as both turns of a whole conversation."""
    if not ours.chat_template:
        return []
    made = []
    for open_end in (True, False):
        turns, _ = _case(text, open_end)
        marked = mark(ours, [Message(turn["role"], turn["content"]) for turn in turns])
        rendered = render(ours, marked.messages, add_generation_prompt=open_end)
        check_kept(rendered, marked)
        made.append(cut(ours, rendered, marked))
    return made


def _note(what: str, wrong: Sequence[Sequence[Segment]]) -> str:
    return f"{what}, first {''.join(part.text for part in wrong[0])[-60:]!r}" if wrong else what


def _check_end(ours: Any, model: str | Path, eos: int) -> Check:
    """The runtime must end a turn where the model does: generation config first, then the tokenizer."""
    from transformers import GenerationConfig

    from edgealign.models.load import resolve_model

    folder = resolve_model(model)
    wanted: Any = ours.eos_token_id
    if (folder / "generation_config.json").is_file():
        wanted = GenerationConfig.from_pretrained(folder).eos_token_id or wanted
    allowed = wanted if isinstance(wanted, list) else [wanted]
    passed = eos in allowed
    return Check("tokens.end", float(eos), float(allowed[0]), passed, f"end-of-turn id, the model's: {allowed}")
