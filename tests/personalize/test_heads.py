"""Every reward head on planted users: what few choices are worth, what they must not cost, and the head as files."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgealign.errors import EdgealignError, InputError, RecipeError, UsageError
from edgealign.personalize.heads import (
    HEADS,
    Choices,
    Head,
    few_shot_loss,
    load_head,
    pack_state,
    save_head,
    shapes_of,
    unpack_state,
)
from edgealign.personalize.planted import Person, Population, accuracy, band, curve, exchanged, shuffled

NAMES = HEADS.names()
BRIEF = {"np-btl": {"steps": 600}, "mrm": {"steps": 300}, "lore": {"rank": 5}}
SAFE = [name for name in NAMES if name != "lore-released"]  # the others have a prior


@cache
def population(kind: str) -> Population:
    return Population(kind, seed=1, attributes=5, features=16)


@cache
def learned(name: str, kind: str) -> Head:
    return HEADS.load(name).learn(population(kind).draw(100, 20, part=0), **BRIEF.get(name, {}))


@cache
def people(name: str, kind: str) -> list[Person]:
    return population(kind).people(15 if name == "lore-released" else 60, part=1, choices=16, held_out=100)


@cache
def without_choices(name: str, kind: str) -> np.ndarray:
    return curve(learned(name, kind), people(name, kind), [0])[0]


@pytest.mark.parametrize("kind", ["positive-0.1", "signed-1"])
@pytest.mark.parametrize("name", NAMES)
def test_eight_choices_beat_none_for_users_that_differ(name, kind):
    gain = curve(learned(name, kind), people(name, kind), [8])[8] - without_choices(name, kind)
    assert band(gain)[0] > 0, gain.mean()


@pytest.mark.parametrize("name", SAFE)
def test_users_that_are_alike_lose_no_more_than_a_point(name):
    found = curve(learned(name, "positive-10"), people(name, "positive-10"), [1, 2, 4, 8, 16])
    before = without_choices(name, "positive-10").mean()
    assert min(values.mean() for values in found.values()) >= before - 0.01, (before, found)


def test_a_head_without_a_prior_does_harm_them():
    name, kind = "lore-released", "positive-10"
    assert curve(learned(name, kind), people(name, kind), [1])[1].mean() < without_choices(name, kind).mean() - 0.05


@pytest.mark.parametrize("name", NAMES)
def test_another_users_choices_and_labels_by_coin_do_not_help(name):
    kind = "positive-0.1"
    head, asked, before = learned(name, kind), people(name, kind), without_choices(name, kind).mean()
    assert curve(head, exchanged(asked), [8])[8].mean() <= before + 0.01
    assert curve(head, shuffled(asked), [8])[8].mean() <= before + 0.01


@pytest.mark.parametrize("name", NAMES)
def test_neither_the_order_of_choices_nor_the_side_of_an_answer_is_read(name):
    head, person = learned(name, "signed-1"), people(name, "signed-1")[0]
    own = person.own.take(slice(8))
    state = head.fit(own)
    assert head.fit(own.take(np.arange(8)[::-1])) == pytest.approx(state, abs=1e-4)
    there = head.margins(state, person.held_out)
    back = head.margins(state, person.held_out.turned(np.ones(len(person.held_out), dtype=bool)))
    assert back == pytest.approx(-there, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_is_one_head(name):
    seen = Population("signed-1", attributes=3, features=6).draw(30, 10, part=0)
    brief = {"lore": {"rank": 3}} | {key: {"steps": 60} for key in ("np-btl", "mrm", "lore-released")}
    one, two, three = (HEADS.load(name).learn(seen, seed=seed, **brief.get(name, {})) for seed in (1, 1, 2))
    arrays = list(shapes_of(type(one)))
    assert all(np.array_equal(getattr(one, each), getattr(two, each)) for each in arrays)
    if name not in ("lore", "maxmin"):  # which start from nothing random here
        assert any(not np.array_equal(getattr(one, each), getattr(three, each)) for each in arrays)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_and_a_user_come_back_from_disk_as_they_were(name, tmp_path):
    head, person = learned(name, "signed-1"), people(name, "signed-1")[0]
    save_head(head, tmp_path)
    again = load_head(tmp_path)
    assert type(again) is type(head)
    state = head.fit(person.own)
    data = pack_state(state)
    assert len(data) == 4 * head.state_size == 4 * len(state)
    margins = again.margins(unpack_state(again, data), person.held_out)
    assert np.array_equal(margins, head.margins(state, person.held_out))
    assert np.array_equal(again.fit(person.own), state)
    with pytest.raises(InputError, match=f"is not a user of {name}, which needs {len(data)}"):
        unpack_state(again, data[:-1])
    with pytest.raises(InputError, match="not finite"):
        unpack_state(again, np.full(len(state), np.nan, "<f4").tobytes())


@pytest.fixture
def saved(tmp_path) -> Path:
    seen = Population("signed-1", attributes=3, features=6).draw(20, 8, part=0)
    save_head(HEADS.load("micro").learn(seen, heads=2), tmp_path)
    return tmp_path


def _change(folder: Path, **arrays: np.ndarray) -> None:
    save_file({**load_file(folder / "head.safetensors"), **arrays}, folder / "head.safetensors")


def _describe(folder: Path, **changes: object) -> None:
    file = folder / "head.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda at: (at / "head.json").unlink(), "is not a head's description"),
        (lambda at: (at / "head.json").write_bytes(b""), "is not a head's description"),
        (lambda at: (at / "head.json").write_bytes(b"\xff\x00"), "is not a head's description"),
        (lambda at: (at / "head.json").write_text("[" * 100_000), "is not a head's description"),
        (lambda at: (at / "head.json").write_text("[1]"), "is not a head's description"),
        (lambda at: (at / "head.json").write_text(" " * (1 << 20) + "{}"), "is too large"),
        (lambda at: _describe(at, version=2), "has version 2, 1 is read here"),
        (lambda at: _describe(at, head="gmp"), "gmp is not a known reward head"),
        (lambda at: _describe(at, head=["micro"]), "does not describe a head"),
        (lambda at: _describe(at, head="gpm"), "does not describe a head"),
        (lambda at: _describe(at, head="lore", settings={}), "does not hold the arrays of a lore head"),
        (lambda at: _describe(at, settings={}), "does not describe a head"),
        (lambda at: _describe(at, settings={"tau": 0}), "tau is 0, not a positive number"),
        (lambda at: _describe(at, settings={"tau": True}), "tau is True, not a positive number"),
        (lambda at: _describe(at, settings={"tau": float("nan")}), "tau is nan, not a positive number"),
        (lambda at: (at / "head.safetensors").unlink(), "is not there"),
        (lambda at: (at / "head.safetensors").write_bytes(b""), "truncated or not safetensors"),
        (lambda at: (at / "head.safetensors").write_bytes(b"GGUF" * 100), "truncated or not safetensors"),
        (lambda at: _change(at, more=np.zeros(2)), "does not hold the arrays of a micro head"),
        (lambda at: _change(at, scale=np.ones(7)), r"\[7\], not \(F\)|\[2, 6\], not \(K, F\)"),
        (lambda at: _change(at, heads=np.zeros((0, 6)), router=np.zeros((0, 0)), constant=np.zeros(0)), "not "),
        (lambda at: _change(at, scale=np.zeros(6)), "scale is not positive everywhere"),
        (lambda at: _change(at, constant=np.array([0.0, np.nan])), "does not hold finite floating-point numbers"),
        (lambda at: _change(at, constant=np.array([0, 1])), "does not hold finite floating-point numbers"),
    ],
)
def test_a_head_that_is_damaged_or_another_is_refused_in_one_line(saved, damage, reason):
    load_head(saved)
    damage(saved)
    with pytest.raises(InputError, match=reason) as caught:
        load_head(saved)
    assert "\n" not in str(caught.value)


def test_a_head_cut_anywhere_is_refused(saved):
    for name in ("head.safetensors", "head.json"):
        whole = (saved / name).read_bytes()
        for length in range(0, len(whole), 7):
            (saved / name).write_bytes(whole[:length])
            with pytest.raises(EdgealignError):
                load_head(saved)
        (saved / name).write_bytes(whole)
    load_head(saved)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_another_width_are_refused(name):
    pairs = Choices(np.zeros((2, 5)), np.ones((2, 5)), np.zeros(2, dtype=np.int64))
    with pytest.raises(UsageError, match="5 features: are not the 16"):
        learned(name, "signed-1").fit(pairs)


def test_pairs_that_do_not_belong_together_are_refused():
    two, users = np.zeros((2, 3)), np.zeros(2, dtype=np.int64)
    for wrong in ((two, np.zeros((2, 4)), users), (two, two, users[:1]), (two[0], two[0], users)):
        with pytest.raises(UsageError, match="are no pairs"):
            Choices(*wrong)
    with pytest.raises(UsageError, match="do not belong to prompts"):
        Choices(two, two, users, np.zeros((3, 1)))
    with pytest.raises(UsageError, match="not finite"):
        Choices(two, two + np.inf, users)


def test_an_unknown_head_is_refused_with_the_closest_name():
    with pytest.raises(RecipeError, match="did you mean micro"):
        HEADS.load("mikro")


def test_settings_are_chosen_on_users_who_were_not_learned_from():
    distinct = learned("gpm", "signed-1")
    assert distinct.precision < 100
    held_out = [person.own for person in people("gpm", "signed-1")]
    nobody = dataclasses.replace(distinct, precision=1e6)
    assert few_shot_loss(distinct, held_out) < few_shot_loss(nobody, held_out)


def test_planted_people_stay_the_same_and_their_taste_is_what_makes_their_choices():
    group = population("groups")
    once, again = group.draw(22, 50, part=3), group.draw(22, 50, part=3)
    assert np.array_equal(once.chosen, again.chosen)
    assert not np.array_equal(once.chosen, group.draw(22, 50, part=4).chosen)
    few = np.isin(once.users, (10, 21))
    many = HEADS.load("lore").learn(once.take(~few), rank=2)
    nobody = np.zeros(2, dtype=np.float32)
    assert accuracy(many, nobody, once.take(few)) < 0.5 < 0.75 < accuracy(many, nobody, once.take(~few))
