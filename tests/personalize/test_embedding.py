"""Users as a few numbers: a basis from many people, one person from a few choices, and the questions."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgealign.artifact import open_artifact, publish
from edgealign.data.encode import encode_prompt
from edgealign.data.forms import Message
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import ArtifactError, CheckFailed, InputError
from edgealign.models.load import load_tokenizer
from edgealign.personalize import basis as bases
from edgealign.personalize import embedding
from edgealign.personalize.candidates import encode_answer
from edgealign.personalize.recipes import BasisRecipe, EmbeddingRecipe
from edgealign.runtimes.session import open_session

from .conftest import short_and_long


def rows(user: str, count: int, *, short: bool, start: int = 0) -> list[dict[str, object]]:
    found = []
    for i in range(start, start + count):
        brief, long = short_and_long(i)
        sides = (brief, long) if short else (long, brief)
        found.append({"prompt": f"what is number {i}?", "chosen": sides[0], "rejected": sides[1], "user_id": user})
    return found


def fit(model: Path, basis: Path, folder: Path, own: list[dict[str, object]], name: str = "ana", **more: object):
    file = folder / f"{name}.jsonl"
    write_jsonl(file, own)
    return embedding.run(
        EmbeddingRecipe(threads=1), model=model, basis=basis, choices=str(file), user=name, out=folder / name, **more
    )


def prefers_short(model: Path, basis: Path, weights: np.ndarray, start: int = 200, count: int = 20) -> float:
    """Share of new questions on which the reward ranks the short answer first."""
    shared, tokenizer = bases.open_basis(basis), load_tokenizer(model)
    right = 0
    with closing(open_session(model, threads=1)) as session:
        for i in range(start, start + count):
            prompt = encode_prompt(tokenizer, (Message("user", f"what is number {i}?"),))
            found = embedding.rank_answers(
                shared, weights, session, prompt, [encode_answer(tokenizer, text) for text in short_and_long(i)]
            )
            right += bool(found[0] > found[1])
    return right / count


def test_a_published_basis_says_how_held_out_users_fare_and_what_its_directions_mean(basis: Path) -> None:
    artifact = open_artifact(basis, kind="basis")
    (check,) = artifact.manifest.checks
    assert check.name == "held-out users"
    assert check.passed
    assert check.value is not None
    assert check.value > 0.2
    opened = bases.open_basis(basis)
    assert opened.folded.rank == 2
    assert opened.meaning.shape == (3, len(opened.attributes))


@pytest.mark.parametrize("short", [True, False])
def test_four_choices_tell_who_likes_it_short(short: bool, tiny_model: Path, basis: Path, tmp_path: Path) -> None:
    made = fit(tiny_model, basis, tmp_path, rows("ana", 4, short=short, start=100))
    shared = bases.open_basis(basis)
    found = embedding.read_preference(made.path, shared)
    share = prefers_short(tiny_model, basis, found.weights)
    assert share >= 0.9 if short else share <= 0.1
    assert made.meta["bytes"] == 8
    assert ("shorter" if short else "longer") in made.meta["words"]
    assert sum(entry.bytes for entry in made.manifest.files) < 1000


def test_one_choice_moves_a_user_less_than_eight(tiny_model: Path, basis: Path, tmp_path: Path) -> None:
    shared = bases.open_basis(basis)
    sizes = []
    for count in (1, 8):
        made = fit(tiny_model, basis, tmp_path, rows(f"ana{count}", count, short=True, start=100), f"ana{count}")
        sizes.append(float(np.linalg.norm(embedding.read_preference(made.path, shared).weights)))
    assert 0 < sizes[0] < sizes[1]


def test_choices_that_contradict_each_other_are_not_published(tiny_model: Path, basis: Path, tmp_path: Path) -> None:
    mixed = [row for i in range(12) for row in rows("ana", 1, short=i % 2 == 0, start=100 + i)]
    try:
        made = fit(tiny_model, basis, tmp_path, mixed)
    except CheckFailed:
        assert not (tmp_path / "ana").exists()
    else:  # leaving one out may find that it does not hurt; then it must not have moved far
        assert np.linalg.norm(embedding.read_preference(made.path, bases.open_basis(basis)).weights) < 1.0


def test_the_gate_refuses_what_predicts_worse_than_the_population() -> None:
    # Everybody's part says the chosen answer is better; the user's part says so of one side only, at random.
    rng = np.random.default_rng(0)
    projected = np.concatenate([np.full((12, 1), 3.0), 4 * rng.choice([-1.0, 1.0], (12, 3))], 1)
    (check,) = embedding.gate(projected, precision=0.01)
    assert not check.passed
    (kept,) = embedding.gate(np.concatenate([np.zeros((12, 1)), np.ones((12, 3))], 1))
    assert kept.passed


@pytest.mark.runtime
def test_a_bundle_reads_the_choices_as_torch_does(
    tiny_model: Path, basis: Path, tmp_path: Path, tiny_bundle
) -> None:
    shared = bases.open_basis(basis)
    own = rows("ana", 4, short=True, start=100)
    (tmp_path / "b").mkdir()
    found = [
        embedding.read_preference(fit(tiny_model, basis, place, own, **more).path, shared).weights
        for place, more in ((tmp_path, {}), (tmp_path / "b", {"bundle": tiny_bundle("f32")}))
    ]
    np.testing.assert_allclose(found[1], found[0], atol=0.02)


def test_another_models_basis_and_another_bases_user_are_refused(
    tiny_model: Path, basis: Path, people: Path, tmp_path: Path
) -> None:
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    other = tmp_path / "other"
    create.run(InitRecipe(shape="tiny", seed=2, vocab_size=512, context=512, dtype="float32"), text=[], out=other)
    with pytest.raises(InputError, match="was learned on the model"):
        fit(other, basis, tmp_path, rows("ana", 4, short=True))
    made = fit(tiny_model, basis, tmp_path, rows("ana", 4, short=True, start=100))
    second = tmp_path / "second"
    recipe = BasisRecipe(rank=2, components=10, threads=1, seed=1)
    bases.run(recipe, model=tiny_model, choices=[str(people)], out=second)
    with pytest.raises(InputError, match="is of the basis"):
        embedding.read_preference(made.path, bases.open_basis(second))


def test_too_few_users_for_the_directions_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    write_jsonl(file, rows("ana", 6, short=True) + rows("ben", 6, short=False))
    with pytest.raises(InputError, match="2 users: are too few to show 8 directions"):
        bases.run(BasisRecipe(), model=tiny_model, choices=[str(file)], out=tmp_path / "basis")
    assert not (tmp_path / "basis").exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "nan"])
def test_a_damaged_user_is_one_line(damage: str, tiny_model: Path, basis: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    shared = bases.open_basis(basis)
    file = fit(tiny_model, basis, tmp_path, rows("ana", 4, short=True, start=100)).path / embedding.WEIGHTS
    whole = file.read_bytes()
    values = {"weights": np.full(2, np.nan, np.float32), "covariance": np.eye(2, dtype=np.float32)}
    with publish(tmp_path / "bad", kind="adapter", format="preference", stage="test", recipe={}) as draft:
        facts = {"basis_digest": shared.digest, "method": "lore"}
        (draft.dir / embedding.FACTS).write_text(json.dumps(facts))
        if damage == "truncated":
            (draft.dir / embedding.WEIGHTS).write_bytes(whole[:30])
        else:
            save_file(values if damage == "nan" else {"x": np.zeros(2)}, draft.dir / embedding.WEIGHTS)
    with pytest.raises(ArtifactError):
        embedding.read_preference(tmp_path / "bad", shared)


def test_the_command_line_fits_asks_and_forgets(
    tiny_model: Path, basis: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:
    """Somebody who always takes the shorter answer, through `users ask`, `show`, `rollback` and `forget`."""
    pool = tmp_path / "pool"
    with publish(pool, kind="dataset", format="jsonl", stage="candidates", recipe={}) as draft:
        lines = [
            {"prompt": [{"role": "user", "content": f"what is number {i}?"}], "answers": list(short_and_long(i))}
            for i in range(300, 320)
        ]
        write_jsonl(draft.dir / "candidates.jsonl", lines)
    place = ["--registry", str(tmp_path / "registry")]
    monkeypatch.setattr(sys, "stdin", Chooser(lambda first, second: "1" if len(first) < len(second) else "2", capfd))
    ask = ["users", "ask", "ana", "--model", str(tiny_model), "--basis", str(basis), "--candidates", str(pool)]
    assert command(*ask, "--questions", "4", *place) == 0
    capfd.readouterr()
    assert command("users", "show", "ana", "--json", *place) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["choices"] == 4
    assert shown["active"] == 1
    assert "shorter" in shown["versions"][0]["words"]
    assert command("users", "rollback", "ana", "0", *place) == 0
    capfd.readouterr()
    assert command("users", "list", *place) == 0
    assert capfd.readouterr().out.strip() == "ana: 4 choices, version 0"
    assert command("users", "forget", "ana", "--yes", *place) == 0
    assert command("users", "show", "ana", *place) == 2


def test_options_of_the_other_method_are_refused(
    tiny_model: Path, basis: Path, people: Path, tmp_path: Path, command: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    common = ["personalize", "--model", str(tiny_model), "--choices", str(people), "--user", "u0"]
    common += ["--out", str(tmp_path / "x")]
    for more, word in (
        (["--method", "lore"], "--basis"), (["--method", "lore", "--basis", str(basis), "--rank", "4"], "--rank"),
        (["--basis", str(basis)], "--basis"), (["--method", "magic"], "magic"),
    ):  # fmt: skip
        assert command(*common, *more) == 2
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert word in line
    assert command(*common, "--method", "lore", "--basis", str(basis)) == 0


class Chooser(io.StringIO):
    """Standard input of a person who looks at the two answers on standard error and chooses one."""

    def __init__(self, choose, capfd: pytest.CaptureFixture[str]) -> None:
        super().__init__()
        self.choose, self.capfd = choose, capfd

    def isatty(self) -> bool:
        return False

    def readline(self, *_: object) -> str:
        shown = self.capfd.readouterr().err
        sides = [shown.rsplit(mark, 1)[1].strip().split("\n")[0] for mark in ("1 ←", "2 →")]
        return self.choose(*sides) + "\n"
