"""The export programs are scripts: put their folder on the path, and give the tests small models to convert."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "export"))

TINY_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
COMMON = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 7,
}
SMALL: dict[str, tuple[str, dict[str, object]]] = {
    "lfm2": ("lfm2", {
        **{key: value for key, value in COMMON.items() if key != "head_dim"}, "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    # As published configs are: the width in the file is not the width of the weights.
    "lfm2-adjusted": ("lfm2", {
        **{key: value for key, value in COMMON.items() if key != "head_dim"}, "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"], "intermediate_size": 384, "block_auto_adjust_ff_dim": True}),
    "lfm2-moe": ("lfm2_moe", {
        **{key: value for key, value in COMMON.items() if key != "head_dim"}, "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    # No builder knows this one. The window is shorter than the prompts that the gate tries.
    "lfm3": ("lfm3", {
        **COMMON, "num_hidden_layers": 4, "sliding_window": 16,
        "layer_types": ["conv", "sliding_attention", "full_attention", "conv"]}),
    # One layer of each kind, because ExecuTorch's compiler takes its time for each.
    "lfm3-short": ("lfm3", {
        **COMMON, "intermediate_size": 96, "num_hidden_layers": 3, "sliding_window": 16,
        "layer_types": ["conv", "sliding_attention", "full_attention"]}),
    # More of that kind: a window in every layer and an untied head; biases and layers without rotary angles.
    "mistral": ("mistral", {
        **COMMON, "num_hidden_layers": 2, "sliding_window": 16, "tie_word_embeddings": False,
        "rope_parameters": TINY_ROPE}),
    "smollm3": ("smollm3", {
        **COMMON, "num_hidden_layers": 4, "tie_word_embeddings": True, "attention_bias": True,
        "no_rope_layer_interval": 2, "rope_parameters": TINY_ROPE}),
    "gpt2": ("gpt2", {
        "vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1,
        "eos_token_id": 7}),
    "llama": ("llama", {**COMMON, "num_hidden_layers": 2, "rope_parameters": TINY_ROPE, "tie_word_embeddings": True}),
    "llama-untied": ("llama", {**COMMON, "num_hidden_layers": 2, "rope_parameters": LLAMA3_ROPE,
                               "tie_word_embeddings": False}),
    # transformers' GGUF reader knows no other head width for Qwen3 than its default.
    "qwen3": ("qwen3", {**COMMON, "num_hidden_layers": 2, "head_dim": 128, "rope_parameters": TINY_ROPE,
                        "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {
        **COMMON, "num_hidden_layers": 7, "sliding_window": 32, "query_pre_attn_scalar": 16,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
                            "sliding_attention": TINY_ROPE},
        "layer_types": ["full_attention" if (n + 1) % 6 == 0 else "sliding_attention" for n in range(7)]}),
}  # fmt: skip


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Factory of published models of every exportable architecture, by name of `SMALL`; each is made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            from transformers import AutoConfig

            from edgealign.artifact import publish
            from edgealign.models.create import write_model
            from edgealign.models.tokenizer import train_tokenizer

            kind, facts = SMALL[name]
            out = tmp_path_factory.mktemp("small") / name
            tokenizer = train_tokenizer([], vocab_size=400, context=256, max_bytes=100_000)
            with publish(out, kind="model", format="huggingface", stage="test", recipe={"shape": name}) as draft:
                config = AutoConfig.for_model(kind, **facts)
                write_model(draft.dir, config, tokenizer, seed=2, dtype="float32", norm_noise=0.2)
            made[name] = out
        return made[name]

    return make
