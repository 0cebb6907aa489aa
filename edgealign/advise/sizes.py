"""How large a model becomes in each target and quantisation, computed from its tensors' shapes.

    facts = read_facts(Path("model"))
    size = model_size(facts, "gguf", "q4_0")     # bytes of the file, bytes read for a token

Weights are counted by the table below; the tokenizer, the graph and paddings are not (some hundred KiB in all). A
bundle that exists is never computed: its files are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from edgealign.errors import EdgealignError, InputError
from edgealign.models.load import check_safetensors, read_config

# Bits per weight of llama.cpp's types (ggml-common.h: block_q4_0 has 18 bytes for 32 weights, block_q6_K 210 for 256),
# and what it takes where a row is no multiple of 256 (llama-quant.cpp: tensor_type_fallback).
GGML_BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "q4_k": 4.5, "q5_0": 5.5, "q5_1": 6.0,
             "q5_k": 5.5, "q6_k": 6.5625}  # fmt: skip
NARROW = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
K_BLOCK, BLOCK = 256, 32


@dataclass(frozen=True)
class Storage:
    """What a quantisation makes of weights. GGUF names types, the others bits per weight with their scales.

    `shared`: a head that is tied to the embedding is stored once. `cache_bytes`: of one number of the KV cache.
    `row_scale`: bits of the scale that each row of head and table has, where their bits do not hold it already.
    """

    layers: str | float
    head: str | float
    table: str | float
    shared: bool
    cache_bytes: int
    source: str
    row_scale: float = 0.0


_LLAMA = "llama.cpp's quantiser; its bits per weight are in ggml-common.h"
_GENAI = "onnxruntime-genai's builder: blocks of 32 weights with a 32-bit scale"
_XNNPACK = "XNNPACK: groups of 32 weights with a 16-bit scale, head and embedding in 8 bits by row of a 32-bit one"
STORAGE: Mapping[tuple[str, str], Storage] = {
    ("gguf", "f32"): Storage("f32", "f32", "f32", True, 2, _LLAMA),
    ("gguf", "f16"): Storage("f16", "f16", "f16", True, 2, _LLAMA),
    ("gguf", "q8_0"): Storage("q8_0", "q8_0", "q8_0", True, 2, _LLAMA),
    ("gguf", "q4_0"): Storage("q4_0", "q6_k", "q4_0", True, 2, _LLAMA),
    ("gguf", "q6_k"): Storage("q6_k", "q6_k", "q6_k", True, 2, _LLAMA),
    ("gguf", "q5_k_m"): Storage("q5_k", "q6_k", "q5_k", True, 2, _LLAMA),
    ("gguf", "q4_k_s"): Storage("q4_k", "q6_k", "q4_k", True, 2, _LLAMA),
    ("gguf", "q4_k_m"): Storage("q4_k", "q6_k", "q4_k", True, 2, _LLAMA),
    ("onnx", "fp32"): Storage(32.0, 32.0, 32.0, True, 4, "onnxruntime-genai's builder"),
    ("onnx", "int8"): Storage(9.0, 9.0, 32.0, True, 4, _GENAI),
    ("onnx", "int4"): Storage(5.0, 9.0, 32.0, True, 4, _GENAI),
    ("onnx", "int4_k"): Storage(5.125, 9.25, 32.0, True, 4, f"{_GENAI} and a zero point"),
    ("executorch", "fp32"): Storage(32.0, 32.0, 32.0, False, 4, "XNNPACK: head and embedding apart"),
    ("executorch", "8da4w"): Storage(4.5, 8.0, 8.0, False, 4, _XNNPACK, row_scale=32.0),
}
EXECUTORCH_CONTEXT = 4096  # the program's cache is allocated whole; an export without `context` has this many positions


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer: its name, weights, and the length of a row (what is quantised together)."""

    name: str
    elements: int
    row: int
    expert: bool


@dataclass(frozen=True)
class ModelFacts:
    """What sizes depend on, from config.json and the tensors' headers."""

    model_type: str
    matrices: tuple[Matrix, ...]
    vocab: int
    width: int
    tied: bool
    kept: int
    attention_layers: int
    conv_layers: int
    kv_heads: int
    head_dim: int
    context: int
    expert_share: float

    @property
    def parameters(self) -> int:
        table = self.vocab * self.width * (1 if self.tied else 2)
        return table + self.kept + sum(matrix.elements for matrix in self.matrices)


@dataclass(frozen=True)
class Size:
    """Bytes of the weights, and of those that one decoded token reads."""

    file_bytes: int
    token_bytes: int
    how: str


def read_facts(folder: Path) -> ModelFacts:
    """Shapes without loading a weight.

    Raises:
        InputError: the directory is no model, or its files do not tell.
    """
    config = read_config(folder)
    tensors = {
        name: tuple(entry["shape"]) for file in sorted(folder.glob("*.safetensors"))
        for name, entry in check_safetensors(file).items()
    }  # fmt: skip
    table = next((shape for name, shape in tensors.items() if name.endswith("embed_tokens.weight")), None)
    if table is None or len(table) != 2:
        raise InputError(folder, "has no embedding among its tensors", "give a complete model directory")
    tied = bool(config.get("tie_word_embeddings", True)) or "lm_head.weight" not in tensors
    outside = ("embed_tokens.weight", "lm_head.weight")
    layers = {name: shape for name, shape in tensors.items() if not name.endswith(outside)}
    matrices = tuple(
        Matrix(name, prod(shape), shape[-1], ".experts" in name)
        for name, shape in layers.items() if len(shape) == 2 or (len(shape) == 3 and ".experts" in name)
    )  # fmt: skip
    kept = sum(prod(shape) for shape in layers.values()) - sum(matrix.elements for matrix in matrices)
    try:
        heads, n_layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        conv = sum(kind == "conv" for kind in config.get("layer_types") or [])
        experts, used = int(config.get("num_experts") or 0), int(config.get("num_experts_per_tok") or 0)
        return ModelFacts(
            str(config["model_type"]), matrices, table[0], table[1], tied, kept, n_layers - conv, conv,
            int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or table[1] // heads),
            int(config["max_position_embeddings"]), min(1.0, used / experts) if experts else 1.0,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"does not say its {error}" if isinstance(error, KeyError) else "holds a number that cannot be"
        raise InputError(folder / "config.json", reason, "give a complete model directory") from error


def supports(facts: ModelFacts, target: str) -> bool:
    """Can this architecture be exported to the target? By the target's own table."""
    from importlib import import_module

    try:
        import_module(f"edgealign.runtimes.{target}_names").architecture(facts.model_type)
    except EdgealignError:
        return False
    return True


def model_size(facts: ModelFacts, target: str, quant: str) -> Size | None:
    """Computed bytes; None for a quantisation that the table does not know."""
    stored = STORAGE.get((target, quant))
    if stored is None:
        return None
    more = _with_more_bits(facts) if (target, quant) in (("gguf", "q4_k_m"), ("gguf", "q5_k_m")) else set()
    read = whole = 0.0
    for matrix in facts.matrices:
        bits = _bits("q6_k" if matrix.name in more else stored.layers, matrix.row)
        whole += matrix.elements * bits
        read += matrix.elements * bits * (facts.expert_share if matrix.expert else 1.0)
    head = facts.vocab * (facts.width * _bits(stored.head, facts.width) + stored.row_scale)
    row = 0.0
    if not (facts.tied and stored.shared):
        row = facts.width * _bits(stored.table, facts.width) + stored.row_scale
    total = whole + head + facts.vocab * row + facts.kept * 32
    mean = total / max(facts.parameters, 1)
    how = f"{facts.parameters:,} weights at {mean:.2f} bits on average ({stored.source})"
    return Size(round(total / 8), round((read + head + row + facts.kept * 32) / 8), how)


def cache_tokens(facts: ModelFacts, target: str, tokens: int) -> int:
    """Positions that the KV cache has: as many as are used, or all of a program's."""
    return min(facts.context, EXECUTORCH_CONTEXT) if target == "executorch" else tokens


def cache_bytes(facts: ModelFacts, target: str, tokens: int) -> int:
    """KV cache and convolution state for so many tokens; a sliding window is not subtracted."""
    stored = next(entry for (name, _), entry in STORAGE.items() if name == target)
    places = cache_tokens(facts, target, tokens)
    keys: int = 2 * facts.attention_layers * facts.kv_heads * facts.head_dim * places * stored.cache_bytes
    return keys + facts.conv_layers * facts.width * 2 * 4


def adapter_bytes(folder: Path, target: str, quant: str) -> int:
    """Bytes of a user's LoRA in a target's own format: 16 bits beside a GGUF model of 16 bits and less, else 32."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(folder, f"has no {file.name}", "give a LoRA in PEFT's layout: edgealign personalize")
    elements: int = sum(prod(entry["shape"]) for entry in check_safetensors(file).values())
    return elements * (2 if target == "gguf" and quant != "f32" else 4)


def _with_more_bits(facts: ModelFacts) -> set[str]:
    """The matrices that Q4_K_M stores as Q6_K: values and second feed-forward matrices of about half the layers
    (llama-quant.cpp: use_more_bits)."""
    found: set[str] = set()
    for ends in (("v_proj.weight",), ("down_proj.weight", "w2.weight", "down_proj")):
        layers: dict[int, list[str]] = {}
        for matrix in facts.matrices:
            if matrix.name.endswith(ends):
                layers.setdefault(_layer(matrix.name), []).append(matrix.name)
        n = len(layers)
        for i, layer in enumerate(sorted(layers)):
            if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2:
                found.update(layers[layer])
    return found


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _bits(stored: str | float, row: int) -> float:
    if isinstance(stored, float):
        return stored
    if stored in NARROW and row % K_BLOCK:
        stored = NARROW[stored]
    return GGML_BITS[stored if stored in ("f32", "f16") or row % BLOCK == 0 else "f16"]

