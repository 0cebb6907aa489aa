"""What an ExecuTorch program remembers between tokens: inside of it, or as inputs and outputs that a session carries.

A program of ExecuTorch's own definition writes its KV cache and convolutions in place and takes the position of the
first new token; position 0 begins a conversation. A program that was recorded from torch remembers nothing: its states
come back from every run and go into the next one, and zeros (no tokens at all, where a cache grows) are the beginning.
`graph.json` beside such a program names them in the order of its inputs; without that file a program is of the first
kind.

Shape legend: T tokens, P tokens remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from edgealign.errors import ArtifactError
from edgealign.runtimes.onnx_states import GRAPH_CONFIG, read_description

EXPORT = "export it again: edgealign export --target executorch"
FLOAT = 6  # ExecuTorch's scalar type
FIRST = 2  # inputs before the states: tokens and positions

Shape = tuple[int | None, ...]


class States(Protocol):
    """The memory of one conversation."""

    filled: int  # tokens

    def inputs(self, tokens: Sequence[int]) -> tuple[Any, ...]:
        """A method's inputs for these tokens, up to a user's matrices."""

    def advance(self, tokens: Sequence[int], outputs: Sequence[Any]) -> None:
        """Remember what the method has made of them."""

    def clear(self) -> None:
        """Begin a conversation."""


class HeldStates:
    """The program's own: nothing to carry but the position."""

    def __init__(self) -> None:
        self.filled = 0

    def inputs(self, tokens: Sequence[int]) -> tuple[Any, ...]:
        import torch

        return torch.tensor([list(tokens)], dtype=torch.int64), torch.tensor([self.filled])

    def advance(self, tokens: Sequence[int], outputs: Sequence[Any]) -> None:
        self.filled += len(tokens)

    def clear(self) -> None:
        self.filled = 0


class CarriedStates:
    """States as inputs and outputs; `shapes` has None where a state grows by the tokens of each run."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = tuple(shapes)
        self.clear()

    def inputs(self, tokens: Sequence[int]) -> tuple[Any, ...]:
        import torch

        places = torch.arange(self.filled, self.filled + len(tokens))[None]
        return torch.tensor([list(tokens)], dtype=torch.int64), places, *self.values

    def advance(self, tokens: Sequence[int], outputs: Sequence[Any]) -> None:
        # The next run overwrites the memory that these lie in.
        self.values = [state.clone() for state in outputs[1:]]
        self.filled += len(tokens)

    def clear(self) -> None:
        import torch

        self.filled = 0
        self.values = [torch.zeros([size or 0 for size in shape]) for shape in self.shapes]


def open_states(file: Path, method: Any, *, context: int) -> States:
    """The states of the program in `file`, at the beginning of a conversation.

    Args:
        method: its method without a user, as ExecuTorch has loaded it.
        context: tokens that the program has planned for.

    Raises:
        ArtifactError, InputError: the description beside it is damaged, or is another program's.
    """
    if not (file.parent / GRAPH_CONFIG).is_file():
        if method.metadata.num_inputs() != FIRST:
            raise ArtifactError(file, f"lacks the {GRAPH_CONFIG} that names its states", EXPORT)
        return HeldStates()
    described = read_description(file.parent, again=EXPORT)["model"]["decoder"].get("states", ())
    shapes = [tuple(state["shape"]) for state in described]
    facts = method.metadata
    fits = facts.num_inputs() == FIRST + len(shapes) and facts.num_outputs() == 1 + len(shapes)
    # Where a state grows, the program states its largest size: one more token must have room.
    largest = [tuple(context - 1 if size is None else size for size in shape) for shape in shapes]
    if not fits or not all(_is(facts.input_tensor_meta(FIRST + at), sizes) for at, sizes in enumerate(largest)):
        reason = f"has {facts.num_inputs() - FIRST} states, and not all of them as {GRAPH_CONFIG} says"
        raise ArtifactError(file, reason, EXPORT)
    return CarriedStates(shapes)


def _is(tensor: Any, sizes: tuple[int, ...]) -> bool:
    return int(tensor.dtype()) == FLOAT and tuple(tensor.sizes()) == sizes
