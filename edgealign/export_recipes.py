"""The recipe of `edgealign export`: what the weights become, and which of the gate's tolerances to change."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

QUANTS = ("f32", "f16", "q8_0", "q4_0", "q4_k_m")


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """Knobs of an export. The target, the model, its adapters and the calibration text are arguments, not knobs."""

    quant: str = option(
        "q4_0", help="type of the stored weights", choices=QUANTS,
        source="q4_0 is the smallest and the quickest on a CPU",
    )
    adapter_type: str = option(
        "auto", help="type of the adapters' weights; auto is f32 beside an f32 model and f16 beside any other",
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
