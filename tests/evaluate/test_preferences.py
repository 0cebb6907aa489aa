"""`edgealign eval preferences`: a model that was trained on the pairs ranks them better, and is said to."""

from __future__ import annotations

import json

import pytest

from edgealign.errors import InputError
from edgealign.evaluate import preferences
from edgealign.evaluate.recipes import PreferencesRecipe
from edgealign.train import preference
from edgealign.train.recipes import PreferenceRecipe

SMALL = PreferencesRecipe(prompts=3, max_new_tokens=8, threads=1, bootstrap=100)


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No {i}, no!"} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_a_trained_model_ranks_better_than_the_first(tiny_model, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEALIGN_CACHE", str(tmp_path / "cache"))
    recipe = PreferenceRecipe(threads=1, batch_size=8, epochs=4, tokens_per_pass=256, learning_rate=5e-4)
    preference.run(recipe, model=tiny_model, data=[pairs], out=tmp_path / "trained")
    made = preferences.run(
        SMALL, models={"before": tiny_model, "after": tmp_path / "trained"}, data=[pairs], judge="rule:length",
        out=tmp_path / "report",
    )
    result = json.loads((made.path / "result.json").read_text())
    before, after = result["ranking"]["before"], result["ranking"]["after"]
    assert after["accuracy"]["mean"]["value"] == 1.0
    assert after["margin_mean"] > 0
    assert after["kl_on_data"] > 0
    assert (before["displacement"], before["accuracy"].get("mean")) == (None, None)
    assert after["displacement"] == pytest.approx(after["logp_chosen"] - before["logp_chosen"], abs=1e-5)
    assert result["writing"]["before"]["win_rate"] is None
    assert 0 <= result["writing"]["after"]["win_rate"]["controlled"] <= 1
    assert {path.name for path in made.path.iterdir()} >= {"table.md", "preferences.png", "answers.jsonl"}
    assert len((made.path / "answers.jsonl").read_text().splitlines()) == 6
    assert "length-controlled" in (made.path / "table.md").read_text()


def test_the_first_model_alone_is_ranked_without_a_reference(tiny_model, pairs, tmp_path):
    made = preferences.run(SMALL, models={"one": tiny_model}, data=[pairs], judge=None, out=tmp_path / "report")
    result = json.loads((made.path / "result.json").read_text())
    assert set(result["ranking"]["one"]["accuracy"]) == {"sum_free", "mean_free"}
    assert result["writing"] is None


def test_models_with_other_tokens_are_refused(tiny_model, pairs, tmp_path):
    with pytest.raises(InputError, match="has another tokenizer than the first model"):
        preferences.run(SMALL, models={"a": tiny_model, "b": "starter"}, data=[pairs], judge=None, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()
