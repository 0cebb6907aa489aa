"""Whom benchmarks/fspo.py asks: new people of a `data users` data set, their shots, and what these tell at best."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgealign.data.forms import Pair
from edgealign.data.read import read
from edgealign.personalize.attributes import ATTRIBUTES
from edgealign.personalize.lore import fit_users

KS = (0, 1, 2, 4, 8)
CONTROLS = ("another's", "by coin")
SURE = 0.2  # prior precision of a taste's weights: a taste of length 4, as choices are drawn, in three attributes


@dataclass(frozen=True)
class Person:
    """Somebody new: their choices as shots, in order, and what they are asked."""

    name: str
    own: tuple[Pair, ...]
    asked: tuple[Pair, ...]
    taste: Mapping[str, float]


def load_people(folder: Path, *, people: int, asked: int) -> tuple[list[Person], dict[str, Any]]:
    """New people of a `data users` data set, and the scale of the attributes."""
    known = json.loads((folder / "users.json").read_text(encoding="utf-8"))
    rows: dict[str, dict[str, list[Pair]]] = {}
    for name in ("new_choices", "unseen_choices"):
        rows[name] = {}
        for row in read(folder / f"{name}.jsonl", form="pair").rows:
            assert isinstance(row, Pair)
            rows[name].setdefault(str(row.user_id), []).append(row)
    found = [
        Person(
            name, tuple(rows["new_choices"][name][: max(KS)]), tuple(rows["unseen_choices"][name][:asked]),
            known["users"][name]["taste"],
        )
        for name in known["new"][:people]
    ]
    return found, known["scale"]


def shots_for(people: Sequence[Person], place: int, k: int, control: str) -> tuple[Pair, ...]:
    """The newest k choices of a person, or the control's."""
    person = people[(place + 1) % len(people)] if control == CONTROLS[0] else people[place]
    shots = person.own[len(person.own) - k :]
    if control != CONTROLS[1]:
        return shots
    coin = random.Random(person.name)
    return tuple(
        replace(shot, chosen=shot.rejected, rejected=shot.chosen) if coin.random() < 0.5 else shot for shot in shots
    )


def told(people: Sequence[Person], scale: Mapping[str, Sequence[float]], ks: Sequence[int]) -> dict[str, float]:
    """What k shots tell whoever knows the attributes: share of choices that a fit on them ranks as the people did."""
    def gaps(rows: Sequence[Pair]) -> torch.Tensor:
        return torch.tensor([
            [0.0, *((ATTRIBUTES[name](row.chosen) - ATTRIBUTES[name](row.rejected)) / size for name, (_, size) in
             scale.items())] for row in rows
        ])  # fmt: skip

    own, asked = (torch.stack([gaps(rows) for rows in side]) for side in (
        [person.own for person in people], [person.asked for person in people],
    ))  # fmt: skip
    found = {}
    for k in ks:
        weights = torch.from_numpy(fit_users(own[:, own.shape[1] - k :], precision=SURE).weights)
        margins = (asked[..., 1:] @ weights[..., None]).squeeze(-1)
        found[str(k)] = float(((margins > 0) + 0.5 * (margins == 0)).mean())
    return found
