"""Which module of a Hugging Face model becomes which node of an ONNX graph that onnxruntime-genai's builder makes.

The builder names its nodes alike for every architecture (`/model/layers.3/mlp/gate_proj/MatMul`), packs the query, key
and value projections into one matrix, and names norms its own way. Source: onnxruntime-genai 0.18, models/builders.
A model's graph is then the truth: what it packs is read from it, and written to `adapter_inputs.json` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgealign.errors import InputError

# A linear layer's node: its layer, and the builder's name for what it is.
LAYER_NODE = re.compile(r"/model/layers\.(\d+)/(\w+/\w+)/MatMul(?:NBits)?(?:_Q\d\w*)?")
# The builder's part of a node's name -> the modules of a layer whose weights it holds, in this order.
_ATTENTION = {
    "attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn/q_proj": ("self_attn.q_proj",),
    "attn/k_proj": ("self_attn.k_proj",),
    "attn/v_proj": ("self_attn.v_proj",),
}
_LLAMA = {
    **_ATTENTION,
    "attn/o_proj": ("self_attn.o_proj",),
    "mlp/gate_proj": ("mlp.gate_proj",),
    "mlp/up_proj": ("mlp.up_proj",),
    "mlp/down_proj": ("mlp.down_proj",),
}
_LFM2 = {
    **_ATTENTION,
    "attn/o_proj": ("self_attn.out_proj",),
    "conv/in_proj": ("conv.in_proj",),
    "conv/out_proj": ("conv.out_proj",),
    "mlp/gate_proj": ("feed_forward.w1",),
    "mlp/up_proj": ("feed_forward.w3",),
    "mlp/down_proj": ("feed_forward.w2",),
}
# The builder's tensor inside a layer -> the model's.
_LLAMA_KEPT = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "pre_feedforward_layernorm.weight": "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.weight": "post_feedforward_layernorm.weight",
    "attn.q_norm.layernorm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.layernorm.weight": "self_attn.k_norm.weight",
}
_LFM2_KEPT = {
    "operator_layernorm.weight": "operator_norm.weight",
    "ffn_layernorm.weight": "ffn_norm.weight",
    "attn.q_norm.layernorm.weight": "self_attn.q_layernorm.weight",
    "attn.k_norm.layernorm.weight": "self_attn.k_layernorm.weight",
    "conv.conv.weight": "conv.conv.weight",
}


@dataclass(frozen=True)
class OnnxArchitecture:
    """One architecture: `linear` names the matrices, `kept` the tensors left in floats, `final_norm` the last norm.

    `plus_one`: its norms are stored as weight - 1 in the model, and as weight in the graph.
    """

    model_type: str
    linear: Mapping[str, tuple[str, ...]]
    kept: Mapping[str, str]
    final_norm: str = "model.norm.weight"
    plus_one: bool = False


ARCHITECTURES: dict[str, OnnxArchitecture] = {
    table.model_type: table
    for table in (
        OnnxArchitecture("lfm2", _LFM2, _LFM2_KEPT, "model.embedding_norm.weight"),
        OnnxArchitecture("lfm2_moe", _LFM2, _LFM2_KEPT, "model.embedding_norm.weight"),
        OnnxArchitecture("llama", _LLAMA, _LLAMA_KEPT),
        OnnxArchitecture("qwen3", _LLAMA, _LLAMA_KEPT),
        OnnxArchitecture("gemma3_text", _LLAMA, _LLAMA_KEPT, plus_one=True),
    )
}


def architecture(model_type: str) -> OnnxArchitecture:
    """The table of a model type.

    Raises:
        InputError: none is known; the known ones are listed.
    """
    if model_type not in ARCHITECTURES:
        raise InputError(
            model_type or "this model", "has no ONNX table here", f"exportable are: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]
