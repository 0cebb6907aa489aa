"""Every (target, quantisation, carrier) with its numbers, and whether it grants the wishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgealign.advise.device import Device
from edgealign.advise.evidence import Cell, Known
from edgealign.advise.predict import Subject, decode_speed, first_token, peak_memory
from edgealign.advise.quantity import COMPUTED, MEASURED, Quantity, unknown
from edgealign.advise.recipes import AdviceRecipe
from edgealign.advise.sizes import ModelFacts, Size, model_size
from edgealign.bench.result import MIB
from edgealign.export_recipes import QUANTS

MERGED, APART, NONE = "merged", "apart", "none"
FITS, UNPROVEN, FAILS = "fits", "not known", "does not fit"


@dataclass(frozen=True)
class Adapter:
    """A user's LoRA and its bytes by (target, quantisation), computed from its shapes."""

    user: str
    digest: str | None
    bytes: Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Question:
    """What does not change from one candidate to the next."""

    recipe: AdviceRecipe
    facts: ModelFacts
    device: Device
    cells: Sequence[Cell]
    known: Sequence[Known]
    adapters: Sequence[Adapter]

    @property
    def users(self) -> int:
        return self.recipe.users or len(self.adapters)


@dataclass(frozen=True)
class Wish:
    """A limit and how far a candidate is from it; `excess` above 1 is too much, by that factor. None: not known."""

    name: str
    wanted: float
    unit: str
    found: Quantity
    excess: float | None

    @property
    def verdict(self) -> str:
        if self.excess is not None and self.excess > 1:
            return FAILS
        return FITS if self.found.known else UNPROVEN

    def line(self) -> str:
        """What was found against what is wanted."""
        found = "not known" if self.found.value is None else f"{self.found.value:,.4g}"
        word = "at least" if self.name == "decode" else "at most"
        return f"{self.name} {found} {self.unit} ({self.found.source}), wanted {word} {self.wanted:,.4g}"


@dataclass(frozen=True)
class Candidate:
    """One way to ship; `kept` is the least correlation of a user's change with torch."""

    target: str
    quant: str
    carrier: str
    file_bytes: Quantity
    token_bytes: Quantity
    adapter_bytes: Quantity
    decode_tok_s: Quantity
    first_token_ms: Quantity
    memory_mib: Quantity
    kl: Quantity
    kept: Quantity
    kept_wanted: float
    wishes: tuple[Wish, ...] = field(default=())

    @property
    def verdict(self) -> str:
        found = {wish.verdict for wish in self.wishes}
        return FAILS if FAILS in found else UNPROVEN if UNPROVEN in found else FITS

    @property
    def loses_change(self) -> bool:
        return self.kept.value is not None and self.kept.value < self.kept_wanted

    def name(self) -> str:
        words = {MERGED: "adapter merged", APART: "adapter apart", NONE: "no adapter"}
        return f"{self.target} {self.quant}, {words[self.carrier]}"

    def to_dict(self) -> dict[str, Any]:
        """As the report has it."""
        names = ("file_bytes", "token_bytes", "adapter_bytes", "decode_tok_s", "first_token_ms", "memory_mib", "kl",
                 "kept")  # fmt: skip
        return {
            "target": self.target, "quant": self.quant, "carrier": self.carrier, "verdict": self.verdict,
            **{name: getattr(self, name).to_dict() for name in names}, "kept_wanted": self.kept_wanted,
            "wishes": [{"wish": wish.name, "verdict": wish.verdict, "line": wish.line()} for wish in self.wishes],
        }  # fmt: skip


def make_all(question: Question, targets: Sequence[str]) -> list[Candidate]:
    """In the order of the tables; quantisations that only a bundle or a report has come after the known ones."""
    carriers = (MERGED, APART, NONE) if question.adapters else (NONE,)
    found = []
    for target in targets:
        seen = [entry.quant for entry in question.known if entry.target == target]
        for quant in dict.fromkeys((*QUANTS[target], *seen)):
            found += [make(question, target, quant, carrier) for carrier in carriers]
    return found


def make(question: Question, target: str, quant: str, carrier: str) -> Candidate:
    """One candidate with everything that is known of it."""
    known = [entry for entry in question.known if (entry.target, entry.quant) == (target, quant)]
    size = model_size(question.facts, target, quant)
    file, token = _file_bytes(known, size), _token_bytes(known, size)
    adapter = _adapter_bytes(question, known, target, quant) if carrier == APART else None
    subject = Subject(
        question.recipe, question.facts, question.device, target, quant, adapter.value if adapter else None,
        file.value, token.value, [cell for cell in question.cells if cell.target == target],
    )  # fmt: skip
    kl = _kl(known, carrier)
    kept, tolerance = _kept(question, known) if carrier == APART else (_no_kept(carrier), 0.0)
    decode, first, memory = decode_speed(subject), first_token(subject), peak_memory(subject)
    return Candidate(
        target, quant, carrier, file, token, adapter or Quantity(0.0, COMPUTED, "no adapter beside the model"),
        decode, first, memory, kl, kept, max(question.recipe.survival, tolerance),
        _wishes(question, decode, first, memory, kl),
    )  # fmt: skip


def _wishes(question: Question, decode: Quantity, first: Quantity, memory: Quantity, kl: Quantity) -> tuple[Wish, ...]:
    recipe, ram = question.recipe, question.device.ram_bytes
    found = []
    if recipe.decode_tok_s:
        excess = recipe.decode_tok_s / decode.value if decode.value else None
        found.append(Wish("decode", recipe.decode_tok_s, "tok/s", decode, excess))
    for name, wanted, unit, quantity in (
        ("first token", recipe.first_token_ms, "ms", first),
        ("memory", recipe.memory_mib or (ram / MIB if ram else None), "MiB", memory),
        ("KL", recipe.kl, "nat", kl),
    ):
        if wanted:
            excess = quantity.value / wanted if quantity.value is not None else None
            found.append(Wish(name, wanted, unit, quantity, excess))
    return tuple(found)


def _file_bytes(known: Sequence[Known], size: Size | None) -> Quantity:
    for entry in known:
        if entry.file_bytes:
            return Quantity(float(entry.file_bytes), MEASURED, f"the file of {entry.origin}")
    return Quantity(float(size.file_bytes), COMPUTED, size.how) if size else unknown("no bundle, and no rule for it")


def _token_bytes(known: Sequence[Known], size: Size | None) -> Quantity:
    for entry in known:
        if entry.token_bytes:
            return Quantity(float(entry.token_bytes), MEASURED, f"counted in {entry.origin}")
    return Quantity(float(size.token_bytes), COMPUTED, size.how) if size else unknown("no bundle, and no rule for it")


def _adapter_bytes(question: Question, known: Sequence[Known], target: str, quant: str) -> Quantity:
    """Of the largest of the given users: one of them is in memory at a time."""
    found = []
    for adapter in question.adapters:
        origin = next((entry for entry in known if adapter.user in entry.adapter_bytes), None)
        if origin is not None:
            how = f"{adapter.user}'s file in {origin.origin}"
            found.append(Quantity(float(origin.adapter_bytes[adapter.user]), MEASURED, how))
        else:
            size = adapter.bytes.get((target, quant)) or max(adapter.bytes.values())
            found.append(Quantity(float(size), COMPUTED, f"{adapter.user}'s matrices in the target's type"))
    return max(found, key=lambda entry: entry.value or 0.0)


def _kl(known: Sequence[Known], carrier: str) -> Quantity:
    """The base's, adapter off; a merged model has other weights, which another gate measures."""
    if carrier == MERGED:
        return unknown("merged weights are rounded anew: the gate measures it when the merged model is exported")
    for entry in known:
        if entry.kl is not None:
            return Quantity(entry.kl, MEASURED, f"the parity gate, {entry.origin}, adapter off")
        if entry.exact is not None:
            how = f"logits within {entry.exact:.1e} of torch ({entry.origin}), and KL is at most twice that"
            return Quantity(2 * entry.exact, COMPUTED, how)
    return unknown("no bundle of it was given: the gate measures it when it is exported")


def _kept(question: Question, known: Sequence[Known]) -> tuple[Quantity, float]:
    """The least of the given users', and the tolerance of the gate that measured it."""
    found, tolerance = [], 0.0
    for adapter in question.adapters:
        for entry in known:
            if adapter.user in entry.kept:
                found.append(Quantity(entry.kept[adapter.user], MEASURED, f"{adapter.user}, {entry.origin}"))
                tolerance = max(tolerance, entry.tolerances.get(adapter.user, 0.0))
                break
            if entry.exact is not None and adapter.user in entry.adapter_bytes:
                found.append(Quantity(1.0, COMPUTED, f"{adapter.user}: 32 bits, as torch; {entry.origin}"))
                break
        else:
            return unknown(f"no bundle of it with {adapter.user} was given"), 0.0
    return min(found, key=lambda entry: entry.value or 0.0), tolerance


def _no_kept(carrier: str) -> Quantity:
    if carrier == MERGED:
        return unknown("what rounding leaves of the change: compare answers of the merged bundle and of torch")
    return unknown("no adapter")
