"""Read a published benchmark report back, and believe only what can be one.

The manifest's digests say that the files are those that were published; they do not say by whom. So every field that
is used is checked: names are short text, counts are counts, times are positive and finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, open_artifact
from edgealign.bench.run import SCHEMA
from edgealign.errors import InputError

LONGEST_TEXT, MOST_ROWS, MOST_SAMPLES = 4096, 100_000, 1000
LARGEST_FILE = 256 * 2**20
FIX = "measure again: edgealign bench BUNDLE... --out DIR"

Test = Callable[[Any], bool]


@dataclass(frozen=True)
class Report:
    """A report that was read: where from, by whom it is an artifact, and its checked result."""

    path: Path
    artifact: Artifact
    result: dict[str, Any]


def read_report(path: Path) -> Report:
    """Open a benchmark report.

    Raises:
        ArtifactError: no artifact, or a damaged one.
        InputError: it is no benchmark report, of another version, or holds what no report holds.
    """
    artifact = open_artifact(path, kind="report")
    if artifact.manifest.format != "bench":
        raise InputError(path, f"is a report of {artifact.manifest.stage}, not of a benchmark", FIX)
    file = artifact.path / "result.json"
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise InputError(file, f"has more than {LARGEST_FILE // 2**20} MiB", FIX)
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(file, f"is no readable JSON ({type(error).__name__})", FIX) from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        found = result.get("schema") if isinstance(result, dict) else None
        raise InputError(file, f"has schema {str(found)[:20]}, this version reads {SCHEMA}", FIX)
    if wrong := _find_wrong(result):
        raise InputError(file, f"has {wrong} that no report has", FIX)
    return Report(Path(path), artifact, result)


def _find_wrong(result: Mapping[str, Any]) -> str:
    """The first field that cannot be what it says, or nothing."""
    for name, test in RESULT.items():
        if not test(result.get(name)):
            return name
    for part, tests in (("results", ROW), ("bundles", BUNDLE)):
        for place, entry in enumerate(result[part]):
            if not isinstance(entry, dict):
                return f"{part}[{place}]"
            for name, test in tests.items():
                if name not in entry or not test(entry[name]):
                    return f"{part}[{place}].{name}"
    for name, test in CARD.items():
        if not test(result["machine"].get(name)):
            return f"machine.{name}"
    known = {entry["bundle"] for entry in result["bundles"]}
    return next((f"a row of {row['bundle']}" for row in result["results"] if row["bundle"] not in known), "")


def _text(value: Any) -> bool:
    """One line without what a terminal would obey."""
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < 1e18 and math.isfinite(value)


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list(test: Test, most: int) -> Test:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(test, value))


def _table(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(_text(key) and test(entry) for key, entry in value.items())


_SAMPLES = _or_none(_list(_positive, MOST_SAMPLES))
RESULT: Mapping[str, Test] = {
    "source": _text, "comparable": lambda value: isinstance(value, bool), "caveats": _list(_text, 100),
    "machine": lambda value: isinstance(value, dict), "results": _list(lambda value: True, MOST_ROWS),
    "bundles": _list(lambda value: True, MOST_ROWS),
}  # fmt: skip
ROW: Mapping[str, Test] = {
    "cell": _count, "bundle": _text, "target": _text, "quant": _or_none(_text), "user": _or_none(_text),
    "n_threads": _or_none(_count), "n_prompt": _count, "n_gen": _count, "n_depth": _count, "samples_ns": _SAMPLES,
    "build_version": _or_none(_text), "peak_bytes": _or_none(_count),
}  # fmt: skip
BUNDLE: Mapping[str, Test] = {
    "bundle": _text, "target": _text, "quant": _or_none(_text), "model_digest": _or_none(_text),
    "file_bytes": _or_none(_count),
}  # fmt: skip
CARD: Mapping[str, Test] = {
    "cpu": _or_none(_text), "architecture": _or_none(_text), "flags": _or_none(_list(_text, 1000)),
    "cores_usable": _or_none(_count), "governor": _or_none(_text), "os": _or_none(_text), "device": _or_none(_text),
    "versions": _table(_text),
}  # fmt: skip
