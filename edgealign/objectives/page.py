"""The table of objectives as a page: `python -m edgealign.objectives.page > docs/objectives.md`; a test compares."""

from __future__ import annotations

from edgealign.objectives.entries import AMBIGUOUS, OBJECTIVES
from edgealign.objectives.table import CONFIDENCE, Objective, trainable

HEAD = """# Preference objectives

Printed by `python -m edgealign.objectives.page > docs/objectives.md`; the tests compare.

Every objective is a composition of the same parts (`edgealign/objectives/`): how log-probabilities of tokens become
one number for an answer, what they are compared with, and

    x    = input(chosen, rejected) - margin
    loss = omega weight(pair_term(x)) + absolute terms, each times its weight

Notation: S_w, S_l summed log-ratios log pi/pi_ref of the chosen and the rejected answer, n their tokens, r = S/n,
P mean log-probabilities without a reference, D = S_w - S_l, b beta, s the sigmoid, ls its logarithm, sg held still.

`edgealign dpo --objective KEY` trains with those marked *pairs*; the others read more than a pair of answers
(*needs*), and are functions for those who have such data: `edgealign.objectives.loss.pair_loss`,
`edgealign.objectives.lists.list_loss`.

How sure a formula is:
"""


def render() -> str:
    """The page, in Markdown."""
    lines = [HEAD.rstrip(), ""]
    lines += [f"- *{name}*: {meaning}." for name, meaning in CONFIDENCE.items()]
    heads = ("key", "what it is", "loss", "tokens", "needs", "defaults", "how sure", "in TRL 1.16", "source")
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [_row(entry) for entry in OBJECTIVES.values()]
    lines += ["", "Short names that several methods have are refused:", ""]
    lines += [f"- `{short}`: {', '.join(f'`{key}`' for key in keys)}" for short, keys in AMBIGUOUS.items()]
    return "\n".join([*lines, ""])


def _row(entry: Objective) -> str:
    needs = ["pairs"] if entry.key in trainable() else ["lists" if entry.is_list else "pairs of answers"]
    if entry.needs_reference:
        needs.append("a reference")
    needs += [f"`{name}`" for name in entry.columns]
    if entry.state:
        needs.append("a state")
    numbers = {"beta": entry.beta, **entry.settings, **{f"weight_{name}": value for name, value in entry.absolute}}
    if len(entry.absolute) == 1 and entry.pair_term is None:
        numbers.pop(f"weight_{entry.absolute[0][0]}")
    defaults = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    aliases = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
    cells = [
        f"`{entry.key}`{aliases}", entry.summary, f"`{entry.formula}`".replace("|", "\\|"), entry.reduction,
        ", ".join(needs), defaults, entry.confidence, entry.trl_equivalent or "-", entry.citation,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(render(), end="")
