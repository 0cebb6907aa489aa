"""Build the ONNX graph of an architecture that onnxruntime-genai's builder does not know, from the torch model itself.

transformers' exporter lowers the model as a pure function of tokens and states (`stateful_model`). Then the graph is
edited as the builder's is: every linear layer gets its module's name, its weights are rounded by onnxruntime's own
quantiser, a tied head and its embedding stay one tensor, and each layer gets two inputs of rank zero for users' LoRAs.
`graph.json` beside the graph names its inputs, outputs and states for `edgealign.runtimes.onnx_states`;
onnxruntime-genai has no pipeline for such a graph and cannot open it.

Shape legend: I in features, O out features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from genai_model import DATA_FILE, MODEL_DIGEST, MODEL_FILE, add_lora_inputs, quiet, tie_head

from edgealign.errors import EdgealignError, InputError, writing
from edgealign.models.load import load_model, read_config
from edgealign.runtimes.lora_inputs import INPUTS_FILE, LoraInput, write_inputs
from edgealign.runtimes.onnx_names import LAYER_NODE, OnnxArchitecture
from edgealign.runtimes.onnx_states import GRAPH_CONFIG, describe

OPSET = 20
BLOCK = 32  # weights that share a scale, as in the builder's graphs
HEAD, LOOKUP = "/lm_head/MatMul", "/model/embed_tokens/Gather"
# Bits of the layers and of the head; int4 is the grid of llama.cpp's Q4_0, int4_k rounds with more care.
BITS: Mapping[str, tuple[int, int]] = {"int8": (8, 8), "int4": (4, 8), "int4_k": (4, 8)}


def write_model(
    model: Path, out: Path, *, quant: str, digest: str, context: int | None = None
) -> tuple[LoraInput, ...]:
    """Write `model.onnx`, its data, `graph.json` and `adapter_inputs.json`; returns the adaptable matrices.

    Args:
        quant: fp32, or a name in `BITS`.
        digest: the model's, written into the graph.
        context: tokens that the description allows; None takes the model's own.

    Raises:
        InputError: the model cannot be written as such a graph, with the reason.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from stateful_model import StatefulModel

    try:
        with quiet():
            network = StatefulModel(load_model(model))
            graph = lower(network)
            name_layers(graph.graph, tied_kept=quant == "fp32")
            RemoveUnusedNodesPass()(graph)
            if quant != "fp32":
                graph = quantise(graph, quant)
                tie_head(graph.graph)
                RemoveUnusedNodesPass()(graph)
    except EdgealignError:
        raise
    except Exception as error:  # of any kind: torch's exporter runs the model's own code
        reason = f"cannot be written as an ONNX graph by torch ({type(error).__name__}: {str(error)[:200]})"
        raise InputError(model, reason, "look into export/general_model.py, which made it") from error
    table = layer_table(graph.graph)
    if not table.linear:
        raise InputError(model, "has no linear layers that the graph's operators show", "export another architecture")
    shapes = {name: tuple(value.shape) for name, value in network.network.named_parameters()}
    inputs = add_lora_inputs(graph.graph, table, shapes)
    graph.metadata_props[MODEL_DIGEST] = digest
    with writing(out / MODEL_FILE):
        ir.save(graph, out / MODEL_FILE, external_data=DATA_FILE)
        description = describe(read_config(model), network.states, network.network.generation_config, context)
        (out / GRAPH_CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    write_inputs(out / INPUTS_FILE, inputs)
    return inputs


def lower(network: Any) -> Any:
    """A `StatefulModel` as an onnx_ir model, the lengths of tokens and caches left open, weights under their names."""
    import torch
    from stateful_model import ByKeyword
    from transformers.exporters import OnnxConfig, OnnxExporter

    method = ByKeyword(network).eval().requires_grad_(False)
    free: Any = torch.export.Dim.AUTO
    inputs, sizes = method.example(tokens=free(min=1), past=free(min=0))
    # Without its optimiser every weight keeps its name; onnxruntime folds constants when it loads.
    config = OnnxConfig(dynamic=True, dynamic_shapes=sizes, opset_version=OPSET, optimize=False)
    model, _ = OnnxExporter().export_program(method, inputs, config)
    names = [state.name for state in network.states]
    past, present = ([f"{when}.{name}" for name in names] for when in ("past", "present"))
    for value, name in zip(model.graph.inputs, ["input_ids", "position_ids", *past], strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, ["logits", *present], strict=True):
        value.name = name
    first = {id(weight): name for name, weight in reversed([*network.network.named_parameters(remove_duplicate=False)])}
    for name, weight in network.network.named_parameters(remove_duplicate=False):
        value = model.graph.initializers.get(f"network.network.{name}")
        if value is not None:
            value.name = first[id(weight)]  # a tied head is the embedding
    return model


def name_layers(graph: Any, *, tied_kept: bool) -> None:
    """Give weights and linear layers the model's names, and store each layer's matrix as (I, O).

    Args:
        tied_kept: leave a head that reads the embedding as it is, so that the two stay one tensor.
    """
    embedding: Any = None
    for node in graph:
        if node.op_type == "Gather" and node.inputs[1] is graph.inputs[0]:
            node.name, embedding = LOOKUP, node.inputs[0]
    for node in list(graph):
        turned = node.inputs[1].producer() if node.op_type == "MatMul" else None
        weight = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or not weight.name.endswith(".weight"):
            continue
        head = weight is embedding or weight.name == "lm_head.weight"
        module = "lm_head" if head else weight.name.removesuffix(".weight")
        node.name = f"/{re.sub(r'[.](?![0-9])', '/', module)}/MatMul"
        if not (weight is embedding and tied_kept):
            node.replace_input_with(1, _turned(graph, weight, f"{module}.weight.turned"))
        node.outputs[0].type = weight.type  # torch leaves it out here and there


def quantise(model: Any, quant: str) -> Any:
    """Round the linear layers and the head with onnxruntime's quantiser; returns the new onnx_ir model."""
    import onnx_ir as ir
    from onnxruntime.quantization.matmul_nbits_quantizer import KQuantWeightOnlyQuantConfig, MatMulNBitsQuantizer

    bits, head_bits = BITS[quant]
    options: dict[str, Any] = {"block_size": BLOCK, "is_symmetric": True, "accuracy_level": 4}
    proto = ir.to_proto(model)
    names = [node.name for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value is not None]
    passes: list[dict[str, Any]] = [
        {"bits": bits, "nodes_to_include": [name for name in names if name != HEAD]},
        {"bits": head_bits, "nodes_to_include": [HEAD]},
    ]
    if quant == "int4_k":
        each = {name: {"bits": head_bits if name == HEAD else bits} for name in names}
        passes = [{
            "nodes_to_include": names, "algo_config": KQuantWeightOnlyQuantConfig(customized_weight_config=each),
        }]  # fmt: skip
    for chosen in passes:
        quantiser = MatMulNBitsQuantizer(proto, **options, **chosen)
        quantiser.process()
        proto = quantiser.model.model
    return ir.from_proto(proto)


def layer_table(graph: Any) -> OnnxArchitecture:
    """Every linear layer of the graph under its module's own name, as `add_lora_inputs` reads it."""
    found = (LAYER_NODE.fullmatch(node.name or "") for node in graph)
    kinds = {named[2] for named in found if named is not None}
    return OnnxArchitecture("", {kind: (kind.replace("/", "."),) for kind in sorted(kinds)}, {})


def _turned(graph: Any, weight: Any, name: str) -> Any:
    """A weight (O, I) as a constant (I, O)."""
    import onnx_ir as ir

    if name not in graph.initializers:
        value = ir.Value(name=name, type=weight.type)
        value.const_value = ir.tensor(np.ascontiguousarray(weight.const_value.numpy().T), name=name)
        value.shape = value.const_value.shape
        graph.register_initializer(value)
    return graph.initializers[name]
