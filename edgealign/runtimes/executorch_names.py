"""Which module of a Hugging Face model becomes which module of ExecuTorch's own definition of it.

The definition is one `Transformer` for many architectures (`examples/models/llama` in the executorch wheel); LFM2's
short convolution comes from `examples/models/lfm2`, where the input projection is cut into three. `export` builds that
module and fills it from this table; parity reads the stored weights back through it. Source: executorch 1.5.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgealign.errors import InputError

FORWARD, ADAPTED = "forward", "adapted"  # the methods of a program: without a user, and with one
MODEL_FILE = "model.pte"

# A module of a layer -> the modules that hold its rows, in this order.
_ATTENTION = {
    "self_attn.q_proj": ("attention.wq",),
    "self_attn.k_proj": ("attention.wk",),
    "self_attn.v_proj": ("attention.wv",),
}
_LFM2 = {
    "operator_norm": ("attention_norm",),
    **_ATTENTION,
    "self_attn.out_proj": ("attention.wo",),
    "self_attn.q_layernorm": ("attention.q_norm_fn",),
    "self_attn.k_layernorm": ("attention.k_norm_fn",),
    "conv.in_proj": ("conv.B_proj", "conv.C_proj", "conv.x_proj"),
    "conv.conv": ("conv.conv",),
    "conv.out_proj": ("conv.out_proj",),
    "ffn_norm": ("ffn_norm",),
    "feed_forward.w1": ("feed_forward.w1",),
    "feed_forward.w3": ("feed_forward.w3",),
    "feed_forward.w2": ("feed_forward.w2",),
}
_LLAMA = {
    "input_layernorm": ("attention_norm",),
    **_ATTENTION,
    "self_attn.o_proj": ("attention.wo",),
    "post_attention_layernorm": ("ffn_norm",),
    "mlp.gate_proj": ("feed_forward.w1",),
    "mlp.up_proj": ("feed_forward.w3",),
    "mlp.down_proj": ("feed_forward.w2",),
}
_QWEN3 = {
    **_LLAMA,
    "self_attn.q_norm": ("attention.q_norm_fn",),
    "self_attn.k_norm": ("attention.k_norm_fn",),
}


@dataclass(frozen=True)
class ExecutorchArchitecture:
    """One architecture: `layer` maps a layer's modules; `qk_norm`: its attention norms queries and keys."""

    model_type: str
    layer: Mapping[str, tuple[str, ...]]
    final_norm: str = "model.norm"
    qk_norm: bool = False

    def targets(self, name: str) -> tuple[str, ...]:
        """Where a tensor of the model goes; more than one place takes its rows in equal parts. Empty: unknown."""
        outside = {
            "model.embed_tokens.weight": ("tok_embeddings.weight",),
            "lm_head.weight": ("output.weight",),
            f"{self.final_norm}.weight": ("norm.weight",),
        }
        if name in outside:
            return outside[name]
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        if found is None:
            return ()
        return tuple(f"layers.{found[1]}.{place}.weight" for place in self.layer.get(found[2], ()))


ARCHITECTURES: dict[str, ExecutorchArchitecture] = {
    table.model_type: table
    for table in (
        ExecutorchArchitecture("lfm2", _LFM2, "model.embedding_norm", qk_norm=True),
        ExecutorchArchitecture("llama", _LLAMA),
        ExecutorchArchitecture("qwen3", _QWEN3, qk_norm=True),
    )
}


def architecture(model_type: str) -> ExecutorchArchitecture:
    """The table of a model type.

    Raises:
        InputError: none is known; the known ones are listed.
    """
    if model_type not in ARCHITECTURES:
        raise InputError(
            model_type or "this model", "has no ExecuTorch table here", f"exportable are: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]
