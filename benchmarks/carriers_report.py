"""What benchmarks/carriers.py found: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


PAIRED = (
    ("mix of LoRAs 0.5", "tilt 1"), ("mix of LoRAs 1", "tilt 1.5"), ("tilt 1, 5 neighbours", "tilt 1, best of 5"),
    ("tilt 1, best of 5", "tilt 1"),
)  # fmt: skip
MIXED = " of all attributes at once (shares by Dirichlet(1), signs by coin)"


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a carrier; gains with a 95 % bootstrap interval over people."""
    rows = result["rows"]
    found = []
    for name in dict.fromkeys(row["carrier"] for row in rows):
        own = [row for row in rows if row["carrier"] == name]
        count = len({row["person"] for row in own})
        by_person = _by_person(own)
        low, high = _interval(by_person)
        words = np.array([row["words"] for row in own])
        used = [row for row in own if row["used"]]
        found.append({
            "carrier": name, "gain": float(by_person.mean()), "low": low, "high": high,
            "kl_nats": float(np.mean([row["kl_nats"] for row in own])), "words": float(words.mean()),
            "seconds": np.quantile([row["seconds"] for row in own], (0.5, 0.25, 0.75)).tolist(),
            "short": float(np.mean(words < 2)),
            "loops": float(np.mean([row["loops"] for row in own])),
            "bytes": int(np.median([row["bytes"] for row in used] or [0])),
            "refused": count - len({row["person"] for row in used}), "people": count,
        })  # fmt: skip
    return found


def _by_person(rows: Sequence[Mapping[str, Any]]) -> Floats:
    """(P,) mean gains."""
    people = sorted({row["person"] for row in rows})
    return np.array([np.mean([row["gain"] for row in rows if row["person"] == one]) for one in people])


def by_attribute(result: Mapping[str, Any]) -> list[str]:
    """Markdown: mean gains of those who care for one attribute, who stand in its order, as many for each."""
    names = result["attributes"]
    lines = ["Gain, sd, by the one attribute that a person cares for, a few people each:", "",
             f"| carrier | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]  # fmt: skip
    for carrier in dict.fromkeys(row["carrier"] for row in result["rows"]):
        gains = _by_person([row for row in result["rows"] if row["carrier"] == carrier]).reshape(len(names), -1)
        lines.append(f"| {carrier} | {' | '.join(f'{gain:+.2f}' for gain in gains.mean(1))} |")
    return [*lines, ""]


def _interval(values: Floats) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (P,)."""
    means = values[np.random.default_rng(0).integers(0, len(values), (4000, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _paired(rows: Sequence[Mapping[str, Any]], one: str, other: str) -> str:
    """How much further the first moves the same people than the second."""
    gaps = _by_person([row for row in rows if row["carrier"] == one]) - _by_person(
        [row for row in rows if row["carrier"] == other]
    )
    low, high = _interval(gaps)
    return f"- {one} against {other}, the same people: {gaps.mean():+.2f} sd ({low:+.2f} to {high:+.2f})"


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    rows, card, mixed = summary(result), result["machine"], result.get("people") == "mixed"
    order = "" if mixed else "for and against each "
    lines = [
        f"{rows[0]['people']} planted tastes{MIXED if mixed else ''}, {result['choices']} choices each; "
        f"{len(result['rows']) // len(rows)} answers a carrier. Gain: standard deviations nearer to the taste than the "
        "same seeds without one, 95 % intervals over people. Refused: people for whom the carrier's own "
        "check found nothing better than everybody's answers, which they keep.", "",
        "| carrier | gain, sd | KL, nats a token | gain a nat | s an answer [quartiles] | words | under two words "
        "| loops | bytes a person | refused |", "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        a_nat = f"{row['gain'] / row['kl_nats']:.1f}" if row["kl_nats"] > 0 else ""
        middle, low, high = row["seconds"]
        lines.append(
            f"| {row['carrier']} | {row['gain']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}) | {row['kl_nats']:.2f} "
            f"| {a_nat} | {middle:.2f} [{low:.2f}, {high:.2f}] | {row['words']:.0f} | {row['short']:.1%} "
            f"| {row['loops']:.1%} | {row['bytes']:,} | {row['refused'] or ''} |"
        )
    lines += [
        "", "KL of a best of n: the bound ln n - (n - 1) / n on an answer, over its tokens, and what tilt 1 paid where "
        "it is tilted. Bytes of a mix are the weights; the LoRAs are everybody's.", "",
        *(_paired(result["rows"], *pair) for pair in PAIRED), "", *([] if mixed else by_attribute(result)),
        f"Learned of them, {order}of {', '.join(result['attributes'])}: {'; '.join(result['learned'])}.",
        "", f"{card['cpu']}, {result['threads']} threads.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Gain against KL and against the time of an answer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in summary(result) if row["kl_nats"] > 0]
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    families = list(dict.fromkeys(_family(row["carrier"]) for row in rows))
    for axis, key, label in zip(
        figure.subplots(1, 2, sharey=True), ("kl_nats", "seconds"),
        ("KL to the model's own answers, nats a token", "seconds an answer, median"), strict=True,
    ):  # fmt: skip
        for number, family in enumerate(families):
            own = [row for row in rows if _family(row["carrier"]) == family]
            x = [row[key] if key == "kl_nats" else row[key][0] for row in own]
            gain = np.array([row["gain"] for row in own])
            error = np.abs(np.array([[row["low"], row["high"]] for row in own]).T - gain)
            axis.errorbar(x, gain, yerr=error, marker="o", capsize=2, label=family, color=f"C{number}")
        axis.axhline(0, color="0.5", linewidth=1)
        axis.grid(alpha=0.25)
        axis.set_xlabel(label)
    figure.axes[0].set_ylabel("nearer to the taste, standard deviations")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _family(carrier: str) -> str:
    """A carrier without its strength."""
    head, _, last = carrier.rpartition(" ")
    return head if last.replace(".", "").isdigit() and head in ("tilt", "mix of LoRAs") else carrier
