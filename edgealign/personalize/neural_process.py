"""NP-BTL: an encoder reads a user's choices and says who they are; nothing is fitted (arXiv 2412.13998).

    choices -> one vector a pair -> attention between them -> sum -> z (the user) -> reward of an answer given z

The encoder does not see the order of the choices, and reads none as well. As in the paper: pairs as both sides'
features, self-attention, pooling, deterministic z, 0 to k choices as the context of a training step, Bradley-Terry on
others. In the released code "unseen" targets are those past the *number* of context choices while the context is drawn
at random, so targets are in it; here each step's choices of a user are shuffled and cut once (`split_context`).
Ours: a reward with a part that is linear in the features, starts as everybody's direction and is tilted by z, beside
the network's (few seen users cannot teach a network to multiply); a pooled sum that saturates (contexts longer than
those trained on); stopping where users who are held out are served best.

Shape legend: U users, k choices of each, F features, H hidden, Z numbers of a user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgealign.personalize.heads import HELD_OUT_USERS, Choices, Floats, State, few_shot_loss, shapes_of
from edgealign.personalize.lore import fit_population

HIDDEN, USER, SIDES, BATCH = 64, 32, 4, 64
STEPS, LOOK_EVERY, PATIENCE, RATE, DECAY = 1500, 50, 6, 2e-3, 1e-2
LONGEST, TARGETS, SATURATION, RIDGE = 32, 12, 4.0, 1e-3
Weights = Mapping[str, Tensor]
Weight = npt.NDArray[np.float32]


@dataclass(frozen=True)
class NeuralProcess:
    """The encoder's and the reward's weights, in float32."""

    pair_chosen: Annotated[Weight, "F H"]
    pair_rejected: Annotated[Weight, "F H"]
    pair_constant: Annotated[Weight, "H"]
    query: Annotated[Weight, "H H"]
    key: Annotated[Weight, "H H"]
    value: Annotated[Weight, "H H"]
    pooled: Annotated[Weight, "H H"]
    pooled_constant: Annotated[Weight, "H"]
    user: Annotated[Weight, "H Z"]
    user_constant: Annotated[Weight, "Z"]
    mean: Annotated[Weight, "F"]
    tilt: Annotated[Weight, "F Z"]
    reward_features: Annotated[Weight, "F H"]
    reward_user: Annotated[Weight, "Z H"]
    reward_constant: Annotated[Weight, "H"]
    reward: Annotated[Weight, "H"]
    scale: Annotated[Floats, "F"]
    name: ClassVar[str] = "np-btl"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, steps: int = STEPS) -> NeuralProcess:
        return _learn(choices, seed, steps)

    @property
    def state_size(self) -> int:
        return len(self.user_constant)

    def fit(self, choices: Choices) -> State:
        chosen, rejected = (side.float()[None] for side in choices.scaled(self.scale))
        there = torch.ones(chosen.shape[:2], dtype=torch.bool)
        found: State = _encode(self._weights(), chosen, rejected, there)[0].numpy()
        return found

    def margins(self, state: State, pairs: Choices) -> Floats:
        weights, z = self._weights(), torch.from_numpy(state)[None]
        first, second = (_reward(weights, side.float()[None], z)[0] for side in pairs.scaled(self.scale))
        found: Floats = (first - second).double().numpy()
        return found

    def _weights(self) -> Weights:
        return {name: torch.from_numpy(getattr(self, name)) for name in self.__dict__ if name != "scale"}


def split_context(
    rng: np.random.Generator, count: int, longest: int = LONGEST, targets: int = TARGETS
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which of a user's choices the encoder reads (0 to `longest`), and which others the reward is asked about."""
    order = rng.permutation(count)
    cut = int(rng.integers(0, min(longest, max(count - 1, 0)) + 1))
    return order[:cut], order[cut : cut + targets]


def stack_users(people: Sequence[Choices], scale: Floats) -> tuple[Tensor, Tensor]:
    """(U, n, F) chosen and rejected, in the order given; users with fewer choices end in zeros."""
    sides = zip(*(own.scaled(scale) for own in people), strict=True)
    chosen, rejected = (torch.nn.utils.rnn.pad_sequence(list(side), batch_first=True) for side in sides)
    return chosen, rejected


def pick_choices(
    sides: Sequence[Tensor], users: npt.NDArray[np.int64], rows: Sequence[npt.NDArray[np.int64]]
) -> tuple[Tensor, Tensor, Tensor]:
    """These choices of these users: (U, k, F) chosen and rejected, and (U, k) which there are."""
    table = np.full((len(rows), max(map(len, rows))), -1)
    for place, own in enumerate(rows):
        table[place, : len(own)] = own
    there = torch.from_numpy(table >= 0)
    index = torch.from_numpy(users)[:, None], torch.from_numpy(table.clip(min=0))
    return sides[0][index], sides[1][index], there


def _encode(weights: Weights, chosen: Tensor, rejected: Tensor, there: Tensor) -> Tensor:
    """(U, k, F) and (U, k) which choices there are -> (U, Z)."""
    users, count = there.shape
    pooled = chosen.new_zeros(users, weights["pooled"].shape[0])
    if count:
        pairs = chosen @ weights["pair_chosen"] + rejected @ weights["pair_rejected"] + weights["pair_constant"]
        pairs = torch.nn.functional.gelu(pairs)
        width = pairs.shape[2]
        sides = SIDES if width % SIDES == 0 else 1
        query, key, value = (
            (pairs @ weights[name]).view(users, count, sides, width // sides).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        # Rows without choices attend to everything, and are left out of the sum.
        seen = (there | ~there.any(1, keepdim=True))[:, None, None, :]
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        pairs = pairs + mixed.transpose(1, 2).reshape(users, count, width)
        size = there.sum(1, keepdim=True)
        pooled = (pairs * there[..., None]).sum(1) / (SATURATION + size)
    hidden = torch.nn.functional.gelu(pooled @ weights["pooled"] + weights["pooled_constant"])
    return hidden @ weights["user"] + weights["user_constant"]


def _reward(weights: Weights, features: Tensor, z: Tensor) -> Tensor:
    """(U, k, F) and (U, Z) -> (U, k)."""
    direction = weights["mean"] + z @ weights["tilt"].T  # (U, F)
    by_user = (z @ weights["reward_user"])[:, None]
    hidden = torch.nn.functional.gelu(features @ weights["reward_features"] + by_user + weights["reward_constant"])
    return (features * direction[:, None]).sum(-1) + hidden @ weights["reward"]


def _learn(choices: Choices, seed: int, steps: int) -> NeuralProcess:
    scale = choices.gaps.std(0).clip(min=1e-9)
    rng = np.random.default_rng(seed)
    people = list(choices.by_user())
    order = rng.permutation(len(people))
    away = [people[place] for place in order[: round(HELD_OUT_USERS * len(people))]]
    stay = [people[place] for place in order[len(away) :]]
    sides = [side.float() for side in stack_users(stay, scale)]
    weights = _start(choices.chosen.shape[1], seed)
    gaps = torch.from_numpy(np.concatenate([own.gaps for own in stay]) / scale)
    weights["mean"] = fit_population(gaps, RIDGE).float()
    optimizer = torch.optim.AdamW([part.requires_grad_() for part in weights.values()], lr=RATE, weight_decay=DECAY)
    best, waited = _frozen(weights, scale), 0
    least = few_shot_loss(best, away) if away else np.inf
    for step in range(steps):
        batch = rng.integers(0, len(stay), min(BATCH, len(stay)))
        splits = [split_context(rng, len(stay[place])) for place in batch]
        context, asked = (pick_choices(sides, batch, [split[part] for split in splits]) for part in (0, 1))
        z = _encode(weights, *context)
        chosen, rejected, there = asked
        margin = _reward(weights, chosen, z) - _reward(weights, rejected, z)
        loss = (torch.nn.functional.softplus(-margin) * there).sum() / there.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % LOOK_EVERY == 0:
            now = _frozen(weights, scale)
            found = few_shot_loss(now, away) if away else -float(step)
            best, least, waited = (now, found, 0) if found < least else (best, least, waited + 1)
            if waited == PATIENCE:
                break
    return best


def _start(features: int, seed: int) -> dict[str, Tensor]:
    """Random matrices that keep sizes, no constants, and a network that does not speak yet."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"F": features, "H": HIDDEN, "Z": USER}
    weights = {}
    for name, letters in shapes_of(NeuralProcess).items():
        shape = [sizes[letter] for letter in letters]
        drawn = len(shape) == 2 and name != "tilt"
        weights[name] = torch.randn(shape, generator=generator) / shape[0] ** 0.5 if drawn else torch.zeros(shape)
    weights["tilt"] = 0.1 * torch.randn(features, USER, generator=generator) / USER**0.5
    del weights["scale"]
    return weights


def _frozen(weights: Weights, scale: Floats) -> NeuralProcess:
    return NeuralProcess(**{name: part.detach().numpy().copy() for name, part in weights.items()}, scale=scale)
