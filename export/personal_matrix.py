"""Print the table of docs/personalization.md: which way of being personal works in which runtime.

    python export/personal_matrix.py            print the table
    python export/personal_matrix.py --write    put it into docs/personalization.md

`personal_support.json` says what `tests/personalize/test_support.py` has seen: the test runs every way in every runtime
and fails where the file says more or less. Another test compares the page with this text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SUPPORT = Path(__file__).with_name("personal_support.json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "personalization.md"
BEGIN, END = "<!-- by runtime: python export/personal_matrix.py --write -->", "<!-- end -->"
WAYS = {
    "lore": "LoRe: fitted from the runtime's own reading of the choices",
    "best of n": "best of n by the fitted reward", "tilt": "the next token tilted",
    "linear": "linear alignment to a stated preference", "lora": "a LoRA of one's own, on and off",
    "mix": "a mix of a basis's LoRAs", "neighbours": "the best answer of neighbours' tilts (RPS)",
    "direction": "a direction in the states (control vector)", "fspo": "FSPO: choices in the prompt",
    "prefix state": "the state behind a prefix kept and restored",
}
RUNTIMES = {"torch": "torch", "gguf": "GGUF", "onnx": "ONNX", "executorch": "ExecuTorch"}
WHY = {
    "direction": """\
A direction is added to the residual stream behind a layer; llama.cpp has a place for that, and a GGUF bundle carries it
beside LoRAs. An exported ONNX graph or ExecuTorch program has none: a user's LoRA is their only input.""",
    "prefix state": """\
A state is kept as bytes where the session can read it: torch's cache, llama.cpp's, and the buffers that an ONNX graph
is bound to. An ExecuTorch program keeps its own inside, and nothing reads it back: there the prefix is fed at the
beginning of every conversation, the same answers, later.""",
}


def table() -> str:
    """The whole generated part."""
    stated = json.loads(SUPPORT.read_text(encoding="utf-8"))
    lines = [_row("way", *RUNTIMES.values()), _row(*["---"] * (1 + len(RUNTIMES)))]
    lines += [_row(words, *("yes" if stated[way][name] else "no" for name in RUNTIMES)) for way, words in WAYS.items()]
    reasons = [WHY[way] for way in WAYS if not all(stated[way].values())]
    return "\n".join([BEGIN, *lines, "", *(f"{reason}\n" for reason in reasons), END])


def page(text: str) -> str:
    """The page with the table of now."""
    before, found, rest = text.partition(BEGIN)
    if not found or END not in rest:
        raise SystemExit(f"{PAGE.name} has no line {BEGIN!r} with {END!r} after it")
    return before + table() + rest.partition(END)[2]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table, or write it into the page."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
