"""The anchor that keeps a user's adapter from forgetting what the model says.

BAPO (base-anchored preference optimisation, arXiv 2407.00693) adds a loss on the model's own answer y_b to each
prompt, because a KL penalty to the reference does not keep it. The paper's exact equation could not be checked and
no official code is known; this is our reading:

    L = L_pref(y_w, y_l) + lambda * relu(log pi_ref(y_b | x) - log pi(y_b | x)) / |y_b|

y_b is the greedy answer of the starting point (base, or base plus population), made once, in one batch with a
cache, and short: the first tokens of an answer decide its style. Its reference log-probabilities come from the
first forward pass of the fit, where policy and reference are still the same.

Shape legend: C choices, S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgealign.objectives.reduce import mean_tokens
from edgealign.objectives.scores import Scores


def anchor_loss(policy: Scores, reference: Scores) -> Tensor:
    """(C,) from the scores of the C base answers: nats per token that they became less likely, never below 0."""
    return torch.relu(mean_tokens(reference.values, reference.mask) - mean_tokens(policy.values, policy.mask))


def base_answers(
    model: Any, prompts: Sequence[Sequence[int]], *, n_tokens: int, end_id: int, pad_id: int
) -> list[tuple[int, ...]]:
    """The greedy continuation of each prompt, through its end-of-turn token or `n_tokens`, whichever is first.

    Equal prompts are answered once; all of them are decoded together, padded on the left (transformers masks the
    padding in attention and in the short convolutions).
    """
    asked = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    width = max(len(prompt) for prompt in asked)
    device = next(model.parameters()).device
    tokens = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in asked], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked], device=device)
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens, attention_mask=mask, generation_config=_greedy(n_tokens, end_id, pad_id)
        )
    answers: dict[tuple[int, ...], tuple[int, ...]] = {}
    for prompt, row in zip(asked, out[:, width:].tolist(), strict=True):
        answers[prompt] = tuple(row[: row.index(end_id) + 1] if end_id in row else row)
    return [answers[tuple(prompt)] for prompt in prompts]


def _greedy(n_tokens: int, end_id: int, pad_id: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False, max_new_tokens=n_tokens, eos_token_id=end_id, pad_token_id=pad_id, use_cache=True
    )
