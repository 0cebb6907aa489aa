"""A taste is learned from what the bundle itself reads, and followed by it, in every runtime; and forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from assistant.engine import open_engine

from edgealign.artifact import open_artifact
from edgealign.personalize import basis as bases
from edgealign.personalize.recipes import MAX_TASTE, BasisRecipe

from ..personalize.conftest import likes_short, two_tastes
from .conftest import Served, serving
from .test_taste import choose, say, taste, teach

PROMPTS = ("what is number 7?", "red and blue", "well, I would", "the sun")


def learned_basis(model: Path, folder: Path) -> Path:
    """Of twenty-four people, half of whom take the short answer."""
    people = two_tastes(folder / "people.jsonl")
    recipe = BasisRecipe(rank=2, components=12, threads=1)
    bases.run(recipe, model=model, choices=[str(people)], out=folder / "basis")
    return folder / "basis"


@pytest.mark.runtime
@pytest.mark.parametrize(("target", "quant"), [("gguf", "f32"), ("onnx", "fp32"), ("executorch", "fp32")])
def test_a_taste_is_learned_and_followed(
    target: str, quant: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue("short_model" if target == "executorch" else "tiny_model")
    bundle: Path = request.getfixturevalue("tiny_bundle" if target == "gguf" else f"{target}_bundle")(quant)
    engine = open_engine(str(bundle))
    assert engine.facts["base_digest"] == open_artifact(model).digest
    with serving(engine, tmp_path / "home", basis=learned_basis(model, tmp_path)) as served:

        def say(name: str) -> list[str]:
            made = (
                served.client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=12)
                for prompt in PROMPTS
            )
            return [each.choices[0].text for each in made]

        for pair in likes_short(4, start=100):
            last = choose(served, "lia", pair.prompt[0].content, pair.chosen, pair.rejected)
        assert (last["choices"], last["reason"]) == (4, "")
        assert last["words"].startswith("shorter")
        own, base = f"{served.model}@lia", say(served.model)
        taste(served, "lia", "PUT", "/strength", strength=MAX_TASTE)
        assert say(own) != base
        assert say(served.model) == base
        taste(served, "lia", "PUT", "/strength", strength=0)
        assert say(own) == base


def test_who_is_forgotten_is_answered_as_before_they_came(served: Served) -> None:
    """T14."""
    before = say(served, "mia")["content"]
    teach(served, "mia")
    taste(served, "mia", "PUT", "/strength", strength=MAX_TASTE)
    assert say(served, "mia")["content"] != before
    served.http.delete("/api/users/mia").raise_for_status()
    assert say(served, "mia")["content"] == before
