"""The knobs of `edgealign reward` and `edgealign pairs sample`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

_LFM2 = "LFM2 report, arXiv 2511.23404, as secondary sources give it"


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """A linear reward head on frozen states."""

    valid_fraction: float = option(0.2, gt=0.0, lt=0.9, help="share of the pairs held back; they choose the ridge")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    limit: int | None = option(None, ge=1, unit="rows", help="read no more than this many rows of each file")
    max_tokens: int = option(1024, ge=8, unit="tokens", help="longest conversation; its end is kept")
    threads: int = option(0, ge=0, help="CPU threads; 0: all this process may use")
    seed: int = option(0, ge=0, help="of which pairs are held back")


@dataclass(frozen=True, kw_only=True)
class SampleRecipe:
    """A model's own answers, judged: the best against the worst."""

    samples: int = option(5, ge=1, le=64, help="drawn answers per prompt", source=_LFM2)
    temperature: float = option(0.8, gt=0.0, help="of the drawn answers")
    min_p: float = option(0.1, ge=0.0, lt=1.0, help="of the drawn answers")
    max_new_tokens: int = option(128, ge=8, unit="tokens", help="longest answer; a cut one is left out")
    limit: int = option(2000, ge=1, unit="prompts", help="ask about this many, drawn with the seed")
    margin: float = option(0.0, ge=0.0, help="least gap of the judge's numbers between best and worst")
    threads: int = option(0, ge=0, help="CPU threads; 0: all this process may use")
    seed: int = option(0, ge=0, help="of the drawing of prompts and answers")
