"""A benchmark result as pictures: `speed.png`, all cells as bars; `front.png`, what a decode speed costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.bench.result import MIB, machine_line, measure_name, number, pairs, shape, titles

ROW_INCHES = 0.26
GAP = 0.6  # between bundles, in rows
# A colour for each target, by name so that pictures of several reports agree; others follow.
COLOURS = {"gguf": "tab:blue", "onnx": "tab:orange", "executorch": "tab:green"}


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Medians with the standard deviation, grouped by bundle, a colour for each target; adapters are hatched."""
    plt = _pyplot()
    cells = [(prompt, decode) for prompt, decode in pairs(result) if _measured(prompt) or _measured(decode)]
    heads = [prompt or decode for prompt, decode in cells]
    places, groups = _places(heads)
    height = 1.7 + ROW_INCHES * (max(places, default=1.0) + 1)
    figure, axes = plt.subplots(1, 3, figsize=(14, height), sharey=True, layout="constrained")
    paints = [_paint(head) for head in heads]
    for axis, side, title in ((axes[0], 0, "Prefill"), (axes[1], 1, "Decode")):
        _speed_bars(axis, places, [pair[side] for pair in cells], paints)
        axis.set_title(f"{title} (longer is better)")
    _memory_bars(axes[2], places, heads, paints, {entry["bundle"]: entry["file_bytes"] for entry in result["bundles"]})
    axes[0].set_yticks(places, [_label(result, prompt, decode) for prompt, decode in cells], fontsize=8)
    named = titles(result)
    for name, place in groups.items():
        axes[0].annotate(
            named[name], (0, place), xytext=(3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=9, weight="bold", va="center",
        )  # fmt: skip
    if places:
        axes[0].set_ylim(max(places) + 0.7, -1.2)
    figure.suptitle(machine_line(result), fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_front(result: Mapping[str, Any], file: Path) -> None:
    """Size and KL against decode speed, adapter off, at the most threads: right and low is good."""
    plt = _pyplot()
    threads = max((row["n_threads"] or 0 for row in result["results"]), default=0)
    points: dict[str, tuple[float, float | None, float | None]] = {}
    bundles = {entry["bundle"]: entry for entry in result["bundles"]}
    for _, decode in pairs(result):
        if decode and _measured(decode) and not decode["user"] and (decode["n_threads"] or 0) == threads:
            bundle = bundles[decode["bundle"]]
            size = bundle["file_bytes"] / MIB if bundle["file_bytes"] else None
            points.setdefault(decode["bundle"], (decode["median_ts"], size, bundle["fidelity"]["kl"]))
    named = titles(result)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, which, title, unit in ((axes[0], 1, "Size", "MiB of the model"), (axes[1], 2, "KL", "nat to torch")):
        known = {
            named[name]: (point[0], point[which], colour(bundles[name]["target"]))
            for name, point in points.items() if point[which] is not None
        }  # fmt: skip
        _scatter(axis, known)
        left_out = [named[name] for name in points if named[name] not in known]
        axis.set_title(f"{title} against decode speed (right and low is better)", fontsize=10)
        axis.set_xlabel("decode, tokens per second (median)" + (f", {threads} threads" if threads else ""))
        axis.set_ylabel(unit)
        if left_out:
            note = f"not measured: {', '.join(left_out)}"
            axis.text(0.5, 0.02, note, transform=axis.transAxes, ha="center", va="bottom", fontsize=8, color="0.35")
    figure.suptitle(machine_line(result), fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_comparison(result: Mapping[str, Any], file: Path) -> None:
    """The medians of every report side by side with their intervals, prefill and decode; a colour for each report."""
    plt = _pyplot()
    names = result["reports"]
    paints = {name: plt.get_cmap("tab10")(place % 10) for place, name in enumerate(names)}
    sides = [[row for row in result["rows"] if row["measure"] == which] for which in ("prefill", "decode")]
    most = max(map(len, sides), default=1) * len(names)
    figure, axes = plt.subplots(1, 2, figsize=(14, 1.7 + ROW_INCHES * 1.1 * max(most, 3)), layout="constrained")
    for axis, rows, title in zip(axes, sides, ("Prefill", "Decode"), strict=True):
        ends = [1.0]
        for place, row in enumerate(rows):
            for turn, name in enumerate(names):
                at = place + 0.8 * ((turn + 0.5) / len(names) - 0.5)
                found = row["found"].get(name)
                if found is None:
                    axis.text(0, at, f" not measured ({name})", va="center", fontsize=7, color="0.35")
                    continue
                low, high = found["low"] or found["median"], found["high"] or found["median"]
                error = [[found["median"] - low], [high - found["median"]]]
                look = {"color": paints[name], "ecolor": "0.2", "capsize": 2}
                axis.barh(at, found["median"], 0.8 / len(names), xerr=error, **look)
                times = row["ratios"].get(name)
                beside = f" ({times['ratio']:.2f} x)" if times else ""
                axis.text(high, at, f"  {number(found['median'])}{beside}", va="center", fontsize=7)
                ends.append(high)
        labels = [
            f"{' '.join(filter(None, (row['target'], row['quant'], row['bundle'])))}, adapter "
            f"{row['adapter']}, {row['threads'] or '?'} threads\n{measure_name(row)}" for row in rows
        ]  # fmt: skip
        axis.set_yticks(range(len(rows)), labels, fontsize=8)
        axis.set_ylim(max(len(rows), 1) - 0.4, -0.6)
        axis.set_xlim(0, max(ends) * 1.3)
        axis.set_xlabel("tokens per second, median and its interval (longer is better)")
        axis.set_title(title)
    handles = [plt.Rectangle((0, 0), 1, 1, color=paints[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), fontsize=9)
    against = result["differences"]
    line = f"NOT COMPARABLE: {against[0]}" if against else "same machine, versions and model"
    figure.suptitle(line if len(line) < 160 else line[:157] + "...", fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def colour(target: str | None) -> str:
    return COLOURS.get(target or "", "tab:gray")


def _speed_bars(axis: Any, places: Sequence[float], rows: Sequence[Any], paints: Sequence[Mapping[str, Any]]) -> None:
    ends = [1.0]
    for place, row, paint in zip(places, rows, paints, strict=True):
        if not _measured(row):
            axis.text(0, place, " not measured", va="center", fontsize=8, color="0.35")
            continue
        value, deviation = row["median_ts"], row["stddev_ts"] or 0.0
        below = min(value, deviation)
        axis.barh(place, value, xerr=[[below], [deviation]], ecolor="0.2", capsize=2, height=0.8, **paint)
        axis.text(value + deviation, place, f"  {number(value)}", ha="left", va="center", fontsize=8)
        ends.append(value + deviation)
    axis.set_xlim(0, max(ends) * 1.2)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel("tokens per second, median ± sd")


def _memory_bars(
    axis: Any, places: Sequence[float], rows: Sequence[Any], paints: Sequence[Mapping[str, Any]],
    sizes: Mapping[str, int | None],
) -> None:  # fmt: skip
    ends = [1.0]
    for place, row, paint in zip(places, rows, paints, strict=True):
        size = (sizes[row["bundle"]] or 0) / MIB
        if row["peak_bytes"]:
            peak = row["peak_bytes"] / MIB
            axis.barh(place, peak, height=0.8, **paint)
            axis.text(peak, place, f" {number(peak)}", ha="left", va="center", fontsize=8)
            ends.append(peak)
        else:
            axis.text(size, place, "  not measured", va="center", fontsize=8, color="0.35")
        if size:
            axis.plot([size, size], [place - 0.4, place + 0.4], color="black", linewidth=2)
            ends.append(size)
    axis.set_xlim(0, max(ends) * 1.2)
    axis.set_xlabel("MiB of the process; black line: model file")
    axis.set_title("Peak memory (shorter is better)")


def _scatter(axis: Any, points: Mapping[str, tuple[float, Any, str]]) -> None:
    """Points with their names almost upright, so that neighbours' names do not meet; of close points one is higher."""
    if not points:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="0.35")
        return
    from matplotlib import ticker

    right, values = max(point[0] for point in points.values()), [point[1] for point in points.values()]
    if min(values) > 0 and max(values) > 4 * min(values):
        axis.set_yscale("log")
        axis.set_ylim(min(values) / 1.6, max(values) * (max(values) / min(values)) ** 0.6)
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, place: f"{value:,.4g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axis.set_ylim(0, (max(values) or 1) * 1.6)
    axis.set_xlim(0, (right or 1) * 1.15)
    axis.grid(alpha=0.3, linewidth=0.5)
    taken: list[float] = []
    for name, (speed, value, paint) in sorted(points.items(), key=lambda item: item[1][0]):
        axis.plot(speed, value, "o", color=paint, markersize=7)
        above = 8 + 75 * sum(abs(speed - other) < 0.03 * right for other in taken)
        taken.append(speed)
        axis.annotate(
            name, (speed, value), xytext=(1, above), textcoords="offset points", rotation=75, rotation_mode="anchor",
            ha="left", va="center", fontsize=8, arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "0.5"},
        )  # fmt: skip


def _places(heads: Sequence[Any]) -> tuple[list[float], dict[str, float]]:
    """Where each row stands, and each bundle's title above its rows."""
    places: list[float] = []
    groups: dict[str, float] = {}
    at = -1.0
    for head in heads:
        if head["bundle"] not in groups:
            at += 1 + (GAP if groups else 0)
            groups[head["bundle"]] = at
        at += 1
        places.append(at)
    return places, groups


def _paint(head: Any) -> dict[str, Any]:
    """Bars with an adapter are hatched, so that they differ without colours too."""
    with_user = bool(head["user"])
    return {"color": colour(head["target"]), "alpha": 0.6 if with_user else 1.0, "hatch": "//" if with_user else ""}


def _label(result: Mapping[str, Any], prompt: Any, decode: Any) -> str:
    head = prompt or decode
    rows = result["results"]
    parts = [f"adapter {head['user']}" if head["user"] else "no adapter"]
    if len({row["n_threads"] for row in rows}) > 1:
        parts.append(f"{head['n_threads']} thread" + ("s" if head["n_threads"] != 1 else ""))
    if len({(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows}) > 2:
        parts.append(shape(prompt, decode))
    return ", ".join(parts)


def _measured(row: Any) -> bool:
    return bool(row and row["median_ts"])


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
