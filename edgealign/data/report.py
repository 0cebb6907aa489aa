"""The check's report as text for a terminal. Every bad row is in it: equal reasons share a line with their ranges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from edgealign.data.faults import KINDS

LINES_SHOWN = 8  # of duplicates and the like, which are warnings; bad rows are always all shown


def render(report: Mapping[str, Any]) -> str:
    """Plain text, tables aligned."""
    blocks = [
        _summary(report), _bad(report), _refused(report), _repeats(report), _markers(report), _lengths(report),
        _bias(report), _users(report),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def table(rows: Sequence[Sequence[object]], *, indent: str = "  ") -> list[str]:
    """Columns as wide as their widest cell; numbers to the right, text to the left."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    numeric = [all(isinstance(row[column], int | float | None) for row in rows[1:]) for column in range(len(widths))]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        lines.append((indent + "  ".join(padded)).rstrip())
    return lines


def line_ranges(lines: Sequence[int]) -> str:
    """[3, 4, 5, 9] to "3-5, 9"."""
    ranges: list[list[int]] = []
    for line in sorted(lines):
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.3g}"


def _summary(report: Mapping[str, Any]) -> list[str]:
    form = f"{report['form']} ({report['shape']})" if report["shape"] else report["form"]
    lines = [f"{report['source']}: {report['total']} rows of form {form}"]
    counts = [("usable", report["rows"]), ("bad", len(report["bad_rows"]))]
    if report["ties"]:
        counts.append(("ties (neither is better, not used)", report["ties"]))
    lines += [f"  {count:>8} {name}" for name, count in counts]
    if report["unused_columns"]:
        lines.append(f"  columns that are not used: {', '.join(report['unused_columns'])}")
    return lines


def _bad(report: Mapping[str, Any]) -> list[str]:
    if not report["bad_rows"]:
        return []
    grouped: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in report["bad_rows"]:
        grouped[row["reason"], row["file"]].append(row["line"])
    lines = [f"bad rows: {len(report['bad_rows'])}"]
    lines += table([["kind", "rows", "meaning"], *([kind, n, KINDS[kind]] for kind, n in report["bad_kinds"].items())])
    for (reason, file), numbers in grouped.items():
        plural = "line" if len(numbers) == 1 else "lines"
        where = f"{file} " if file else ""
        lines.append(f"  {where}{plural} {line_ranges(numbers)}: {reason}")
    lines.append(f"  mend them, or train without them: --skip-bad {len(report['bad_rows'])}")
    return lines


def _refused(report: Mapping[str, Any]) -> list[str]:
    refused = report["refused_by_template"]
    if not refused:
        return []
    grouped: dict[str, list[int]] = defaultdict(list)
    for row in refused:
        grouped[row["reason"]].append(row["line"])
    return [
        f"rows that the model's template refuses: {len(refused)}",
        *(f"  line {line_ranges(numbers)}: {reason}" for reason, numbers in grouped.items()),
    ]


def _repeats(report: Mapping[str, Any]) -> list[str]:
    lines = []
    duplicates = report["duplicates"]
    if duplicates["rows"]:
        lines.append(f"duplicates: {duplicates['rows']} rows repeat an earlier one")
        lines += _some([f"lines {line_ranges(group)}" for group in duplicates["groups"]])
    if report["contradictions"]:
        lines.append(f"contradictions: {len(report['contradictions'])} pairs prefer both of two answers")
        lines += _some([f"lines {line_ranges(pair)}" for pair in report["contradictions"]])
    return lines


def _markers(report: Mapping[str, Any]) -> list[str]:
    if not report["markers"]:
        return []
    rows = [
        [repr(found["marker"])[1:-1], found["template"], found["rows"], found["first_line"],
         "yes: refused in training" if found["token_of_this_model"] else "no"]
        for found in report["markers"]
    ]
    return [
        "chat-template markers inside the text:",
        *table([["marker", "template", "rows", "first line", "a token of this model"], *rows]),
    ]


def _lengths(report: Mapping[str, Any]) -> list[str]:
    lengths = report["lengths"]
    if lengths is None:
        return []
    names = [name for name in lengths if name not in ("context", "over_context", "sum")]
    unit = report["unit"]
    what = "with the model's template" if unit == "tokens" else "whitespace words: give --model to count tokens"
    lines = [f"length of a row in {unit} ({what}), {lengths['sum']} in all"]
    lines += table([names, [lengths[name] for name in names]])
    if lengths["context"] is not None:
        over, context = lengths["over_context"], lengths["context"]
        caution = "" if unit == "tokens" else " (words are fewer than tokens)"
        lines.append(f"  longer than the context of {context} tokens: {over} rows{caution}")
    return lines


def _bias(report: Mapping[str, Any]) -> list[str]:
    bias, unit = report["length_bias"], report["unit"]
    if bias is None:
        return []
    r = bias["label_length_correlation"]
    correlation = "not defined" if r is None else f"{r:+.3f}"
    if "buckets" not in bias:
        return [
            f"labels: {bias['liked']} liked, {bias['disliked']} disliked",
            f"  mean length of the answer in {unit}: {_cell(bias['mean_liked'])} liked, "
            f"{_cell(bias['mean_disliked'])} disliked; correlation of label and length {correlation}",
        ]
    share = bias["longer_wins_share"]
    wins = "no answers of unequal length" if share is None else f"the longer answer wins in {share:.1%}"
    rows = [
        [_gap(bucket), bucket["pairs"], bucket["longer_wins"] if bucket["gap_from"] else None,
         None if bucket["share"] is None else f"{bucket['share']:.1%}"]
        for bucket in bias["buckets"]
    ]
    return [
        f"length bias: {wins} ({bias['equal_length']} pairs have equal lengths)",
        f"  mean length in {unit}: {bias['mean_chosen']:.1f} chosen, {bias['mean_rejected']:.1f} rejected, gap "
        f"{bias['mean_gap']:+.1f}; correlation of label and length {correlation}",
        *table([[f"gap in {unit}", "pairs", "longer wins", "share"], *rows]),
    ]


def _gap(bucket: Mapping[str, Any]) -> str:
    low, below = bucket["gap_from"], bucket["gap_below"]
    if below is None:
        return f"{low} or more"
    return str(low) if below == low + 1 else f"{low} to {below - 1}"


def _users(report: Mapping[str, Any]) -> list[str]:
    users = report["users"]
    if users is None:
        return []
    lines = [
        f"users: {users['count']}, choices per user: min {users['choices_min']}, median "
        f"{_cell(float(users['choices_median']))}, max {users['choices_max']}",
        f"  with at least 4 choices: {users['with_at_least_4']}; with at least 20: {users['with_at_least_20']}",
    ]
    if users["rows_without_user"]:
        lines.append(f"  rows without a user: {users['rows_without_user']}")
    return lines


def _some(lines: Sequence[str]) -> list[str]:
    shown = [f"  {line}" for line in lines[:LINES_SHOWN]]
    left = len(lines) - LINES_SHOWN
    return [*shown, f"  ... and {left} more (--json lists all)"] if left > 0 else shown
