"""What `edgealign personalize` refuses: one line with the value, the reason, the way out, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgealign.artifact import open_artifact
from edgealign.errors import EdgealignError, InputError, OutputError, RecipeError
from edgealign.personalize import lora
from edgealign.personalize.adapter import check_adapter_base, open_adapter
from edgealign.personalize.recipes import LoraRecipe
from edgealign.recipe import build

Rows = Sequence[dict[str, Any]]


def choices(n: int, user: str | None = "ana", **changes: Any) -> list[dict[str, Any]]:
    who = {"user_id": user} if user else {}
    return [
        {"prompt": f"question {i}?", "chosen": f"yes {i}", "rejected": f"no {i}", **who, **changes} for i in range(n)
    ]


@pytest.fixture
def refused(tiny_model: Path, tmp_path: Path) -> Callable[..., None]:
    """Run the stage on rows; it must raise with one line, exit 2, and leave nothing."""

    def check(
        rows: Rows, words: str, *, kind: type[EdgealignError] = InputError, user: str = "ana", **more: Any
    ) -> None:
        file = tmp_path / "choices.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = more.pop("recipe", LoraRecipe(threads=1))
        with pytest.raises(kind, match=words) as caught:
            lora.run(recipe, model=tiny_model, choices=str(file), user=user, out=tmp_path / "ana", **more)
        assert "\n" not in caught.value.line()
        assert caught.value.exit_code == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["choices.jsonl"]

    return check


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_choices_are_refused(n: int, refused: Callable[..., None]) -> None:
    refused(choices(n), rf"user ana: has {n} choices?, a fit needs at least 4; collect more")


def test_a_user_who_only_repeats_has_too_few_choices(refused: Callable[..., None]) -> None:
    refused([*choices(3)] * 3, r"has 3 choices that can be used \(6 left out: repeated")


def test_a_user_who_contradicts_every_choice_keeps_the_last_word_only(refused: Callable[..., None]) -> None:
    rows = choices(3)
    opposite = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    refused([*rows, *opposite], r"has 3 choices that can be used \(3 left out: repeated, contradicted later")


def test_an_unknown_user_gets_a_suggestion(refused: Callable[..., None]) -> None:
    refused(choices(6), r"user anna: made no choice in .*\(did you mean ana\?\); .*edgealign data check", user="anna")


def test_choices_of_nobody_are_refused(refused: Callable[..., None]) -> None:
    refused(choices(6, user=None), "has no user_id column.*--map THEIRS=user_id")


def test_conversations_are_no_choices(refused: Callable[..., None]) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 5
    refused(rows, "holds conversations .* not preference pairs")


def test_choices_that_do_not_fit_are_counted(refused: Callable[..., None]) -> None:
    rows = [*choices(3), *choices(4, prompt="word " * 400)]
    refused(rows, "has 3 choices that can be used", recipe=LoraRecipe(max_tokens=64, threads=1))


def test_a_beta_of_the_other_reduction_is_refused(refused: Callable[..., None]) -> None:
    refused(choices(6), "beta 0.1", kind=RecipeError, recipe=LoraRecipe(beta=0.1, threads=1))


def test_a_target_that_the_model_does_not_have_is_refused(refused: Callable[..., None]) -> None:
    recipe = LoraRecipe(targets=("o_proj",), threads=1)
    refused(choices(6), "o_proj: matches no layer .* use out_proj instead of o_proj", kind=RecipeError, recipe=recipe)


def test_a_population_of_another_model_is_refused_with_both_digests(
    refused: Callable[..., None], tiny_lora: Callable[..., Path], tiny_model: Path
) -> None:
    other = tiny_lora(seed=21, base_digest="f" * 64)
    here = open_artifact(tiny_model).digest[:12]
    refused(choices(6), rf"was fitted on the model ffffffffffff, this model is {here}", population=other)


def test_an_adapter_that_does_not_name_its_model_is_refused(
    tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    nameless = tmp_path / "nameless"
    shutil.copytree(tiny_lora(seed=22), nameless)
    manifest = json.loads((nameless / "manifest.json").read_text(encoding="utf-8"))
    del manifest["meta"]["base_digest"]
    (nameless / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(EdgealignError, match="does not say which model it was fitted on"):
        open_adapter(nameless)


def test_an_adapter_with_a_flipped_byte_is_refused(
    tiny_lora: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_lora(seed=23), broken)
    weights = broken / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EdgealignError, match="SHA-256 differs"):
        check_adapter_base(broken, tiny_model)


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "ana").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        lora.run(LoraRecipe(), model=tmp_path / "absent", choices="absent", user="ana", out=tmp_path / "ana")


def test_an_unknown_recipe_key_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"unknown key learning_rat \(did you mean learning_rate\?\)"):
        build(LoraRecipe, {"learning_rat": 1e-3}, where="ana.toml")
