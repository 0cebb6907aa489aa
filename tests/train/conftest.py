"""Tiny models with random weights, noisy enough that every part of them matters."""

from __future__ import annotations

import gc

import pytest
import torch

from edgealign.train.layout import pair
from edgealign.train.precision import Precision
from edgealign.train.scoring import Passes


@pytest.fixture(autouse=True, scope="session")
def _frozen_imports():
    """The trainer collects garbage whenever it starts; without the imported libraries that takes no time."""
    import transformers.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEALIGN_CACHE", str(tmp_path / "cache"))


def make_lfm2(vocab=96, layers=("conv", "full_attention", "conv", "full_attention"), kernel=3, bias=False, seed=0):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(seed)
    config = Lfm2Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=len(layers), num_attention_heads=4,
        num_key_value_heads=2, layer_types=list(layers), conv_L_cache=kernel, conv_bias=bias,
        block_auto_adjust_ff_dim=False, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    return shake(Lfm2ForCausalLM(config))


def make_moe(seed=0):
    from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

    torch.manual_seed(seed)
    config = Lfm2MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv", "full_attention"],
        num_dense_layers=1, num_experts=4, num_experts_per_tok=2, max_position_embeddings=512, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )
    return shake(Lfm2MoeForCausalLM(config))


def make_lfm3(layers=("conv", "sliding_attention", "full_attention", "conv"), seed=0, window=4, **facts):
    """As published: convolutions of width 7, gated heads, norms after each block; the window is below the rows."""
    from transformers import Lfm3Config, Lfm3ForCausalLM

    torch.manual_seed(seed)
    config = Lfm3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=len(layers), num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=list(layers), sliding_window=window,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **facts,
    )
    return shake(Lfm3ForCausalLM(config))


def make_llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )
    return shake(LlamaForCausalLM(config))


def make_qwen3(seed=0):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )
    return shake(Qwen3ForCausalLM(config))


def make_gemma3(seed=0):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return shake(Gemma3ForCausalLM(config))


def shake(model):
    """Weights ten times the usual size, so that a wrong mask or tap moves the logits far."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


MAKERS = {
    "lfm2": make_lfm2, "lfm2_moe": make_moe, "lfm3": make_lfm3, "llama": make_llama, "qwen3": make_qwen3,
    "gemma3": make_gemma3,
}


@pytest.fixture
def make_model():
    """`make_model("lfm2", kernel=4)`: a tiny model of an architecture, float32, evaluation mode."""
    return lambda kind="lfm2", **options: MAKERS[kind](**options)


@pytest.fixture
def lfm2():
    return make_lfm2()


@pytest.fixture
def tokens():
    """`tokens(5)`: that many token ids, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return lambda n: tuple(torch.randint(3, 96, (n,), generator=generator).tolist())


def passes_of(model, tokens_per_pass=64):
    """In 32 bits."""
    return Passes.of(model, Precision("float32", "float32", False), tokens_per_pass=tokens_per_pass)


@pytest.fixture
def trees(tokens):
    """Six pairs: prompts and answers of three to five, two to seven and four to nine tokens."""
    texts = [tokens(40)[3 * i :] for i in range(6)]
    return [pair(text[: 3 + i % 3], text[5 : 7 + i], text[6 : 15 - i]) for i, text in enumerate(texts)]


@pytest.fixture
def plain():
    """Log-probabilities of a completion by transformers' own forward pass, one sequence at a time."""

    def score(model, context, completion):
        ids = torch.tensor([[*context, *completion]])
        logp = model(input_ids=ids).logits[0].float().log_softmax(-1)
        n = len(context)
        return logp[n - 1 : -1].gather(1, ids[0, n:, None]).squeeze(1)

    return score
