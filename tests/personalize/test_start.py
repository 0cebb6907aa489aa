"""Where a new user's LoRA begins: the mean of other users' in the directions they share, which few choices need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgealign.artifact import open_artifact
from edgealign.errors import CheckFailed, InputError, UsageError
from edgealign.personalize import lora, start
from edgealign.personalize.lowrank import Factors, read_peft
from edgealign.personalize.recipes import StartRecipe
from edgealign.personalize.start import average

Fit = Callable[..., Any]


def factors(rank: int, seed: int, *, width: int = 12, height: int = 9) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, width, generator=generator), torch.randn(height, rank, generator=generator))


def alike(count: int, *, spread: float = 0.1) -> list[dict[str, Factors]]:
    """Users whose additions are one addition and a little of their own."""
    return [
        {"x": Factors(torch.cat((factors(2, 99).a, factors(2, seed).a)),
                      torch.cat((factors(2, 99).b, spread * factors(2, seed).b), dim=1))}
        for seed in range(count)
    ]  # fmt: skip


def test_with_room_for_every_direction_the_start_is_the_mean_of_users_who_are_alike() -> None:
    users = alike(3)
    found, kept, trust = average(users, 8)
    mean = sum(user["x"].b @ user["x"].a for user in users) / 3
    assert 0.98 < trust < 1.0
    torch.testing.assert_close(found["x"].b @ found["x"].a, trust * mean, rtol=0, atol=1e-4)
    assert kept == pytest.approx(1.0)
    torch.testing.assert_close(found["x"].a @ found["x"].a.t(), torch.eye(8) / 3, rtol=0, atol=1e-5)


def test_a_mean_that_may_be_chance_is_not_kept() -> None:
    trusts = [average([{"x": factors(3, 20 * group + seed)} for seed in range(8)], 9)[2] for group in range(20)]
    assert np.mean(trusts) < 0.15
    assert average(alike(8, spread=1.0), 9)[2] > 0.7


def test_the_directions_are_those_that_hold_most_of_all_the_users_additions() -> None:
    users = [{"x": factors(2, seed)} for seed in range(4)]
    found, kept, _ = average(users, 3)
    stacked = torch.cat([user["x"].b @ user["x"].a for user in users]).double()
    _, sizes, right = torch.linalg.svd(stacked)
    assert kept == pytest.approx(float((sizes[:3] ** 2).sum() / (sizes**2).sum()), abs=1e-5)
    torch.testing.assert_close(found["x"].a.double().t() @ (3 * found["x"].a.double()), right[:3].t() @ right[:3],
                               rtol=0, atol=1e-5)


def test_users_of_opposite_tastes_have_a_mean_of_nothing_and_still_share_directions() -> None:
    one = factors(2, 0)
    found, kept, _ = average([{"x": one}, {"x": Factors(one.a, -one.b)}], 2)
    assert float(found["x"].b.abs().max()) < 1e-6
    assert kept == pytest.approx(1.0)
    back = one.a @ found["x"].a.t() @ (3 * found["x"].a)
    torch.testing.assert_close(back, one.a, rtol=0, atol=1e-5)


def test_a_user_who_leaves_a_layer_alone_counts_in_its_mean() -> None:
    users = alike(3)
    lone = factors(2, 50)
    found, _, trust = average([{**users[0], "y": lone}, *users[1:]], 2)
    torch.testing.assert_close(found["y"].b @ found["y"].a, trust * (lone.b @ lone.a) / 3, rtol=0, atol=1e-4)
    assert trust > 0.5
    one = factors(2, 0)
    with pytest.raises(InputError, match="several shapes"):
        average([{"x": one}, {"x": factors(2, 1, width=5)}], 2)
    with pytest.raises(InputError, match=r"has 4 input directions .* at most 4"):
        average([{"x": one}, {"x": factors(2, 1)}], 5)


def test_what_is_published_is_a_plain_lora_of_this_model_and_others_are_refused(
    tiny_model: Path, short_model: Path, tiny_lora: Any, tmp_path: Path
) -> None:
    users = [tiny_lora(seed=seed, rank=4) for seed in (1, 2)]
    made = start.run(StartRecipe(rank=8), model=tiny_model, adapters=users, out=tmp_path / "start")
    meta = made.meta
    assert (meta["users"], meta["rank"], meta["base_digest"]) == (2, 8, open_artifact(tiny_model).digest)
    assert [entry.role for entry in made.manifest.inputs] == ["base", "user 1", "user 2"]
    back, one, two = (read_peft(folder) for folder in (made.path, *users))
    assert set(back) == set(one)
    for name, part in back.items():
        mean = (one[name].b @ one[name].a + two[name].b @ two[name].a) / 2
        torch.testing.assert_close(part.b @ part.a, meta["mean_trusted"] * mean, rtol=0, atol=1e-4)
    for adapters, model, error, words in (
        (users[:1], tiny_model, UsageError, "1 adapter"), ([users[0], users[0]], tiny_model, UsageError, "twice"),
        (users, short_model, InputError, "was fitted on the model"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            start.run(StartRecipe(), model=model, adapters=adapters, out=tmp_path / "no")
        assert not (tmp_path / "no").exists()


def test_a_fit_along_a_start_of_another_rank_or_beside_a_population_is_one_line(
    tiny_model: Path, tiny_lora: Any, planted: Any, quick: Any, tmp_path: Path
) -> None:
    common = tiny_lora(seed=1, rank=4)
    choices = planted.write(planted.likes_short(8), tmp_path / "choices.jsonl")
    given = {"model": tiny_model, "choices": choices, "user": "ana", "out": tmp_path / "ana"}
    with pytest.raises(InputError, match=r"starts with rank 4, this fit has 8; use --rank 4"):
        lora.run(quick(), start=common, **given)
    with pytest.raises(UsageError, match="give --start or --population"):
        lora.run(quick(), start=common, population=common, **given)
    made = lora.run(quick(rank=4, epochs=1), start=common, **given)
    both, shared = read_peft(made.path), read_peft(common)
    for name, part in both.items():
        torch.testing.assert_close(part.b[:, :4] @ part.a[:4], shared[name].b @ shared[name].a)


def test_a_start_from_users_alike_takes_eight_choices_further_and_one_from_their_opposites_not_so_far(
    tiny_model: Path, planted: Any, quick: Any, tmp_path: Path
) -> None:
    def fit(rows: Any, name: str, **more: Any) -> Any:
        file = planted.write(rows, tmp_path / f"{name}.jsonl")
        recipe = quick(held_out=0.5)
        return lora.run(recipe, model=tiny_model, choices=file, user="ana", out=tmp_path / name, **more)

    rows = planted.likes_short(80)
    starts = {}
    for kind, turn in (("alike", list), ("opposite", planted.flipped)):
        seen = [fit(turn(rows[16 * i : 16 * i + 16]), f"{kind}{i}").path for i in range(2)]
        starts[kind] = start.run(StartRecipe(), model=tiny_model, adapters=seen, out=tmp_path / kind).path
    margins: dict[str, list[float]] = {"none": [], "alike": [], "opposite": []}
    for i in range(2, 5):
        for kind, found in margins.items():
            more = {} if kind == "none" else {"start": starts[kind]}
            try:
                made = fit(rows[16 * i : 16 * i + 16], f"new-{kind}{i}", **more)
            except CheckFailed:  # worse than the base
                assert kind == "opposite"
                found.append(-np.inf)
                continue
            assert made.meta["choices"]["fitted"] == 8
            found.append(made.meta["held_out_after"]["margin"])
    gains = np.array(margins["alike"]) - np.array(margins["none"])
    assert gains.mean() > 4 * gains.std(ddof=1) / len(gains) ** 0.5, margins
    assert gains.min() > 0.1, margins
    assert (np.array(margins["none"]) - np.array(margins["opposite"])).min() > 0.1, margins
