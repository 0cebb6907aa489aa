"""How long does it take to fit a million users, features given? And the released few-shot step, for a thousand of them.

    python benchmarks/lore_speed.py --out docs/results/lore_speed

Random features and choices: 16 choices, rank 16. The goal is 90 core-seconds for a million users, and 100 times the
released step (LoRe's code: Adam, 500 iterations, no prior), per user, on one thread, in turns. Like is compared with
like: users one after another, as the released code fits them, and many at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from result_files import write_results

from edgealign.bench.machine import busy, machine_card
from edgealign.personalize.lore import fit_released, fit_users

RANK, CHOICES = 16, 16
GOAL_S, GOAL_RATIO = 90.0, 100.0
ALONE, OURS_ALONE = 8, 200  # users fitted one after another
PART = 100_000  # users at once: their choices are 110 MiB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--released", type=int, default=1000, help="users that the released step is timed on")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if min(args.users, args.released, args.repetitions) < 1:
        print("lore_speed: --users, --released and --repetitions are counts; give 1 or more", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    card = machine_card()
    samples: dict[str, list[float]] = {"ours": [], "ours, one by one": [], "released": [], "released, one by one": []}
    for number in range(args.repetitions):
        generator = torch.Generator().manual_seed(number)
        seconds = 0.0
        for start in range(0, args.users, PART):
            count = min(PART, args.users - start)
            gaps = torch.randn(count, CHOICES, RANK + 1, generator=generator)
            before = time.process_time()
            fit_users(gaps)
            seconds += time.process_time() - before
        samples["ours"].append(seconds / args.users)
        gaps = torch.randn(OURS_ALONE, CHOICES, RANK + 1, generator=generator)
        before = time.process_time()
        for user in range(OURS_ALONE):
            fit_users(gaps[user : user + 1])
        samples["ours, one by one"].append((time.process_time() - before) / OURS_ALONE)
        gaps = torch.randn(args.released, CHOICES, RANK, generator=generator)
        before = time.process_time()
        fit_released(gaps)
        samples["released"].append((time.process_time() - before) / args.released)
        before = time.process_time()
        for user in range(ALONE):  # as its code does it: one user after another
            fit_released(gaps[user : user + 1])
        samples["released, one by one"].append((time.process_time() - before) / ALONE)
    ours, ours_alone, released, alone = (statistics.median(values) for values in samples.values())
    result = {
        "machine": card, "quiet": not busy(card), "users": args.users, "rank": RANK, "choices": CHOICES,
        "core_seconds_per_user": samples, "million_users_s": ours * 1e6, "times_faster": released / ours,
        "times_faster_one_by_one": alone / ours_alone,
    }  # fmt: skip
    spread = f"{min(samples['ours']) * 1e6:.1f} to {max(samples['ours']) * 1e6:.1f}"
    text = "\n".join([
        f"{args.users:,} users, {CHOICES} choices, rank {RANK}, one thread of {card['cpu']}, {args.repetitions} runs.",
        "",
        "| | core-seconds for a million users | goal |", "|---|---|---|",
        f"| MAP, Newton's method, batched | {ours * 1e6:.1f} ({spread}) | {GOAL_S:g} |",
        f"| the same, one user after another | {ours_alone * 1e6:.0f} | |",
        f"| LoRe's released few-shot step, {args.released:,} users at once | {released * 1e6:.0f} | |",
        f"| the same, one user after another | {alone * 1e6:.0f} | |", "",
        f"One user after another {alone / ours_alone:.0f} times faster, all at once {released / ours:.0f} times "
        f"(goal {GOAL_RATIO:g}).",
    ])  # fmt: skip
    if args.out:
        write_results(args.out, result, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
