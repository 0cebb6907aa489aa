"""The device that advice is for: this machine, a machine card, a published report's machine, or numbers for a phone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from edgealign.artifact import MANIFEST
from edgealign.bench.compare import MACHINE
from edgealign.bench.imports import read_card
from edgealign.bench.machine import machine_card
from edgealign.bench.published import Report, read_report
from edgealign.errors import UsageError

# Shorter names for numbers of a data sheet: the card's name and what to multiply with.
SHORT: Mapping[str, tuple[str, float]] = {"ram_gb": ("ram_bytes", 1e9), "cores": ("cores_usable", 1)}
POSITIVE = ("ram_bytes", "cores_usable", "bandwidth_gb_s")


@dataclass(frozen=True)
class Device:
    """`card` as edgealign bench writes it; `bandwidth` in bytes per second by threads (None: stated for any)."""

    card: Mapping[str, Any]
    bandwidth: Mapping[int | None, float] = field(default_factory=dict)
    report_digest: str | None = None
    name: str = "this machine"

    @property
    def ram_bytes(self) -> int | None:
        found = self.card.get("ram_bytes")
        return int(found) if found else None

    def read_bandwidth(self, threads: int | None) -> float | None:
        """What was stated, or measured with as many threads; of unknown threads the most."""
        if None in self.bandwidth:
            return self.bandwidth[None]
        if threads is None:
            return max(self.bandwidth.values(), default=None)
        return self.bandwidth.get(threads)


def read_device(items: Sequence[str]) -> Device:
    """`items`: a report's directory, a card's JSON file (or a report's result.json), `name=value`; later ones win.

    Raises:
        UsageError: a name that a card does not have, a value that cannot be.
        InputError: a file or directory that is no card.
    """
    if not items:
        return Device(machine_card())
    card: dict[str, Any] = {}
    bandwidth: dict[int | None, float] = {}
    digest, names = None, []
    for item in items:
        place = Path(item)
        if (place / MANIFEST).is_file():
            report = read_report(place)
            card.update({name: value for name, value in report.result["machine"].items() if value is not None})
            bandwidth.update(report_bandwidth(report))
            digest, names = report.artifact.digest, [f"the machine of {place.name}"]
        elif place.is_file() and (inner := _machine_of_result(place)) is not None:
            card.update({name: value for name, value in inner.items() if value is not None})
        else:
            card.update(read_card([_long_name(item)]))
    for name in POSITIVE:
        if name in card and not card[name] > 0:
            raise UsageError(f"{name}={card[name]}", "cannot be", "leave out what is not known")
    if stated := card.pop("bandwidth_gb_s", None):
        bandwidth[None] = stated * 1e9
    if digest is not None and any("=" in item for item in items):
        digest = None  # a fact was changed: it is another machine now
    name = str(card.get("device") or card.get("cpu") or "; ".join(names) or "a device of which only numbers are known")
    return Device(card, bandwidth, digest, name)


def report_bandwidth(report: Report) -> dict[int | None, float]:
    """Bytes per second by threads, as far as the report has numbers."""
    found: dict[int | None, float] = {}
    entries = report.result.get("bandwidth")
    for entry in entries if isinstance(entries, list) else []:
        threads, speed = (entry.get(name) if isinstance(entry, dict) else None for name in ("threads", "bytes_per_s"))
        if is_positive(speed) and (threads is None or (isinstance(threads, int) and threads > 0)):
            found[threads] = float(speed)
    return found


def is_same_machine(device: Device, report: Report) -> bool:
    """Was the report measured on this very device? It is its own report, or every part of the cards agrees."""
    if device.report_digest is not None and device.report_digest == report.artifact.digest:
        return True
    card = report.result["machine"]
    known = all(device.card.get(name) and card.get(name) for name in ("cpu", "architecture", "cores_usable"))
    return known and all(device.card.get(name) == card.get(name) for name in MACHINE)


def is_positive(value: Any) -> TypeGuard[float]:
    """A finite number above zero, as every measurement is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e18


def _long_name(item: str) -> str:
    name, equals, value = item.partition("=")
    if not equals or name not in SHORT:
        return item
    full, factor = SHORT[name]
    try:
        return f"{full}={round(float(value) * factor)}"
    except (ValueError, OverflowError) as error:
        raise UsageError(item, "is no number", f"give it as {name}=8") from error


def _machine_of_result(file: Path) -> dict[str, Any] | None:
    """The machine part of a report's result.json; None for any other file, which `read_card` then judges."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    inner = raw.get("machine") if isinstance(raw, dict) else None
    if not isinstance(inner, dict):
        return None
    known = {name: value for name, value in inner.items() if value is not None}
    items = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in known.items()]
    return read_card(items)
