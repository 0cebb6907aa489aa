"""A model as ExecuTorch's own definition of it, with modules of ours where that definition falls short.

The definition (`examples/models/llama` and `examples/models/lfm2` in the executorch wheel) brings attention with
`custom_sdpa` and a KV cache that grows in place. Three of its modules are replaced:

- the short convolution: upstream never clears its state, so that a second conversation hears the first; here it
  counts for nothing at position 0. It also works on (1, T, D) throughout, where upstream turns everything twice;
- every linear layer of a block: `x W` becomes `x W + (x A) B` in the method that takes a user's A and B;
- the norms: XNNPACK has no mean, so each of them cut its block in two (196 delegates for LFM2-350M, now 42). The mean
  of squares is a product with a row of 1/D.

Shape legend: T tokens, D width, I in features, O out features, r rank, V vocabulary, L taps of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.examples.models.llama.llama_transformer import construct_transformer
from executorch.examples.models.llama.model_args import ModelArgs
from executorch.examples.models.llama.source_transformation.custom_kv_cache import (
    replace_kv_cache_with_custom_kv_cache,
)
from executorch.examples.models.llama.source_transformation.sdpa import replace_sdpa_with_custom_op
from torch import Tensor, nn

from edgealign.errors import InputError
from edgealign.models.load import load_model
from edgealign.runtimes.executorch_names import ExecutorchArchitecture
from edgealign.runtimes.gguf_names import rope_theta
from edgealign.runtimes.lora_inputs import LoraInput, Part

GROUP = 32  # weights per scale in 8da4w; XNNPACK keeps the scales in bfloat16

Pair = tuple[Tensor, Tensor]  # A (1, I, r) and B (1, r, O)


class AdaptedLinear(nn.Module):
    """y = x W, and + (x A) B while `pair` holds a user's matrices: the method's inputs, put there by `Program`."""

    def __init__(self, base: nn.Module, entry: LoraInput) -> None:
        super().__init__()
        self.base, self.entry = base, entry
        self.pair: Pair | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y if self.pair is None else y + low_rank(x, self.pair)


class ShortConv(nn.Module):
    """LFM2's gated short convolution (1, T, D) -> (1, T, D) with a state that position 0 empties.

    y = out(C * conv(B * x)), where B, C and x are three projections: one module of the model, `conv.in_proj`, and so
    one pair of a user's matrices. Source: Liquid AI, LFM2 technical report, section 2; transformers' Lfm2ShortConv.
    """

    def __init__(self, base: nn.Module, layer: str) -> None:
        super().__init__()
        old: Any = base
        self.B_proj, self.C_proj, self.x_proj = old.B_proj, old.C_proj, old.x_proj
        width = int(old.dim)
        self.taps = nn.Parameter(old.conv.weight.detach()[:, 0].T.contiguous(), requires_grad=False)  # (L, D)
        self.register_buffer("state", torch.zeros(1, len(self.taps) - 1, width))
        self.entry = LoraInput(f"{layer}.conv.in_proj", width, (Part(f"{layer}.conv.in_proj", 3 * width),))
        self.out_proj = AdaptedLinear(old.out_proj, _entry(layer, "conv.out_proj", old.out_proj))
        self.pair: Pair | None = None
        self.keep: Tensor | None = None  # (1,): 0 at the first position of a conversation, else 1

    def forward(self, x: Tensor) -> Tensor:
        before, after, inner = self.B_proj(x), self.C_proj(x), self.x_proj(x)
        if self.pair is not None:
            changes = torch.chunk(low_rank(x, self.pair), 3, dim=-1)
            before, after, inner = before + changes[0], after + changes[1], inner + changes[2]
        state: Any = self.state
        gated = torch.cat([state * self.keep, before * inner], dim=1)
        state.copy_(gated[:, -state.shape[1] :])
        length = x.shape[1]
        mixed = gated[:, :length] * self.taps[0]
        for place in range(1, len(self.taps)):
            mixed = mixed + gated[:, place : place + length] * self.taps[place]
        out: Tensor = self.out_proj(after * mixed)
        return out


class Norm(nn.Module):
    """x / rms(x) * weight, the mean of squares as a product that XNNPACK can take."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        old: Any = base
        self.weight, self.eps = old.weight, float(old.eps)
        self.register_buffer("row", torch.full((1, len(old.weight)), 1.0 / len(old.weight)))

    def forward(self, x: Tensor) -> Tensor:
        row: Any = self.row
        scaled: Tensor = x * torch.rsqrt(nn.functional.linear(x * x, row) + self.eps) * self.weight
        return scaled


class Program(nn.Module):
    """One method: (tokens (1, T), position of the first (1,), A, B, A, B, ...) -> logits (1, V) after the last."""

    def __init__(self, net: nn.Module, *, adapted: bool) -> None:
        super().__init__()
        self.net = net
        self.places: list[Any] = adaptable(net)
        self.convolutions = [module for module in net.modules() if isinstance(module, ShortConv)]
        self.adapted = adapted

    def forward(self, tokens: Tensor, input_pos: Tensor, *matrices: Tensor) -> Tensor:
        keep = (input_pos > 0).to(torch.float32)
        for convolution in self.convolutions:
            convolution.keep = keep
        for number, place in enumerate(self.places):
            place.pair = (matrices[2 * number], matrices[2 * number + 1]) if self.adapted else None
        logits: Tensor = self.net(tokens, {"input_pos": input_pos})
        return logits


def low_rank(x: Tensor, pair: Pair) -> Tensor:
    """(x A) B, (1, T, I) -> (1, T, O). As batches of one: XNNPACK multiplies two inputs only in that form."""
    return torch.bmm(torch.bmm(x, pair[0]), pair[1])


def adaptable(net: nn.Module) -> list[Any]:
    """The modules that take a user's pair, in the order of the program's inputs."""
    return [module for module in net.modules() if isinstance(module, (AdaptedLinear, ShortConv))]


def build(model: Path, table: ExecutorchArchitecture, config: Mapping[str, Any], *, context: int, batch: int) -> Any:
    """The module to export, in 32-bit floats and evaluation mode.

    Args:
        context: positions of the KV cache.
        batch: the most tokens that one call may bring, plus one.

    Raises:
        InputError: a tensor that the definition has no place for.
    """
    source = load_model(model)
    tensors = {name: value.detach().float() for name, value in source.state_dict().items()}
    width = tensors["model.layers.0." + _down(table) + ".weight"].shape[1]
    arguments = ModelArgs(
        dim=int(config["hidden_size"]), n_layers=int(config["num_hidden_layers"]), hidden_dim=width,
        n_heads=int(config["num_attention_heads"]), n_kv_heads=int(config["num_key_value_heads"]),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]),
        vocab_size=len(tensors["model.embed_tokens.weight"]), rope_theta=rope_theta(config), use_hf_rope=True,
        norm_eps=float(config.get("norm_eps") or config.get("rms_norm_eps") or 1e-5), layer_types=_layer_types(config),
        use_qk_norm=table.qk_norm, qk_norm_before_rope=table.qk_norm, use_kv_cache=True,
        use_sdpa_with_kv_cache_op=True, enable_dynamic_shape=True, max_seq_len=batch, max_context_len=context,
    )  # fmt: skip
    net = construct_transformer(arguments)
    placed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        places = table.targets(name)
        if not places:
            reason = f"holds {name}, which ExecuTorch's definition has no place for"
            raise InputError(model, reason, "export it with --target gguf")
        placed.update(zip(places, torch.chunk(value, len(places)), strict=True))
    missing, surplus = net.load_state_dict(placed, strict=False)
    if surplus or [name for name in missing if name.endswith("weight")]:
        names = ", ".join([*surplus, *missing][:3])
        raise InputError(model, f"does not fit ExecuTorch's definition ({names})", "export it with --target gguf")
    _replace(net, table)
    replace_sdpa_with_custom_op(net)
    replace_kv_cache_with_custom_kv_cache(net)
    return net.eval().requires_grad_(False)


def round_weights(net: nn.Module, model: Path, *, head: str = "output") -> None:
    """8da4w: linear layers in 4 bits, the head and the embedding in 8, activations in 8 bits as they come.

    The scale of each group is fitted (HQQ), because the plain one costs the starter 0.12 nat and this one 0.03.

    Args:
        head: the head's name in `net`.

    Raises:
        InputError: a matrix whose rows cannot be cut into groups.
    """
    from executorch.examples.models.llama.source_transformation.quantize import get_quant_embedding_transform
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    def in_block(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or name == head:
            return False
        if module.in_features % GROUP:
            reason = f"has rows of {module.in_features} weights in {name}, which groups of {GROUP} do not divide"
            raise InputError(model, reason, "export it as fp32")
        return True

    embed: Any = get_quant_embedding_transform("8,0", False, quantize_with_hqq=False)
    embed(net)
    block = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]  # torch has it, its stubs do not
        weight_granularity=PerGroup(GROUP), intx_choose_qparams_algorithm="hqq_scale_only",
    )
    quantize_(net, block, filter_fn=in_block)
    rows = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(net, rows, filter_fn=lambda module, name: name == head)


def _replace(net: Any, table: ExecutorchArchitecture) -> None:
    """Put our modules in the definition's places, under the model's names for them."""
    for number, layer in enumerate(net.layers):
        name = f"model.layers.{number}"
        if hasattr(layer, "conv"):
            layer.conv = ShortConv(layer.conv, name)
        for module, places in table.layer.items():
            if len(places) != 1 or module == "conv.out_proj":
                continue
            parent, _, last = places[0].rpartition(".")
            owner = layer.get_submodule(parent) if hasattr(layer, parent.partition(".")[0]) else None
            base = getattr(owner, last, None)
            if isinstance(base, nn.Linear):
                setattr(owner, last, AdaptedLinear(base, _entry(name, module, base)))
    for name, module in list(net.named_modules()):
        if name.rpartition(".")[2] in ("norm", "attention_norm", "ffn_norm", "q_norm_fn", "k_norm_fn"):
            net.set_submodule(name, Norm(module))


def _entry(layer: str, module: str, base: nn.Linear) -> LoraInput:
    return LoraInput(f"{layer}.{module}", base.in_features, (Part(f"{layer}.{module}", base.out_features),))


def _layer_types(config: Mapping[str, Any]) -> Sequence[str] | None:
    types = config.get("layer_types")
    return list(types) if types and "conv" in types else None


def _down(table: ExecutorchArchitecture) -> str:
    """The matrix whose columns are the width of the feed-forward layer: configs state that width in many ways."""
    return next(module for module, places in table.layer.items() if places == ("feed_forward.w2",))
