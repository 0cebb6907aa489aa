"""The knobs of `edgealign personalize`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

MIN_CHOICES = 4
MAX_CHOICES = 64
# Twenty planted users of 8 choices on the starter's basis: 0.5, 1, 1.5 and 2 move answers by 0.13, 0.35, 0.70 and 1.15
# deviations of their taste, for 0.03, 0.14, 0.41 and 0.89 nats a token (docs/results/carriers).
TASTE, MAX_TASTE = 1.0, 2.0


@dataclass(frozen=True, kw_only=True)
class LoraFitRecipe:
    """How a LoRA is fitted to a few pairs."""

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
    max_tokens: int = option(1024, ge=16, unit="tokens", help="longest prompt and answer; answers are cut")
    precision: str = option(
        "auto", choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 where it is multiplied natively and the model is large enough to gain",
    )
    max_grad_norm: float = option(1.0, gt=0.0, help="gradients are clipped to this norm")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all. Results repeat for one number")
    seed: int = option(0, ge=0, help="of the LoRA's random half and the order of the choices")


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(LoraFitRecipe):
    """A per-user LoRA from 4 to 64 choices."""

    map: tuple[str, ...] = option((), help="other column names, each as theirs=ours")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    prior_strength: float = option(
        8.0, ge=0.0, unit="choices",
        help="the user's delta is scaled by n / (n + this): few choices move a user a little",
        source="planted users: a fit without a prior beats the population only from about 8 choices on",
    )
    held_out: float = option(0.25, gt=0.0, le=0.5, help="share of the choices kept for the check (at least one)")


@dataclass(frozen=True, kw_only=True)
class LoraBasisRecipe(LoraFitRecipe):
    """A LoRA for each direction of a basis, fitted as a person's is."""

    rank: int = option(4, ge=1, le=64, help="of one LoRA; a user's has this times the directions of the basis")
    alpha: int = option(8, ge=1, help="a LoRA's scale is alpha / rank", source="leap-finetune peft_configs.py")
    pairs: int = option(160, ge=4, help="pairs of a direction: the prompts whose answers differ most in it")
    epochs: int = option(2, ge=1, le=100, help="passes over the pairs")


@dataclass(frozen=True, kw_only=True)
class StartRecipe:
    """Where new users' LoRAs begin, from several users'."""

    rank: int = option(8, ge=1, le=256, help="of the start; the LoRAs that begin there have the same")


@dataclass(frozen=True, kw_only=True)
class DirectionRecipe:
    """A user as a direction in the states, from 4 to 64 choices."""

    map: tuple[str, ...] = option((), help="other column names, each as theirs=ours")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    layer: int = option(0, ge=0, help="of a direction: it is added behind this one, counted from 0; 0: the middle one")
    strength: float = option(
        1.0, gt=0.0, le=100.0, help="of a direction or a mix; a direction's 1: as far as what was chosen lies away",
        source="arXiv 2312.06681: multipliers around 1",
    )
    prior_strength: float = option(
        8.0, ge=0.0, unit="choices", help="the direction is scaled by n / (n + this)", source="as for a LoRA"
    )
    held_out: float = option(0.25, gt=0.0, le=0.5, help="share of the choices kept for the check (at least one)")
    max_tokens: int = option(1024, ge=16, unit="tokens", help="longest prompt and answer; answers are cut")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")


@dataclass(frozen=True, kw_only=True)
class BasisRecipe:
    """A reward basis from many users' choices."""

    rank: int = option(8, ge=1, le=64, help="numbers of a user", source="LoRe, arXiv 2504.14439: 4 to 16 at this size")
    components: int = option(128, ge=2, help="main components of the features that are kept")
    traits: tuple[str, ...] = option((), help="attributes of texts that a user's words may name; none: all")
    max_tokens: int = option(512, ge=8, unit="tokens", help="of a prompt its end, of an answer its beginning")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of who is held out")


@dataclass(frozen=True, kw_only=True)
class EmbeddingRecipe:
    """One user as weights on a basis, from 1 to 64 choices."""

    map: tuple[str, ...] = option((), help="other column names, each as theirs=ours")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    max_tokens: int = option(512, ge=8, unit="tokens", help="of a prompt its end, of an answer its beginning")
    prior_precision: float = option(
        1.0, gt=0.0, help="of the prior, whose scale the basis learned: higher moves a user less"
    )
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")


@dataclass(frozen=True, kw_only=True)
class LoraMixRecipe(EmbeddingRecipe):
    """One user as weights on LoRAs, from 1 to 64 choices."""

    strength: float = option(
        0.5, gt=0.0, le=4.0, help="of the mix: the sum of LoRAs is scaled by this",
        source="docs/results/carriers: 0.54 deviations of a taste for 0.14 nats a token; 1 loops",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CandidatesRecipe:
    """Several answers to each prompt, most of them under a request for a style."""

    prompts: int = option(240, ge=4, help="prompts, drawn with the seed")
    answers: int = option(8, ge=2, le=64, help="drawn answers per prompt; doubles and those that were cut are left out")
    styled: float = option(0.75, ge=0.0, le=1.0, help="share of the answers that a request for a style was made for")
    longest_prompt: int = option(600, ge=1, unit="characters", help="longer prompts are left out")
    temperature: float = option(0.9, gt=0.0, help="of the drawn answers")
    min_p: float = option(0.05, ge=0.0, lt=1.0, help="of the drawn answers")
    max_new_tokens: int = option(128, ge=4, unit="tokens", help="longest answer; a cut one is left out")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of the prompts, the requests and the answers")


@dataclass(frozen=True, kw_only=True)
class TastesRecipe:
    """Choices of simulated users between a model's answers."""

    population: str = option(
        "signed-0.1", help="kind of taste: Dirichlet magnitudes with or without signs (0.1: distinct, 10: users alike)"
    )
    traits: tuple[str, ...] = option(
        ("length", "bullets", "formality", "exclamations", "questions"),
        help="attributes that tastes are made of; an empty list: all that vary in the answers",
    )
    users: int = option(600, ge=2, help="simulated users")
    pairs: int = option(45, ge=2, help="choices of each", source="PersonalLLM's protocol, arXiv 2409.20296")
    flips: float = option(0.1, ge=0.0, lt=0.5, help="share of choices that are the wrong way round")
    seed: int = option(0, ge=0, help="of the users and what they are shown")


@dataclass(frozen=True, kw_only=True)
class FewShotRecipe:
    """How well a few choices tell a user, for users whose taste is planted."""

    populations: tuple[str, ...] = option(
        ("signed-0.1", "positive-0.1", "positive-10", "targets"),
        help="kinds of taste: Dirichlet magnitudes with or without signs (10: users alike), or a point to be near to",
    )
    heads: tuple[str, ...] = option(("lore", "lore-released"), help="ways to learn a user on the same features")
    traits: tuple[str, ...] = option((), help="attributes that tastes are made of; none: all that vary in the pool")
    flips: float = option(0.1, ge=0.0, lt=0.5, help="share of choices that are the wrong way round")
    users: int = option(1000, ge=10, help="seen users, who teach what users have in common")
    pairs: int = option(45, ge=4, help="choices of a seen user", source="PersonalLLM's protocol, arXiv 2409.20296")
    new_users: int = option(100, ge=10, help="unseen users")
    asked: int = option(100, ge=10, help="held-out pairs of a user, without noise")
    seen_prompts: float = option(0.6, gt=0.0, lt=1.0, help="share of the prompts that choices are made on")
    components: int = option(128, ge=2, help="main components of the features that are kept")
    rank: int = option(8, ge=1, help="numbers of a user")
    seeds: int = option(2, ge=1, help="populations, splits of the prompts and users are drawn this often")
    prompted: int = option(
        24, ge=0, help="unseen users whose choices are also tried as a prompt of the model as it is; 0: none"
    )
    drawn: int = option(8, ge=2, help="plain answers per prompt to choose from (best of n)")
    drawn_prompts: int = option(24, ge=2, help="unseen prompts that answers are drawn for")
    strengths: tuple[float, ...] = option((1.0, 2.0, 4.0), help="of the tilt of the next token (tilt.py)")
    temperature: float = option(0.9, gt=0.0, help="of those answers")
    max_new_tokens: int = option(96, ge=4, unit="tokens", help="longest of those answers")
    bootstrap: int = option(2000, ge=100, help="resamples of users for the 95 % intervals")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of everything")
