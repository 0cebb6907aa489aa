"""A fit that forgets too much is scaled back, and refused where even little of it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgealign.artifact import Artifact, open_artifact
from edgealign.data import users
from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.data.recipes import UsersRecipe
from edgealign.errors import ArtifactError, CheckFailed
from edgealign.models.load import load_model, load_tokenizer
from edgealign.parity_text import text_windows
from edgealign.personalize import direction, embedding, lora
from edgealign.personalize.basis import open_basis
from edgealign.personalize.budget import ANSWER_TOKENS, HALVINGS, MOST_PROMPTS, WINDOW_TOKENS, WINDOWS, Gauge
from edgealign.personalize.budget_recipe import BudgetRecipe
from edgealign.personalize.choices import split
from edgealign.personalize.embedding import FACTS, Preference, read_preference, write_preference
from edgealign.personalize.lowrank import read_peft
from edgealign.personalize.ranking import log_softmax
from edgealign.personalize.recipes import DirectionRecipe, EmbeddingRecipe, LoraRecipe
from edgealign.runtimes.control_vector import FILE, read_control_vector
from edgealign.runtimes.generate import generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import open_session, score

OPEN = BudgetRecipe(kl_budget=1e6, perplexity_budget=1e6)
Fit = Callable[..., Artifact]


@pytest.fixture
def fit(tiny_model: Path, planted: Any, quick: Any, tmp_path: Path) -> Fit:
    def run(name: str, budget: BudgetRecipe | None, method: str = "lora", **values: Any) -> Artifact:
        choices = planted.write(planted.likes_short(12), tmp_path / "choices.jsonl")
        given: dict[str, Any] = {
            "model": tiny_model, "choices": choices, "user": "ana", "out": tmp_path / name, "budget": budget
        }  # fmt: skip
        if method == "direction":
            return direction.run(DirectionRecipe(threads=1, **{"strength": 4.0, **values}), **given)
        return lora.run(quick(**values), **given)

    return run


def spent(model: Path, adapter: Path, rows: list[Any]) -> tuple[float, float]:
    """The two numbers with sessions and numpy: nats a token on the base's own answers, and the perplexity's rise."""
    tok: Any = load_tokenizer(model)
    greedy = Sampling(temperature=0.0, min_p=0.0, repetition_penalty=1.0, max_tokens=ANSWER_TOKENS)
    end = end_of_turn_id(tok)
    with closing(open_session(model, threads=1)) as session:
        sequences = []
        for row in rows:
            session.reset()
            prompt = encode_prompt(tok, row.prompt)
            said = generate(session, prompt, sampling=greedy, stop={end})
            sequences.append((len(prompt), [*prompt, *said.tokens, *([end] if said.finish == "stop" else [])]))
        windows = text_windows(model, count=WINDOWS, length=WINDOW_TOKENS)
        found = []
        for user in (None, adapter):
            session.set_user(user)
            rows_of = [log_softmax(score(session, ids))[start - 1 : -1] for start, ids in sequences]
            nats = [
                -log_softmax(score(session, ids))[np.arange(len(ids) - 1), ids[1:]] for ids in windows
            ]  # fmt: skip
            found.append((np.concatenate(rows_of), float(np.concatenate(nats).mean())))
    (base, before), (own, after) = found
    return float((np.exp(own) * (own - base)).sum(-1).mean()), math.exp(after - before) - 1


def test_what_is_spent_is_the_divergence_on_the_bases_answers_and_the_rise_on_neutral_text(
    fit: Fit, planted: Any, tiny_model: Path
) -> None:
    made = fit("ana", OPEN)
    fitted, _ = split(planted.likes_short(12), share=0.25)
    kl, rise = spent(tiny_model, made.path, fitted[:MOST_PROMPTS])
    facts = made.meta["budget"]
    assert facts["kl_nats"] == pytest.approx(kl, rel=1e-3)
    assert facts["perplexity_rise"] == pytest.approx(rise, rel=1e-3, abs=1e-5)
    assert facts["scale"] == 1.0
    assert kl > 0.01
    checks = {check.name: check for check in made.manifest.checks}
    assert (checks["KL to the base"].value, checks["KL to the base"].tolerance) == (facts["kl_nats"], 1e6)


def test_by_default_neutral_text_costs_no_more_than_two_per_cent(tmp_path: Path) -> None:
    """T12 on the starter, without its multiple choice: nothing of the kind is in reach of 6 M parameters."""
    people = UsersRecipe(users=2, new_users=1, choices=12, asked=2, conversations=40)
    choices = users.run(people, out=tmp_path / "people").path / "new_choices.jsonl"
    made = lora.run(LoraRecipe(threads=1), model="starter", choices=choices, user="n0000", out=tmp_path / "n0000")
    facts = made.meta["budget"]
    assert facts["scale"] == 1.0
    assert 0 < facts["kl_nats"] <= BudgetRecipe().kl_budget
    assert facts["perplexity_rise"] <= 0.02


def test_a_model_that_was_not_changed_spends_nothing(tiny_model: Path) -> None:
    tok: Any = load_tokenizer(tiny_model)
    network = load_model(tiny_model)
    gauge = Gauge.of(network, tok, [(1, 9, 30, 44, 7), (1, 9, 30, 44, 7), (1, 20, 7)], tiny_model)
    assert len(gauge.answered) == 2
    assert gauge.measure().kl_nats == pytest.approx(0.0, abs=1e-9)
    assert gauge.measure().rise == 0.0
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    assert not gauge.measure().within(OPEN)


def test_a_wild_fit_is_halved_until_it_is_within_budget(fit: Fit, tiny_model: Path, planted: Any) -> None:
    wild: dict[str, Any] = {"learning_rate": 3e-2, "anchor": 0.0, "epochs": 6}
    whole = fit("whole", OPEN, **wild)
    room = 0.8 * whole.meta["budget"]["kl_nats"]
    assert room > 0.02
    made = fit("ana", BudgetRecipe(kl_budget=room, perplexity_budget=1e6), **wild)
    kept = made.meta["budget"]
    assert kept["scale"] in [0.5**number for number in range(1, HALVINGS + 1)]
    fitted, _ = split(planted.likes_short(12), share=0.25)
    assert spent(tiny_model, made.path, fitted[:MOST_PROMPTS])[0] <= room
    assert spent(tiny_model, whole.path, fitted[:MOST_PROMPTS])[0] > room
    full, less = read_peft(whole.path), read_peft(made.path)
    for name, factors in full.items():
        torch.testing.assert_close(less[name].b @ less[name].a, kept["scale"] * factors.b @ factors.a)
    note = next(check.note for check in made.manifest.checks if check.name == "KL to the base")
    assert f"scaled back to {kept['scale']:g} of the fit" in note


def test_a_fit_so_wild_that_little_of_it_spoils_neutral_text_is_refused(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"neutral perplexity by \+\d.*% \(budget 2\.0%\): not published"):
        fit("ana", BudgetRecipe(kl_budget=1e6, perplexity_budget=0.02), learning_rate=1.0, anchor=0.0, epochs=6)
    assert not (tmp_path / "ana").exists()


def test_a_direction_is_halved_too(fit: Fit) -> None:
    whole = fit("whole", OPEN, method="direction", strength=8.0)
    budget = BudgetRecipe(kl_budget=whole.meta["budget"]["kl_nats"] / 2, perplexity_budget=1e6)
    made = fit("ana", budget, method="direction", strength=8.0)
    scale = made.meta["budget"]["scale"]
    assert scale in (0.5, 0.25)
    assert made.meta["length"] == pytest.approx(scale * whole.meta["length"], rel=1e-3)
    one, less = (read_control_vector(each.path / FILE, layers=6, width=128).directions[3] for each in (whole, made))
    np.testing.assert_allclose(less, scale * one, rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "direction"])
def test_what_costs_too_much_however_little_of_it_is_taken_is_refused(method: str, fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=rf"^user ana: a {2**HALVINGS}th of the fit still moves .*: not published"):
        fit("ana", BudgetRecipe(kl_budget=1e-9), method=method)
    assert not (tmp_path / "ana").exists()


def test_a_tilt_has_the_budget_on_its_strength(
    tiny_model: Path, basis: Path, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = planted.write(planted.likes_short(6), tmp_path / "choices.jsonl")

    def run(name: str, kl: float) -> Artifact:
        return embedding.run(
            EmbeddingRecipe(threads=1), model=tiny_model, basis=basis, choices=choices, user="ana",
            out=tmp_path / name, budget=BudgetRecipe(kl_budget=kl),
        )  # fmt: skip

    shared = open_basis(basis)
    whole = run("whole", 1e6)
    price = next(check for check in whole.manifest.checks if check.name == "KL to the base")
    assert price.value is not None
    assert price.value > 0.0
    assert (whole.meta["scale"], read_preference(whole.path, shared).scale) == (1.0, 1.0)
    made = run("ana", price.value / 3)
    known = read_preference(made.path, shared)
    assert known.scale == made.meta["scale"] in (0.5, 0.25)
    np.testing.assert_array_equal(known.weights, read_preference(whole.path, shared).weights)
    with pytest.raises(CheckFailed, match=r"^user ana: answers that follow it, at strength .* still pays .* of 1e-12"):
        run("none", 1e-12)
    (tmp_path / "odd").mkdir()
    write_preference(tmp_path / "odd", Preference(known.weights, known.covariance, shared.digest, 3.0))
    assert '"scale": 3.0' in (tmp_path / "odd" / FACTS).read_text(encoding="utf-8")
    with pytest.raises(ArtifactError):
        read_preference(tmp_path / "odd", shared)


def test_the_command_line_gives_more_room_or_less_and_shows_what_was_spent(
    tiny_model: Path, planted: Any, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    choices = planted.write(planted.likes_short(12), tmp_path / "choices.jsonl")
    monkeypatch.setenv("EDGEALIGN_USERS", str(tmp_path / "registry"))

    given = ["personalize", "--model", tiny_model, "--choices", choices, "--user", "ana", "--out", tmp_path / "ana"]
    few = ["--learning-rate=1e-2", "--epochs=2", "--threads=1", "--anchor-tokens=6"]
    assert command(*given, *few, "--kl-budget", "1e-9") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edgealign: ")]
    assert "(budget 1e-09)" in line
    assert "--kl-budget" in line
    assert command(*given, "--method", "fspo", "--kl-budget", "1") == 2
    assert "--kl-budget: is not for --method fspo" in capsys.readouterr().err
    assert command(*given, *few, "--kl-budget", "-1") == 2
    assert "must be more than 0" in capsys.readouterr().err
    assert command(*given, *few, "--kl-budget", "100", "--perplexity-budget", "100") == 0
    assert command("users", "add", "ana", tmp_path / "ana") == 0
    capsys.readouterr()
    kl = open_artifact(tmp_path / "ana").meta["budget"]["kl_nats"]
    assert command("users", "show", "ana") == 0
    shown = capsys.readouterr().out
    assert f"KL to the base {kl:.3f}, held to 100.000" in shown
    assert "neutral perplexity" in shown
    assert command("show", tmp_path / "ana") == 0
    assert "KL to the base" in capsys.readouterr().out
