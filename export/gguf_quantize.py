"""Quantise a GGUF file with llama.cpp's own library, and measure what to weigh by: the importance matrix.

The matrix holds, for every linear layer, the mean square of each input over calibration text (llama.cpp's imatrix):
a weight that meets large inputs is rounded with more care. It is taken from the torch model with forward hooks, so no
other program is needed. The library writes no trace of it into the file, so the metadata keys are added here.

Shape legend: N tokens, I in features, O out features, E experts, k experts per token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgealign.artifact import sha256_file
from edgealign.errors import EdgealignError, InputError
from edgealign.models.tokenizer import read_texts
from edgealign.progress import track
from edgealign.runtimes.gguf_header import GgufInfo, check_gguf
from edgealign.runtimes.gguf_names import adapter_row, architecture
from edgealign.runtimes.llamacpp import load_library
from edgealign.tensor_types import GROUPS, TYPES, Mixture, check_rows, parse_groups

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# llama.cpp's llama_ftype
FTYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_s": 14, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
BYTES_PER_TOKEN = 16  # generous: how much calibration text is read for one token
KV_INT, KV_STRING = 0, 3  # llama.cpp's llama_model_kv_override_type


@dataclass(frozen=True)
class Importance:
    """Mean squared inputs: GGUF tensor name -> (I,), or (E * I,) for stacked experts."""

    values: Mapping[str, npt.NDArray[np.float32]]
    tokens: int
    windows: int
    text_digest: str


def quantize(
    source: Path, target: Path, quant: str | Mixture, *, importance: Importance | None, threads: int
) -> GgufInfo:
    """Make `target` from the 32-bit `source`; returns what the written file says of itself.

    Raises:
        ToolMissing: llama-cpp-python is not installed.
        RecipeError: a head or a group cannot have the type that the mixture gives it.
        EdgealignError: llama.cpp refused, with its last message.
    """
    mixture = Mixture(quant) if isinstance(quant, str) else quant
    lib = load_library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = FTYPES[mixture.base]
    params.nthread = threads
    keep: list[Any] = []  # ctypes does not own what it points to
    if mixture.head or mixture.groups:
        check_rows(mixture, ((tensor.name, tensor.shape[0]) for tensor in check_gguf(source).tensors))
        _mix(lib, params, mixture, keep)
    if importance is not None:
        _attach(lib, params, importance, keep)
    with _log_lines(lib) as lines:
        status = lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        reason = next((line for line in reversed(lines) if line), "no message")
        raise EdgealignError(
            target.name, f"llama.cpp could not quantise to {mixture.label} ({reason})", "try another --quant"
        )
    return check_gguf(target)


def measure_importance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path, *, tokens: int, window: int
) -> Importance:
    """Run calibration text through the torch model and average the squared inputs of every linear layer.

    Raises:
        InputError: the text is unreadable, or too short for one window of two tokens.
    """
    import torch

    ids: list[int] = []
    for piece in read_texts([text], tokens * BYTES_PER_TOKEN):
        ids.extend(tokenizer(piece, add_special_tokens=False).input_ids)
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    windows = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    if not windows:
        raise InputError(text, f"holds {len(ids)} tokens, too few to calibrate on", "give more text")
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    sums = _Sums()
    with torch.no_grad(), _hooks(model, sums):
        for piece_ids in track(windows, label="calibrating"):
            model(input_ids=torch.tensor([bos + piece_ids]), use_cache=False)
    return Importance(sums.means(), sum(map(len, windows)), len(windows), sha256_file(text))


@dataclass
class _Sums:
    """Running sums of squares per GGUF tensor."""

    squares: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def add(self, name: str, inputs: torch.Tensor, *, expert: int = 0, n_experts: int = 1) -> None:
        """Add inputs (N, I) of one matrix; `n_experts` matrices share the name."""
        flat = inputs.reshape(-1, inputs.shape[-1]).double()
        if name not in self.squares:
            self.squares[name] = np.zeros((n_experts, flat.shape[1]))
            self.counts[name] = np.zeros((n_experts, 1))
        self.squares[name][expert] += flat.pow(2).sum(0).numpy()
        self.counts[name][expert] += flat.shape[0]

    def means(self) -> dict[str, npt.NDArray[np.float32]]:
        """Means; an expert that no token was sent to takes the mean of all experts."""
        means = {}
        for name, squares in self.squares.items():
            counts = self.counts[name]
            overall = squares.sum(0) / max(counts.sum(), 1.0)
            each = np.where(counts > 0, squares / np.maximum(counts, 1.0), overall)
            means[name] = each.astype(np.float32).reshape(-1)
        return means


@contextmanager
def _hooks(model: PreTrainedModel, sums: _Sums) -> Iterator[None]:
    table = architecture(model.config.model_type)
    tied = bool(model.config.tie_word_embeddings)
    handles = []
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            gguf: str | None = "token_embd.weight" if tied else "output.weight"
        else:
            row = adapter_row(table, name)
            gguf = row.gguf if row is not None else None
        if gguf is not None:
            handles.append(module.register_forward_pre_hook(_linear_hook(gguf, sums)))
        elif name.endswith(".feed_forward.experts"):
            handles.append(module.register_forward_pre_hook(_expert_hook(int(name.split(".")[2]), sums)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook(gguf: str, sums: _Sums) -> Callable[[Any, tuple[Any, ...]], None]:
    def hook(_: Any, inputs: tuple[Any, ...]) -> None:
        sums.add(gguf, inputs[0].detach())

    return hook


def _expert_hook(layer: int, sums: _Sums) -> Callable[[Any, tuple[Any, ...]], None]:
    """The stacked experts are no linear layers: follow the routing, and recompute what enters the down projection."""
    import torch

    def hook(module: Any, inputs: tuple[Any, ...]) -> None:
        hidden, chosen = inputs[0].detach(), inputs[1]  # (N, D), (N, k)
        n_experts = int(module.gate_up_proj.shape[0])
        for expert in range(n_experts):
            routed = hidden[(chosen == expert).any(-1)]
            if not len(routed):
                continue
            gate, up = torch.nn.functional.linear(routed, module.gate_up_proj[expert]).chunk(2, dim=-1)
            for side, value in (("gate", routed), ("up", routed), ("down", module.act_fn(gate) * up)):
                sums.add(f"blk.{layer}.ffn_{side}_exps.weight", value, expert=expert, n_experts=n_experts)

    return hook


def _mix(lib: Any, params: Any, mixture: Mixture, keep: list[Any]) -> None:
    """The head's type, which llama.cpp also gives to a tied embedding, and a pattern for each group."""
    if mixture.head:
        params.output_tensor_type = TYPES[mixture.head].number
    groups = parse_groups(mixture.groups)
    overrides = (lib.llama_model_tensor_override * (len(groups) + 1))()  # the last one stays empty: the end
    for override, (group, kind) in zip(overrides, groups.items(), strict=False):
        pattern = GROUPS[group].encode()
        keep.append(pattern)
        override.pattern, override.type = pattern, TYPES[kind].number
    keep.append(overrides)
    params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))


def _attach(lib: Any, params: Any, importance: Importance, keep: list[Any]) -> None:
    entries = (lib.llama_model_imatrix_data * (len(importance.values) + 1))()  # the last one stays empty: the end
    for entry, (name, values) in zip(entries, sorted(importance.values.items()), strict=False):
        data = np.ascontiguousarray(values, np.float32)
        text = name.encode()
        keep += [data, text]
        entry.name = text
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = data.size
    facts: Sequence[tuple[str, int | str]] = (
        ("quantize.imatrix.dataset", importance.text_digest[:64]),
        ("quantize.imatrix.entries_count", len(importance.values)),
        ("quantize.imatrix.chunks_count", importance.windows),
    )
    overrides = (lib.llama_model_kv_override * (len(facts) + 1))()
    for override, (key, value) in zip(overrides, facts, strict=False):
        override.key = key.encode()
        if isinstance(value, int):
            override.tag, override.value.val_i64 = KV_INT, value
        else:
            override.tag, override.value.val_str = KV_STRING, value.encode()
    keep += [entries, overrides]
    params.imatrix = ctypes.cast(entries, type(params.imatrix))
    params.kv_overrides = ctypes.cast(overrides, type(params.kv_overrides))


@contextmanager
def _log_lines(lib: Any) -> Iterator[list[str]]:
    """Collect what llama.cpp would print; its last words are the reason when it fails."""
    lines: list[str] = []

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(_: int, text: bytes, __: Any) -> None:
        lines.append(text.decode("utf-8", errors="replace").strip())

    before, data = lib.llama_log_callback(), ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    lib.llama_log_set(collect, None)
    try:
        yield lines
    finally:
        lib.llama_log_set(before, data)
