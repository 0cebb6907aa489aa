"""Which tensor of a Hugging Face model becomes which GGUF tensor, and what happens to it on the way.

One table per architecture, read by the model exporter and by the adapter writer. `{n}` is the layer, `{e}` the expert.
Sources: llama.cpp's converters and `gguf` 0.19's tensor lists; a rule is applied where the table names one:

    conv        (D, 1, K) -> (D, K), kept in float32
    permute_q   Llama's rotary layout: rows of each query head are interleaved (permute_k: of each key head)
    plus_one    Gemma's norms store weight - 1
    expert      one of E matrices that are stacked to (E, out, in)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgealign.errors import InputError


@dataclass(frozen=True)
class Row:
    """`hf` and `gguf` are full tensor names; `linear` marks a matrix that a LoRA can sit on."""

    hf: str
    gguf: str
    rule: str = ""
    linear: bool = False


@dataclass(frozen=True)
class Architecture:
    """`model_type` is transformers' name, `name` llama.cpp's.

    `exact_tolerance` is set where llama.cpp itself computes a 32-bit file with less: the largest logit difference.
    """

    model_type: str
    name: str
    rows: tuple[Row, ...]
    exact_tolerance: float | None = None


def architecture(model_type: str) -> Architecture:
    """The table of a model type.

    Raises:
        InputError: none is known; what llama.cpp itself lacks is said, else the known ones are listed.
    """
    if model_type in NOT_IN_LLAMA_CPP:
        reason = f"llama.cpp {LLAMA_CPP_LOOKED_AT} has no graph for it: it lacks {NOT_IN_LLAMA_CPP[model_type]}"
        where = f"look for {model_type} in llama.cpp's src/llama-arch.cpp and src/models/; until then: --target onnx"
        raise InputError(model_type, reason, where)
    if model_type not in ARCHITECTURES:
        raise InputError(
            model_type or "this model", "has no GGUF tensor table here", f"exportable are: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def expand(table: Architecture, n_layers: int, n_experts: int = 0) -> Iterator[Row]:
    """Every row with its layer and expert numbers filled in; a row that a layer does not have is the caller's."""
    for row in table.rows:
        layers = range(n_layers) if "{n}" in row.hf else (0,)
        for n in layers:
            experts = range(n_experts) if "{e}" in row.hf else (0,)
            for e in experts:
                yield Row(row.hf.format(n=n, e=e), row.gguf.format(n=n), row.rule, row.linear)


def adapter_row(table: Architecture, module: str) -> Row | None:
    """The row of a LoRA's module name (`model.layers.3.conv.in_proj`); None where no LoRA can sit."""
    found = re.search(r"\.layers\.(\d+)\.", module)
    if found is None:
        return None
    n = int(found.group(1))
    for row in table.rows:
        if row.linear and row.hf.format(n=n, e=0) == f"{module}.weight":
            return Row(row.hf.format(n=n, e=0), row.gguf.format(n=n), row.rule, True)
    return None


def permute(weight: Any, heads: int) -> Any:
    """Llama's rotary layout: within each head, half-split rows become interleaved pairs. (H*d, x) -> (H*d, x)."""
    out_features = weight.shape[0]
    rest = tuple(weight.shape[1:])
    split = weight.reshape(heads, 2, out_features // heads // 2, *rest)
    return split.swapaxes(1, 2).reshape(out_features, *rest)


def rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base, wherever this version of the configuration keeps it."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _norm(hf: str, gguf: str, rule: str = "") -> Row:
    return Row(f"model.layers.{{n}}.{hf}.weight", f"blk.{{n}}.{gguf}.weight", rule)


def _linear(hf: str, gguf: str, rule: str = "") -> Row:
    return Row(f"model.layers.{{n}}.{hf}.weight", f"blk.{{n}}.{gguf}.weight", rule, linear=True)


_EMBEDDING = Row("model.embed_tokens.weight", "token_embd.weight")
_HEAD = Row("lm_head.weight", "output.weight")  # absent when tied

_LFM2_MIXERS = (
    _EMBEDDING,
    _HEAD,
    Row("model.embedding_norm.weight", "token_embd_norm.weight"),  # the final norm: only its name is odd
    _norm("operator_norm", "attn_norm"),
    _norm("ffn_norm", "ffn_norm"),
    _linear("self_attn.q_proj", "attn_q"),
    _linear("self_attn.k_proj", "attn_k"),
    _linear("self_attn.v_proj", "attn_v"),
    _linear("self_attn.out_proj", "attn_output"),
    _norm("self_attn.q_layernorm", "attn_q_norm"),
    _norm("self_attn.k_layernorm", "attn_k_norm"),
    _linear("conv.in_proj", "shortconv.in_proj"),
    _linear("conv.out_proj", "shortconv.out_proj"),
    Row("model.layers.{n}.conv.conv.weight", "blk.{n}.shortconv.conv.weight", "conv"),
    _linear("feed_forward.w1", "ffn_gate"),
    _linear("feed_forward.w2", "ffn_down"),
    _linear("feed_forward.w3", "ffn_up"),
)
_LFM2_EXPERTS = (
    Row("model.layers.{n}.feed_forward.gate.weight", "blk.{n}.ffn_gate_inp.weight"),
    Row("model.layers.{n}.feed_forward.expert_bias", "blk.{n}.exp_probs_b.bias"),
    Row("model.layers.{n}.feed_forward.experts.{e}.w1.weight", "blk.{n}.ffn_gate_exps.weight", "expert"),
    Row("model.layers.{n}.feed_forward.experts.{e}.w2.weight", "blk.{n}.ffn_down_exps.weight", "expert"),
    Row("model.layers.{n}.feed_forward.experts.{e}.w3.weight", "blk.{n}.ffn_up_exps.weight", "expert"),
)


def _llama_rows(*, permuted: bool, norm_rule: str = "") -> tuple[Row, ...]:
    return (
        _EMBEDDING,
        _HEAD,
        Row("model.norm.weight", "output_norm.weight", norm_rule),
        _norm("input_layernorm", "attn_norm", norm_rule),
        _linear("self_attn.q_proj", "attn_q", "permute_q" if permuted else ""),
        _linear("self_attn.k_proj", "attn_k", "permute_k" if permuted else ""),
        _linear("self_attn.v_proj", "attn_v"),
        _linear("self_attn.o_proj", "attn_output"),
        _linear("mlp.gate_proj", "ffn_gate"),
        _linear("mlp.down_proj", "ffn_down"),
        _linear("mlp.up_proj", "ffn_up"),
    )


_QK_NORMS = (_norm("self_attn.q_norm", "attn_q_norm"), _norm("self_attn.k_norm", "attn_k_norm"))
_GEMMA3_NORMS = (
    _norm("self_attn.q_norm", "attn_q_norm", "plus_one"),
    _norm("self_attn.k_norm", "attn_k_norm", "plus_one"),
    _norm("post_attention_layernorm", "post_attention_norm", "plus_one"),
    _norm("pre_feedforward_layernorm", "ffn_norm", "plus_one"),
    _norm("post_feedforward_layernorm", "post_ffw_norm", "plus_one"),
)
_FFN_NORM = (_norm("post_attention_layernorm", "ffn_norm"),)

ARCHITECTURES: dict[str, Architecture] = {
    table.model_type: table
    for table in (
        Architecture("lfm2", "lfm2", _LFM2_MIXERS),
        Architecture("lfm2_moe", "lfm2moe", _LFM2_MIXERS + _LFM2_EXPERTS),
        Architecture("llama", "llama", _llama_rows(permuted=True) + _FFN_NORM),
        Architecture("qwen3", "qwen3", _llama_rows(permuted=False) + _FFN_NORM + _QK_NORMS),
        Architecture(
            "gemma3_text", "gemma3", _llama_rows(permuted=False, norm_rule="plus_one") + _GEMMA3_NORMS,
            # Its GELU comes from a table in half precision: 3e-4 on 7 layers, and 3e-7 once torch rounds alike.
            exact_tolerance=2e-3,
        ),
    )
}

# What llama.cpp cannot run however the file is written, looked up in the library that this version of edgealign pins.
LLAMA_CPP_LOOKED_AT = "(llama-cpp-python 0.3.36)"
NOT_IN_LLAMA_CPP: Mapping[str, str] = {
    "lfm3": "short convolutions beside sliding-window attention, a gate for each head and norms after each block",
}
