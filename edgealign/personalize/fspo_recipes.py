"""The knobs of `edgealign data shots` and `edgealign personalize --method fspo`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

_FSPO = "FSPO, arXiv 2502.19312"


@dataclass(frozen=True, kw_only=True)
class ShotsRecipe:
    """Meta-training data: every prompt begins with other choices of the same person."""

    map: tuple[str, ...] = option((), help="other column names, each as theirs=ours")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    shots: tuple[int, ...] = option(
        (0, 1, 2, 4, 8), ge=0, le=32, unit="choices",
        help="how many choices a prompt may begin with, drawn for every pair; 0 keeps the model good for strangers",
    )
    reshuffles: int = option(
        8, ge=1, le=100, help="times each person's choices are shuffled and cut into windows",
        source="FSPO's code: 2 (shots + 1)",
    )
    describe: bool = option(
        False, help="answers begin with a sentence about the person's taste, which their choices show", source=_FSPO
    )
    max_tokens: int = option(
        1024, ge=32, unit="tokens", help="longest prompt with its longer answer; the oldest shots are left out to fit"
    )
    valid: float = option(0.1, ge=0.0, lt=1.0, help="share of the people whose pairs go to valid.jsonl")
    seed: int = option(0, ge=0, help="of the shuffling, the number of shots and the split")


@dataclass(frozen=True, kw_only=True)
class FspoRecipe:
    """A user as the beginning of a prompt."""

    map: tuple[str, ...] = option((), help="other column names, each as theirs=ours")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    shots: int = option(8, ge=1, le=32, unit="choices", help="in a prompt: the newest, at most so many", source=_FSPO)
    prefix_tokens: int = option(
        1024, ge=32, unit="tokens", help="longest prefix; the oldest choices are left out to fit"
    )
    held_out: float = option(0.25, gt=0.0, le=0.5, help="share of the choices kept for the check (at least one)")
    max_tokens: int = option(
        1024, ge=16, unit="tokens", help="longest question and answer without the prefix; answers are cut"
    )
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
