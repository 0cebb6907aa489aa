"""The knobs of `edgealign sft` and `edgealign dpo`. Light: importing this loads no torch.

Both stages train with the same engine, so they share `TrainRecipe`; each overrides the defaults that its own
literature gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from edgealign.objectives.table import trainable, trainable_name
from edgealign.recipe import option

_LFM2 = "LFM2 report, arXiv 2511.23404"
_LEAP = "leap-finetune peft_configs.py"
SMALL_MODEL = 100_000_000  # parameters; the starter has 6 million, the smallest model of the LFM2 report 350
# ln_dpo, the starter, 560 pairs of UKPConvArg1 in 35 steps: at 8e-7 the margin on 50 held-out pairs grew by 0.002 nats
# per token and their ranking stayed at 70 %; at 5e-6 by 0.012; at 2e-5 by 0.036, 70 to 74 %, chosen answers 0.014 down.
SMALL_MODEL_RATE = 2e-5


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """What every training stage can be told."""

    # data
    map: tuple[str, ...] = option((), help="other column names, each as theirs=ours")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    limit: int | None = option(None, ge=1, unit="rows", help="read no more than this many rows of each file")
    max_tokens: int = option(1024, ge=8, unit="tokens", help="longest example")
    valid_fraction: float = option(
        0.05, ge=0.0, lt=1.0, help="share of the examples held out for the evaluation before and after"
    )
    valid_limit: int = option(200, ge=1, unit="examples", help="evaluate on no more than this many")

    # optimisation
    epochs: int = option(1, ge=1, help="passes over the data")
    max_steps: int = option(0, ge=0, unit="steps", help="stop after this many optimizer steps; 0: after all epochs")
    batch_size: int = option(16, ge=1, unit="examples", help="examples per optimizer step")
    learning_rate: float | None = option(
        None, gt=0.0, le=1.0, help="peak; none: the stage's default, which is larger with a LoRA"
    )
    schedule: str = option(
        "cosine", choices=("cosine", "linear", "constant", "wsd"), source=_LFM2,
        help="how the learning rate decays; wsd: warm-up, then constant, then a linear decay over decay_share",
    )
    decay_share: float = option(0.3, gt=0.0, le=1.0, help="share of the steps in which wsd decays")
    final_lr_share: float = option(0.1, ge=0.0, le=1.0, help="the decay ends at this share of the peak", source=_LFM2)
    warmup_share: float = option(
        0.1, ge=0.0, lt=1.0, help="share of the steps with a rising learning rate", source="Tulu 3"
    )
    optimizer: str = option(
        "adamw", choices=("adamw", "muon"), source="torch.optim.Muon, step sizes as in arXiv 2502.16982",
        help="muon: orthogonalised momentum for the matrices, AdamW for the rest; gains in training from scratch",
    )
    weight_decay: float = option(0.0, ge=0.0, help="AdamW's decoupled weight decay")
    adam_beta2: float = option(0.999, gt=0.0, lt=1.0, help="AdamW's second-moment decay; beta1 is 0.9")
    max_grad_norm: float = option(1.0, gt=0.0, help="gradients are clipped to this norm", source=_LFM2)
    seed: int = option(0, ge=0, help="of the order of the data, the held-out part and the LoRA's random half")

    # LoRA
    lora: bool = option(False, help="train a LoRA instead of all weights; it is merged into what is published")
    rank: int = option(8, ge=1, le=1024, help="rank of the LoRA", source=_LEAP)
    alpha: float = option(16.0, gt=0.0, help="the LoRA's scale is alpha / rank", source=_LEAP)
    lora_dropout: float = option(0.0, ge=0.0, lt=1.0, help="dropout before the LoRA; 0 is fastest")
    targets: tuple[str, ...] = option((), help="module names to adapt; none: every linear layer of the architecture")
    save_adapter: bool = option(False, help="also keep the LoRA itself, below lora/ in the published model")

    # machine
    precision: str = option(
        "auto", choices=("auto", "float32", "bfloat16"), source="measured, see train/precision.py",
        help="of the arithmetic; auto: bfloat16 where it is multiplied natively and the model is large enough to gain",
    )
    qat: str = option(
        "none", choices=("none", "q4_0"), source="straight-through estimator, arXiv 1308.3432",
        help="quantisation-aware: round the linear layers to the 4-bit grid of the export while training",
    )
    save_dtype: str = option(
        "auto", choices=("auto", "float32", "bfloat16"), help="of the published weights; auto: as the input model's"
    )
    tokens_per_pass: int = option(
        0, ge=0, unit="tokens",
        help="tokens in one forward pass, of which a step takes many; 0: 2048, with a LoRA as few as cost no time",
    )
    gradient_checkpointing: bool = option(False, help="compute activations twice to save memory")
    threads: int = option(
        0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all. Results repeat bit by bit for one number of threads"
    )
    save_every_s: float = option(120.0, ge=0.0, unit="s", help="seconds between checkpoints; 0: no checkpoints by time")
    save_every_steps: int = option(0, ge=0, unit="steps", help="steps between checkpoints; 0: none by steps")

    @property
    def peak_learning_rate(self) -> float:
        """3e-5 for all weights (LFM2 report), 2e-4 for a LoRA (Liquid's guidance)."""
        return self.learning_rate or (2e-4 if self.lora else 3e-5)

    def for_model(self, n_parameters: int) -> Self:
        """This recipe with the defaults filled in that depend on a model's size; 0: unknown."""
        return self


@dataclass(frozen=True, kw_only=True)
class SftRecipe(TrainRecipe):
    """Supervised fine-tuning on conversations, completions or plain text."""

    weight_decay: float = option(0.1, ge=0.0, help="AdamW's decoupled weight decay", source=_LFM2)
    adam_beta2: float = option(0.95, gt=0.0, lt=1.0, help="AdamW's second-moment decay; beta1 is 0.9", source=_LFM2)

    # curriculum
    order: str = option(
        "shuffled", choices=("shuffled", "easy_to_hard", "hard_to_easy"), source="easy_to_hard: " + _LFM2,
        help="of the examples within an epoch, by a difficulty that judges score; hard_to_easy is the control",
    )
    difficulty: str = option(
        "loss", choices=("loss", "success"),
        help="loss: the judges' mean loss on the answer; success: the share of judges that do not get it right",
    )
    success_accuracy: float = option(
        0.5, gt=0.0, le=1.0,
        help="a judge gets an answer right when its first guess is right for this share of the answer's tokens",
    )
    mixing: float = option(
        0.1, ge=0.0, le=1.0,
        help="share of chance in an example's place, so that a batch is not of one kind; 0: strict order, 1: shuffled",
    )
    curriculum_epochs: int = option(0, ge=0, help="order only the first so many epochs and shuffle the rest; 0: all")


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(TrainRecipe):
    """Next-token training on plain text, in rows of one length."""

    max_tokens: int = option(512, ge=8, unit="tokens", help="length of a row; documents are cut where a row ends")
    batch_size: int = option(16, ge=1, unit="rows", help="rows per optimizer step")
    valid_fraction: float = option(0.01, ge=0.0, lt=1.0, help="share of the tokens held out, as whole documents")
    valid_limit: int = option(128, ge=1, unit="rows", help="evaluate on no more than this many rows")
    total_tokens: int = option(
        0, ge=0, unit="tokens", help="learn from this many tokens, over as many epochs as that takes; 0: see --epochs"
    )
    eval_every_tokens: int = option(
        1_000_000, ge=0, unit="tokens", help="evaluate on the held-out rows every so many tokens; 0: only at the ends"
    )
    optimizer: str = option(
        "muon", choices=("adamw", "muon"), source="measured, see docs/results/starter.md",
        help="muon: orthogonalised momentum for the matrices, AdamW for the rest",
    )
    schedule: str = option(
        "wsd", choices=("cosine", "linear", "constant", "wsd"), source="MiniCPM, arXiv 2404.06395",
        help="how the learning rate decays; wsd: warm-up, then constant, then a linear decay over decay_share",
    )
    warmup_share: float = option(0.02, ge=0.0, lt=1.0, help="share of the steps with a rising learning rate")
    final_lr_share: float = option(0.05, ge=0.0, le=1.0, help="the decay ends at this share of the peak")
    weight_decay: float = option(0.1, ge=0.0, help="decoupled weight decay", source=_LFM2)
    adam_beta2: float = option(0.95, gt=0.0, lt=1.0, help="AdamW's second-moment decay; beta1 is 0.9", source=_LFM2)
    tokens_per_pass: int = option(
        4096, ge=16, unit="tokens", help="tokens in one forward pass; a step takes as many passes as it needs"
    )
    compile: str = option(
        "auto", choices=("auto", "on", "off"), source="measured, see docs/results/starter.md",
        help="compile the model with TorchInductor; auto: where a C++ compiler or a GPU is there and the run is long",
    )

    @property
    def peak_learning_rate(self) -> float:
        """5e-3 for a small model from scratch (measured: benchmarks/starter_sweep.py, muon, 6 to 8 M parameters)."""
        return self.learning_rate or (1e-3 if self.lora else 5e-3)


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(PretrainRecipe):
    """Next-token training with a teacher's top K beside the text."""

    top_k: int = option(32, ge=1, le=1024, unit="tokens", help="tokens of the teacher kept per position", source=_LFM2)
    temperature: float = option(
        1.0, gt=0.0, le=20.0, help="of the part inside the top K; which mass lies inside is never tempered"
    )
    ce_weight: float = option(0.5, ge=0.0, le=1.0, help="share of cross-entropy in the loss, beside distillation")


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe(TrainRecipe):
    """Preference training on pairs."""

    objective: str = option(
        "ln_dpo", choices=trainable(), resolve=trainable_name, help="the loss; docs/objectives.md describes them",
        source="arXiv 2407.15229; Tulu 3 dpo_norm",
    )
    beta: float | None = option(
        None, gt=0.0, help="strength; none: the objective's own. One on the scale of another reduction is refused",
        source="5 for ln_dpo: Tulu 3 and LFM2 report table 5; 0.1 for dpo",
    )
    settings: tuple[str, ...] = option(
        (), help="other numbers of the objective, each as name=number; edgealign objectives KEY has names and ranges"
    )

    online_samples: int = option(
        2, ge=2, le=16, help="answers that the model draws to each prompt of a step, for objectives that learn on them"
    )
    online_tokens: int = option(64, ge=1, unit="tokens", help="longest answer drawn while training")

    @property
    def peak_learning_rate(self) -> float:
        """8e-7 for all weights (LFM2 report table 5, models of 350M and more); 5e-5 for a LoRA, which needs about 50
        times more. See `for_model`."""
        return self.learning_rate or (5e-5 if self.lora else 8e-7)

    def for_model(self, n_parameters: int) -> Self:
        """A small model hardly moves at 8e-7: with all weights, unless told otherwise, it takes SMALL_MODEL_RATE."""
        if self.learning_rate or self.lora or not 0 < n_parameters < SMALL_MODEL:
            return self
        return replace(self, learning_rate=SMALL_MODEL_RATE)


@dataclass(frozen=True, kw_only=True)
class OwnAnswersRecipe:
    """A model's own answers, the best of a few that pass the rules."""

    limit: int = option(2000, ge=1, unit="prompts", help="ask about this many, drawn with the seed")
    samples: int = option(2, ge=0, le=64, help="drawn answers per prompt, beside the greedy one")
    temperature: float = option(0.7, gt=0.0, help="of the drawn answers")
    second_turns: float = option(0.25, ge=0.0, le=1.0, help="share of the conversations that go on with another prompt")
    max_new_tokens: int = option(96, ge=8, unit="tokens", help="longest answer; one that is cut does not pass")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of the drawing of prompts and answers")
