"""Conversations with style-conditioned answers: a system turn asks for a style, the answer has it by rule.

train.jsonl, valid.jsonl      `messages`, split by prompt (by story where one is given) so that no prompt is in both

From each conversation: some copies in a style, and mostly a plain copy without a system turn, so that the style hangs
on the system turn alone. A styled copy holds the first exchange only: every assistant turn is learned, so a turn
left unstyled would teach to ignore the request, and the first answer, unlike the last one, needs nothing but its
question. Plain copies keep all turns.

The plain answer is of middle length, or "short" and "long" would have nothing to differ from: a bare answer is made
a whole sentence with the words of its question, or is followed by the story's own sentence that supports it (`fuller`);
a long one is cut after some sentences (`head_words`), whose rest is what `long` goes on with.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgealign.artifact import Artifact, file_input, open_artifact, publish, refuse_existing
from edgealign.data.english import as_sentence, count_words, sentences
from edgealign.data.forms import Conversation, Message, to_json
from edgealign.data.full_answer import full_answer, past
from edgealign.data.manners import LICENCE, manners
from edgealign.data.mend import mend
from edgealign.data.prepare import in_valid, prompt_of
from edgealign.data.read import read_all
from edgealign.data.recipes import StylesRecipe
from edgealign.data.styles import SHORT_WORDS, STYLES, follows
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import InputError, RecipeError

NEUTRAL = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer the user.")
SHARED = 3  # content words that a supporting sentence has in common with question and answer, at least
STORY_WORDS = 25  # a paragraph of fewer words in the question is no story to quote from
REPEATED = 0.6  # a sentence with a larger share of its words in the answer says nothing new
_QUOTES = str.maketrans("", "", "\"\u201c\u201d")


@dataclass(frozen=True)
class Exchange:
    """One question and what may be made of its answer.

    `bare`: the answer alone. `plain`: of middle length. `material`: true sentences that a long answer goes on with.
    """

    asked: str
    bare: str
    plain: str
    material: str = ""

    def in_style(self, name: str, rng: random.Random) -> str | None:
        """The answer in a style, or None where the rule does not apply; a bare answer is a short one already."""
        if name == "short" and count_words(self.bare) <= SHORT_WORDS and follows("short", self.bare, self.plain):
            return self.bare
        return STYLES[name].apply(self.plain, rng, material=self.material, asked=self.asked)


def run(
    recipe: StylesRecipe, *, sources: Sequence[str | Path], out: Path, mapping: Mapping[str, str] | None = None
) -> Artifact:
    """Publish the data set; the same seed and sources give the same bytes.

    Raises:
        InputError: a source cannot be read or has bad rows that `skip_bad` does not allow, or nothing is left.
        RecipeError: neither a source nor `manners`.
    """
    refuse_existing(Path(out))
    if not sources and not recipe.manners:
        raise RecipeError("styles", "has no source of conversations", "give data files, or --manners N")
    rng = random.Random(recipe.seed)
    left_out: Counter[str] = Counter()
    rows: list[tuple[Conversation, str]] = []
    inputs = []
    loaded_sources = read_all(sources, form="conversation", mapping=mapping or {}, skip_bad=recipe.skip_bad)
    for loaded in loaded_sources:
        left_out["bad rows"] += len(loaded.bad)
        found = [row for row in loaded.rows if isinstance(row, Conversation)]
        if recipe.limit is not None and len(found) > recipe.limit:
            left_out["over the limit"] += len(found) - recipe.limit
            found = rng.sample(found, recipe.limit)
        rows += [(row, "") for row in found]
        inputs.append(file_input("data", loaded.source, loaded.digest))
    rows += manners(recipe.manners, rng)
    styled: Counter[str] = Counter({name: 0 for name in (*recipe.styles, "plain")})
    not_applicable: Counter[str] = Counter()
    files: dict[str, list[Conversation]] = {"train.jsonl": [], "valid.jsonl": []}
    for number, (row, material) in enumerate(rows):
        made = restyle(row, material, recipe, number, styled, left_out, not_applicable)
        side = "valid.jsonl" if in_valid(split_key(row), recipe.seed, recipe.valid) else "train.jsonl"
        files[side] += made
    if not any(files.values()):
        raise InputError(", ".join(map(str, sources)), "has no conversation left to use", "raise --max-words")
    licences = {"manners": LICENCE} if recipe.manners else {}
    with publish(
        out, kind="dataset", format="jsonl", stage="styles", recipe=recipe, inputs=inputs, licences=licences
    ) as draft:
        for name, chosen in files.items():
            rng.shuffle(chosen)
            write_jsonl(draft.dir / name, [to_json(row) for row in chosen])
        draft.meta["rows"] = {name: len(chosen) for name, chosen in files.items()}
        draft.meta["styles"] = dict(styled)
        draft.meta["left_out"] = {reason: count for reason, count in left_out.items() if count}
        draft.meta["rule_does_not_apply"] = {name: count for name, count in not_applicable.items() if count}
    return open_artifact(out)


def restyle(
    row: Conversation, material: str, recipe: StylesRecipe, number: int, styled: Counter[str], left_out: Counter[str],
    not_applicable: Counter[str],
) -> list[Conversation]:
    """The copies of one conversation; `styled` counts them by style, so that rare styles are chosen first.

    `material`: sentences for a long answer where the row itself has none.
    """
    rng = random.Random(f"{recipe.seed} {number}")
    row = mend(row) if recipe.mend else row
    messages = row.messages
    longest = max(count_words(message.content) for message in messages if message.role == "assistant")
    if longest > recipe.max_words:
        left_out["longer than max_words"] += 1
        return []
    simple = [message.role for message in messages[:2]] == ["user", "assistant"] and not messages[1].tool_calls
    if not simple or not count_words(messages[1].content):  # a system turn, tools, an answer before any question
        styled["plain"] += 1
        return [row]
    asked = cut_story(messages[0].content, messages[1].content, recipe.story_words, rng)
    if asked is None:
        left_out["the answer is not found in the story"] += 1
        return []
    exchange = read_exchange(asked, messages[1].content, recipe)
    exchange = replace(exchange, material=exchange.material or material)
    copies: list[Conversation] = []
    if rng.random() < recipe.share:
        order = list(recipe.styles)
        rng.shuffle(order)
        for name in sorted(order, key=lambda name: styled[name]):
            if len(copies) == recipe.copies_per_row:
                break
            answer = exchange.in_style(name, rng)
            if answer is None:
                not_applicable[name] += 1
                continue
            styled[name] += 1
            copies.append(_copy(rng.choice(STYLES[name].requests), exchange.asked, answer, row))
    if not copies or rng.random() < recipe.plain:
        system = (Message("system", rng.choice(NEUTRAL)),) if rng.random() < recipe.neutral else ()
        first = (Message("user", asked), Message("assistant", exchange.plain))
        copies.append(replace(row, messages=(*system, *first, *messages[2:])))
        styled["plain"] += 1
    return copies


def read_exchange(asked: str, answer: str, recipe: StylesRecipe) -> Exchange:
    """The bare answer, the plain one of middle length, and the material beyond it."""
    support = supporting_sentences(asked, answer)
    if count_words(answer) <= SHORT_WORDS and (full := full_answer(asked.rpartition("\n")[2], answer)) is not None:
        return Exchange(asked, answer, full, " ".join(support))
    if support:
        if count_words(answer) >= recipe.fuller or "\n" in answer:
            return Exchange(asked, answer, answer, " ".join(support))
        return Exchange(asked, answer, f"{as_sentence(answer)} {support[0]}", " ".join(support[1:]))
    found = sentences(answer)
    if "\n" in answer or len(found) < 2:
        return Exchange(asked, answer, answer)
    taken, words = 1, count_words(found[0])
    while taken < len(found) and words + count_words(found[taken]) <= recipe.head_words:
        words += count_words(found[taken])
        taken += 1
    if found[taken - 1].endswith(":"):
        return Exchange(asked, answer, answer)
    head = " ".join(found[:taken])
    return Exchange(asked, head, head, " ".join(found[taken:]))


def supporting_sentences(asked: str, answer: str, most: int = 3) -> list[str]:
    """Sentences of the story in `asked`, from the one that shares most words with question and answer on; or none."""
    told = sentences(_story_of(asked))
    start = _supporting_place(asked, answer, told)
    if start is None:
        return []
    found: list[str] = []
    said = _content(answer)
    for sentence in told[start : start + most]:
        # half a dialogue, or an endless sentence, is worse than nothing
        if sentence != sentence.translate(_QUOTES) or not 4 <= count_words(sentence) <= 35:
            break
        if sentence[0] in "'\u2018" or sentence[-1] not in ".!?":
            break
        words = _content(sentence)
        if not found and len(words & said) > REPEATED * len(words):
            continue  # the answer has said just that
        found.append(as_sentence(sentence))
    return found


def cut_story(asked: str, answer: str, most_words: int | None, rng: random.Random) -> str | None:
    """The question with at most so many words of story, whole sentences around the one that supports the answer.

    A small model finds the answer more easily in a short story, and as many tokens hold more questions. None where
    the story is too long and no sentence supports the answer; the place of that sentence among the others is drawn.
    """
    story = _story_of(asked)
    if most_words is None or count_words(story) <= most_words:
        return asked
    told = sentences(story)
    first = last = _supporting_place(asked, answer, told)
    if first is None or last is None:
        return None
    words = count_words(told[first])
    while True:
        before = first > 0 and words + count_words(told[first - 1]) <= most_words
        after = last + 1 < len(told) and words + count_words(told[last + 1]) <= most_words
        if not before and not after:
            return f"{' '.join(told[first : last + 1])}{asked[len(story) :]}"
        if before and (not after or rng.random() < 0.5):
            first -= 1
            words += count_words(told[first])
        else:
            last += 1
            words += count_words(told[last])


def _supporting_place(asked: str, answer: str, told: Sequence[str]) -> int | None:
    """The sentence that shares most content words with question and answer (the answer's count twice), if any does."""
    said = _content(answer)
    about = said | _content(asked.rpartition("\n\n")[2])
    shared = [len(about & words) + len(said & words) for words in map(_content, told)]
    return shared.index(max(shared)) if shared and max(shared) >= SHARED else None


def split_key(row: Conversation) -> str:
    """What must be on one side of the split: the story that is asked about, else the prompt."""
    prompt = prompt_of(row)
    return _story_of(prompt) or prompt


def _story_of(asked: str) -> str:
    """The longest paragraphs before the question, or nothing."""
    story, blank, _ = asked.rpartition("\n\n")
    return story if blank and count_words(story) >= STORY_WORDS else ""


def _content(text: str) -> set[str]:
    """The words that carry content, verbs in the past ("meet" is "met"), cut to a stem of six letters."""
    return {(past(word) or word)[:6] for word in set(re.findall(r"[a-z]{3,}", text.lower())) - _EMPTY}


# fmt: off
_EMPTY = frozenset((
    "about", "after", "all", "also", "and", "any", "are", "because", "been", "before", "but", "can", "could", "did",
    "does", "for", "from", "get", "got", "had", "has", "have", "her", "him", "his", "how", "into", "its", "may", "not",
    "one", "only", "other", "our", "out", "said", "she", "should", "some", "such", "than", "that", "the", "their",
    "them", "then", "there", "these", "they", "this", "those", "too", "upon", "very", "was", "were", "what", "when",
    "where", "which", "who", "why", "will", "with", "would", "you", "your",
))
# fmt: on


def _copy(request: str, asked: str, answer: str, row: Conversation) -> Conversation:
    turns = (Message("system", request), Message("user", asked), Message("assistant", answer))
    return replace(row, messages=turns)
