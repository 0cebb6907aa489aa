"""The table of objectives as a page: `python -m edgealign.objectives.page > docs/objectives.md`; a test compares."""

from __future__ import annotations

from edgealign.objectives.entries import OBJECTIVES
from edgealign.objectives.names import AMBIGUOUS, NOT_HERE
from edgealign.objectives.settings import settings_of
from edgealign.objectives.table import CONFIDENCE, Objective, of_sides

HEAD = """# Preference objectives

Printed by `python -m edgealign.objectives.page > docs/objectives.md`; the tests compare.

Every objective is a composition of the same parts (`edgealign/objectives/`): how log-probabilities of tokens become
one number for an answer, what they are compared with, and

    x    = input(chosen, rejected) - margin
    loss = omega weight(pair_term(x)) + absolute terms, each times its weight

Notation: S_w, S_l summed log-ratios log pi/pi_ref of the chosen and the rejected answer, n their tokens, r = S/n,
P mean log-probabilities without a reference, D = S_w - S_l, b beta, s the sigmoid, ls its logarithm, sg held still.

Other letters are settings, which *defaults* names with the letter in brackets: `gamma (m) 0` is the number that the
loss calls m. `--settings gamma=0.3` sets one; `edgealign objectives KEY` prints the range of each. Two parts of `lfm2`
are settings too, `f=logistic` or `f=hinge`, `delta=lfm2_delta` or `delta=apo_down`; other mixtures are a
`dataclasses.replace` of an entry, for your own loop.

*A reference* stands still: `--model` as it was before training (with a LoRA: with the adapter off). Its
log-probabilities are computed once and kept beside the data. In your own loop they may come from a file, another model
or an adapter that is switched off: the functions take numbers, and nothing learns through them.

`edgealign dpo --objective KEY` trains with any of them. Beside prompt, chosen and rejected a row then has the columns
that *needs* names (`--map THEIRS=OURS` renames yours):

| column | what it is |
|---|---|
| `margin` | a number: by how much the chosen answer is better; `pairs sample` and `pairs filter` write it |
| `user` | the annotator: the row's `user_id` |
| `epsilon` | the chance that this row's label is wrong, from 0 and below 0.5; `pairs filter --soften` writes it |
| `score` | a preference model's score of the pair |
| `advantage`, `advantage_rejected` | a designer's reward of each answer minus its expectation |
| `gold` | the best answer to the prompt |
| `base`, `base_reference` | `base`: what the base model itself answers; its reference scores are computed |
| `calibration` | an answer that the reference would give |
| `rationale` | why the chosen answer is better, asked in words after both |
| `rejected_prompt` | the prompt of the rejected answer, where it is another one |
| `others`, `grades` | a ranked list: further answers, and a number for chosen, rejected and each of them |
| `second_reference` | the scores of a second model: `--second MODEL` |
| `previous` | `--model` is the last iterate, to go on from, and `--second MODEL` the reference |

Some columns no row has; the trainer makes them (your own loop gives `objectives.loss.pair_loss` whatever it likes):

- `unrelated`, `unrelated_reference`: an answer to another prompt under the pair's own. It is the next pair's, its
  chosen and its rejected in turn. One more answer is computed for each pair;
- `prompt_features`: where a prompt lies among all prompts. It is the mean of its final states under the reference, less
  that of all; the paper takes a sentence embedder;
- `spans`: the tokens in which the two answers differ (`difflib`). The paper's data name the phrases that were altered,
  so give answers that differ in places;
- `token_kl`: KL(ref || pi) over the whole vocabulary at every token. The reference's final states stay in memory (4 KiB
  a token for LFM2-350M in 32 bits), and its logits are made again in every pass;
- `token_weights`, `kl_weights`: how active the reference is at a token, stretched over its answer to 0 to 1. That is
  SparsePO's MaPO, on the states between layers; its learned masks are not here;
- `online`, `online_reference`: `--online-samples` answers to each prompt of a step, drawn by the model as it is. With
  all weights a copy of the reference stays in memory. Held-out pairs are compared without them.

Thumbs (one answer and whether it was liked: `prompt`, `completion`, `label`) are enough for objectives that are a sum
over the two sides: THUMBS. A liked answer then stands beside a disliked one to another prompt; where there are
more of one kind, the other comes again in turn, so that both weigh the same.

`kto` and `rpo_relative` compare with the other pairs of a batch. Where a step needs several forward passes, the trainer
looks at all of them first and then carries the gradient back pass by pass, so that the cut changes nothing; that is a
forward pass more.

An objective with *a state* reads it as the last optimizer step left it, and remembers whole steps.

Several processes (`torchrun`, `accelerate launch`) take the same number of a step's passes each, with whole weights in
every one or with the weights shared out over them (FSDP2); both publish what one process publishes, to rounding.

How sure a formula is:
"""


def render() -> str:
    """The page, in Markdown."""
    lines = [HEAD.rstrip().replace("THUMBS", ", ".join(f"`{key}`" for key in of_sides())), ""]
    lines += [f"- *{name}*: {meaning}." for name, meaning in CONFIDENCE.items()]
    heads = ("key", "what it is", "loss", "tokens", "needs", "defaults", "how sure", "in TRL 1.16", "source")
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [_row(entry) for entry in OBJECTIVES.values()]
    lines += ["", "Short names that several methods have are refused:", ""]
    for short, meant in AMBIGUOUS.items():
        lines.append(f"- `{short}`: {'; '.join([*(f'`{key}`' for key in meant.keys), *meant.others])}")
    lines += ["", "Not here, and what there is:", ""]
    lines += [f"- `{name}`: {what}" for name, what in NOT_HERE.items()]
    return "\n".join([*lines, ""])


def numbers_of(entry: Objective) -> dict[str, float]:
    """Beta and the other numbers with their defaults; without those that only scale the whole loss."""
    numbers = {"beta": entry.beta, **{name: setting.default for name, setting in settings_of(entry).items()}}
    numbers.pop("omega", None)
    if len(entry.absolute) == 1 and entry.pair_term is None and entry.contrast is None:
        numbers.pop(f"weight_{entry.absolute[0][0]}")
    return numbers


def _row(entry: Objective) -> str:
    needs = ["pairs"]
    if entry.needs_reference:
        needs.append("a reference")
    needs += [f"`{name}`" for name in entry.columns]
    if entry.state:
        needs.append("a state")
    letters = {name: letter for letter, name in entry.letters.items()}
    defaults = ", ".join(
        f"{name} ({letters[name]}) {value:.3g}" if name in letters else f"{name} {value:.3g}"
        for name, value in numbers_of(entry).items()
    )
    aliases = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
    cells = [
        f"`{entry.key}`{aliases}", entry.summary, f"`{entry.formula}`".replace("|", "\\|"), entry.reduction,
        ", ".join(needs), defaults, entry.confidence, entry.trl_equivalent or "-", entry.citation,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(render(), end="")
