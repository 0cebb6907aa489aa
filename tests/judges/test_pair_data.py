"""What judges do to a file of pairs: turning round, leaving out, ordering; rejection sampling."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgealign.data.forms import Message, Pair
from edgealign.data.read import read
from edgealign.errors import InputError, UsageError
from edgealign.judges import filter as filters
from edgealign.judges.filter import Strength, apply, chance_of_a_wrong_label, length_ratio, measure
from edgealign.judges.recipes import FilterRecipe
from edgealign.judges.rejection import accept

ASKED = (Message("user", "Well?"),)
PAIRS = [Pair(ASKED, f"good {i}", f"bad {i}") for i in range(10)]
MEAN = np.array([2.0, -3.0, 0.1, 1.0, -0.2, 3.0, 0.5, -1.0, 1.5, 0.7])


def strength(unsure=None):
    return Strength(MEAN, np.zeros(10) if unsure is None else np.asarray(unsure))


def test_the_weakest_labels_are_turned_round_where_judges_say_the_opposite():
    kept, changed = apply(PAIRS, strength(), FilterRecipe(flip=0.2))
    turned = [i for i, pair in enumerate(kept) if pair.chosen.startswith("bad")]
    assert turned == [1, 7]
    assert changed["turned round"] == 2
    assert kept[1].margin == 3.0
    kept, changed = apply(PAIRS, strength(), FilterRecipe(flip=0.49))
    assert changed["turned round"] == 3  # no label that judges agree with


def test_ties_and_what_judges_differ_on_are_left_out():
    kept, changed = apply(PAIRS, strength(), FilterRecipe(drop_weak=0.2))
    assert (len(kept), changed["too weak"]) == (8, 2)
    assert not {"good 2", "good 4"} & {pair.chosen for pair in kept}
    unsure = [0, 0, 0, 9, 0, 0, 8, 0, 0, 0]
    kept, changed = apply(PAIRS, strength(unsure), FilterRecipe(drop_unsure=0.2))
    assert changed["judges differ"] == 2
    assert not {"good 3", "good 6"} & {pair.chosen for pair in kept}


def test_clear_pairs_come_first_and_margins_are_never_negative():
    kept, _ = apply(PAIRS, strength(), FilterRecipe(easy_first=True))
    margins = [pair.margin for pair in kept]
    assert margins == sorted(margins, reverse=True)
    assert min(margins) == 0.0


def test_softened_labels_say_how_likely_they_are_wrong_and_a_turned_one_is_more_likely_right():
    kept, changed = apply(PAIRS, strength(), FilterRecipe(soften=True))
    found = [pair.facts["epsilon"] for pair in kept]
    assert changed["softened"] == 10
    assert found[3] == pytest.approx(1 / (1 + np.e))
    assert np.argsort(found).tolist()[:2] == [5, 0]  # strengths 3 and 2
    assert [found[i] for i in (1, 4, 7)] == [0.49] * 3  # judges say the opposite
    turned, _ = apply(PAIRS, strength(), FilterRecipe(soften=True, flip=0.2))
    assert turned[1].facts["epsilon"] == pytest.approx(1 / (1 + np.e**3))
    assert chance_of_a_wrong_label(1e6) == pytest.approx(0.0)
    assert all(not pair.facts for pair in apply(PAIRS, strength(), FilterRecipe())[0])


def test_lopsided_pairs_are_left_out_without_any_judge():
    pairs = [Pair(ASKED, "yes", "no and no and no"), Pair(ASKED, "yes", "no!"), Pair(ASKED, "", "no", margin=0.5)]
    assert length_ratio(pairs[0]) == pytest.approx(16 / 3)
    kept, changed = apply(pairs, None, FilterRecipe(longest_ratio=2.0))
    assert [pair.rejected for pair in kept] == ["no!", "no"]
    assert (changed["lengths differ"], kept[1].margin) == (1, 0.5)


def test_judges_of_other_scales_weigh_the_same():
    pairs = [Pair(ASKED, "a b c d e f", "a"), Pair(ASKED, "a", "a b c"), Pair(ASKED, "a b", "a b!")]
    once, twice = measure(pairs, ["rule:length"]), measure(pairs, ["rule:length", "rule:-length"])
    assert once.mean.std() == pytest.approx(1.0)
    assert twice.mean == pytest.approx(np.zeros(3))
    assert twice.unsure == pytest.approx(np.abs(once.mean))


def test_a_file_is_filtered_and_published(tmp_path):
    rows = [{"prompt": "Well?", "chosen": "a " * (i + 2), "rejected": "a " * (9 - i)} for i in range(8)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = FilterRecipe(flip=0.4, soften=True)
    made = filters.run(recipe, data=[str(file)], judges=["rule:length"], out=tmp_path / "out")
    kept = [json.loads(line) for line in (made.path / "train.jsonl").read_text().splitlines()]
    assert made.meta["changed"]["turned round"] == 3
    assert sum(len(row["chosen"]) > len(row["rejected"]) for row in kept) == 7
    again = [row for row in read(made.path / "train.jsonl", form="pair").rows if isinstance(row, Pair)]
    assert all(0 < row.facts["epsilon"] < 0.5 for row in again)  # what rosepo takes
    for recipe, judges, words in (
        (FilterRecipe(drop_unsure=0.1), ["rule:length"], "two or more"), (FilterRecipe(flip=0.1), [], "at least one"),
        (FilterRecipe(soften=True), [], "at least one"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            filters.run(recipe, data=[str(file)], judges=judges, out=tmp_path / "none")
    with pytest.raises(InputError, match="8 pairs: are all left out"):
        filters.run(FilterRecipe(longest_ratio=0.5), data=[str(file)], judges=[], out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_rejection_sampling_draws_from_the_better_policy():
    """Accepted first from two answers of scores 0 and 1: the better one e^(1/beta) times as often."""
    rng = np.random.default_rng(0)
    first = [accept([0.0, 1.0], beta=1.0, count=1, rng=rng)[0] for _ in range(4000)]
    # the best is always accepted; the other, which comes first, with probability e^-1
    assert np.mean(np.asarray(first) == 0) == pytest.approx(np.exp(-1.0), abs=0.03)
    assert accept([0.0, 5.0, 1.0], beta=1e-6, count=1, rng=rng) == [1]
    assert sorted(accept([0.0, 1.0, 2.0], beta=1.0, count=9, rng=rng)) == [0, 1, 2]
    assert accept([], beta=1.0, count=2, rng=rng) == []


def test_answers_that_were_cut_are_empty_or_hold_a_control_token_and_doubles_are_left_out(monkeypatch):
    from edgealign.data.forms import Message
    from edgealign.judges import sample
    from edgealign.models.load import load_tokenizer
    from edgealign.runtimes.generate import Generated
    from edgealign.runtimes.recipes import Sampling

    tokenizer = load_tokenizer("starter")
    said = [
        ("Yes.", "stop"), ("Cut off", "length"), ("Yes.", "stop"), ("", "stop"), ("No<|im_start|>", "stop"),
        ("Two.", "stop"),
    ]  # fmt: skip
    ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text, _ in said]
    drawn = [Generated(each, finish, None, 1, 0.0, 0.0) for each, (_, finish) in zip(ids, said, strict=True)]
    monkeypatch.setattr(sample, "generate_together", lambda *args, **kwargs: drawn)
    one = ((Message("user", "Well?"),), Sampling())
    assert sample.draw_answers(None, tokenizer, [[one] * 5, [one]]) == [["Yes."], ["Two."]]
