"""`edgealign merge --search`: several candidates, the best on held-out rows is published.

The inputs themselves (and the base) are candidates too, so the result is never worse than the best of them on these
rows. Only the best candidate so far is kept on the disk, in a directory beside the output that is removed at the end.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from edgealign.artifact import Artifact, Check, hash_json, open_artifact, publish, workdir
from edgealign.errors import CheckFailed, InputError, RecipeError, writing
from edgealign.progress import say, track
from edgealign.train.layout import Tree, document, pair
from edgealign.train.merge import licences_of, merge_into, publish_files
from edgealign.train.merge_family import Family, stored_dtype
from edgealign.train.merge_judge import Bench, seat
from edgealign.train.merge_recipe import MergeRecipe
from edgealign.train.mergekit_merge import NATIVE, NEEDS_BASE, NOT_IN_MERGEKIT, SPARSE, Merge

TABLE, PICTURE = "candidates.json", "candidates.png"
Yardstick: TypeAlias = tuple[list[Tree], bool, Bench | None]  # held-out rows, whether they are pairs, a judge


@dataclass(frozen=True)
class Score:
    """A candidate on the held-out rows: `loss` is lower for better, `accuracy` is None for conversations, `grade` a
    judge's mean number where one decides."""

    name: str
    loss: float
    accuracy: float | None
    rows: int
    grade: float | None = None


@dataclass(frozen=True)
class Candidate:
    """Either a merge to be made or a model that is there already."""

    name: str
    merge: Merge | None
    path: Path | None


def run_search(
    recipe: MergeRecipe, family: Family, data: Sequence[str], out: Path, *, judge: str | None = None
) -> Artifact:
    """Score all candidates on `data` and publish the best one at `out`.

    Raises:
        InputError: no held-out rows, or rows of a form that cannot be scored.
        RecipeError: ranking accuracy is asked for, and the rows are no pairs.
        UsageError: as `merge_judge.seat`.
    """
    trees, ranked, digests, rows = read_held_out(recipe, family, data)
    bench = seat(recipe, judge, rows)
    candidates = list(propose(recipe, family))
    work = workdir(out, hash_json([dataclasses.asdict(recipe), [entry.digest for entry in family.inputs], digests]))
    try:
        with writing(out):
            scores, best = _score_all(recipe, family, candidates, (trees, ranked, bench), work)
        winner = candidates[best]
        kept = work / "best" if winner.merge is not None else winner.path
        assert kept is not None
        with publish(
            out, kind="model", format="huggingface", stage="merge", recipe=recipe, inputs=family.inputs,
            template_hash=family.template_hash, licences=licences_of(family.models),
        ) as draft:
            publish_files(draft, kept, move=winner.merge is not None)
            table: dict[str, Any] = {
                "best": winner.name, "select": recipe.select, "data": digests, "candidates": _rows(scores)
            }
            (draft.dir / TABLE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
            draw(scores, best, draft.dir / PICTURE)
            table |= {"judge": bench.judge.name} if bench else {}
            draft.meta.update({"merge": winner.name, **table})
            draft.add_check(_best_check(recipe, scores, best))
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if bench:
            bench.judge.close()
    graded = f", the judge's mean number {scores[best].grade:.4g}" if bench else ""
    say(f"{out}: the best of {len(scores)} candidates is {winner.name} (loss {scores[best].loss:.4f}{graded})")
    return open_artifact(out)


def propose(recipe: MergeRecipe, family: Family) -> Iterator[Candidate]:
    """The base, the inputs, then each method with its few numbers."""
    if family.base is not None and family.base.digest not in {model.digest for model in family.models}:
        yield Candidate("base", None, family.base.path)
    for i, model in enumerate(family.models, start=1):
        yield Candidate(f"model {i}", None, model.path)
    count = len(family.models)
    equal = recipe.weights or (1 / count,) * count
    for method in recipe.search_methods:
        for merge in _grid(recipe, method, equal, count):
            if method == "slerp" and count != 2:
                continue
            if method in NEEDS_BASE and family.base is None:
                continue
            if family.config["model_type"] in NOT_IN_MERGEKIT and method not in NATIVE:
                continue
            yield Candidate(merge.name, merge, None)


def read_held_out(
    recipe: MergeRecipe, family: Family, data: Sequence[str]
) -> tuple[list[Tree], bool, list[str], list[Any]]:
    """The held-out rows as trees, whether they are pairs, the digests of their files, and the rows."""
    from edgealign.data.encode import encode_conversations, encode_pairs
    from edgealign.data.read import read_all
    from edgealign.models.load import load_tokenizer

    if not data:
        raise InputError("--search", "needs held-out rows to choose by", "give pairs or conversations: --data FILE")
    loaded = read_all(data)
    forms = {source.form for source in loaded}
    if len(forms) != 1 or not forms <= {"pair", "conversation"}:
        raise InputError(
            ", ".join(data), f"holds rows of the form {' and '.join(sorted(forms))}", "give pairs or conversations"
        )
    ranked = forms == {"pair"}
    if recipe.select == "accuracy" and not ranked:
        raise RecipeError("select accuracy", "ranks pairs, and the data are conversations", "use --select loss")
    rows: list[Any] = [row for source in loaded for row in source.rows]
    tokenizer = load_tokenizer(family.donor.path)
    trees: list[Tree]
    if ranked:
        pairs = encode_pairs(tokenizer, rows[: recipe.max_rows], max_tokens=recipe.max_tokens)
        trees, refused = [pair(*ids) for ids in pairs.rows], pairs.refused
    else:
        talks = encode_conversations(tokenizer, rows[: recipe.max_rows], max_tokens=recipe.max_tokens)
        trees, refused = [document(row.ids, row.mask) for row in talks.rows], talks.refused
    if refused:
        say(f"{len(refused)} held-out rows cannot be used, the first: {refused[0][1]}")
    if not trees:
        raise InputError(", ".join(data), "leaves no row to choose by", "give longer rows or a larger --max-tokens")
    return trees, ranked, [source.digest for source in loaded], rows


def draw(scores: Sequence[Score], best: int, file: Path) -> None:
    """A bar per candidate, the best one dark."""
    from edgealign.train.merge_picture import draw_candidates

    draw_candidates([score.name for score in scores], [score.loss for score in scores], best, file)


def _score_all(
    recipe: MergeRecipe, family: Family, candidates: Sequence[Candidate], by: Yardstick, work: Path
) -> tuple[list[Score], int]:
    """Every candidate's score and the index of the best; the best one's files stay in `work / "best"`."""
    dtype = stored_dtype(family.config, recipe.dtype)
    scores: list[Score] = []
    best = 0
    for i, candidate in enumerate(track(candidates, label="candidates")):
        folder = candidate.path
        if candidate.merge is not None:
            folder = work / "candidate"
            shutil.rmtree(folder, ignore_errors=True)
            try:
                merge_into(folder, candidate.merge, family, dtype=dtype, seed=recipe.seed)
            except (CheckFailed, RecipeError) as error:
                say(f"left out: {error.line()}")
                scores.append(Score(candidate.name, float("inf"), None, 0))
                continue
        assert folder is not None
        scores.append(_score(candidate.name, folder, *by))
        if i == 0 or _key(recipe)(scores[i]) < _key(recipe)(scores[best]):
            best = i
            shutil.rmtree(work / "best", ignore_errors=True)
            if candidate.merge is not None:
                folder.rename(work / "best")
    return scores, best


def _score(name: str, folder: Path, trees: list[Tree], ranked: bool, bench: Bench | None) -> Score:
    from edgealign.models.load import load_model
    from edgealign.train.held_out import mean_nll, rank_pairs
    from edgealign.train.scoring import Passes

    model = load_model(folder)
    passes = Passes.reading(model)
    grade = bench.grade(folder) if bench else None
    if ranked:
        ranking = rank_pairs(model, trees, passes, label=name)
        return Score(name, ranking.log_loss, ranking.accuracy, len(trees), grade)
    return Score(name, mean_nll(model, trees, passes, label=name), None, len(trees), grade)


def _key(recipe: MergeRecipe) -> Callable[[Score], tuple[float, ...]]:
    """Smaller is better; of two equals the earlier candidate wins, and the inputs come first."""
    if recipe.select == "accuracy":
        return lambda score: (-(score.accuracy or 0.0), score.loss)
    if recipe.select == "judge":
        return lambda score: (-score.grade if score.grade is not None else float("inf"), score.loss)
    return lambda score: (score.loss,)


def _best_check(recipe: MergeRecipe, scores: Sequence[Score], best: int) -> Check:
    inputs = [score for score in scores if score.name.startswith("model ")]
    if recipe.select == "judge":
        grade, least = scores[best].grade or 0.0, max(score.grade or 0.0 for score in inputs)
        note = "the judge's mean number of what is published against the best of the merged models"
        return Check("not worse than its inputs", grade, least, grade >= least, note)
    loss = min(score.loss for score in inputs)
    note = "held-out loss of what is published against the best of the merged models"
    passed = recipe.select == "accuracy" or scores[best].loss <= loss
    return Check("not worse than its inputs", scores[best].loss, loss, passed, note)


def _rows(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """JSON has no infinity: a candidate that could not be made has the loss None."""
    return [
        {"name": s.name, "loss": s.loss if s.rows else None, "accuracy": s.accuracy, "rows": s.rows}
        | ({} if s.grade is None else {"grade": s.grade})
        for s in scores
    ]


def _grid(recipe: MergeRecipe, method: str, equal: tuple[float, ...], count: int) -> list[Merge]:
    """A few settings of one method; repeated ones are left out."""
    single = Merge(method, equal, recipe.density, recipe.epsilon, recipe.t, recipe.scale)
    if method == "linear":
        shares = recipe.search_weights if count == 2 else ()
        grid = [dataclasses.replace(single, weights=(1 - share, share)) for share in shares] or [single]
    elif method == "slerp":
        grid = [dataclasses.replace(single, t=share) for share in recipe.search_weights]
    elif method == "task_arithmetic":
        grid = [dataclasses.replace(single, scale=scale) for scale in recipe.search_scales]
    else:
        assert method in SPARSE
        grid = [dataclasses.replace(single, density=density) for density in recipe.search_densities]
    return list(dict.fromkeys(grid))
