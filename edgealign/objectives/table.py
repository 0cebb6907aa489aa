"""What a named objective is, how it is found, and what about it is checked before any training.

An objective is data: names of parts. With a reducer and a reference the log-probabilities of a batch become one number
for each side of a pair, and

    x    = input(chosen, rejected) - margin
    loss = omega weight(pair_term(x)) + the absolute terms, each times its weight

or, for a list of answers, one list term. The entries are in `entries.py`, the parts in `reduce`, `terms`, `absolute`,
`contrast`, `states` and `lists`. Importing this module loads no torch: the command line and the recipes read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from edgealign.data.forms import PAIR_NUMBERS, PAIR_TEXTS
from edgealign.errors import RecipeError
from edgealign.registry import suggest

# Delta of a mean is about 1/length of that of a sum, so the same pressure needs a beta about `length` times larger.
# Using one scale with the other reduction is the likeliest mistake; outside its band a beta is refused.
BETA_BANDS: Mapping[str, tuple[float, float]] = MappingProxyType({"sum": (0.01, 0.5), "mean": (1.0, 10.0)})
# A mean of log-ratios moves by less than this many nats per token before a model falls apart; reported runs with
# targets of 10 and more degenerated.
REACHABLE_NATS = 2.0
# What the trainer can give an objective beside the pair: what its row says, and the scores of a second model.
PAIR_FACTS = frozenset({"margin", "user", *PAIR_NUMBERS, *PAIR_TEXTS, "base_reference", "grades"})
SECOND_MODEL = frozenset({"second_reference", "previous"})
NUMBER_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({"epsilon": (0.0, 0.5)})  # from, below
DIVISORS = ("tau", "t", "w", "beta_reward", "least")  # settings
CONFIDENCE: Mapping[str, str] = MappingProxyType({
    "code": "read in the authors' or TRL's code",
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
    beta_band: tuple[float, float] = BETA_BANDS["sum"]
    settings: Mapping[str, float] = field(default_factory=dict)  # other numbers, with their defaults
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
        return tuple(name for name in PAIR_TEXTS if name in self.columns and name != "rejected_prompt")

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


def find(name: str) -> Objective:
    """The objective of this key or alias.

    Raises:
        RecipeError: an unknown name, with the closest one; a name that several methods have, with their keys.
    """
    from edgealign.objectives.entries import AMBIGUOUS, OBJECTIVES

    for entry in OBJECTIVES.values():
        if name == entry.key or name in entry.aliases:
            return entry
    if name in AMBIGUOUS:
        meant = "; ".join(f"{key}: {OBJECTIVES[key].summary}" for key in AMBIGUOUS[name])
        raise RecipeError(f"objective {name}", f"is the short name of {len(AMBIGUOUS[name])} methods", f"say {meant}")
    known = [*OBJECTIVES, *(alias for entry in OBJECTIVES.values() for alias in entry.aliases), *AMBIGUOUS]
    hint = suggest(name, known)
    raise RecipeError(f"objective {name}", f"there is no such objective{hint}", f"choose one of: {', '.join(names())}")


def names() -> tuple[str, ...]:
    """Keys of all objectives."""
    from edgealign.objectives.entries import OBJECTIVES

    return tuple(OBJECTIVES)


def trainable() -> tuple[str, ...]:
    """Keys of the objectives that a recipe can name: pairs are enough, with what their rows may say (PAIR_FACTS), and
    a second model."""
    from edgealign.objectives.entries import OBJECTIVES

    given = PAIR_FACTS | SECOND_MODEL
    return tuple(key for key, entry in OBJECTIVES.items() if set(entry.columns) <= given)


def trainable_name(name: str) -> str:
    """The key that a name in a recipe stands for.

    Raises:
        RecipeError: no objective, several, or one that reads more than rows of pairs hold.
    """
    entry = find(name)
    if entry.key in trainable():
        return entry.key
    needs = ", ".join(sorted(set(entry.columns) - PAIR_FACTS - SECOND_MODEL))
    reason = f"reads {needs}, which rows of pairs do not hold"
    raise RecipeError(f"objective {name}", reason, "it is a function for your own loop: docs/objectives.md")


def parse_settings(items: Sequence[str]) -> dict[str, float]:
    """`["gamma=0.3"]` to numbers by name.

    Raises:
        RecipeError: an item that is not NAME=NUMBER.
    """
    found: dict[str, float] = {}
    for item in items:
        name, _, number = item.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError as error:
            raise RecipeError(item, "is not NAME=NUMBER", "write for example --settings gamma=0.3") from error
    return found


def check_beta(objective: Objective, beta: float | None) -> float:
    """The beta to use: the objective's own when none is given; one that cannot work is refused.

    Raises:
        RecipeError: it is on the scale of another reduction, or asks for a gap that no model reaches.
    """
    if beta is None:
        return objective.beta
    low, high = objective.beta_band
    if not low <= beta <= high:
        scale = "per token" if objective.per_token else "summed over tokens"
        raise RecipeError(
            f"beta {beta:g}",
            f"{objective.key} takes log-ratios {scale}, where beta is between {low:g} and {high:g}",
            f"use beta {objective.beta:g}{_other_scale(objective, beta)}",
        )
    if objective.per_token and objective.pair_term == "square" and 0.5 / beta > REACHABLE_NATS:
        raise RecipeError(
            f"beta {beta:g}",
            f"{objective.key} then asks for a gap of 1/(2 beta) = {0.5 / beta:.3g} nats per token; a mean log-ratio "
            f"moves by less than {REACHABLE_NATS:g}",
            f"use beta {0.5 / REACHABLE_NATS:g} or more, or ipo_sum, whose gap is of the whole answer",
        )
    return beta


def read_settings(objective: Objective, given: Mapping[str, float] | None) -> dict[str, float]:
    """The objective's numbers with the given ones in their places, and `omega` and the absolute terms' weights.

    Raises:
        RecipeError: a number that the objective does not have, or one outside of where it makes sense.
    """
    wanted = {"omega": 1.0, **objective.settings, **{f"weight_{name}": value for name, value in objective.absolute}}
    for name, value in (given or {}).items():
        if name not in wanted:
            own = ", ".join(sorted(wanted))
            raise RecipeError(name, f"is no setting of {objective.key}{suggest(name, wanted)}", f"its settings: {own}")
        wanted[name] = float(value)
    _check_numbers(objective, wanted)
    return wanted


def _check_numbers(objective: Objective, wanted: Mapping[str, float]) -> None:
    """Shares of flipped labels stay below a half; what is divided by is above zero."""
    epsilon = wanted.get("epsilon")
    if epsilon is not None and not (0 <= epsilon < 0.5 and (epsilon > 0 or objective.pair_term != "exo")):
        lowest = "above" if objective.pair_term == "exo" else "from"
        reason = f"{objective.key} takes a share of flipped labels, {lowest}"
        default = f"its default is {objective.settings['epsilon']:g}"
        raise RecipeError(f"epsilon {epsilon:g}", f"{reason} 0 and below 0.5", default)
    for name in DIVISORS:
        if name in wanted and not wanted[name] > 0:
            default = f"its default is {objective.settings[name]:g}"
            raise RecipeError(f"{name} {wanted[name]:g}", f"{objective.key} divides by it", default)


def _other_scale(objective: Objective, beta: float) -> str:
    """The plain objective whose log-ratios this beta would fit."""
    from edgealign.objectives.entries import OBJECTIVES

    plain: Iterable[Objective] = (OBJECTIVES["dpo"], OBJECTIVES["ln_dpo"])
    for entry in plain:
        if entry.key != objective.key and entry.beta_band[0] <= beta <= entry.beta_band[1]:
            return f", or use {entry.key}, whose log-ratios are on that scale"
    return ""
