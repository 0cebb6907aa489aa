"""The n-gram baseline: a hand-worked case, a plain rewrite with dictionaries, and properties of a distribution."""

from __future__ import annotations

from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from edgealign.errors import InputError
from edgealign.evaluate import ngram

BOS = 0


def documents(*texts):
    return [np.asarray([BOS, *text], dtype=np.int32) for text in texts]


def every_next_token(context, vocab):
    """The keys of a context followed by each token of the vocabulary."""
    bits = ngram.bits_of(vocab)
    head = 0
    for token in context:
        head = (head << bits) | token
    return np.asarray([(head << bits) | token for token in range(vocab)], dtype=np.uint64)


def random_documents(vocab, seed=0, n=30):
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, vocab)  # a few tokens are common, as in text
    return documents(*(rng.choice(np.arange(1, vocab), size=rng.integers(1, 40), p=weights / weights.sum())
                       for _ in range(n)))  # fmt: skip


def test_a_bigram_model_worked_out_by_hand():
    # Tokens a = 1, b = 2; the text "a b a". Bigrams: (begin, a), (a, b), (b, a), once each; D = 1/2.
    # Order 1 counts different predecessors: a has 2, b has 1, of 3 in all.
    #   P1(a) = (2 - 1/2) / 3 + (2 * 1/2) / 3 * 1/3 = 11/18     P1(b) = 5/18     P1(begin) = 2/18
    # After a, which was followed once, by b: P(b | a) = (1 - 1/2) / 1 + (1/2) / 1 * 5/18 = 23/36.
    keys = ngram.pack(documents([1, 2, 1]), vocab=3, order=2)
    model = ngram.train(keys, vocab=3, order=2, discount=0.5)
    after_a = ngram.probabilities(model, every_next_token([1], 3))
    np.testing.assert_allclose(after_a, [2 / 36, 11 / 36, 23 / 36], rtol=1e-12)
    lower = ngram.Ngram(3, model.levels[:1])
    np.testing.assert_allclose(ngram.probabilities(lower, every_next_token([], 3)), [2 / 18, 11 / 18, 5 / 18])


def test_a_unigram_model_is_the_smoothed_share_of_each_token():
    keys = ngram.pack(documents([1, 1, 1, 2]), vocab=3, order=1)
    model = ngram.train(keys, vocab=3, order=1, discount=0.5)
    expected = [1 / 4 / 3, 2.5 / 4 + 1 / 12, 0.5 / 4 + 1 / 12]
    np.testing.assert_allclose(ngram.probabilities(model, every_next_token([], 3)), expected)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("vocab", [5, 64, 4096])
def test_probabilities_of_all_next_tokens_add_up_to_one_after_any_context(order, vocab):
    texts = random_documents(vocab)
    model = ngram.train(ngram.pack(texts, vocab=vocab, order=order), vocab=vocab, order=order)
    rng = np.random.default_rng(1)
    seen = [texts[3][: order - 1], [BOS] * (order - 1)]
    for context in [*(rng.integers(0, vocab, order - 1) for _ in range(8)), *seen]:
        chances = ngram.probabilities(model, every_next_token([int(token) for token in context], vocab))
        assert chances.sum() == pytest.approx(1.0, abs=1e-9)
        assert (chances > 0).all()


def test_the_arrays_agree_with_a_plain_rewrite_in_exact_fractions():
    vocab, order = 7, 4
    texts = random_documents(vocab, seed=3, n=6)
    keys = ngram.pack(texts, vocab=vocab, order=order)
    found = ngram.probabilities(ngram.train(keys, vocab=vocab, order=order, discount=0.75), keys)
    expected = plainly(texts, vocab, order, Fraction(3, 4))
    np.testing.assert_allclose(found, [float(value) for value in expected], rtol=1e-12)


def plainly(texts, vocab, order, discount):
    """Interpolated Kneser-Ney with dictionaries, straight from the equations."""
    windows = []
    for text in texts:
        padded = [BOS] * max(0, order - 2) + text.tolist()
        windows += [tuple(padded[i - order + 1 : i + 1]) for i in range(order - 1, len(padded))]
    tables = [Counter(windows)]
    for _ in range(order - 1):
        tables.append(Counter(gram[1:] for gram in tables[-1]))

    def chance(gram, level):
        if not gram:
            return Fraction(1, vocab)
        followers = defaultdict(int)
        for other, count in tables[level].items():
            if other[:-1] == gram[:-1]:
                followers[other[-1]] += count
        lower = chance(gram[1:], level + 1)
        if not followers:
            return lower
        total = sum(followers.values())
        kept = max(followers[gram[-1]] - discount, 0) if gram[-1] in followers else 0
        rest = discount * sum(count > 0 for count in followers.values())
        return Fraction(kept) / total + rest / total * lower

    return [chance(window, 0) for window in windows]


def test_estimated_discounts_follow_the_counts_of_counts():
    # 40 tokens seen once, 10 twice, 4 three times, 2 four times: Y = 40 / 60.
    counts = np.asarray([1] * 40 + [2] * 10 + [3] * 4 + [4] * 2 + [9])
    y = 40 / 60
    expected = [0.0, 1 - 2 * y * 10 / 40, 2 - 3 * y * 4 / 10, 3 - 4 * y * 2 / 4]
    np.testing.assert_allclose(ngram._discounts(counts, None), expected)
    np.testing.assert_allclose(ngram._discounts(np.asarray([5, 6]), None), [0.0, *ngram.FALLBACK_DISCOUNTS])


def test_no_window_reaches_into_the_document_before():
    together = ngram.pack(documents([1, 2, 3], [3, 1]), vocab=4, order=3)
    apart = [ngram.pack(documents(text), vocab=4, order=3) for text in ([1, 2, 3], [3, 1])]
    np.testing.assert_array_equal(together, np.concatenate(apart))
    assert len(together) == 5
    assert together[3] == ngram.pack(documents([3]), vocab=4, order=3)[0]


def test_a_long_pattern_is_learned_only_by_an_order_that_sees_it():
    # After "2 3" comes 4 or 5, depending on the token before.
    texts = documents(*([[1, 2, 3, 4], [6, 2, 3, 5]] * 20))
    loss = {}
    for order in (1, 3, 4):
        keys = ngram.pack(texts, vocab=8, order=order)
        loss[order] = -np.log(ngram.probabilities(ngram.train(keys, vocab=8, order=order), keys)).mean()
    assert loss[4] < 0.6 * loss[3] < loss[1]


def test_longer_keys_may_ask_a_shorter_model():
    texts = random_documents(9)
    model = ngram.train(ngram.pack(texts, vocab=9, order=2), vocab=9, order=2)
    short = ngram.probabilities(model, ngram.pack(texts, vocab=9, order=2))
    long = ngram.probabilities(model, ngram.pack(texts, vocab=9, order=5))
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize(("vocab", "order"), [(2, 64), (4096, 5), (4097, 4), (65_536, 4), (65_537, 3)])
def test_the_order_is_as_long_as_a_key_allows(vocab, order):
    assert ngram.longest_order(vocab) == order
    with pytest.raises(InputError, match=f"at most {order}"):
        ngram.pack(documents([1]), vocab=vocab, order=order + 1)


def test_the_highest_token_of_the_widest_key_is_not_lost():
    vocab, order = 65_536, 4
    texts = documents([65_535] * 6)
    model = ngram.train(ngram.pack(texts, vocab=vocab, order=order), vocab=vocab, order=order)
    assert ngram.probabilities(model, ngram.pack(texts, vocab=vocab, order=order)).min() > 0.2


def test_foreign_tokens_and_empty_text_are_refused():
    with pytest.raises(InputError, match="outside the vocabulary of 4"):
        ngram.pack(documents([1, 4]), vocab=4, order=2)
    with pytest.raises(InputError, match="no text to count"):
        ngram.train(ngram.pack([], vocab=4, order=2), vocab=4, order=2)
