"""benchmarks/real_people.py on made-up data in the real layout: who differs is told apart, who does not is not."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
WORDS = ("red", "blue", "green", "tea", "milk", "bread", "rain", "snow", "sun", "wind", "moon", "sea")


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("real_people")


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def made_up(folder: Path, prefers: Callable[[int, np.random.Generator], bool]) -> Path:
    """96 pairs of a short and a long argument on eight topics, and 40 people who voted on all of them."""
    pairs, votes, rng = [], [], np.random.default_rng(0)
    for number in range(96):
        one, two, three = (WORDS[(number * step + step) % len(WORDS)] for step in (1, 5, 7))
        sides = [f"{one} {number}.", f"well, I would say {one} and {two}, then {three} and {two} once more, {number}."]
        if number % 2:
            sides.reverse()
        topic = f"topic {number % 8}"
        pairs.append({"pair_id": f"p{number}", "topic": topic, "title": topic, "stance": "yes", "a1": sides[0],
                      "a2": sides[1]})  # fmt: skip
        for person in range(40):
            short = prefers(person, rng)
            votes.append({"pair_id": f"p{number}", "user_id": f"u{person}",
                          "choice": "a1" if short == (number % 2 == 0) else "a2"})  # fmt: skip
    write(folder / "ukpconvarg1/pairs.jsonl.gz", pairs)
    write(folder / "ukpconvarg1/votes.jsonl.gz", votes)
    write(folder / "anthropic_evals_persona/dev_benign.jsonl.gz", [
        {"persona": f"d{place}", "statement": f"I {'' if agree else 'do not '}like {word} {extra}", "agree": agree}
        for place, word in enumerate(WORDS[:6]) for agree in (0, 1) for extra in range(8)
    ])  # fmt: skip
    return folder


def study(bench: ModuleType, model: Path, data: Path) -> dict[str, Any]:
    reader = bench.Reader(str(model), None, 1)
    try:
        known = bench.voters(reader, data, 24)
    finally:
        reader.session.close()
    taught, people, without = bench.split_voters(known, 0)
    assert len(people) == 16
    return {"groups": {
        group: {str(k): values for k, values in by_k.items()}
        for group, by_k in bench.study(taught, people, 2, 0).items()
    }, "without": without}  # fmt: skip


def test_voters_of_opposite_tastes_are_told_apart_by_their_own_votes_alone(
    bench: ModuleType, tiny_model: Path, tmp_path: Path
) -> None:
    data = made_up(tmp_path, lambda person, rng: (person % 2 == 0) ^ (rng.random() < 0.1))
    found = study(bench, tiny_model, data)
    own, other = (found["groups"][name]["32"]["accuracy"] for name in ("own", "another's"))
    assert np.mean(own) > 0.8
    assert np.mean(other) < np.mean(own) - 0.2
    assert abs(found["without"]["the longer one"] - 0.5) < 0.1
    verdicts = sys.modules["real_people_report"].verdicts(found)
    assert verdicts[0].startswith("32 choices against none, accuracy: better")
    assert verdicts[1].startswith("own choices against another's, accuracy: better")


def test_voters_who_are_alike_show_no_difference_and_the_majority_foresees_them(
    bench: ModuleType, tiny_model: Path, tmp_path: Path
) -> None:
    found = study(bench, tiny_model, made_up(tmp_path, lambda person, rng: rng.random() < 0.9))
    own = found["groups"]["own"]
    assert abs(np.mean(own["32"]["accuracy"]) - np.mean(own["0"]["accuracy"])) < 0.03
    assert found["without"]["the others' majority"] > 0.85
    assert found["without"]["the longer one"] < 0.2
    verdicts = sys.modules["real_people_report"].verdicts(found)
    assert verdicts[1].startswith("own choices against another's, accuracy: no difference that shows")


def test_what_is_published_of_real_voters_keeps_the_protocols_only_rule() -> None:
    """T15: votes of one's own do no harm to the log loss, and tell more than another's. A gain is nobody's promise."""
    published = json.loads((RESULTS / "real_people/result.json").read_text(encoding="utf-8"))
    groups = published["kinds"]["voters"]["groups"]
    losses = {name: {k: np.mean(found["log_loss"]) for k, found in by_k.items()} for name, by_k in groups.items()}
    assert len(groups["own"]["0"]["log_loss"]) > 100
    for k in ("1", "2", "4", "8", "16", "32"):
        assert losses["own"][k] <= losses["own"]["0"]
        assert losses["own"][k] < losses["another's"][k]


def test_the_whole_run_writes_its_tables_and_picture_and_missing_data_are_one_line(
    bench: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, small in (("SEEN_PEOPLE", 30), ("NEW_PEOPLE", 8), ("PAIRS", 12)):
        monkeypatch.setattr(bench, name, small)
    data = made_up(tmp_path / "data", lambda person, rng: person % 2 == 0)
    options = ["--model", str(tiny_model), "--splits", "1", "--components", "16", "--rank", "2"]
    assert bench.main(["--data", str(data), "--out", str(tmp_path / "out"), *options]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"table.md", "result.json", "real_people.png"}
    table = (tmp_path / "out/table.md").read_text(encoding="utf-8")
    assert "Voters on arguments (real people" in table
    assert "Opinions on statements (drawn people" in table
    (data / "ukpconvarg1/votes.jsonl.gz").write_bytes(b"\x1f\x8b half")
    capsys.readouterr()
    assert bench.main(["--data", str(data), "--out", str(tmp_path / "none"), *options]) == 2
    assert "votes.jsonl.gz: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
