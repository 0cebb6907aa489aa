"""Which candidate to take, whether to merge, and what is nearest where nothing fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgealign.advise.candidates import APART, FAILS, FITS, MERGED, NONE, Candidate, Question, Wish
from edgealign.advise.quantity import Quantity
from edgealign.bench.result import MIB, number

# Less KL than this is no reason to take the slower file.
NEGLIGIBLE_KL = 0.01
# An adapter that costs less of the decode speed than this stays apart, where it can be undone and replaced.
WORTH_MERGING = 0.05

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """`taken` is None where nothing fits; `nearest` is then the one whose worst wish is missed by the least factor."""

    taken: Candidate | None
    nearest: Candidate | None
    reason: str
    carrier: tuple[str, ...]
    relax: tuple[str, ...]


def choose(question: Question, candidates: Sequence[Candidate]) -> Choice:
    """Decide the quantisation for each carrier first, then the carrier."""
    base_kl = {(entry.target, entry.quant): entry.kl for entry in candidates if entry.carrier == NONE}
    best: dict[str, Candidate] = {}
    for carrier in (MERGED, APART) if question.adapters else (NONE,):
        fitting = [entry for entry in candidates if entry.carrier == carrier and entry.verdict != FAILS]
        if fitting:
            best[carrier] = min(fitting, key=lambda entry: _key(question, entry, base_kl))
    if not best:
        nearest = min(candidates, key=_distance)
        return Choice(None, nearest, "nothing fits", (), tuple(map(_relax, _missed(nearest))))
    carrier, why = _choose_carrier(question, best, candidates) if question.adapters else (NONE, "")
    words = {
        "fidelity": f"least KL among what fits (below {NEGLIGIBLE_KL} nat none counts as less), then the quickest",
        "speed": "most tokens per second among what fits", "memory": "least memory among what fits",
    }  # fmt: skip
    lines = (why, *_crossover(question, best[carrier])) if question.adapters else ()
    return Choice(best[carrier], None, words[question.recipe.prefer], lines, ())


def crossover(file_bytes: float, adapter_bytes: float) -> int | None:
    """From how many users on one shared file with an adapter each is smaller than a merged file each; None: never."""
    if adapter_bytes >= file_bytes:
        return None
    # file + n adapter < n file
    return max(2, math.floor(file_bytes / (file_bytes - adapter_bytes)) + 1)


def _choose_carrier(
    question: Question, best: Mapping[str, Candidate], candidates: Sequence[Candidate]
) -> tuple[str, str]:
    if len(best) == 1:
        (only,) = best
        return only, f"Only with the adapter {'merged' if only == MERGED else 'apart'} something fits."
    apart = best[APART]
    if question.users > 1:
        return APART, f"Keep the adapters apart: {question.users} users share one file, and swapping takes no new one."
    if (apart.verdict == FITS) > (best[MERGED].verdict == FITS):
        return APART, "Keep the adapter apart: it grants the wishes, what merging does to them is not known yet."
    merged = next(
        entry for entry in candidates
        if (entry.target, entry.quant, entry.carrier) == (apart.target, apart.quant, MERGED)
    )  # fmt: skip
    cost, how = _cost(merged, apart)
    if cost > WORTH_MERGING:
        return MERGED, (
            f"Merge: one user, and apart the adapter costs {cost:.0%} of the decode speed ({how}). Merged, it cannot "
            "be taken off or swapped, and every new fit is a new file."
        )
    return APART, (
        f"Keep the adapter apart: it costs {cost:.1%} of the decode speed ({how}), less than {WORTH_MERGING:.0%}, and "
        "can be taken off, replaced or joined by another user's."
    )


def _cost(merged: Candidate, apart: Candidate) -> tuple[float, str]:
    """The share of the decode speed that the adapter costs: from two speeds of one kind, else by bytes."""
    fast, slow = merged.decode_tok_s, apart.decode_tok_s
    if fast.known and slow.known and fast.value and slow.value and fast.source == slow.source:
        return 1 - slow.value / fast.value, f"{fast.source}: {number(fast.value)} and {number(slow.value)} tok/s"
    adapter, token = apart.adapter_bytes.value or 0.0, apart.token_bytes.value
    if not token:
        return 0.0, "not known"
    how = f"by bytes: {adapter / MIB:.2f} MiB beside {token / MIB:.1f} MiB for a token; in truth more"
    return adapter / (token + adapter), how


def _crossover(question: Question, taken: Candidate) -> list[str]:
    """Sizes of both ways for the users there are, and from where on apart is smaller."""
    file = taken.file_bytes.value
    others = [entry for entry in question.adapters if entry.bytes]
    adapter = taken.adapter_bytes.value or max(
        (entry.bytes.get((taken.target, taken.quant), 0) for entry in others), default=0
    )
    if not file or not adapter:
        return []
    users, start = max(question.users, 1), crossover(file, adapter)
    apart, merged = file + users * adapter, users * file
    when = f"from {start} users on apart is smaller" if start else "merged is smaller for any number of users"
    return [
        f"Files for {users} user{'s' if users > 1 else ''}: apart {file / MIB:.1f} + {users} x {adapter / MIB:.2f} = "
        f"{apart / MIB:,.1f} MiB, merged {users} x {file / MIB:.1f} = {merged / MIB:,.1f} MiB; {when}."
    ]


def _key(question: Question, entry: Candidate, base_kl: Mapping[tuple[str, str], Quantity]) -> Key:
    kl = base_kl[entry.target, entry.quant].value
    fidelity = max(kl, NEGLIGIBLE_KL) if kl is not None else math.inf
    speed = -(entry.decode_tok_s.value or 0.0)
    quick = (not entry.decode_tok_s.known, speed)
    memory = entry.memory_mib.value if entry.memory_mib.value is not None else math.inf
    orders: dict[str, Key] = {
        "fidelity": (fidelity, quick, memory), "speed": (quick, fidelity, memory), "memory": (memory, fidelity, quick),
    }  # fmt: skip
    return (entry.verdict != FITS, entry.loses_change, *orders[question.recipe.prefer])


def _missed(entry: Candidate) -> list[Wish]:
    return [wish for wish in entry.wishes if wish.verdict == FAILS]


def _distance(entry: Candidate) -> tuple[float, int, int]:
    """How badly the wishes are missed: the sum of the factors' logarithms; what carries the adapter comes first."""
    missed = [math.log(wish.excess) for wish in _missed(entry) if wish.excess]
    return (sum(missed), len(missed), entry.carrier == NONE)


def _relax(wish: Wish) -> str:
    """The command-line wish that would let it through."""
    value = wish.found.value or 0.0
    options = {
        "decode": ("--decode-tok-s", math.floor(value * 10) / 10),
        "first token": ("--first-token-ms", math.ceil(value)),
        "memory": ("--memory-mib", math.ceil(value)), "KL": ("--kl", math.ceil(value * 1000) / 1000),
    }  # fmt: skip
    option, needed = options[wish.name]
    by = f"{wish.line()}: {wish.excess:.2f} times too {'slow' if wish.name in ('decode', 'first token') else 'much'}"
    return f"{by}; it would fit with {option} {needed:g}"
