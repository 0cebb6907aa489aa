"""The whole stage: a planted taste is learned, and nothing else is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgealign.artifact import open_artifact
from edgealign.errors import CheckFailed
from edgealign.models.load import load_model
from edgealign.personalize import lora
from edgealign.personalize.choices import split
from edgealign.personalize.lora import gate, slug

Fit = Callable[..., Any]


@pytest.fixture
def fit(tiny_model: Path, planted: Any) -> Callable[..., Any]:
    def run(recipe: Any, rows: Any, folder: Path, **more: Any) -> Any:
        choices = planted.write(rows, folder / "choices.jsonl")
        return lora.run(recipe, model=tiny_model, choices=choices, user="ana", out=folder / "ana", **more)

    return run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(5, 37)[None]).logits
    return out


def test_a_planted_taste_is_learned_and_published_in_peft_layout(
    tiny_model: Path, fit: Fit, quick: Any, planted: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    artifact = fit(quick(), planted.likes_short(12), tmp_path)
    meta = artifact.meta
    assert meta["base_digest"] == open_artifact(tiny_model).digest
    assert meta["user"] == "ana"
    assert (meta["choices"]["fitted"], meta["choices"]["held_out"]) == (9, 3)
    assert meta["share"] == pytest.approx(9 / (9 + 8))
    before, after = meta["held_out_before"], meta["held_out_after"]
    assert after["accuracy"] >= before["accuracy"]
    assert after["margin"] > before["margin"] + 0.02
    assert [check.passed for check in artifact.manifest.checks] == [True] * 4
    assert meta["first_step"]["preference"] == pytest.approx(0.6931, abs=1e-4)
    config = json.loads((artifact.path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == open_artifact(tiny_model).digest
    assert str(tmp_path.parent) not in (artifact.path / "manifest.json").read_text(encoding="utf-8")
    base = load_model(tiny_model)
    plain = logits(base)
    personal = logits(PeftModel.from_pretrained(base, str(artifact.path)).eval())
    assert float((plain - personal).abs().max()) > 0.05


def test_the_same_choices_and_seed_give_the_same_adapter(
    fit: Fit, quick: Any, planted: Any, tmp_path: Path
) -> None:
    digests = []
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        digests.append(fit(quick(epochs=1), planted.likes_short(8), folder).digest)
    assert digests[0] == digests[1]


def test_the_opposite_users_choices_do_not_pass_this_users_check(
    tiny_model: Path, fit: Fit, quick: Any, planted: Any, tmp_path: Path
) -> None:
    rows = planted.likes_short(12)
    fitted, held_out = split(rows, share=0.25)
    with pytest.raises(CheckFailed, match=r"3 held-out choices, ranking accuracy .* not published") as caught:
        fit(quick(), [*planted.flipped(fitted), *held_out], tmp_path)
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choices.jsonl"]


@pytest.mark.slow
def test_shuffled_labels_teach_less_than_the_real_ones(
    fit: Fit, quick: Any, planted: Any, tmp_path: Path
) -> None:
    rows = planted.likes_short(16)
    fitted, held_out = split(rows, share=0.25)
    shuffled = [*planted.flipped(fitted[0::2]), *fitted[1::2], *held_out]
    gains = []
    for name, choices in (("real", rows), ("shuffled", shuffled)):
        (tmp_path / name).mkdir()
        try:
            meta = fit(quick(), choices, tmp_path / name).meta
            gains.append(meta["held_out_after"]["margin"] - meta["held_out_before"]["margin"])
        except CheckFailed:
            gains.append(0.0)
    assert gains[1] < 0.25 * gains[0]


def test_few_choices_move_a_user_less_than_many(
    fit: Fit, quick: Any, planted: Any, tmp_path: Path
) -> None:
    shares = []
    for n in (4, 16):
        (tmp_path / str(n)).mkdir()
        shares.append(fit(quick(epochs=1), planted.likes_short(n), tmp_path / str(n)).meta["share"])
    assert shares == pytest.approx([3 / 11, 12 / 20])


def test_a_user_starts_from_the_population_and_the_result_is_one_plain_lora(
    tiny_model: Path, tiny_lora: Any, fit: Fit, quick: Any, planted: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    from edgealign.personalize.lowrank import read_peft

    population = tiny_lora(seed=3, rank=2, strength=0.02, targets=("q_proj", "w1"))
    artifact = fit(quick(), planted.likes_short(8), tmp_path, population=population)
    assert {entry.role for entry in artifact.manifest.inputs} == {"base", "population", "choices"}
    assert artifact.meta["rank"] == 2 + 8
    both, shared = read_peft(artifact.path), read_peft(population)
    name = "model.layers.0.feed_forward.w1"
    torch.testing.assert_close(both[name].b[:, :2] @ both[name].a[:2], shared[name].b @ shared[name].a)
    base = load_model(tiny_model)
    start = logits(PeftModel.from_pretrained(base, str(population)).eval())
    end = logits(PeftModel.from_pretrained(load_model(tiny_model), str(artifact.path)).eval())
    assert float((start - end).abs().max()) > 0.02


def test_an_adapter_that_would_change_nothing_is_not_published(
    tiny_model: Path, fit: Fit, quick: Any, planted: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckFailed, match="would change nothing"):
        fit(quick(prior_strength=1e60), planted.likes_short(6), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choices.jsonl"]


@pytest.mark.parametrize(
    ("accuracies", "margins", "published"),
    [
        ((0.5, 0.75), (0.1, 0.0), True),  # ranked better
        ((0.5, 0.5), (0.1, 0.1), True),  # exactly as well
        ((0.5, 0.5), (0.1, 0.2), True),
        ((0.5, 0.5), (0.1, 0.05), False),  # the same ranking, but it moved the wrong way
        ((0.5, 0.25), (0.1, 0.9), False),  # ranked worse, whatever the margin
    ],
)
def test_the_gate_looks_at_the_ranking_first(
    accuracies: tuple[float, float], margins: tuple[float, float], published: bool
) -> None:
    assert all(check.passed for check in gate(*accuracies, *margins)) is published


def test_a_user_id_that_is_no_plain_word_stays_out_of_the_manifest() -> None:
    assert slug("u0042") == "u0042"
    assert slug("Ana_M-2") == "Ana_M-2"
    assert slug("ana@example.org") == slug("ana@example.org")
    assert slug("ana@example.org").startswith("user-")
    assert "ana" not in slug("ana@example.org")
    assert slug("../x") != slug("x")
