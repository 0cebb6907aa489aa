"""The converter: every tensor arrives, where it belongs, in every architecture. No llama.cpp here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import InputError
from edgealign.models.load import load_model
from edgealign.runtimes.gguf_header import GgufInfo, LongArray, check_gguf

SmallModel = Callable[[str], Path]
READ_BACK = ("lfm2", "lfm2-adjusted", "llama", "llama-untied", "qwen3", "gemma3")


def convert(model: Path, file: Path, **options: object) -> GgufInfo:
    from gguf_model import write_model

    return write_model(model, file, digest="d" * 64, **options)  # type: ignore[arg-type]


def edited(model: Path, out: Path, **values: object) -> Path:
    shutil.copytree(model, out)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")
    return out


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    from gguf import GGUFReader

    return {tensor.name: np.array(tensor.data).reshape(tensor.shape[::-1]) for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("name", READ_BACK)
def test_transformers_own_reader_returns_the_same_weights(
    name: str, small_model: SmallModel, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = small_model(name)
    convert(model, tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    expected = load_model(model).state_dict()
    assert set(read) == set(expected)
    for key, tensor in expected.items():
        if name == "gemma3" and "norm" in key:  # the reader takes 1 off again, in 32 bits
            torch.testing.assert_close(read[key], tensor, atol=2e-7, rtol=0)
        else:
            assert torch.equal(read[key], tensor), key


def test_the_published_tiny_shape_survives_too(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    convert(tiny_model, tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.tensor([[1, 6, 40, 50, 60, 7]])
    with torch.no_grad():
        assert torch.equal(read(ids).logits, load_model(tiny_model)(ids).logits)


def test_a_mixture_of_experts_is_stacked_in_order(small_model: SmallModel, tmp_path: Path) -> None:
    model = small_model("lfm2-moe")
    info = convert(model, tmp_path / "model.gguf")
    written = tensors_of(tmp_path / "model.gguf")
    state = load_model(model).state_dict()
    block = "model.layers.1.feed_forward"
    gate, up = np.split(state[f"{block}.experts.gate_up_proj"].numpy(), 2, axis=1)
    np.testing.assert_array_equal(written["blk.1.ffn_gate_exps.weight"], gate)
    np.testing.assert_array_equal(written["blk.1.ffn_up_exps.weight"], up)
    np.testing.assert_array_equal(written["blk.1.ffn_down_exps.weight"], state[f"{block}.experts.down_proj"].numpy())
    np.testing.assert_array_equal(written["blk.1.ffn_gate_inp.weight"], state[f"{block}.gate.weight"].numpy())
    np.testing.assert_array_equal(written["blk.1.exp_probs_b.bias"], state[f"{block}.expert_bias"].numpy())
    assert written["blk.0.ffn_gate.weight"].shape == (256, 64)
    facts = {key.removeprefix("lfm2moe."): value for key, value in info.metadata.items()}
    assert (facts["expert_count"], facts["expert_used_count"], facts["expert_feed_forward_length"]) == (4, 2, 64)
    assert (facts["leading_dense_block_count"], facts["expert_gating_func"]) == (1, 2)


def test_the_hyperparameters_say_which_layers_attend(tiny_model: Path, tmp_path: Path) -> None:
    facts = convert(tiny_model, tmp_path / "model.gguf").metadata
    assert facts["general.architecture"] == "lfm2"
    assert facts["lfm2.attention.head_count_kv"] == (0, 0, 2, 0, 2, 0)
    assert facts["lfm2.shortconv.l_cache"] == 3
    assert facts["lfm2.rope.freq_base"] == 1e6
    assert facts["edgealign.model_digest"] == "d" * 64


def test_the_width_of_an_adjusted_config_is_taken_from_the_weights(small_model: SmallModel, tmp_path: Path) -> None:
    facts = convert(small_model("lfm2-adjusted"), tmp_path / "model.gguf").metadata
    assert facts["lfm2.feed_forward_length"] == 256  # 2/3 of 384, rounded up to 256
    assert json.loads((small_model("lfm2-adjusted") / "config.json").read_text())["intermediate_size"] == 384


def test_the_tokenizer_comes_with_its_types_ids_and_template(tiny_model: Path, tmp_path: Path) -> None:
    facts = convert(tiny_model, tmp_path / "model.gguf").metadata
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", "lfm2")
    ids = {key: facts[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "padding")}
    assert ids == {"bos": 1, "eos": 7, "padding": 0}
    assert facts["tokenizer.ggml.add_bos_token"] is True
    assert facts["tokenizer.chat_template"] == (tiny_model / "chat_template.jinja").read_text(encoding="utf-8")
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 512
    kinds = dict(zip(tokens, types, strict=True))
    assert (kinds["<|im_end|>"], kinds["a"]) == (3, 1)
    assert {kind for token, kind in kinds.items() if token.startswith("<|reserved_")} == {5}


def test_rows_without_a_token_are_named_and_unused(tiny_model: Path, tmp_path: Path) -> None:
    from gguf_vocab import read_vocab

    vocab = read_vocab(tiny_model, rows=520, arch="lfm2")
    assert vocab.tokens[512:514] == ("[PAD512]", "[PAD513]")
    assert set(vocab.types[512:]) == {5}
    with pytest.raises(InputError, match="has a token 511, the embedding only 500 rows"):
        read_vocab(tiny_model, rows=500, arch="lfm2")


def test_llama3_rotary_scaling_becomes_divisors(small_model: SmallModel, tmp_path: Path) -> None:
    model = small_model("llama-untied")
    convert(model, tmp_path / "model.gguf")
    divisors = tensors_of(tmp_path / "model.gguf")["rope_freqs.weight"]
    plain = 1.0 / 500_000.0 ** (np.arange(0, 16, 2) / 16)
    scaled = load_model(model).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(plain / divisors, scaled, rtol=1e-6)
    assert len(set(divisors.round(3))) > 2


def test_two_exports_are_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(tiny_model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_shorter_context_can_be_written(tiny_model: Path, tmp_path: Path) -> None:
    assert convert(tiny_model, tmp_path / "model.gguf", context=99).metadata["lfm2.context_length"] == 99


def test_a_large_vocabulary_is_read_back_by_the_validator(tmp_path: Path) -> None:
    from gguf_vocab import read_vocab

    from edgealign.models.tokenizer import train_tokenizer

    train_tokenizer([], vocab_size=65_536, context=64, max_bytes=100_000).save_pretrained(tmp_path)
    vocab = read_vocab(tmp_path, rows=65_536, arch="lfm2")
    assert len(set(vocab.tokens)) == 65_536
    from gguf import GGUFWriter
    from gguf_vocab import add_vocab

    writer = GGUFWriter(str(tmp_path / "v.gguf"), "lfm2")
    add_vocab(writer, vocab)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(tmp_path / "v.gguf").metadata["tokenizer.ggml.tokens"] == LongArray(65_536)


REFUSED = {
    "lfm2": {"conv_bias": True, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0}},
    "lfm2-moe": {"norm_topk_prob": False, "routed_scaling_factor": 2.0, "use_expert_bias": False},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"use_sliding_window": True},
    "gemma3": {"query_pre_attn_scalar": 99, "final_logit_softcapping": 30.0},
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in REFUSED.items() for key in keys])
def test_what_llama_cpp_cannot_express_is_refused_by_name(
    name: str, key: str, small_model: SmallModel, tmp_path: Path
) -> None:
    model = edited(small_model(name), tmp_path / "model", **{key: REFUSED[name][key]})
    with pytest.raises(InputError, match="yarn" if key == "rope_parameters" else key):
        convert(model, tmp_path / "model.gguf")
