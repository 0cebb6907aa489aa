"""Where a benchmark keeps what it measured: result.json with every sample, table.md and pictures for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgealign.artifact import write_atomic
from edgealign.errors import writing


def write_results(
    out: Path, result: Mapping[str, Any], table: str, *, pictures: Mapping[str, Callable[[Path], object]] | None = None,
    indent: int | None = 1,
) -> None:  # fmt: skip
    """Everything into `out`, which is made; result and table are whole or as they were before.

    Args:
        table: Markdown.
        pictures: what draws each file.
        indent: of the JSON; None: one line, where there are many samples.

    Raises:
        OutputError: they cannot be written.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "result.json", json.dumps(result, indent=indent) + "\n")
        write_atomic(out / "table.md", table.rstrip("\n") + "\n")
        for name, draw in (pictures or {}).items():
            draw(out / name)
