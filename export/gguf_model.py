"""Write a model directory as one GGUF file of 32-bit floats: hyperparameters, vocabulary, every tensor.

Tensors are read one at a time, so the peak of memory is the largest of them. What llama.cpp's graph of an architecture
fixes (biases, scalings, layer patterns) is compared with the configuration, and a model that differs is refused: it
would load and be wrong.

Shape legend: D width, K convolution taps, E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import ExpertGatingFuncType, GGUFWriter, LlamaFileType
from gguf_vocab import add_vocab, read_vocab
from safetensors import safe_open

from edgealign.errors import InputError, writing
from edgealign.models.load import check_model
from edgealign.progress import track
from edgealign.runtimes.gguf_header import GgufInfo, check_gguf
from edgealign.runtimes.gguf_names import Row, architecture, expand, permute, rope_theta

Floats = npt.NDArray[np.float32]
MODEL_DIGEST = "edgealign.model_digest"
RETRY = "export another architecture, or ask for this one with its config.json"


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: its shape in numpy order, and the function that reads it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Floats]


def write_model(folder: Path, file: Path, *, digest: str, context: int | None = None) -> GgufInfo:
    """Convert; returns what the written file says of itself.

    Args:
        digest: the model artifact's, written into the file so that a session can refuse a foreign adapter.

    Raises:
        InputError: the architecture, its configuration or its tensors cannot be represented.
        OutputError: the file cannot be written.
    """
    config = check_model(folder)
    table = architecture(str(config["model_type"]))
    n_layers = int(config["num_hidden_layers"])
    with ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        rows = list(expand(table, n_layers, int(config.get("num_experts") or 0)))
        planned = _plan(folder, rows, tensors, config)
        writer = GGUFWriter(str(file), table.name)
        writer.add_type("model")
        writer.add_name(f"{table.name}-{digest[:8]}")
        writer.add_file_type(LlamaFileType.ALL_F32)
        writer.add_quantization_version(2)
        writer.add_string(MODEL_DIGEST, digest)
        vocab_rows = tensors.shape("model.embed_tokens.weight")[0]
        _add_facts(writer, folder, config, tensors, context)
        add_vocab(writer, read_vocab(folder, rows=vocab_rows, arch=table.name))
        for tensor in planned:
            count = math.prod(tensor.shape)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count * 4)
        with writing(file):
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for tensor in track(planned, label=f"writing {file.name}"):
                    writer.write_tensor_data(tensor.read())
            finally:
                writer.close()
    return check_gguf(file)


class _Tensors:
    """The model's safetensors files, opened once; knows which tensors were asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.where: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(str(file), framework="pt"))
            self.where.update(dict.fromkeys(opened.keys(), opened))

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.where[name].get_slice(name).get_shape())

    def read(self, name: str) -> Floats:
        return np.asarray(self.where[name].get_tensor(name).float().numpy(), dtype=np.float32)


def _plan(folder: Path, rows: list[Row], tensors: _Tensors, config: Mapping[str, Any]) -> list[Planned]:
    """Match the table against the files: every tensor of the model is used, exactly once."""
    tied = bool(config.get("tie_word_embeddings"))
    used: set[str] = {"lm_head.weight"} if tied else set()
    experts: dict[str, list[Row]] = defaultdict(list)
    planned = list(_rope_factors(config))
    for row in rows:
        if row.hf not in tensors or row.hf in used:
            continue
        used.add(row.hf)
        if row.rule == "expert":
            experts[row.gguf].append(row)
        else:
            planned.append(_planned(row, tensors, config))
    for name, members in experts.items():
        if len(members) != int(config["num_experts"]):
            raise InputError(folder, f"has {len(members)} experts for {name}", "get the model again")
        planned.append(_stacked(name, members, tensors))
    left = sorted(set(tensors.where) - used)
    if left:
        raise InputError(folder, f"holds {left[0]}, which has no place in a GGUF file of its architecture", RETRY)
    _check_layers(folder, planned, config, tied)
    return planned


def _planned(row: Row, tensors: _Tensors, config: Mapping[str, Any]) -> Planned:
    shape = tensors.shape(row.hf)
    if row.rule == "conv":
        return Planned(row.gguf, (shape[0], shape[2]), lambda: tensors.read(row.hf).squeeze(1))
    if row.rule == "plus_one":
        return Planned(row.gguf, shape, lambda: tensors.read(row.hf) + np.float32(1.0))
    if row.rule in ("permute_q", "permute_k"):
        heads = int(config["num_attention_heads"])
        if row.rule == "permute_k":
            heads = int(config.get("num_key_value_heads") or heads)
        return Planned(row.gguf, shape, lambda: np.ascontiguousarray(permute(tensors.read(row.hf), heads)))
    return Planned(row.gguf, shape, lambda: tensors.read(row.hf))


def _stacked(name: str, members: list[Row], tensors: _Tensors) -> Planned:
    shape = (len(members), *tensors.shape(members[0].hf))
    return Planned(name, shape, lambda: np.stack([tensors.read(row.hf) for row in members]))


def _check_layers(folder: Path, planned: list[Planned], config: Mapping[str, Any], tied: bool) -> None:
    """A missing tensor would only show when llama.cpp loads the file; say it here, with its name."""
    have = {tensor.name for tensor in planned}
    needed = {"token_embd.weight"} | (set() if tied else {"output.weight"})
    for n, kind in enumerate(config.get("layer_types") or ["full_attention"] * int(config["num_hidden_layers"])):
        parts = ["shortconv.in_proj", "shortconv.conv", "shortconv.out_proj"] if kind == "conv" else [
            "attn_q", "attn_k", "attn_v", "attn_output"]
        moe = "num_experts" in config and n >= int(config.get("num_dense_layers", 0))
        ffn = [f"ffn_{side}_exps" if moe else f"ffn_{side}" for side in ("gate", "up", "down")]
        needed |= {f"blk.{n}.{part}.weight" for part in (*parts, *ffn, "attn_norm", "ffn_norm")}
    missing = sorted(needed - have)
    if missing:
        raise InputError(folder, f"lacks the tensor that becomes {missing[0]}", "get the model again")


def _add_facts(
    writer: Any, folder: Path, config: Mapping[str, Any], tensors: _Tensors, context: int | None
) -> None:
    """The hyperparameters; the feed-forward width is read from the weights, because old LFM2 configs adjust it."""
    _refuse_unlike(folder, config)
    kind, heads = str(config["model_type"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    width = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or width // heads)
    lfm2 = kind.startswith("lfm2")
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(context or int(config["max_position_embeddings"]))
    writer.add_embedding_length(width)
    writer.add_vocab_size(tensors.shape("model.embed_tokens.weight")[0])
    first = "model.layers.0.feed_forward.w1.weight" if lfm2 else "model.layers.0.mlp.gate_proj.weight"
    dense = tensors.shape(first)[0] if first in tensors else int(config["intermediate_size"])
    writer.add_feed_forward_length(dense)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(float(config["norm_eps"] if lfm2 else config["rms_norm_eps"]))
    writer.add_rope_freq_base(rope_theta(config))
    if lfm2:
        writer.add_head_count_kv([kv_heads if kind == "full_attention" else 0 for kind in config["layer_types"]])
        writer.add_shortconv_l_cache(int(config["conv_L_cache"]))
    else:
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    if kind == "lfm2_moe":
        writer.add_expert_count(int(config["num_experts"]))
        writer.add_expert_used_count(int(config["num_experts_per_tok"]))
        writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
        writer.add_leading_dense_block_count(int(config["num_dense_layers"]))
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if kind == "gemma3_text":
        writer.add_sliding_window(int(config["sliding_window"]))


def _refuse_unlike(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's graph of the architecture cannot express."""
    rope = config.get("rope_parameters") or {}
    rope_types = {str(part.get("rope_type", "default")) for part in _rope_parts(rope)}
    kind = config["model_type"]
    fixed: dict[str, tuple[object, ...]] = {"attention_bias": (False, None), "mlp_bias": (False, None)}
    if kind.startswith("lfm2"):
        fixed["conv_bias"] = (False, None)
    if kind == "lfm2_moe":
        fixed |= {"norm_topk_prob": (True,), "routed_scaling_factor": (1, None), "use_expert_bias": (True,)}
    if kind == "gemma3_text":
        pattern = ["full_attention" if (n + 1) % 6 == 0 else "sliding_attention"
                   for n in range(int(config["num_hidden_layers"]))]  # fmt: skip
        fixed |= {"layer_types": (pattern,), "query_pre_attn_scalar": (config["head_dim"],),
                  "final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)}  # fmt: skip
        local = (rope.get("sliding_attention") or {}).get("rope_theta", config.get("rope_local_base_freq", 10_000.0))
        if float(local) != 10_000.0:
            raise InputError(folder, f"has the local rotary base {local}, llama.cpp's graph has 10000", RETRY)
    if kind == "qwen3":
        fixed["use_sliding_window"] = (False, None)
    for key, allowed in fixed.items():
        if config.get(key) not in allowed:
            raise InputError(folder, f"has {key} = {config.get(key)}, which llama.cpp's graph cannot do", RETRY)
    if rope_types - ({"default", "llama3"} if kind == "llama" else {"default"}):
        found = ", ".join(sorted(rope_types))
        raise InputError(folder, f"has the rotary scaling {found}, which is not exported", RETRY)


def _rope_parts(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    nested = [part for part in rope.values() if isinstance(part, Mapping)]
    return nested or [rope]


def _rope_factors(config: Mapping[str, Any]) -> Iterator[Planned]:
    """Llama 3's rotary scaling as divisors of the frequencies, one per pair of a head's dimensions."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type") != "llama3":
        return
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    frequencies = 1.0 / rope_theta(config) ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    factor, old = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = (old / wavelengths - low) / (high - low)
    blended = 1.0 / ((1.0 - smooth) / factor + smooth)
    divisors = np.where(wavelengths < old / high, 1.0, np.where(wavelengths > old / low, factor, blended))
    values = divisors.astype(np.float32)
    yield Planned("rope_freqs.weight", values.shape, lambda: values)
