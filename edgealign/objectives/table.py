"""The table of preference objectives: each entry is data, put together from the parts in `loss.py`.

An objective is reducer x reference x pair term. A new one is a new row here, plus a part in `loss.py` where it
needs a part that is not there yet. Importing this module loads no torch: the command line and the recipes read it.

Sources: DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7; length-normalised DPO, Ahrabian et al. 2024,
arXiv 2407.15229, and `dpo_norm` of Tulu 3, Lambert et al. 2024, arXiv 2411.15124, eq. 6 (beta 5).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgealign.errors import RecipeError

# Delta of a mean is about 1/length of that of a sum, so the same pressure needs a beta about `length` times larger.
# Using one scale with the other reduction is the likeliest mistake; outside its band a beta is refused.
BETA_BANDS: Mapping[str, tuple[float, float]] = MappingProxyType({"sum": (0.01, 0.5), "mean": (1.0, 10.0)})


@dataclass(frozen=True)
class Objective:
    """One named preference objective."""

    key: str
    summary: str
    citation: str
    reduction: str  # a key of loss.REDUCERS
    reference: str  # a key of loss.REFERENCES
    pair_term: str  # a key of loss.PAIR_TERMS
    beta: float
    beta_band: tuple[float, float]
    aliases: tuple[str, ...] = ()
    trl_equivalent: str | None = None

    @property
    def needs_reference(self) -> bool:
        return self.reference != "none"


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        entry.key: entry
        for entry in (
            Objective(
                key="dpo",
                summary="direct preference optimisation on summed log-ratios",
                citation="Rafailov et al. 2023, arXiv 2305.18290, eq. 7; beta 0.1 as in the authors' code",
                reduction="sum",
                reference="frozen",
                pair_term="logistic",
                beta=0.1,
                beta_band=BETA_BANDS["sum"],
                trl_equivalent="sigmoid",
            ),
            Objective(
                key="ln_dpo",
                summary="length-normalised DPO: log-ratios averaged over the tokens of a completion",
                citation="Ahrabian et al. 2024, arXiv 2407.15229; Tulu 3 dpo_norm, arXiv 2411.15124, beta 5",
                reduction="mean",
                reference="frozen",
                pair_term="logistic",
                beta=5.0,
                beta_band=BETA_BANDS["mean"],
                aliases=("dpo_norm", "sigmoid_norm"),
                trl_equivalent="sigmoid_norm",
            ),
        )
    }
)


def names() -> tuple[str, ...]:
    """Keys of all objectives."""
    return tuple(OBJECTIVES)


def find(name: str) -> Objective:
    """The objective of this key or alias; an unknown name gets a suggestion."""
    for entry in OBJECTIVES.values():
        if name == entry.key or name in entry.aliases:
            return entry
    close = difflib.get_close_matches(name, [*OBJECTIVES, *(a for e in OBJECTIVES.values() for a in e.aliases)], n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of: {', '.join(OBJECTIVES)}"
    raise RecipeError(f"objective {name}", "there is no such objective", hint)


def check_beta(objective: Objective, beta: float | None) -> float:
    """The beta to use: the objective's own when none is given; one outside the band of its reduction is refused."""
    if beta is None:
        return objective.beta
    low, high = objective.beta_band
    if not low <= beta <= high:
        scale = "per token" if objective.reduction == "mean" else "summed over tokens"
        other = next((e for e in OBJECTIVES.values() if e.beta_band[0] <= beta <= e.beta_band[1]), None)
        also = f", or use {other.key}, whose log-ratios are on that scale" if other else ""
        raise RecipeError(
            f"beta {beta:g}",
            f"{objective.key} takes log-ratios {scale}, where beta is between {low:g} and {high:g}",
            f"use beta {objective.beta:g}{also}",
        )
    return beta
