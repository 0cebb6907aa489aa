"""Seven styles of answer, made by rule from a real answer, and measured by rule.

    style = STYLES["cheerful"]
    style.requests                  what a system turn says to ask for it
    style.apply(answer, rng)        the answer in that style, or None where the rule cannot do it
    style.measure(text)             larger means more of the style
    follows("cheerful", a, b)       whether a has more of it than b

Openers are short and each style keeps to its own marks, so that a model of a few million parameters can learn them.
Measures count marks, not marks per word: an answer does not lose its style by saying more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgealign.data.english import (
    as_sentence,
    contract,
    count_contractions,
    count_words,
    decapitalise,
    expand,
    sentences,
    topic,
)
from edgealign.data.phrases import (
    ASK_ABOUT,
    ASK_ANYTHING,
    CASUAL_CLOSERS,
    CASUAL_COMMAS,
    CASUAL_GREETINGS,
    CASUAL_OPENERS,
    CHEERFUL_CLOSERS,
    CHEERFUL_CLOSERS_ON_SAD,
    CHEERFUL_GREETINGS,
    CHEERFUL_ON_QUESTIONS,
    CHEERFUL_ON_SAD,
    CHEERFUL_ON_SAD_TALK,
    CHEERFUL_OPENERS,
    FORMAL_CLOSERS,
    FORMAL_COMMAS,
    FORMAL_GREETINGS,
    FORMAL_ON_TALK,
    FORMAL_OPENERS,
    LONG_BRIDGES,
    LONG_CLOSERS,
    LONG_OPENERS,
    REQUESTS,
)
from edgealign.personalize.attributes import CASUAL_WORDS, FORMAL_WORDS, bullet_share, words

__all__ = ["STYLES", "Style", "follows"]

SHORT_WORDS = 12  # the longest short answer
LONG_WORDS = 110  # a longer one would teach a small model to ramble
LISTED_WORDS = 4  # the longest item of "a, b and c"
# fmt: off
# words of the attribute lists that stand in any story ("one day", "would you", "an easy task") say nothing here
AMBIGUOUS = frozenset((
    "one", "should", "would", "remain", "trust", "service", "following", "proceed", "please", "thank", "recommend",
    "sure", "easy", "fun", "cool", "stuff",
))
FORMAL = (FORMAL_WORDS - AMBIGUOUS) | {"indeed", "pleased", "respectfully", "furthermore", "madam", "inform", "enquiry"}
CASUAL = (CASUAL_WORDS - AMBIGUOUS) | {"huh", "nope", "lol", "haha", "folks", "dude", "pal", "gist", "yup", "btw"}
CHEERFUL = frozenset((
    "yay", "hooray", "wonderful", "lovely", "delighted", "happy", "glad", "fantastic", "great", "love", "joy",
    "amazing", "brilliant", "marvellous", "wow", "super", "fun", "cheers",
))
SAD = re.compile(
    r"(?i)\b(?:die[ds]?|dead|death|kill\w*|murder\w*|weep\w*|wept|cr(?:y|ied|ying)|sad\w*|sorry|grief|hang(?:ed)?|"
    r"beat(?:en)?|hurt|pain|sick|ill|fear\w*|afraid|angry|cruel|war|drown\w*|lost|unfortunately|problem|wicked|devils?|witch|curse[ds]?|evil|poison\w*|enem(?:y|ies))\b"
)
# fmt: on
GREETING = re.compile(
    r"(?i)^(?:hello|hi|hey|howdy|good (?:day|morning|evening|afternoon))(?: there)?\b(?:\s*[,.!]+\s*|\s+(?=i\b)|\s*$)"
)
# said in a relaxed way, and how a formal answer says it
PLAINER: Sequence[tuple[str, str]] = (
    (r"\byeah\b|\byep\b|\byup\b", "yes"),
    (r"\bnope\b", "no"),
    (r"\bgonna\b", "going to"),
    (r"\bwanna\b", "want to"),
    (r"\bgotta\b", "have to"),
    (r"\bkinda\b", "rather"),
    (r"\bthanks\b(?! to\b)", "thank you"),
    (r"\bguys\b", "friends"),
    (r"\bkids\b", "children"),
    (r"\bokay\b|\bok\b", "very well"),
    (r",?\s*\b(?:lol|haha|hahaha)\b", ""),
)

class Apply(Protocol):
    """`material`: true sentences that a longer answer may go on with; `asked`: what the answer replies to."""

    def __call__(self, answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None: ...


@dataclass(frozen=True)
class Style:
    """A way to answer; `requests` are system turns that ask for it."""

    name: str
    requests: tuple[str, ...]
    apply: Apply
    measure: Callable[[str], float]


def follows(style: str, styled: str, plain: str) -> bool:
    """Whether `styled` has strictly more of the style than `plain`; an empty answer follows nothing."""
    measure = STYLES[style].measure
    return bool(styled.strip()) and measure(styled) > measure(plain)


def _surely(rule: Apply, measure: Callable[[str], float]) -> Apply:
    """The rule, held to its promise: what does not have more of the style than the answer is no result."""

    def apply(answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None:
        styled = rule(answer, rng, material=material, asked=asked)
        return styled if styled is not None and styled.strip() and measure(styled) > measure(answer) else None

    return apply


def _short(answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None:
    """The first sentence, or its first clause: at most SHORT_WORDS words, and fewer than the answer has."""
    found = sentences(answer)
    first = found[0] if found else ""
    if not _is_talk(asked):  # to "Hello!" a greeting is the whole answer
        first = GREETING.sub("", first)
    if not first and len(found) > 1:
        first = found[1]
    if count_words(first) > SHORT_WORDS:
        first = _first_clause(first)
    first = as_sentence(first)
    return first if 0 < count_words(first) < count_words(answer) else None


def _first_clause(sentence: str) -> str:
    """What stands before the first clause that can be left off, or nothing."""
    if re.match(r"(?i)(?:when|while|if|as|after|before|because|since|although|though|in|on|at|with)\b", sentence):
        return ""
    for match in re.finditer(r"; |, (?:and|but|so|which|who|where|because|as) | (?:because|although) | \(", sentence):
        clause = sentence[: match.start()]
        if 3 <= count_words(clause) <= SHORT_WORDS and clause.count('"') % 2 == 0 and clause.count("(") == 0:
            return clause
    return ""


def _long(answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None:
    """The answer between an opening and a closing, with real further material; needs material or two sentences."""
    if not count_words(answer):
        return None
    more = _within(sentences(material), LONG_WORDS - count_words(answer))
    if not more and (_is_talk(asked) or (count_words(answer) < 2 * SHORT_WORDS and len(sentences(answer)) < 2)):
        return None  # "Goodbye!" wants no long answer without anything to say
    glue = "\n" if "\n" in answer.strip() else " "
    parts = [rng.choice(LONG_OPENERS), as_sentence(answer)]
    if more:
        in_story = more[0].rstrip(".!?") in asked
        bridges = LONG_BRIDGES if in_story else [text for text in LONG_BRIDGES if "story" not in text]
        parts += [rng.choice(bridges), " ".join(more)]
    return glue.join([*parts, rng.choice(LONG_CLOSERS)])


def _within(found: Sequence[str], limit: int) -> list[str]:
    taken: list[str] = []
    for sentence in found:
        if count_words(sentence) < 2:  # the torn end of a text
            continue
        limit -= count_words(sentence)
        if limit < 0:
            break
        taken.append(as_sentence(sentence))
    return taken


def _bulleted(answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None:
    """One "- " line for each sentence, or for each item of a list of words; at least two."""
    if bullet_share(answer) == 1.0:
        return None
    whole = [sentence for sentence in sentences(answer) if count_words(sentence)]
    items = whole
    if len(whole) == 1:
        items = _items(whole[0]) or [*whole, *sentences(material)[:2]]
    if len(items) < 2:
        return None
    listed = max(map(count_words, items)) <= LISTED_WORDS and len(whole) == 1
    lines = [as_sentence(item).rstrip(".") if listed else as_sentence(item) for item in items]
    return "\n".join(f"- {line}" for line in lines)


def _items(sentence: str) -> list[str]:
    """The items of "a, b and c", and the two halves of "x, and she y"; else nothing."""
    if _asks(sentence):
        return []
    body = sentence.rstrip(" .!")
    halves = re.split(r"; |, (?:and|but|so)(?: then)? (?=(?:he|she|it|they|we|I|you|the|there)\b)", body)
    if len(halves) > 1 and min(map(count_words, halves)) >= 2:
        return halves
    if "," not in body and count_words(body) > SHORT_WORDS:
        return []
    listed = [item.strip() for item in re.split(r",\s*(?:and |or )?|\s+and\s+", body) if item.strip()]
    return listed if len(listed) >= 2 and all(1 <= count_words(item) <= LISTED_WORDS for item in listed) else []


def _formal(answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None:
    """Contractions and casual words spelled out, no exclamations, a formal opening or closing."""
    body = expand(GREETING.sub("", answer.strip()))
    for pattern, better in PLAINER:
        body = re.sub(pattern, better, body, flags=re.IGNORECASE)
    body = re.sub(r"!+", ".", body).strip(" ,")
    if GREETING.match(answer.strip()):
        return f"{rng.choice(FORMAL_GREETINGS)} {as_sentence(body)}".strip()
    body = re.sub(r"(?:^|(?<=[.?] ))[a-z]", lambda found: found.group().upper(), body)
    if _is_talk(asked):
        return _framed(body, rng, FORMAL_ON_TALK, FORMAL_COMMAS[::2], FORMAL_CLOSERS[1:3], opener=0.9, closer=0.2)
    return _framed(body, rng, FORMAL_OPENERS, FORMAL_COMMAS, FORMAL_CLOSERS, opener=0.85, closer=0.3)


def _casual(answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None:
    """Contractions, a casual opening, sometimes a casual closing."""
    body = contract(GREETING.sub("", answer.strip())).strip(" ,")
    if GREETING.match(answer.strip()):
        return f"{rng.choice(CASUAL_GREETINGS)} {as_sentence(body)}".strip()
    return _framed(body, rng, CASUAL_OPENERS, CASUAL_COMMAS, CASUAL_CLOSERS, opener=0.9, closer=0.3)


def _cheerful(answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None:
    """A happy opening, exclamation marks, sometimes a happy closing; nothing is called lovely that is sad."""
    body = GREETING.sub("", answer.strip()).strip(" ,")
    if GREETING.match(answer.strip()):
        return f"{rng.choice(CHEERFUL_GREETINGS)} {as_sentence(body)}".strip()
    sad = SAD.search(f"{answer} {asked[-200:]}") is not None
    openers: Sequence[str]
    if sad:
        openers = CHEERFUL_ON_SAD_TALK if _is_talk(asked) else CHEERFUL_ON_SAD
    else:
        openers = CHEERFUL_OPENERS if _is_talk(asked) else CHEERFUL_OPENERS + CHEERFUL_ON_QUESTIONS
    if not sad:
        body = re.sub(r"(?<=[\w\"'\u201d)])\.(?=\s*$)", "!", body)
    return _framed(body, rng, openers, (), CHEERFUL_CLOSERS_ON_SAD if sad else CHEERFUL_CLOSERS, opener=0.9, closer=0.4)


def _with_a_question(answer: str, rng: random.Random, *, material: str = "", asked: str = "") -> str | None:
    """The answer and a question back, about a thing of the answer or of what was asked where there is one."""
    body = answer.strip()
    if not count_words(body) or "?" in body:
        return None
    about = topic((asked.rpartition("\n")[2], body)) if rng.random() < 0.75 else None
    question = rng.choice(ASK_ABOUT).format(x=about) if about else rng.choice(ASK_ANYTHING)
    return f"{as_sentence(body)}{chr(10) if chr(10) in body else ' '}{question}"


def _framed(
    body: str, rng: random.Random, openers: Sequence[str], commas: Sequence[str], closers: Sequence[str], *,
    opener: float, closer: float,
) -> str:
    """The body after an opening, before a closing, or between both; `opener`, `closer`: how often each is there."""
    body = as_sentence(body)
    glue = "\n" if "\n" in body else " "
    opens = rng.random() < opener or _asks(body)
    closes = not opens or (rng.random() < closer and not _asks(body))  # nothing is said after a question
    if opens:
        inside = decapitalise(body) if glue == " " else None
        if inside is not None and commas and rng.random() < 0.5:
            body = f"{rng.choice(commas)} {inside}"
        else:
            body = f"{rng.choice(openers)}{glue}{body}"
    return f"{body}{glue}{rng.choice(closers)}" if closes else body


def _formality(text: str) -> float:
    """Formal marks minus casual ones."""
    found = words(text)
    formal = sum(word in FORMAL for word in found)
    return float(formal - sum(word in CASUAL for word in found) - count_contractions(text) - (text.count("!") > 0))


def _cheer(text: str) -> float:
    """Exclamation marks, three in a row as one, and cheerful words."""
    return float(len(re.findall(r"!+", text)) + sum(word in CHEERFUL for word in words(text)))


def _is_talk(asked: str) -> bool:
    """Whether something was said that is no question, such as "Goodbye!"; nothing known counts as a question."""
    return bool(asked.strip()) and "?" not in asked and count_words(asked) < 2 * SHORT_WORDS


def _asks(text: str) -> bool:
    return text.rstrip().rstrip("\"'\u2019\u201d)").endswith("?")


STYLES: dict[str, Style] = {
    name: Style(name, requests, _surely(rule, measure), measure)
    for name, requests, rule, measure in (
        (
            "short", REQUESTS["short"],
            _short, lambda text: -float(count_words(text)),
        ),
        (
            "long", REQUESTS["long"],
            _long, lambda text: float(count_words(text)),
        ),
        (
            "bulleted", REQUESTS["bulleted"],
            _bulleted, bullet_share,
        ),
        (
            "formal", REQUESTS["formal"],
            _formal, _formality,
        ),
        (
            "casual", REQUESTS["casual"],
            _casual, lambda text: -_formality(text),
        ),
        (
            "cheerful", REQUESTS["cheerful"],
            _cheerful, _cheer,
        ),
        (
            "with-a-question", REQUESTS["with-a-question"],
            _with_a_question, lambda text: float(_asks(text)),
        ),
    )
}
