"""benchmarks/objectives.py and dpo_vs_trl.py: flipped labels, the papers' claims beside what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgealign.data.forms import Message, Pair, to_json
from edgealign.errors import InputError
from edgealign.objectives.table import find, trainable

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[[str], ModuleType]


def run(objective: str, seed: int, tokens: float, accuracy: float, *, flipped: float = 0.0) -> dict[str, Any]:
    scales = {"sum": accuracy, "mean": accuracy - 0.1, "sum_free": 0.35, "mean_free": 0.55}
    return {
        "objective": objective, "flipped": flipped, "seed": seed, "failed": None, "perplexity": 100.0,
        "ranking": {
            "accuracy": {name: {"value": value} for name, value in scales.items()}, "kl_on_data": 0.01,
            "displacement": -0.1,
        },
        "writing": {
            "tokens": {"value": tokens}, "ended": 0.9, "doom_loops": 0.0, "win_rate": {"controlled": 0.5, "raw": 0.6},
        },
    }  # fmt: skip


def result_of(rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {
        "runs": rows,
        "settings": {"pairs": 1, "learning_rate": 1e-4, "seeds": 2, "held_out": 3, "prompts": 4, **settings},
        "judge": {"held_out_accuracy": 0.6},
        "start": {
            "tokens": 20.0, "doom_loops": 0.1, "perplexity": 99.0, "longer_is_chosen": 0.65,
            "accuracy": {"sum_free": 0.3, "mean_free": 0.5},
        },
        "machine": {"cpu": "A CPU", "cores_usable": 2, "os": "An OS"},
    }  # fmt: skip


def test_a_share_of_the_labels_is_flipped_and_the_rest_is_as_it_was(load_benchmark: Load) -> None:
    program = load_benchmark("objectives")
    rows = [Pair((Message("user", f"{i}"),), f"good {i}", f"bad {i}", margin=1.0 if i % 2 else None) for i in range(50)]
    drawn = program.draw_pairs(rows, 40, 0.2, seed=3)
    assert sum(pair.chosen.startswith("bad") for pair in drawn) == 8
    assert {pair.user_id for pair in drawn} == {"ukp", "hh"}
    clean = program.draw_pairs(rows, 40, 0.0, seed=3)
    assert [pair.prompt for pair in clean] == [pair.prompt for pair in drawn]
    assert all(pair.chosen.startswith("good") for pair in clean)


class Longest:
    """A judge: more letters are better."""

    name = "longest"

    def scores(self, questions: list[tuple[Any, str]]) -> list[float]:
        return [float(len(text)) for _, text in questions]

    def close(self) -> None:
        pass


def test_every_objective_gets_the_columns_that_it_reads(load_benchmark: Load) -> None:
    """What a recipe can name finds all of its columns in the rows that are made for it, and no others."""
    program = load_benchmark("objectives_pairs")
    asked = [(Message("user", "one"),), (Message("user", "one"),), (Message("user", "two"),)]
    rows = [
        Pair(prompt, chosen, rejected, user_id="hh")
        for prompt, chosen, rejected in zip(
            asked, ("long enough", "Hello.", "A B C"), ("short", "- a\n- b\n- c", "a"), strict=True
        )
    ]
    own = {"one": "my one", "two": "my two"}
    for name in trainable():
        columns = program.columns_of(find(name))
        made = program.add_columns(rows, columns, Longest(), lambda prompts: [own[p[0].content] for p in prompts])
        for row in made:
            given = {*row.facts, *(["margin"] if row.margin is not None else [])}
            assert set(columns) <= given, name
            assert given <= {*columns, "others"}, name
            assert json.loads(json.dumps(to_json(row)))["chosen"] == row.chosen
    by_judge = program.by_judge(rows, Longest())
    assert [value > 0 for value in by_judge["margin"]] == [True, False, True]
    assert [value < 0.5 for value in by_judge["epsilon"]] == [True, True, True]
    assert by_judge["epsilon"][0] == pytest.approx(0.5 - by_judge["score"][0])
    assert by_judge["gold"] == ["long enough", "long enough", "A B C"]
    assert program.reasons(rows) == ["It is longer.", "It is no list.", "It is longer."]
    lists = program.add_columns(rows, ("grades",), Longest(), lambda prompts: ["mine"] * len(prompts))
    assert lists[0].facts == {"grades": (1.0, 0.5, 0.0), "others": ("mine",)}


def test_an_answer_to_another_prompt_comes_with_its_prompt(load_benchmark: Load) -> None:
    program = load_benchmark("objectives_pairs")
    asked = [(Message("user", "one"),), (Message("user", "one"),), (Message("user", "two"),)]
    long = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    rows = [Pair(prompt, f"good {i}", f"bad {i}") for i, prompt in enumerate([*asked, long])]
    found = [(row.chosen, row.rejected, row.facts["rejected_prompt"]) for row in program.across_prompts(rows)]
    assert found == [("good 0", "bad 2", "two"), ("good 1", "bad 2", "two"), ("good 2", "bad 0", "one"),
                     ("good 3", "bad 0", "one")]  # fmt: skip
    with pytest.raises(InputError, match="have no two prompts"):
        program.across_prompts(rows[:2])


def test_the_model_is_asked_once_for_every_prompt(load_benchmark: Load, tmp_path: Path) -> None:
    program = load_benchmark("objectives_pairs")
    asked: list[str] = []

    def answer(prompts: list[tuple[Message, ...]]) -> list[str]:
        asked.extend(prompt[0].content for prompt in prompts)
        return [f"to {prompt[0].content}" for prompt in prompts]

    one, two = (Message("user", "one"),), (Message("user", "two"),)
    assert program.remember(tmp_path / "own.json", answer)([one, one]) == ["to one", "to one"]
    assert program.remember(tmp_path / "own.json", answer)([two, one]) == ["to two", "to one"]
    assert asked == ["one", "two"]


def test_finished_runs_are_kept_for_the_settings_that_they_were_made_with(
    load_benchmark: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = load_benchmark("objectives")
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(program, "material", lambda args: seen.append(("material", args.learning_rate)) or {})
    monkeypatch.setattr(program, "begin", lambda args, given: (_ for _ in ()).throw(program.InputError("x", "stop")))
    call = ["--data", str(tmp_path), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    assert program.main([*call, "--learning-rate", "1e-4"]) == 2
    assert program.main([*call, "--learning-rate", "1e-4", "--seeds", "1"]) == 2
    assert len(seen) == 2
    assert program.main([*call, "--learning-rate", "2e-4"]) == 2
    assert len(seen) == 2
    assert not (tmp_path / "o").exists()


def test_a_claim_is_confirmed_where_every_seed_agrees(load_benchmark: Load, tmp_path: Path) -> None:
    report = load_benchmark("objectives_report")
    rows = [run("dpo", 0, 30, 0.6), run("dpo", 1, 30, 0.6), run("ln_dpo", 0, 20, 0.6), run("ln_dpo", 1, 25, 0.6),
            run("ld_dpo", 0, 20, 0.6), run("ld_dpo", 1, 35, 0.6), run("rdpo_length", 0, 31, 0.6)]  # fmt: skip
    found = {entry["claim"].split()[0]: entry["verdict"] for entry in report.judge_claims(rows)}
    assert found == {"LN-DPO": "seen in every seed", "LD-DPO": "mixed", "R-DPO": "not seen in any seed"}
    failed = {**run("dpo", 2, 1, 0.1), "failed": "loss nan: stopped being a number"}
    result = result_of([*rows, failed])
    text = report.render(result)
    assert "| ln_dpo | 60.0% [60.0%, 60.0%] | **50.0% [50.0%, 50.0%]** |" in text
    assert "| dpo | **60.0% [60.0%, 60.0%]** | 50.0% [50.0%, 50.0%] |" in text
    assert "the chosen one in 65.0% of these pairs" in text
    assert "seen in every seed" in text
    report.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_results_made_alike_are_put_together_and_others_are_refused(
    load_benchmark: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load_benchmark("objectives")
    results = {
        "old": result_of([run("dpo", 0, 30, 0.6)]), "new": result_of([run("simpo", 0, 20, 0.6)]),
        "other": result_of([run("hinge", 0, 20, 0.6)], pairs=2),
        "there": {**result_of([run("nca", 0, 20, 0.6)]), "machine": {"cpu": "Other", "cores_usable": 2, "os": "OS"}},
    }  # fmt: skip
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    old, new, other, there = (str(tmp_path / f"{name}.json") for name in results)
    out = ["--out", str(tmp_path / "out")]
    assert program.main(["--from", old, new, *out]) == 0
    made = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["objective"] for row in made["runs"]] == ["dpo", "simpo"]
    assert "| simpo |" in (tmp_path / "out" / "table.md").read_text()
    capsys.readouterr()
    for given, words in (
        (["--from", old, other], "has another settings than"), (["--from", old, old], "has the run dpo-0-0, which"),
        (["--from", old, there], "is of another machine or versions than"),
        (["--from", old, str(tmp_path / "out" / "table.md")], "is no result.json"), ([], "--data: is missing"),
    ):  # fmt: skip
        assert program.main([*given, "--out", str(tmp_path / "no")]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_the_published_table_is_what_the_published_numbers_give(load_benchmark: Load) -> None:
    report, folder = load_benchmark("objectives_report"), ROOT / "docs" / "results" / "objectives"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert report.render(result) + "\n" == (folder / "table.md").read_text(encoding="utf-8")


def test_the_race_with_trl_says_whether_the_goal_was_reached(load_benchmark: Load) -> None:
    program = load_benchmark("dpo_vs_trl")
    variants = {
        name: {"seconds": {"median": 32 / speed, "sd": 0.1}, "pairs_per_s": speed, "peak_bytes": 2**30}
        for name, speed in (("trl", 1.0), ("trl-tuned", 2.0), ("ours", 5.0))
    }
    result = {
        "machine": {"cpu": "A CPU"}, "quiet": True,
        "settings": {"pairs": 32, "pair_tokens": 280, "batch": 8, "dtype": "float32", "threads": 2, "repetitions": 3},
        "comparisons": [{"shape": "s", "kind": "full", "loss_gap": 1e-6, "race_gap": 2e-3, "variants": variants,
                         "memory": 1.0, "faster": {"default": 5.0, "best": 2.5}}],
    }  # fmt: skip
    text = program.render(result)
    assert "| s | full | trl-tuned | 16.00 ± 0.10 | 2.00 | 2.50x | 1.00 | 1e-06 | 0.002 |" in text
    assert "| goal | | | 2x: reached | 1.00x TRL's least: not reached | reached | |" in text
    found = {**result["comparisons"][0], "kind": "lora", "memory": 0.5, "loss_gap": float("nan")}
    text = program.render({**result, "comparisons": [found], "settings": {**result["settings"], "neighbours": 1}})
    assert "| goal | | | 5x: not reached | 0.50x TRL's least: reached | not reached | |" in text
    assert "in turn (beside 1 busy process); A CPU" in text
