"""benchmarks/assistant_run.py: people press what their hidden taste is worth more, and equal answers gain nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgealign.personalize.traits import Whitening

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SHORT, LONG = "Wash it.", "First wash it with warm water, then let it stand for a while, and then wash it again."
TEXTS = (SHORT, LONG, "Why not wash it?", "Would you wash it? And then again, with warm water, when it has dried?")


@pytest.fixture(params=["assistant_people", "assistant_report"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{request.param}", FOLDER / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("module", ["assistant_people"], indirect=True)
@pytest.mark.parametrize(("sign", "wanted", "words"), [(-1.0, SHORT, "shorter"), (1.0, LONG, "longer")])
def test_a_person_presses_the_answer_that_is_worth_more(
    module: ModuleType, sign: float, wanted: str, words: str
) -> None:
    scale = Whitening.of(TEXTS, ["length", "questions"])
    person = module.Person("ana", np.array([sign, 0.0]), scale)
    assert person.words() == words
    for left, right in ((SHORT, LONG), (LONG, SHORT)):
        assert {"left": left, "right": right}[person.prefer(left, right)] == wanted
    assert person.prefer(SHORT, SHORT) == "tie"


@pytest.mark.parametrize("module", ["assistant_report"], indirect=True)
def test_equal_answers_win_half_and_the_interval_knows_who_differs(module: ModuleType) -> None:
    people = [{"worth": {"0": [0.0, 1.0], "16": [gain, 1.0 + gain]}} for gain in (0.0, 1.0)]
    by_k = module.gains_by_choices(people)
    assert module.interval(module.wins(by_k[0])) == (0.5, 0.5, 0.5)
    # Both questions gain alike, so only who is drawn matters: nobody with the gain, or both.
    assert module.interval(by_k[16]) == (0.5, 0.0, 1.0)
