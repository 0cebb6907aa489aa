"""A user as a direction: what was chosen lies that way, and it is published only where it helps on other choices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgealign.artifact import open_artifact
from edgealign.data.encode import encode_pairs
from edgealign.errors import CheckFailed, UsageError
from edgealign.models.load import load_model, load_tokenizer
from edgealign.personalize import direction
from edgealign.personalize.choices import split
from edgealign.personalize.direction import contrast
from edgealign.personalize.recipes import DirectionRecipe
from edgealign.runtimes.control_vector import FILE, read_control_vector
from edgealign.runtimes.session import open_session

PROMPT = tuple(range(5, 30))


@pytest.fixture
def fit(tiny_model: Path, planted: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(rows: Any, name: str = "ana", **values: Any) -> Any:
        recipe = DirectionRecipe(**{"threads": 1, "strength": 4.0, **values})
        choices = planted.write(rows, tmp_path / f"{name}.jsonl")
        return direction.run(recipe, model=tiny_model, choices=choices, user="ana", out=tmp_path / name)

    return run


def test_a_direction_is_the_mean_difference_of_the_answers_states(tiny_model: Path, planted: Any) -> None:
    network: Any = load_model(tiny_model)
    rows = encode_pairs(load_tokenizer(tiny_model), planted.likes_short(2), max_tokens=256).rows
    seen: list[torch.Tensor] = []
    hook = network.model.layers[2].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        found = contrast(network, rows, 2)
    hook.remove()
    means = [states.reshape(-1, states.shape[-1])[len(prompt) :].mean(0)
             for states, prompt in zip(seen, [row[0] for row in rows for _ in range(2)], strict=True)]
    torch.testing.assert_close(found, ((means[0] - means[1]) + (means[2] - means[3])) / 2)


def test_a_planted_taste_is_published_as_a_control_vector_that_sessions_take(
    fit: Callable[..., Any], planted: Any, tiny_model: Path
) -> None:
    made = fit(planted.likes_short(12))
    meta = made.meta
    assert (made.manifest.format, meta["method"], meta["layer"]) == ("direction", "direction", 3)
    assert meta["share"] == pytest.approx(9 / 17)
    assert meta["held_out_after"]["margin"] > meta["held_out_before"]["margin"] + 0.02
    vector = read_control_vector(made.path / FILE, layers=6, width=128)
    assert vector.base_digest == meta["base_digest"] == open_artifact(tiny_model).digest
    assert float(np.linalg.norm(vector.directions[3])) == pytest.approx(meta["length"], rel=1e-3)
    with closing(open_session(tiny_model, threads=1)) as session:
        before = session.prefill(PROMPT)
        session.set_user(made.path)
        assert float(np.abs(session.prefill(PROMPT) - before).max()) > 0.01
        session.set_user(None)
        assert np.array_equal(session.prefill(PROMPT), before)


def test_the_opposite_users_choices_do_not_pass_this_users_check(
    fit: Callable[..., Any], planted: Any, tmp_path: Path
) -> None:
    rows = planted.likes_short(12)
    fitted, held_out = split(rows, share=0.25)
    with pytest.raises(CheckFailed, match="not published"):
        fit([*planted.flipped(fitted), *held_out])
    assert not (tmp_path / "ana").exists()


def test_a_layer_that_cannot_be_steered_is_one_line(fit: Callable[..., Any], planted: Any) -> None:
    with pytest.raises(UsageError, match=r"layer 6: is no layer of this model that can be steered \(1 to 5\)"):
        fit(planted.likes_short(8), layer=6)
