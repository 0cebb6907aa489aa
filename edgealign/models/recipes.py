"""The recipes of `edgealign init`, a model with random weights, and `edgealign package`, a finished one to ship."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.models.shapes import SHAPES
from edgealign.recipe import option


@dataclass(frozen=True, kw_only=True)
class InitRecipe:
    """Knobs of a new model. The text for the tokenizer is an argument of the stage, not a knob."""

    shape: str = option("tiny", help="named shape of the model", choices=tuple(SHAPES))
    seed: int = option(0, help="seed of the random weights", ge=0)
    vocab_size: int | None = option(
        None, help="rows of the embedding; none keeps the shape's", ge=300, le=1_000_000, unit="tokens"
    )
    context: int | None = option(
        None, help="longest context; none keeps the shape's", ge=16, le=1_000_000, unit="tokens"
    )
    dtype: str = option(
        "auto", help="type of the stored weights; auto is float32 below 50 M parameters and bfloat16 above",
        choices=("auto", "float32", "bfloat16"),
    )
    tokenizer_bytes: int = option(
        20_000_000, help="how much of the text the tokenizer is trained on", gt=0, unit="bytes"
    )
    norm_noise: float = option(
        0.0, help="noise on norms and biases, which are otherwise all alike; for tests of exporters", ge=0, le=1
    )


@dataclass(frozen=True, kw_only=True)
class PackageRecipe:
    """What a model must be to be shipped inside edgealign."""

    limit_mib: float = option(24.0, gt=0.0, unit="MiB", help="the whole folder may be this large")
    max_divergence: float = option(
        0.01, gt=0.0, unit="nats",
        help="mean KL divergence of the next token, after the weights are rounded to bfloat16, at most",
    )
    trained_on: str = option("", help="the machine that it was trained on, for the model card")
