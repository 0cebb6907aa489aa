"""A picture of a run: loss, margins, ranking accuracy, drift, from the rows of its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANY_POINTS = 30  # from here on a running mean is drawn over the raw points
WINDOW_SHARE = 0.05


@dataclass(frozen=True)
class Panel:
    """One small diagram: column of the log -> label in the legend."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    level: float | None = None  # a dotted reference line
    level_label: str = ""


LOSS = Panel("loss", "nats", (("loss", "training loss"),))
STEPS = Panel("learning rate", "learning rate", (("learning_rate", "learning rate"),))
SPEED = Panel("speed", "tokens per second", (("tok_per_s", "training"),))
GRADIENT = Panel("gradient norm before clipping", "norm", (("grad_norm", "gradient norm"),))
MARGIN_MEAN = Panel(
    "margin per token, chosen minus rejected", "nats per token", (("margin_mean", "against reference"),), 0.0
)
MARGIN_SUM = Panel("summed margin, chosen minus rejected", "nats", (("margin_sum", "against reference"),), 0.0)
RANKING = Panel(
    "ranking accuracy", "share of pairs", (("hit", "against reference"), ("hit_free", "policy alone")), 0.5, "chance"
)
LOGPROBS = Panel(
    "log-probability per token", "nats per token", (("logp_chosen", "chosen"), ("logp_rejected", "rejected"))
)
DRIFT = Panel("drift from the reference (k3 estimate)", "nats per token", (("kl", "KL, on the data's tokens"),), 0.0)
LENGTHS = Panel("answer length", "tokens", (("tokens_chosen", "chosen"), ("tokens_rejected", "rejected")))

HELD_OUT = Panel("held-out loss", "nats per token", (("held_out", "held-out rows"),))
PEAK = Panel("share of the measured matrix-product peak", "share", (("peak_share", "training"),))

PRETRAIN_PANELS = (LOSS, HELD_OUT, STEPS, GRADIENT, SPEED, PEAK)
TEACHER = Panel(
    "the loss's parts", "nats per token",
    (("ce", "cross-entropy"), ("kl_membership", "membership of the top K"), ("kl_inside", "inside the top K")),
)

DISTILL_PANELS = (LOSS, TEACHER, HELD_OUT, STEPS, GRADIENT, SPEED)
SFT_PANELS = (LOSS, STEPS, GRADIENT, SPEED)
PREFERENCE_PANELS = (LOSS, RANKING, MARGIN_MEAN, MARGIN_SUM, LOGPROBS, DRIFT, LENGTHS, STEPS)


def draw_curves(rows: Sequence[Mapping[str, Any]], panels: Sequence[Panel], file: Path, *, title: str) -> None:
    """Write a PNG; columns that the log lacks are left out, and panels without any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [panel for panel in panels if any(column in row for row in rows for column, _ in panel.lines)]
    columns = 2
    lines = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(11, 2.9 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for panel, axis in zip(shown, axes, strict=False):
        _draw_panel(axis, panel, rows)
    for axis in list(axes):  # the iterator's rest: cells without a panel
        axis.remove()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _draw_panel(axis: Any, panel: Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    for i, (column, label) in enumerate(panel.lines):
        points = [(row["step"], row[column]) for row in rows if column in row]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        colour = f"C{i}"
        if len(points) < MANY_POINTS:
            axis.plot(x, y, color=colour, marker="o", markersize=3, label=label)
        else:
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(x, _running_mean(y), color=colour, label=label)
    if panel.level is not None:
        axis.axhline(panel.level, color="grey", linestyle=":", linewidth=1, label=panel.level_label or None)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.25)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(panel.lines) > 1 or panel.level_label or len(rows) >= MANY_POINTS:
        axis.legend(fontsize=8, loc="best")


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a small share of the points; the ends use what is there."""
    half = max(2, int(len(values) * WINDOW_SHARE) // 2)
    return [
        sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])
    ]
