"""Speed and memory of one candidate: measured on the device itself, else by the roofline, else a limit or unknown.

A decoded token reads the weights once, so tokens per second = bandwidth x share / bytes per token (bench/roofline.py).
The share is what this target reached where it was measured. Reading a prompt is limited by arithmetic, which bandwidth
does not tell: its time is measured, scaled from another length on the same device, or unknown but for a lower limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgealign.advise.device import Device
from edgealign.advise.evidence import Cell
from edgealign.advise.quantity import BOUND, MEASURED, PREDICTED, Quantity, unknown
from edgealign.advise.recipes import AdviceRecipe
from edgealign.advise.sizes import ModelFacts, cache_bytes, cache_tokens
from edgealign.bench.result import MIB

# An adapter in a report speaks for the user's own if their sizes are this close.
SAME_SIZE = 0.05
ARITHMETIC = "the arithmetic of a prompt is not in the roofline: measure it on the device"


@dataclass(frozen=True)
class Subject:
    """What is asked about: a target and quantisation on a device, with an adapter of so many bytes beside it or none.

    `cells` are the measurements of this target.
    """

    recipe: AdviceRecipe
    facts: ModelFacts
    device: Device
    target: str
    quant: str
    adapter_bytes: float | None
    file_bytes: float | None
    token_bytes: float | None
    cells: Sequence[Cell]

    @property
    def read_bytes(self) -> float | None:
        return None if self.token_bytes is None else self.token_bytes + (self.adapter_bytes or 0.0)

    def has_side(self, cell: Cell) -> bool:
        """An adapter of the same size on, or none: a merged model has the base's shapes."""
        if self.adapter_bytes is None:
            return cell.user is None
        return cell.user is not None and abs(cell.adapter_bytes - self.adapter_bytes) <= SAME_SIZE * self.adapter_bytes

    def is_it(self, cell: Cell) -> bool:
        """Is this cell the candidate itself, on the device itself?"""
        return cell.here and cell.same_model and cell.quant == self.quant and self.has_side(cell)

    def nearest(self) -> list[Cell]:
        """Cells by what they share with the candidate, the most important first; of equals the quickest."""

        def key(cell: Cell) -> tuple[bool, bool, bool, bool, bool, float]:
            shape = cell.n_prompt == self.recipe.prompt_tokens
            return (
                cell.same_model, cell.here, cell.quant == self.quant, self.has_side(cell), shape,
                cell.decode_tok_s or 0.0,
            )  # fmt: skip

        wanted = self.recipe.threads
        fitting = (cell for cell in self.cells if wanted == 0 or cell.threads in (None, wanted))
        return sorted(fitting, key=key, reverse=True)


def decode_speed(subject: Subject) -> Quantity:
    """Tokens per second after the prompt."""
    cells = [cell for cell in subject.nearest() if cell.decode_tok_s]
    if cells and subject.is_it(cells[0]):
        own = cells[0]
        after = f"{own.n_gen} tokens after {own.n_prompt}"
        if own.n_prompt == subject.recipe.prompt_tokens:
            return Quantity(own.decode_tok_s, MEASURED, f"{own.name()}: {after}")
        return Quantity(own.decode_tok_s, PREDICTED, f"{own.name()}: measured for {after}, taken as it is")
    if subject.read_bytes is None:
        return unknown("its bytes per token are not known")
    stated = None in subject.device.bandwidth
    shares = [(cell, cell.share_of_all if stated else cell.share) for cell in cells if cell.share]
    bandwidth = _bandwidth(subject, shares[0][0].threads if shares else None)
    if bandwidth is None:
        return unknown("neither it nor the device's read bandwidth was measured")
    inputs = f"{bandwidth / 1e9:.1f} GB/s / {subject.read_bytes / MIB:,.2f} MiB for a token"
    limit = bandwidth / subject.read_bytes
    cell, share = shares[0] if shares else (None, None)
    if cell is None or share is None:
        return Quantity(limit, BOUND, f"{inputs}; what share of it {subject.target} reaches was not measured")
    if cell.cached or share > 1:
        return Quantity(limit, BOUND, f"{inputs}; {cell.name()} ran from the cache, which says nothing of memory")
    return Quantity(limit * share, PREDICTED, f"{inputs} x {share:.0%}, as {cell.name()} reached{_loan(cell, subject)}")


def first_token(subject: Subject) -> Quantity:
    """Milliseconds from the prompt's token ids to the first token."""
    wanted = subject.recipe.prompt_tokens
    own = (cell for cell in subject.nearest() if subject.is_it(cell) and cell.prefill_tok_s and cell.first_token_s)
    for cell in own:
        assert cell.prefill_tok_s is not None
        assert cell.first_token_s is not None
        if cell.n_prompt == wanted:
            return Quantity(cell.first_token_s * 1e3, MEASURED, f"{cell.name()}: after {cell.n_prompt} tokens")
        how = f"{wanted} tokens / {cell.prefill_tok_s:,.0f} tok/s, measured for {cell.n_prompt} ({cell.name()})"
        return Quantity(wanted / cell.prefill_tok_s * 1e3, PREDICTED, how)
    bandwidth = _bandwidth(subject, None)
    if subject.read_bytes is None or bandwidth is None:
        return unknown(ARITHMETIC)
    how = f"{subject.read_bytes / MIB:,.2f} MiB read once at {bandwidth / 1e9:.1f} GB/s; {ARITHMETIC}"
    return Quantity(subject.read_bytes / bandwidth * 1e3, BOUND, how)


def peak_memory(subject: Subject) -> Quantity:
    """Peak MiB of the process: the file, the KV cache, the adapter, and what the runtime took beyond them."""
    cells = [cell for cell in subject.nearest() if cell.peak_bytes and cell.file_bytes]
    tokens = subject.recipe.prompt_tokens + subject.recipe.gen_tokens
    for cell in cells:
        if subject.is_it(cell) and cell.peak_bytes and cell.n_prompt + cell.n_gen == tokens:
            return Quantity(cell.peak_bytes / MIB, MEASURED, f"peak of {cell.name()}")
    if subject.file_bytes is None:
        return unknown("its size is not known")
    cache, adapter = cache_bytes(subject.facts, subject.target, tokens), subject.adapter_bytes or 0.0
    total = subject.file_bytes + cache + adapter
    places = cache_tokens(subject.facts, subject.target, tokens)
    parts = f"file {subject.file_bytes / MIB:,.1f} + KV cache for {places} tokens {cache / MIB:,.1f}"
    parts += f" + adapter {adapter / MIB:,.1f}" if adapter else ""
    if not cells:
        return Quantity(total / MIB, BOUND, f"{parts}; what {subject.target} takes beyond was not measured")
    cell = cells[0]
    assert cell.peak_bytes is not None
    assert cell.file_bytes is not None
    then = cache_bytes(subject.facts, subject.target, cell.n_prompt + cell.n_gen) if cell.same_model else 0
    beyond = max(0.0, cell.peak_bytes - cell.file_bytes - then - cell.adapter_bytes)
    how = f"{parts} + {beyond / MIB:,.1f} that {cell.name()} took beyond its own, Python included{_loan(cell, subject)}"
    return Quantity((total + beyond) / MIB, PREDICTED, how)


def _bandwidth(subject: Subject, threads: int | None) -> float | None:
    """The device's read bandwidth with the threads of the cell that the share is from; a stated one is for any."""
    threads = subject.recipe.threads or threads
    found = subject.device.read_bandwidth(threads)
    if found is None:
        here = [cell for cell in subject.cells if cell.here and threads in (None, cell.threads)]
        found = max((cell.bandwidth for cell in here if cell.bandwidth), default=None)
    return found


def _loan(cell: Cell, subject: Subject) -> str:
    """What a prediction borrows, in words."""
    borrowed = [
        word for word, other in (
            ("model", not cell.same_model), ("machine", not cell.here), ("quantisation", cell.quant != subject.quant),
        ) if other
    ]  # fmt: skip
    return f" (another {' and '.join(borrowed)})" if borrowed else ""
