"""Build the ONNX graph of a model with onnxruntime-genai, tie its head, and give it inputs for users' LoRAs.

The builder reads a model directory and writes `model.onnx`, its weights and `genai_config.json`. Then the graph is
edited, and nothing but the graph: a quantised head and its embedding become one tensor, and beside every linear layer
stands `(x A) B` with A and B as inputs of rank zero unless somebody gives more. Rank zero adds zeros, so that without
an adapter the logits are those of the builder's graph.

Shape legend: I in features, O out features, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.errors import InputError
from edgealign.models.load import check_safetensors, read_config
from edgealign.runtimes.lora_inputs import INPUTS_FILE, LoraInput, Part, write_inputs
from edgealign.runtimes.onnx_names import LAYER_NODE, OnnxArchitecture, architecture

MODEL_FILE, DATA_FILE, GENAI_CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
MODEL_DIGEST = "edgealign.model_digest"
# The builder writes a row of sines and cosines for every position; LFM2 states 128,000 and was published for 32,768.
LONGEST_CONTEXT = 32_768
# onnxruntime-genai's options beyond the defaults; the precision is the name's first part. Both kinds of int4 leave the
# head 8 bits. int4 rounds to the grid of llama.cpp's Q4_0, on which `sft --qat q4_0` trains: the starter loses nothing
# (0.001 nat, as in int8). int4_k rounds with more care, off that grid (0.028 nat), and takes about a second per million
# weights. The builder cannot tie an 8-bit head to 4-bit layers in the first way; `tie_head` does.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {},
    "int8": {"moe_quant_type": "int8"},
    "int4": {"matmul_mixed_precision": "last_matmul:int8", "shared_embeddings": "false"},
    "int4_k": {"algo_config": "k_quant_last"},
}


def write_model(
    model: Path, out: Path, *, quant: str, digest: str, context: int | None = None
) -> tuple[LoraInput, ...]:
    """Write `model.onnx`, its data, `genai_config.json` and `adapter_inputs.json`; returns the adaptable matrices.

    Args:
        quant: a name in `OPTIONS`.
        digest: the model's, written into the graph.
        context: tokens that the graph has positions for; None takes the model's own, at most `LONGEST_CONTEXT`.

    Raises:
        InputError: the architecture is unknown here or to the builder.
    """
    import onnx_ir as ir

    config = read_config(model)
    table = architecture(str(config.get("model_type", "")))
    scratch = out / ".built"
    build(model, scratch, quant=quant, context=context)
    built = ir.load(scratch / MODEL_FILE)
    tie_head(built.graph)
    inputs = add_lora_inputs(built.graph, table, _shapes(model))
    built.metadata_props[MODEL_DIGEST] = digest
    ir.save(built, out / MODEL_FILE, external_data=DATA_FILE)
    os.replace(scratch / GENAI_CONFIG, out / GENAI_CONFIG)
    write_inputs(out / INPUTS_FILE, inputs)
    remove(scratch)
    return inputs


def build(model: Path, out: Path, *, quant: str, context: int | None) -> None:
    """Run onnxruntime-genai's builder on a view of the model whose config states the wanted context."""
    config = read_config(model)
    length = context or min(int(config["max_position_embeddings"]), LONGEST_CONTEXT)
    view = out.with_name(".view")
    view.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.name != "config.json":
            (view / file.name).symlink_to(file.resolve())
    (view / "config.json").write_text(json.dumps({**config, "max_position_embeddings": length}), encoding="utf-8")
    with quiet():
        from onnxruntime_genai.models.builder import check_extra_options, create_model

        options: dict[str, Any] = {"hf_token": "false", "windowed_kv_cache": "false", **OPTIONS[quant]}
        cache = str(out.with_name(".cache"))
        try:
            precision = quant.partition("_")[0]
            check_extra_options("", str(view), str(out), precision, "cpu", cache, options)
            _flatten_rotary(options["hf_details"]["hf_config"])
            create_model("", str(view), str(out), precision, "cpu", cache, **options)
        except Exception as error:  # of any kind: the builder reads a model's config field by field
            reason = f"cannot be built as {quant} by onnxruntime-genai ({type(error).__name__}: {error})"
            raise InputError(model, reason, "export it with --target gguf") from error
    remove(view)
    remove(Path(cache))


def _flatten_rotary(config: Any) -> None:
    """transformers 5 keeps Gemma 3's two rotary bases in one nested table; the builder asks for two plain fields."""
    rotary = getattr(config, "rope_parameters", None) or {}
    if "sliding_attention" in rotary:
        config.rope_local_base_freq = rotary["sliding_attention"]["rope_theta"]
        config.rope_theta = rotary["full_attention"]["rope_theta"]
        config.rope_parameters = dict(rotary["full_attention"])


def add_lora_inputs(
    graph: Any, table: OnnxArchitecture, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[LoraInput, ...]:
    """Put `+ (x A) B` behind every linear layer of an onnx_ir graph, A and B inputs with empty defaults.

    Args:
        shapes: the model's tensors, (O, I) for a matrix: how wide each packed module is.
    """
    found = []
    for node in list(graph):
        named = LAYER_NODE.fullmatch(node.name or "")
        if named is None or named[2] not in table.linear:
            continue
        layer = f"model.layers.{named[1]}."
        modules = [layer + module for module in table.linear[named[2]]]
        parts = tuple(Part(module, int(shapes[f"{module}.weight"][0])) for module in modules)
        columns = int(shapes[f"{modules[0]}.weight"][1])
        entry = LoraInput(layer + named[2].replace("/", "."), columns, parts)
        _add_lora(graph, node, entry)
        found.append(entry)
    return tuple(found)


def _add_lora(graph: Any, node: Any, entry: LoraInput) -> None:
    """y = x W becomes y = x W + (x A) B. Each pair's rank has its own name, or one buffer would serve all sizes."""
    import onnx_ir as ir

    out = node.outputs[0]
    rank = f"{entry.name}.rank"
    a = _empty_input(graph, entry.a, (entry.columns, 0), (entry.columns, rank), out.dtype)
    b = _empty_input(graph, entry.b, (0, entry.out), (rank, entry.out), out.dtype)
    path = f"/{entry.name.replace('.', '/')}/lora"
    down = ir.node("MatMul", [node.inputs[0], a], name=f"{path}/MatMul_A")
    up = ir.node("MatMul", [down.outputs[0], b], name=f"{path}/MatMul_B")
    total = ir.node("Add", [out, up.outputs[0]], name=f"{path}/Add")
    name, total.outputs[0].type, total.outputs[0].shape = out.name, out.type, out.shape
    ir.convenience.replace_all_uses_with(out, total.outputs[0])
    total.replace_input_with(0, out)
    out.name, total.outputs[0].name = f"{path}/base", name
    down.outputs[0].name, up.outputs[0].name = f"{path}/down", f"{path}/up"
    graph.insert_after(node, [down, up, total])


def _empty_input(graph: Any, name: str, empty: tuple[int, int], shape: tuple[Any, Any], dtype: Any) -> Any:
    import onnx_ir as ir

    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = ir.tensor(np.zeros(empty, dtype=dtype.numpy()), name=name)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def tie_head(graph: Any) -> None:
    """Where the builder left the embedding in floats beside a quantised head of the same weights, look it up there."""
    import onnx_ir as ir

    nodes = {node.name: node for node in graph}
    lookup = nodes.get("/model/embed_tokens/Gather")
    head = next((node for name, node in nodes.items() if name.startswith("/lm_head/MatMul")), None)
    if lookup is None or head is None or head.op_type != "MatMulNBits":
        return
    embedding = lookup.inputs[0]
    own = embedding.const_value
    if own is None:
        return
    vocab, width = own.shape.numpy()
    bits, block = (head.attributes[name].as_int() for name in ("bits", "block_size"))
    if not _same_weights(head, own.numpy()):
        return  # the model's head is not tied
    packed = head.inputs[1]
    shape = ir.Value(name="/model/embed_tokens/quantised_shape")
    shape.const_value = ir.tensor(np.array([vocab, width * bits // 8], dtype=np.int64), name=shape.name)
    graph.register_initializer(shape)
    flat = ir.node("Reshape", [packed, shape], name="/model/embed_tokens/Reshape")
    flat.outputs[0].name = "/model/embed_tokens/Reshape/output_0"
    operands = [flat.outputs[0], lookup.inputs[1], head.inputs[2], *head.inputs[3:4]]
    quantised = ir.node(
        "GatherBlockQuantized", operands, domain="com.microsoft", name="/model/embed_tokens/GatherBlockQuantized",
        attributes={"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
    )
    out = lookup.outputs[0]
    quantised.outputs[0].type, quantised.outputs[0].shape = out.type, out.shape
    graph.insert_before(lookup, [flat, quantised])
    name = out.name
    ir.convenience.replace_all_uses_with(out, quantised.outputs[0])
    graph.remove(lookup, safe=True)
    quantised.outputs[0].name = name
    graph.initializers.pop(embedding.name)


def _same_weights(head: Any, embedding: Any) -> bool:
    """Is the quantised head (V, I) the rounded embedding (V, I)? Another matrix is off by more than its own size."""
    from edgealign.runtimes.onnx_weights import matrix

    stored = matrix(head)
    return stored.shape == embedding.shape and float(np.linalg.norm(stored - embedding)) < 0.5 * float(
        np.linalg.norm(embedding)
    )


def _shapes(model: Path) -> dict[str, tuple[int, ...]]:
    headers = [check_safetensors(file) for file in sorted(model.glob("*.safetensors"))]
    return {name: tuple(entry["shape"]) for header in headers for name, entry in header.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The builder prints every tensor, and its quantiser logs every node; standard output is ours."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    path = list(sys.path)
    try:
        with (
            open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")  # its rounding divides by zero where a block is constant, and mends it
            yield
    finally:
        logging.disable(level)
        sys.path[:] = path


def remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
