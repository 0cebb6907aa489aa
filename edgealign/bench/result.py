"""What table, pictures and comparison need to know about a result's rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

MIB = 2**20
ABSENT = "not measured"
UNKNOWN = "not known"

Row = Mapping[str, Any]


def pairs(result: Mapping[str, Any]) -> Iterator[tuple[Row | None, Row | None]]:
    """Each speed cell's prompt row and decode row, bundle by bundle; one is missing where only the other was timed."""
    cells: dict[int, list[Row]] = {}
    for row in result["results"]:
        cells.setdefault(row["cell"], []).append(row)
    order = list(dict.fromkeys(row["bundle"] for row in result["results"]))
    for found in sorted(cells.values(), key=lambda rows: order.index(rows[0]["bundle"])):
        prompt = next((row for row in found if row["n_prompt"]), None)
        decode = next((row for row in found if row["n_gen"]), None)
        yield prompt, decode


def shape(prompt: Row | None, decode: Row | None) -> str:
    """Tokens fed at once and tokens decoded after them, and what stood before both."""
    n_prompt, n_gen = prompt["n_prompt"] if prompt else 0, decode["n_gen"] if decode else 0
    before = prompt["n_depth"] if prompt else decode["n_depth"] if decode else 0
    return f"{n_prompt} + {n_gen}" + (f" after {before}" if before else "")


def measure_name(row: Mapping[str, Any]) -> str:
    """A measure with its tokens and its unit."""
    if row["measure"] == "decode":
        return f"decode {row['n_gen']} after {row['n_depth']}, tok/s"
    after = f" after {row['n_depth']}" if row["n_depth"] else ""
    return f"prefill {row['n_prompt']}{after}, tok/s"


def titles(result: Mapping[str, Any]) -> dict[str, str]:
    """Each bundle by target and quantisation, and by its name too where that does not tell it from another."""
    plain = {
        entry["bundle"]: " ".join(part for part in (entry["target"], entry["quant"]) if part) or entry["bundle"]
        for entry in result["bundles"]
    }
    counts = Counter(plain.values())
    return {name: title if counts[title] == 1 else f"{title}: {name}" for name, title in plain.items()}


def machine_line(result: Mapping[str, Any]) -> str:
    """One line under which pictures are looked at: the machine, and whether its numbers may be compared."""
    card = result["machine"]
    threads = sorted({row["n_threads"] for row in result["results"] if row["n_threads"]})
    known = [card.get("device"), card["cpu"], f"threads: {', '.join(map(str, threads))}" if threads else "", card["os"]]
    line = ", ".join(part for part in known if part) or "an unknown machine"
    return line if result["comparable"] else f"{line}. NOT COMPARABLE: {result['caveats'][0]}"


def number(value: float) -> str:
    """Three digits or so, for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
