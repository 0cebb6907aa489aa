"""The knobs of `edgealign eval adapters`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """Answers to unseen prompts with and without each user's adapter, in torch and in the shipped runtime."""

    prompts: int = option(32, ge=1, help="unseen prompts")
    samples: int = option(1, ge=1, help="sampled answers per prompt and user")
    choices: int = option(48, ge=1, help="unseen choices per user, at most")
    max_tokens: int = option(1024, ge=16, unit="tokens", help="longest prompt + answer of a choice")
    max_new_tokens: int = option(160, ge=1, unit="tokens", help="longest answer")
    temperature: float = option(0.7, ge=0.0, help="sampling temperature; 0 is greedy")
    top_p: float = option(0.95, gt=0.0, le=1.0, help="nucleus")
    bootstrap: int = option(2000, ge=100, help="resamples of the prompts for the 95 % intervals")
    examples: int = option(2, ge=0, help="prompts whose answers are printed in the report")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of sampling and resampling")
