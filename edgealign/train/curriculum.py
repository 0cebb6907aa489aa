"""The order of SFT data by difficulty: easy to hard, as LFM2 is trained, or hard to easy as a control.

An example's place in an epoch is (1 - mixing) x its rank + mixing x chance: neighbours are of like difficulty, but
answers of one source, which are often equally hard, do not fill a batch alone. Chance comes from the seed and the
epoch, so that a resumed run has the same order; scores that a run has used stay beside its checkpoints.

Beside the published model lie `difficulty.jsonl` (no text: number of the --data source, line in it, scores; `index`
counts the examples that were trained on) and `difficulty.png`.

    curriculum = Curriculum.of(difficulty, origins, recipe, lengths)
    fit(model, task, recipe, passes=passes, work=work, order=curriculum.order)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.artifact import write_atomic
from edgealign.progress import say
from edgealign.train.difficulty import Difficulty, Floats
from edgealign.train.examples import Origin
from edgealign.train.recipes import SftRecipe

SCORES_FILE = "difficulty.jsonl"
PICTURE = "difficulty.png"
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Curriculum:
    """`order` is what `trainer.fit` asks at the start of every epoch."""

    difficulty: Difficulty
    origins: tuple[Origin, ...]
    lengths: tuple[int, ...]  # learned tokens
    recipe: SftRecipe
    warnings: tuple[str, ...] = ()

    @staticmethod
    def of(
        difficulty: Difficulty, origins: Sequence[Origin], recipe: SftRecipe, lengths: Sequence[int]
    ) -> Curriculum:
        """Warns of a run that ends within its first epoch: it would see one end of the difficulties only."""
        steps = -(-len(origins) // recipe.batch_size)
        warnings = []
        if 0 < recipe.max_steps < steps:
            end = "hardest" if recipe.order == "easy_to_hard" else "easiest"
            warnings.append(
                f"{recipe.max_steps} steps are less than an epoch of {steps}: the {end} examples are never seen"
            )
            say(f"warning: {warnings[0]} (no --max-steps, or --order shuffled)")
        return Curriculum(difficulty, tuple(origins), tuple(lengths), recipe, tuple(warnings))

    @property
    def scores(self) -> Floats:
        """(n,) higher is harder."""
        return scores_of(self.difficulty, self.recipe.difficulty)

    def order(self, epoch: int) -> list[int] | None:
        """The examples of an epoch (from 0) in order; None where it is shuffled."""
        if self.recipe.order == "shuffled" or 0 < self.recipe.curriculum_epochs <= epoch:
            return None
        return epoch_order(
            self.difficulty, by=self.recipe.difficulty, easy_first=self.recipe.order == "easy_to_hard",
            mixing=self.recipe.mixing, seed=self.recipe.seed, epoch=epoch,
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        values = self.scores
        return {
            "order": self.recipe.order, "by": self.recipe.difficulty, "mixing": self.recipe.mixing,
            "unit": unit_of(self.difficulty, self.recipe.difficulty), "judges": self.difficulty.n_judges,
            "examples": len(values), "unread": self.difficulty.unread,
            "quantiles": {f"{q:g}": round(float(np.quantile(values, q)), 6) for q in QUANTILES},
            "mean_loss": round(float(self.difficulty.losses.mean()), 6),
            "mean_success": round(float(self.difficulty.success.mean()), 6),
            "rank_correlation_with_length": round(rank_correlation(values, np.asarray(self.lengths, float)), 4),
        }

    def write(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """`difficulty.jsonl` and `difficulty.png`; `rows`: the log, one per optimizer step."""
        (folder / SCORES_FILE).write_text(self.as_json_lines(), encoding="utf-8")
        draw(self, rows, folder / PICTURE)

    def as_json_lines(self) -> str:
        entries = zip(self.origins, self.scores, self.difficulty.losses, self.difficulty.success, strict=True)
        return "".join(
            json.dumps(
                {
                    "index": i, "source": origin.source, "line": origin.line, "score": float(f"{score:.6g}"),
                    "loss": float(loss), "success": float(success),
                }
            )
            + "\n"
            for i, (origin, score, loss, success) in enumerate(entries)
        )


def scores_of(difficulty: Difficulty, by: str) -> Floats:
    """(n,) higher is harder: the mean loss, or the share of judges that are wrong."""
    return difficulty.losses if by == "loss" else 1.0 - difficulty.success


def unit_of(difficulty: Difficulty, by: str) -> str:
    return difficulty.unit if by == "loss" else "share of the judges that are wrong"


def epoch_order(
    difficulty: Difficulty, *, by: str, easy_first: bool, mixing: float, seed: int, epoch: int
) -> list[int]:
    """All examples in order. Equal success is ordered by loss (few judges make many ties), and what is left by chance.

    Args:
        mixing: share of chance in a place; 0 is the strict order, 1 has nothing to do with difficulty.
    """
    scores = scores_of(difficulty, by)
    n = len(scores)
    random = np.random.default_rng((seed, epoch))
    ranked = np.lexsort((random.random(n), difficulty.losses, scores))  # the last key counts first
    place = np.empty(n)
    place[ranked] = (np.arange(n) + 0.5) / n
    if not easy_first:
        place = 1.0 - place
    keys = (1.0 - mixing) * place + mixing * random.random(n)
    ordered: list[int] = np.argsort(keys, kind="stable").tolist()
    return ordered


def remembered(file: Path, n: int, compute: Callable[[], Difficulty]) -> Difficulty:
    """The scores that an interrupted run used, or new ones, which are kept in `file`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        losses, success = (np.asarray(found[name], dtype=np.float64) for name in ("losses", "success"))
        if losses.shape == success.shape == (n,):
            return Difficulty(losses, success, str(found["unit"]), int(found["n_judges"]), int(found["unread"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = compute()
    plain = {
        "losses": made.losses.tolist(), "success": made.success.tolist(), "unit": made.unit,
        "n_judges": made.n_judges, "unread": made.unread,
    }
    write_atomic(file, json.dumps(plain))
    return made


def rank_correlation(one: Floats, other: Floats) -> float:
    """Spearman's, ties at their mean rank; 0 where one side is constant."""
    ranks = [_mean_ranks(values) for values in (one, other)]
    centred = [values - values.mean() for values in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale else 0.0


def step_difficulties(curriculum: Curriculum, n_steps: int) -> list[float]:
    """The mean difficulty of the examples of every optimizer step; NaN in an epoch that is shuffled."""
    n, size = len(curriculum.scores), curriculum.recipe.batch_size
    found: list[float] = []
    epoch = 0
    while len(found) < n_steps:
        order = curriculum.order(epoch)
        values = curriculum.scores[order] if order is not None else np.full(n, np.nan)
        found += [float(values[start : start + size].mean()) for start in range(0, n, size)]
        epoch += 1
    return found[:n_steps]


def draw(curriculum: Curriculum, rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A PNG: how difficult the examples are, and difficulty and loss over the run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values, unit = curriculum.scores, unit_of(curriculum.difficulty, curriculum.recipe.difficulty)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.hist(values, bins=min(40, max(4, len(values) // 4)), color="C0", alpha=0.8)
    for share in (1 / 3, 2 / 3):
        left.axvline(float(np.quantile(values, share)), color="grey", linestyle=":", linewidth=1)
    left.set_title(f"difficulty of {len(values):,} examples; dotted: thirds", fontsize=10)
    left.set_xlabel(unit)
    left.set_ylabel("examples")
    steps = [int(row["step"]) for row in rows if "loss" in row]
    right.plot(steps, [row["loss"] for row in rows if "loss" in row], color="C1", linewidth=1)
    right.set_title(f"over the run, {curriculum.recipe.order.replace('_', ' ')}", fontsize=10)
    right.set_xlabel("optimizer step")
    right.set_ylabel("training loss, nats per token", color="C1")
    other = right.twinx()
    if steps:
        mean = step_difficulties(curriculum, max(steps))
        other.plot(steps, [mean[step - 1] for step in steps], color="C0", linewidth=1)
    other.set_ylabel(f"difficulty, {unit}", color="C0")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _mean_ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = (ends - (counts - 1) / 2.0)[inverse]
    return means
