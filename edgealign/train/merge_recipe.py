"""The knobs of `edgealign merge`. Methods and their sources are listed in `edgealign/train/merge.py`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties", "della")


@dataclass(frozen=True, kw_only=True)
class MergeRecipe:
    """How models are merged; for a LoRA into its base only `dtype` and `tolerance` count."""

    method: str = option(
        "linear", choices=METHODS, help="how the models are combined", source="model soups, arXiv 2203.05482"
    )
    weights: tuple[float, ...] = option((), help="one per model; none: all the same, summing to 1")
    density: float = option(
        0.5, gt=0.0, le=1.0, help="share of each task vector kept by ties, dare_ties and della",
        source="mergekit's examples",
    )
    epsilon: float = option(
        0.15, ge=0.0, lt=0.5, help="della: density +- epsilon must lie inside (0, 1)",
        source="mergekit 0.1.5, della_magprune",
    )
    t: float = option(0.5, ge=0.0, le=1.0, help="slerp: 0 is the first model, 1 the second")
    scale: float = option(1.0, gt=0.0, help="factor on the merged task vector (lambda)", source="arXiv 2212.04089")
    seed: int = option(0, ge=0, help="dare_ties and della drop weights at random")
    dtype: str = option(
        "float32",
        choices=("float32", "bfloat16", "keep"),
        help="how the result is stored; the arithmetic is always fp32. keep: as the first model is stored",
        source="bf16 rounds a LoRA's small deltas away; the export quantises anyway",
    )
    tolerance: float = option(1e-4, gt=0.0, help="largest logit difference between adapter attached and merged (fp32)")
    search: bool = option(
        False, help="make several candidates and keep the best on the data",
        source="LFM2 report, arXiv 2511.23404 App. B",
    )
    search_methods: tuple[str, ...] = option(METHODS, choices=METHODS, help="methods that --search tries")
    search_densities: tuple[float, ...] = option(
        (0.3, 0.7), gt=0.0, le=1.0, help="densities that --search tries for ties, dare_ties and della"
    )
    search_weights: tuple[float, ...] = option(
        (0.3, 0.5, 0.7), ge=0.0, le=1.0, help="second model's shares that --search tries for linear and slerp of two"
    )
    search_scales: tuple[float, ...] = option(
        (0.5, 1.0), gt=0.0, source="above 1: extrapolation, arXiv 2410.06293",
        help="scales that --search tries for task_arithmetic; of one model and its base, above 1 goes on past it",
    )
    select: str = option(
        "loss",
        choices=("loss", "accuracy", "judge"),
        help="what decides: held-out loss, ranking accuracy (pairs only), or --judge's mean number on greedy answers "
        "to the rows' prompts; the loss breaks ties",
        source="accuracy moves in steps of 1/rows: too coarse for a small held-out file",
    )
    max_rows: int = option(256, ge=1, unit="rows", help="evaluate on at most so many rows of the data")
    judge_prompts: int = option(64, ge=2, unit="prompts", help="prompts to answer for the judge, at most")
    max_new_tokens: int = option(96, ge=8, unit="tokens", help="longest of these answers")
    max_tokens: int = option(1024, ge=16, unit="tokens", help="longer rows are cut, like in training")
