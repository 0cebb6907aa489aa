"""What the parts of an objective see of a batch of pairs: two numbers for each pair, and what else the rows hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgealign.objectives.reduce import Columns, Settings, column
from edgealign.objectives.scores import Scores

State = dict[str, Tensor]


@dataclass(frozen=True)
class Pairs:
    """A batch in the objective's own reduction. Shape legend: P pairs, S = 2 P sequences, L longest sequence."""

    chosen: Tensor  # (P,) log-ratios, or log-probabilities where the objective has no reference
    rejected: Tensor  # (P,)
    policy: Scores  # (S, L) log-probabilities
    reference: Scores | None
    columns: Columns
    beta: float
    settings: Settings
    state: State  # what earlier batches have left

    @property
    def delta(self) -> Tensor:
        """(P,) chosen minus rejected, before beta."""
        return self.chosen - self.rejected

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """(P,) tokens of the chosen and of the rejected side."""
        lengths = self.policy.lengths
        return lengths[0::2], lengths[1::2]

    def column(self, name: str) -> Any:
        """A column of the batch, on this device where it is numbers; a missing one is a RecipeError."""
        found = column(self.columns, name)
        return found.to(self.chosen.device) if isinstance(found, Tensor) else found
