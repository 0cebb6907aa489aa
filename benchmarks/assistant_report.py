"""What benchmarks/assistant_run.py found: tables, a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.bench.timing import percentile, spread

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

BARS = ("the numbers", "everybody's model")
BOOTSTRAP, TTFT_GOAL_MS, SWAP_GOAL_MS = 4000, 10.0, 100.0


def interval(values: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Mean of (U, P) and its 95 % bootstrap interval, people and prompts drawn anew both."""
    rng, (people, prompts) = np.random.default_rng(seed), values.shape
    rows = rng.integers(0, people, (BOOTSTRAP, people))
    columns = rng.integers(0, prompts, (BOOTSTRAP, prompts))
    means = values[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def wins(gains: Floats) -> Floats:
    """1 where the answer is worth more, a half where as much."""
    found: Floats = (gains > 0) + 0.5 * (gains == 0)
    return found


def gains_by_choices(people: Sequence[Mapping[str, Any]]) -> dict[int, Floats]:
    """(U, P) of each number of choices: worth of the person's answer minus the base's."""
    return {int(k): np.array([_gain(each, k) for each in people]) for k in people[0]["worth"]}


def lora_gains(people: Sequence[Mapping[str, Any]]) -> dict[int, Floats]:
    """(U, P) of each number of choices: as `gains_by_choices`, of LoRAs; where none was published the base answers."""
    gains = {k: np.array([np.subtract(each["loras"][k]["worth"], each["worth"]["0"]) for each in people])
             for k in people[0]["loras"]}  # fmt: skip
    nothing = np.zeros_like(next(iter(gains.values())))
    return {0: nothing, **{int(k): found for k, found in gains.items()}}


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = []
    if "choices" in result:
        lines += _choices(list(result["choices"].values()))
    if "latency" in result:
        lines += ["", *_latency(result["latency"])]
    return "\n".join(lines)


def _choices(people: Sequence[Mapping[str, Any]]) -> list[str]:
    prompts = len(people[0]["prompts"])
    lines = [
        f"{len(people)} simulated people, {prompts} unseen questions each, answers with the taste against "
        "answers without, same seeds; 95 % bootstrap over people and questions.", "",
        "| choices | numbers: win rate | worth gained, sd | LoRA: win rate | worth gained, sd |", "|---" * 5 + "|",
    ]  # fmt: skip
    loras = lora_gains(people)
    for k, gains in gains_by_choices(people).items():
        cells = [_percent(wins(gains)), _sd(gains), _percent(wins(loras[k])), _sd(loras[k])]
        lines.append(f"| {k} | {' | '.join(cells)} |")
    control = np.array([_gain(each, "another's") for each in people])
    lines.append(f"| another's 16 | {_percent(wins(control))} | {_sd(control)} | | |")
    counts = [k for k in people[0]["worth"] if k != "0"]
    lines += [
        "", f"| person | hidden taste | learned after 16 | versions | {' | '.join(f'wins at {k}' for k in counts)} | "
        "sd at 16 | empty answers |", "|---" * (len(counts) + 6) + "|",
    ]  # fmt: skip
    for each in people:
        shares = [f"{wins(_gain(each, k)).mean():.0%}" for k in counts]
        lines.append(
            f"| {each['name']} | {each['likes']} | {each['learned'] or 'nothing'} | {each['versions']} | "
            f"{' | '.join(shares)} | {_gain(each, counts[-1]).mean():+.2f} | {each['empty']} of {prompts} |"
        )
    taken = [1000 * choice["seconds"] for each in people for choice in each["choices"]]
    fitted = [made["seconds"] for each in people for made in each["loras"].values()]
    lines += [
        "", f"From a choice to what it taught, in the browser, {len(taken)} choices on a machine in use: median "
        f"{np.median(taken):.0f} ms, p95 {percentile(taken, 0.95):.0f} ms. A LoRA, {len(fitted)} fits: median "
        f"{np.median(fitted):.0f} s, {min(fitted):.0f} to {max(fitted):.0f}.", "",
        "The LoRAs were asked whether the app would use them or not. What the app did with one of 16 choices:", "",
        "| person | LoRA: wins at " + " | ".join(f"{k}" for k in counts) + " | sd at 16 | against the numbers | "
        "against everybody's model |", "|---" * (len(counts) + 4) + "|",
    ]  # fmt: skip
    for place, each in enumerate(people):
        shares = ["none" if "none" in each["loras"][k] else f"{wins(loras[int(k)][place]).mean():.0%}" for k in counts]
        told = [each["tries"][bar]["message"] if bar in each["tries"] else "" for bar in BARS]
        mean = loras[int(counts[-1])][place].mean()
        lines.append(f"| {each['name']} | {' | '.join(shares)} | {mean:+.2f} | {' | '.join(told)} |")
    return lines


def _latency(found: Mapping[str, Any]) -> list[str]:
    over = np.subtract(found["through_ms"], found["bare_ms"])
    rows = {
        "choice pressed to learned, in the browser": found["choice_ms"],
        "first token through the server": found["through_ms"],
        "first token of a bare session": found["bare_ms"],
        "server minus bare, each pair": over.tolist(),
        "first token, another user's LoRA than before": found["changing_ms"],
        "first token, the same user's LoRA": found["staying_ms"],
    }
    lines = ["| ms | n | median | sd | p95 |", "|---|---|---|---|---|"]
    for name, samples in rows.items():
        known = spread(samples)
        lines.append(f"| {name} | {known.n} | {known.median:.1f} | {known.sd:.1f} | {percentile(samples, 0.95):.1f} |")
    ours, swap = float(np.median(over)), percentile(found["changing_ms"], 0.95)
    card = found["machine"]
    quiet = "" if found["quiet"] else f" The machine was busy (load {card['load_average_before'][0]}): read with care."
    return [
        *lines, "",
        f"First token within {TTFT_GOAL_MS:g} ms of the bare session: {_verdict(ours <= TTFT_GOAL_MS)} ({ours:.1f}). "
        f"Swap p95 within {SWAP_GOAL_MS:g} ms: {_verdict(swap <= SWAP_GOAL_MS)} ({swap:.1f}, first token included). "
        f"{card['cpu']}, {card['cores_usable']} cores.{quiet}",
    ]  # fmt: skip


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Win rate and worth by number of choices: a line per person, means and bands of numbers and LoRAs, control."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    people = list(result["choices"].values())
    by_k, loras = gains_by_choices(people), lora_gains(people)
    control = np.array([_gain(each, "another's") for each in people])
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels: tuple[tuple[Callable[[Floats], Floats], str], ...] = (
        (wins, "win rate over everybody's answer"), (np.asarray, "worth gained, sd"),
    )  # fmt: skip
    for axis, (of, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for place, each in enumerate(people):
            values = [of(gains[place]).mean() for gains in by_k.values()]
            named = f"{each['name']}: {each['likes']}"
            axis.plot(list(by_k), values, color=f"C{place}", linewidth=1, alpha=0.7, label=named)
        for known, style, colour, label_of in (
            (by_k, "s-", "black", "numbers, mean and 95 %"), (loras, "D--", "tab:purple", "LoRA, mean and 95 %")
        ):  # fmt: skip
            mean, low, high = np.array([interval(of(gains)) for gains in known.values()]).T
            axis.plot(list(known), mean, style, color=colour, linewidth=2.2, markersize=5, label=label_of)
            axis.fill_between(list(known), low, high, color=colour, alpha=0.1, linewidth=0)
        middle, low, high = interval(of(control))
        axis.errorbar(
            [16.6], [middle], [[middle - low], [high - middle]], fmt="x", color="grey", capsize=3,
            label="control: another's 16 choices",
        )  # fmt: skip
        axis.axhline(0.5 if of is wins else 0.0, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xticks(list(by_k))
        axis.set_xlabel("choices made on the page")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _gain(person: Mapping[str, Any], what: str) -> Floats:
    values = person["another's"] if what == "another's" else person["worth"][what]
    gain: Floats = np.array(values) - np.array(person["worth"]["0"])
    return gain


def _percent(values: Floats) -> str:
    mean, low, high = interval(values)
    return f"{mean:.0%} ({low:.0%} to {high:.0%})"


def _sd(values: Floats) -> str:
    mean, low, high = interval(values)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"
