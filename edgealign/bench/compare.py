"""Compare published reports, row by row; the first is what the others are held against.

Rows match when target, quantisation, adapter on or off, threads and tokens agree. A measure is given as its median with
the interval that covers the true median with at least 95 % where there are six samples or more (binomial order
statistics); of fewer samples it is their whole range, which covers it with 1 - 2^(1-n): 94 % for five. The ratio of two
medians lies between the ratios of the intervals' ends; where that contains 1, the intervals overlap, and no difference
is shown. The samples of a row come from one process, so differences between two starts of it are not in the interval.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, open_artifact, publish, refuse_existing
from edgealign.bench.picture import draw_comparison
from edgealign.bench.published import Report, read_report
from edgealign.bench.result import ABSENT, UNKNOWN, Row, measure_name, number, pairs
from edgealign.errors import UsageError

# Parts of a machine card that must agree, and what to call them.
MACHINE = {
    "cpu": "CPU", "architecture": "architecture", "flags": "set of instructions",
    "cores_usable": "number of usable cores", "governor": "frequency governor", "os": "system",
}  # fmt: skip
COVERAGE = 0.95
SAME = "no difference shown"


def run(reports: Sequence[Path], *, anyway: bool = False, out: Path | None = None) -> Artifact | dict[str, Any]:
    """Compare two or more reports, and publish the comparison when `out` is given.

    Raises:
        UsageError: fewer than two reports, or reports that cannot be compared fairly without `anyway`.
    """
    if len(reports) < 2:
        raise UsageError("compare", "needs two or more reports", "measure each with: edgealign bench ... --out DIR")
    if out is not None:
        refuse_existing(Path(out))
    opened = _name([read_report(path) for path in reports])
    against = find_differences(opened)
    if against and not anyway:
        reason = f"cannot be compared fairly: {'; '.join(against)}"
        raise UsageError(" and ".join(opened), reason, "compare them all the same: --anyway")
    result = compare(opened)
    result["differences"] = against
    result["text"] = render(result)
    if out is None:
        return result
    inputs = [report.artifact.as_input(name) for name, report in opened.items()]
    recipe = {"anyway": anyway}
    with publish(
        Path(out), kind="report", format="bench-comparison", stage="bench compare", recipe=recipe, inputs=inputs
    ) as draft:
        (draft.dir / "result.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (draft.dir / "table.md").write_text(result["text"] + "\n", encoding="utf-8")
        draw_comparison(result, draft.dir / "compare.png")
    return open_artifact(Path(out))


def find_differences(reports: Mapping[str, Report]) -> list[str]:
    """Everything that a difference in speed could come from instead of what was to be compared; in words."""
    found = []
    cards = {name: report.result["machine"] for name, report in reports.items()}
    for part, word in MACHINE.items():
        values = {name: card.get(part) for name, card in cards.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            found.append(f"another {word}: {_list_values(values)}")
        elif part == "cpu" and None in values.values():
            found.append("none of them says which CPU it was")
    for target in sorted({row["target"] for report in reports.values() for row in report.result["results"]}):
        said = {name: _version(report, target) for name, report in reports.items()}
        versions = {name: version for name, version in said.items() if version is not None}
        if len(set(versions.values())) > 1:
            found.append(f"{target} ran in different versions: {_list_values(versions)}")
    models = {name: _models(report) for name, report in reports.items()}
    if any(not (mine <= other or other <= mine) for mine in models.values() for other in models.values()):
        found.append(f"the models differ: {_list_values({name: sorted(item) for name, item in models.items()})}")
    if nameless := [name for name, digests in models.items() if not digests]:
        found.append(f"the model is not known of {', '.join(nameless)}")
    for name, report in reports.items():
        if not report.result["comparable"]:
            found.append(f"{name} says: {'; '.join(report.result['caveats']) or 'not comparable'}")
    return found


def compare(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Every measure of every row that any report has: intervals, and ratios to the first report."""
    named = any(_is_ambiguous(report.result) for report in reports.values())
    table: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for name, report in reports.items():
        for key, samples in _measures(report.result, named=named):
            table.setdefault(key, {})[name] = describe(samples)
    rows = []
    first, *others = reports
    for key, found in sorted(table.items(), key=lambda item: (-len(item[1]), _order(item[0]))):
        target, quant, adapter, bundle, threads, n_prompt, n_gen, n_depth, measure = key
        rows.append({
            "target": target, "quant": quant, "adapter": adapter, "bundle": bundle, "threads": threads,
            "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth, "measure": measure, "found": found,
            "ratios": {
                name: ratio(found[first], found[name]) for name in others if first in found and name in found
            },
        })  # fmt: skip
    matched = sum(len(row["found"]) == len(reports) for row in rows)
    return {
        "schema": 1, "reports": list(reports), "rows": rows, "matched": matched,
        "digests": {name: report.artifact.digest for name, report in reports.items()},
        "machines": {name: report.result["machine"] for name, report in reports.items()},
        "sources": {name: report.result["source"] for name, report in reports.items()},
    }  # fmt: skip


def describe(samples: Sequence[float]) -> dict[str, Any]:
    """Median and its interval; of one sample there is none."""
    ordered = sorted(samples)
    low, high = interval_ranks(len(ordered))
    alone = len(ordered) == 1
    return {
        "n": len(ordered), "median": statistics.median(ordered),
        "low": None if alone else ordered[low], "high": None if alone else ordered[high],
    }  # fmt: skip


def interval_ranks(count: int) -> tuple[int, int]:
    """The places (from 0) of the narrowest symmetric pair of ordered samples that covers the median often enough.

    The median lies outside of the k-th smallest and the k-th largest of n with probability 2 P(Binomial(n, 1/2) < k).
    """
    rank, outside = 0, 2 / 2**count
    while rank + 1 <= (count - 1) // 2:
        outside += 2 * math.comb(count, rank + 1) / 2**count
        if outside > 1 - COVERAGE:
            break
        rank += 1
    return rank, count - 1 - rank


def ratio(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How many times the base's median the other's is, and between which values for the intervals."""
    value = float(other["median"] / base["median"])
    if base["low"] is None or other["low"] is None:
        return {"ratio": value, "low": None, "high": None, "verdict": "one sample: no interval"}
    low, high = other["low"] / base["high"], other["high"] / base["low"]
    verdict = SAME if low <= 1 <= high else "faster" if low > 1 else "slower"
    return {"ratio": value, "low": low, "high": high, "verdict": verdict}


def render(result: Mapping[str, Any]) -> str:
    """Markdown: what speaks against the comparison, then one line for each measure of each row."""
    first, *others = result["reports"]
    lines = []
    if result["differences"]:
        lines += ["**Compared all the same, although:**", "", *(f"- {entry}" for entry in result["differences"]), ""]
    named = any(row["bundle"] for row in result["rows"])
    heads = ["target", "quant", *(["bundle"] if named else []), "adapter", "threads", "measure", first]
    heads += [head for name in others for head in (name, f"{name} / {first}")]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = [row["target"], row["quant"] or UNKNOWN, *([row["bundle"] or ""] if named else []), row["adapter"],
                 str(row["threads"] or UNKNOWN), measure_name(row), _cell(row["found"].get(first))]  # fmt: skip
        for name in others:
            cells += [_cell(row["found"].get(name)), _ratio_cell(row["ratios"].get(name))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{result['matched']} of {len(result['rows'])} measures are in all reports. Medians with the interval that "
        "covers the true median with 95 % (fewer than six samples: their range). A ratio's interval is that of the "
        f"ends; where it contains 1 there is {SAME}. Differences between two starts of a process are not in it.",
    ]
    return "\n".join(lines)


def _measures(result: Mapping[str, Any], *, named: bool) -> list[tuple[tuple[Any, ...], list[float]]]:
    """Key and samples of everything timed; of a prompt measured twice (before two generations) the first."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for prompt, decode in pairs(result):
        for row, measure in ((prompt, "prefill"), (decode, "decode")):
            if row is None or not row["samples_ns"]:
                continue
            tokens = row["n_prompt"] + row["n_gen"]
            found.setdefault(_key(row, measure, named), [tokens * 1e9 / sample for sample in row["samples_ns"]])
    return list(found.items())


def _key(row: Row, measure: str, named: bool) -> tuple[Any, ...]:
    adapter = "on" if row["user"] else "off"
    bundle = row["bundle"] if named else None
    shape = (row["n_prompt"], row["n_gen"], row["n_depth"])
    return (row["target"], row["quant"], adapter, bundle, row["n_threads"], *shape, measure)


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Words as words and numbers as numbers, what is unknown first."""
    return tuple((part is not None, part or "" if isinstance(part, str) else part or 0) for part in key)


def _is_ambiguous(result: Mapping[str, Any]) -> bool:
    """Are there bundles that only their names tell apart?"""
    counts = Counter((entry["target"], entry["quant"]) for entry in result["bundles"])
    return any(count > 1 for count in counts.values())


def _version(report: Report, target: str) -> str | None:
    """Of the runtime that a target's rows ran in; None for no rows, a word for rows that do not say it."""
    rows = [row for row in report.result["results"] if row["target"] == target]
    said = sorted({row["build_version"] or "unknown" for row in rows})
    return ", ".join(said) or None


def _models(report: Report) -> set[str]:
    return {entry["model_digest"][:12] for entry in report.result["bundles"] if entry["model_digest"]}


def _list_values(values: Mapping[str, Any]) -> str:
    """`name: value` for each report, lists in words."""
    def say(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(map(str, value)) or "none"
        return "unknown" if value is None else str(value)

    return ", ".join(f"{name} {say(value)}" for name, value in values.items())


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ABSENT
    if found["low"] is None:
        return f"{number(found['median'])} (one sample)"
    return f"{number(found['median'])} [{number(found['low'])}, {number(found['high'])}]"


def _ratio_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ABSENT
    if found["low"] is None:
        return f"{found['ratio']:.2f} ({found['verdict']})"
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}], {found['verdict']}"


def _name(reports: Sequence[Report]) -> dict[str, Report]:
    """By directory name; a second one of the same name gets a number."""
    named: dict[str, Report] = {}
    for report in reports:
        base = report.path.resolve().name
        count = 1
        while (name := base if count == 1 else f"{base}-{count}") in named:
            count += 1
        named[name] = report
    return named
