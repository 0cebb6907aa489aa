"""transformers' cache as safetensors and back: keys and values, LFM2's convolution states, recurrent states.

What a layer holds goes through the layer's own `update`, so that a restored cache is one that transformers made.
"""

from __future__ import annotations

from typing import Any

from edgealign.errors import InputError, UsageError

FIX = "feed the prompt again"


def save_cache(cache: Any) -> bytes:
    """The states of a cache of one conversation.

    Raises:
        UsageError: a kind of cache that is not known here.
    """
    import torch
    from safetensors.torch import save

    tensors: dict[str, Any] = {}
    for number, layer in enumerate(cache.layers):
        for kind in ("conv_states", "recurrent_states"):
            for place, value in getattr(layer, kind, {}).items():
                if value is not None:
                    tensors[f"{number}.{kind}.{place}"] = value.contiguous()
        if getattr(layer, "keys", None) is not None:
            tensors[f"{number}.keys"], tensors[f"{number}.values"] = layer.keys.contiguous(), layer.values.contiguous()
        seen = getattr(layer, "cumulative_length", None)
        if seen is not None:
            tensors[f"{number}.seen"] = torch.tensor(int(seen))
        if not any(name.startswith(f"{number}.") for name in tensors):
            raise UsageError(type(layer).__name__, "is a cache whose state cannot be kept here", FIX)
    found: bytes = save(tensors)
    return found


def load_cache(data: bytes, config: Any) -> Any:
    """A cache for a model of this configuration, filled.

    Raises:
        InputError: the tensors are not those of such a cache.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=config)
    try:
        tensors = load(data)
        for number, layer in enumerate(cache.layers):
            _fill(layer, {name.partition(".")[2]: value for name, value in tensors.items() if _layer(name) == number})
        if {_layer(name) for name in tensors} - set(range(len(cache.layers))):
            raise ValueError("more layers than the model has")
    except (SafetensorError, KeyError, ValueError, AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
        raise InputError("state", f"does not fit this model ({reason})", FIX) from error
    return cache


def _fill(layer: Any, tensors: dict[str, Any]) -> None:
    for name, value in tensors.items():
        kind, _, place = name.partition(".")
        if kind == "conv_states":
            layer.update_conv_state(value, state_idx=int(place))
        elif kind == "recurrent_states":
            layer.update_recurrent_state(value, state_idx=int(place))
    if "keys" in tensors:
        layer.update(tensors["keys"], tensors["values"])
    if "seen" in tensors:
        layer.cumulative_length = int(tensors["seen"])


def _layer(name: str) -> int:
    return int(name.partition(".")[0])
