"""The search itself on a tiny model: real quantising, real KL, a clock that the test holds unless it says otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgealign.artifact import open_artifact
from edgealign.errors import CheckFailed, EdgealignError
from edgealign.export_recipes import ExportRecipe
from edgealign.recipe import load
from edgealign.runtimes.gguf_header import check_gguf, count_token_bytes

pytestmark = pytest.mark.runtime
QUICK = ("prompt_lengths=1,2,9", "steps=2", "windows=2", "window_tokens=24", "threads=1")
FEW = {"q4_0": (None, "q8_0", "q4_k", "q4_0"), "q8_0": (None,)}


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five mixtures: a twin (Q6_K does not fit rows of 128), one that cannot be, and three that differ."""
    import quant_candidates

    monkeypatch.setattr(quant_candidates, "SEARCHED", FEW)
    monkeypatch.setattr(quant_candidates, "RAISED", {"q4_0": "q8_0"})


def find(
    model: Path, out: Path, timer: Any, kl_budget: float, *, device: Any = None, calibration: Path | None = None
) -> Any:
    import export_program as program
    from quant_search import search
    from to_gguf import _measure_importance

    recipe = ExportRecipe(quant="auto", kl_budget=kl_budget, threads=1, verify=QUICK, calibration_tokens=64)
    job = program.open_job("gguf", recipe, model=model, adapters={}, calibration=calibration)
    return search(job, out=out, weigh=lambda: _measure_importance(job), device=device, timer=timer)


def by_size(mixture: Any, file: Path, repetitions: int) -> Any:
    """A machine that is as fast as the file is small, to the digit."""
    from quant_timing import Timing

    speed = 1e9 / count_token_bytes(file)
    return Timing((2 * speed,) * repetitions, (speed,) * repetitions)


def never(mixture: Any, file: Path, repetitions: int) -> Any:
    raise AssertionError(f"{mixture.label} was timed")


@pytest.fixture(scope="module")
def lost(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The work folder of a search that nothing could satisfy, and what it said."""
    import quant_candidates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_candidates, "SEARCHED", FEW)
        patch.setattr(quant_candidates, "RAISED", {"q4_0": "q8_0"})
        out = tmp_path_factory.mktemp("lost") / "bundle"
        with pytest.raises(CheckFailed) as caught:
            find(tiny_model, out, never, 0.0)
    return out.with_name(".bundle.work"), caught.value.line()


@pytest.fixture
def out(lost: tuple[Path, str], tmp_path: Path) -> Path:
    """An output beside which everything but the speeds is measured already."""
    shutil.copytree(lost[0], tmp_path / ".bundle.work")
    return tmp_path / "bundle"


def known(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out.with_name(".bundle.work") / "measured.json").read_text(encoding="utf-8"))
    return found["trials"]  # type: ignore[no-any-return]


def test_a_budget_of_nothing_fails_in_one_line_that_names_the_best(lost: tuple[Path, str]) -> None:
    work, line = lost
    best = min((entry["kl"], label) for label, entry in known(work.with_name("bundle")).items() if entry["kl"])
    assert line.startswith("kl_budget 0: no mixture of types is within it: ")
    assert f"the best KL found is {best[0]:.3g} nat, of " in line
    assert best[1] in line
    assert line.endswith("raise --kl-budget (what was measured is kept), or take --quant f16")
    assert not (work / "mixtures").exists()


def test_a_large_budget_gives_the_smallest_and_fastest(tiny_model: Path, out: Path) -> None:
    found = find(tiny_model, out, by_size, 100.0)
    assert found.chosen.label == "q4_0+head=q4_0"
    assert found.why == "the fastest decode"
    assert (found.recipe.quant, found.recipe.head_type, found.recipe.tensor_types) == ("q4_0", "q4_0", ())


def test_the_choice_keeps_within_the_budget_and_is_the_fastest_there(tiny_model: Path, out: Path) -> None:
    losses = known(out)
    budget = losses["q4_0"]["kl"] * 1.0001
    assert losses["q4_0+head=q4_0"]["kl"] > budget
    found = find(tiny_model, out, by_size, budget)
    assert found.chosen.kl <= budget
    rivals = [trial for trial in found.trials if trial.measured and trial.kl <= budget]
    assert found.chosen.token_bytes == min(trial.token_bytes for trial in rivals)
    assert {trial.label for trial in found.trials if trial.decode} >= {trial.label for trial in rivals}


def test_bases_that_lose_too_much_have_their_groups_raised(tiny_model: Path, out: Path) -> None:
    losses = known(out)
    raised = {label: entry["kl"] for label, entry in losses.items() if "=q8_0+" in label or "ffn_up=q8_0" in label}
    singles = [label for label in losses if label.count("=q8_0") and label.rpartition("+")[2].split("=")[0] != "head"]
    assert len(singles) == 4 + 2, "each group alone, then two and three of them"
    assert all(kl < losses["q4_0"]["kl"] for kl in raised.values())
    budget = min(raised.values()) * 1.0001
    found = find(tiny_model, out, by_size, budget)
    assert found.chosen.mixture.groups
    assert found.chosen.kl <= budget < losses["q4_0"]["kl"]


def test_two_names_for_one_file_and_types_that_do_not_fit_are_skipped_with_their_reason(
    tiny_model: Path, out: Path
) -> None:
    found = find(tiny_model, out, by_size, 100.0)
    reasons = {trial.label: trial.error for trial in found.trials if trial.error}
    assert reasons == {
        "q4_0+head=q8_0": "has the same tensor types as q4_0",
        "q4_0+head=q4_k": "head=q4_k: token_embd.weight has rows of 128, no multiple of its blocks of 256; "
        "types that fit: f16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl",
    }


def test_one_clock_gives_one_result(tiny_model: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / ".bundle.work", tmp_path / ".again.work")
    one, two = find(tiny_model, out, by_size, 100.0), find(tiny_model, tmp_path / "again", by_size, 100.0)
    assert (one.chosen, one.why, one.trials) == (two.chosen, two.why, two.trials)
    assert one.chosen.speed()["n"] == 2 + 3 * 2 + 5 * 3


def test_a_mixture_whose_timing_dies_is_skipped_with_its_reason(tiny_model: Path, out: Path) -> None:
    from quant_timing import Timing

    def timer(mixture: Any, file: Path, repetitions: int) -> Any:
        if mixture.label == "q4_0+head=q4_0":
            return Timing(error="its process died of SIGSEGV")
        return by_size(mixture, file, repetitions)

    found = find(tiny_model, out, timer, 100.0)
    assert found.chosen.label == "q4_0"
    (dead,) = [trial for trial in found.trials if trial.label == "q4_0+head=q4_0"]
    assert dead.error == "its timing failed: its process died of SIGSEGV"


def test_where_nothing_can_be_timed_the_search_says_so(tiny_model: Path, out: Path) -> None:
    from quant_timing import Timing

    with pytest.raises(CheckFailed, match=r"auto: no mixture could be timed \(its timing failed: no clock\)"):
        find(tiny_model, out, lambda *_: Timing(error="no clock"), 100.0)


def test_a_mixture_that_the_runtime_cannot_open_is_skipped_with_its_reason(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quant_search

    original = quant_search.quantize

    def damage(source: Path, target: Path, mixture: Any, **options: Any) -> Any:
        info = original(source, target, mixture, **options)
        if mixture.label == "q4_0":
            with target.open("r+b") as file:
                file.truncate(target.stat().st_size // 2)
        return info

    monkeypatch.setattr(quant_search, "quantize", damage)
    monkeypatch.setattr("quant_candidates.SEARCHED", {"q4_0": (None,), "q8_0": (None,)})
    found = find(tiny_model, tmp_path / "bundle", by_size, 100.0)
    errors = {trial.label: trial.error for trial in found.trials}
    assert found.chosen.label == "q8_0"
    assert "is truncated" in errors["q4_0"]


def test_an_interrupted_search_goes_on_and_measures_nothing_twice(
    tiny_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def timer(mixture: Any, file: Path, repetitions: int) -> Any:
        calls.append(mixture.label)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return by_size(mixture, file, repetitions)

    monkeypatch.setattr("quant_search.measure", never)
    with pytest.raises(KeyboardInterrupt):
        find(tiny_model, out, timer, 100.0)
    found = find(tiny_model, out, timer, 100.0)
    alone = len(calls)
    assert found.chosen.label == "q4_0+head=q4_0"
    calls.clear()
    again = find(tiny_model, out, timer, 100.0)
    assert (calls, again.trials) == ([], found.trials)
    shutil.rmtree(out.with_name(".bundle.work"))
    monkeypatch.undo()
    monkeypatch.setattr("quant_candidates.SEARCHED", FEW)
    calls.extend([""] * 4)
    find(tiny_model, out, timer, 100.0)
    assert len(calls) - 4 == alone - 1


def test_another_model_or_another_shape_starts_over(tiny_model: Path, lost: tuple[Path, str]) -> None:
    from dataclasses import replace

    import export_program as program
    from quant_search import work_key

    recipe = ExportRecipe(quant="auto", threads=1, verify=QUICK)
    job = program.open_job("gguf", recipe, model=tiny_model, adapters={}, calibration=None)
    key = work_key(job, {"cpu": "X1"})
    assert work_key(replace(job, recipe=replace(recipe, kl_budget=9.0)), {"cpu": "X1"}) == key
    assert work_key(replace(job, recipe=replace(recipe, search_gen=9)), {"cpu": "X1"}) != key
    assert work_key(job, {"cpu": "X2"}) != key
    assert work_key(replace(job, gate=replace(job.gate, windows=1)), {"cpu": "X1"}) != key


def test_for_a_device_nothing_is_timed_and_the_speed_is_the_bandwidth_over_the_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    from quant_report import render_recipe, render_table
    from quant_timing import read_device

    device = read_device("bandwidth_gb_s=30", threads=0)
    found = find(tiny_model, tmp_path / "bundle", never, 100.0, device=device)
    assert found.chosen.label == "q4_0+head=q4_0"
    assert found.chosen.predicted == 30e9 / found.chosen.token_bytes
    assert "Speeds are PREDICTED" in render_table(found)
    assert "decode is predicted, not measured" in render_recipe(found)


def test_a_calibration_text_weighs_every_mixture_and_is_read_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: tuple[Path, str]
) -> None:
    import gguf_quantize

    from edgealign.models.tokenizer import BUILT_IN_TEXT

    text = tmp_path / "text.txt"
    text.write_text(BUILT_IN_TEXT, encoding="utf-8")
    found = find(tiny_model, tmp_path / "bundle", by_size, 100.0, calibration=text)
    assert found.facts["calibrated"]
    assert found.chosen.kl != known(lost[0].with_name("bundle"))[found.chosen.label]["kl"]
    info = check_gguf(tmp_path / ".bundle.work/mixtures" / f"{found.chosen.label}.gguf")
    assert info.metadata["quantize.imatrix.dataset"] == found.importance.text_digest
    monkeypatch.setattr(gguf_quantize, "measure_importance", never)
    again = find(tiny_model, tmp_path / "bundle", by_size, 100.0, calibration=text)
    assert again.importance.values.keys() == found.importance.values.keys()


@pytest.mark.slow
def test_an_export_publishes_the_choice_and_its_recipe_makes_the_same_file(
    tiny_model: Path, out: Path, tmp_path: Path
) -> None:
    from to_gguf import export

    recipe = ExportRecipe(quant="auto", kl_budget=known(out)["q4_0"]["kl"] * 1.0001, threads=1, verify=QUICK,
                          calibration_tokens=64)  # fmt: skip
    bundle = export(recipe, model=tiny_model, adapters={}, out=out, calibration=None, timer=by_size)
    assert not out.with_name(".bundle.work").exists()
    listed = {entry.path for entry in bundle.manifest.files}
    assert {f"search/{name}" for name in ("recipe.toml", "result.json", "table.md", "front.png")} < listed
    result = json.loads((out / "search/result.json").read_text(encoding="utf-8"))
    checks = {check.name: check for check in bundle.manifest.checks}
    chosen = next(entry for entry in result["mixtures"] if entry["label"] == result["chosen"])
    assert checks["auto.kl"].value == chosen["kl"] == pytest.approx(checks["quant.kl"].value, rel=1e-6)
    assert bundle.meta["quant"] == result["chosen"] == bundle.meta["quant_search"]["chosen"]
    assert bundle.meta["tensor_types"] == chosen["types"]
    assert chosen["verdict"] == "chosen"
    assert bundle.manifest.recipe["quant"] == chosen["quant"]
    text = (out / "search/recipe.toml").read_text(encoding="utf-8")
    assert str(tmp_path) not in text + (out / "search/result.json").read_text(encoding="utf-8")
    again = load(ExportRecipe, out / "search/recipe.toml", {"threads": 1, "exact_gate": False})
    twin = export(again, model=tiny_model, adapters={}, out=tmp_path / "twin", calibration=None)
    assert (twin.path / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()
    assert twin.meta["tensor_types"] == bundle.meta["tensor_types"]
    assert twin.meta["quant"] == bundle.meta["quant"]
    assert open_artifact(twin.path).manifest.recipe["head_type"] == chosen["head_type"]


@pytest.mark.slow
def test_the_real_clock_times_in_a_fresh_process_and_names_a_file_that_it_cannot(
    lost: tuple[Path, str], tiny_model: Path, tmp_path: Path
) -> None:
    from gguf_quantize import quantize
    from quant_timing import make_timer

    from edgealign.tensor_types import Mixture

    recipe = ExportRecipe(quant="auto", threads=1, search_prompt=8, search_gen=4)
    timer, card, _ = make_timer(recipe)
    assert card["cpu"]
    mixture = Mixture("q4_0", "q8_0")
    quantize(lost[0] / "whole.gguf", tmp_path / "small.gguf", mixture, importance=None, threads=1)
    timing = timer(mixture, tmp_path / "small.gguf", 2)
    assert (len(timing.prefill), len(timing.decode), timing.error) == (2, 2, None)
    assert min(*timing.prefill, *timing.decode) > 0
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert "is not a GGUF file" in str(timer(mixture, tmp_path / "bad.gguf", 2).error)


def test_a_mixture_is_what_the_file_has(lost: tuple[Path, str], tmp_path: Path) -> None:
    from gguf_quantize import quantize

    from edgealign.tensor_types import Mixture, count_types

    mixture = Mixture("q8_0", "q4_0", ("attn=f16", "ffn_down=q4_k"))
    info = quantize(lost[0] / "whole.gguf", tmp_path / "mixed.gguf", mixture, importance=None, threads=1)
    found = count_types((tensor.name, tensor.type, len(tensor.shape)) for tensor in info.tensors)
    kinds = {group: set(counts) for group, counts in found.items()}
    assert kinds == {"head": {"q4_0"}, "attn": {"f16"}, "conv": {"q8_0"}, "ffn_down": {"q4_k"}, "ffn_up": {"q8_0"},
                     "other": {"f32"}}  # fmt: skip


@pytest.mark.parametrize("name", ["llama-untied", "lfm2-moe"])
def test_an_untied_head_and_experts_take_their_types(
    small_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    from gguf_model import write_model
    from gguf_quantize import quantize

    from edgealign.tensor_types import Mixture, count_types

    write_model(small_model(name), tmp_path / "whole.gguf", digest="d" * 64)
    mixture = Mixture("q8_0", "q4_0", ("ffn_down=q4_1", "ffn_up=q5_0"))
    info = quantize(tmp_path / "whole.gguf", tmp_path / "mixed.gguf", mixture, importance=None, threads=1)
    found = count_types((tensor.name, tensor.type, len(tensor.shape)) for tensor in info.tensors)
    assert (set(found["head"]), set(found["ffn_down"]), set(found["ffn_up"])) == ({"q4_0"}, {"q4_1"}, {"q5_0"})
    assert found.get("embedding", {"q8_0": 1}) == {"q8_0": 1}
    with pytest.raises(EdgealignError, match="attn=q6_k: blk"):
        quantize(tmp_path / "whole.gguf", tmp_path / "x", Mixture("q8_0", None, ("attn=q6_k",)), importance=None,
                 threads=1)  # fmt: skip
