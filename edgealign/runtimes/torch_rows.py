"""Several prompts in one torch batch: padded on the left, which transformers masks in attention and convolutions.

Shape legend: R rows, T tokens so far with padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits


class TorchRows:
    """Rows over `forward`, a model's own; ``keep`` drops those that are over."""

    def __init__(
        self, forward: Callable[..., Any], prompts: Sequence[Sequence[int]], *, device: Any = "cpu"
    ) -> None:
        import torch

        self._torch, self._forward, self._device = torch, forward, device
        width = max(len(prompt) for prompt in prompts)
        self._tokens = self._tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])  # (R, T)
        self._mask = self._tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # (R, T)
        self._cache: Any = None

    def prefill(self) -> Logits:
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        return self._run(self._tokens, positions)

    def step(self, tokens: Sequence[int]) -> Logits:
        self._mask = self._torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=-1)
        return self._run(self._tensor(tokens)[:, None], self._mask.sum(-1, keepdim=True) - 1)

    def keep(self, places: Sequence[int]) -> None:
        if places:
            chosen = self._tensor(places)
            self._mask = self._mask[chosen]
            self._cache.reorder_cache(chosen)  # transformers' choice of beams: any rows, any number

    def _run(self, tokens: Any, positions: Any) -> Logits:
        with self._torch.inference_mode():
            output = self._forward(
                input_ids=tokens, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            self._cache = output.past_key_values
            return np.array(output.logits[:, -1].to("cpu", self._torch.float32).numpy(), dtype=np.float32)

    def _tensor(self, values: Any) -> Any:
        return self._torch.tensor(values, device=self._device)
