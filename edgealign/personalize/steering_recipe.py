"""The knobs of `edgealign eval steering` and of `personalize --method linear`. Light: importing this loads no numpy."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

STRENGTH = 2.0  # demo.py of arXiv 2401.11458; its other programs take 3 and 5
PLAUSIBLE = 0.8  # what its model.py uses everywhere
# Its programs draw and mask at 0.5, which leaves a sharp distribution one or two tokens. In a trial on ten prompts with
# an earlier build of the starter, formal and cheerful answers moved further at 1.
MASK_TEMPERATURE = 1.0
MAX_STRENGTH = 20.0


@dataclass(frozen=True, kw_only=True)
class LinearRecipe:
    """A user as a stated preference."""

    strength: float = option(
        STRENGTH, ge=0, le=MAX_STRENGTH, help="how far the preference is followed; 0: as far as a prompt does",
        source="demo.py of arXiv 2401.11458; docs/results/steering",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SteeringRecipe:
    """Answers in every style that the starter knows, at several strengths of linear alignment."""

    strengths: tuple[float, ...] = option(
        (0.0, 0.5, 1.0, 2.0, 3.0, 5.0), ge=0, le=MAX_STRENGTH, help="of linear alignment; 0 is prompting, always asked"
    )
    styles: tuple[str, ...] = option(
        (), help="which preferences: short, long, bulleted, formal, casual, cheerful, with-a-question; none: all"
    )
    prompts: int = option(40, ge=2, le=40, help="how many of the forty fixed prompts, evenly spread")
    plausible: float = option(
        PLAUSIBLE, gt=0.0, le=1.0, help="probability of the set that tokens are taken from", source="arXiv 2401.11458"
    )
    mask_temperature: float = option(
        MASK_TEMPERATURE, gt=0.0, le=100.0, help="of that set", source="tried on ten prompts; released: 0.5"
    )
    candidates: int = option(0, ge=0, le=64, help="also rank so many drawn answers by REAR; 0: no")
    weight: float = option(20.0, ge=0.0, le=1e6, help="of the preference in REAR", source="REAR, arXiv 2606.30339")
    temperature: float = option(0.7, gt=0.0, help="of REAR's candidates; the answers of the sweep are greedy")
    max_new_tokens: int = option(96, ge=8, unit="tokens", help="longest answer")
    bootstrap: int = option(2000, ge=100, help="resamples of the prompts for the 95 % intervals")
    examples: int = option(3, ge=0, help="prompts whose answers are printed in the report")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of REAR's candidates and of resampling")
