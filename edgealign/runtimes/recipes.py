"""The recipe of generation: how the next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

_LFM2 = "sampling recommended on the LFM2 model cards"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy and ignores the filters and the seed."""

    max_tokens: int = option(256, help="stop after this many new tokens", ge=1, unit="tokens")
    temperature: float = option(0.3, help="divides the logits; 0 takes the most likely token", ge=0, source=_LFM2)
    top_k: int = option(0, help="keep the k most likely tokens; 0 keeps all", ge=0)
    top_p: float = option(1.0, help="keep the smallest set with this probability", gt=0, le=1)
    min_p: float = option(0.15, help="drop tokens below this part of the likeliest", ge=0, lt=1, source=_LFM2)
    repetition_penalty: float = option(
        1.05, help="above 1 makes tokens already seen less likely (CTRL, arXiv 1909.05858, section 4.1)", gt=0,
        source=_LFM2,
    )  # fmt: skip
    seed: int = option(0, help="the same seed, prompt and threads give the same text", ge=0)
