"""benchmarks/assistant_run.py: people press what their hidden taste is worth more, and equal answers gain nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from edgealign.personalize.traits import Whitening

SHORT, LONG = "Wash it.", "First wash it with warm water, then let it stand for a while, and then wash it again."
TEXTS = (SHORT, LONG, "Why not wash it?", "Would you wash it? And then again, with warm water, when it has dried?")


Load = Callable[[str], ModuleType]


@pytest.mark.parametrize(("sign", "wanted", "words"), [(-1.0, SHORT, "shorter"), (1.0, LONG, "longer")])
def test_a_person_presses_the_answer_that_is_worth_more(
    load_benchmark: Load, sign: float, wanted: str, words: str
) -> None:
    people = load_benchmark("assistant_people")
    scale = Whitening.of(TEXTS, ["length", "questions"])
    person = people.Person("ana", np.array([sign, 0.0]), scale)
    assert person.words() == words
    for left, right in ((SHORT, LONG), (LONG, SHORT)):
        assert {"left": left, "right": right}[person.prefer(left, right)] == wanted
    assert person.prefer(SHORT, SHORT) == "tie"


def test_equal_answers_win_half_and_the_interval_knows_who_differs(load_benchmark: Load) -> None:
    module = load_benchmark("assistant_report")
    people = [{"worth": {"0": [0.0, 1.0], "16": [gain, 1.0 + gain]}} for gain in (0.0, 1.0)]
    by_k = module.gains_by_choices(people)
    assert module.interval(module.wins(by_k[0])) == (0.5, 0.5, 0.5)
    # Both questions gain alike, so only who is drawn matters: nobody with the gain, or both.
    assert module.interval(by_k[16]) == (0.5, 0.0, 1.0)


def test_a_lora_that_was_not_published_gains_nothing_and_a_share_is_its_persons_own(load_benchmark: Load) -> None:
    report = load_benchmark("assistant_report")
    message = {"message": "Not used: it ranks 25 % of 4 held-out choices as you did, the version in use 50 %"}
    people = [
        {
            "name": name, "likes": "shorter", "learned": "", "versions": 1, "empty": 0, "prompts": ["a", "b"],
            "worth": {"0": [0.0, 1.0], "4": [gain, 1.0 + gain]}, "another's": [0.0, 1.0],
            "choices": [{"seconds": 0.05}], "tries": {"the numbers": message},
            "loras": {"4": {"seconds": 9.0, "worth": [0.0, 1.0 + lora], **({} if lora else {"none": "worse"})}},
        }
        for name, gain, lora in (("ana", 0.5, 0.2), ("ben", 0.0, 0.0))
    ]  # fmt: skip
    found = report.lora_gains(people)
    assert found[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert found[4] == pytest.approx(np.array([[0.0, 0.2], [0.0, 0.0]]))
    table = report.render({"choices": {each["name"]: each for each in people}})
    assert "| 4 | 75% (50% to 100%) | +0.25 (+0.00 to +0.50) | 62% (50% to 100%) | +0.05" in table
    assert f"| ana | 75% | +0.10 | {message['message']} |  |" in table
    assert f"| ben | none | +0.00 | {message['message']} |  |" in table
    assert "A LoRA, 2 fits: median 9 s, 9 to 9." in table
