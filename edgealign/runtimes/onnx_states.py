"""What an ONNX graph remembers between tokens, and the description beside it that says so. No torch, no onnxruntime.

Two kinds of folders hold a graph. onnxruntime-genai's builder writes `genai_config.json`; its attention caches are read
and extended in place. A graph of ours has `graph.json`, which names every state with its shape, null where it grows: an
attention cache is longer after each run by the tokens of that run. Names come from these files only.

    {"model": {"type", "vocab_size", "context_length", "bos_token_id", "eos_token_id", "decoder": {
        "inputs": {"input_ids", "position_ids"}, "outputs": {"logits"},
        "states": [{"past", "present", "shape": [1, 2, null, 32]}, ...]}}}

Shape legend: B = 1 conversation, P tokens remembered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

GENAI_CONFIG, GRAPH_CONFIG = "genai_config.json", "graph.json"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
AGAIN = "export it again: edgealign export --target onnx"


@dataclass(frozen=True)
class State:
    """One state of the graph and its two buffers, which take turns; a cache that grows in place has one twice."""

    past: str
    present: str
    buffers: tuple[Array, Array]
    grows: bool  # a KV cache (B, heads, tokens, head size); else a convolution (B, channels, width), or a window

    def clear(self, tokens: int) -> None:
        """Overwrite what so many tokens may have left behind."""
        for buffer in self.buffers:
            (buffer[:, :, :tokens] if self.grows else buffer).fill(0)

    def part(self, turn: int, tokens: int) -> Array:
        """A view of what is remembered of so many tokens, in the buffer that the next run reads."""
        buffer = self.buffers[turn]
        return buffer[:, :, :tokens] if self.grows else buffer


@dataclass(frozen=True)
class AppendedState(State):
    """A KV cache whose past (B, heads, P, head size) comes back with the new tokens behind it.

    The buffers are flat and have room for the whole context: onnxruntime packs each length densely.
    """

    heads: int
    width: int

    def shape(self, tokens: int) -> tuple[int, int, int, int]:
        """The state's shape after so many tokens."""
        return (1, self.heads, tokens, self.width)

    def clear(self, tokens: int) -> None:
        for buffer in self.buffers:
            buffer[: self.heads * tokens * self.width].fill(0)

    def part(self, turn: int, tokens: int) -> Array:
        return self.buffers[turn][: self.heads * tokens * self.width]


def describe(config: Mapping[str, Any], states: Iterable[Any], ids: Any, context: int | None) -> dict[str, Any]:
    """A graph's names for a runtime; where onnxruntime-genai has a word for something, this is it.

    Args:
        config: the model's.
        states: each with a name and a shape, None where it grows.
        ids: the model's generation config.
        context: tokens that the description allows; None takes the model's own.
    """
    return {"model": {
        "type": str(config["model_type"]),
        "vocab_size": int(config["vocab_size"]),
        "context_length": context or int(config["max_position_embeddings"]),
        "bos_token_id": ids.bos_token_id,
        "eos_token_id": ids.eos_token_id,
        "decoder": {
            "num_hidden_layers": int(config["num_hidden_layers"]),
            "inputs": {"input_ids": "input_ids", "position_ids": "position_ids"},
            "outputs": {"logits": "logits"},
            "states": [
                {"past": f"past.{state.name}", "present": f"present.{state.name}", "shape": list(state.shape)}
                for state in states
            ],
        },
    }}  # fmt: skip


def read_description(folder: Path, *, again: str = AGAIN) -> dict[str, Any]:
    """The description beside a graph: onnxruntime-genai's, or ours.

    Args:
        again: the command that makes the folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    file = folder / (GRAPH_CONFIG if (folder / GRAPH_CONFIG).is_file() else GENAI_CONFIG)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        decoder = config["model"]["decoder"]
        for part in (decoder["inputs"], decoder["outputs"], config["model"]["context_length"]):
            assert part
        for state in decoder.get("states", ()):
            assert isinstance(state["past"], str)
            assert isinstance(state["present"], str)
            assert all(size is None or (isinstance(size, int) and 0 < size < 2**31) for size in state["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise InputError(file, "is missing or damaged", again) from error
    return config


def make_states(file: Path, decoder: Mapping[str, Any], inputs: Mapping[str, Any], context: int) -> list[State]:
    """Every state of the graph in `file`, as zeros.

    Args:
        decoder: the description's part of that name.
        inputs: the graph's inputs by name, as onnxruntime has them.
        context: how many tokens there must be room for.

    Raises:
        ArtifactError: the graph and its description disagree.
    """
    if "states" in decoder:
        return [_described(file, state, inputs, context) for state in decoder["states"]]
    outputs = decoder["outputs"]
    states = []
    for kind, pattern in decoder["inputs"].items():
        if not kind.startswith("past_"):
            continue
        for layer in range(int(decoder["num_hidden_layers"])):
            entry = inputs.get(pattern % layer)
            if entry is None:  # a convolution has no key, an attention layer no convolution
                continue
            shape = [size if isinstance(size, int) else 0 for size in entry.shape]
            shape[0] = 1
            grows = "key" in kind or "value" in kind
            if grows:
                shape[2:] = [context, shape[3] or int(decoder["head_size"])]
            if 0 in shape:
                raise ArtifactError(file, f"its state {entry.name} has no fixed shape", "export it again")
            buffer = np.zeros(shape, dtype=TYPES[entry.type])
            present = outputs[kind.replace("past_", "present_")] % layer
            states.append(State(entry.name, present, (buffer, buffer if grows else np.zeros_like(buffer)), grows))
    return states


def save_states(states: Iterable[State], turn: int, tokens: int) -> bytes:
    """All states after so many tokens as safetensors, by the names of their inputs."""
    from safetensors.numpy import save

    kept: bytes = save({state.past: np.ascontiguousarray(state.part(turn, tokens)) for state in states})
    return kept


def load_states(data: bytes, states: Sequence[State], turn: int, tokens: int) -> None:
    """Fill the buffers that the next run reads.

    Raises:
        InputError: the tensors are not these states'; none is filled.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        kept = load(data)
    except SafetensorError as error:
        raise InputError("state", "is no set of tensors", "feed the prompt again") from error
    places = {state.past: state.part(turn, tokens) for state in states}
    shapes = [{name: (array.shape, array.dtype) for name, array in each.items()} for each in (kept, places)]
    if shapes[0] != shapes[1]:
        raise InputError("state", "does not fit this graph", "feed the prompt again")
    for name, place in places.items():
        place[...] = kept[name]


def _described(file: Path, state: Mapping[str, Any], inputs: Mapping[str, Any], context: int) -> State:
    past, shape = state["past"], list(state["shape"])
    entry = inputs.get(past)
    if entry is None or len(entry.shape) != len(shape) or any(
        size is not None and size != stored for size, stored in zip(shape, entry.shape, strict=True)
    ):  # fmt: skip
        raise ArtifactError(file, f"has no input {past} of the shape {shape}, as {GRAPH_CONFIG} says", AGAIN)
    kind = TYPES[entry.type]
    if None not in shape:
        fixed = np.zeros(shape, dtype=kind)
        return State(past, state["present"], (fixed, np.zeros_like(fixed)), grows=False)
    if len(shape) != 4 or shape[2] is not None or shape.count(None) != 1 or shape[0] != 1:
        raise ArtifactError(file, f"its state {past} has the shape {shape}, which no session can hold", AGAIN)
    heads, width = shape[1], shape[3]
    flat = np.zeros(heads * context * width, dtype=kind)
    return AppendedState(past, state["present"], (flat, np.zeros_like(flat)), True, heads, width)
