"""The recipe of `edgealign export`: what the weights become, and which of the gate's tolerances to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgealign.errors import RecipeError
from edgealign.recipe import option
from edgealign.registry import suggest
from edgealign.tensor_types import TYPES, UNMIXED, Mixture, parse_groups

# Each target's own names; the one in DEFAULT_QUANT is taken where none is named.
QUANTS: Mapping[str, tuple[str, ...]] = {
    "gguf": ("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_0", "q4_k_s", "q4_k_m"),
    "onnx": ("fp32", "int8", "int4", "int4_k"),
    "executorch": ("fp32", "8da4w"),
}
AUTO = "auto"
DEFAULT_QUANT: Mapping[str, str] = {"gguf": "q4_0", "onnx": "int4", "executorch": "8da4w"}
# What can be added to a bundle for another device, and the target whose bundle it needs.
KITS: Mapping[str, str] = {"android": "gguf"}


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """Knobs of an export. The target, the model, its adapters and the calibration text are arguments, not knobs."""

    quant: str = option(
        "default", choices=(*dict.fromkeys(name for names in QUANTS.values() for name in names), "default", AUTO),
        help="type of the stored weights, by the target's name for it; "
        f"default is {', '.join(f'{name} ({target})' for target, name in DEFAULT_QUANT.items())}; "
        "auto (gguf) measures mixtures of types on this machine and takes the fastest within kl_budget",
        source="4 bits are the smallest and the quickest on a CPU",
    )
    head_type: str | None = option(
        None, choices=tuple(TYPES), help="gguf: type of the head, which with tied weights is the embedding too; none: "
        "the quantisation's own (q6_k beside 4 bits)",
    )  # fmt: skip
    tensor_types: tuple[str, ...] = option(
        (), help="gguf: groups stored in another type, as group=type; groups: attn, conv, ffn_down, ffn_up; types: "
        f"{', '.join(TYPES)} (the K types need rows of a multiple of 256)",
    )  # fmt: skip
    kl_budget: float = option(
        0.1, help="auto: the most that the choice may cost, mean KL(torch || file) over the built-in text", ge=0,
        unit="nat", source="own: Q4 exports of LFM2.5 lose 0.15 to 0.21, 8-bit ones 0.002 to 0.008",
    )  # fmt: skip
    search_prompt: int = option(
        512, help="auto: length of the prompt that is timed", ge=1, unit="tokens", source="llama-bench"
    )
    search_gen: int = option(64, help="auto: tokens decoded after it, whose speed decides", ge=1, unit="tokens")
    search_repetitions: int = option(
        5, help="auto: timed repetitions in each process of the last round", ge=2, source="as edgealign bench"
    )
    adapter_type: str = option(
        "auto", help="type of the adapters' weights; auto is f16 beside a GGUF model of 16 bits and less, else f32",
        choices=("auto", "f32", "f16"),
    )
    context: int | None = option(
        None, help="context length written to the file; none keeps the model's", ge=16, unit="tokens"
    )
    calibration_tokens: int = option(
        32_768, help="how much of the calibration text is read for the importance matrix", ge=1, unit="tokens"
    )
    calibration_window: int = option(512, help="tokens per calibration window", ge=2, unit="tokens")
    threads: int = option(0, help="threads for quantising, and for auto's timing; 0 takes all", ge=0)
    exact_gate: bool = option(
        True, help="also compare a 32-bit file with torch before quantising, number for number (needs that disk space)"
    )
    verify: tuple[str, ...] = option(
        (), help="fields of the verify recipe to change, as name=value", source="see: edgealign config schema"
    )


def resolve(recipe: ExportRecipe, target: str) -> ExportRecipe:
    """The recipe with the target's own quantisation in place of `default`; `auto` stays, for the program to search.

    Raises:
        RecipeError: the quantisation is another target's, or types that cannot stand together.
    """
    known = ", ".join(QUANTS[target])
    if recipe.quant == "default":
        recipe = replace(recipe, quant=DEFAULT_QUANT[target])
    mixed = recipe.head_type is not None or bool(recipe.tensor_types)
    if target != "gguf" and (mixed or recipe.quant == AUTO):
        named = AUTO if recipe.quant == AUTO else "head_type" if recipe.head_type else "tensor_types"
        raise RecipeError(named, f"is for gguf, the types of {target} come whole", f"choose a quant: {known}")
    if recipe.quant == AUTO:
        if mixed:
            raise RecipeError(AUTO, "searches head_type and tensor_types itself", "name a quant, or leave them out")
        return recipe
    if recipe.quant not in QUANTS[target]:
        raise RecipeError(recipe.quant, f"is no quantisation of the target {target}", f"choose one of: {known}")
    if mixed and recipe.quant in UNMIXED:
        raise RecipeError(recipe.quant, "takes no head_type and no tensor_types", "mix on q8_0 or on fewer bits")
    groups = tuple(f"{group}={kind}" for group, kind in parse_groups(recipe.tensor_types).items())
    return replace(recipe, tensor_types=groups)


def check_kit(kit: str | None, target: str) -> None:
    """Refuse a kit that does not exist, or that goes with another target.

    Raises:
        RecipeError: both are named.
    """
    if kit is None:
        return
    if kit not in KITS:
        raise RecipeError(kit, f"is no kit{suggest(kit, KITS)}", f"choose one of: {', '.join(KITS)}")
    if KITS[kit] != target:
        raise RecipeError(
            kit, f"is a kit for the target {KITS[kit]}, not for {target}", f"export with --target {KITS[kit]}"
        )


def mixture_of(recipe: ExportRecipe) -> Mixture:
    """What a resolved recipe stores, in one name."""
    return Mixture(recipe.quant, recipe.head_type, recipe.tensor_types)


def check_device(recipe: ExportRecipe, device: str) -> None:
    """A device is only asked for by a search.

    Raises:
        RecipeError: the quantisation is settled.
    """
    if recipe.quant != AUTO:
        raise RecipeError(device, f"is a device, and quant {recipe.quant} searches nothing", "add --quant auto")
