"""Look at a model before a run: do the LoRA targets exist, how much do they cover, where does a turn end.

LFM2 names its layers differently from Llama: `out_proj` in attention and in the convolution, `in_proj`, `w1`, `w2`,
`w3`. Lists with `o_proj` or `gate_proj`, which circulate in guides, match only q, k and v in a few layers, and PEFT
does not complain. Here a requested name that matches nothing is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.artifact import Check
from edgealign.errors import InputError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Every linear layer of a block, by model type (adapter coverage lint of the LFM2 layout; leap-finetune's list).
_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "lfm2": ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
    # The experts are stacked parameters, no linear layers: a LoRA reaches attention, convolution, dense layers.
    "lfm2_moe": ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
    "lfm3": ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "in_proj", "out_proj", "w1", "w2", "w3"),
    "llama": _LLAMA_TARGETS,
    "qwen3": _LLAMA_TARGETS,
    "gemma3_text": _LLAMA_TARGETS,
}
LFM2_NAMES = {"o_proj": "out_proj", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
PROBE = "the probe answer"


@dataclass(frozen=True)
class Coverage:
    """What a list of target names reaches in one model."""

    modules: tuple[str, ...]  # full names, in model order
    matched: dict[str, int]  # modules per requested name
    share: float  # of the parameters in linear layers below the head, 0 to 1


def default_targets(model_type: str) -> tuple[str, ...]:
    """The target names that reach every linear layer of a known architecture.

    Raises:
        RecipeError: the architecture is not in the table.
    """
    if model_type not in DEFAULT_TARGETS:
        raise RecipeError(
            model_type, "has no default LoRA targets here", f"name them yourself; known: {', '.join(DEFAULT_TARGETS)}"
        )
    return DEFAULT_TARGETS[model_type]


def lora_targets(model: PreTrainedModel, requested: Sequence[str] | None = None) -> Coverage:
    """Match names (last part of a module's name, or a longer dotted suffix) against the model's linear layers.

    Raises:
        RecipeError: a requested name matches no layer; LFM2's own names are suggested.
    """
    names = tuple(requested) if requested else default_targets(model.config.model_type)
    linear = dict(_linear_layers(model))
    matched = {name: sum(_matches(name, full) for full in linear) for name in names}
    absent = [name for name, count in matched.items() if count == 0]
    if absent:
        raise RecipeError(
            ", ".join(absent), f"{'matches' if len(absent) == 1 else 'match'} no layer of this "
            f"{model.config.model_type} model", _advice(absent, linear),
        )
    modules = tuple(full for full in linear if any(_matches(name, full) for name in names))
    covered = sum(linear[full] for full in modules)
    return Coverage(modules, matched, covered / max(1, sum(linear.values())))


def describe(coverage: Coverage) -> str:
    """One line: how many layers per name, and the share of linear parameters."""
    per_name = ", ".join(f"{name} {count}" for name, count in coverage.matched.items())
    return f"LoRA on {len(coverage.modules)} layers ({per_name}): {coverage.share:.1%} of the linear parameters"


def lint(model_dir: str | Path) -> list[Check]:
    """Does every part agree on the token that ends a turn, and does the chat template work?

    Compares the tokenizer, `generation_config.json`, `config.json` and a rendered assistant turn.

    Raises:
        InputError: the directory is no model, or the tokenizer has no chat template.
    """
    from edgealign.models.load import load_tokenizer, read_config, resolve_model

    folder = resolve_model(model_dir)
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise InputError(folder, "its tokenizer has no chat template", "add chat_template.jinja from the base model")
    turn_end = rendered_end_of_turn(tokenizer)
    name = tokenizer.convert_ids_to_tokens(turn_end) if turn_end is not None else "none"
    found = turn_end is not None
    checks = [Check("turn end in template", _number(turn_end), None, found, f"the turn ends with {name}")]
    sources = {
        "tokenizer": [tokenizer.eos_token_id],
        "generation config": _eos_ids(_optional_json(folder / "generation_config.json")),
        "config": _eos_ids(read_config(folder)),
    }
    for source, ids in sources.items():
        shown = ", ".join(str(i) for i in ids) or "none"
        checks.append(Check(
            f"turn end in {source}", _number(ids[0] if ids else None), _number(turn_end),
            found and turn_end in ids, f"ends with {shown}, the template with {turn_end}",
        ))
    checks.append(_bos_check(tokenizer))
    return checks


def rendered_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The last special token of a rendered assistant turn; None if there is none after its text."""
    ids = _render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}])
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for token in reversed(ids):
        if token in special:
            return token
        if tokenizer.decode([token]).strip():
            return None  # text stands after the last special token: the turn has no end of its own
    return None


def _bos_check(tokenizer: PreTrainedTokenizerBase) -> Check:
    bos = tokenizer.bos_token_id
    ids = _render(tokenizer, [{"role": "user", "content": "a"}])
    count = ids.count(bos) if bos is not None else 0
    wanted = 0 if bos is None else 1
    return Check("one beginning of text", float(count), float(wanted), count <= wanted, f"bos stands {count} times")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    return [int(token) for token in rendered]


def _linear_layers(model: PreTrainedModel) -> Iterable[tuple[str, int]]:
    """Full name and parameter count of each linear layer below the head."""
    import torch

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield name, sum(p.numel() for p in module.parameters())


def _matches(requested: str, full: str) -> bool:
    return full == requested or full.endswith(f".{requested}")


def _advice(absent: Sequence[str], linear: dict[str, int]) -> str:
    there = sorted({full.rsplit(".", 1)[-1] for full in linear})
    renamed = [f"{LFM2_NAMES[name]} instead of {name}" for name in absent if LFM2_NAMES.get(name) in there]
    return f"use {', '.join(renamed)}" if renamed else f"its layers are called: {', '.join(there)}"


def _eos_ids(config: dict[str, Any]) -> list[int]:
    ids = config.get("eos_token_id")
    return [int(i) for i in ids] if isinstance(ids, list) else ([] if ids is None else [int(ids)])


def _optional_json(file: Path) -> dict[str, Any]:
    import json

    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _number(value: int | None) -> float | None:
    return None if value is None else float(value)
