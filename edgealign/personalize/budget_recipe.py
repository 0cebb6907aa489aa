"""What a user's fit may cost besides what was asked of it. Light: importing this loads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option


@dataclass(frozen=True, kw_only=True)
class BudgetRecipe:
    """A fit over budget is halved a few times, then refused."""

    kl_budget: float = option(
        1.0, gt=0.0, unit="nats", help="per token, from the model without the user, on that model's own answers",
        source="on the starter a LoRA costs 0.06 by default, 0.58 as quickstart fits it; docs/personalization.md",
    )  # fmt: skip
    perplexity_budget: float = option(
        0.3, gt=0.0, help="share by which the perplexity of neutral text may rise; not for lore, which tilts answers",
        source="on the starter LoRAs cost -0.11 to 0.08, on the quickstart's model 0.15, and half of one ships worse",
    )  # fmt: skip
