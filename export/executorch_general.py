"""Write the ExecuTorch program of an architecture that ExecuTorch has no definition of, from the torch model itself.

transformers' exporter records the model as a pure function of tokens and states (`stateful_model`), twice: `forward`
without a user and `adapted` with one, over the same weights. What the model remembers is an input and an output of
both; `graph.json` beside the program names the states in their order, for `edgealign.runtimes.executorch_states`.

Only the recording is transformers' (`DynamoExporter`, with its repairs for ExecuTorch); the lowering is that of
`executorch_lower`. transformers' own, `ExecutorchExporter`, lowers one method and leaves no place for facts in the
program: every token without a user would be multiplied with matrices of zeros.

Shape legend: T tokens, P tokens remembered, I in features, O out features, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch_lower import EXAMPLE_RANK, LARGEST_RANK, Lowered, lower, program_facts, quiet
from executorch_model import AdaptedLinear, round_weights
from stateful_model import ByKeyword, StatefulModel
from torch import Tensor, nn

from edgealign.errors import EdgealignError, InputError, writing
from edgealign.models.load import load_model, read_config
from edgealign.runtimes.executorch_names import ADAPTED, FORWARD
from edgealign.runtimes.lora_inputs import INPUTS_FILE, LoraInput, Part, write_inputs
from edgealign.runtimes.onnx_states import GRAPH_CONFIG, describe

HEAD = "lm_head"
BATCH = 128  # tokens of a prompt fed at once, plus one: every score of every head has its place in planned memory
LONGEST_CONTEXT = 4096  # memory is planned for attention over so many tokens


class Recorded(ByKeyword):
    """One method: tokens, positions, states, then perhaps A, B, A, B, ... give (1, V) logits and the new states."""

    def __init__(self, network: StatefulModel, places: Sequence[AdaptedLinear]) -> None:
        super().__init__(network)
        self.places = list(places)

    def forward(self, input_ids: Tensor, position_ids: Tensor, **left: Tensor) -> tuple[Tensor, ...]:
        for number, place in enumerate(self.places):
            a, b = _matrices(number)
            place.pair = (left[a], left[b]) if a in left else None
        logits, *after = super().forward(input_ids, position_ids, **left)
        # A state that is a view of an input, or twice the same tensor, would have no memory of its own.
        return (logits[:, -1], *(state.clone() for state in after))


def write_program(model: Path, file: Path, *, quant: str, digest: str, context: int | None = None) -> Lowered:
    """Write a `.pte` file, and `adapter_inputs.json` and `graph.json` beside it; as `executorch_lower.write_program`.

    Raises:
        InputError: the model cannot be written as such a program, with the reason.
    """
    config = read_config(model)
    network = load_model(model)
    length = context or min(int(network.config.max_position_embeddings), LONGEST_CONTEXT)
    batch = min(BATCH, length)
    stateful = StatefulModel(network, rows=1)
    try:
        with quiet():
            if quant == "8da4w":
                round_weights(network, model, head=HEAD)
            places = _adapt(network)
            if not places:
                raise InputError(model, "has no linear layers of torch's own kind", "export another architecture")
            method = Recorded(stateful, places).eval().requires_grad_(False)
            programs = {name: _record(method, name == ADAPTED, length, batch) for name in (FORWARD, ADAPTED)}
            facts = program_facts(
                model, config, layers=int(config["num_hidden_layers"]), vocab=int(config["vocab_size"]),
                context=length, batch=batch,
            )  # fmt: skip
            carried = {"use_kv_cache": False, "use_sdpa_with_kv_cache": False}
            lowered = lower(programs, {**facts, **carried, "get_model_digest": digest})
    except EdgealignError:
        raise
    except Exception as error:  # of any kind: torch's exporter runs the model's own code
        reason = f"cannot be written as an ExecuTorch program ({type(error).__name__}: {str(error)[:200]})"
        raise InputError(model, reason, "look into export/executorch_general.py, which made it") from error
    described = describe(config, stateful.states, network.generation_config, length)
    with writing(file):
        with open(file, "wb") as written:
            lowered.write_to_file(written)
        file.with_name(GRAPH_CONFIG).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    inputs = tuple(place.entry for place in places)
    write_inputs(file.with_name(INPUTS_FILE), inputs)
    return Lowered(inputs, length)


def _adapt(network: nn.Module) -> list[AdaptedLinear]:
    """Every linear layer but the head takes a user's pair, in the model's order and under its names."""
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    places = []
    for name, module in found:
        if name != HEAD:
            entry = LoraInput(name, module.in_features, (Part(name, module.out_features),))
            places.append(AdaptedLinear(module, entry))
            network.set_submodule(name, places[-1])
    return places


def _record(method: Recorded, adapted: bool, context: int, batch: int) -> Any:
    """The method as a graph: up to `batch` - 1 tokens after any number of them, with pairs of any rank from 2 on.

    The dimensions have no names, because torch refuses named ones for such a graph.
    """
    from transformers.exporters import DynamoConfig, DynamoExporter
    from transformers.exporters.utils import apply_fx_node_fixes, apply_fx_program_fixes, apply_patches

    free: Any = torch.export.Dim.AUTO
    tokens, past, rank = free(min=1, max=batch - 1), free(min=0, max=context - 1), free(min=2, max=LARGEST_RANK)
    inputs, sizes = method.example(tokens=tokens, past=past)
    for name, shape, axis in _pairs(method.places) if adapted else ():
        inputs[name], sizes[name] = torch.zeros(shape), {axis: rank}
    with apply_patches("executorch"), apply_patches("executorch.xnnpack"):
        graph, _ = DynamoExporter().export_program(method, inputs, DynamoConfig(dynamic=True, dynamic_shapes=sizes))
        apply_fx_program_fixes("executorch", graph)
        apply_fx_node_fixes("executorch", graph.graph_module)
    return graph


def _pairs(places: Sequence[AdaptedLinear]) -> Iterator[tuple[str, tuple[int, int, int], int]]:
    """Each matrix of a user: keyword, shape, and the axis of its rank."""
    for number, place in enumerate(places):
        a, b = _matrices(number)
        yield a, (1, place.entry.columns, EXAMPLE_RANK), 2
        yield b, (1, EXAMPLE_RANK, place.entry.out), 1


def _matrices(number: int) -> tuple[str, str]:
    return f"lora_a_{number}", f"lora_b_{number}"
