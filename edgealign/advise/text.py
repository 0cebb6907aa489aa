"""Advice in words and as a table; every number says how it was had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgealign.advise.candidates import APART, FAILS, MERGED, UNPROVEN, Candidate, Question
from edgealign.advise.choose import Choice
from edgealign.advise.quantity import BOUND, COMPUTED, MEASURED, PREDICTED, UNKNOWN, Quantity
from edgealign.bench.result import MIB, number

MARKS: Mapping[str, str] = {MEASURED: "m", PREDICTED: "p", COMPUTED: "c"}
COLUMNS = ("target", "quant", "adapter", "verdict", "decode tok/s", "first token ms", "memory MiB", "file MiB",
           "MiB a token", "adapter MiB", "KL nat", "change kept")  # fmt: skip
LEGEND = (
    "m: measured, speeds and memory on this very device; p: predicted; c: computed from the model's shapes; at most, "
    "at least: a limit of the bandwidth or of the bytes alone, which can refute a wish and cannot grant one. KL and "
    "the user's change kept are properties of the files, whatever the device. Memory is a whole process of ours, "
    "Python included."
)


def render(question: Question, candidates: Sequence[Candidate], choice: Choice, warnings: Sequence[str]) -> str:
    """Markdown: the advice, what it rests on, the table, the formulas."""
    parts = [
        _advice(question, choice), _rest(question, choice, candidates), [f"**{entry}**" for entry in warnings],
        _table(candidates), [LEGEND], _refused(candidates), _formulas(candidates),
    ]  # fmt: skip
    return "\n".join(line for part in parts if part for line in [*part, ""]).rstrip("\n")


def command(question: Question, entry: Candidate) -> str:
    """What would measure a candidate."""
    recipe = question.recipe
    model, adapter = "MODEL", " --adapter USER=DIR"
    first = "" if entry.carrier != MERGED else "edgealign merge --model MODEL --adapter DIR --out MERGED && "
    if entry.carrier == MERGED:
        model = "MERGED"
    return (
        f"{first}edgealign export --target {entry.target} --quant {entry.quant} --model {model}"
        f"{adapter if entry.carrier == APART else ''} --out BUNDLE && edgealign bench BUNDLE --prompt-tokens "
        f"{recipe.prompt_tokens} --gen-tokens {recipe.gen_tokens} --out REPORT"
    )


def missing(entry: Candidate) -> list[str]:
    """What of a candidate is neither measured nor computed from its files, with how it was had instead."""
    found = []
    for name, quantity in _numbers(entry):
        if quantity.source in (PREDICTED, BOUND, UNKNOWN) and not (name == "change kept" and entry.carrier == "none"):
            how = f"; {quantity.how}" if quantity.value is not None else ""
            found.append(f"{name}: {_words(quantity, high=name == 'decode')}{how}")
    return found


def _advice(question: Question, choice: Choice) -> list[str]:
    device = f"For {question.device.name}"
    if choice.taken is None:
        assert choice.nearest is not None
        return [
            f"**{device}: nothing fits.** Nearest is {choice.nearest.name()}:", "",
            *(f"- {line}" for line in choice.relax),
        ]  # fmt: skip
    taken = choice.taken
    wishes = [f"- {wish.verdict}: {wish.line()}" for wish in taken.wishes] or ["- nothing was wished for"]
    word = ", as far as is known" if taken.verdict == UNPROVEN else ""
    lines = [f"**{device}: {taken.name()}**{word}. Rule: {choice.reason}.", "", *wishes]
    shown = ("KL", "change kept") if question.adapters else ("KL",)
    lines += [f"- {name}: {_words(found)}" for name, found in _numbers(taken) if name in shown]
    return [*lines, *(["", *choice.carrier] if choice.carrier else [])]


def _rest(question: Question, choice: Choice, candidates: Sequence[Candidate]) -> list[str]:
    """What the advice rests on without a measurement, and the command that would make one."""
    entry = choice.taken or choice.nearest
    assert entry is not None
    lines = missing(entry)
    if not lines:
        return ["Everything said of it was measured on this device or counted in its files."]
    unmeasured = sorted(
        {other.target for other in candidates} - {other.target for other in candidates if other.decode_tok_s.known}
    )
    found = ["Not measured of it:", "", *(f"- {line}" for line in lines), ""]
    found.append(f"To measure: `{command(question, entry)}`")
    if unmeasured:
        found.append(f"No speed of {', '.join(unmeasured)} to predict from: give a report of it with --bench.")
    return found


def _table(candidates: Sequence[Candidate]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for entry in candidates:
        cells = [
            entry.target, entry.quant, entry.carrier, entry.verdict if entry.wishes else "-",
            _cell(entry.decode_tok_s, high=True), _cell(entry.first_token_ms), _cell(entry.memory_mib),
            *(_cell(_in_mib(found)) for found in (entry.file_bytes, entry.token_bytes)),
            _cell(_in_mib(entry.adapter_bytes)) if entry.carrier == APART else "-", _cell(entry.kl),
            _cell(entry.kept) + (" (!)" if entry.loses_change else "") if entry.carrier != "none" else "-",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _refused(candidates: Sequence[Candidate]) -> list[str]:
    lines = [
        f"- {entry.name()}: {'; '.join(_by_how_much(entry))}" for entry in candidates if entry.verdict == FAILS
    ]  # fmt: skip
    return ["What does not fit, and by how much:", "", *lines] if lines else []


def _by_how_much(entry: Candidate) -> list[str]:
    missed = (wish for wish in entry.wishes if wish.verdict == FAILS)
    return [f"{wish.line()}, off by {wish.excess:.2f}x" for wish in missed]


def _formulas(candidates: Sequence[Candidate]) -> list[str]:
    """Where each number comes from, once where several have it from the same place."""
    lines = ["Where the numbers come from:", ""]
    for entry in candidates:
        for name, quantity in (*_numbers(entry), ("file", entry.file_bytes)):
            if quantity.source != UNKNOWN:
                lines.append(f"- {entry.name()}, {name} ({quantity.source}): {quantity.how}")
    return lines


def _numbers(entry: Candidate) -> tuple[tuple[str, Quantity], ...]:
    return (
        ("decode", entry.decode_tok_s), ("first token", entry.first_token_ms), ("memory", entry.memory_mib),
        ("KL", entry.kl), ("change kept", entry.kept),
    )  # fmt: skip


def _in_mib(quantity: Quantity) -> Quantity:
    return Quantity(quantity.value / MIB if quantity.value is not None else None, quantity.source, quantity.how)


def _words(quantity: Quantity, *, high: bool = False) -> str:
    if quantity.value is None:
        return f"{UNKNOWN} ({quantity.how})"
    return f"{_number(quantity.value)} ({quantity.source})" if quantity.source != BOUND else _cell(quantity, high=high)


def _cell(quantity: Quantity, *, high: bool = False) -> str:
    """A number with its mark; `high`: its limit is one from above."""
    if quantity.value is None:
        return UNKNOWN
    if quantity.source == BOUND:
        return f"at {'most' if high else 'least'} {_number(quantity.value)}"
    return f"{_number(quantity.value)} {MARKS[quantity.source]}"


def _number(value: float) -> str:
    return number(value) if value >= 1 else f"{value:.3g}"
