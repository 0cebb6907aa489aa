"""Relative terms that are no function of one pair's two sums: a batch's pairs against each other, and masked tokens.

They stand where a pair term stands and return (P,). Shape legend: P pairs, S = 2 P, L longest sequence, E features.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid

from edgealign.objectives.pairs import Pairs
from edgealign.objectives.reduce import sum_tokens
from edgealign.objectives.terms import Part


def across_batch(pairs: Pairs) -> Tensor:
    """mean over j of -ls(beta w_ij (chosen_i - rejected_j)), w a softmax of minus the prompts' cosine distance / t.

    Column `prompt_features` (P, E). One pair is DPO: w = 1 (relative PO, its contrast matrix).
    """
    features = pairs.column("prompt_features").to(pairs.chosen)
    distance = 1 - cosine_similarity(features[:, None], features[None, :], dim=-1)  # (P, P)
    weights = torch.softmax(-distance / pairs.settings["t"], -1)
    gaps = pairs.chosen[:, None] - pairs.rejected[None, :]
    return -logsigmoid(pairs.beta * weights * gaps).mean(-1)


def sparse(pairs: Pairs) -> Tensor:
    """-ls(beta (u - d)) with masks on rewards and on KL (SparsePO).

    u: the masked log-ratios' gap (the chosen and rejected sums here, by `token_weights`); d: the gap of the masked
    per-token KL. Columns `kl_weights` and `token_kl` (S, L); its code takes minus KL(ref || pi), and so is the sign
    here.
    """
    divergence = -sum_tokens(pairs.column("token_kl") * pairs.column("kl_weights"), pairs.policy.mask)
    return -logsigmoid(pairs.beta * (pairs.delta - (divergence[0::2] - divergence[1::2])))


CONTRASTS: Mapping[str, Part] = MappingProxyType({"across_batch": across_batch, "sparse": sparse})
