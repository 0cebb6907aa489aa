"""The knobs of `edgealign eval language | chat | preferences`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

_ISSUE = "the starter model's promise"
_LFM2 = "sampling recommended on the LFM2 model cards"


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """Held-out likelihood of models beside n-gram baselines."""

    map: tuple[str, ...] = option((), help="other column names, each as theirs=ours")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    limit: int | None = option(None, ge=1, unit="rows", help="read no more than this many rows of each file")
    max_tokens: int = option(512, ge=8, unit="tokens", help="documents are cut into pieces of this length")
    valid_tokens: int = option(200_000, ge=100, unit="tokens", help="held-out tokens to predict, at most")
    order: int = option(5, ge=2, le=8, help="of the Kneser-Ney baseline; shorter where the vocabulary is too large")
    points: int = option(6, ge=1, le=20, help="training sizes at which the baseline is computed, each twice the last")
    must_beat: str = option(
        "ngram", choices=("ngram", "unigram", "nothing"),
        help="what every model must predict better than, with the whole 95 % interval",
    )
    bootstrap: int = option(2000, ge=100, help="resamples of the documents for the 95 % intervals")
    precision: str = option("float32", choices=("auto", "float32", "bfloat16"), help="of the models' arithmetic")
    tokens_per_pass: int = option(4096, ge=16, unit="tokens", help="tokens in one forward pass")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of the order of the documents and of resampling")


@dataclass(frozen=True, kw_only=True)
class ChatRecipe:
    """Forty fixed prompts, measured by rule. A share is at least what its field says, or the check fails."""

    max_new_tokens: int = option(96, ge=8, unit="tokens", help="longest answer; one that is cut did not end its turn")
    temperature: float = option(0.3, gt=0.0, help="of the sampled answers", source=_LFM2)
    min_p: float = option(0.15, ge=0.0, lt=1.0, help="of the sampled answers", source=_LFM2)
    repetition_penalty: float = option(1.05, gt=0.0, help="of the sampled answers", source=_LFM2)

    ends: float = option(0.9, ge=0.0, le=1.0, help="share of the answers that end their turn")
    sentences: float = option(
        0.8, ge=0.0, le=1.0, help="share of the answers that begin with a capital and end with . ! or ?"
    )
    known_words: float = option(
        0.97, ge=0.0, le=1.0, help="share of the answers' words that occur in --data; not asked without --data"
    )
    follows: float = option(0.7, ge=0.0, le=1.0, help="share that moves the way each style asks", source=_ISSUE)
    agree_q8: float = option(
        0.9, ge=0.0, le=1.0, help="share of the prompts with torch's first greedy tokens, 8-bit bundles and wider",
        source=_ISSUE,
    )
    agree_q4: float = option(0.6, ge=0.0, le=1.0, help="the same for narrower bundles", source=_ISSUE)
    agree_tokens: int = option(32, ge=1, unit="tokens", help="how many first tokens must be the same")

    map: tuple[str, ...] = option((), help="other column names of --data, each as theirs=ours")
    bootstrap: int = option(2000, ge=100, help="resamples of the prompts for the 95 % intervals")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of sampling and resampling")


@dataclass(frozen=True, kw_only=True)
class PreferencesRecipe:
    """Ranking of held-out pairs, and judged answers to their prompts."""

    limit: int = option(1000, ge=2, unit="pairs", help="held-out pairs to rank, at most")
    prompts: int = option(100, ge=2, unit="prompts", help="prompts to answer, at most; with a judge")
    max_new_tokens: int = option(128, ge=8, unit="tokens", help="longest answer")
    skip_bad: int | None = option(None, ge=0, unit="rows", help="how many bad rows may be left out; none refuses any")
    max_tokens: int = option(1024, ge=8, unit="tokens", help="longest pair")
    bootstrap: int = option(1000, ge=100, help="resamples of pairs and prompts for the 95 % intervals")
    precision: str = option("float32", choices=("auto", "float32", "bfloat16"), help="of the models' arithmetic")
    tokens_per_pass: int = option(4096, ge=16, unit="tokens", help="tokens in one forward pass")
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
    seed: int = option(0, ge=0, help="of resampling")
