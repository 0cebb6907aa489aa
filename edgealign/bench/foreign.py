"""Measurements that other programs made, as rows of our result: llama-bench's JSON, ExecuTorch's runner statistics.

    llama-bench -m model.gguf -p 512 -n 0 -d 0 -o json        and  -p 0 -n 100 -d 512
    llama_main --model_path model.pte ...                     its lines `PyTorchObserver {...}`

Everything is checked before it is believed, and rates are computed from the times. Sources: llama.cpp's
tools/llama-bench, executorch's extension/llm/runner/stats.h.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from edgealign.bench.rows import describe_seconds, describe_times
from edgealign.errors import InputError

MARKER = "PyTorchObserver"
LARGEST_FILE = 64 * 2**20
MOST_ROWS, MOST_SAMPLES = 10_000, 1000
MOST_TOKENS, MOST_THREADS = 10_000_000, 4096
LONGEST_NS = 10**15  # 11 days
LATEST_MS = 10**14
LONGEST_TEXT = 500
# How llama.cpp describes a file's quantisation, and what our exporter calls it.
QUANTS: Mapping[str, str] = {
    "all F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0", "Q6_K": "q6_k", "Q5_K - Medium": "q5_k_m",
    "Q4_0": "q4_0", "Q4_K - Medium": "q4_k_m", "IQ4_XS - 4.25 bpw": "iq4_xs",
}  # fmt: skip
AGREE = 0.05  # llama-bench's own rate and the one from its samples


@dataclass(frozen=True)
class Foreign:
    """What a file holds: rows with our field names and cell numbers, and what it says about machine and model."""

    source: str
    target: str
    rows: list[dict[str, Any]]
    cpu: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    load_ns: list[int] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)  # reasons not to compare
    notes: list[str] = field(default_factory=list)  # what a reader should know


def read_foreign(file: Path, *, threads: int | None = None) -> Foreign:
    """Read a file of either kind; `threads` is for ExecuTorch's, which does not say it.

    Raises:
        InputError: it is neither, is damaged, or holds numbers that no machine measures.
    """
    try:
        if file.stat().st_size > LARGEST_FILE:
            _refuse(file, f"has more than {LARGEST_FILE // 2**20} MiB, which no list of measurements has")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(file, f"cannot be read ({error.strerror or error})", "check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(file, "is no text in UTF-8", "give what llama-bench or the runner printed") from error
    if MARKER in text:
        return _read_executorch(file, text, threads)
    return _read_llama_bench(file, text)


def _read_llama_bench(file: Path, text: str) -> Foreign:
    raw = _parse(file, text, "file")
    if not isinstance(raw, list) or not raw or len(raw) > MOST_ROWS:
        _refuse(file, "holds no list of llama-bench rows")
    checked = [_llama_row(_Fields(file, f"row {place}", entry)) for place, entry in enumerate(raw, start=1)]
    both = sum(bool(row["n_prompt"] and row["n_gen"]) for row in checked)
    rows = [row for row in checked if not (row["n_prompt"] and row["n_gen"])]
    if not rows:
        _refuse(file, "times prompt and generation only together (-pg)", "run llama-bench with -p and -n")
    _refuse_repeats(file, rows)
    notes = [f"{both} rows that time prompt and generation together (-pg) were left out"] if both else []
    offloaded = sorted({row["backends"] for row in rows} - {"CPU", ""})
    caveats = [f"llama-bench ran with the backends {', '.join(offloaded)}, not on the CPU alone"] if offloaded else []
    first = rows[0]
    versions = {"llama.cpp": first["build_version"]} if first["build_version"] else {}
    return Foreign(
        "llama-bench", "gguf", _number_cells(rows), first["cpu_info"], versions, caveats=caveats, notes=notes
    )


def _llama_row(fields: _Fields) -> dict[str, Any]:
    n_prompt, n_gen = fields.whole("n_prompt", 0, MOST_TOKENS), fields.whole("n_gen", 0, MOST_TOKENS)
    if not n_prompt + n_gen:
        fields.refuse("has no tokens")
    samples = fields.raw.get("samples_ns")
    if not isinstance(samples, list) or not 0 < len(samples) <= MOST_SAMPLES:
        fields.refuse("has no samples_ns")
    for sample in samples:
        fields.check(sample, "samples_ns", 1, LONGEST_NS, whole=True)
    times = describe_times(samples, n_prompt + n_gen)
    stated = fields.real("avg_ts", 0, 1e12)
    if abs(stated - times["avg_ts"]) > AGREE * times["avg_ts"]:
        fields.refuse(f"says {stated:g} tokens per second, its samples say {times['avg_ts']:g}")
    kind, commit = fields.text("model_type"), fields.text("build_commit")
    number = fields.maybe_whole("build_number")
    model = PurePosixPath(fields.text("model_filename") or "").name or "model.gguf"
    quant = next((ours for theirs, ours in QUANTS.items() if f" {kind}".endswith(f" {theirs}")), None)
    return {
        "bundle": PurePosixPath(model).stem, "target": "gguf",
        "quant": quant or (kind.split()[-1].lower() if kind else None), "user": None,
        "build_commit": commit, "build_number": number,
        "build_version": f"b{number} ({commit})" if number or commit else None,
        "cpu_info": fields.text("cpu_info"), "gpu_info": fields.text("gpu_info") or "",
        "backends": fields.text("backends") or "",
        "model_filename": model, "model_type": kind,
        "model_size": fields.maybe_whole("model_size"), "model_n_params": fields.maybe_whole("model_n_params"),
        "n_batch": fields.maybe_whole("n_batch"), "n_ubatch": fields.maybe_whole("n_ubatch"),
        "n_threads": fields.whole("n_threads", 1, MOST_THREADS), "cpu_mask": fields.text("cpu_mask"),
        "poll": fields.maybe_whole("poll"), "type_k": fields.text("type_k"), "type_v": fields.text("type_v"),
        "test_time": fields.text("test_time"), "n_prompt": n_prompt, "n_gen": n_gen,
        "n_depth": fields.whole("n_depth", 0, MOST_TOKENS, default=0), **_unknown(), **times,
    }  # fmt: skip


def _read_executorch(file: Path, text: str, threads: int | None) -> Foreign:
    runs: dict[tuple[int, int], list[dict[str, int]]] = {}
    loads: dict[tuple[int, int], int] = {}
    for place, line in enumerate(text.splitlines(), start=1):
        _, found, rest = line.partition(MARKER)
        if not found:
            continue
        run = _check_run(_Fields(file, f"line {place}", _parse(file, rest.strip(), f"line {place}")))
        runs.setdefault((run["prompt_tokens"], run["generated_tokens"]), []).append(run)
        if run["load_ms"] > 0:  # one process that answers several times says its one loading each time
            loads[run["load_from_ms"], run["load_ms"]] = run["load_ms"] * 10**6
    if sum(map(len, runs.values())) > MOST_SAMPLES:
        _refuse(file, f"has more than {MOST_SAMPLES:,} runs")
    rows: list[dict[str, Any]] = []
    unmeasured = 0
    for (n_prompt, n_gen), group in runs.items():
        prompt = [run["prefill_ms"] * 10**6 for run in group]
        decode = [run["decode_ms"] * 10**6 for run in group]
        first = [run["first_ms"] * 10**6 for run in group]
        unmeasured += (0 in prompt) + (bool(n_gen) and 0 in decode)
        common = {
            "bundle": "model", "target": "executorch", "quant": None, "user": None, "build_version": None,
            "cpu_info": None, "backends": "", "model_filename": "model.pte", "model_type": None, "n_threads": threads,
            "test_time": None, **_unknown(),
        }  # fmt: skip
        timed = describe_times(None if 0 in prompt else prompt, n_prompt)
        ttft = first if 0 not in first else None
        rows.append({
            **common, "n_prompt": n_prompt, "n_gen": 0, "n_depth": 0, **timed,
            "ttft_ns": ttft, "ttft_s": describe_seconds(ttft),
        })  # fmt: skip
        if n_gen:
            timed = describe_times(None if 0 in decode else decode, n_gen)
            rows.append({**common, "n_prompt": 0, "n_gen": n_gen, "n_depth": n_prompt, **timed})
    notes = ["ExecuTorch's runner counts whole milliseconds, and tokenising as a part of the prompt"]
    if unmeasured:
        notes.append(f"{unmeasured} measures took less than a millisecond, which its clock does not show")
    return Foreign("executorch runner", "executorch", _number_cells(rows), load_ns=list(loads.values()), notes=notes)


def _check_run(fields: _Fields) -> dict[str, int]:
    """One run's durations, after its time stamps proved to be in order."""
    names = ("model_load_start_ms", "model_load_end_ms", "inference_start_ms", "prompt_eval_end_ms", "inference_end_ms")
    load_from, load_to, start, prompt, end = (fields.whole(name, 0, LATEST_MS) for name in names)
    first = fields.whole("first_token_ms", 0, LATEST_MS) or prompt
    if fields.raw.get("SCALING_FACTOR_UNITS_PER_SECOND", 1000) != 1000:
        fields.refuse("does not count in milliseconds")
    if load_to < load_from or not start <= prompt <= end or not start <= first <= end:
        fields.refuse("has time stamps that run backwards")
    return {
        "prompt_tokens": fields.whole("prompt_tokens", 1, MOST_TOKENS),
        "generated_tokens": fields.whole("generated_tokens", 0, MOST_TOKENS),
        "load_from_ms": load_from, "load_ms": load_to - load_from,
        "prefill_ms": prompt - start, "first_ms": first - start, "decode_ms": end - prompt,
    }  # fmt: skip


def _number_cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give a prompt and the tokens decoded right after it one cell number, everything else its own."""
    waiting: dict[tuple[Any, ...], int] = {}
    cell = 0
    for row in rows:
        if row["n_prompt"]:
            row["cell"] = cell
            waiting[row["bundle"], row["quant"], row["n_threads"], row["n_depth"] + row["n_prompt"]] = cell
            cell += 1
    for row in rows:
        if row["n_gen"]:
            found = waiting.pop((row["bundle"], row["quant"], row["n_threads"], row["n_depth"]), None)
            row["cell"] = cell if found is None else found
            cell += found is None
    return sorted(rows, key=lambda row: (row["cell"], row["n_gen"]))


def _refuse_repeats(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    seen = set()
    for row in rows:
        key = tuple(row[name] for name in ("bundle", "quant", "n_threads", "n_prompt", "n_gen", "n_depth"))
        if key in seen:
            what = f"{row['n_prompt']} + {row['n_gen']} tokens after {row['n_depth']} with {row['n_threads']} threads"
            _refuse(file, f"measures {what} twice", "run llama-bench with one setting at a time")
        seen.add(key)


def _unknown() -> dict[str, Any]:
    """What our own rows have and no foreign file says."""
    names = ("flash_attn", "load_mode", "extra_bufts", "error", "peak_bytes", "interpreter_bytes", "ttft_ns", "ttft_s")
    return dict.fromkeys(names)


def _parse(file: Path, text: str, where: str) -> Any:
    def refuse_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number")

    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = f"its {where} is no whole JSON ({str(error)[:100]})" if text.strip() else "is empty"
        fix = "give what llama-bench -o json printed, or the log of ExecuTorch's runner"
        raise InputError(file, reason, fix) from error


def _refuse(file: Path, reason: str, fix: str = "give what llama-bench -o json printed") -> NoReturn:
    raise InputError(file, reason, fix)


class _Fields:
    """The fields of one row, each held against what it can be."""

    def __init__(self, file: Path, where: str, raw: Any) -> None:
        self.file, self.where = file, where
        if not isinstance(raw, dict):
            self.refuse("is no row of fields")
        self.raw: dict[str, Any] = raw

    def whole(self, name: str, least: int, most: int, *, default: int | None = None) -> int:
        return int(self.check(self.raw.get(name, default), name, least, most, whole=True))

    def maybe_whole(self, name: str) -> int | None:
        return None if self.raw.get(name) is None else self.whole(name, 0, 10**15)

    def real(self, name: str, least: float, most: float) -> float:
        return float(self.check(self.raw.get(name), name, least, most))

    def text(self, name: str) -> str | None:
        """One line of text without what would break a table; None for nothing."""
        value = self.raw.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > LONGEST_TEXT):
            self.refuse(f"has {name} that is no short text")
        kept = "".join(char if char.isprintable() and char not in "|`<>" else " " for char in value or "")
        return " ".join(kept.split()) or None

    def check(self, value: Any, name: str, least: float, most: float, *, whole: bool = False) -> Any:
        kinds = int if whole else (int, float)
        if value is None:
            self.refuse(f"lacks {name}")
        if isinstance(value, bool) or not isinstance(value, kinds) or (isinstance(value, float) and math.isinf(value)):
            self.refuse(f"has {name} = {str(value)[:40]}, which is no {'whole ' if whole else ''}number")
        if not least <= value <= most:
            self.refuse(f"has {name} = {str(value)[:40]}, outside of {least:g} to {most:g}")
        return value

    def refuse(self, reason: str) -> NoReturn:
        raise InputError(self.file, f"its {self.where} {reason}", "measure again, or remove it")
