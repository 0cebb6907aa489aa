"""How long do the page's tests in a real browser take, and does any of them fail now and then? Ten runs, one by one.

    python benchmarks/browser_runs.py --out docs/results/browser

Each run is `pytest tests/apps/browser` in a process of its own: no earlier run's model, page or file is left. Writes
result.json and table.md after every run, so that what was measured is kept if it is stopped. Exit status 1 when a run
failed or took longer than the goal.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from result_files import write_results

from edgealign.bench.machine import busy, machine_card
from edgealign.errors import EdgealignError, InputError, ToolMissing, UsageError
from edgealign.progress import say

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/apps/browser"
GOAL_S, GOAL_SCENARIOS = 300.0, 40
TOLD = 2000  # characters of a run that broke off


def run(more: Sequence[str], folder: Path) -> dict[str, Any]:
    """One run of the suite: seconds, and how many tests passed, failed and were skipped.

    Raises:
        InputError: pytest did not get to the end.
    """
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", TESTS, *more]
    begun = time.perf_counter()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if ended.returncode not in (0, 1) or not report.is_file():
        raise InputError(TESTS, f"pytest ended with status {ended.returncode}", (ended.stdout + ended.stderr)[-TOLD:])
    return {"seconds": round(seconds, 1), **count(report.read_text(encoding="utf-8"))}


def count(report: str) -> dict[str, Any]:
    """What a JUnit report says: numbers of tests, those that failed and why, the five slowest in seconds."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": 0}
    times: dict[str, float] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = case.get("name") or ""
        times[name] = times.get(name, 0.0) + float(case.get("time") or 0.0)
        wrong = [child for child in case if child.tag in ("failure", "error")]
        if wrong:  # a test and the end of its fixture may both fail
            found["failed"][name] = (wrong[0].get("message") or "")[:TOLD]
        elif case.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    slowest = sorted(times, key=lambda name: -times[name])[:5]
    return {**found, "slowest_s": {name: round(times[name], 1) for name in slowest}}


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    runs, card = result["runs"], result["machine"]
    lines = ["| run | seconds | passed | failed | skipped |", "|---|---|---|---|---|"]
    lines += [
        f"| {number} | {each['seconds']:.0f} | {each['passed']} | {len(each['failed'])} | {each['skipped']} |"
        for number, each in enumerate(runs, start=1)
    ]
    seconds = [each["seconds"] for each in runs]
    failed = sorted({name for each in runs for name in each["failed"]})
    clean = sum(not each["failed"] for each in runs)
    lines += [
        "",
        f"{clean} of {len(runs)} runs without a failure; {statistics.median(seconds):.0f} s median, "
        f"{min(seconds):.0f} to {max(seconds):.0f} (goal: {GOAL_SCENARIOS} scenarios, {GOAL_S:.0f} s).",
    ]
    lines += [f"Failed at least once: {', '.join(failed)}."] if failed else []
    lines += ["", f"{card['cpu']}, {card['cores_usable']} cores, {card['os']}; {result['browser']}."]
    lines += ["**Others used the machine when this began.**"] if busy(card) else []
    return "\n".join(lines)


def met(result: Mapping[str, Any]) -> bool:
    """Whether every run did what is asked of it."""
    return all(
        not each["failed"] and each["passed"] >= GOAL_SCENARIOS and each["seconds"] <= GOAL_S for each in result["runs"]
    )


def browser_version() -> str:
    """What the browser that the suite drives calls itself, and its program.

    Raises:
        ToolMissing: there is none.
    """
    program = runpy.run_path(str(ROOT / TESTS / "chromium.py"))["find"]()
    if program is None:
        raise ToolMissing("chromium", "is not installed", "apt-get install chromium-headless-shell")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return f"{version} ({Path(program).name})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/results/browser"))
    parser.add_argument("more", nargs="*", help="for pytest, after --")
    args = parser.parse_args()
    try:
        if args.runs < 1:
            raise UsageError("--runs", f"{args.runs} is no number of runs", "give 1 or more")
        result: dict[str, Any] = {
            "schema": 1, "machine": machine_card(), "browser": browser_version(), "more": args.more, "runs": []
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            for number in range(args.runs):
                result["runs"].append(run(args.more, Path(folder)))
                say(f"run {number + 1} of {args.runs}: {result['runs'][-1]['seconds']:.0f} s")
                write_results(args.out, result, render(result))
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(render(result))
    return 0 if met(result) else 1


if __name__ == "__main__":
    sys.exit(main())
