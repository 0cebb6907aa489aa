"""`edgealign personalize --method direction`: a user as one direction in the model's states, which llama.cpp adds too.

    choices -> hold some out -> mean state of what was chosen minus of what was not, behind one layer -> shrink by
    n / (n + n0) -> keep within the budget (budget.py) -> rank the held-out choices with and without it -> publish

The states are those behind the middle layer, averaged over an answer's tokens; the direction is added at every token.
It is a control vector in llama.cpp's own format (`runtimes/control_vector.py`): four bytes a dimension, no gradient, no
second pass. Published only if the held-out choices are ranked no worse with it.

    session.set_user(Path("runs/ada"))       # a session on the model or on a GGUF bundle of it

Source: contrastive activation addition, arXiv 2312.06681; shrinking as in lora.py.

Shape legend: T answer tokens, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.artifact import Artifact, open_artifact, open_model, publish, refuse_existing
from edgealign.errors import UsageError
from edgealign.personalize.budget_recipe import BudgetRecipe
from edgealign.personalize.choices import load_choices
from edgealign.personalize.lora import held_to, slug
from edgealign.personalize.recipes import DirectionRecipe
from edgealign.progress import say, track
from edgealign.runtimes.control_vector import FILE, steer, write_control_vector

if TYPE_CHECKING:
    from torch import Tensor


def run(
    recipe: DirectionRecipe, *, model: str | Path, choices: str | Path, user: str, out: Path,
    budget: BudgetRecipe | None = None,
) -> Artifact:  # fmt: skip
    """Publish one user's direction at `out`.

    Args:
        budget: None is the default one.

    Raises:
        UsageError: a layer that the model does not have.
        InputError: too few choices.
        CheckFailed: the held-out choices are ranked worse with the direction, or it is over budget.
    """
    from edgealign.data.encode import encode_pairs, template_hash
    from edgealign.models.load import load_model, load_tokenizer
    from edgealign.personalize.budget import Gauge, keep_within
    from edgealign.train.held_out import rank_pairs
    from edgealign.train.layout import pair
    from edgealign.train.precision import choose_precision, fixed_threads
    from edgealign.train.scoring import Passes, tokens_of_pass

    out = Path(out)
    refuse_existing(out)
    budget = budget or BudgetRecipe()
    started_s = time.monotonic()
    base = open_model(model)
    tok: Any = load_tokenizer(base.path)
    own = load_choices(choices, user, tok, recipe)
    name = slug(user)
    with fixed_threads(recipe.threads) as threads:
        network: Any = load_model(base.path)
        config = network.config.get_text_config()
        layer = recipe.layer or int(config.num_hidden_layers) // 2
        if not 1 <= layer < int(config.num_hidden_layers):
            reason = f"is no layer of this model that can be steered (1 to {int(config.num_hidden_layers) - 1})"
            raise UsageError(f"layer {layer}", reason, "use another --layer")
        say(f"user {name}: {len(own.fitted)} choices to learn, {len(own.held_out)} to check")
        fitted, held_out = (
            encode_pairs(tok, rows, max_tokens=recipe.max_tokens).rows for rows in (own.fitted, own.held_out)
        )
        share = len(fitted) / (len(fitted) + recipe.prior_strength)
        direction = share * recipe.strength * contrast(network, fitted, layer)
        single = choose_precision("float32", lora=True, n_parameters=0)
        passes = Passes.of(network, single, tokens_per_pass=tokens_of_pass(network, lora=True))
        trees = [pair(*row) for row in held_out]
        before = rank_pairs(network, trees, passes, label="ranking the held-out choices")
        gauge = Gauge.of(network, tok, [prompt for prompt, _, _ in fitted], base.path)
        hooks = steer(network, {layer: direction})

        def halve() -> None:
            direction.mul_(0.5)  # in place: the hooks see it

        spent = keep_within(gauge, budget, user=name, halve=halve)
        after = rank_pairs(network, trees, passes, label="ranking the held-out choices again")
        for hook in hooks:
            hook.remove()
    checks, numbers = held_to(
        name, before, after, than="the population",
        fix="collect more choices, or try another --layer or --strength",
    )
    with publish(
        out, kind="adapter", format="direction", stage="personalize_direction", recipe=recipe,
        inputs=[base.as_input("base"), own.source], template_hash=template_hash(tok), licences=base.manifest.licences,
    ) as draft:
        write_control_vector(
            {layer: direction.numpy()}, draft.dir / FILE, base_digest=base.digest, model_type=str(config.model_type)
        )
        for check in (*checks, *spent.checks(budget)):
            draft.add_check(check)
        draft.meta |= {
            "base_digest": base.digest, "user": name, "method": "direction", "budget": spent.facts,
            "choices": own.facts, "layer": layer,
            "share": share, "length": round(float(direction.norm()), 4), "held_out_before": asdict(before),
            "held_out_after": asdict(after), "threads": threads, "seconds": round(time.monotonic() - started_s, 1),
        }
    say(f"user {name}: {numbers}")
    return open_artifact(out)


def contrast(
    network: Any, rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], layer: int
) -> Tensor:
    """(D,) mean over choices of the mean state of the chosen answer minus that of the other, behind `layer`."""
    import torch

    def mean_state(prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        states = network.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        found: Tensor = states[layer + 1][0, len(prompt) :].float().mean(0)  # the first are the embeddings
        return found

    with torch.inference_mode():
        gaps = [
            mean_state(prompt, chosen) - mean_state(prompt, rejected)
            for prompt, chosen, rejected in track(rows, total=len(rows), label="reading the choices")
        ]
    return torch.stack(gaps).mean(0)
