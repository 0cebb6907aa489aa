"""A finished run becomes a folder to ship: small, rounded, speaking, with a card that names everybody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgealign.artifact import open_artifact
from edgealign.data.credits import CREDITS, credit_of
from edgealign.errors import ArtifactError, CheckFailed, InputError
from edgealign.models import package
from edgealign.models.recipes import PackageRecipe
from edgealign.pipeline import load_preset, preset_names, run_preset

PRESET = """
[[stage]]
id = "tales"
run = "prepare"
inputs = { sources = ["data:classic_books/tales.jsonl"] }
recipe = { form = "text", valid = 0.0 }
[[stage]]
id = "unused"
run = "prepare"
inputs = { sources = ["data:gsm8k/sums.jsonl"] }
recipe = { form = "text", valid = 0.0 }
[[stage]]
id = "base"
run = "init"
inputs = { text = ["tales/train.jsonl"] }
recipe = { shape = "tiny", vocab_size = 400, context = 128, dtype = "float32", norm_noise = 0.1 }
[[stage]]
id = "taught"
run = "sft"
inputs = { model = "base", data = ["tales/train.jsonl"] }
recipe = { max_steps = 2, batch_size = 4, learning_rate = 1e-3, precision = "float32", valid_fraction = 0.2 }
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run below run/, its preset beside it."""
    home = tmp_path_factory.mktemp("packaging")
    for place in ("classic_books/tales.jsonl", "gsm8k/sums.jsonl"):
        file = home / "data" / place
        file.parent.mkdir(parents=True)
        rows = [{"text": f"The fox number {number} went over the hill to look for a hen."} for number in range(60)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (home / "mine.toml").write_text(PRESET, encoding="utf-8")
    run_preset(load_preset(str(home / "mine.toml")), out=home / "run", data=home / "data", force=False)
    return home


def packaged(home: Path, out: Path, **options: object) -> Path:
    recipe = PackageRecipe(**options)  # type: ignore[arg-type]
    return package.run(recipe, run_dir=home / "run", preset=str(home / "mine.toml"), model="taught", out=out).path


def test_the_folder_is_a_whole_model_in_bfloat16_without_logs(finished: Path, tmp_path: Path) -> None:
    from edgealign.models.load import check_safetensors, load_model

    made = open_artifact(packaged(finished, tmp_path / "shipped"), kind="model")
    assert {entry.path for entry in made.manifest.files} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    header = check_safetensors(made.path / "model.safetensors")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert made.meta["parameters"] == sum(parameter.numel() for parameter in load_model(made.path).parameters())
    assert made.manifest.inputs[0].digest == open_artifact(finished / "run" / "taught").digest
    assert all(check.passed for check in made.manifest.checks)
    assert made.manifest.licences["classic_books"].startswith("public domain")


def test_the_card_names_what_was_read_and_only_that(finished: Path, tmp_path: Path) -> None:
    out = packaged(finished, tmp_path / "shipped", trained_on="two cores")
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# shipped\n")
    assert "| classic_books: tales | public domain |" in text
    assert "gsm8k" not in text
    assert "fox" not in text, "a card quotes no data"
    assert "on two cores" in text
    row = next(line for line in text.splitlines() if line.startswith("| taught | sft |"))
    assert "max_steps 2" in row
    assert "seed" not in row, "defaults are left out"
    assert " to " in row, "the held-out loss before and after"
    assert "## What it cannot do" in text
    assert str(finished) not in text


def test_too_large_or_changed_by_rounding_is_not_published(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="size in MiB"):
        packaged(finished, tmp_path / "large", limit_mib=0.5)
    with pytest.raises(CheckFailed, match="rounding in nats"):
        packaged(finished, tmp_path / "coarse", max_divergence=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_a_report_puts_its_checks_on_the_card(finished: Path, tmp_path: Path) -> None:
    from edgealign.artifact import Check, publish

    with publish(tmp_path / "chat", kind="report", format="eval", stage="eval_chat", recipe={}) as draft:
        draft.add_check(Check("ends its turn", 0.95, 0.9, True))
        draft.add_check(Check("follows: short", 0.5, 0.7, False))
    made = package.run(
        PackageRecipe(), run_dir=finished / "run", preset=str(finished / "mine.toml"), model="taught",
        out=tmp_path / "shipped", reports=[str(tmp_path / "chat")],
    )  # fmt: skip
    text = (made.path / "README.md").read_text(encoding="utf-8")
    assert "| ends its turn | 0.95 | 0.9 |  |" in text
    assert "| follows: short | 0.5 | 0.7 | missed |" in text


def test_a_run_that_lost_a_stage_or_the_model_is_refused(finished: Path, tmp_path: Path) -> None:
    broken = tmp_path / "copy"
    shutil.copytree(finished, broken)
    shutil.rmtree(broken / "run" / "tales")
    with pytest.raises(InputError, match="tales: is not there any more"):
        packaged(broken, tmp_path / "shipped")
    shutil.rmtree(broken / "run" / "taught")
    with pytest.raises(ArtifactError, match="no such directory"):
        packaged(broken, tmp_path / "shipped")


def test_data_without_a_credit_is_refused() -> None:
    assert credit_of("sgd/train.jsonl.gz")[1].licence == "CC-BY-SA-4.0"
    with pytest.raises(InputError, match=r"has no licence and no credit \(did you mean gsm8k\?\)"):
        credit_of("gsm8/train.jsonl.gz")


@pytest.mark.parametrize("name", preset_names())
def test_everything_that_a_preset_reads_has_a_credit(name: str) -> None:
    from edgealign.models.card import _data_paths

    for step in load_preset(name).steps:
        for path in _data_paths(step.inputs):
            assert credit_of(path)[0] in CREDITS
