"""The recipe of `edgealign bench`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

_PIPETTE = "Liquid's pipette and llama-bench: 5 repetitions after one warm-up"


@dataclass(frozen=True, kw_only=True)
class BenchRecipe:
    """What is timed. Every prompt length is combined with every generation length and thread count."""

    prompt_tokens: tuple[int, ...] = option(
        (512,), help="prompt lengths: prefill speed and time to first token", ge=1, unit="tokens", source="llama-bench"
    )
    gen_tokens: tuple[int, ...] = option(
        (100,), help="tokens decoded after the prompt, one by one", ge=1, unit="tokens",
        source="LFM2 technical report, table 2",
    )  # fmt: skip
    threads: tuple[int, ...] = option((0,), help="thread counts; 0: OMP_NUM_THREADS, or all", ge=0)
    repetitions: int = option(5, help="timed repetitions in each fresh process", ge=2, source=_PIPETTE)
    adapter: bool = option(True, help="also time with the bundle's first user adapter on, its loading and swapping")
    bandwidth: bool = option(True, help="also measure the machine's read bandwidth, which limits decoding")
    pause_s: float = option(0.5, help="rest before each process", ge=0, unit="s")
    timeout_s: float = option(600.0, help="give up on a process after this long", gt=0, unit="s")
    seed: int = option(0, help="seed of the random tokens", ge=0)
