"""Small repairs of real rows that a small model should not learn from: broken lines, stray marks, bare fragments.

    mend(conversation)      every turn tidied, every answer a sentence
"""

from __future__ import annotations

import re
from dataclasses import replace

from edgealign.data.english import as_sentence
from edgealign.data.forms import Conversation, Message

WRAPPED = 50  # characters
_LIST = re.compile(r"\s*(?:[-*\u2022]|\d+[.)]|[a-zA-Z][.)])\s*\S")
_INLINE_LISTS = (
    (re.compile(r"(?:^|:\s+)-\s.+\s-\s"), r"-\s"),
    (re.compile(r"(?:^|:\s+)1[.)]\s.+\s2[.)]\s"), r"\d\d?[.)] "),
)
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_FINAL_NUMBER = re.compile(r"(?m)^#### ?(.+)$")
_LONE_I = re.compile(r"(?<![\w.'\u2019])i(?=['\u2019 ](?:m|am|ll|ve|d|was|have|do|did|think|like|love|can|will)\b)")
# fmt: off
_APOSTROPHES = {
    "im": "I'm", "ive": "I've", "dont": "don't", "didnt": "didn't", "doesnt": "doesn't", "isnt": "isn't",
    "cant": "can't", "wasnt": "wasn't", "arent": "aren't", "thats": "that's", "whats": "what's", "youre": "you're",
    "theyre": "they're", "couldnt": "couldn't", "wouldnt": "wouldn't", "havent": "haven't",
}
# fmt: on
_BARE = re.compile(rf"(?i)\b(?:{'|'.join(_APOSTROPHES)})\b")
_CODE = re.compile(r"```|(?m:^(?:    |\t)\S)|[{};]\s*$|</?\w+>")


def mend(row: Conversation) -> Conversation:
    """The row with tidy turns, its answers with a capital letter and an end mark; tool calls and code stay."""
    return replace(row, messages=tuple(_mended(message) for message in row.messages))


def tidy(text: str) -> str:
    """One kind of line end, prose on one line per paragraph, no spaces before commas; code is left alone.

    GSM8K's calculator marks `<<2*3=6>>` are left out and its "#### 6" is said in words.
    """
    if _CODE.search(text) or text.lstrip().startswith(("{", "[")):
        return text
    text = text.replace("\r\n", "\n")
    # a lone carriage return wraps a line in the middle of a sentence, two of them end a paragraph
    text = text.replace("\r\r", "\n\n").replace("\r", " ").replace("\u00a0", " ")
    text = _FINAL_NUMBER.sub(r"The answer is \1.", _CALCULATOR.sub("", text))
    if "\n" not in text.strip():  # a list whose line ends were lost on the way
        for inline, mark in _INLINE_LISTS:
            if inline.search(text):
                text = re.sub(rf"\s+(?={mark}\S)", "\n", text)
    paragraphs = [_joined(part) for part in re.split(r"\n\s*\n", text)]
    text = "\n\n".join(part for part in paragraphs if part)
    text = re.sub(r"``|(?<!')''(?!')", '"', text)
    text = re.sub(r"(?<=\w) (?=n't\b|'(?:s|re|ll|ve|m|d)\b)", "", text)  # the spaces of a tokenizer
    return re.sub(r"(?<=\w) +(?=[,.;:?!](?:\s|$))", "", text)


def _mended(message: Message) -> Message:
    if message.role not in ("user", "assistant") or message.tool_calls:
        return message
    content = tidy(message.content)
    if message.role == "assistant" and not _CODE.search(content):
        content = as_sentence(_BARE.sub(_with_apostrophe, _LONE_I.sub("I", content)))
    return replace(message, content=content if content.strip() else message.content)


def _with_apostrophe(found: re.Match[str]) -> str:
    word = _APOSTROPHES[found.group().lower()]
    return word[0].upper() + word[1:] if found.group()[0].isupper() else word


def _joined(paragraph: str) -> str:
    """The lines of a paragraph: list items stay lines of their own, the others are joined."""
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in paragraph.split("\n")]
    lines = [line for line in lines if line]
    joined: list[str] = []
    for line in lines:
        last = joined[-1] if joined else ":"
        # a short line without an end mark was meant to stand alone; a long one was wrapped
        alone = last.endswith(":") or (len(last) < WRAPPED and last[-1] not in ".!?,;")
        if alone or _LIST.match(line) or _LIST.match(last):
            joined.append(line)
        else:
            joined[-1] += f" {line}"
    return "\n".join(joined)
