"""The knobs of `edgealign personalize`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

MIN_CHOICES = 4
MAX_CHOICES = 64


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """A per-user LoRA from 4 to 64 choices."""

    map: tuple[str, ...] = option((), help="other column names, each as theirs=ours")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")

    objective: str = option("ln_dpo", choices=("ln_dpo", "dpo"), help="preference loss", source="arXiv 2407.15229")
    beta: float | None = option(
        None, gt=0.0, help="strength of the preference; none: the objective's own default",
        source="5 for ln_dpo: Tulu 3 dpo_norm, LFM2 report table 5",
    )
    rank: int = option(8, ge=1, le=256, help="rank of the LoRA", source="leap-finetune peft_configs.py")
    alpha: int = option(16, ge=1, help="the LoRA's scale is alpha / rank", source="leap-finetune peft_configs.py")
    targets: tuple[str, ...] = option((), help="module names to adapt; none: every linear of the architecture")
    learning_rate: float = option(
        1e-3, gt=0.0, le=1.0, help="AdamW, decays linearly to zero; models of a few million parameters take 1e-2",
        source="a fit has tens of steps, not thousands: five times Liquid's 2e-4 for a LoRA",
    )
    epochs: int = option(6, ge=1, le=100, help="passes over the choices")
    batch_pairs: int = option(8, ge=1, unit="pairs", help="pairs per optimizer step")
    anchor: float = option(
        1.0, ge=0.0, help="weight of the base-answer anchor; 0 turns it off",
        source="BAPO, arXiv 2407.00693, our reading",
    )
    anchor_tokens: int = option(16, ge=1, le=1024, unit="tokens", help="length of the base answers that are anchored")
    chosen_nll: float = option(
        1.0, ge=0.0, help="weight of the chosen answers' own loss: without it a fit lowers what was rejected, and what "
        "was chosen with it", source="iterative reasoning RPO, arXiv 2404.19733: DPO + NLL / n, weights 1 and 1",
    )  # fmt: skip
    prior_strength: float = option(
        8.0, ge=0.0, unit="choices",
        help="the user's delta is scaled by n / (n + this): few choices move a user a little",
        source="planted users: a fit without a prior beats the population only from about 8 choices on",
    )
    held_out: float = option(0.25, gt=0.0, le=0.5, help="share of the choices kept for the check (at least one)")
    max_tokens: int = option(1024, ge=16, unit="tokens", help="longest prompt and answer; answers are cut")
    precision: str = option(
        "auto", choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 where it is multiplied natively and the model is large enough to gain",
    )
    max_grad_norm: float = option(1.0, gt=0.0, help="gradients are clipped to this norm")
    threads: int = option(0, ge=0, help="CPU threads; 0: all this process may use. Results repeat for one number")
    seed: int = option(0, ge=0, help="of the LoRA's random half and the order of the choices")
