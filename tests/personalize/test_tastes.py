"""Simulated users choose between a model's answers: the file says so, and its choices follow the planted tastes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edgealign.artifact import open_artifact, publish
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import ArtifactError, InputError, UsageError
from edgealign.models import builtin
from edgealign.models.builtin import BASES
from edgealign.personalize import tastes
from edgealign.personalize.basis import open_basis
from edgealign.personalize.embedding import gate
from edgealign.personalize.lore import fit_users
from edgealign.personalize.recipes import TastesRecipe
from edgealign.personalize.traits import TRAITS
from edgealign.pipeline import load_preset

ANSWERS = ("Yes.", "No! Why?", "- one\n- two\n- three", "It depends on the day, I would say, and on the weather.")
RECIPE = TastesRecipe(users=40, pairs=10, traits=("length", "bullets"), flips=0.0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pool") / "pool"
    with publish(out, kind="dataset", format="jsonl", stage="candidates", recipe={}) as draft:
        write_jsonl(draft.dir / "candidates.jsonl", [
            {"prompt": [{"role": "user", "content": f"{number}?"}], "answers": list(ANSWERS)} for number in range(20)
        ])  # fmt: skip
    return out


def test_choices_are_of_made_up_users_between_the_given_answers_and_say_so(pool: Path, tmp_path: Path) -> None:
    made = tastes.run(RECIPE, candidates=pool, out=tmp_path / "tastes")
    rows = [json.loads(line) for line in (made.path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == made.meta["rows"]["pairs.jsonl"] == 400
    assert {row["user_id"] for row in rows} == {f"u{number}" for number in range(40)}
    assert {row[side] for row in rows for side in ("chosen", "rejected")} == set(ANSWERS)
    assert made.meta["simulated"] is True
    assert made.meta["traits"] == ["length", "bullets"]
    again = tastes.run(RECIPE, candidates=pool, out=tmp_path / "again")
    assert again.digest == made.digest


def test_somebody_takes_the_longer_answer_and_somebody_the_shorter(pool: Path, tmp_path: Path) -> None:
    made = tastes.run(RECIPE, candidates=pool, out=tmp_path / "tastes")
    longer: dict[str, list[bool]] = {}
    for line in (made.path / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        if abs(TRAITS["length"](row["chosen"]) - TRAITS["length"](row["rejected"])) > 1:
            longer.setdefault(row["user_id"], []).append(len(row["chosen"]) > len(row["rejected"]))
    shares = np.array([np.mean(each) for each in longer.values()])
    assert (shares > 0.8).sum() >= 4
    assert (shares < 0.2).sum() >= 4


@pytest.mark.parametrize(
    ("recipe", "error", "said"),
    [
        (TastesRecipe(population="signed"), UsageError, "signed-0.1"),
        (TastesRecipe(traits=("lenght",)), UsageError, "length"),
    ],
)
def test_what_is_not_known_is_refused(
    recipe: TastesRecipe, error: type[Exception], said: str, pool: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        tastes.run(recipe, candidates=pool, out=tmp_path / "tastes")
    assert not (tmp_path / "tastes").exists()


def test_a_folder_without_candidates_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ArtifactError, InputError)):
        tastes.run(RECIPE, candidates=tmp_path, out=tmp_path / "tastes")


def test_the_built_in_basis_is_the_starters_small_and_says_that_its_users_were_simulated() -> None:
    folder = builtin.built_in("edgealign:starter-basis", BASES)
    assert folder is not None
    found = open_basis("edgealign:starter-basis")
    assert found.model_digest == open_artifact(builtin.home() / "starter").digest
    assert found.simulated
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 1 << 20
    assert all(check.passed for check in open_artifact(folder).manifest.checks)
    named = " ".join(found.words(sign * row, most=5) for row in np.eye(found.folded.rank) for sign in (1, -1))
    for words in ("shorter", "longer", "bullets", "prose", "more formal", "more casual", "more questions"):
        assert words in named


def test_the_preset_makes_the_basis_that_is_built_in() -> None:
    steps = {step.id: step for step in load_preset("starter-basis").steps}
    made = open_artifact(builtin.home() / "starter-basis").manifest
    for name, value in dataclasses.asdict(steps["basis"].recipe).items():
        assert made.recipe[name] == (list(value) if isinstance(value, tuple) else value), name
    assert {entry.role for entry in made.inputs} == {"model", "choices pairs.jsonl"}


def test_a_missing_built_in_basis_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "home", lambda: tmp_path)
    with pytest.raises(Exception, match="edgealign run starter-basis"):
        open_basis("edgealign:starter-basis")


def test_leaving_one_out_at_once_is_leaving_out_one_after_another() -> None:
    import torch

    projected = np.random.default_rng(3).normal(size=(9, 4))
    losses = []
    for place in range(9):
        weights = fit_users(torch.from_numpy(np.delete(projected, place, axis=0))[None]).weights[0]
        losses.append(np.logaddexp(0, -(projected[place, 0] + projected[place, 1:] @ weights)))
    (check,) = gate(projected)
    assert check.value == pytest.approx(np.mean(losses), abs=1e-9)
