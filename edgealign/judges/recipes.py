"""The knobs of `edgealign reward` and `edgealign pairs sample | filter | revise`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

_LFM2 = "LFM2 report, arXiv 2511.23404, as secondary sources give it"


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """A linear reward head on frozen states."""

    valid_fraction: float = option(0.2, gt=0.0, lt=0.9, help="share of the pairs held back, whole prompts")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    limit: int | None = option(None, ge=1, unit="rows", help="read no more than this many rows of each file")
    max_tokens: int = option(1024, ge=8, unit="tokens", help="longest conversation; its end is kept")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
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
    rso: int = option(
        0, ge=0, le=64, help="keep so many of the candidates by rejection sampling before pairing; 0: all",
        source="RSO, arXiv 2309.06657: 8 of 64",
    )
    rso_beta: float = option(0.5, gt=0.0, help="of rejection sampling, in the unit of the judge's numbers")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of the drawing of prompts and answers")


@dataclass(frozen=True, kw_only=True)
class FilterRecipe:
    """Pairs as several judges see them. Shares are of the whole file; 0 leaves a rule out."""

    flip: float = option(0.0, ge=0.0, lt=0.5, help="turn round this share, the weakest, where judges say the opposite")
    drop_weak: float = option(0.0, ge=0.0, lt=1.0, help="leave out this share, the nearest to a tie")
    drop_unsure: float = option(0.0, ge=0.0, lt=1.0, help="leave out this share, where judges differ most")
    longest_ratio: float = option(0.0, ge=0.0, help="leave out pairs whose one answer is so many times longer")
    soften: bool = option(
        False, help="give each pair epsilon, the chance that judges give its label to be wrong: --objective rosepo",
        source="soft labels, arXiv 2401.06080",
    )
    easy_first: bool = option(False, help="order by strength, the clearest pairs first: a curriculum for one epoch")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")


@dataclass(frozen=True, kw_only=True)
class ReviseRecipe:
    """Chosen answers, minimally revised by a stronger model (CLAIR)."""

    limit: int = option(2000, ge=1, unit="rows", help="revise so many, from the first")
    max_new_tokens: int = option(512, ge=8, unit="tokens", help="longest revision")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
