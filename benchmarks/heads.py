"""What are a few choices worth with each reward head? All of them on the same planted users, k = 0 to 32.

    python benchmarks/heads.py --out docs/results/heads

Populations, features and noise as in edgealign/personalize/planted.py: the shared parts are learned from seen users,
then new users choose a few times, and are asked about pairs that nobody has seen. Accuracy is a mean over users, its
band a 95 % bootstrap over users; controls are another user's choices and labels by coin. Fits are timed on one thread.
With --work a head's row is kept there and not measured again, so that populations can be measured apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads_report import draw, render
from result_files import write_results

from edgealign.artifact import hash_json, write_atomic
from edgealign.bench.machine import busy, machine_card
from edgealign.errors import writing
from edgealign.personalize.heads import HEADS, Head
from edgealign.personalize.planted import KINDS, KS, Person, Population, band, curve, exchanged, shuffled
from edgealign.progress import say

CONTROL_K, TIMED_K, TIMED_USERS = 8, 8, 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=list(HEADS.names()), choices=HEADS.names())
    parser.add_argument("--populations", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seen", type=int, default=200, help="users that the shared part is learned from")
    parser.add_argument("--choices", type=int, default=45, help="of each of them")
    parser.add_argument("--unseen", type=int, default=100, help="new users a seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="rows are kept here")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    card = machine_card()
    rows = []
    for kind in args.populations:
        for name in args.heads:
            rows.append(remembered(name, kind, args))
            say(f"{kind} {name}: " + " ".join(f"{mean:.3f}" for mean in rows[-1]["accuracy"].values()))
    settings = {name: getattr(args, name) for name in ("seen", "choices", "unseen", "seeds")}
    result = {"machine": card, "quiet": not busy(card), "settings": settings, "control_k": CONTROL_K, "rows": rows}
    text = render(result)
    if args.out:
        write_results(args.out, result, text, pictures={"heads.png": lambda file: draw(result, file)})
    print(text)
    return 0


def remembered(name: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure`, or what is kept of it for the same settings. JSON's keys are text, so every row goes through it."""
    settings = [name, kind, args.seen, args.choices, args.unseen, args.seeds]
    file = args.work and args.work / f"{kind}-{name}-{hash_json(settings)[:12]}.json"
    if file and file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    text = json.dumps(measure(name, kind, args))
    if file:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, text)
    row: dict[str, Any] = json.loads(text)
    return row


def measure(name: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """One head on one population, over the seeds' users together."""
    by_k: dict[int, list[Any]] = {k: [] for k in KS}
    controls: dict[str, list[Any]] = {"another user's": [], "by coin": []}
    learn_s, fit_ms, chosen = [], [], []
    for seed in range(args.seeds):
        planted = Population(kind, seed)
        seen = planted.draw(args.seen, args.choices, part=0)
        before = time.process_time()
        head: Head = HEADS.load(name).learn(seen, seed=seed)
        learn_s.append(time.process_time() - before)
        chosen.append(getattr(head, "precision", getattr(head, "tau", None)))
        people = planted.people(args.unseen, part=1)
        for k, values in curve(head, people).items():
            by_k[k].append(values)
        for control, others in (("another user's", exchanged(people)), ("by coin", shuffled(people, seed))):
            controls[control].append(curve(head, others, [CONTROL_K])[CONTROL_K])
        fit_ms += time_fits(head, people[:TIMED_USERS])
        bytes_per_user = 4 * head.state_size
    accuracy = {k: np.concatenate(parts) for k, parts in by_k.items()}
    return {
        "head": name, "population": kind, "bytes_per_user": bytes_per_user, "learn_s": statistics.median(learn_s),
        "fit_ms": statistics.median(fit_ms), "calibrated": chosen,
        "accuracy": {k: float(values.mean()) for k, values in accuracy.items()},
        "band": {k: band(values) for k, values in accuracy.items()},
        "gain": {k: float((values - accuracy[0]).mean()) for k, values in accuracy.items()},
        "gain_band": {k: band(values - accuracy[0]) for k, values in accuracy.items()},
        "worst_decile": {k: float(np.sort(values)[: -(-len(values) // 10)].mean()) for k, values in accuracy.items()},
        "controls": {name: float(np.concatenate(parts).mean()) for name, parts in controls.items()},
    }  # fmt: skip


def time_fits(head: Head, people: list[Person]) -> list[float]:
    """Milliseconds of each one's fit."""
    found = []
    for person in people:
        own = person.own.take(slice(TIMED_K))
        before = time.perf_counter()
        head.fit(own)
        found.append(1000 * (time.perf_counter() - before))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
