"""The picture of a merge search: held-out loss per candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

BEST, OTHER = "#1b5e8c", "#a9c4d6"


def draw_candidates(names: Sequence[str], losses: Sequence[float], best: int, file: Path) -> None:
    """Horizontal bars; the axis starts near the smallest loss because the differences are small."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    low, high = min(losses[i] for i in kept), max(losses[i] for i in kept)
    figure = Figure(figsize=(7.5, 0.6 + 0.28 * len(kept)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(
        [names[i] for i in kept], [losses[i] for i in kept], color=[BEST if i == best else OTHER for i in kept]
    )
    axes.invert_yaxis()
    axes.set_xlim(low - 0.1 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
    axes.set_xlabel("held-out loss (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110, metadata={"Software": None})
