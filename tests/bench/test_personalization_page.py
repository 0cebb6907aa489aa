"""benchmarks/personalization_page.py: one page of what was measured, and nothing half-written without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from edgealign.artifact import publish

REPORT = "# What a few choices tell\n\n![Accuracy](curves.png)\n\nVerdict: all checks passed.\n"


@pytest.fixture
def page(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("personalization_page")


def report(out: Path, files: tuple[str, ...]) -> Path:
    with publish(out, kind="report", format="few-shot", stage="eval_few_shot", recipe={}) as draft:
        for name in files:
            (draft.dir / name).write_text(REPORT if name == "report.md" else f"the {name}", encoding="utf-8")
    return out


def test_the_page_has_the_report_and_every_table_and_picture_where_it_lies(page: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "results"
    for name in page.OTHERS:
        (results / name).mkdir(parents=True)
        (results / name / "table.md").write_text(f"# Of {name}\n\n| a |\n|---|\n| 1 |\n", encoding="utf-8")
    (results / "heads" / "heads.png").write_bytes(b"png")
    (results / "fspo" / "README.md").write_text("a null result", encoding="utf-8")
    assert page.main([str(report(tmp_path / "r", ("report.md", *page.COPIED))), "--results", str(results)]) == 0
    text = (results / "personalization.md").read_text(encoding="utf-8")
    assert text.startswith("# What a few choices tell")
    assert "![Accuracy](personalization/curves.png)" in text
    assert "(heads/heads.png)" in text
    assert "[what it means](fspo/README.md)" in text
    assert "## Of lore_speed" in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# What a few choices tell"]
    assert (results / "personalization" / "kl.png").read_text() == "the kl.png"


def test_without_a_report_or_a_table_it_is_one_line_and_nothing_is_written(
    page: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    whole = report(tmp_path / "r", ("report.md", *page.COPIED))
    half = report(tmp_path / "h", ("report.md", "table.md"))
    for place, said in ((tmp_path / "none", "none"), (half, "has no result.json"), (whole, "holds no table.md")):
        assert page.main([str(place), "--results", str(results)]) == 2
        assert said in capsys.readouterr().err
    assert not list(results.iterdir())
