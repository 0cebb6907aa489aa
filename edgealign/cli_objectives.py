"""`edgealign objectives [KEY]`: the table of preference objectives, or one of them in full. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgealign.cli_options import JsonOption, emit
from edgealign.objectives.entries import OBJECTIVES
from edgealign.objectives.settings import settings_of
from edgealign.objectives.table import CONFIDENCE, MADE, Objective, find


def objectives(
    key: Annotated[str | None, typer.Argument(help="a key or an alias; none: all of them")] = None,
    json: JsonOption = False,
) -> None:
    """Print the preference objectives, or what one needs, its numbers and their ranges, its source."""
    if key is None:
        emit({"objectives": [describe(entry) for entry in OBJECTIVES.values()]}, json=json, text=_table)
    else:
        emit(describe(find(key)), json=json, text=_page)


def describe(entry: Objective) -> dict[str, Any]:
    """An objective as plain data."""
    low, high = entry.band
    letters = {name: letter for letter, name in entry.letters.items()}
    return {
        "key": entry.key, "aliases": list(entry.aliases), "summary": entry.summary, "loss": entry.formula,
        "tokens": entry.reduction, "reference": entry.needs_reference,
        "columns": [name for name in entry.columns if name not in MADE],
        "thumbs": entry.of_sides, "made": [name for name in entry.columns if name in MADE], "state": entry.state,
        "beta": {"default": entry.beta, "range": f"from {low:g} to {high:g}", "letter": letters.get("beta")},
        "settings": {
            name: {"default": setting.default, "range": setting.range, "letter": letters.get(name)}
            for name, setting in settings_of(entry).items()
        },
        "parts": {name: list(offered) for name, offered in entry.parts.items()},
        "confidence": entry.confidence, "trl": entry.trl_equivalent, "source": entry.citation,
    }  # fmt: skip


def _table(found: dict[str, Any]) -> str:
    width = max(len(each["key"]) for each in found["objectives"])
    lines = [f"{'key':{width}}  tokens  beta    what it is"]
    for each in found["objectives"]:
        beta = each["beta"]["default"]
        lines.append(f"{each['key']:{width}}  {each['tokens']:6}  {beta:<6g}  {each['summary']}")
    return "\n".join([*lines, "", "one in full: edgealign objectives KEY; to train: edgealign dpo --objective KEY"])


def _page(found: dict[str, Any]) -> str:
    aliases = f" ({', '.join(found['aliases'])})" if found["aliases"] else ""
    needs = ["pairs or thumbs"] if found["thumbs"] else []
    needs += ["a reference"] if found["reference"] else []
    needs += [f"the column {name}" for name in found["columns"]]
    needs += [f"{name} (made while training)" for name in found["made"]]
    needs += ["a state that is kept between steps"] if found["state"] else []
    lines = [
        f"{found['key']}{aliases}: {found['summary']}",
        f"  loss      {found['loss']}",
        f"  tokens    {found['tokens']}",
        f"  needs     {', '.join(needs) or 'pairs only'}",
    ]
    for name, setting in {"beta": found["beta"], **found["settings"]}.items():
        letter = f" (in the loss: {setting['letter']})" if setting["letter"] else ""
        label = "beta     " if name == "beta" else f"setting   {name}"
        lines.append(f"  {label} {setting['default']:.3g}, {setting['range']}{letter}")
    lines += [f"  setting   {name} {each[0]}, one of {', '.join(each)}" for name, each in found["parts"].items()]
    lines += [
        f"  how sure  {found['confidence']}: {CONFIDENCE[found['confidence']]}".replace("*", ""),
        f"  in TRL    {found['trl'] or 'no'}",
        f"  source    {found['source']}",
    ]
    return "\n".join([*lines, f"  use       edgealign dpo --objective {found['key']}"])
