"""The recipe of `edgealign export`: what the weights become, and which of the gate's tolerances to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgealign.errors import RecipeError
from edgealign.recipe import option
from edgealign.registry import suggest

# Each target's own names; the one in DEFAULT_QUANT is what `auto` means.
QUANTS: Mapping[str, tuple[str, ...]] = {
    "gguf": ("f32", "f16", "q8_0", "q4_0", "q4_k_m"),
    "onnx": ("fp32", "int8", "int4", "int4_k"),
    "executorch": ("fp32", "8da4w"),
}
DEFAULT_QUANT: Mapping[str, str] = {"gguf": "q4_0", "onnx": "int4", "executorch": "8da4w"}
# What can be added to a bundle for another device, and the target whose bundle it needs.
KITS: Mapping[str, str] = {"android": "gguf"}


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """Knobs of an export. The target, the model, its adapters and the calibration text are arguments, not knobs."""

    quant: str = option(
        "auto", choices=(*dict.fromkeys(name for names in QUANTS.values() for name in names), "auto"),
        help="type of the stored weights, by the target's name for it; "
        f"auto is {', '.join(f'{name} ({target})' for target, name in DEFAULT_QUANT.items())}",
        source="4 bits are the smallest and the quickest on a CPU",
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
    threads: int = option(0, help="threads for quantising; 0 takes all", ge=0)
    exact_gate: bool = option(
        True, help="also compare a 32-bit file with torch before quantising, number for number (needs that disk space)"
    )
    verify: tuple[str, ...] = option(
        (), help="fields of the verify recipe to change, as name=value", source="see: edgealign config schema"
    )


def resolve(recipe: ExportRecipe, target: str) -> ExportRecipe:
    """The recipe with the target's own quantisation in place of `auto`.

    Raises:
        RecipeError: the quantisation is another target's.
    """
    if recipe.quant == "auto":
        return replace(recipe, quant=DEFAULT_QUANT[target])
    if recipe.quant not in QUANTS[target]:
        known = ", ".join(QUANTS[target])
        raise RecipeError(recipe.quant, f"is no quantisation of the target {target}", f"choose one of: {known}")
    return recipe


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
