"""What a search tries next, what it may choose, and what it chooses; and devices that speeds are predicted for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgealign.artifact import publish
from edgealign.errors import EdgealignError, InputError, UsageError
from edgealign.parity_recipes import VerifyRecipe
from edgealign.tensor_types import GROUPS, Mixture

GATE = VerifyRecipe()


def trial(
    label: str, kl: float | None = 0.01, decode: Sequence[float] = (), prefill: Sequence[float] = (1.0,), **facts: Any
) -> Any:
    from quant_candidates import Trial

    base, *parts = label.split("+")
    head = next((part.removeprefix("head=") for part in parts if part.startswith("head=")), None)
    groups = tuple(part for part in parts if not part.startswith("head="))
    types = {group: {"q4_0": 1} for group in GROUPS}
    made = Trial(Mixture(base, head, groups), kl=kl, types=types, token_bytes=100, **facts)
    made.decode, made.prefill = list(decode), list(prefill)
    return made


def test_the_fastest_decode_is_chosen_where_intervals_are_apart() -> None:
    from quant_candidates import choose

    slow, fast = trial("q8_0", 0.001, [40.0, 41, 42]), trial("q4_0", 0.09, [50.0, 51, 52])
    assert choose([slow, fast]) == (fast, "the fastest decode")


def test_where_decode_overlaps_the_faster_prefill_is_chosen_and_it_says_so() -> None:
    from quant_candidates import choose

    one = trial("q4_0", 0.01, [50.0, 51, 53], [100.0, 101])
    two = trial("q4_k_s", 0.05, [49.0, 50, 52], [200.0, 201])
    chosen, why = choose([one, two, trial("q8_0", 0.001, [40.0, 41, 42], [300.0, 301])])
    assert chosen is two
    assert why == "no difference in decode is shown to q4_0 (intervals overlap), and prefill is the fastest"


def test_where_everything_overlaps_the_lower_kl_is_chosen_and_it_says_so() -> None:
    from quant_candidates import choose

    one = trial("q4_0", 0.05, [50.0, 51, 53], [100.0, 120])
    two = trial("q4_0+head=q8_0", 0.01, [49.0, 50, 52], [90.0, 110])
    chosen, why = choose([one, two])
    assert chosen is two
    assert why == "no difference in speed is shown to q4_0 (intervals overlap), and the KL is the lowest"


def test_a_prediction_has_no_interval_and_is_called_one() -> None:
    from quant_candidates import choose

    slow, fast = trial("q8_0", predicted=40.0, prefill=()), trial("q4_0", predicted=50.0, prefill=())
    assert choose([slow, fast]) == (fast, "the fastest decode that is predicted")
    equal = trial("q4_0+head=q4_k", 0.001, predicted=50.0, prefill=())
    assert choose([slow, fast, equal])[0] is equal


def test_the_budget_and_the_gates_bound_the_choice() -> None:
    from quant_candidates import excess

    assert excess(trial("q4_0", 0.1), GATE, 0.1) is None
    assert excess(trial("q4_0", 0.11), GATE, 0.1) == "over the budget"
    assert excess(trial("q8_0", 0.03), GATE, 0.1) == "over the parity gate (kl_8bit = 0.02)"
    assert excess(trial("q8_0+head=q4_0", 0.03), GATE, 0.1) is None
    assert excess(trial("q4_0", 0.01, correlation=0.5), GATE, 0.1) == "under the parity gate (corr_4bit = 0.7)"
    assert excess(trial("q4_0", 0.01, top1=0.5), GATE, 0.1) == "under the parity gate (top1_4bit = 0.8)"
    assert "a prompt against its single tokens" in str(excess(trial("q4_k_s", 0.01, feeding=0.27), GATE, 0.1))
    assert excess(trial("q4_k_s", 0.01, feeding=0.04), GATE, 0.1) is None


def test_groups_are_raised_only_where_a_base_loses_too_much_with_every_head() -> None:
    from quant_candidates import single_repairs

    trials = [trial("q4_0", 0.3), trial("q4_0+head=q8_0", 0.2), trial("q4_k_s", 0.3), trial("q4_k_s+head=q8_0", 0.05)]
    ((start, mixtures),) = single_repairs(trials, GATE, 0.1)
    assert start.label == "q4_0+head=q8_0"
    assert [mixture.label for mixture in mixtures] == [f"q4_0+head=q8_0+{group}=q8_0" for group in GROUPS]
    assert single_repairs(trials, GATE, 0.24) == []


def test_groups_are_joined_by_what_they_win_for_their_bytes() -> None:
    from quant_candidates import joint_repairs

    start = trial("q4_0", 0.3)
    singles = [trial("q4_0+attn=q8_0", 0.25), trial("q4_0+conv=q8_0", 0.2), trial("q4_0+ffn_down=q8_0", 0.1),
               trial("q4_0+ffn_up=q8_0", None, error="crashed")]  # fmt: skip
    for single, more in zip(singles, (110, 120, 200, 0), strict=True):
        single.token_bytes = more  # wins per byte: 0.005, 0.005, 0.002
    assert [mixture.groups for mixture in joint_repairs(start, singles)] == [
        ("attn=q8_0", "conv=q8_0"), ("attn=q8_0", "conv=q8_0", "ffn_down=q8_0"),
    ]  # fmt: skip


def test_a_round_keeps_the_faster_half_and_never_fewer_than_three() -> None:
    from quant_candidates import keep_faster

    field = [trial(f"q4_0+attn={kind}", decode=[speed]) for kind, speed in
             (("f16", 1.0), ("q8_0", 9), ("q6_k", 5), ("q5_k", 7), ("q5_1", 2), ("q5_0", 8), ("q4_k", 3))]  # fmt: skip
    left = keep_faster(field)
    assert [entry.decode[0] for entry in left] == [9, 5, 7, 8]
    assert [entry.decode[0] for entry in keep_faster(left[:3])] == [9, 5, 7]


def test_the_front_is_what_nothing_beats_in_both() -> None:
    from quant_candidates import front

    known = [trial("q8_0", 0.001, [10.0]), trial("q6_k", 0.002, [9.0]), trial("q4_0", 0.05, [30.0]),
             trial("q4_k_s", 0.06, [20.0]), trial("q4_k_m", 0.2)]  # fmt: skip
    assert [entry.label for entry in front(known)] == ["q8_0", "q4_0"]


def make_report(folder: Path, bandwidth: object) -> Path:
    result = {
        "schema": 2, "source": "edgealign bench", "comparable": True, "caveats": [], "results": [], "bundles": [],
        "machine": {"cpu": "X1", "versions": {}}, "bandwidth": bandwidth,
    }  # fmt: skip
    with publish(folder, kind="report", format="bench", stage="bench", recipe={}) as draft:
        (draft.dir / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def test_a_device_is_read_from_a_report_a_card_or_a_number(tmp_path: Path) -> None:
    from quant_timing import read_device

    measured = [{"threads": 1, "bytes_per_s": 15e9}, {"threads": 2, "bytes_per_s": 29e9}]
    report = make_report(tmp_path / "report", measured)
    assert (read_device(str(report), threads=1).bytes_per_s, read_device(str(report), threads=0).threads) == (15e9, 2)
    assert read_device(str(report), threads=8).bytes_per_s == 29e9
    assert read_device(str(report), threads=0).source.role == "device"
    (tmp_path / "card.json").write_text('{"device": "Pixel", "bandwidth_gb_s": 51.2}', encoding="utf-8")
    card = read_device(str(tmp_path / "card.json"), threads=0)
    assert (card.card["device"], card.bytes_per_s, card.threads) == ("Pixel", 51.2e9, None)
    assert read_device("bandwidth_gb_s=30", threads=0).bytes_per_s == 30e9


def test_a_device_without_a_bandwidth_or_a_damaged_one_is_one_line(tmp_path: Path) -> None:
    from quant_timing import read_device

    files = {"none.json": '{"device": "Pixel"}', "empty.json": "", "list.json": "[1]", "big.json":
             '{"bandwidth_gb_s": 1e99}', "text.json": '{"bandwidth_gb_s": "nan"}'}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(EdgealignError) as caught:
            read_device(str(tmp_path / name), threads=0)
        assert "\n" not in caught.value.line()
    with pytest.raises(UsageError, match="says nothing of the bandwidth; add bandwidth_gb_s"):
        read_device("cpu=X1", threads=0)
    hostile: list[object] = [[], [1], [{"threads": "2", "bytes_per_s": 1}], [{"threads": 1, "bytes_per_s": -1}], None]
    for place, bandwidth in enumerate(hostile):
        with pytest.raises(InputError, match="is a report without a bandwidth"):
            read_device(str(make_report(tmp_path / f"r{place}", bandwidth)), threads=0)
