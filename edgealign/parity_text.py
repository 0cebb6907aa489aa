"""Before any logit: the bundle must render the same template and see the same token ids.

Most "works in torch, wrong after export" reports come from here: another chat template, another end-of-turn id,
another way to split text. The strings below hold what tokenizers differ on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Check
from edgealign.models.load import load_tokenizer

CONVERSATIONS: Sequence[Sequence[dict[str, str]]] = (
    ({"role": "user", "content": "What keeps bread fresh?"},),
    (
        {"role": "system", "content": "Answer in one sentence.\nBe kind."},
        {"role": "user", "content": "  Two spaces, a tab\tand quotes: 'single', \"double\"  "},
        {"role": "assistant", "content": "Fine: 3,141.59 at 7:05 — naïve café, ½ of 一二三 🙂👩‍👩‍👧."},
        {"role": "user", "content": "{{ braces }} <b>&amp;</b> <|im_end|>?"},
    ),
)
STRINGS: Sequence[str] = (
    "Hello world",
    " leading and trailing ",
    "a  b   c    d\t\te\n\n\nf \n g\r\nh",
    "It's we'll THEY'RE I'm you'd O'Neill",
    "0 12 345 6789 1234567890 3.14 1e-5 0x1F 12:30",
    "def f(x):\n    return x ** 2  # square\n",
    "naïve façade Ærø straße Ελλάδα Москва עברית العربية हिन्दी",
    "日本語と中文和한국어 mixed, no spaces",
    "🙂 👩‍👩‍👧 🇩🇰 e\u0301 \u200bzero\u00a0width",
    "<|im_start|>user\nspecial<|im_end|>\n<|startoftext|>text<|pad|>",
    "[brackets] {braces} <tags/> \\back\\slash \"quotes\" `ticks` $%^&*",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!????....----____",
    "",
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


def check_text(bundle_dir: Path, model: str | Path, tokenize: Callable[[str], list[int]], facts: Any) -> list[Check]:
    """Template, token ids and special ids of a bundle against the model's own tokenizer.

    Args:
        tokenize: the runtime's own tokenizer, no special token added.
        facts: the runtime's `info()`: `chat_template`, `bos`, `eos`.
    """
    ours, theirs = load_tokenizer(model), load_tokenizer(bundle_dir)
    return [
        *_check_template(ours, theirs, facts.get("chat_template")),
        _check_ids(ours, tokenize),
        _check_end(ours, model, int(facts["eos"])),
    ]


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


def _check_template(ours: Any, theirs: Any, embedded: str | None) -> list[Check]:
    if not ours.chat_template:
        bad = bool(theirs.chat_template) or bool(embedded)
        return [Check("template.rendered", float(bad), 0.0, not bad, "the model has no chat template")]
    different = sum(_render(ours, turns, open_end) != _render(theirs, turns, open_end) for turns, open_end in _cases())
    same = embedded is not None and embedded == ours.chat_template
    rendered = "conversations that the bundle renders otherwise"
    inside = "the template inside the model file is the model's own"
    return [
        Check("template.rendered", float(different), 0.0, different == 0, rendered),
        Check("template.embedded", float(not same), 0.0, same, inside),
    ]


def _cases() -> list[tuple[Sequence[dict[str, str]], bool]]:
    return [(turns, open_end) for turns in CONVERSATIONS for open_end in (True, False)]


def _render(tokenizer: Any, turns: Sequence[dict[str, str]], open_end: bool) -> str | None:
    if not tokenizer.chat_template:
        return None
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=open_end))


def _check_ids(ours: Any, tokenize: Callable[[str], list[int]]) -> Check:
    texts = [*STRINGS, *PROBE_TEXT.split("\n\n")]
    if ours.chat_template:
        texts += [text for turns, open_end in _cases() if (text := _render(ours, turns, open_end))]
    wrong = [text for text in texts if tokenize(text) != list(ours(text, add_special_tokens=False)["input_ids"])]
    note = f"texts of {len(texts)} with other token ids" + (f", first {wrong[0][:30]!r}" if wrong else "")
    return Check("tokens.ids", float(len(wrong)), 0.0, not wrong, note)


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
