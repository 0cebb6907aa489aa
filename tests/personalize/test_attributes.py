"""Attributes of a text: hand-worked values, and the reward they make."""

from __future__ import annotations

import math

import pytest

from edgealign.personalize.attributes import bullet_share, formality, log_words, measure, reward, standardize, words


def test_words_keep_contractions_whole() -> None:
    assert words("Don't stop, it's FINE - ok?") == ["don't", "stop", "it's", "fine", "ok"]


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("plain", 0.0), ("- a\n- b", 1.0), ("Hey:\n- a\n\n2. b\n3) c", 0.75), ("a - b\nc * d", 0.0)],
)
def test_bullet_share_counts_list_lines(text: str, share: float) -> None:
    assert bullet_share(text) == pytest.approx(share)


def test_formality_counts_markers_per_word() -> None:
    assert formality("Certainly I would") == pytest.approx(2 / 3)
    assert formality("Hey don't!") == pytest.approx(-3 / 2)
    assert formality("") == 0.0


def test_log_words_is_zero_for_nothing() -> None:
    assert log_words("") == 0.0
    assert log_words("one two") == pytest.approx(math.log(3))


def test_the_reward_is_the_taste_in_standard_deviations() -> None:
    pool = ["one", "one two three", "- a", "- a b c"]
    scale = standardize(pool)
    taste = {"bullets": 1.0}
    assert reward("- x", taste, scale) == pytest.approx(1.0)
    assert reward("x", taste, scale) == pytest.approx(-1.0)
    both = {"bullets": 3.0, "length": 4.0}
    expected = (3 * 1.0 + 4 * (measure("- x")["length"] - scale["length"][0]) / scale["length"][1]) / 5
    assert reward("- x", both, scale) == pytest.approx(expected)
