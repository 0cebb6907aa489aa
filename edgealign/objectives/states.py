"""What an objective remembers of earlier steps: what it sees of a batch, and how that changes what it remembers.

Both are pure functions on dicts of tensors, so that a checkpoint can hold a state. What is seen has a row for every
pair: the batches of one optimizer step (its forward passes, of however many processes) are put together and remembered
at once, so a step does not depend on how it was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from edgealign.objectives.absolute import rewards
from edgealign.objectives.pairs import Pairs, State
from edgealign.objectives.reduce import Settings
from edgealign.objectives.settings import read_settings
from edgealign.objectives.table import Objective
from edgealign.objectives.terms import PAIR_TERMS, label_posterior, reference_gap

Seen = dict[str, torch.Tensor]  # (P, ...) each


@dataclass(frozen=True)
class Memory:
    """`see`: of a batch, its pair term's key and x; `remember`: an old state and what a step has seen, to the next."""

    see: Callable[[Pairs, str, torch.Tensor | None], Seen]
    remember: Callable[[State, Seen, Settings], State]


def remember(objective: Objective, state: State, seen: Sequence[Seen], settings: Settings | None = None) -> State:
    """The state after a step that has seen these batches; the same where there were none."""
    if objective.state is None or not seen:
        return state
    together = {name: torch.cat([each[name] for each in seen]) for name in seen[0]}
    return STATES[objective.state].remember(state, together, read_settings(objective, settings))


def see_gap(pairs: Pairs, pair_term: str, x: torch.Tensor | None) -> Seen:
    return {"gap": reference_gap(pairs).cpu()}


def running_z(state: State, seen: Seen, settings: Settings) -> State:
    """Count, mean and sum of squared deviations of all pairs' gaps so far (Welford, step by step; Chan 1983)."""
    gap = seen["gap"]
    n, old = float(len(gap)), float(state.get("count", torch.zeros(())))
    mean, squares = (state.get(name, torch.zeros(())).to(gap) for name in ("mean", "squares"))
    shift = gap.mean() - mean
    total = old + n
    return {
        "count": torch.tensor(total), "mean": mean + shift * n / total,
        "squares": squares + ((gap - gap.mean()) ** 2).sum() + shift**2 * old * n / total,
    }  # fmt: skip


def see_rewards(pairs: Pairs, pair_term: str, x: torch.Tensor | None) -> Seen:
    return {"rewards": torch.stack(rewards(pairs), -1).detach().cpu()}


def running_shift(state: State, seen: Seen, settings: Settings) -> State:
    """Mean of the rewards of both sides over all steps so far (BCO)."""
    both = seen["rewards"].flatten()
    n, old = float(len(both)), float(state.get("count", torch.zeros(())))
    shift = state.get("shift", torch.zeros(())).to(both)
    return {"count": torch.tensor(old + n), "shift": shift + (both.mean() - shift) * n / (old + n)}


def see_labels(pairs: Pairs, pair_term: str, x: torch.Tensor | None) -> Seen:
    assert x is not None
    posterior = label_posterior(PAIR_TERMS[pair_term], x, pairs)
    return {"user": pairs.column("user").long().cpu(), "posterior": posterior.cpu()}


def annotators(state: State, seen: Seen, settings: Settings) -> State:
    """eta of an annotator moves by `ema` towards the mean posterior of the labels that it gave here (RE-PO)."""
    users, posterior = seen["user"], seen["posterior"]
    known = state.get("eta", torch.zeros(0)).to(posterior)
    eta = torch.full((max(int(users.max()) + 1, len(known)),), settings["eta"]).to(posterior)
    eta[: len(known)] = known
    for user in sorted(set(users.tolist())):
        eta[user] += settings["ema"] * (posterior[users == user].mean() - eta[user])
    return {"eta": eta}


STATES: Mapping[str, Memory] = MappingProxyType({
    "running_z": Memory(see_gap, running_z),
    "running_shift": Memory(see_rewards, running_shift),
    "annotators": Memory(see_labels, annotators),
})  # fmt: skip
