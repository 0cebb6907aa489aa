"""The cells of a benchmark: one process each, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgealign.bench.recipes import BenchRecipe
from edgealign.runtimes.probe import default_threads
from edgealign.runtimes.session import Bundle


@dataclass(frozen=True)
class Cell:
    """One process: what it does (`speed`, `load` or `swap`), to which bundle, in which shape.

    The kind `bandwidth` is about the machine and has no bundle.
    """

    kind: str
    name: str
    bundle: Bundle | None
    threads: int
    n_prompt: int = 0
    n_gen: int = 0
    user: str | None = None


def plan(recipe: BenchRecipe, bundles: Mapping[str, Bundle]) -> list[Cell]:
    """The cells in the order they run: for each shape the bundles take turns, so that drift hits them alike."""
    cells = []
    counts = list(dict.fromkeys(threads or default_threads() for threads in recipe.threads))
    for n_prompt in recipe.prompt_tokens:
        for n_gen in recipe.gen_tokens:
            for threads in counts:
                for with_user in (False, True):
                    for name, bundle in bundles.items():
                        user = next(iter(bundle.adapters), None) if with_user else None
                        if with_user and (user is None or not recipe.adapter):
                            continue
                        cells.append(Cell("speed", name, bundle, threads, n_prompt, n_gen, user))
    if recipe.bandwidth:
        cells += [Cell("bandwidth", "", None, threads) for threads in counts]
    cells += [Cell("load", name, bundle, counts[0]) for name, bundle in bundles.items()]
    if recipe.adapter:
        cells += [Cell("swap", name, bundle, counts[0]) for name, bundle in bundles.items() if bundle.adapters]
    return cells
