"""What was measured, as advice needs it: cells of published reports, and what bundles and reports say of fidelity."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from edgealign.advise.device import Device, is_positive, is_same_machine, report_bandwidth
from edgealign.artifact import open_artifact
from edgealign.bench.published import Report
from edgealign.bench.result import Row, pairs
from edgealign.bench.rows import describe_model
from edgealign.errors import InputError
from edgealign.runtimes.session import read_bundle


@dataclass(frozen=True)
class Cell:
    """One measured cell of a report. Bytes are those read for a token, the adapter's included.

    `here`: on the very device that advice is for; `same_model`: with the weights of the model asked about.
    """

    report: str
    bundle: str
    target: str
    quant: str
    user: str | None
    threads: int | None
    n_prompt: int
    n_gen: int
    here: bool
    same_model: bool
    decode_tok_s: float | None
    prefill_tok_s: float | None
    first_token_s: float | None
    peak_bytes: int | None
    file_bytes: int | None
    adapter_bytes: int
    read_bytes: int | None
    bandwidth: float | None
    most_bandwidth: float | None
    cached: bool

    @property
    def share(self) -> float | None:
        """Of the read bandwidth of as many threads, at this decode speed (see bench/roofline.py)."""
        return self._share_of(self.bandwidth)

    @property
    def share_of_all(self) -> float | None:
        """Of the most that the machine reads with any number of threads, which is what a data sheet states."""
        return self._share_of(self.most_bandwidth)

    def _share_of(self, bandwidth: float | None) -> float | None:
        if not (self.decode_tok_s and self.read_bytes and bandwidth):
            return None
        return self.decode_tok_s * self.read_bytes / bandwidth

    def name(self) -> str:
        """Where it can be looked up."""
        with_user = f", adapter {self.user}" if self.user else ""
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        return f"{self.target} {self.quant} in {self.report}{with_user}{threads}"


@dataclass(frozen=True)
class Known:
    """What files and manifests tell of one target and quantisation of the model; `origin` says which."""

    target: str
    quant: str
    origin: str
    file_bytes: int | None
    token_bytes: int | None
    adapter_bytes: Mapping[str, int]
    kl: float | None
    exact: float | None
    kept: Mapping[str, float]
    tolerances: Mapping[str, float]
    adapter_digests: Mapping[str, str]


def read_cells(reports: Mapping[str, Report], device: Device, model_digest: str) -> list[Cell]:
    """Every cell with a speed, in the order of the reports."""
    found = []
    for name, report in reports.items():
        here, bandwidth = is_same_machine(device, report), report_bandwidth(report)
        bundles = {entry["bundle"]: entry for entry in report.result["bundles"]}
        for prompt, decode in pairs(report.result):
            row = prompt or decode
            if row is not None and _speed(prompt, decode):
                known = Device({}, bandwidth).read_bandwidth(row["n_threads"])
                facts = (here, bundles[row["bundle"]], known, max(bandwidth.values(), default=None))
                cache = report.result["machine"].get("cache_bytes")
                found.append(_cell(name, prompt, decode, row, facts, cache, model_digest))
    return found


def read_known(bundles: Sequence[Path], reports: Mapping[str, Report], model_digest: str) -> list[Known]:
    """Facts of the given bundles first, then of the reports' bundles of the same model.

    Raises:
        InputError: a given bundle was made from another model.
    """
    found = [_known_of_bundle(path, model_digest) for path in bundles]
    for name, report in reports.items():
        for entry in report.result["bundles"]:
            if entry["model_digest"] == model_digest and entry["quant"]:
                found.append(_known_of_entry(f"{entry['bundle']} in {name}", entry))
    return found


def _cell(
    report: str, prompt: Row | None, decode: Row | None, row: Row,
    facts: tuple[bool, Mapping[str, Any], float | None, float | None], cache: Any, model_digest: str,
) -> Cell:  # fmt: skip
    here, bundle, bandwidth, most = facts
    adapter = _mapping(bundle.get("adapter_bytes")).get(row["user"]) if row["user"] else 0
    read = _mapping(bundle.get("token_bytes")).get("bytes")
    total = int(read) + (int(adapter) if is_positive(adapter) else 0) if is_positive(read) else None
    prefill = _speed(prompt, None)
    first = _median(prompt.get("ttft_ns")) if prompt else None
    if first is None and prompt is not None and prefill:
        first = prompt["n_prompt"] * 1e9 / prefill
    return Cell(
        report, row["bundle"], row["target"], row["quant"] or "unknown", row["user"], row["n_threads"],
        prompt["n_prompt"] if prompt else decode["n_depth"] if decode else 0, decode["n_gen"] if decode else 0,
        here, bundle["model_digest"] == model_digest, _speed(None, decode), prefill, first / 1e9 if first else None,
        row["peak_bytes"], bundle["file_bytes"], int(adapter) if is_positive(adapter) else 0, total, bandwidth, most,
        bool(total and is_positive(cache) and total <= cache),
    )  # fmt: skip


def _known_of_bundle(path: Path, model_digest: str) -> Known:
    bundle = read_bundle(path)
    artifact = open_artifact(path, kind="bundle", check_digests=False)
    entry = describe_model(path.name, bundle, artifact)
    if entry["model_digest"] != model_digest:
        reason = f"was exported from the model {str(entry['model_digest'])[:12]}, this one is {model_digest[:12]}"
        raise InputError(path, reason, "give bundles of the model that is asked about")
    tolerances = {
        check.name.removeprefix("survival."): check.tolerance for check in artifact.manifest.checks
        if check.name.startswith("survival.") and is_positive(check.tolerance)
    }  # fmt: skip
    users = _mapping(artifact.meta.get("adapters"))
    digests = {str(user): str(_mapping(facts).get("digest") or "") for user, facts in users.items()}
    return _known_of_entry(f"the bundle {path.name}", entry, tolerances, digests)


def _known_of_entry(
    origin: str, entry: Mapping[str, Any], tolerances: Mapping[str, Any] | None = None,
    digests: Mapping[str, str] | None = None,
) -> Known:  # fmt: skip
    fidelity = _mapping(entry.get("fidelity"))
    kl, gap = fidelity.get("kl"), fidelity.get("largest_logit_gap")
    read = _mapping(entry.get("token_bytes")).get("bytes")
    adapters = {user: int(size) for user, size in _mapping(entry.get("adapter_bytes")).items() if is_positive(size)}
    kept = {
        user: float(value) for user, value in _mapping(fidelity.get("change_kept")).items()
        if isinstance(value, (int, float)) and -1.001 <= value <= 1.001
    }  # fmt: skip
    return Known(
        entry["target"], str(entry["quant"]), origin, entry["file_bytes"], int(read) if is_positive(read) else None,
        adapters, float(kl) if _is_distance(kl) else None, float(gap) if _is_distance(gap) else None, kept,
        {user: float(value) for user, value in (tolerances or {}).items()}, dict(digests or {}),
    )  # fmt: skip


def _speed(prompt: Row | None, decode: Row | None) -> float | None:
    """Tokens per second, from the median of the samples that were checked when the report was read."""
    for row in (prompt, decode):
        if row is not None and row["samples_ns"]:
            return float((row["n_prompt"] + row["n_gen"]) * 1e9 / statistics.median(row["samples_ns"]))
    return None


def _median(samples: Any) -> float | None:
    if not isinstance(samples, list) or not samples or not all(map(is_positive, samples)):
        return None
    return float(statistics.median(samples))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_distance(value: Any) -> TypeGuard[float]:
    return value == 0 or is_positive(value)


def caveats(reports: Mapping[str, Report]) -> Iterator[str]:
    """What the reports themselves warn of."""
    for name, report in reports.items():
        for caveat in report.result["caveats"]:
            yield f"{name}: {caveat}"
