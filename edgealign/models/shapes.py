"""Named model shapes: a name -> a transformers configuration.

The LFM2 rows follow the LFM2 report (arXiv 2511.23404, architecture table) and the published configurations;
the others follow the published configurations of the models they are named after. Only shapes are here: the
weights that `edgealign init` puts in them are random. `parameter_count` builds the modules on torch's meta
device, so it needs no memory, whatever the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgealign.errors import RecipeError
from edgealign.registry import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# <|pad|>, <|startoftext|>, <|im_end|>. Lfm2Config's own default for eos is 2, which is not the end of a turn.
PAD_ID, BOS_ID, EOS_ID = 0, 1, 7


@dataclass(frozen=True)
class Shape:
    """One named shape. `facts` are the keyword arguments of the transformers configuration class."""

    name: str
    model_type: str
    summary: str
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return int(str(self.facts["vocab_size"]))

    def config(self, *, vocab_size: int | None = None, context: int | None = None) -> PreTrainedConfig:
        """Build the transformers configuration, with the special ids that our tokenizer uses."""
        from transformers import AutoConfig

        facts = dict(self.facts)
        if vocab_size is not None:
            facts["vocab_size"] = vocab_size
        if context is not None:
            facts["max_position_embeddings"] = context
        ids = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
        return AutoConfig.for_model(self.model_type, **facts, **ids)


def shape(name: str) -> Shape:
    """Look a shape up by name; an unknown name suggests the nearest one."""
    if name not in SHAPES:
        raise RecipeError(
            name, f"is not a known shape{suggest(name, SHAPES)}", f"choose one of: {', '.join(SHAPES)}"
        )
    return SHAPES[name]


def parameter_count(name: str, *, vocab_size: int | None = None) -> int:
    """Count the parameters of a shape, tied weights once, without allocating them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(name).config(vocab_size=vocab_size))
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())  # parameters() yields a shared tensor once


def _hybrid(layers: int, attention: tuple[int, ...]) -> list[str]:
    return ["full_attention" if i in attention else "conv" for i in range(layers)]


def _rope(theta: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta}


def _lfm2(name: str, summary: str, *, d: int, ff: int, heads: int, kv: int, layers: int, attention: tuple[int, ...],
          vocab: int = 65_536, context: int = 128_000) -> Shape:
    """A dense LFM2 row. `ff` is the effective width: the 2/3 adjustment of published configs is applied already."""
    return Shape(name, "lfm2", summary, {
        "vocab_size": vocab, "hidden_size": d, "intermediate_size": ff, "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "layer_types": _hybrid(layers, attention), "max_position_embeddings": context, "conv_L_cache": 3,
        "norm_eps": 1e-5, "rope_parameters": _rope(1_000_000.0), "tie_word_embeddings": True,
    })


def _lfm2_moe(name: str, summary: str, *, d: int, ff: int, expert_ff: int, heads: int, kv: int, layers: int,
              attention: tuple[int, ...], experts: int, used: int, dense: int, vocab: int, context: int) -> Shape:
    return Shape(name, "lfm2_moe", summary, {
        "vocab_size": vocab, "hidden_size": d, "intermediate_size": ff, "moe_intermediate_size": expert_ff,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "num_experts": experts, "num_experts_per_tok": used, "num_dense_layers": dense, "use_expert_bias": True,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "layer_types": _hybrid(layers, attention),
        "max_position_embeddings": context, "conv_L_cache": 3, "norm_eps": 1e-5,
        "rope_parameters": _rope(1_000_000.0), "tie_word_embeddings": True,
    })


def _lfm3(name: str, summary: str, *, d: int, ff: int, heads: int, kv: int, head_dim: int, kinds: tuple[str, ...],
          window: int, vocab: int, context: int) -> Shape:
    """An LFM3 row: convolutions of width 7, sliding-window and full attention, a gate per head, norms after blocks."""
    return Shape(name, "lfm3", summary, {
        "vocab_size": vocab, "hidden_size": d, "intermediate_size": ff, "num_hidden_layers": len(kinds),
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "layer_types": list(kinds),
        "sliding_window": window, "max_position_embeddings": context, "conv_L_cache": 7, "use_sandwich_norm": True,
        "use_attention_gate": True, "norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {  # the published configuration's: half of each head turns in the layers that see everything
            "sliding_attention": _rope(10_000.0),
            "full_attention": {
                "rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.5,
            },
        },
    })


def _plain(name: str, model_type: str, summary: str, *, d: int, ff: int, heads: int, kv: int, layers: int,
           head_dim: int, vocab: int, context: int, rope: Mapping[str, object], eps: float, **extra: object) -> Shape:
    """A pure-attention row, for latency comparisons."""
    return Shape(name, model_type, summary, {
        "vocab_size": vocab, "hidden_size": d, "intermediate_size": ff, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim,
        "max_position_embeddings": context, "rms_norm_eps": eps, "rope_parameters": dict(rope),
        "tie_word_embeddings": True, **extra,
    })


_SIXTEEN = (2, 5, 8, 10, 12, 14)
_LLAMA3_ROPE: dict[str, object] = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA3_ROPE: dict[str, object] = {  # two rotary tables; every sixth layer is global
    "full_attention": _rope(1_000_000.0), "sliding_attention": _rope(10_000.0),
}
_GEMMA3_LAYERS = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(26)]

_ROWS = (
    # 256-wide feed-forward rows: the smallest that take a K-quant without a fallback type.
    _lfm2("tiny", "6 layers, 1.2 M parameters: tests and the quickstart", d=128, ff=256, heads=4, kv=2, layers=6,
          attention=(2, 4), vocab=2048, context=2048),
    _lfm2("small", "8 layers, 7 M parameters: CPU experiments of some minutes", d=256, ff=768, heads=8, kv=4,
          layers=8, attention=(2, 4, 6), vocab=4096, context=4096),
    _lfm2("starter", "6 layers, 6 M parameters: the model that comes with edgealign", d=256, ff=768, heads=4, kv=2,
          layers=6, attention=(2, 4), vocab=4096, context=1024),
    _lfm2("starter-teacher", "7 layers, 15 M parameters: a teacher for the starter", d=384, ff=1152, heads=6, kv=2,
          layers=7, attention=(2, 4), vocab=4096, context=1024),
    _lfm2_moe("tiny-moe", "4 layers, 4 experts, 2 used: tests of the mixture path", d=128, ff=256, expert_ff=128,
              heads=4, kv=2, layers=4, attention=(2,), experts=4, used=2, dense=1, vocab=2048, context=2048),
    # A window below the lengths that the parity gate tries, so that it is seen to slide.
    _lfm3("tiny-lfm3", "4 layers, 0.9 M parameters: tests of an architecture that no builder knows", d=128, ff=256,
          heads=4, kv=2, head_dim=32, kinds=("conv", "sliding_attention", "full_attention", "conv"), window=32,
          vocab=2048, context=2048),
    _lfm2("lfm2-350m", "LFM2-350M", d=1024, ff=4608, heads=16, kv=8, layers=16, attention=_SIXTEEN),
    _lfm2("lfm2-700m", "LFM2-700M", d=1536, ff=6912, heads=24, kv=8, layers=16, attention=_SIXTEEN),
    _lfm2("lfm2-1.2b", "LFM2-1.2B", d=2048, ff=8192, heads=32, kv=8, layers=16, attention=_SIXTEEN),
    _lfm2("lfm2-2.6b", "LFM2-2.6B", d=2048, ff=10752, heads=32, kv=8, layers=30,
          attention=(2, 5, 9, 13, 17, 21, 24, 27)),
    _lfm2_moe("lfm2-8b-a1b", "LFM2-8B-A1B: 32 experts, 4 used", d=2048, ff=7168, expert_ff=1792, heads=32, kv=8,
              layers=24, attention=(2, 6, 10, 14, 18, 21), experts=32, used=4, dense=2, vocab=65_536,
              context=128_000),
    _plain("starter-llama", "llama", "6 layers, 6 M parameters: the starter's size, attention in every layer", d=256,
           ff=832, heads=4, kv=2, layers=6, head_dim=64, vocab=4096, context=1024, rope=_rope(1_000_000.0), eps=1e-5),
    _plain("qwen3-0.6b", "qwen3", "Qwen3-0.6B", d=1024, ff=3072, heads=16, kv=8, layers=28, head_dim=128,
           vocab=151_936, context=40_960, rope=_rope(1_000_000.0), eps=1e-6),
    _plain("qwen3-1.7b", "qwen3", "Qwen3-1.7B", d=2048, ff=6144, heads=16, kv=8, layers=28, head_dim=128,
           vocab=151_936, context=40_960, rope=_rope(1_000_000.0), eps=1e-6),
    _plain("smollm2-135m", "llama", "SmolLM2-135M", d=576, ff=1536, heads=9, kv=3, layers=30, head_dim=64,
           vocab=49_152, context=8192, rope=_rope(100_000.0), eps=1e-5),
    _plain("smollm2-360m", "llama", "SmolLM2-360M", d=960, ff=2560, heads=15, kv=5, layers=32, head_dim=64,
           vocab=49_152, context=8192, rope=_rope(100_000.0), eps=1e-5),
    _plain("llama-3.2-1b", "llama", "Llama-3.2-1B", d=2048, ff=8192, heads=32, kv=8, layers=16, head_dim=64,
           vocab=128_256, context=131_072, rope=_LLAMA3_ROPE, eps=1e-5),
    _plain("gemma-3-1b", "gemma3_text", "Gemma-3-1B (text)", d=1152, ff=6912, heads=4, kv=1, layers=26,
           head_dim=256, vocab=262_144, context=32_768, rope=_GEMMA3_ROPE, eps=1e-6, sliding_window=512,
           query_pre_attn_scalar=256, hidden_activation="gelu_pytorch_tanh", layer_types=_GEMMA3_LAYERS),
)

SHAPES: dict[str, Shape] = {row.name: row for row in _ROWS}
