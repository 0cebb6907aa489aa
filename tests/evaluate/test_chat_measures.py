"""What is measured of an answer by rule, on answers small enough to check by eye."""

from __future__ import annotations

import pytest

from edgealign.evaluate.chat_measures import (
    Share,
    Vocabulary,
    bootstrap_mean,
    content_words,
    has_keyword,
    looks_like_sentences,
    on_topic,
    repeated,
    shuffled,
    wilson,
)

STORY = "Anna had a red boat. The boats sailed to the old bridge."


def test_content_words_leave_out_small_words_and_common_endings():
    assert content_words("The boats were sailing to Anna's bridge.") == ["boat", "sail", "anna", "bridge"]
    assert content_words("It is a was.") == []


@pytest.mark.parametrize(
    ("answer", "share"),
    [("The boat was red.", 1.0), ("A boat and a dragon.", 0.5), ("The dragon ate it.", 0.0), ("It was.", 0.0), ("", 0)],
)
def test_on_topic_is_the_share_of_content_words_from_the_story(answer, share):
    assert on_topic(answer, STORY) == pytest.approx(share)


def test_a_keyword_counts_as_a_whole_word_only():
    assert has_keyword("At the Bridge!", ("bridge",))
    assert not has_keyword("At the bridges.", ("bridge",))
    assert not has_keyword("", ("bridge",))


@pytest.mark.parametrize(
    ("answer", "share"),
    [("one two three", 0.0), ("one two three four five", 0.0), ("he ran and " * 3, 3 / 6), ("a " * 13, 9 / 10)],
)
def test_repetition_is_the_share_of_runs_of_four_words_seen_before(answer, share):
    assert repeated(answer) == pytest.approx(share)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Yes.", True), ('"Come in!"', True), ("- One thing.\n- Another.", True), ("The cat sat", False),
        ("the cat sat.", False), ("", False), ("...", False), ("What (now)?", True),
    ],
)  # fmt: skip
def test_an_answer_looks_like_sentences_from_its_two_ends(answer, verdict):
    assert looks_like_sentences(answer) is verdict


def test_wilson_s_interval_is_that_of_the_textbook():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(40, 40)[1] == 1.0
    assert wilson(0, 40)[0] == pytest.approx(0.0, abs=1e-12)
    assert Share(7, 10).value == 0.7
    assert Share(0, 0).value == 0.0


def test_the_bootstrap_interval_holds_the_mean_and_repeats_with_its_seed():
    values = [0.1, 0.5, 0.4, 0.3, 0.9]
    low, high = bootstrap_mean(values, resamples=500, seed=1)
    assert low < sum(values) / 5 < high
    assert bootstrap_mean(values, resamples=500, seed=1) == (low, high)
    assert bootstrap_mean([1.0, 1.0], resamples=100, seed=0) == (1.0, 1.0)


def test_known_words_and_pairs_are_counted_against_the_training_text():
    known = Vocabulary.of(["The cat sat.", "a dog sat down"], asked=["the cat sat down", "zorp cat"])
    assert known.word_share(["the cat sat down"]) == 1.0
    assert known.word_share(["zorp cat"]) == 0.5
    assert known.pair_share(["the cat sat down"]) == 1.0  # "sat down" is known from the other text
    assert known.pair_share(["zorp cat"]) == 0.0
    assert known.pair_share([""]) == known.word_share([""]) == 0.0


def test_shuffling_keeps_the_words_and_loses_the_pairs():
    text = "one day a little boy went into the dark forest and found a small house"
    known = Vocabulary.of([text], asked=[text])
    assert known.pair_share([text]) == 1.0
    assert known.pair_share([text], shuffle=True) < 0.5
    assert sorted(shuffled(text.split())) == sorted(text.split())
    assert shuffled(text.split()) == shuffled(text.split())
