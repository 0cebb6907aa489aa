"""Write one ExecuTorch program for XNNPACK: `forward` without a user and `adapted` with one, over the same weights.

`forward(tokens, input_pos)` is what ExecuTorch's own runner calls; `adapted(tokens, input_pos, A, B, A, B, ...)` takes
a user's matrices in the order of `adapter_inputs.json`. The weights lie in the file once.

Shape legend: T tokens, I in features, O out features, r rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch_model import Program, adaptable, build, round_weights

from edgealign.models.load import load_tokenizer, read_config
from edgealign.runtimes.executorch_names import ADAPTED, FORWARD, architecture
from edgealign.runtimes.lora_inputs import INPUTS_FILE, LoraInput, write_inputs

LARGEST_RANK = 256
SHARED_FROM = 65_536  # elements
EXAMPLE_RANK, EXAMPLE_TOKENS = 4, 3
BATCH = 512  # tokens of a prompt fed at once, plus one; the program plans its memory for them
LONGEST_CONTEXT = 4096  # every position of the KV cache is memory that the program takes when it is loaded


@dataclass(frozen=True)
class Lowered:
    """A program's adaptable matrices in the order of its inputs, and the tokens that its state holds."""

    inputs: tuple[LoraInput, ...]
    context: int


def write_program(model: Path, file: Path, *, quant: str, digest: str, context: int | None = None) -> Lowered:
    """Write a `.pte` file and `adapter_inputs.json` beside it.

    Args:
        quant: `fp32`, or `8da4w`.
        digest: the model's, written into the program.
        context: None takes the model's own, at most `LONGEST_CONTEXT`.

    Raises:
        InputError: an architecture without a definition, or rows that the quantisation cannot cut into groups.
    """
    config = read_config(model)
    table = architecture(str(config.get("model_type", "")))
    length = context or min(int(config["max_position_embeddings"]), LONGEST_CONTEXT)
    batch = min(BATCH, length)
    with quiet():
        net = build(model, table, config, context=length, batch=batch)
        if quant == "8da4w":
            round_weights(net, model)
        inputs = tuple(place.entry for place in adaptable(net))
        programs = {
            FORWARD: _trace(Program(net, adapted=False), (), batch),
            ADAPTED: _trace(Program(net, adapted=True), inputs, batch),
        }
        facts = program_facts(
            model, config, layers=int(net.n_layers), vocab=int(net.vocab_size), context=length, batch=batch
        )
        lowered = lower(programs, {**facts, "get_model_digest": digest})
        with open(file, "wb") as written:
            lowered.write_to_file(written)
    write_inputs(file.with_name(INPUTS_FILE), inputs)
    return Lowered(inputs, length)


def lower(programs: Mapping[str, Any], facts: Mapping[str, Any]) -> Any:
    """Hand the graphs to XNNPACK, in pieces as large as it can take, and plan memory for the rest."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    with _shared_weights():
        edge = to_edge_transform_and_lower(
            dict(programs), partitioner=[XnnpackPartitioner()], constant_methods=dict(facts),
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        return edge.to_executorch(
            ExecutorchBackendConfig(
                extract_delegate_segments=True, do_quant_fusion_and_const_prop=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )


@contextlib.contextmanager
def _shared_weights() -> Iterator[None]:
    """ExecuTorch copies a program whole before it works on it, once for each method; weights are only read."""
    own: dict[type, Any] = {kind: kind.__deepcopy__ for kind in (torch.Tensor, torch.nn.Parameter)}

    def share(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if type(self) in own and self.device.type == "cpu" and self.numel() >= SHARED_FROM:
            return self
        copied: torch.Tensor = own[torch.nn.Parameter if isinstance(self, torch.nn.Parameter) else torch.Tensor](
            self, memo
        )
        return copied

    for kind in own:
        kind.__deepcopy__ = share  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for kind, method in own.items():
            kind.__deepcopy__ = method  # type: ignore[attr-defined]


def program_facts(
    model: Path, config: Mapping[str, Any], *, layers: int, vocab: int, context: int, batch: int
) -> dict[str, Any]:
    """What ExecuTorch's runner asks a program, by its names for it."""
    tokenizer = load_tokenizer(model)
    ends = _ends(model, config, tokenizer)
    return {
        "get_max_seq_len": batch, "get_max_context_len": context, "get_n_layers": layers,
        "get_vocab_size": vocab, "use_kv_cache": True, "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True, "get_bos_id": int(tokenizer.bos_token_id or 0), "get_eos_ids": ends,
    }  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """executorch and torchao talk about every layer and warn of each other's versions; standard output is ours."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _trace(method: Program, inputs: Sequence[LoraInput], batch: int) -> Any:
    """The method as a graph: any number of tokens below `batch`, any rank from 2 on, one for all matrices."""
    tokens = torch.arange(2, 2 + EXAMPLE_TOKENS)[None]
    matrices: list[torch.Tensor] = []
    sizes: list[dict[int, Any]] = []
    rank = torch.export.Dim("rank", min=2, max=LARGEST_RANK)
    for entry in inputs:
        matrices += [torch.zeros(1, entry.columns, EXAMPLE_RANK), torch.zeros(1, EXAMPLE_RANK, entry.out)]
        sizes += [{2: rank}, {1: rank}]
    length = torch.export.Dim("length", max=batch - 1)
    with torch.no_grad():
        graph = torch.export.export(
            method, (tokens, torch.tensor([0]), *matrices),
            dynamic_shapes=({1: length}, None, *([tuple(sizes)] if sizes else [])), strict=False,
        )  # fmt: skip
        return graph.run_decompositions({})


def _ends(model: Path, config: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The ids that end a turn: the generation config's, else the tokenizer's."""
    file = model / "generation_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    stated = tokenizer.eos_token_id if stated is None else stated
    return [int(number) for number in (stated if isinstance(stated, list) else [stated])]
