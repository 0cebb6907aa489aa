"""Questions about short passages of plain stories, asked by rule and answered in the passage's own words.

    edgealign data reading stories.jsonl --out DIR

train.jsonl, valid.jsonl      `messages`: the passage, a blank line, a question; the bare answer; split by document

    "The fox saw some grapes on the wall."    What did the fox see on the wall?    Some grapes.
                                              Where did the fox see some grapes?   On the wall.
                                              Who saw some grapes on the wall?     The fox.
    "The boy was very happy."                 How did the boy feel?                Very happy.

No grammar is parsed: a clause counts only if every word of it fits one pattern (subject, a past tense that is no other
word, object, place), so most sentences give nothing. A small model learns from many such questions to look an answer up
in a text; questions that people wrote are too few, and their answers too free, to learn that from.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgealign.artifact import Artifact, file_input, open_artifact, publish, refuse_existing
from edgealign.data.english import SMALL_FIRST, as_sentence, count_words, sentences
from edgealign.data.forms import Conversation, Message, Text, to_json
from edgealign.data.full_answer import PAST_FORMS, present
from edgealign.data.prepare import in_valid
from edgealign.data.read import read_all
from edgealign.data.recipes import ReadingRecipe
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import InputError

PER_SENTENCE = 2  # questions about one sentence, each below a passage of its own
# fmt: off
PEOPLE = frozenset((
    "boy", "girl", "man", "woman", "child", "children", "men", "women", "king", "queen", "prince", "princess", "mother",
    "father", "brother", "brothers", "sister", "sisters", "son", "sons", "daughter", "daughters", "wife", "husband",
    "friend", "friends", "giant", "witch", "fairy", "thief", "teacher", "farmer", "hunter", "fisherman", "soldier",
    "servant", "maiden", "lady", "lord", "knight", "grandmother", "grandfather", "uncle", "aunt", "baby", "people",
    "fox", "wolf", "bear", "cat", "dog", "bird", "lion", "tiger", "mouse", "rabbit", "hare", "horse", "cow", "goat",
    "sheep", "pig", "hen", "cock", "duck", "goose", "crow", "frog", "fish", "snake", "monkey", "elephant", "donkey",
    "kitten", "puppy", "lamb", "hyena", "crocodile", "tortoise", "squirrel", "owl", "eagle", "dragon", "merchant",
    "shepherd", "minister", "priest", "master", "lad", "miller", "tailor", "old", "youth", "captain", "sailor",
    "doctor", "neighbour", "stranger",
))
FEELINGS = (
    "happy|sad|angry|glad|afraid|sorry|proud|tired|hungry|lonely|surprised|frightened|scared|delighted|worried|pleased|"
    "astonished|unhappy|excited|ashamed|jealous|miserable|thirsty|terrified|joyful|sick|cold|better|safe"
)
_DETERMINER = "the|a|an|his|her|their|its|my|our|this|that|one|two|three|some|another|many"
_STOPS = (
    "in|on|at|to|into|under|over|behind|near|by|from|through|inside|outside|up|down|out|of|off|with|for|and|or|but|who|"
    "which|that|when|while|because|so|as|if|than|then|was|were|had|is|are|has|have|not|he|she|it|they|him|them|i|you|"
    "we|there|very|more|all|again|away|back|until|before|after|about|upon|along|across|around|without|would|could|did|"
    "the|a|an|his|her|their|its|my|our|your|this|one|two|three|some|another|many|what|how|where|never|always|too"
)
_PLACE = "into|in|on|at|to|under|behind|near|through|inside|outside|over|across|onto|beside|towards|along"
_NOT_NAMES = SMALL_FIRST | frozenset((
    "then", "soon", "suddenly", "now", "later", "again", "meanwhile", "finally", "next", "even", "just", "only",
    "everybody", "people", "let", "that", "such", "each", "much", "more", "god", "also", "or", "nor", "never", "still",
    "perhaps", "others", "both", "instead", "together", "yet", "today", "though", "indeed", "first", "sir", "oh",
    "whoever", "none",
))
# "in the morning", "at that time", "by the hand", "to his surprise": no places
_NO_PLACE = re.compile(
    r"(?i)\b(?:morning|evening|night|day|days|time|times|moment|hand|hands|name|way|year|years|week|month|age|surprise|"
    r"last|first|once|winter|summer|spring|autumn|noon|midnight|hour|death|joy|fear|anger|life|love|end|turn|voice|"
    r"word|words|sort|kind|mind|heart|thing|things|part|fact|minutes?|season|century|war|(?:jan|febr)uary|"
    r"march|april|may|june|july|august|(?:septem|octo|novem|decem)ber)$"
)
# fmt: on
_KNOWN = "|".join(sorted(PAST_FORMS))
_WORD = rf"(?!(?:{_STOPS}|{_KNOWN})\b|[a-z]+ly\b)[a-z]+(?:-[a-z]+)?"
_NOUNS = rf"(?:(?:{_DETERMINER})(?: two| three)?(?: {_WORD}){{1,3}}(?: of (?:(?:{_DETERMINER}) )?{_WORD})?)"
_NAME = r"(?:[A-Z][a-z]{2,12}(?: [A-Z][a-z]{2,12})?)"
_SUBJECT = rf"(?P<subject>(?i:{_NOUNS})|{_NAME}|(?i:he|she|they))"
_OPENER = (
    r"(?:(?:Then|So|And|But|Soon|One day|At last|Once|Suddenly|Next day|The next day|That night|Every day|Now|"
    r"In the (?:morning|evening)|One (?:night|morning|evening)|After that),? )"
)
_START = (
    rf"(?:^{_OPENER}?|, (?:and|but|so|for|when|while|as) (?:then )?|; (?:and |but |so )?"
    r"|\b(?:when|while|because|where) )"
)
_PLACED = rf"(?:{_PLACE}) (?:{_NOUNS}|{_NAME})"
_TOLD = rf"{_KNOWN}|[a-z]+ed"
# what may follow: the end of the clause, or a word that belongs neither to the object nor to the place
_AFTER = (
    rf"(?=[.;:!)]|$|, (?:(?:{_STOPS})\b|[a-z]+ing\b)| and (?:then |so )?(?:(?:he|she|it|they|i|we|{_TOLD})\b|[A-Z])"
    rf"| (?!(?:of|or|and)\b)(?:{_STOPS})\b| [a-z]+ly\b)"
)
_CLAUSE = re.compile(
    rf"{_START}{_SUBJECT} (?P<verb>{_KNOWN})"
    rf"(?: (?P<pronoun>him|it|them))?(?: (?P<object>{_NOUNS}|{_NAME}))?(?: (?P<place>{_PLACED}))?{_AFTER}"
)
_WAS = re.compile(rf"{_START}{_SUBJECT} (?P<verb>was|were) (?P<place>{_PLACED}){_AFTER}")
_FEELS = re.compile(
    rf"{_START}{_SUBJECT} (?:was|were|felt|became) "
    rf"(?:so |too )?(?P<how>(?:very |much |quite )?(?:{FEELINGS}))"
    r"(?=[.,;!]| (?:and|that|when|because|at|to|as|for|with)\b)"
)


@dataclass(frozen=True)
class Asked:
    """A question about one sentence, and the words of the sentence that answer it."""

    question: str
    answer: str


def run(recipe: ReadingRecipe, *, sources: Sequence[str | Path], out: Path) -> Artifact:
    """Publish the data set; the same seed and sources give the same bytes.

    Raises:
        InputError: a source cannot be read or is no text, or no sentence fits a pattern.
    """
    refuse_existing(Path(out))
    rng = random.Random(recipe.seed)
    inputs = []
    found: list[tuple[str, Conversation]] = []
    kinds: Counter[str] = Counter()
    for loaded in read_all(sources, form="text", skip_bad=recipe.skip_bad):
        inputs.append(file_input("data", loaded.source, loaded.digest))
        for row in loaded.rows:
            if isinstance(row, Text):
                found += [(row.text, asked) for asked in questions(row.text, recipe.passage_words, rng)]
    if not found:
        names = ", ".join(map(str, sources))
        raise InputError(names, "has no sentence that a question can be made of", "give stories in plain English")
    rng.shuffle(found)
    files: dict[str, list[Conversation]] = {"train.jsonl": [], "valid.jsonl": []}
    for document, asked in found[: recipe.limit]:
        side = "valid.jsonl" if in_valid(document, recipe.seed, recipe.valid) else "train.jsonl"
        files[side].append(asked)
        kinds[asked.messages[0].content.rpartition("\n\n")[2].split()[0].lower()] += 1
    with publish(out, kind="dataset", format="jsonl", stage="reading", recipe=recipe, inputs=inputs) as draft:
        for name, chosen in files.items():
            write_jsonl(draft.dir / name, [to_json(row) for row in chosen])
        draft.meta["rows"] = {name: len(chosen) for name, chosen in files.items()}
        draft.meta["questions"] = dict(kinds)
    return open_artifact(out)


def questions(text: str, passage_words: int, rng: random.Random) -> Iterator[Conversation]:
    """Questions about sentences that have any, below a passage of neighbouring sentences."""
    told = [sentence for line in text.splitlines() for sentence in sentences(line)]
    for place, sentence in enumerate(told):
        asked = list(ask(sentence))
        if not asked:
            continue
        for chosen in rng.sample(asked, min(len(asked), PER_SENTENCE)):
            passage = _passage(told, place, passage_words, rng)
            if passage is not None:
                prompt = Message("user", f"{passage}\n\n{chosen.question}")
                yield Conversation((prompt, Message("assistant", as_sentence(chosen.answer))))


def ask(sentence: str) -> Iterator[Asked]:
    """The questions that a sentence answers."""
    if '"' in sentence or "\u201c" in sentence or not 3 <= count_words(sentence) <= 30:
        return
    for match in _FEELS.finditer(sentence):
        subject = _as_subject(match["subject"])
        if subject is not None and _is_person(subject):
            yield Asked(f"How did {subject} feel?", match["how"])
    for match in _WAS.finditer(sentence):
        subject = _as_subject(match["subject"])
        if subject is not None and not _NO_PLACE.search(match["place"]):
            yield Asked(f"Where {match['verb']} {subject}?", match["place"])
    for match in _CLAUSE.finditer(sentence):
        subject, verb = _as_subject(match["subject"]), present(match["verb"])
        if subject is None:
            continue
        thing, place = match["object"], match["place"]
        whom = thing or match["pronoun"]
        if place is not None and _NO_PLACE.search(place):
            continue
        if thing is not None and _NO_PLACE.search(thing):
            continue
        if thing is not None and not (thing[0].isupper() or _is_person(thing)):
            yield Asked(f"{' '.join(filter(None, ('What did', subject, verb, place)))}?", thing)
        if place is not None:
            yield Asked(f"{' '.join(filter(None, ('Where did', subject, verb, whom)))}?", place)
        if (whom or place) and subject not in ("he", "she", "they"):
            who = "Who" if _is_person(subject) else "What"
            yield Asked(f"{' '.join(filter(None, (who, match['verb'], whom, place)))}?", subject)


def _passage(told: Sequence[str], place: int, most_words: int, rng: random.Random) -> str | None:
    """Whole sentences around one of them, their number drawn, at most so many words; None where it alone is longer."""
    first = last = place
    words = count_words(told[place])
    room = rng.randint(most_words // 3, most_words)
    while words <= room:
        before = first > 0 and words + count_words(told[first - 1]) <= room
        after = last + 1 < len(told) and words + count_words(told[last + 1]) <= room
        if not before and not after:
            break
        if before and (not after or rng.random() < 0.5):
            first -= 1
            words += count_words(told[first])
        else:
            last += 1
            words += count_words(told[last])
    return " ".join(told[first : last + 1]) if words <= most_words and last > first else None


def _as_subject(text: str) -> str | None:
    """The subject as it stands inside a question, or None where it is no name and no noun."""
    first, _, rest = text.partition(" ")
    if text.lower() in ("he", "she", "they"):
        return text.lower()
    if first.lower() in _DETERMINER.split("|"):
        return f"{first.lower()} {rest}" if rest else None
    return None if first.lower() in _NOT_NAMES or first.endswith("ly") else text


def _is_person(noun_phrase: str) -> bool:
    """Whether a question about it begins with Who."""
    last = noun_phrase.split()[-1]
    return noun_phrase in ("he", "she", "they") or noun_phrase[0].isupper() or not PEOPLE.isdisjoint((last, last[:-1]))
