"""What an objective remembers of earlier batches: pure functions (state, batch) -> state. A state is a dict of tensors,
so that a checkpoint can hold it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from edgealign.objectives.absolute import rewards
from edgealign.objectives.pairs import Pairs, State
from edgealign.objectives.terms import PAIR_TERMS, label_posterior, reference_gap, reliability

Update = Callable[[Pairs, str, "torch.Tensor | None"], State]


def running_z(pairs: Pairs, pair_term: str, x: torch.Tensor | None) -> State:
    """Count, mean and sum of squared deviations of all pairs' gaps so far (Welford, batch by batch; Chan 1983)."""
    gap = reference_gap(pairs)
    n, old = float(len(gap)), float(pairs.state.get("count", torch.zeros(())))
    mean, squares = (pairs.state.get(name, torch.zeros(())).to(gap) for name in ("mean", "squares"))
    shift = gap.mean() - mean
    total = old + n
    return {
        "count": torch.tensor(total), "mean": mean + shift * n / total,
        "squares": squares + ((gap - gap.mean()) ** 2).sum() + shift**2 * old * n / total,
    }  # fmt: skip


def running_shift(pairs: Pairs, pair_term: str, x: torch.Tensor | None) -> State:
    """Mean of the rewards of both sides over all batches so far (BCO)."""
    both = torch.cat([part.detach() for part in rewards(pairs)])
    n, old = float(len(both)), float(pairs.state.get("count", torch.zeros(())))
    shift = pairs.state.get("shift", torch.zeros(())).to(both)
    return {"count": torch.tensor(old + n), "shift": shift + (both.mean() - shift) * n / (old + n)}


def annotators(pairs: Pairs, pair_term: str, x: torch.Tensor | None) -> State:
    """eta of an annotator moves by `ema` towards the mean posterior of the labels that it gave here (RE-PO)."""
    assert x is not None
    users = pairs.column("user").long()
    posterior = label_posterior(PAIR_TERMS[pair_term], x, pairs)
    current = reliability(pairs).to(posterior)
    size = max(int(users.max()) + 1, len(pairs.state.get("eta", ())))
    eta = torch.full((size,), pairs.settings["eta"], dtype=posterior.dtype, device=posterior.device)
    known = pairs.state.get("eta", torch.zeros(0))
    eta[: len(known)] = known.to(eta)
    for user in users.unique():
        of_user = users == user
        eta[user] = current[of_user][0] + pairs.settings["ema"] * (posterior[of_user].mean() - current[of_user][0])
    return {"eta": eta.detach()}


STATES: Mapping[str, Update] = MappingProxyType(
    {"running_z": running_z, "running_shift": running_shift, "annotators": annotators}
)
