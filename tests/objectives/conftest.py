"""Random log-probabilities of pairs, and columns for every objective that reads some."""

from __future__ import annotations

import pytest
import torch

from edgealign.objectives.scores import Ragged, Scores, pad_ragged

LENGTHS = (5, 3, 1, 7, 4, 4)  # three pairs


def make_scores(lengths=LENGTHS, seed=0, scale=1.0, dtype=torch.float64) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    values = -scale * torch.rand(sum(lengths), generator=generator, dtype=dtype) - 0.1
    counts = torch.tensor(lengths)
    return pad_ragged(Ragged(values, torch.repeat_interleave(torch.arange(len(lengths)), counts), counts))


def make_columns(seed=9) -> dict[str, object]:
    """Every column that an objective of three pairs may read."""
    generator = torch.Generator().manual_seed(seed)
    mask = make_scores().mask
    weights = [torch.rand(mask.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    spans = torch.rand(mask.shape, generator=generator) < 0.6
    names = (
        "gold", "rationale", "calibration", "base", "base_reference", "unrelated", "unrelated_reference",
    )  # fmt: skip
    texts = {name: make_scores((4, 2, 6), seed + place) for place, name in enumerate(names)}
    online = {name: make_scores((3, 4, 2, 2, 5, 1), seed + 20 + i) for i, name in
              enumerate(("online", "online_reference"))}  # fmt: skip
    return {
        **texts, **online, "second_reference": make_scores(seed=seed + 30), "previous": make_scores(seed=seed + 31),
        "margin": torch.tensor([0.5, -0.2, 0.1]), "epsilon": torch.tensor([0.0, 0.2, 0.4]),
        "user": torch.tensor([0, 1, 0]), "score": torch.tensor([0.5, 0.3, 0.1]),
        "advantage": torch.tensor([0.4, -0.3, 0.0]), "advantage_rejected": torch.tensor([-0.1, 0.2, 0.0]),
        "token_weights": weights[0], "kl_weights": weights[1], "token_kl": weights[2], "spans": spans,
        "prompt_features": torch.rand(3, 5, generator=generator, dtype=torch.float64),
    }  # fmt: skip


@pytest.fixture
def scores():
    """The function that makes log-probabilities of three pairs, or of sequences of other lengths."""
    return make_scores


@pytest.fixture
def columns() -> dict[str, object]:
    return make_columns()
