"""Going on past a trained model, as far as a judge likes the answers: one model and its base, `--select judge`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgealign.artifact import open_artifact, publish
from edgealign.errors import InputError, UsageError
from edgealign.judges.judge import Question
from edgealign.train import merge, merge_judge
from edgealign.train.merge_recipe import MergeRecipe

WEIGHTS = "model.safetensors"
SEARCH = MergeRecipe(
    search=True, select="judge", search_methods=("task_arithmetic",), search_scales=(1.5, 3.0), judge_prompts=3,
    max_new_tokens=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A child of the tiny model, with the lineage that a stage writes."""
    source = open_artifact(tiny_model)
    out = tmp_path_factory.mktemp("trained") / "model"
    with publish(
        out, kind="model", format="huggingface", stage="dpo", recipe={}, inputs=[source.as_input("model")]
    ) as draft:
        for file in source.path.iterdir():
            if file.name != "manifest.json":
                shutil.copyfile(file, draft.dir / file.name)
        draw = torch.Generator().manual_seed(1)
        weights = load_file(draft.dir / WEIGHTS)
        moved = {name: w + 0.02 * torch.randn(w.shape, generator=draw) for name, w in weights.items()}
        save_file(moved, draft.dir / WEIGHTS, metadata={"format": "pt"})
    return out


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no, never, {i}"} for i in range(5)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_one_model_and_its_base_go_on_along_what_was_learned(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    recipe = MergeRecipe(method="task_arithmetic", scale=1.5)
    made = merge.run(recipe, models=[trained], base=tiny_model, out=tmp_path / "further")
    base, child, found = (load_file(folder / WEIGHTS) for folder in (tiny_model, trained, made.path))
    for name, weight in found.items():
        torch.testing.assert_close(weight, base[name] + 1.5 * (child[name] - base[name]), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="two or more, or one and its --base"):
        merge.run(recipe, models=[trained], out=tmp_path / "alone")


class Grades:
    """A judge whose numbers are known: the first answers it sees get the first number, and so on."""

    name = "rule:known"

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = iter(numbers)
        self.asked: list[int] = []

    def scores(self, questions: list[Question]) -> list[float]:
        self.asked.append(len(questions))
        return [next(self.numbers)] * len(questions)

    def close(self) -> None:
        self.asked.append(-1)


@pytest.mark.parametrize(("numbers", "best"), [
    ([0.0, 1.0, 3.0, 2.0], "task_arithmetic w=1 scale=1.5"), ([0.0, 4.0, 3.0, 2.0], "model 1"),
])  # fmt: skip
def test_the_scale_is_the_one_that_the_judge_likes_best(
    numbers: list[float], best: str, tiny_model: Path, trained: Path, held_out: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    judge = Grades(numbers)
    monkeypatch.setattr(merge_judge, "open_judge", lambda name: judge)
    made = merge.run(SEARCH, models=[trained], base=tiny_model, data=[held_out], judge="rule:known", out=tmp_path / "o")
    rows = made.meta["candidates"]
    assert [row["name"] for row in rows] == [
        "base", "model 1", "task_arithmetic w=1 scale=1.5", "task_arithmetic w=1 scale=3",
    ]  # fmt: skip
    assert [row["grade"] for row in rows] == numbers
    assert made.meta["best"] == best
    assert made.meta["judge"] == "rule:known"
    assert judge.asked == [3, 3, 3, 3, -1]
    (check,) = made.manifest.checks
    assert (check.value, check.passed) == (max(numbers), True)


def test_a_rule_judges_what_the_models_really_say(
    tiny_model: Path, trained: Path, held_out: str, tmp_path: Path
) -> None:
    """More words and fewer words lead to the candidates with the largest and the smallest number."""
    grades = {}
    for name in ("rule:length", "rule:-length"):
        made = merge.run(SEARCH, models=[trained], base=tiny_model, data=[held_out], judge=name, out=tmp_path / name)
        grades[name] = {row["name"]: row["grade"] for row in made.meta["candidates"]}
        assert grades[name][made.meta["best"]] == max(grades[name].values())
    assert grades["rule:length"] == {name: -grade for name, grade in grades["rule:-length"].items()}


def test_a_judge_is_given_exactly_where_one_is_asked(
    tiny_model: Path, trained: Path, held_out: str, tmp_path: Path
) -> None:
    def run(recipe: MergeRecipe, judge: str | None) -> None:
        merge.run(recipe, models=[trained], base=tiny_model, data=[held_out], judge=judge, out=tmp_path / "o")

    with pytest.raises(UsageError, match="--select judge: needs one; give --judge rule:NAME"):
        run(SEARCH, None)
    with pytest.raises(UsageError, match="is not asked where --select is loss"):
        run(MergeRecipe(search=True), "rule:length")
    with pytest.raises(UsageError, match="chooses between candidates; add --search"):
        run(MergeRecipe(method="task_arithmetic"), "rule:length")
    assert not (tmp_path / "o").exists()
