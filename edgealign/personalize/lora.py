"""`edgealign personalize`: from 4 to 64 of one person's choices to a LoRA that a session can load.

    choices -> hold some out -> fit from the population -> shrink by n / (n + n0) -> keep within the budget (budget.py)
    -> rank the held-out ones -> publish

Few choices move a user a little: what was learned is scaled by n / (n + n0), the posterior mean of a normal with a
prior worth n0 observations at the population: base, or base plus a population LoRA. `edgealign start` makes one of
other users' adapters, and the new user's learns in the directions in which those differ; it must also beat the base.

It is published only if the user's held-out choices are ranked at least as well as by the population: a higher ranking
accuracy, or the same with a mean margin that did not fall. Otherwise nothing is written and the exit status is 1; so it
is where even a small part of the fit forgets more than the budget allows.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.artifact import Artifact, Check, Input, open_artifact, open_model, publish, refuse_existing
from edgealign.data.forms import Pair
from edgealign.errors import CheckFailed, UsageError
from edgealign.objectives.table import check_beta, find
from edgealign.personalize.budget_recipe import BudgetRecipe
from edgealign.personalize.choices import Choices, load_choices
from edgealign.personalize.recipes import LoraFitRecipe, LoraRecipe
from edgealign.progress import say

if TYPE_CHECKING:
    from edgealign.models.lint import Coverage
    from edgealign.personalize.lowrank import Factors, LowRankLinear
    from edgealign.train.held_out import Ranking
    from edgealign.train.layout import Tree

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


def run(
    recipe: LoraRecipe, *, model: str | Path, choices: str | Path, user: str, out: Path,
    population: Path | None = None, start: Path | None = None, budget: BudgetRecipe | None = None,
) -> Artifact:
    """Fit one user's adapter and publish it at `out`.

    Args:
        choices: preference pairs with `user_id`.
        population: a LoRA for everyone, fitted on the same model; the user's starts there.
        start: the same, of `edgealign start`: the user's also learns in its directions.
        budget: None is the default one.

    Raises:
        UsageError: both a population and a start.
        InputError: too few choices, or a population adapter of another model or, as a start, of another rank.
        CheckFailed: the held-out choices are not ranked as well as by the population, or the fit is over budget;
            nothing is published.
    """
    from edgealign.data.encode import template_hash
    from edgealign.models.load import load_model, load_tokenizer
    from edgealign.personalize.adapter import check_adapter_base
    from edgealign.personalize.budget import Gauge, keep_within
    from edgealign.personalize.fit import fit
    from edgealign.personalize.lowrank import read_peft, scale_user, write_peft
    from edgealign.plan import count_parameters
    from edgealign.train.held_out import rank_pairs
    from edgealign.train.precision import choose_precision, fixed_threads
    from edgealign.train.scoring import Passes, tokens_of_pass

    out = Path(out)
    refuse_existing(out)
    if population is not None and start is not None:
        raise UsageError("--start", "is a population already", "give --start or --population")
    objective = find(recipe.objective)
    beta = check_beta(objective, recipe.beta)
    budget = budget or BudgetRecipe()
    started_s = time.monotonic()
    base = open_model(model)
    common = start or population
    everyone = check_adapter_base(common, base) if common is not None else None
    shared = read_peft(everyone.path) if everyone is not None else {}
    tokenizer: Any = load_tokenizer(base.path)
    own = load_choices(choices, user, tokenizer, recipe)
    name = slug(user)
    with fixed_threads(recipe.threads) as threads:
        precision = choose_precision(recipe.precision, lora=True, n_parameters=count_parameters(base.path))
        network, layers, coverage = adapted(recipe, base.path, precision.weights, shared, along=start is not None)
        say(f"user {name}: {len(own.fitted)} choices to learn, {len(own.held_out)} to check")
        single = choose_precision("float32", lora=True, n_parameters=0)
        passes = Passes.of(network, single, tokens_per_pass=tokens_of_pass(network, lora=True))
        held_out = encode_trees(tokenizer, own.held_out, recipe)
        before = rank_pairs(network, held_out, passes, label="ranking the held-out choices")
        if start is not None:  # other users' may be worse for this one than nobody's
            nobodys = load_model(base.path, dtype=precision.weights)
            plain = rank_pairs(nobodys, held_out, passes, label="ranking them without the start")
            before = max(before, plain, key=lambda each: (each.accuracy, each.margin))
        trees = encode_trees(tokenizer, own.fitted, recipe, speaker=network)
        gauge = Gauge.of(network, tokenizer, [tree.segments[0].ids for tree in trees], base.path)
        parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
        steps = fit(network, parameters, trees, recipe, objective=objective, beta=beta)
        share = len(trees) / (len(trees) + recipe.prior_strength)
        scale_user(layers, share)
        if not any(bool(layer.b.count_nonzero()) for layer in layers.values()):
            raise CheckFailed(f"user {name}", "the adapter would change nothing", "use a higher --learning-rate")
        spent = keep_within(gauge, budget, user=name, halve=lambda: scale_user(layers, 0.5))
        after = rank_pairs(network, held_out, passes, label="ranking the held-out choices again")
        checks, numbers = held_to(
            name, before, after, than="the population",
            fix="collect more choices; until then the population's answers are this user's",
        )
        with publish(
            out, kind="adapter", format="peft", stage="personalize", recipe=recipe,
            inputs=_inputs(base, everyone, own), template_hash=template_hash(tokenizer),
            licences=base.manifest.licences,
        ) as draft:
            rank, count = write_peft(draft.dir, layers, alpha=recipe.alpha, base_name=base.digest)
            for check in (*checks, *spent.checks(budget)):
                draft.add_check(check)
            draft.meta.update({
                "base_digest": base.digest, "user": name, "method": "lora", "budget": spent.facts,
                "choices": own.facts, "share": share,
                "objective": objective.key, "beta": beta, "rank": rank, "parameters": count,
                "coverage": round(coverage.share, 4), "held_out_before": asdict(before),
                "held_out_after": asdict(after), "first_step": asdict(steps[0]), "last_step": asdict(steps[-1]),
                "steps": len(steps), "precision": precision.name, "threads": threads,
                "seconds": round(time.monotonic() - started_s, 1),
            })
    say(f"user {name}: {numbers}")
    return open_artifact(out)


def encode_trees(
    tokenizer: Any, rows: Sequence[Pair], recipe: LoraFitRecipe, *, speaker: Any | None = None
) -> list[Tree]:
    """Each choice as a prompt with its answers; with `speaker` and an anchor, also what that model would say."""
    from edgealign.data.encode import encode_pairs, end_of_turn_id
    from edgealign.personalize.anchor import base_answers
    from edgealign.train.layout import branches

    encoded = encode_pairs(tokenizer, rows, max_tokens=recipe.max_tokens).rows
    if speaker is None or recipe.anchor == 0:
        return [branches(prompt, (chosen, rejected)) for prompt, chosen, rejected in encoded]
    said = base_answers(
        speaker, [prompt for prompt, _, _ in encoded], n_tokens=recipe.anchor_tokens,
        end_id=end_of_turn_id(tokenizer), pad_id=int(tokenizer.pad_token_id or 0),
    )
    return [branches(ids[0], (ids[1], ids[2], answer)) for ids, answer in zip(encoded, said, strict=True)]


def gate(accuracy_before: float, accuracy_after: float, margin_before: float, margin_after: float) -> list[Check]:
    """Ranked at least as well: a higher accuracy, or the same one with a mean margin that did not fall."""
    better = accuracy_after > accuracy_before
    same = accuracy_after == accuracy_before
    return [
        Check(
            "held-out ranking accuracy", accuracy_after, accuracy_before, better or same,
            "share of the user's held-out choices that are ranked as chosen, per token; tolerance: the population's",
        ),
        Check(
            "held-out margin", margin_after, margin_before, better or margin_after >= margin_before,
            "mean nats per token between chosen and rejected; decides where the accuracy is the same",
        ),
    ]


def held_to(user: str, before: Ranking, after: Ranking, *, than: str, fix: str) -> tuple[list[Check], str]:
    """The checks of a fit by how held-out choices are ranked without and with it, and both in words.

    Raises:
        CheckFailed: they are ranked worse.
    """
    checks = gate(before.accuracy, after.accuracy, before.margin, after.margin)
    numbers = (
        f"{before.pairs} held-out choices, ranking accuracy {before.accuracy:.2f} to {after.accuracy:.2f}, "
        f"margin {before.margin:+.3f} to {after.margin:+.3f}"
    )
    if not all(check.passed for check in checks):
        raise CheckFailed(f"user {user}", f"{numbers}: no better than {than}, not published", fix)
    return checks, numbers


def slug(user: str) -> str:
    """A name for manifests and files: the id itself where it is a plain word, else a hash of it (an address, say)."""
    if SLUG.fullmatch(user):
        return user
    return f"user-{hashlib.sha256(user.encode()).hexdigest()[:12]}"


def adapted(
    recipe: LoraFitRecipe, folder: Path, dtype: str, population: Mapping[str, Factors], *, along: bool
) -> tuple[Any, dict[str, LowRankLinear], Coverage]:
    """A model with a fresh addition on the recipe's layers, the additions, and what they cover."""
    import torch

    from edgealign.models.lint import describe, lora_targets
    from edgealign.models.load import load_model
    from edgealign.personalize.lowrank import wrap

    network: Any = load_model(folder, dtype=dtype)
    if torch.cuda.is_available():
        network.to("cuda")
    coverage = lora_targets(network, list(recipe.targets))
    say(describe(coverage))
    scale = recipe.alpha / recipe.rank
    layers = wrap(
        network, coverage.modules, rank=recipe.rank, scale=scale, seed=recipe.seed, population=population, along=along
    )
    return network, layers, coverage


def _inputs(base: Artifact, population: Artifact | None, own: Choices) -> list[Input]:
    between = [population.as_input("population")] if population is not None else []
    return [base.as_input("base"), *between, own.source]
