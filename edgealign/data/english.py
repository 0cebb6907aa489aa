"""Rules of English spelling that generated answers need: sentences, contractions, a noun to ask about.

No grammar is parsed: each rule names the words it is sure of and leaves everything else alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "NO_NOUNS", "as_sentence", "contract", "count_contractions", "count_words", "decapitalise", "expand", "sentences",
    "topic",
]

# fmt: off
ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "st", "prof", "sr", "jr", "vs", "etc", "no", "e.g", "i.e", "u.s", "u.k", "a.m", "p.m",
    "approx", "inc", "ltd", "co", "fig", "gen", "capt", "col", "lt", "rev", "mt",
))
# first words that are surely no names, so that "Well, " may stand before them
SMALL_FIRST = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "there", "here", "it", "he", "she", "they", "we", "you",
    "his", "her", "their", "its", "our", "your", "my", "to", "because", "in", "on", "at", "by", "for", "from", "with",
    "when", "while", "after", "before", "if", "as", "so", "some", "many", "most", "every", "all", "both", "no",
    "one", "two", "three", "four", "what", "who", "how", "why", "where", "yes", "not", "once", "since", "until",
    "into", "under", "over", "inside", "outside", "near", "nothing", "nobody", "everyone", "someone", "something",
))
NO_NOUNS = frozenset((
    "same", "other", "others", "first", "second", "third", "last", "next", "only", "very", "more", "most", "less",
    "lot", "few", "little", "way", "ways", "kind", "sort", "part", "number", "bit", "time", "times", "one", "two",
    "three", "four", "five", "six", "old", "young", "new", "good", "bad", "big", "small", "great", "poor", "rich",
    "long", "short", "right", "left", "end", "rest", "fact", "reason", "thing", "things", "result", "use", "case",
    "following", "text", "passage", "story", "above", "below", "top", "middle", "back", "front", "side", "day",
    "night", "morning", "evening", "moment", "while", "year", "years", "people", "person", "question", "answer",
    "truth", "such", "own", "whole", "former", "latter", "best", "worst", "better", "main", "different", "place",
    "sentence", "word", "words", "example", "name", "able", "about", "and", "or", "but", "that", "which", "who",
    "late", "early", "beautiful", "dead", "couple", "majority", "variety", "character", "reply", "hurry", "problem",
    "bigger", "smaller", "older", "younger", "higher", "lower", "white", "black", "red", "blue", "green", "golden",
    "section", "purpose", "amount", "help", "want", "need", "look", "ask", "say", "tell", "know", "act", "fine",
    "fan", "member", "lack", "set", "group", "list", "type", "piece", "form", "series", "total", "pair", "while",
    "chance", "wish", "hope", "favour", "favor", "wrong", "idea", "mistake", "reader", "author", "bunch", "ton",
))
_ADJECTIVES = (
    "old|young|little|big|great|poor|rich|small|wise|kind|golden|white|black|red|blue|green|brave|wicked|good|bad|new"
)
# words that end a noun phrase: after "the X" one of these shows that X was its noun
_AFTER_NOUN = (
    r"of|in|on|at|to|for|from|with|by|and|or|but|is|are|was|were|has|have|had|will|would|can|could|did|does|do|who|"
    r"that|which|so|because|when|while|as|into|over|under|than|then|came|went|said|saw|if|before|after|until|about"
)
# fmt: on
_END = re.compile(r"(?:[.!?]+[\"'\u2019\u201d)\]]*)(?=\s+[\"'\u2018\u201c(\[]?[A-Z0-9])")
_LIST_LINE = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+")
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_SUBJECT = r"I|you|he|she|it|we|they|that|there|what|who|where|here|this"
_CONTRACTION = re.compile(
    r"(?i)\b(?:\w+n['\u2019]t|\w+['\u2019](?:re|ll|ve|m|d)|(?:he|she|it|that|there|what|who|where|here|how|let)"
    r"['\u2019]s)\b"
)
_NEGATED = {
    "do": "don't", "does": "doesn't", "did": "didn't", "is": "isn't", "are": "aren't", "was": "wasn't",
    "were": "weren't", "has": "hasn't", "have": "haven't", "had": "hadn't", "would": "wouldn't",
    "could": "couldn't", "should": "shouldn't", "can": "can't", "will": "won't",
}
_POSITIVE = {short: positive for positive, short in _NEGATED.items()}
_PARTICIPLE = r"been|gone|done|got|made|become|come|had|seen|taken|given|never|always|just|already|\w{2,}ed"
_TOPIC = re.compile(
    rf"(?i)\b(?:the|a|an)\s+((?:{_ADJECTIVES})\s+)?([a-z]{{3,14}})(?=[.,;:?!]|\s+(?:{_AFTER_NOUN})\b|$)"
)
# after a small word, so that it is neither the first word of a sentence nor the end of a longer name
_NAME = re.compile(r"\b[a-z]+,? ([A-Z][a-z]{2,12}(?: [A-Z][a-z]{2,12}){0,2})(?=[.,;:?!]|\s+[a-z]|$)")
_NO_NAME = re.compile(r"(?i)^(?:january|february|march|april|may|june|july|august|september|october|november|december|"
                      r"monday|tuesday|wednesday|thursday|friday|saturday|sunday|mr|mrs|miss|the|god|lord|sir|yes)$")
_TITLES = frozenset(("Princess", "Prince", "King", "Queen", "Giant", "Emperor", "Sultan", "Knight", "Fox", "Wolf"))
_ING_NOUNS = frozenset(("king", "ring", "wing", "string", "spring", "wedding", "building", "painting", "pudding"))
_ED_NOUNS = frozenset(("bed", "seed", "weed", "shed", "sled", "reed", "feed"))
_EST_NOUNS = frozenset(("forest", "chest", "nest", "guest", "priest", "harvest", "contest", "request"))


def count_words(text: str) -> int:
    """Words, contractions and numbers as one each."""
    return len(_WORD.findall(text))


def sentences(text: str) -> list[str]:
    """The sentences of a text; every line starts a new one, and list markers are left out."""
    found: list[str] = []
    for line in text.splitlines():
        line = _LIST_LINE.sub("", line).strip()
        start = 0
        for match in _END.finditer(line):
            last = line[start : match.start()].rsplit(None, 1)[-1:]
            before = last[0].strip("\"'(\u201c\u2018").lower() if last else ""
            stop = match.group().startswith(".")
            if stop and (before in ABBREVIATIONS or before.isdigit() or (len(before) == 1 and before.isalpha())):
                continue
            found.append(line[start : match.end()].strip())
            start = match.end()
        if line[start:].strip():
            found.append(line[start:].strip())
    return found


def as_sentence(text: str) -> str:
    """A capital letter first and an end mark last; lists, code and anything without letters keep their end."""
    text = text.strip()
    if text and text[0].isalpha() and not re.match(r"(?:https?:|www\.|\w+\(|[a-z][A-Z])", text):
        text = text[0].upper() + text[1:]
    bare = text.rstrip("\"'\u2019\u201d)]")
    if bare and bare[-1] in ",;" and bare == text:
        text = bare = bare.rstrip(",; ")
    closed = bare[-1:] in (".", "!", "?", ":", "\u2026", "}", ">", "`")
    if not bare or closed or not (bare[-1].isalnum() or bare[-1] in "%$\u00b0") or "\n" in text:
        return text
    return f"{text}."


def decapitalise(text: str) -> str | None:
    """The text as it stands after "Well, ", or None where its first word may be a name."""
    first = re.match(r"[A-Za-z]+", text)
    if first is None:
        return None
    rest = text[first.end() : first.end() + 2]
    if first.group() == "I" and re.match(r"[ '\u2019]", rest):
        return text
    if first.group().lower() not in SMALL_FIRST or (first.group().isupper() and len(first.group()) > 1):
        return None
    return text[0].lower() + text[1:]


def contract(text: str) -> str:
    """ "do not" to "don't", "I am" to "I'm"; never before an end mark ("Yes, I am.")."""
    text = re.sub(r"\b([Cc])an ?not\b", r"\1an't", text)
    text = re.sub(
        rf"\b({'|'.join(_NEGATED)}) not\b(?=\s+[a-z])",
        lambda found: _same_case(found.group(1), _NEGATED[found.group(1).lower()]),
        text,
        flags=re.IGNORECASE,
    )
    goes_on = r"(?=\s+(?!not\b)[a-z])"
    text = re.sub(rf"\bI am\b{goes_on}", "I'm", text)
    text = re.sub(rf"\b(You|you|We|we|They|they) are\b{goes_on}", r"\1're", text)
    text = re.sub(rf"\b(It|it|He|he|She|she|That|There|there) is\b{goes_on}", r"\1's", text)
    text = re.sub(rf"\b(I|You|you|He|he|She|she|It|it|We|we|They|they) will\b{goes_on}", r"\1'll", text)
    text = re.sub(rf"\b(I|You|you|He|he|She|she|We|we|They|they) would\b{goes_on}", r"\1'd", text)
    return re.sub(r"\b(I|You|you|We|we|They|they) have\b(?=\s+been\b)", r"\1've", text)


def expand(text: str) -> str:
    """ "don't" to "do not", "it's" to "it is" or "it has"; a possessive stays."""
    text = text.replace("\u2019", "'")
    negated = "|".join(map(re.escape, _POSITIVE))
    text = re.sub(
        rf"\b({negated}) (I|you|he|she|it|we|they|that)\b",
        lambda found: f"{_same_case(found.group(1), _POSITIVE[found.group(1).lower()])} {found.group(2)} not",
        text,
        flags=re.IGNORECASE,
    )
    text = re.sub(r"\b([Cc])an't\b", r"\1annot", text)
    text = re.sub(
        rf"\b({negated})\b",
        lambda found: _same_case(found.group(1), f"{_POSITIVE[found.group(1).lower()]} not"),
        text,
        flags=re.IGNORECASE,
    )
    text = re.sub(r"\b([Ll])et's\b", r"\1et us", text)
    text = re.sub(r"\bI'm\b", "I am", text)
    text = re.sub(r"\b(\w+)'re\b", r"\1 are", text)
    text = re.sub(r"\b(\w+)'ll\b", r"\1 will", text)
    text = re.sub(r"\b(\w+)'ve\b", r"\1 have", text)
    subject = rf"\b({_SUBJECT}|how)"
    text = re.sub(rf"{subject}'s(?=\s+(?:been|got|become|had)\b)", r"\1 has", text, flags=re.IGNORECASE)
    text = re.sub(rf"{subject}'s\b", r"\1 is", text, flags=re.IGNORECASE)
    text = re.sub(rf"{subject}'d(?=\s+(?:better|{_PARTICIPLE})\b)", r"\1 had", text, flags=re.IGNORECASE)
    return re.sub(rf"{subject}'d\b", r"\1 would", text, flags=re.IGNORECASE)


def count_contractions(text: str) -> int:
    """Contractions in a text; a possessive ("the king's") is none."""
    return len(_CONTRACTION.findall(text))


def topic(texts: Sequence[str]) -> str | None:
    """ "the fox" or "Rome": the first noun or name we are sure of, in the first text that has one."""
    for text in texts:
        found = [
            f"the {(match.group(1) or '').lower()}{match.group(2)}"
            for match in _TOPIC.finditer(text)
            if match.group(2).islower() and _is_noun(match.group(2))
        ]
        names = [match.group(1) for match in _NAME.finditer(text) if not _NO_NAME.match(match.group(1))]
        found += [f"the {name.lower()}" if name in _TITLES else name for name in names]
        if found:
            return found[0]
    return None


def _is_noun(word: str) -> bool:
    """Whether "the <word>" can stand for a thing: no adjective, number, participle or empty word."""
    if word in NO_NOUNS or word.endswith(("ly", "less", "ful", "ous", "able")):
        return False
    if word.endswith("ing"):
        return word in _ING_NOUNS
    if word.endswith("ed"):
        return word in _ED_NOUNS
    return not word.endswith("est") or word in _EST_NOUNS


def _same_case(model: str, text: str) -> str:
    return text[0].upper() + text[1:] if model[0].isupper() else text
