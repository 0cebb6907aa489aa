"""`edgealign start`: where a new user's LoRA begins, from the LoRAs of users who came before.

    edgealign start --model M --adapter runs/ada --adapter runs/bo --adapter runs/cleo --out runs/start
    edgealign personalize --model M --start runs/start --choices dan.jsonl --user dan --out runs/dan

Of every layer's additions D_u = B_u A_u of n users:

    A = their r strongest input directions together: right singular vectors of all D_u, one below the other
    B = t mean_u(D_u) A^T,     t = max(0, 1 - s / (n |mean|^2)),     s = the variance of a user's additions

t is how far the mean can be told from chance (James and Stein's shrinking, over all layers together): near 1 for users
who are alike, near 0 for users who are not, whose mean would lead the next one astray (benchmarks/lora_start.py).

It is published as a plain LoRA. A new user keeps B A, and adds to it in the same directions: the mean says where users
are, the directions say where they differ, so few choices need not find either. The reference, the shrinking and the
check are as for any population. Averaging instead of second-order meta-learning: Reptile (arXiv 1803.02999) with whole
fits as inner loops and one outer step.

Shape legend: n users, r_u a user's rank, r the start's, M = min(n r_u, D_in), D_in, D_out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgealign.artifact import Artifact, open_artifact, open_model, publish, refuse_existing
from edgealign.errors import InputError, UsageError
from edgealign.personalize.adapter import check_adapter_base
from edgealign.personalize.lowrank import Factors, read_peft, write_factors
from edgealign.personalize.recipes import StartRecipe
from edgealign.progress import say

NORM = 3**-0.5  # of a row of A as a fresh LoRA draws it, so that learning rates mean what they meant


def run(recipe: StartRecipe, *, model: str | Path, adapters: Sequence[str | Path], out: Path) -> Artifact:
    """Publish what several users' LoRAs on one model have in common.

    Raises:
        UsageError: fewer than two adapters.
        InputError: an adapter of another model, or one that is no plain LoRA.
    """
    out = Path(out)
    refuse_existing(out)
    if len(adapters) < 2:
        raise UsageError(f"{len(adapters)} adapter", "has nothing in common with anybody", "give --adapter again")
    base = open_model(model)
    opened = [check_adapter_base(path, base) for path in adapters]
    if len({each.digest for each in opened}) < len(opened):
        raise UsageError("an adapter", "is given twice", "name each user once")
    users = [read_peft(each.path) for each in opened]
    parts, kept, trust = average(users, recipe.rank)
    with publish(
        out, kind="adapter", format="peft", stage="start", recipe=recipe, licences=base.manifest.licences,
        inputs=[base.as_input("base"), *(each.as_input(f"user {i}") for i, each in enumerate(opened, start=1))],
    ) as draft:
        rank, count = write_factors(draft.dir, parts, alpha=recipe.rank, base_name=base.digest)
        draft.meta |= {
            "base_digest": base.digest, "method": "start", "users": len(users), "rank": rank, "parameters": count,
            "share_kept": round(kept, 4), "mean_trusted": round(trust, 4),
        }
    say(
        f"{len(users)} users' additions to {len(parts)} layers; {rank} directions a layer hold {kept:.0%} of them, and "
        f"{trust:.0%} of their mean is more than chance"
    )
    return open_artifact(out)


def average(users: Sequence[Mapping[str, Factors]], rank: int) -> tuple[dict[str, Factors], float, float]:
    """The start's factors by layer, the share of the users' squared additions that lies in its directions, and t.

    A user who does not adapt a layer adds nothing to it.

    Raises:
        InputError: a layer whose additions have other shapes in two users; fewer directions than `rank`.
    """
    found: dict[str, Factors] = {}
    sizes = torch.zeros(3, dtype=torch.float64)  # of all additions, of what lies in the directions, of the means
    n = len(users)
    for name in sorted({name for user in users for name in user}):
        own = [user[name] for user in users if name in user]
        shapes = {(part.a.shape[1], part.b.shape[0]) for part in own}
        if len(shapes) > 1:
            raise InputError(name, f"has several shapes in these users ({sorted(shapes)})", "fit them on one model")
        found[name], added = _average(own, n, rank, name)
        sizes += added
    whole, inside, mean = sizes.tolist()
    variance = (whole / n - mean) * n / (n - 1)
    trust = max(0.0, 1.0 - variance / (n * mean)) if mean > 0 else 0.0
    trusted = {name: Factors(part.a, trust * part.b) for name, part in found.items()}
    return trusted, inside / whole if whole else 1.0, trust


def _average(own: Sequence[Factors], n: int, rank: int, name: str) -> tuple[Factors, Tensor]:
    basis, _ = torch.linalg.qr(torch.cat([part.a.double() for part in own]).t())  # (D_in, M)
    if basis.shape[1] < rank:
        reason = f"has {basis.shape[1]} input directions in all these users together"
        raise InputError(name, reason, f"use a --rank of at most {basis.shape[1]}")
    small: list[Tensor] = [part.b.double() @ (part.a.double() @ basis) for part in own]  # each (D_out, M)
    sizes, vectors = torch.linalg.eigh(sum(delta.t() @ delta for delta in small))  # rising: (M,), (M, M)
    strongest = vectors[:, -rank:].flip(1)  # (M, r)
    mean = torch.stack(small).sum(0) / n  # (D_out, M)
    a, b = (basis @ strongest).t() * NORM, mean @ strongest / NORM
    added = torch.stack([sizes.sum(), sizes[-rank:].sum(), (mean**2).sum()])
    return Factors(a.float().contiguous(), b.float().contiguous()), added
