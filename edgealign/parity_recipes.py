"""The recipe of `edgealign verify`: what is run, and every tolerance."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

_MEASURED = "measured on LFM2 with random weights: tiny 1.1e-6, 350M 1.2e-5"
_PUBLISHED = "Q4 exports of LFM2.5 have 0.15 to 0.21, its 350M 0.49"
_RANDOM = "room for random weights, the worst case: Q4_0 of the 350M shape keeps 0.81 and 0.63"
_STARTER = "users fitted on the starter keep 0.97 and more in every 4-bit bundle; random weights keep less (0.63)"
_SD = "standard deviations of the logits"


@dataclass(frozen=True, kw_only=True)
class VerifyRecipe:
    """Gates between a bundle in its own runtime and torch in fp32.

    A file of 32-bit weights must agree number for number. A quantised one must agree as a distribution, and
    its state handling (reset, swap, split prompts) must still be exact.
    """

    threads: int = option(0, help="threads of torch and of the bundle's runtime; 0: OMP_NUM_THREADS, or all", ge=0)
    seed: int = option(0, help="seed of the random prompts", ge=0)
    prompt_lengths: tuple[int, ...] = option(
        (1, 2, 3, 24, 127), help="prompt lengths; some must be below the convolution's width", ge=1, unit="tokens"
    )
    steps: int = option(8, help="tokens fed one by one after a prompt", ge=1, unit="tokens")
    windows: int = option(8, help="text windows for the distribution gates", ge=1)
    window_tokens: int = option(64, help="tokens per text window", ge=2, unit="tokens")

    exact_tolerance: float = option(
        1e-4, help="F32 file, F32 cache: largest logit difference", gt=0, unit="logit", source=_MEASURED
    )
    default_tolerance: float = option(
        1e-2, help="F32 file, the runtime's own F16 cache: largest difference, for logits up to 4, in proportion above",
        gt=0, unit="logit",
        source="measured on trained starters: keys and values rounded in torch alone 0.002; llama.cpp, which rounds "
        "queries and attention weights too, 0.005",
    )
    state_tolerance: float = option(
        0.05, help="quantised file: largest difference between two ways to feed one prompt, in standard "
        "deviations of the logits", gt=0, source="batched and single-token kernels round differently",
    )  # fmt: skip
    rounded_state_tolerance: float = option(
        0.15, help="the same where a program rounds activations to 8 bits in every mode (8da4w)", gt=0,
        source="measured on the starter: 0.053; one flipped rounding of an activation is carried on",
    )
    adapter_factor: float = option(
        100.0, help="an adapter must move the logits by this many tolerances", gt=1, source="own gate"
    )

    rounding_16bit: float = option(0.005, help="16-bit: error of a stored tensor, relative to its size", gt=0)
    rounding_8bit: float = option(
        0.03, help="8-bit: error of a stored tensor, relative to its size", gt=0,
        source="measured: Q8_0 0.006, Q6_K 0.019; another tensor 1.2 and more",
    )  # fmt: skip
    rounding_4bit: float = option(
        0.2, help="4-bit: error of a stored tensor, relative to its size", gt=0,
        source="measured on normal weights: Q4_0 0.087, Q4_K_M 0.072; another tensor 1.2 and more",
    )  # fmt: skip
    same_weights: float = option(
        0.99, help="quantised: correlation of the logits with torch on the same rounded weights", gt=0, lt=1,
        source="measured on LFM2 with random weights: 0.999 and more; a wrong rotary base 0.95",
    )  # fmt: skip
    kl_16bit: float = option(1e-3, help="16-bit: mean KL(torch || bundle)", gt=0, unit="nat")
    kl_8bit: float = option(0.02, help="8-bit: mean KL(torch || bundle)", gt=0, unit="nat")
    kl_4bit: float = option(0.25, help="4-bit: mean KL(torch || bundle)", gt=0, unit="nat", source=_PUBLISHED)
    top1_16bit: float = option(0.99, help="16-bit: same likeliest token where torch is decided", ge=0, le=1)
    top1_8bit: float = option(0.97, help="8-bit: same likeliest token where torch is decided", ge=0, le=1)
    top1_4bit: float = option(0.80, help="4-bit: same likeliest token where torch is decided", ge=0, le=1)
    noise_16bit: float = option(0.005, help="16-bit: noise that makes torch undecided", gt=0, unit=_SD)
    noise_8bit: float = option(0.05, help="8-bit: noise that makes torch undecided", gt=0, unit=_SD)
    noise_4bit: float = option(0.3, help="4-bit: noise that makes torch undecided", gt=0, unit=_SD)
    corr_16bit: float = option(0.999, help="16-bit: mean correlation of the logits", gt=0, lt=1)
    corr_8bit: float = option(0.99, help="8-bit: mean correlation of the logits", gt=0, lt=1)
    corr_4bit: float = option(0.7, help="4-bit: mean correlation of the logits", gt=0, lt=1, source=_RANDOM)
    survival_16bit: float = option(0.995, help="16-bit: correlation of an adapter's change with torch", gt=0, lt=1)
    survival_8bit: float = option(0.95, help="8-bit: correlation of an adapter's change with torch", gt=0, lt=1)
    survival_4bit: float = option(
        0.9, help="4-bit: correlation of an adapter's change with torch", gt=0, lt=1, source=_STARTER
    )
    strength_ratio: float = option(
        1.5, help="quantised: an adapter's effect may be this much larger or smaller than in torch", gt=1
    )
