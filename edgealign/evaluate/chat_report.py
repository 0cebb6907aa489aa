"""The conversation as people read it: `answers.md` (what was said), `table.md` (the measures), `styles.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Check
from edgealign.evaluate.chat_checks import PLAIN
from edgealign.evaluate.chat_prompts import STORY
from edgealign.evaluate.recipes import ChatRecipe

TITLES = {
    "story": "A story and a question", "greeting": "Greetings and small talk",
    "instruction": "Questions and instructions", "two turns": "Second turns",
}  # fmt: skip
SHOWN_DIFFERENCES = 6
SHOWN_STYLES = (0, 17, 24)  # prompts of which the answers in every style are printed: a story, a greeting, a task


def write_report(folder: Path, result: Mapping[str, Any], recipe: ChatRecipe, checks: Sequence[Check]) -> None:
    """Write the report's files into `folder`."""
    (folder / "table.md").write_text(render(result, recipe, checks), encoding="utf-8")
    (folder / "answers.md").write_text(render_answers(result, recipe), encoding="utf-8")
    draw_styles(folder / "styles.png", result, recipe)


def render(result: Mapping[str, Any], recipe: ChatRecipe, checks: Sequence[Check]) -> str:
    """Markdown: checks first, then every measure with its control."""
    lines = ["| check | measured | needed | verdict | |", "|---|---|---|---|---|"]
    for check in checks:
        verdict = "passed" if check.passed else "**failed**"
        lines.append(f"| {check.name} | {check.value:.3f} | {check.tolerance:.2f} | {verdict} | {check.note} |")
    lines += ["", *_form(result), "", *_topic(result), "", *_styles(result, recipe)]
    if result["bundles"]:
        lines += ["", *_bundles(result, recipe)]
    if "words" in result:
        lines += ["", *_words(result)]
    return "\n".join(lines) + "\n"


def render_answers(result: Mapping[str, Any], recipe: ChatRecipe) -> str:
    """Markdown: every prompt with its greedy and its sampled answer, and three prompts in every style."""
    lines = [
        f"Greedy, and sampled at temperature {recipe.temperature:g}, min-p {recipe.min_p:g}, repetition penalty "
        f"{recipe.repetition_penalty:g}, seed {recipe.seed} plus the prompt's number; at most {recipe.max_new_tokens} "
        "tokens (... where an answer was cut there). Nothing was picked: these are all prompts and all answers.",
    ]
    kind = ""
    for number, prompt in enumerate(result["prompts"]):
        if prompt["kind"] != kind:
            kind = prompt["kind"]
            lines += ["", f"## {TITLES[kind]}"]
        lines += ["", f"**{number + 1}.** {_asked(prompt)}", ""]
        for how in PLAIN:
            lines += [*_quote(how, result["answers"][how][number]), ""]
        lines.pop()
    lines += ["", f"## In every style ({result['styles_runtime']}, greedy)"]
    for number in SHOWN_STYLES:
        if number < len(result["prompts"]):
            lines += ["", f"**{number + 1}.** {_asked(result['prompts'][number])}", ""]
            for style, texts in result["styled_answers"].items():
                lines += [*_quote(style, {"text": texts[number], "ended": True}), ""]
            lines.pop()
    return "\n".join(lines) + "\n"


def draw_styles(file: Path, result: Mapping[str, Any], recipe: ChatRecipe) -> None:
    """A bar per style: share of answers that moved its way, 95 % interval, the control, the share that is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    rows = result["styles"]
    places = range(len(rows))
    shares = [row["share"] for row in rows.values()]
    errors = [
        [row["share"] - row["low"] for row in rows.values()], [row["high"] - row["share"] for row in rows.values()]
    ]  # fmt: skip
    colours = ["#4c72b0" if share >= recipe.follows else "#c44e52" for share in shares]
    axis.barh(places, shares, height=0.55, color=colours, xerr=errors, error_kw={"elinewidth": 1, "capsize": 3})
    controls = [row["control"] for row in rows.values()]
    axis.plot(controls, places, "|", color="0.75", markersize=22, markeredgewidth=5, label="_")
    axis.plot(controls, places, "|", color="0.35", markersize=22, markeredgewidth=2, label="asked for other styles")
    axis.axvline(recipe.follows, color="black", linestyle="--", linewidth=1, label=f"needed: {recipe.follows:.0%}")
    for place, row in zip(places, rows.values(), strict=True):
        axis.text(1.02, place, f"{row['hits']}/{row['total']}", va="center", fontsize=9)
    axis.set_yticks(places, list(rows))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.set_xlabel("answers that moved the way the system turn asks, 95 % interval")
    axis.set_title(f"Seven styles, {next(iter(rows.values()))['total']} prompts, {result['styles_runtime']}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False, markerscale=0.6)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def _form(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "| answers | end their turn | like sentences | empty | words | repeated runs of four words |",
        "|---|---|---|---|---|---|",
    ]
    for how in PLAIN:
        row = result["measures"][how]
        shares = f"{row['ended']}/{row['total']} | {row['sentences']}/{row['total']} | {row['empty']}"
        lines.append(f"| {how} | {shares} | {row['words']:.1f} | {row['repeated']:.1%} |")
    return [*lines, "", "Like sentences: begins with a capital and ends with . ! or ?. Words: mean of the answers."]


def _topic(result: Mapping[str, Any]) -> list[str]:
    topic = result["topic"]
    lines = [
        "| answers about a story | content words of that story | of others | expected word | that of others |",
        "|---|---|---|---|---|",
    ]
    for how in PLAIN:
        row = topic[how]
        keyword = f"{row['keyword']}/{row['total']} | {row['keyword_control']:.1%}"
        lines.append(f"| {how} | {row['own']:.1%} | {row['control']:.1%} | {keyword} |")
    stories = sum(prompt["kind"] == STORY for prompt in result["prompts"])
    gain = f"{topic['gain']:+.2f} (95 % from {topic['low']:+.2f} to {topic['high']:+.2f}, {stories} stories)"
    return [*lines, "", f"Own story minus others: {gain}. Expected: at least one word of the question's list."]


def _styles(result: Mapping[str, Any], recipe: ChatRecipe) -> list[str]:
    lines = [
        f"Styles, on {result['styles_runtime']}, greedy, against no system turn; {recipe.follows:.0%} are needed:",
        "",
        "| style | moved its way | 95 % interval | when other styles were asked for |",
        "|---|---|---|---|",
    ]
    for name, row in result["styles"].items():
        interval = f"{row['low']:.0%} to {row['high']:.0%}"
        lines.append(f"| {name} | {row['hits']}/{row['total']} | {interval} | {row['control']:.0%} |")
    return lines


def _bundles(result: Mapping[str, Any], recipe: ChatRecipe) -> list[str]:
    lines = [
        f"First {recipe.agree_tokens} greedy tokens (the end of the turn is one), bundle against torch:",
        "",
        "| bundle | same tokens | ties among the rest | where they part: prompt, position, torch's / bundle's token |",
        "|---|---|---|---|",
    ]
    for label, row in result["bundles"].items():
        found = row["differences"]
        parts = "; ".join(
            f"{entry['prompt'] + 1}, {entry['position']}, {_cell(entry['torch'])} {entry['torch_probability']:.3f} / "
            f"{_cell(entry['bundle'])} {entry['bundle_probability']:.3f}"
            for entry in found[:SHOWN_DIFFERENCES]
        )
        if len(found) > SHOWN_DIFFERENCES:
            parts += f"; {len(found) - SHOWN_DIFFERENCES} more in result.json"
        ties = f"{sum(entry['tie'] for entry in found)}/{len(found)}"
        lines.append(f"| {label} | {row['same']}/{row['total']} | {ties} | {parts or '-'} |")
    return [*lines, "", "Numbers: the probability of both tokens in torch. A tie: less than 0.1 nats between them."]


def _words(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "| words of | known to the training text | neighbouring pairs | pairs of the same words shuffled |",
        "|---|---|---|---|",
    ]
    for name, row in result["words"].items():
        lines.append(f"| {name} | {row['words']:.1%} | {row['pairs']:.1%} | {row['pairs_shuffled']:.1%} |")
    return [*lines, "", "No rule reads grammar: known pairs, against the same words shuffled, stand in for it."]


def _asked(prompt: Mapping[str, Any]) -> str:
    turns = [str(message["content"]).replace("\n\n", "  \n") for message in prompt["messages"]]
    if len(turns) == 1:
        return turns[0]
    roles = [message["role"] for message in prompt["messages"]]
    return "  \n".join(f"*{role}:* {turn}" for role, turn in zip(roles, turns, strict=True))


def _quote(name: str, answer: Mapping[str, Any]) -> list[str]:
    lines = f"{answer['text'] or '(nothing)'}{'' if answer['ended'] else ' ...'}".splitlines()
    if len(lines) == 1:
        return [f"> *{name}:* {lines[0]}"]
    return [f"> *{name}:*  ", *(f"> {line}  " for line in lines)]


def _cell(token: str) -> str:
    shown = token.replace("|", "\\|").replace("\n", "\\n").replace("`", "'")
    return f"`{shown}`"
