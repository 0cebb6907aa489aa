"""LoRAs along the directions of a basis, and people as weighted sums of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgealign.artifact import open_artifact, publish
from edgealign.data.encode import encode_prompt
from edgealign.data.forms import Message, Pair
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import ArtifactError, InputError, UsageError
from edgealign.models.load import load_tokenizer
from edgealign.personalize import lora_basis, lora_mix
from edgealign.personalize.basis import open_basis
from edgealign.personalize.candidates import FILE, Candidates, encode_answer
from edgealign.personalize.embedding import read_user
from edgealign.personalize.lora_basis import open_loras, telling
from edgealign.personalize.lora_mix import mix
from edgealign.personalize.lowrank import Factors, read_peft
from edgealign.personalize.ranking import mean_logprob
from edgealign.personalize.recipes import LoraBasisRecipe, LoraMixRecipe
from edgealign.runtimes.session import open_session

from .conftest import Planted, short_and_long

NEW = range(300, 312)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two answers each to forty questions."""
    out = tmp_path_factory.mktemp("candidates") / "candidates"
    with publish(out, kind="dataset", format="jsonl", stage="candidates", recipe={}, inputs=[]) as draft:
        write_jsonl(draft.dir / FILE, [
            {"prompt": [{"role": "user", "content": f"what is number {i}?"}], "answers": list(short_and_long(i))}
            for i in range(40)
        ])  # fmt: skip
    return out


@pytest.fixture(scope="module")
def loras(tiny_model: Path, basis: Path, candidates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loras") / "loras"
    recipe = LoraBasisRecipe(learning_rate=1e-2, epochs=3, anchor=0.0, threads=1)
    lora_basis.run(recipe, model=tiny_model, basis=basis, candidates=candidates, out=out)
    return out


def fit(model: Path, basis: Path, loras: Path, folder: Path, pairs: list[Pair], planted: Planted, **more: Any) -> Any:
    folder.mkdir()
    return lora_mix.run(
        LoraMixRecipe(threads=1, **more), model=model, basis=basis, loras=loras, user="ana", out=folder / "ana",
        choices=planted.write(pairs, folder / "choices.jsonl"),
    )  # fmt: skip


def leads(model: Path, adapters: list[Path | None]) -> list[float]:
    """By how many nats a token the short answer to new questions is likelier than the long one."""
    tokenizer, found = load_tokenizer(model), []
    with closing(open_session(model, threads=1)) as session:
        for adapter in adapters:
            session.set_user(adapter)
            gaps = []
            for i in NEW:
                prompt = encode_prompt(tokenizer, (Message("user", f"what is number {i}?"),), typed=True)
                short, long = (mean_logprob(session, prompt, encode_answer(tokenizer, text))
                               for text in short_and_long(i))  # fmt: skip
                gaps.append(short - long)
            found.append(float(np.mean(gaps)))
    return found


def test_people_of_opposite_tastes_are_the_same_loras_with_other_weights(
    tiny_model: Path, basis: Path, loras: Path, planted: Planted, tmp_path: Path
) -> None:
    own = planted.likes_short(4, start=100)
    short = fit(tiny_model, basis, loras, tmp_path / "short", own, planted)
    long = fit(tiny_model, basis, loras, tmp_path / "long", planted.flipped(own), planted)
    base, likes_short, likes_long = leads(tiny_model, [None, short.path, long.path])
    assert likes_short > base + 0.3
    assert likes_long < base - 0.3
    assert np.allclose(short.meta["weights"], -np.array(long.meta["weights"]), atol=0.05)
    assert short.meta["method"] == "lora-mix"
    assert (short.meta["words"].split(",")[0], long.meta["words"].split(",")[0]) == ("shorter", "longer")


def test_a_person_is_the_fitted_weights_times_the_strength(
    tiny_model: Path, basis: Path, loras: Path, planted: Planted, tmp_path: Path
) -> None:
    own = planted.likes_short(3, start=100)
    made = fit(tiny_model, basis, loras, tmp_path / "one", own, planted, strength=0.2)
    _, parts = open_loras(loras, open_basis(basis))
    found = read_peft(made.path)
    for name, wanted in mix(parts, 0.2 * np.array(made.meta["weights"])).items():
        torch.testing.assert_close(found[name].b @ found[name].a, wanted.b @ wanted.a, rtol=0, atol=1e-6)


def test_a_sum_of_loras_is_a_lora() -> None:
    torch.manual_seed(0)
    one = {"x": Factors(torch.randn(2, 7), torch.randn(5, 2)), "y": Factors(torch.randn(2, 4), torch.randn(3, 2))}
    two = {"x": Factors(torch.randn(3, 7), torch.randn(5, 3))}
    found = mix([one, two], np.array([0.5, -2.0]))
    wanted = 0.5 * one["x"].b @ one["x"].a - 2.0 * two["x"].b @ two["x"].a
    torch.testing.assert_close(found["x"].b @ found["x"].a, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["y"].b @ found["y"].a, 0.5 * one["y"].b @ one["y"].a, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="1 weights: are not one for each of 2 LoRAs"):
        mix([one, two], np.ones(1))


def test_the_pair_that_tells_of_a_direction_differs_in_it_and_little_in_others() -> None:
    rows = [Candidates((Message("user", "?"),), ("a", "b", "c")), Candidates((Message("user", "!"),), ("d", "e"))]
    #                 everybody's, this one, another
    found = np.array([[0, 0.0, 0.0], [0, 2.0, 9.0], [9, 1.5, 0.0], [0, 0.0, 0.0], [5, -3.0, 0.1]])
    pairs = telling(rows, found, 0)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("d", "e"), ("c", "a")]
    with pytest.raises(InputError, match="direction 1: is in no pair"):
        telling(rows[:1], np.zeros((3, 3)), 0)


def test_what_is_no_set_of_loras_of_this_basis_is_refused(
    tiny_model: Path, basis: Path, loras: Path, tiny_lora: Any, planted: Planted, tmp_path: Path
) -> None:
    own = planted.likes_short(2, start=100)
    with pytest.raises(ArtifactError, match="is a peft adapter, no LoRAs of a basis"):
        fit(tiny_model, basis, tiny_lora(seed=1), tmp_path / "peft", own, planted)
    other = tmp_path / "other"
    with publish(other, kind="adapter", format="lora_basis", stage="lora_basis", recipe={}, inputs=[]) as draft:
        draft.meta["basis_digest"] = "f" * 64
    with pytest.raises(InputError, match="is of the basis ffffffffffff"):
        fit(tiny_model, basis, other, tmp_path / "foreign", own, planted)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in loras.rglob("*"):
        if file.is_file():
            copy = damaged / file.relative_to(loras)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ArtifactError):
        fit(tiny_model, basis, damaged, tmp_path / "cut", own, planted)
    assert not list(tmp_path.glob("*/ana"))


def test_the_command_line_goes_the_whole_way(
    tiny_model: Path, basis: Path, candidates: Path, planted: Planted, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], command: Callable[..., int],
) -> None:
    made, out = tmp_path / "loras", tmp_path / "ana"
    given = [f"--model={tiny_model}", f"--basis={basis}"]
    few = ["--pairs=8", "--epochs=1", "--anchor=0", "--threads=1", "--learning-rate=1e-2"]
    assert command("lora-basis", *given, f"--candidates={candidates}", f"--out={made}", *few) == 0
    choices = planted.write(planted.likes_short(2, start=100), tmp_path / "choices.jsonl")
    person = ["personalize", "--method=lora-mix", *given, f"--choices={choices}", "--user=ana", f"--out={out}"]
    assert command(*person) == 2
    assert "--loras: is missing; make them: edgealign lora-basis" in capsys.readouterr().err
    assert command(*person, f"--loras={made}", "--start=x") == 2
    assert "--start: is not for --method lora-mix" in capsys.readouterr().err
    assert command(*person, f"--loras={made}", "--strength=0.3", "--threads=1") == 0
    assert open_artifact(out, kind="adapter").meta["rank"] == 2 * LoraBasisRecipe().rank


@pytest.mark.runtime
def test_choices_read_by_the_bundle_give_the_same_weights(
    tiny_model: Path, basis: Path, tiny_bundle: Any, planted: Planted, tmp_path: Path
) -> None:
    choices = planted.write(planted.likes_short(3, start=100), tmp_path / "choices.jsonl")
    one, other = (
        read_user(LoraMixRecipe(threads=1), model=tiny_model, basis=basis, choices=choices, user="ana", bundle=bundle)
        for bundle in (None, tiny_bundle("f32"))
    )
    np.testing.assert_allclose(other.projected, one.projected, rtol=1e-3, atol=1e-4)
