"""The recipe of `edgealign advise`: what is wanted of the device, and how to choose among what fits."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.export_recipes import QUANTS
from edgealign.recipe import option

PREFERENCES = ("fidelity", "speed", "memory")


@dataclass(frozen=True, kw_only=True)
class AdviceRecipe:
    """The wishes; one that is none is not asked for."""

    first_token_ms: float | None = option(None, help="the first token may take this long, at most", gt=0, unit="ms")
    decode_tok_s: float | None = option(None, help="tokens per second after it, at least", gt=0, unit="tok/s")
    memory_mib: float | None = option(
        None, help="peak memory, at most; none: all memory of the device", gt=0, unit="MiB"
    )
    kl: float | None = option(None, help="mean KL divergence from torch in 32 bits, at most", gt=0, unit="nat")
    survival: float = option(
        0.9, help="warn where less of a user's change is kept (correlation with torch)", ge=0, le=1,
        source="the goal of 4-bit bundles of trained models",
    )  # fmt: skip
    prompt_tokens: int = option(512, help="length of the prompt", ge=1, unit="tokens", source="llama-bench")
    gen_tokens: int = option(100, help="length of the answer", ge=1, unit="tokens", source="as edgealign bench")
    threads: int = option(0, help="threads that may be used; 0 takes whichever measured number is quickest", ge=0)
    users: int = option(0, help="people who share the device; 0 takes the number of adapters given", ge=0)
    targets: tuple[str, ...] = option(tuple(QUANTS), help="targets to look at", choices=tuple(QUANTS))
    prefer: str = option(
        "fidelity", help="among what fits: least KL (differences below 0.01 nat do not count, the quicker is taken), "
        "most tokens per second, or least memory", choices=PREFERENCES,
    )  # fmt: skip
