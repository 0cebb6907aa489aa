"""Reports against each other: only what is comparable, with intervals, and through the command line."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgealign import cli
from edgealign.bench import compare as comparing
from edgealign.bench.published import read_report
from edgealign.errors import ArtifactError, InputError, OutputError, UsageError

SPEEDS = {("gguf", "q4_0"): 40.0, ("onnx", "int4"): 30.0}


def find(result: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    (row,) = [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]
    return row


# --- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "ranks"),
    [(1, (0, 0)), (2, (0, 1)), (5, (0, 4)), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (10, (1, 8)), (15, (3, 11)),
     (20, (5, 14)), (30, (9, 20))],
)  # fmt: skip
def test_the_intervals_are_those_of_the_tables(count: int, ranks: tuple[int, int]) -> None:
    assert comparing.interval_ranks(count) == ranks


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        found = comparing.describe([rng.expovariate(1.0) for _ in range(12)])
        hits += found["low"] <= 0.6931 <= found["high"]
    assert 0.95 < hits / 2000 < 0.975  # 12 samples: 96.1 %


def test_overlapping_intervals_show_no_difference() -> None:
    base = comparing.describe([10.0, 11.0, 12.0])
    assert comparing.ratio(base, comparing.describe([11.9, 13.0, 14.0]))["verdict"] == "no difference shown"
    more = comparing.ratio(base, comparing.describe([12.1, 13.0, 14.0]))
    assert (more["verdict"], more["ratio"]) == ("faster", pytest.approx(13 / 11))
    assert (more["low"], more["high"]) == (pytest.approx(12.1 / 12), pytest.approx(1.4))
    assert comparing.ratio(base, comparing.describe([8.0, 9.0, 9.9]))["verdict"] == "slower"
    alone = comparing.ratio(base, comparing.describe([20.0]))
    assert (alone["verdict"], alone["low"]) == ("one sample: no interval", None)


# --- comparing -------------------------------------------------------------------------------------------------------


def test_rows_of_one_shape_are_compared_by_their_medians(make_result: Any, make_report: Any) -> None:
    faster = {("gguf", "q4_0"): 60.0, ("onnx", "int4"): 30.1}
    reports = [make_report("before", make_result(SPEEDS)), make_report("after", make_result(faster))]
    result = comparing.run(reports)
    assert isinstance(result, dict)
    assert (result["matched"], len(result["rows"]), result["differences"]) == (8, 8, [])
    row = find(result, target="gguf", adapter="on", measure="decode")
    assert (row["n_gen"], row["n_depth"], row["threads"]) == (100, 512, 1)
    assert row["found"]["before"]["median"] == pytest.approx(32)
    assert row["ratios"]["after"]["ratio"] == pytest.approx(1.5)
    assert row["ratios"]["after"]["verdict"] == "faster"
    same = find(result, target="onnx", adapter="off", measure="prefill")
    assert same["ratios"]["after"]["verdict"] == "no difference shown"
    assert "1.50 [1.44, 1.56], faster" in result["text"]
    assert "no difference shown" in result["text"]
    assert json.dumps(result, allow_nan=False)


def test_a_row_that_one_report_lacks_stands_there_and_is_not_compared(make_result: Any, make_report: Any) -> None:
    alone = make_result({("gguf", "q4_0"): 40.0}, users=False, threads=(1, 2))
    result = comparing.run([make_report("a", make_result(SPEEDS)), make_report("b", alone)])
    assert isinstance(result, dict)
    row = find(result, target="gguf", threads=2, measure="decode")
    assert (list(row["found"]), row["ratios"]) == (["b"], {})
    assert result["matched"] == 2
    assert "not measured" in result["text"]


def test_two_models_of_one_kind_are_matched_by_name(make_result: Any, make_report: Any) -> None:
    result = make_result(SPEEDS)
    for row in list(result["results"]):
        if row["target"] == "gguf":
            slower = [2 * sample for sample in row["samples_ns"]]
            result["results"].append({**row, "bundle": "other", "cell": row["cell"] + 100, "samples_ns": slower})
    result["bundles"].append({**result["bundles"][0], "bundle": "other"})
    found = comparing.run([make_report("a", result), make_report("b", result)])
    assert isinstance(found, dict)
    medians = {
        row["bundle"]: row["found"]["b"]["median"] for row in found["rows"]
        if (row["target"], row["adapter"], row["measure"]) == ("gguf", "off", "decode")
    }  # fmt: skip
    assert medians == {"gguf-q4_0": pytest.approx(40), "other": pytest.approx(20)}
    assert "| bundle |" in found["text"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"card": {"cpu": "Another"}}, "another CPU: a A CPU, b Another"),
        ({"card": {"cores_usable": 8}}, "another number of usable cores: a 2, b 8"),
        ({"card": {"flags": ["avx2", "avx512f"]}}, "another set of instructions"),
        ({"card": {"os": "Another"}}, "another system"),
        ({"card": {"governor": "powersave"}}, "another frequency governor: a unknown, b powersave"),
        ({"version": "2.0"}, "gguf ran in different versions: a 1.0, b 2.0"),
        ({"model_digest": "e" * 64}, "the models differ"),
        ({"model_digest": None}, "the model is not known of b"),
        ({"caveats": ("the machine was busy",)}, "b says: the machine was busy"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_comparable_is_refused_unless_it_is_wanted(
    change: dict[str, Any], words: str, make_result: Any, make_report: Any
) -> None:
    reports = [make_report("a", make_result(SPEEDS)), make_report("b", make_result(SPEEDS, **change))]
    with pytest.raises(UsageError, match="--anyway") as caught:
        comparing.run(reports)
    assert words in caught.value.line()
    assert caught.value.exit_code == 2
    result = comparing.run(reports, anyway=True)
    assert isinstance(result, dict)
    assert any(words in entry for entry in result["differences"])
    assert result["text"].startswith("**Compared all the same, although:**\n\n- ")
    assert result["matched"] == 8


def test_a_version_is_asked_of_the_reports_that_ran_the_target(make_result: Any, make_report: Any) -> None:
    other = make_result({("onnx", "int4"): 30.0}, version="1.0")
    both = [make_report("a", make_result(SPEEDS)), make_report("b", other)]
    assert comparing.run(both)["differences"] == []
    mixed = [make_report("c", make_result(SPEEDS, version="2.0")), *both]
    with pytest.raises(UsageError, match=r"gguf ran in different versions: c 2\.0, a 1\.0; onnx"):
        comparing.run(mixed)


def test_an_unknown_cpu_is_not_the_same_cpu(make_result: Any, make_report: Any) -> None:
    unknown = make_result(SPEEDS, card={"cpu": None})
    with pytest.raises(UsageError, match="none of them says which CPU"):
        comparing.run([make_report("a", unknown), make_report("b", unknown)])


def test_a_comparison_is_published_with_its_picture(make_result: Any, make_report: Any, tmp_path: Path) -> None:
    reports = [make_report(name, make_result(SPEEDS)) for name in ("a", "b", "c")]
    made = comparing.run(reports, out=tmp_path / "out")
    assert not isinstance(made, dict)
    assert {entry.path for entry in made.manifest.files} == {"result.json", "table.md", "compare.png"}
    assert [entry.role for entry in made.manifest.inputs] == ["a", "b", "c"]
    with pytest.raises(InputError, match="not of a benchmark"):
        read_report(tmp_path / "out")
    with pytest.raises(OutputError):
        comparing.run(reports, out=tmp_path / "out")


def test_a_phone_stands_beside_the_laptop(
    make_result: Any, make_report: Any, llama_file: Callable[..., Path], tmp_path: Path
) -> None:
    from edgealign.bench import imports

    phone = imports.run(llama_file(), device=["device=A phone"], out=tmp_path / "phone").path
    laptop = make_report("laptop", make_result(SPEEDS, threads=(1, 4)))
    with pytest.raises(UsageError, match="another CPU: laptop A CPU, phone Cortex-X9"):
        comparing.run([laptop, phone])
    result = comparing.run([laptop, phone], anyway=True)
    assert isinstance(result, dict)
    row = find(result, target="gguf", quant="q4_0", adapter="off", threads=4, measure="decode")
    assert row["ratios"]["phone"]["ratio"] == pytest.approx(10 / 112, rel=0.01)
    assert result["text"].count("slower") == 2


# --- reports that are none -------------------------------------------------------------------------------------------


def test_one_report_is_nothing_to_compare(make_result: Any, make_report: Any) -> None:
    with pytest.raises(UsageError, match="two or more"):
        comparing.run([make_report("a", make_result(SPEEDS))])


def broken(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], str]:
    def apply(result: dict[str, Any]) -> str:
        change(result)
        return json.dumps(result)

    return apply


BROKEN: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda result: "",
    "truncated": lambda result: json.dumps(result)[:500],
    "foreign": lambda result: '{"answers": []}',
    "a list": lambda result: "[]",
    "deep": lambda result: "[" * 100_000,
    "old": broken(lambda result: result.update(schema=1)),
    "no rows": broken(lambda result: result.pop("results")),
    "a row that is text": broken(lambda result: result["results"].append("row")),
    "no samples": broken(lambda result: result["results"][0].pop("samples_ns")),
    "negative": broken(lambda result: result["results"][0].update(samples_ns=[-1])),
    "nothing": broken(lambda result: result["results"][0].update(samples_ns=[0])),
    "not a number": broken(lambda result: result["results"][0].update(samples_ns=[float("nan")])),
    "without end": broken(lambda result: result["results"][0].update(samples_ns=[float("inf")])),
    "huge": broken(lambda result: result["results"][0].update(samples_ns=[10**400])),
    "a huge count": broken(lambda result: result["results"][0].update(n_prompt=2**70)),
    "truth for a count": broken(lambda result: result["results"][0].update(n_threads=True)),
    "escapes": broken(lambda result: result["results"][0].update(bundle="\x1b[2J")),
    "an unknown bundle": broken(lambda result: result["bundles"].clear()),
    "a machine that is text": broken(lambda result: result.update(machine="laptop")),
    "flags that are numbers": broken(lambda result: result["machine"].update(flags=[1])),
    "maybe comparable": broken(lambda result: result.update(comparable="yes")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_report_that_cannot_be_is_refused_in_one_line(case: str, make_result: Any, make_report: Any) -> None:
    good = make_report("good", make_result(SPEEDS))
    bad = make_report("bad", BROKEN[case](make_result(SPEEDS)))
    with pytest.raises(InputError) as caught:
        comparing.run([good, bad], anyway=True)
    assert "bad" in caught.value.line()
    assert len(caught.value.line()) < 300


def test_a_changed_report_and_another_artifact_are_refused(
    make_result: Any, make_report: Any, tiny_model: Path
) -> None:
    report = make_report("a", make_result(SPEEDS))
    with pytest.raises(ArtifactError, match="is a model"):
        read_report(tiny_model)
    (report / "result.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="SHA-256"):
        read_report(report)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgealign", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_help_has_the_options_and_the_subcommands(call: Any) -> None:
    code, out, _ = call("bench", "--help")
    assert code == 0
    for words in ("bundles", "--prompt-tokens", "--bandwidth", "compare", "import", "./compare"):
        assert words in out
    assert "measure  " not in out  # the command that has no name
    assert call("bench", "a-bundle", "--help")[1] == out
    assert "--anyway" in call("bench", "compare", "--help")[1]
    assert "llama-bench" in call("bench", "import", "--help")[1]


def test_compare_refuses_with_exit_code_2_and_prints_json(call: Any, make_result: Any, make_report: Any) -> None:
    a, b = make_report("a", make_result(SPEEDS)), make_report("b", make_result(SPEEDS, card={"cpu": "Another"}))
    code, out, err = call("bench", "compare", a, b)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert "another CPU" in err
    code, out, err = call("bench", "compare", a, b, "--anyway", "--json")
    assert (code, err) == (0, "")
    assert {row["ratios"]["b"]["ratio"] for row in json.loads(out)["rows"]} == {1.0}


def test_import_and_compare_through_the_command_line(
    call: Any, llama_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = llama_file()
    for name in ("one", "two"):
        code, out, _ = call("bench", "import", file, "--device", "cpu_busy_before=0", "--out", tmp_path / name)
        assert code == 0
        assert "bench.comparable" in out
    code, _, err = call("bench", "compare", tmp_path / "one", tmp_path / "two")
    assert code == 2
    assert "the model is not known of one, two" in err
    code, out, _ = call("bench", "compare", tmp_path / "one", tmp_path / "two", "--anyway", "--out", tmp_path / "both")
    assert code == 0
    assert (tmp_path / "both" / "compare.png").is_file()


@pytest.mark.parametrize("name", ["compare", "import", "measure"])
def test_a_folder_named_like_a_subcommand_can_be_measured(
    name: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    code, out, err = call("bench", f"./{name}", "--dry-run", "--json")
    assert (code, json.loads(out)["stages"][0]["inputs"]) == (0, {"bundles": name})
    code, _, err = call("bench", f"./{name}")
    assert code == 2
    assert "has no manifest.json" in err


def test_options_may_come_before_the_bundles(call: Any) -> None:
    code, out, _ = call("bench", "--prompt-tokens", "8", "a", "compare", "--dry-run", "--json")
    assert (code, json.loads(out)["stages"][0]["inputs"]) == (0, {"bundles": "a, compare"})


def test_no_bundle_is_one_line(call: Any) -> None:
    code, _, err = call("bench")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "bundles" in err
