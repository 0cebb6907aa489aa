"""The candidates as a picture: tokens per second against memory, with the wishes as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgealign.advise.candidates import APART, FAILS, FITS, MERGED, Candidate, Question
from edgealign.advise.choose import Choice
from edgealign.advise.quantity import BOUND, MEASURED
from edgealign.bench.picture import COLOURS
from edgealign.bench.result import MIB

MARKERS = {MERGED: "s", APART: "^", "none": "o"}


def draw(question: Question, candidates: Sequence[Candidate], choice: Choice, file: Path) -> None:
    """A marker for each carrier, a colour for each target; filled: measured; faint: does not fit; ringed: taken."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shown = [entry for entry in candidates if None not in (entry.memory_mib.value, entry.decode_tok_s.value)]
    for entry in shown:
        colour = COLOURS.get(entry.target, "tab:gray")
        x, y = entry.memory_mib.value, entry.decode_tok_s.value
        assert x is not None
        assert y is not None
        filled = entry.decode_tok_s.source == MEASURED
        axis.plot(
            x, y, MARKERS[entry.carrier], color=colour, markerfacecolor=colour if filled else "none", markersize=8,
            alpha={FITS: 1.0, FAILS: 0.25}.get(entry.verdict, 0.7), zorder=3,
        )  # fmt: skip
        if entry.carrier != "none" or not question.adapters:
            limit = " (at most)" if entry.decode_tok_s.source == BOUND else ""
            axis.annotate(f"{entry.quant}{limit}", (x, y), xytext=(6, 3), textcoords="offset points", fontsize=7)
        if entry is choice.taken:
            axis.plot(x, y, "o", color="black", markerfacecolor="none", markersize=17, zorder=2)
    wish = question.recipe
    if wish.decode_tok_s:
        axis.axhline(wish.decode_tok_s, color="0.4", linestyle=":", linewidth=1)
    limit_mib = wish.memory_mib or (question.device.ram_bytes / MIB if question.device.ram_bytes else None)
    if limit_mib:
        axis.axvline(limit_mib, color="0.4", linestyle=":", linewidth=1)
    if shown:
        axis.set_xscale("log")
        axis.set_yscale("log")
    else:
        axis.text(0.5, 0.5, "no speed is known", transform=axis.transAxes, ha="center", va="center")
    for target in dict.fromkeys(entry.target for entry in shown):
        axis.plot([], [], "o", color=COLOURS.get(target, "tab:gray"), label=target)
    for carrier in dict.fromkeys(entry.carrier for entry in shown):
        axis.plot([], [], MARKERS[carrier], color="0.3", markerfacecolor="none", label=f"adapter: {carrier}")
    axis.legend(fontsize=8)
    axis.set_xlabel("memory, MiB")
    axis.set_ylabel("decode, tokens per second")
    axis.set_title(
        f"{question.device.name}\nfilled: measured, hollow: predicted or a limit, faint: does not fit, ring: advice",
        fontsize=9,
    )
    axis.grid(alpha=0.25, which="both")
    figure.savefig(file, dpi=110, metadata={"Software": None})
