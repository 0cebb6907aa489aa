"""Look at preference pairs with several judges: turn round, soften, leave out, and put the easy ones first.

    edgealign pairs filter --data pairs.jsonl --judge reward:A --judge reward:B --judge reward:C --out DIR

For every pair each judge's gap is (number of the chosen) - (number of the rejected), in deviations over the file, so
that judges of other scales can be averaged. The mean over judges is the pair's strength, their deviation is how unsure
they are ("Secrets of RLHF II", arXiv 2401.06080, votes with reward models and turns round the weakest labels; UPO,
arXiv 2409.11212, leaves out what an estimator is unsure of). Nothing is changed without being counted.

Every kept pair gets its strength as `margin` (never below 0): `margin_dpo` and `modpo` read it. With `soften` it also
gets `epsilon`, the chance that judges give its label to be wrong, sigmoid(-strength) (soft labels, arXiv 2401.06080):
`rosepo` reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgealign.artifact import Artifact, file_input, open_artifact, publish, refuse_existing
from edgealign.data.forms import OF_A_SIDE, Pair, to_json
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import InputError, UsageError
from edgealign.judges.judge import open_judge
from edgealign.judges.recipes import FilterRecipe
from edgealign.progress import say

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

MOST_WRONG = 0.49  # of a label that judges contradict and nobody has turned round


@dataclass(frozen=True)
class Strength:
    """(P,) each: mean and deviation over judges of the pairs' gaps, in deviations over the file."""

    mean: Floats
    unsure: Floats


def run(recipe: FilterRecipe, *, data: Sequence[str], judges: Sequence[str], out: Path) -> Artifact:
    """Filter and publish.

    Raises:
        InputError: the data hold no pairs, or none is left.
        UsageError: a judge is none, or a rule needs more judges than there are.
    """
    from edgealign.data.read import read_all

    refuse_existing(Path(out))
    if recipe.drop_unsure and len(judges) < 2:
        raise UsageError("drop_unsure", "asks how far judges differ", "give two or more --judge")
    if (recipe.flip or recipe.drop_weak or recipe.easy_first or recipe.soften) and not judges:
        raise UsageError("--judge", "names none, and this asks what judges think", "give at least one --judge")
    inputs, pairs = [], list[Pair]()
    for loaded in read_all(list(data), form="pair", mapping={}, skip_bad=recipe.skip_bad):
        inputs.append(file_input("data", loaded.source, loaded.digest))
        pairs += [row for row in loaded.rows if isinstance(row, Pair)]
    if not pairs:
        raise InputError(", ".join(map(str, data)), "holds no pairs", "give preference pairs")
    strength = measure(pairs, judges, threads=recipe.threads) if judges else None
    kept, changed = apply(pairs, strength, recipe)
    if not kept:
        raise InputError(f"{len(pairs)} pairs", "are all left out", "loosen the rules")
    counts = ", ".join(f"{reason}: {number}" for reason, number in changed.items())
    say(f"{len(kept)} of {len(pairs)} pairs are kept ({counts or 'nothing was asked for'})")
    with publish(out, kind="dataset", format="jsonl", stage="pairs_filter", recipe=recipe, inputs=inputs) as draft:
        write_jsonl(draft.dir / "train.jsonl", [to_json(pair) for pair in kept])
        draft.meta.update(rows={"train.jsonl": len(kept)}, changed=dict(changed), judges=len(judges))
    return open_artifact(out)


def measure(pairs: Sequence[Pair], judges: Sequence[str], *, threads: int = 0) -> Strength:
    """What the judges think of the pairs."""
    gaps = []
    for name in judges:
        judge = open_judge(name, threads=threads)
        try:
            chosen = judge.scores([(pair.prompt, pair.chosen) for pair in pairs])
            rejected = judge.scores([(pair.prompt, pair.rejected) for pair in pairs])
        finally:
            judge.close()
        gap = np.subtract(chosen, rejected)
        gaps.append(gap / max(float(gap.std()), 1e-12))
    table = np.stack(gaps)  # (judges, P)
    return Strength(table.mean(0), table.std(0))


def apply(
    pairs: Sequence[Pair], strength: Strength | None, recipe: FilterRecipe
) -> tuple[list[Pair], Counter[str]]:
    """The pairs that are left, in order, and how many were changed or left out by which rule.

    Shares are of the whole file: `flip` 0.1 turns round the tenth with the least strength, but only those whose
    strength is below 0; `drop_weak` then leaves out the weakest of either sign, `drop_unsure` what judges differ on.
    """
    changed = Counter[str]()
    count = len(pairs)
    kept = list(range(count))
    turned: set[int] = set()
    mean = np.zeros(count) if strength is None else strength.mean
    if recipe.flip:
        turned = {int(i) for i in np.argsort(mean, kind="stable")[: round(recipe.flip * count)] if mean[i] < 0}
        changed["turned round"] = len(turned)
    size = np.array([-value if i in turned else value for i, value in enumerate(mean)])
    if recipe.drop_weak:
        weak = {int(i) for i in np.argsort(np.abs(size), kind="stable")[: round(recipe.drop_weak * count)]}
        changed["too weak"] = len(weak)
        kept = [i for i in kept if i not in weak]
    if recipe.drop_unsure and strength is not None:
        unsure = {int(i) for i in np.argsort(-strength.unsure, kind="stable")[: round(recipe.drop_unsure * count)]}
        changed["judges differ"] = len(unsure.intersection(kept))
        kept = [i for i in kept if i not in unsure]
    if recipe.longest_ratio:
        long = [i for i in kept if length_ratio(pairs[i]) > recipe.longest_ratio]
        changed["lengths differ"] = len(long)
        kept = [i for i in kept if i not in set(long)]
    if recipe.easy_first:
        kept.sort(key=lambda i: -size[i])
    if recipe.soften:
        changed["softened"] = len(kept)
    finished = [_finish(pairs[i], i in turned, float(size[i]) if strength else None, recipe.soften) for i in kept]
    return finished, changed


def chance_of_a_wrong_label(strength: float) -> float:
    """sigmoid(-strength), at most MOST_WRONG: the losses that read it need less than a half. Strength 1: 0.27."""
    return min(1 / (1 + math.exp(min(strength, 700.0))), MOST_WRONG)


def length_ratio(pair: Pair) -> float:
    """Characters of the longer answer over those of the shorter."""
    lengths = sorted((max(len(pair.chosen), 1), max(len(pair.rejected), 1)))
    return lengths[1] / lengths[0]


def _finish(pair: Pair, turned: bool, strength: float | None, soften: bool) -> Pair:
    chosen, rejected = (pair.rejected, pair.chosen) if turned else (pair.chosen, pair.rejected)
    margin = pair.margin if strength is None else max(strength, 0.0)
    facts = {name: value for name, value in pair.facts.items() if not (turned and name in OF_A_SIDE)}
    if soften and strength is not None:
        facts["epsilon"] = chance_of_a_wrong_label(strength)
    return dataclasses.replace(pair, chosen=chosen, rejected=rejected, margin=margin, facts=facts)
