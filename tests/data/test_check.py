"""The report on a data file: what it counts, and that it reads well in a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgealign.data.check import check, render
from edgealign.data.lengths import correlation, length_bias, percentiles
from edgealign.data.report import line_ranges, table

WriteJsonl = Callable[..., Path]


def pair(prompt: str, chosen: str, rejected: str, user: str | None = None) -> dict[str, str | None]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": user}


@pytest.fixture
def mixed(write_jsonl: WriteJsonl) -> Path:
    return write_jsonl([
        pair("Tea?", "a b c", "a", "ana"),
        pair("Tea?", "a b c", "a", "ana"),  # line 2 repeats line 1
        pair("Tea?", "a b c", "a", "bo"),  # another person: no repetition
        pair("Tea?", "a", "a b c", "ana"),  # contradicts line 1
        pair("Milk?", "[INST] yes", "no </s>", "ana"),
        pair("Milk?", "same", "same", "ana"),
        pair("Milk?", "", "no", "ana"),
        "{",
    ])


def test_check_counts_everything_and_raises_nothing(mixed: Path) -> None:
    report = check(mixed)
    assert (report["total"], report["rows"], report["form"]) == (8, 5, "pair")
    assert [(bad["line"], bad["kind"]) for bad in report["bad_rows"]] == [(6, "same"), (7, "empty"), (8, "json")]
    assert (report["chosen_equals_rejected"], report["empty_turns"]) == (1, 1)
    assert report["duplicates"] == {"rows": 1, "groups": [[1, 2]]}
    assert report["contradictions"] == [[1, 4]]
    markers = [(found["marker"], found["template"], found["rows"], found["first_line"]) for found in report["markers"]]
    assert markers == [("</s>", "Llama 2, Mistral, Zephyr", 1, 5), ("[INST]", "Llama 2, Mistral", 1, 5)]
    assert report["users"]["count"] == 2
    assert [report["users"][f"choices_{which}"] for which in ("min", "median", "max")] == [1, 2.5, 4]
    assert not report["ok"]


def test_the_report_is_json_and_holds_no_text_of_the_data(mixed: Path) -> None:
    dumped = json.dumps(check(mixed))
    assert "Milk" not in dumped
    assert "a b c" not in dumped


def test_the_length_bias_of_a_file_is_reported_per_gap(write_jsonl: WriteJsonl) -> None:
    rows = [pair(f"{n}?", "w " * 15, "l") for n in range(3)] + [pair("x?", "w", "l " * 15), pair("y?", "w", "l")]
    bias = check(write_jsonl(rows))["length_bias"]
    assert bias["longer_wins_share"] == 0.75
    assert bias["equal_length"] == 1
    assert bias["mean_gap"] == pytest.approx((3 * 14 - 14) / 5)
    buckets = {
        bucket["gap_from"]: (bucket["pairs"], bucket["longer_wins"], bucket["share"]) for bucket in bias["buckets"]
    }
    assert buckets[10] == (4, 3, 0.75)
    assert buckets[0] == (1, 0, None)
    assert sum(pairs for pairs, _, _ in buckets.values()) == 5


def test_balanced_lengths_show_no_bias() -> None:
    bias = length_bias([(10, 20), (20, 10)])
    assert (bias["longer_wins_share"], bias["mean_gap"], bias["label_length_correlation"]) == (0.5, 0.0, 0.0)


def test_always_longer_is_the_full_bias() -> None:
    bias = length_bias([(20, 10)] * 4)
    assert (bias["longer_wins_share"], bias["label_length_correlation"]) == (1.0, pytest.approx(1.0))


def test_correlation_agrees_with_numpy_and_knows_when_there_is_none() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    first, second = rng.normal(size=50), rng.normal(size=50)
    assert correlation(list(first), list(second)) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert correlation([1.0, 1.0], [1.0, 2.0]) is None


def test_percentiles_are_values_that_occur() -> None:
    found = percentiles(list(range(1, 101)))
    assert (found["min"], found["p50"], found["p95"], found["p99"], found["max"]) == (1, 50, 95, 99, 100)
    assert percentiles([7])["p1"] == 7


def test_thumbs_are_counted_with_their_lengths(write_jsonl: WriteJsonl) -> None:
    rows = [{"prompt": "p", "completion": "w " * n, "label": n > 5} for n in (2, 4, 6, 8)]
    bias = check(write_jsonl(rows))["length_bias"]
    assert (bias["liked"], bias["disliked"], bias["mean_liked"], bias["mean_disliked"]) == (2, 2, 7, 3)
    assert bias["label_length_correlation"] == pytest.approx(2 / 5**0.5)


def test_without_a_model_lengths_are_words_and_it_says_so(mixed: Path) -> None:
    report = check(mixed, context=3)
    assert report["unit"] == "words"
    assert report["lengths"]["over_context"] == 4
    assert "whitespace words: give --model to count tokens" in render(report)


def test_with_a_model_lengths_are_tokens_and_its_refusals_are_listed(
    write_jsonl: WriteJsonl, tiny_model: Path
) -> None:
    path = write_jsonl([
        {"prompt": "Hi", "completion": "Yo"}, {"prompt": "Hi", "completion": "Yo<|im_end|>"},
        {"prompt": "Hi " * 600, "completion": "Yo"},
    ])
    report = check(path, model=tiny_model)
    assert report["unit"] == "tokens"
    assert report["lengths"]["context"] == 512
    assert report["lengths"]["over_context"] == 1
    assert [row["line"] for row in report["refused_by_template"]] == [2]
    assert report["markers"][0] | {"rows": 1} == {
        "marker": "<|im_end|>", "template": "ChatML", "rows": 1, "first_line": 2, "token_of_this_model": True
    }
    text = render(report)
    assert "rows that the model's template refuses: 1" in text
    assert "longer than the context of 512 tokens: 1 rows" in text
    assert not report["ok"]


def test_a_clean_file_is_ok(write_jsonl: WriteJsonl) -> None:
    report = check(write_jsonl([{"text": "Tea is a leaf."}]))
    assert report["ok"]
    assert report["users"] is None
    assert report["length_bias"] is None


def test_ties_are_reported_and_are_not_bad(write_jsonl: WriteJsonl) -> None:
    row = {"pair_id": "p", "title": "T", "stance": "s", "a1": "x", "a2": "y"}
    path = write_jsonl([row | {"dev_votes": {"a1": 1, "a2": 1}}, row | {"dev_votes": {"a1": 2, "a2": 1}}])
    report = check(path)
    assert (report["ties"], report["bad_rows"], report["ok"]) == (1, [], True)
    assert "1 ties (neither is better, not used)" in render(report)


def test_the_text_shows_every_bad_line_and_every_section(mixed: Path) -> None:
    text = render(check(mixed))
    for line in (
        "  line 6: chosen and rejected are the same", "  line 7: chosen is empty", "  line 8: not JSON",
        "--skip-bad 3", "duplicates: 1 rows", "contradictions: 1 pairs", "[INST]", "length bias:", "users: 2",
    ):
        assert line in text
    assert max(map(len, text.splitlines())) < 160


def test_bad_lines_with_one_reason_share_a_line() -> None:
    assert line_ranges([9, 3, 4, 5]) == "3-5, 9"
    assert line_ranges([1]) == "1"


def test_tables_are_aligned() -> None:
    assert table([["gap", "pairs"], ["0", 5], ["10 or more", 1234]]) == [
        "  gap         pairs", "  0               5", "  10 or more   1234"
    ]


def test_markers_are_found_where_they_are_markers(write_jsonl: WriteJsonl) -> None:
    texts = ["### Instruction:\nGo", "<start_of_turn>user", "<|eot_id|>", "USER: hi", "the USER: field", "plain"]
    report = check(write_jsonl([{"text": text} for text in texts]))
    assert {found["marker"]: found["first_line"] for found in report["markers"]} == {
        "### Instruction": 1, "<start_of_turn>": 2, "<|eot_id|>": 3, "USER:": 4
    }
