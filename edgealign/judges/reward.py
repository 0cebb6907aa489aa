"""A reward head: a linear Bradley-Terry model on a language model's frozen states, fitted on preference pairs.

    edgealign reward --model M --data pairs.jsonl --out HEAD

The features of an answer are the model's last hidden states, averaged over the answer's tokens and at its last token,
(2 D,); they are standardised on the training pairs. The head minimises

    -log sigmoid(w . (f(chosen) - f(rejected))) + ridge |w|^2 / 2

by Newton's method. A part of the pairs that are fitted on chooses the ridge; the held-out ones decide nothing.
Shape legend: P pairs, D hidden size, F = 2 D.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import Artifact, file_input, open_artifact, open_model, publish, refuse_existing
from edgealign.data.encode import encode_prompt
from edgealign.data.forms import Pair
from edgealign.errors import ArtifactError, InputError
from edgealign.judges.judge import Question
from edgealign.judges.recipes import RewardRecipe
from edgealign.models.builtin import NAMES, built_in
from edgealign.models.load import load_model, load_tokenizer
from edgealign.progress import track

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

WEIGHTS = "reward.safetensors"
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
STEPS, SMALL = 60, 1e-9


def run(recipe: RewardRecipe, *, model: str | Path, data: Sequence[str], out: Path) -> Artifact:
    """Fit and publish a reward head.

    Raises:
        InputError: the data hold no pairs, or too few to hold some back.
    """
    from edgealign.data.read import read_all

    refuse_existing(Path(out))
    source = open_model(model)
    inputs = [source.as_input("model")]
    pairs: list[Pair] = []
    for loaded in read_all(list(data), form="pair", mapping={}, skip_bad=recipe.skip_bad, limit=recipe.limit):
        inputs.append(file_input("data", loaded.source, loaded.digest))
        pairs += [row for row in loaded.rows if isinstance(row, Pair)]
    held_out, rest = hold_out(pairs, recipe.valid_fraction, recipe.seed)
    if len(held_out) < 2 or len(rest) < 2:
        reason = f"of {len({pair.prompt for pair in pairs})} prompts are too few to fit on and to hold some back"
        raise InputError(f"{len(pairs)} pairs", reason, "give more pairs, of several prompts")
    featured = Features(source.path, threads=recipe.threads, max_tokens=recipe.max_tokens)
    sides = [featured.of([(pair.prompt, text(pair)) for pair in pairs]) for text in (_chosen, _rejected)]
    scale = np.concatenate(sides).std(0).clip(min=1e-6)
    gaps = (sides[0] - sides[1]) / scale
    train, valid = gaps[rest], gaps[held_out]
    best = choose_ridge([pairs[place] for place in rest], train, recipe)
    weights = fit(train, best)
    with publish(out, kind="basis", format="reward", stage="reward", recipe=recipe, inputs=inputs) as draft:
        from safetensors.numpy import save_file

        save_file({"weights": (weights / scale).astype(np.float32)}, draft.dir / WEIGHTS)
        draft.meta.update(
            model_digest=source.digest, ridge=best, pairs=len(train), held_out_pairs=len(valid),
            held_out_accuracy=_accuracy(valid, weights), train_accuracy=_accuracy(train, weights),
            features=len(scale), max_tokens=recipe.max_tokens,
        )  # fmt: skip
    return open_artifact(out)


def hold_out(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Places to hold out and to fit on. Pairs of one prompt stay together: their answers come again and again."""
    by_prompt: dict[Any, list[int]] = {}
    for place, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt, []).append(place)
    groups = list(by_prompt.values())
    held: list[int] = []
    rest: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(groups)):
        (held if len(held) < fraction * len(pairs) else rest).extend(groups[number])
    return held, rest


def choose_ridge(pairs: Sequence[Pair], gaps: Floats, recipe: RewardRecipe) -> float:
    """The ridge that ranks a held-back part of these pairs best; the largest where none can be held back."""
    back, rest = hold_out(pairs, recipe.valid_fraction, recipe.seed)
    if not back or not rest:
        return RIDGES[-1]
    accuracy = {ridge: _accuracy(gaps[back], fit(gaps[rest], ridge)) for ridge in RIDGES}
    return max(RIDGES, key=lambda ridge: (accuracy[ridge], ridge))


def fit(gaps: Floats, ridge: float) -> Floats:
    """(P, F) differences of features, chosen minus rejected -> (F,) weights. Without any difference: zeros."""
    count, size = gaps.shape
    weights = np.zeros(size)
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(gaps @ weights))  # of being wrong
        gradient = -gaps.T @ p / count + ridge * weights
        hessian = (gaps * (p * (1 - p) / count)[:, None]).T @ gaps + ridge * np.eye(size)
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
        if float(np.abs(step).max()) < SMALL:
            break
    return weights


@dataclass
class RewardHead:
    """A fitted head on the model that it was fitted on."""

    name: str
    features: Features
    weights: Floats

    def scores(self, questions: Sequence[Question]) -> list[float]:
        return [float(value) for value in self.features.of(questions) @ self.weights]

    def close(self) -> None:
        self.features.close()


def open_reward(path: str | Path, *, threads: int = 0, model: str | Path | None = None) -> RewardHead:
    """Open a published head.

    Args:
        model: where its model is now; None looks where it was.

    Raises:
        ArtifactError: not a reward head, or the model there is another one.
        InputError: there is no model there any more.
    """
    from safetensors.numpy import load_file

    artifact = open_artifact(Path(path), kind="basis")
    if artifact.manifest.format != "reward":
        raise ArtifactError(path, f"is a {artifact.manifest.format}, no reward head", "make one: edgealign reward")
    hint = next(entry.hint for entry in artifact.manifest.inputs if entry.role == "model")
    place: str | Path = model or Path(os.path.normpath(artifact.path / hint))
    if not model and not Path(place).is_dir():
        place = hint if hint in NAMES else place
    if not model and built_in(place) is None and not Path(place).is_dir():
        raise InputError(path, "its model is not where it was", f"say where it is: reward:{path}@MODEL")
    source = open_model(place)
    if source.digest != artifact.meta["model_digest"]:
        raise ArtifactError(place, "is not the model that the reward head was fitted on", "fit it again")
    weights = load_file(artifact.path / WEIGHTS)["weights"].astype(np.float64)
    features = Features(source.path, threads=threads, max_tokens=int(artifact.meta["max_tokens"]))
    return RewardHead(f"reward:{artifact.digest[:12]}", features, weights)


class Features:
    """Frozen states of a model as features of answers."""

    def __init__(self, model: Path, *, threads: int, max_tokens: int) -> None:
        self._model: Any = load_model(model)
        self._tokenizer: Any = load_tokenizer(model)
        self.max_tokens, self.threads = max_tokens, threads

    def of(self, questions: Sequence[Question]) -> Floats:
        """(P, F): the mean of the answer's states beside the last one; an empty answer has its prompt's last state."""
        import torch

        from edgealign.train.precision import fixed_threads

        rows = []
        with fixed_threads(self.threads), torch.inference_mode():
            for messages, answer in track(questions, total=len(questions), label="reading answers"):
                prompt = list(encode_prompt(self._tokenizer, messages, typed=True))
                text = self._tokenizer.encode(answer, add_special_tokens=False)[: self.max_tokens]
                start = max(0, len(prompt) + len(text) - self.max_tokens)  # the end of a long conversation is kept
                ids = torch.tensor([[*prompt, *text][start:]])
                states = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float()
                own = states[-len(text) :] if text else states[-1:]
                rows.append(torch.cat([own.mean(0), own[-1]]).numpy().astype(np.float64))
        return np.stack(rows)

    def close(self) -> None:
        self._model = None


def _chosen(pair: Pair) -> str:
    return pair.chosen


def _rejected(pair: Pair) -> str:
    return pair.rejected


def _accuracy(gaps: Floats, weights: Floats) -> float:
    margins = gaps @ weights
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


