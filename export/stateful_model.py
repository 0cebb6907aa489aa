"""A transformers model as a pure function: tokens, positions and states go in, logits and the new states come out.

A runtime that knows nothing of an architecture can still drive it, if whatever the model remembers is an input and an
output. One such function serves the prompt and every step after it: an empty cache, a window of zeros and a convolution
that has seen zeros are the beginning of a text. Only the caches of layers that see everything grow. The masks are
computed inside, from the positions and the caches' sizes, so that a layer's window is part of the graph.

What the model keeps is asked of transformers' own cache. Read by `general_model.py` and `executorch_general.py`; needs
torch.

Shape legend: B = 1 conversation, T tokens, P tokens remembered, K width of a convolution, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from edgealign.errors import InputError

GROWING_ROPE = ("dynamic", "longrope")  # their angles depend on the length of the text, which a graph does not see
EXAMPLE_TOKENS, EXAMPLE_PAST = 3, 5  # of the run that an exporter records
RETRY = "see export/README.md for the architectures that can be exported"


@dataclass(frozen=True)
class StateShape:
    """One state: `shape` has None where it grows by a row with every token."""

    name: str
    shape: tuple[int | None, ...]

    def zeros(self, tokens: int) -> Tensor:
        """The state after so many tokens, all zeros."""
        return torch.zeros([tokens if size is None else size for size in self.shape])


class StatefulModel(nn.Module):
    """`forward(input_ids (B, T), position_ids (B, T), *states)` gives logits (B, T, V) and the states after them.

    Args:
        rows: how many of the last tokens get logits; 0 gives them to all.

    Raises:
        InputError: the architecture remembers something that no such function can carry.
    """

    def __init__(self, network: Any, *, rows: int = 0) -> None:
        super().__init__()
        self.rows = rows
        _refuse_growing_rope(network.config)
        network.set_attn_implementation("eager")  # plain matrix products, which every exporter can read
        self.network = network.eval()
        layers = _remembered(network)
        self.states = tuple(state for index, layer in enumerate(layers) for state in _shapes(index, layer))
        self.windows: dict[str, int | None] = {}
        for layer in layers:
            if isinstance(layer, DynamicLayer):
                window = _window(layer)
                self.windows["full_attention" if window is None else "sliding_attention"] = window

    def forward(self, input_ids: Tensor, position_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(config=self.network.config)
        left = iter(states)
        lengths = {}
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicLayer):
                keys, values, window = next(left), next(left), _window(layer)
                cache.layers[index] = _Attention(keys, values, None if window is None else window - 1)
                kind = "full_attention" if window is None else "sliding_attention"
                lengths[kind] = keys.shape[2] + input_ids.shape[1]
            else:
                cache.layers[index] = _Convolution(next(left))
        output = self.network(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True,
            attention_mask=self._masks(position_ids[0], lengths), logits_to_keep=self.rows,
        )  # fmt: skip
        return (output.logits, *_contents(cache.layers))

    def _masks(self, places: Tensor, lengths: Mapping[str, int]) -> Any:
        """Additive masks (B, 1, T, P + T), as the model takes them: one, or one for each kind of its layers."""
        masks: dict[str, Tensor | None] = {
            kind: _mask(places, length, self.windows[kind]) for kind, length in lengths.items()
        }
        if len(masks) < 2:
            return next(iter(masks.values()), None)
        return dict.fromkeys(self.network.config.layer_types) | masks  # a convolution has none


class ByKeyword(nn.Module):
    """A `StatefulModel` with its states by keyword, as transformers' exporters call a model."""

    def __init__(self, network: StatefulModel) -> None:
        super().__init__()
        self.network, self.config = network, network.network.config

    def forward(self, input_ids: Tensor, position_ids: Tensor, **states: Tensor) -> tuple[Tensor, ...]:
        carried = (states[_keyword(state)] for state in self.network.states)
        return self.network.forward(input_ids, position_ids, *carried)

    def example(self, *, tokens: Any, past: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Inputs for a run that an exporter records, and their free axes: the dimensions of both lengths by input."""
        places = torch.arange(EXAMPLE_PAST, EXAMPLE_PAST + EXAMPLE_TOKENS)[None]
        inputs = {"input_ids": torch.zeros_like(places), "position_ids": places}
        free: dict[str, Any] = {name: {1: tokens} for name in inputs}
        for state in self.network.states:
            inputs[_keyword(state)] = state.zeros(EXAMPLE_PAST)
            free[_keyword(state)] = {state.shape.index(None): past} if None in state.shape else None
        return inputs, free


class _Attention(DynamicLayer):  # type: ignore[misc]
    """The keys and values that a layer remembers, (B, heads, P, head size): all of them, or the last `kept`.

    transformers' own window counts tokens in Python, which a recorded graph would take for a constant; its exporters
    replace it by a cache that grows without end.
    """

    def __init__(self, keys: Tensor, values: Tensor, kept: int | None) -> None:
        super().__init__()
        self.keys, self.values, self.kept, self.is_initialized = keys, values, kept, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention reads: the past and the new tokens."""
        keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = keys, values
        if self.kept is not None:
            self.keys, self.values = keys[:, :, -self.kept :], values[:, :, -self.kept :]
        return keys, values


class _Convolution(LinearAttentionLayer):  # type: ignore[misc]
    """The inputs that a convolution remembers, (B, channels, K); replaced, where transformers overwrites them."""

    def __init__(self, remembered: Tensor) -> None:
        super().__init__()
        self.remembered = remembered
        self.conv_states[0] = remembered
        self.record_past = True  # a single token takes the same way as many, and nothing is written in place

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the convolution reads, (B, channels, K + T)."""
        whole = torch.cat([self.remembered, conv_states], dim=-1)
        self.remembered = whole[..., -self.remembered.shape[-1] :]
        return whole


def _mask(places: Tensor, length: int, window: int | None) -> Tensor:
    """(T,) positions of the new tokens -> (B, 1, T, P + T): 0 where a token sees, the lowest number elsewhere.

    The keys are the last ones up to the newest token, whatever a window has dropped before them; those at places below
    zero are what a window holds before the text began.
    """
    keys = places[-1] - (length - 1) + torch.arange(length, device=places.device)
    seen = (keys[None, :] <= places[:, None]) & (keys[None, :] >= 0)
    if window is not None:
        seen = seen & (keys[None, :] > places[:, None] - window)
    nothing = torch.zeros((), dtype=torch.float32, device=places.device)
    return nothing.masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def _remembered(network: Any) -> list[Any]:
    """transformers' cache layers after three tokens, each of a kind that can be carried."""
    cache = DynamicCache(config=network.config)
    with torch.no_grad():
        network(input_ids=torch.tensor([[0, 1, 2]]), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            continue
        if type(layer) is LinearAttentionLayer and len(_tensors(layer.conv_states)) == 1 and not _tensors(
            layer.recurrent_states
        ):  # fmt: skip
            continue
        reason = f"keeps a {type(layer).__name__} between tokens, neither an attention cache nor one convolution"
        raise InputError(network.config.model_type, reason, RETRY)
    return list(cache.layers)


def _shapes(index: int, layer: Any) -> Iterator[StateShape]:
    if isinstance(layer, DynamicLayer):
        window = _window(layer)
        batch, heads, _, width = layer.keys.shape
        for part, size in (("key", width), ("value", layer.values.shape[-1])):
            kept = None if window is None else window - 1  # transformers keeps what the next token can see
            yield StateShape(f"layers.{index}.{part}", (batch, heads, kept, size))
    else:
        yield StateShape(f"layers.{index}.conv", tuple(_tensors(layer.conv_states)[0].shape))


def _contents(layers: list[Any]) -> Iterator[Tensor]:
    for layer in layers:
        if isinstance(layer, _Convolution):
            yield layer.remembered
        else:
            yield layer.keys
            yield layer.values


def _keyword(state: StateShape) -> str:
    return state.name.replace(".", "_")


def _window(layer: Any) -> int | None:
    return int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else None


def _tensors(states: Any) -> list[Tensor]:
    found = states.values() if isinstance(states, Mapping) else states
    return [state for state in found if state is not None]


def _refuse_growing_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if entry.get("rope_type") in GROWING_ROPE:
            reason = f"turns its heads by {entry['rope_type']} rotary angles, which depend on the length of the text"
            raise InputError(config.model_type, reason, RETRY)
