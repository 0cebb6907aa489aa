"""The evidence for personalisation on one page: the report of a few choices, and what the other benchmarks found.

    edgealign run personalization
    python benchmarks/personalization_page.py runs/personalization/report --results docs/results

Writes personalization.md into --results, the report's tables, numbers and pictures into personalization/ beside it, and
takes in the tables and pictures of the benchmarks whose results lie there already. Everything is copied, nothing is
measured or typed here.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from edgealign.artifact import open_artifact, write_atomic
from edgealign.errors import EdgealignError, InputError, writing

OWN = "personalization"
COPIED = ("table.md", "result.json", "curves.png", "said.png", "kl.png")
OTHERS = {
    "carriers": ("Which carrier moves answers most, for what it costs", "python benchmarks/carriers.py"),
    "carriers_mixed": (
        "The same for people of mixed tastes", "python benchmarks/carriers.py --people mixed",
    ),
    "real_people": ("Real people and real texts", "python benchmarks/real_people.py"),
    "heads": ("Other ways to read a few choices, on features made for the purpose", "python benchmarks/heads.py"),
    "lora_start": ("Where a LoRA of one's own begins", "python benchmarks/lora_start.py"),
    "fspo": ("Choices in the prompt (FSPO)", "python benchmarks/fspo.py"),
    "steering": ("A stated preference (linear alignment)", "edgealign eval steering"),
    "linear_alignment": ("What two streams cost in decoding", "python benchmarks/linear_alignment.py"),
    "lore_speed": ("How long a fit takes", "python benchmarks/lore_speed.py"),
}  # fmt: skip


def page(report: str, results: Path) -> str:
    """Markdown: the report, its pictures where they lie now, then the others, their headings one level lower."""
    for name in COPIED:
        report = report.replace(f"]({name})", f"]({OWN}/{name})")
    parts = [report.rstrip(), ""]
    for name, (title, command) in OTHERS.items():
        folder = results / name
        if not (folder / "table.md").is_file():
            raise InputError(folder, "holds no table.md", f"make it: {command}")
        notes = f", [what it means]({name}/README.md)" if (folder / "README.md").is_file() else ""
        parts += [f"## {title}", "", f"`{command}` ([numbers]({name}/result.json){notes})", ""]
        parts += [f"![{title}]({name}/{picture.name})\n" for picture in sorted(folder.glob("*.png"))]
        lines = (folder / "table.md").read_text(encoding="utf-8").strip().splitlines()
        parts += [*(f"#{line}" if line.startswith("#") else line for line in lines), ""]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what `edgealign eval personalization` published")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    try:
        report = open_artifact(args.report, kind="report")
        missing = [name for name in (*COPIED, "report.md") if not (report.path / name).is_file()]
        if missing:
            raise InputError(args.report, f"has no {missing[0]}", "give a report of edgealign eval personalization")
        text = page((report.path / "report.md").read_text(encoding="utf-8"), args.results)
        with writing(args.results):
            (args.results / OWN).mkdir(parents=True, exist_ok=True)
            for name in COPIED:
                shutil.copyfile(report.path / name, args.results / OWN / name)
            write_atomic(args.results / f"{OWN}.md", text)
    except EdgealignError as error:
        print(f"personalization_page: {error}", file=sys.stderr)
        return 2
    print(f"read {args.results / OWN}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
