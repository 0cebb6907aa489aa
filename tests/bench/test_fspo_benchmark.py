"""benchmarks/fspo.py: a prefix that questions share changes no score, controls are controls, a null result says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgealign.data import users
from edgealign.data.encode import encode_pair
from edgealign.data.recipes import UsersRecipe
from edgealign.personalize import prompted
from edgealign.personalize.shots import with_shots
from edgealign.train.layout import pair


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("fspo")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recipe = UsersRecipe(users=2, new_users=4, choices=8, asked=4, conversations=20)
    return users.run(recipe, out=tmp_path / "people").path


@pytest.fixture
def people(bench: ModuleType, folder: Path) -> Sequence[Any]:
    found, _ = bench.load_people(folder, people=4, asked=3)
    assert [(len(person.own), len(person.asked)) for person in found] == [(8, 3)] * 4
    return list(found)


@pytest.mark.parametrize("k", [0, 2])
def test_questions_that_share_a_prefix_are_scored_as_if_each_stood_alone(
    bench: ModuleType, people: Sequence[Any], tiny_model: Path, k: int
) -> None:
    model = bench.Model(tiny_model)
    shots = people[0].own[:k]
    together = bench.margins(model, None, [prompted.questions(model.tok, shots, people[0].asked, [""] * 3)])[0]
    alone = [
        pair(*encode_pair(model.tok, replace(row, prompt=with_shots(row.prompt, shots)))) for row in people[0].asked
    ]
    one_by_one = [row[0] for row in bench.margins(model, None, alone)]
    assert np.allclose(together, one_by_one, atol=1e-5)
    assert np.abs(together).min() > 1e-4


def test_a_model_against_itself_has_no_implicit_reward(
    bench: ModuleType, people: Sequence[Any], tiny_model: Path
) -> None:
    model = bench.Model(tiny_model)
    tree = prompted.questions(model.tok, people[0].own[:1], people[0].asked, [""] * 3)
    assert bench.margins(model, model, [tree]) == [[0.0] * 3]


def test_a_description_that_both_answers_share_moves_no_log_ratio_but_what_follows_it(
    bench: ModuleType, people: Sequence[Any], tiny_model: Path
) -> None:
    model = bench.Model(tiny_model)
    tree = prompted.questions(model.tok, people[0].own[:1], people[0].asked, ["Likes it short.", "", "Likes it long."])
    for leaf in tree.leaves[:2]:
        assert model.tok.decode(tree.segments[leaf].ids).startswith("Likes it short.\n\n")
    assert not model.tok.decode(tree.segments[tree.leaves[2]].ids).startswith("Likes")


def test_what_shots_tell_at_best_is_nothing_without_any_and_much_with_eight(bench: ModuleType, folder: Path) -> None:
    people, scale = bench.load_people(folder, people=4, asked=4)
    told = bench.told(people, scale, (0, 8))
    assert told["0"] == 0.5
    assert told["8"] >= 0.75
    turned = [replace(one, own=tuple(replace(row, chosen=row.rejected, rejected=row.chosen) for row in one.own))
              for one in people]  # fmt: skip
    assert bench.told(turned, scale, (8,))["8"] == pytest.approx(1 - told["8"])


def test_controls_take_another_persons_choices_or_labels_by_coin(bench: ModuleType, people: Sequence[Any]) -> None:
    assert bench.shots_for(people, 0, 4, "own") == people[0].own[-4:]
    assert bench.shots_for(people, 0, 0, "own") == ()
    assert bench.shots_for(people, 3, 4, "another's") == people[0].own[-4:]
    turned = bench.shots_for(people, 1, 8, "by coin")
    assert turned == bench.shots_for(people, 1, 8, "by coin")
    same = [one == other for one, other in zip(turned, people[1].own, strict=True)]
    assert any(same)
    assert not all(same)
    sides = [{shot.chosen, shot.rejected} for shot in turned]
    assert sides == [{shot.chosen, shot.rejected} for shot in people[1].own]


def test_the_whole_comparison_is_written_and_not_measured_twice(
    bench: ModuleType, folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder.parent
    for name in ("base", "fspo", "few"):
        (run / name).symlink_to(tiny_model)
    arguments = [
        "--run", str(run), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--arms", "base", "fspo",
        "--k", "0", "4", "--people", "3", "--asked", "2", "--prompts", "1", "--new-tokens", "4",
        "--prefix-tokens", "300", "--threads", "1",
    ]  # fmt: skip
    assert bench.main(arguments) == 0
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "FSPO, IPO: 4 own shots against another's | ranking accuracy | +0.000" in table
    assert "**no difference shown**" in table
    assert (tmp_path / "out" / "fspo.png").stat().st_size > 10_000
    capsys.readouterr()
    assert bench.main(arguments) == 0
    assert capsys.readouterr().err.count("measured already") == 2
    assert bench.main([*arguments, "--arms", "plain"]) == 2
    assert "holds no plain" in capsys.readouterr().err


def test_a_difference_that_is_there_is_shown_and_one_that_is_not_is_a_null(bench: ModuleType) -> None:
    rng = np.random.default_rng(0)
    zero = rng.uniform(0.3, 0.7, 24)

    def cell(values: Any) -> dict[str, Any]:
        return {"accuracy": values.tolist()}

    cells = {
        "0 own": cell(zero), "4 own": cell(zero + 0.2), "4 another's": cell(zero + rng.normal(0, 0.05, 24)),
        "4 by coin": cell(zero),
    }
    found = bench.summarise(
        {"fspo": {"cells": cells, "shots_left_out": 0}}, {"fspo": "FSPO"}, [0, 4], 4, ["another's", "by coin"]
    )
    by_name = {row["what"]: row for row in found["differences"]}
    assert by_name["FSPO: 4 shots against none"]["low"] > 0.19
    another = by_name["FSPO: 4 shots, another's, against none"]
    assert another["low"] < 0 < another["high"]
    assert by_name["FSPO: 4 shots, by coin, against none"]["mean"] == 0.0
