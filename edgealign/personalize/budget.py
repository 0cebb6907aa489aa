"""Forgetting has a budget: how far a fit may move answers that nobody asked it to move, and text of no one's taste.

    gauge = Gauge.of(network, tokenizer, prompts, base.path)     # while the user's addition has no effect yet
    ...fit...
    spent = keep_within(gauge, budget, user="ana", halve=lambda: scale_user(layers, 0.5))

Two numbers, of the model with the user against the model before (base, or base plus population): the KL per token on
the latter's own greedy answers to the fit's prompts, over the whole vocabulary, and the relative rise of the perplexity
of the text that parity is measured on, which is in nobody's choices. A fit over either budget is halved, a few times,
and measured again; what still costs more is refused like one that ranks worse.

Shape legend: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgealign.artifact import Check
from edgealign.errors import CheckFailed
from edgealign.parity_text import text_windows
from edgealign.personalize.anchor import base_answers
from edgealign.personalize.budget_recipe import BudgetRecipe

if TYPE_CHECKING:
    from torch import Tensor

HALVINGS = 4
MOST_PROMPTS, ANSWER_TOKENS = 8, 16
WINDOWS, WINDOW_TOKENS = 4, 256  # of the neutral text
KL, PERPLEXITY = "KL to the base", "neutral perplexity"


@dataclass(frozen=True)
class Spent:
    """`kl_nats`: per token; `rise`: of the perplexity, 0.02 is 2 %; `scale`: what is left of the fit."""

    kl_nats: float
    rise: float
    scale: float = 1.0

    def within(self, budget: BudgetRecipe) -> bool:
        return self.kl_nats <= budget.kl_budget and self.rise <= budget.perplexity_budget

    @property
    def facts(self) -> dict[str, float]:
        """For a manifest."""
        return {"kl_nats": self.kl_nats, "perplexity_rise": self.rise, "scale": self.scale}

    def checks(self, budget: BudgetRecipe) -> list[Check]:
        left = "" if self.scale == 1.0 else f"; scaled back to {self.scale:g} of the fit"
        return [
            Check(KL, self.kl_nats, budget.kl_budget, True, f"nats a token on the base's own answers, at most{left}"),
            Check(PERPLEXITY, self.rise, budget.perplexity_budget, True, "relative rise on parity's text, at most"),
        ]


@dataclass(frozen=True)
class Gauge:
    """A network and what it said before it was changed."""

    network: Any
    answered: Sequence[tuple[Sequence[int], Sequence[int]]]
    windows: Sequence[Sequence[int]]
    before: Sequence[Tensor]  # (T, V) log-probabilities of each answer
    nats: float  # a token of the windows

    @classmethod
    def of(cls, network: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], model: Path) -> Gauge:
        """Measure the network as it is.

        Args:
            prompts: token ids, those of the fit; the first few are asked.
            model: the directory, for its tokenizer.
        """
        from edgealign.data.encode import end_of_turn_id

        asked = list(dict.fromkeys(tuple(prompt) for prompt in prompts))[:MOST_PROMPTS]
        said = base_answers(
            network, asked, n_tokens=ANSWER_TOKENS, end_id=end_of_turn_id(tokenizer),
            pad_id=int(tokenizer.pad_token_id or 0),
        )  # fmt: skip
        answered = list(zip(asked, said, strict=True))
        windows = text_windows(model, count=WINDOWS, length=WINDOW_TOKENS)
        before = [_answer_rows(network, *each) for each in answered]
        return cls(network, answered, windows, before, _nats(network, windows))

    def measure(self) -> Spent:
        """What the network costs as it is now; a number that is none is infinitely much."""
        total = count = 0.0
        for each, base in zip(self.answered, self.before, strict=True):
            own = _answer_rows(self.network, *each)
            total += float((own.exp() * (own - base)).sum())
            count += len(own)
        kl, rise = total / count, _exp(_nats(self.network, self.windows) - self.nats) - 1
        return Spent(kl if math.isfinite(kl) else math.inf, rise if math.isfinite(rise) else math.inf)


def keep_within(gauge: Gauge, budget: BudgetRecipe, *, user: str, halve: Callable[[], None]) -> Spent:
    """Halve what was learned until it is within budget; what it costs then.

    Raises:
        CheckFailed: even the smallest part of it costs more; nothing is to be published.
    """
    scale = 1.0
    while True:
        found = gauge.measure()
        if found.within(budget):
            return Spent(found.kl_nats, found.rise, scale)
        if scale <= 2.0**-HALVINGS:
            raise CheckFailed(
                f"user {user}", f"a {2**HALVINGS}th of the fit still moves answers by {found.kl_nats:.3g} nats a token "
                f"(budget {budget.kl_budget:g}) and neutral perplexity by {found.rise:+.1%} (budget "
                f"{budget.perplexity_budget:.1%}): not published", "fit less, or give --kl-budget, --perplexity-budget",
            )  # fmt: skip
        halve()
        scale /= 2


def _answer_rows(network: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """(T, V) log-probabilities that each token of the answer was predicted from."""
    return _rows(network, [*prompt, *answer])[len(prompt) - 1 : -1]


def _nats(network: Any, windows: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood of a token of the windows; the first of each has nothing before it."""
    total, count = 0.0, 0
    for window in windows:
        rows = _rows(network, window)[:-1]
        total -= float(rows.gather(1, torch.tensor(window[1:], device=rows.device)[:, None]).sum())
        count += len(rows)
    return total / count


def _rows(network: Any, ids: Sequence[int]) -> Tensor:
    device = next(network.parameters()).device
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
        found: Tensor = torch.log_softmax(logits.float(), dim=-1)
    return found


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0)) if math.isfinite(value) else math.inf
