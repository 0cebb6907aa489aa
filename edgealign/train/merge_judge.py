"""What a judge thinks of a merge: the mean of its numbers on greedy answers to the held-out rows' prompts.

Extrapolation (accelerated preference optimisation, arXiv 2410.06293) goes past the trained model along its task
vector, base + scale (model - base) with a scale above 1, until that no longer helps. Held-out loss punishes it early,
because likelihoods of given answers fall; so the scale is chosen by the answers that the model itself gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.data.forms import Message
from edgealign.errors import InputError, UsageError
from edgealign.judges.judge import Judge, open_judge
from edgealign.train.merge_recipe import MergeRecipe


@dataclass(frozen=True)
class Bench:
    """A judge, and what it asks."""

    judge: Judge
    prompts: tuple[tuple[Message, ...], ...]
    max_new_tokens: int

    def grade(self, folder: Path) -> float:
        """The mean of the judge's numbers on a model's greedy answers."""
        from edgealign.evaluate.preferences import answer_all
        from edgealign.evaluate.recipes import PreferencesRecipe

        rows = answer_all(folder, self.prompts, PreferencesRecipe(max_new_tokens=self.max_new_tokens))
        asked = [(prompt, str(row["text"])) for prompt, row in zip(self.prompts, rows, strict=True)]
        return float(np.mean(self.judge.scores(asked)))


def seat(recipe: MergeRecipe, judge: str | None, rows: Sequence[Any]) -> Bench | None:
    """The judge that `--select judge` asks for, on the prompts of `rows`; None where another number decides.

    Raises:
        UsageError: a judge that is not asked, or none where one is.
        InputError: rows without prompts.
    """
    from edgealign.judges.sample import question

    if recipe.select != "judge":
        if judge is not None:
            raise UsageError("--judge", f"is not asked where --select is {recipe.select}", "add --select judge")
        return None
    if judge is None:
        raise UsageError("--select judge", "needs one", "give --judge rule:NAME, reward:DIR, or the URL of an endpoint")
    prompts = list(dict.fromkeys(found[0] for row in rows if (found := question(row))))[: recipe.judge_prompts]
    if not prompts:
        raise InputError("--data", "has no prompts to answer", "give pairs or conversations")
    return Bench(open_judge(judge), tuple(prompts), recipe.max_new_tokens)
