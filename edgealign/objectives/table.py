"""What a named objective is, how it is found, and what about it is checked before any training.

An objective is data: names of parts. With a reducer and a reference the log-probabilities of a batch become one number
for each side of a pair, and

    x    = input(chosen, rejected) - margin
    loss = omega weight(pair_term(x)) + the absolute terms, each times its weight

or, for a list of answers, one list term. The entries are in `entries.py`, the parts in `reduce`, `terms`, `absolute`,
`contrast`, `states` and `lists`. Importing this module loads no torch: the command line and the recipes read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from edgealign.data.forms import PAIR_NUMBERS, PAIR_TEXTS
from edgealign.errors import RecipeError
from edgealign.objectives.settings import Setting
from edgealign.registry import suggest

# Delta of a mean is about 1/length of that of a sum, so the same pressure needs a beta about `length` times larger.
# Using one scale with the other reduction is the likeliest mistake; outside its band a beta is refused.
BETA_BANDS: Mapping[str, tuple[float, float]] = MappingProxyType({"sum": (0.01, 0.5), "mean": (1.0, 10.0)})
# The beta of a square loss is no slope: it sets the target, 1 / (2 beta).
TARGET_BANDS: Mapping[str, tuple[float, float]] = MappingProxyType({"sum": (0.0005, 0.5), "mean": (0.01, 10.0)})
SIDES = frozenset({"apo_zero", "lfm2_delta", "nca", "bco", "kto", "sppo"})  # absolute terms: a sum over the two sides
SQUARES = frozenset({"square", "sppo", "gpo"})  # pair and absolute terms with such a target (gpo's at a score of 1/2)
# A mean of log-ratios moves by less than this many nats per token before a model falls apart; reported runs with
# targets of 10 and more degenerated.
REACHABLE_NATS = 2.0
# What the trainer can give an objective beside the pair: what its row says, the scores of a second model, and what it
# makes of the pairs and the reference itself.
PAIR_FACTS = frozenset({"margin", "user", *PAIR_NUMBERS, *PAIR_TEXTS, "base_reference", "grades"})
SECOND_MODEL = frozenset({"second_reference", "previous"})
UNRELATED = "unrelated"  # an answer to another prompt
MADE = frozenset({
    UNRELATED, "unrelated_reference", "spans", "token_kl", "token_weights", "kl_weights", "prompt_features", "online",
    "online_reference",
})  # fmt: skip
NUMBER_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({"epsilon": (0.0, 0.5)})  # columns: from, below
CONFIDENCE: Mapping[str, str] = MappingProxyType({
    "code": "read in the authors' or TRL's code",
    "changed": "read in code; the column *source* says what is otherwise here",
    "ours": "our own, after what *source* names",
    "third party": "as others have implemented or reported it",
    "unverified": "what the abstract supports; not checked against the paper or its code",
})  # fmt: skip


@dataclass(frozen=True)
class Objective:
    """One named preference objective. Parts are keys of the tables that the comments name."""

    key: str
    summary: str
    formula: str  # in the notation of docs/objectives.md
    citation: str
    confidence: str  # a key of CONFIDENCE
    reduction: str = "sum"  # reduce.REDUCERS
    reference: str = "frozen"  # reduce.REFERENCES; "none" compares with no model
    input: str = "scaled"  # terms.INPUTS
    margin: str = "none"  # terms.MARGINS
    pair_term: str | None = "logistic"  # terms.PAIR_TERMS; None: no relative part, or a contrast or list term
    contrast: str | None = None  # contrast.CONTRASTS
    weight: str = "none"  # terms.WEIGHTS
    absolute: tuple[tuple[str, float], ...] = ()  # absolute.ABSOLUTE, with default weights
    state: str | None = None  # states.STATES
    list_term: str | None = None  # lists.LIST_TERMS
    beta: float = 0.1
    beta_band: tuple[float, float] | None = None  # where its source leaves that of the reduction; see `band`
    settings: Mapping[str, Setting] = field(default_factory=dict)  # other numbers
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # parts that a setting can name: f=hinge
    letters: Mapping[str, str] = field(default_factory=dict)  # of the formula, and the settings that they are
    columns: tuple[str, ...] = ()  # what the data must have besides the pair
    aliases: tuple[str, ...] = ()
    trl_equivalent: str | None = None
    margin_reads_reference: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.reference != "none" or self.margin_reads_reference

    @property
    def texts(self) -> tuple[str, ...]:
        """Further answers that it reads, in the order in which they follow a pair's sequences."""
        names = (*PAIR_TEXTS, UNRELATED)
        return tuple(name for name in names if name in self.columns and name != "rejected_prompt")

    @property
    def of_sides(self) -> bool:
        """Is its loss a sum over the two sides, so that thumbs are enough for it?"""
        return bool(self.absolute) and not (self.pair_term or self.contrast or self.list_term) and all(
            name in SIDES for name, _ in self.absolute
        )

    @property
    def couples(self) -> bool:
        """Does the loss of a pair depend on the other pairs of its batch?"""
        return self.contrast == "across_batch" or UNRELATED in self.columns

    @property
    def second_model(self) -> str | None:
        """The column that is the scores of a second model."""
        return next((name for name in self.columns if name in SECOND_MODEL), None)

    @property
    def is_list(self) -> bool:
        return self.list_term is not None

    @property
    def per_token(self) -> bool:
        """Are its log-ratios averaged?"""
        return self.reduction == "mean"

    @property
    def target(self) -> str | None:
        """The square term, pair or absolute, whose target is 1 / (2 beta)."""
        terms = [self.pair_term, *(name for name, _ in self.absolute)]
        return next((name for name in terms if name in SQUARES), None)

    @property
    def band(self) -> tuple[float, float]:
        """Where beta makes sense: its own band, or that of its reduction."""
        return self.beta_band or (TARGET_BANDS if self.target else BETA_BANDS)["mean" if self.per_token else "sum"]


def find(name: str) -> Objective:
    """The objective of this key or alias; capitals and hyphens do not matter.

    Raises:
        RecipeError: an unknown name, with the closest one; a name that several methods have, with their keys; a method
            that is not here, with what to use.
    """
    from edgealign.objectives.entries import OBJECTIVES
    from edgealign.objectives.names import AMBIGUOUS, NOT_HERE

    plain = name.strip().lower().replace("-", "_")
    for entry in OBJECTIVES.values():
        if plain == entry.key or plain in entry.aliases:
            return entry
    if plain in AMBIGUOUS:
        keys, others = AMBIGUOUS[plain].keys, AMBIGUOUS[plain].others
        meant = "; or ".join([*(f"{key}: {OBJECTIVES[key].summary}" for key in keys), *others])
        reason = f"is the short name of {len(keys) + len(others)} methods"
        raise RecipeError(f"objective {name}", reason, f"say {meant}")
    if plain in NOT_HERE:
        raise RecipeError(f"objective {name}", "is not here", NOT_HERE[plain])
    known = [*OBJECTIVES, *(alias for entry in OBJECTIVES.values() for alias in entry.aliases), *AMBIGUOUS]
    hint = suggest(plain, known)
    raise RecipeError(f"objective {name}", f"there is no such objective{hint}", f"choose one of: {', '.join(names())}")


def names() -> tuple[str, ...]:
    """Keys of all objectives."""
    from edgealign.objectives.entries import OBJECTIVES

    return tuple(OBJECTIVES)


def trainable() -> tuple[str, ...]:
    """Keys of the objectives that a recipe can name: the trainer has or makes all that they read."""
    from edgealign.objectives.entries import OBJECTIVES

    given = PAIR_FACTS | SECOND_MODEL | MADE
    return tuple(key for key, entry in OBJECTIVES.items() if set(entry.columns) <= given)


def of_sides() -> tuple[str, ...]:
    """Keys of the objectives that thumbs are enough for."""
    from edgealign.objectives.entries import OBJECTIVES

    return tuple(key for key, entry in OBJECTIVES.items() if entry.of_sides)


def trainable_name(name: str) -> str:
    """The key that a name in a recipe stands for.

    Raises:
        RecipeError: no objective, several, or one that reads what the trainer does not have.
    """
    entry = find(name)
    if entry.key in trainable():
        return entry.key
    needs = ", ".join(sorted(set(entry.columns) - PAIR_FACTS - SECOND_MODEL - MADE))
    reason = f"reads {needs}, which the trainer does not have"
    raise RecipeError(f"objective {name}", reason, "it is a function for your own loop: docs/objectives.md")


def check_beta(objective: Objective, beta: float | None) -> float:
    """The beta to use, the objective's own when none is given; one that cannot work is refused, the own one too (a part
    may have been replaced).

    Raises:
        RecipeError: it is on the scale of another reduction, or asks for a gap that no model reaches.
    """
    beta = objective.beta if beta is None else beta
    low, high = objective.band
    if not low <= beta <= high:
        scale = "per token" if objective.per_token else "summed over tokens"
        use = f"{objective.beta:g}" if low <= objective.beta <= high else f"between {low:g} and {high:g}"
        raise RecipeError(
            f"beta {beta:g}",
            f"{objective.key} takes log-ratios {scale}, where beta is between {low:g} and {high:g}",
            f"use beta {use}{_other_scale(objective, beta)}",
        )
    if objective.per_token and objective.target and 0.5 / beta > REACHABLE_NATS:
        gap = objective.target == "square"
        other = "ipo_sum, whose gap is" if gap else "sppo_hard, whose log-ratios are"
        raise RecipeError(
            f"beta {beta:g}",
            f"{objective.key} then asks for {'a gap' if gap else 'log-ratios up and down'} of 1/(2 beta) = "
            f"{0.5 / beta:.3g} nats per token; a mean log-ratio moves by less than {REACHABLE_NATS:g}",
            f"use beta {0.5 / REACHABLE_NATS:g} or more, or {other} of the whole answer",
        )
    return beta


def _other_scale(objective: Objective, beta: float) -> str:
    """The plain objective whose log-ratios this beta would fit."""
    from edgealign.objectives.entries import OBJECTIVES

    plain: Iterable[Objective] = (OBJECTIVES["dpo"], OBJECTIVES["ln_dpo"])
    for entry in plain:
        if entry.per_token != objective.per_token and entry.band[0] <= beta <= entry.band[1]:
            return f", or use {entry.key}, whose log-ratios are on that scale"
    return ""
