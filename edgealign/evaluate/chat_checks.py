"""From answers to numbers and verdicts: form, topic, styles, words. Pure functions of what was said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgealign.artifact import Check
from edgealign.data.styles import follows
from edgealign.evaluate.chat_measures import (
    Share,
    Vocabulary,
    bootstrap_mean,
    has_keyword,
    looks_like_sentences,
    on_topic,
    repeated,
)
from edgealign.evaluate.chat_prompts import STORY, Prompt
from edgealign.evaluate.chat_talk import Answer
from edgealign.evaluate.recipes import ChatRecipe
from edgealign.personalize.attributes import words

PLAIN = ("greedy", "sampled")
WIDE_BITS = 8  # bundles of fewer bits per weight may differ more


def measure_answers(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Any]:
    """Form: ends, sentences, length, repetition. All by rule, over all prompts."""
    texts = [answer.text for answer in answers]
    return {
        "ended": sum(answer.ended for answer in answers),
        "sentences": sum(map(looks_like_sentences, texts)),
        "total": len(prompts),
        "empty": sum(not text for text in texts),
        "words": sum(len(words(text)) for text in texts) / max(len(texts), 1),
        "repeated": sum(map(repeated, texts)) / max(len(texts), 1),
    }


def measure_topic(
    prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]], recipe: ChatRecipe
) -> dict[str, Any]:
    """Answers about a story against that story, and against the other stories, which must fit worse."""
    places = [number for number, prompt in enumerate(prompts) if prompt.kind == STORY]
    about = {number: f"{prompts[number].story} {prompts[number].question}" for number in places}
    found: dict[str, Any] = {}
    gains = [0.0] * len(places)
    for how, given in answers.items():
        own = [on_topic(given[i].text, about[i]) for i in places]
        control = [_mean([on_topic(given[i].text, about[j]) for j in places if j != i]) for i in places]
        gains = [gain + (a - b) / len(answers) for gain, a, b in zip(gains, own, control, strict=True)]
        keyed = [has_keyword(given[i].text, prompts[i].keywords) for i in places]
        others = [_mean([has_keyword(given[i].text, prompts[j].keywords) for j in places if j != i]) for i in places]
        found[how] = {
            "own": _mean(own), "control": _mean(control), "keyword": sum(keyed), "total": len(places),
            "keyword_control": _mean(others),
        }  # fmt: skip
    low, high = bootstrap_mean(gains, resamples=recipe.bootstrap, seed=recipe.seed)
    return found | {"gain": _mean(gains), "low": low, "high": high}


def measure_styles(plain: Sequence[str], styled: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """For each style: how many answers moved its way, and how many did so when another style was asked for."""
    found: dict[str, dict[str, Any]] = {}
    for name, texts in styled.items():
        moved = Share(sum(follows(name, text, base) for text, base in zip(texts, plain, strict=True)), len(plain))
        others = [
            follows(name, text, base)
            for other, given in styled.items()
            if other != name
            for text, base in zip(given, plain, strict=True)
        ]
        control = Share(sum(others), len(others))
        low, high = moved.interval
        found[name] = {
            "hits": moved.hits, "total": moved.total, "share": moved.value, "low": low, "high": high,
            "control": control.value,
        }  # fmt: skip
    return found


def measure_words(
    prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]], texts: Iterable[str]
) -> dict[str, Any]:
    """Words and pairs of words that the training text knows; the prompts themselves are the yardstick."""
    groups = {how: [answer.text for answer in given] for how, given in answers.items()}
    groups["the prompts themselves"] = [prompt.last for prompt in prompts]
    known = Vocabulary.of(texts, asked=[text for group in groups.values() for text in group])
    return {
        name: {
            "words": known.word_share(group), "pairs": known.pair_share(group),
            "pairs_shuffled": known.pair_share(group, shuffle=True),
        }
        for name, group in groups.items()
    }  # fmt: skip


def checks(result: Mapping[str, Any], recipe: ChatRecipe) -> Iterator[Check]:
    """The verdicts; greedy and sampled answers count alike."""
    measures = [result["measures"][how] for how in PLAIN]
    total = sum(row["total"] for row in measures)
    for name, key, wanted in (("ends_turn", "ended", recipe.ends), ("sentences", "sentences", recipe.sentences)):
        yield _share_check(name, Share(sum(row[key] for row in measures), total), wanted)
    if "words" in result:
        share = _mean([result["words"][how]["words"] for how in PLAIN])
        note = "share of the answers' words that occur in the training text: a proxy, not grammar"
        yield Check("known_words", share, recipe.known_words, share >= recipe.known_words, note)
    topic = result["topic"]
    note = f"share of content words from the story, own minus other stories, 95 % to {topic['high']:.2f}; must exceed 0"
    yield Check("on_topic", topic["low"], 0.0, topic["low"] > 0, note)
    for name, row in result["styles"].items():
        yield _share_check(f"style_{name}", Share(row["hits"], row["total"]), recipe.follows)
    for label, row in result["bundles"].items():
        wanted = recipe.agree_q8 if row["bits"] >= WIDE_BITS else recipe.agree_q4
        yield _share_check(f"tokens {label}", Share(row["same"], row["total"]), wanted)


def _share_check(name: str, share: Share, wanted: float) -> Check:
    low, high = share.interval
    note = f"{share.hits} of {share.total}, 95 % from {low:.2f} to {high:.2f}; at least {wanted:g} is needed"
    return Check(name, share.value, wanted, share.total > 0 and share.value >= wanted, note)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
