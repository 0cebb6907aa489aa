"""Advice: measured where it was measured here, predicted by the roofline elsewhere, and never silent about which."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgealign import cli
from edgealign.advise import run as advising
from edgealign.advise.choose import crossover
from edgealign.advise.recipes import AdviceRecipe
from edgealign.artifact import Check, open_artifact, publish
from edgealign.errors import InputError, UsageError

PHONE = ["bandwidth_gb_s=30", "ram_gb=8"]
# Target and quantisation: file bytes, bytes for a token, KL.
FACTS = {("gguf", "q8_0"): (4 * 10**8, 4 * 10**8, 0.001), ("gguf", "q4_0"): (2 * 10**8, 2 * 10**8, 0.05)}
SPEEDS = {("gguf", "q8_0"): 20.0, ("gguf", "q4_0"): 40.0}
WISH = AdviceRecipe(prompt_tokens=512, gen_tokens=100)
Advise = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with room for the made-up reports' prompts."""
    out = tmp_path_factory.mktemp("roomy") / "model"
    with publish(out, kind="model", format="huggingface", stage="test", recipe={}) as draft:
        for file in (file for file in tiny_model.iterdir() if file.name != "manifest.json"):
            shutil.copy(file, draft.dir / file.name)
        config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = 2048
        (draft.dir / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def lora(model: Path, tiny_lora: Any) -> Path:
    return tiny_lora(seed=1, base=model)  # type: ignore[no-any-return]


@pytest.fixture
def report(make_result: Any, make_report: Any, model: Path) -> Callable[..., Path]:
    """A laptop's report of two bundles of `model`; they read 8 GB/s of 20 and peak at 100 MB beyond the file."""

    def make(name: str = "laptop", edit: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> Path:
        result = make_result(SPEEDS, **{"model_digest": open_artifact(model).digest, **options})
        for bundle in result["bundles"]:
            file, token, kl = FACTS[bundle["target"], bundle["quant"]]
            bundle.update(file_bytes=file, token_bytes={"bytes": token, "how": "made up"})
            bundle["fidelity"]["kl"] = kl
            for row in result["results"]:
                if row["bundle"] == bundle["bundle"]:
                    row["peak_bytes"] = file + 10**8
        if edit is not None:
            edit(result)
        return make_report(name, result)  # type: ignore[no-any-return]

    return make


@pytest.fixture
def advise(model: Path) -> Advise:
    def make(recipe: AdviceRecipe = WISH, **inputs: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"adapters": {}, "reports": [], "bundles": [], "device": PHONE, **inputs}
        made = advising.run(recipe, **{"model": model, **given})
        assert isinstance(made, dict)
        json.dumps(made, allow_nan=False)
        return made

    return make


@pytest.fixture
def card(tmp_path: Path, report: Callable[..., Path]) -> Callable[..., str]:
    """The laptop's own card as a file, with changes."""

    def make(**changes: Any) -> str:
        machine = json.loads((report("for-the-card") / "result.json").read_text(encoding="utf-8"))["machine"]
        file = tmp_path / "card.json"
        file.write_text(json.dumps({**machine, **changes}), encoding="utf-8")
        return str(file)

    return make


def wish(**values: Any) -> AdviceRecipe:
    return AdviceRecipe(**{"prompt_tokens": 512, "gen_tokens": 100, **values})


def find(result: dict[str, Any], quant: str, carrier: str = "none") -> dict[str, Any]:
    (entry,) = [item for item in result["candidates"] if (item["quant"], item["carrier"]) == (quant, carrier)]
    return entry


# --- measured or predicted -------------------------------------------------------------------------------------------


def test_a_report_of_this_very_machine_is_measured(advise: Advise, report: Any, card: Any) -> None:
    result = advise(reports=[report()], device=[card()])
    entry = find(result, "q4_0")
    assert (entry["decode_tok_s"]["source"], entry["decode_tok_s"]["value"]) == ("measured", pytest.approx(40))
    assert (entry["first_token_ms"]["source"], entry["memory_mib"]["source"]) == ("measured", "measured")
    assert entry["memory_mib"]["value"] == pytest.approx(3 * 10**8 / 2**20)
    assert "gguf q4_0 in laptop" in entry["decode_tok_s"]["how"]
    assert find(result, "q4_k_m")["decode_tok_s"]["source"] == "predicted", "another quantisation was not measured"


@pytest.mark.parametrize(
    "change",
    [{"cpu": "Another"}, {"cores_usable": 8}, {"flags": ["avx2", "avx512f"]}, {"os": "Another"}, {"cpu": None}],
)
def test_a_report_of_another_machine_is_never_called_measured(
    change: dict[str, Any], advise: Advise, report: Any, card: Any
) -> None:
    result = advise(reports=[report()], device=[card(**change), "bandwidth_gb_s=30"])
    for entry in result["candidates"]:
        for name in ("decode_tok_s", "first_token_ms", "memory_mib"):
            assert entry[name]["source"] != "measured"


def test_numbers_of_a_phone_are_never_the_machine_of_a_report(advise: Advise, report: Any) -> None:
    result = advise(reports=[report()])
    assert {entry["decode_tok_s"]["source"] for entry in result["candidates"]} == {"predicted", "at best"}


def test_a_speed_elsewhere_is_the_bandwidth_times_the_share_that_was_reached(advise: Advise, report: Any) -> None:
    entry = find(advise(reports=[report()]), "q4_0")
    assert entry["decode_tok_s"]["value"] == pytest.approx(30e9 * (40 * 2e8 / 2e10) / 2e8)
    assert "30.0 GB/s / 190.73 MiB for a token x 40%, as gguf q4_0 in laptop" in entry["decode_tok_s"]["how"]
    assert "another machine" in entry["decode_tok_s"]["how"]
    memory = find(advise(reports=[report("again")], recipe=wish(prompt_tokens=1000)), "q4_0")["memory_mib"]
    assert (memory["source"], memory["value"] > 3 * 10**8 / 2**20) == ("predicted", True)
    assert "KV cache for 1100 tokens" in memory["how"]


def test_what_a_target_reaches_is_not_made_up(advise: Advise, report: Any) -> None:
    result = advise(wish(decode_tok_s=10), reports=[report()])
    other = find(result, "8da4w")
    assert other["decode_tok_s"]["source"] == "at best"
    assert other["verdict"] == "not known", "a limit cannot grant a wish"
    assert "what share of it executorch reaches was not measured" in other["decode_tok_s"]["how"]
    assert find(result, "8da4w")["kl"] == {"value": None, "source": "not measured", "how": other["kl"]["how"]}
    assert "No speed of executorch, onnx to predict from" in result["text"]
    refuted = advise(wish(decode_tok_s=10**6), reports=[report("again")])
    assert find(refuted, "8da4w")["verdict"] == "does not fit", "a limit can refute one"


def test_a_speed_from_the_cache_predicts_nothing(advise: Advise, report: Any) -> None:
    cached = report(card={"cache_bytes": 10**9})
    entry = find(advise(reports=[cached]), "q4_0")
    assert (entry["decode_tok_s"]["source"], entry["decode_tok_s"]["value"]) == ("at best", pytest.approx(150))
    assert "ran from the cache" in entry["decode_tok_s"]["how"]


def test_a_stated_bandwidth_is_that_of_all_threads(advise: Advise, report: Any) -> None:
    result = advise(reports=[report(threads=(1, 2))])
    # Two threads: 64 tok/s of 2e8 bytes are 32 % of 40 GB/s; one thread alone reaches 40 % of its own 20.
    assert find(result, "q4_0")["decode_tok_s"]["value"] == pytest.approx(30e9 * 0.32 / 2e8)


def test_the_prompt_of_another_device_is_not_predicted(advise: Advise, report: Any) -> None:
    result = advise(wish(first_token_ms=5000), reports=[report()])
    entry = find(result, "q4_0")
    assert (entry["first_token_ms"]["source"], entry["verdict"]) == ("at best", "not known")
    assert "as far as is known" in result["text"]
    assert "arithmetic of a prompt" in "\n".join(result["advice"]["not_measured"])
    assert "edgealign bench BUNDLE --prompt-tokens 512" in result["advice"]["measure"]


def test_a_report_of_another_model_lends_its_share_and_says_so(advise: Advise, report: Any) -> None:
    entry = find(advise(reports=[report(model_digest="e" * 64)]), "q4_0")
    assert "another model and machine" in entry["decode_tok_s"]["how"]
    assert (entry["kl"]["value"], entry["file_bytes"]["source"]) == (None, "computed")


# --- the choice ------------------------------------------------------------------------------------------------------


def test_a_phone_with_little_memory_gets_a_smaller_quantisation(advise: Advise, report: Any) -> None:
    large = advise(reports=[report()], device=["bandwidth_gb_s=30", "ram_gb=8"], recipe=wish(targets=("gguf",)))
    small = advise(
        reports=[report("again")], device=["bandwidth_gb_s=30", "ram_gb=0.4"], recipe=wish(targets=("gguf",))
    )  # fmt: skip
    assert (large["advice"]["quant"], small["advice"]["quant"]) == ("q8_0", "q4_0")
    assert find(small, "q8_0")["verdict"] == "does not fit"
    assert "gguf q8_0, no adapter: memory" in small["text"]
    assert "an app gets less" in small["text"]


def test_a_wished_speed_and_a_wished_kl_decide(advise: Advise, report: Any) -> None:
    quick = advise(wish(decode_tok_s=50, targets=("gguf",)), reports=[report()])
    assert (quick["advice"]["quant"], quick["advice"]["verdict"]) == ("q4_0", "fits")
    close = advise(wish(kl=0.01, targets=("gguf",)), reports=[report("again")])
    assert close["advice"]["quant"] == "q8_0"
    assert find(close, "q4_0")["verdict"] == "does not fit"
    assert find(close, "q4_k_m")["verdict"] == "not known"
    least = advise(wish(prefer="speed", targets=("gguf",)), reports=[report("third")])
    assert least["advice"]["quant"] != "q8_0"


def test_where_nothing_fits_the_relaxed_wish_would(advise: Advise, report: Any) -> None:
    result = advise(wish(decode_tok_s=10**7, targets=("gguf",)), reports=[report()])
    assert result["advice"]["fits"] is False
    assert [check["passed"] for check in result["checks"]] == [False]
    (line,) = result["advice"]["relax"]
    needed = float(line.rsplit(" ", 1)[1])
    assert "it would fit with --decode-tok-s" in line
    relaxed = advise(wish(decode_tok_s=needed, targets=("gguf",)), reports=[report("again")])
    assert (relaxed["advice"]["fits"], relaxed["advice"]["quant"]) == (True, result["advice"]["quant"])


# --- merged or apart -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "adapter", "users"), [(100, 10, 2), (100, 49, 2), (100, 50, 3), (100, 90, 11), (100, 100, None)]
)  # fmt: skip
def test_from_how_many_users_on_one_file_is_smaller(file: int, adapter: int, users: int | None) -> None:
    assert crossover(file, adapter) == users
    if users is not None:
        assert file + users * adapter < users * file
        assert users == 2 or file + (users - 1) * adapter >= (users - 1) * file


def test_one_user_merges_a_costly_adapter_and_several_share_a_file(
    advise: Advise, report: Any, card: Any, lora: Path
) -> None:
    def same_size(result: dict[str, Any]) -> None:
        for bundle in result["bundles"]:
            bundle["adapter_bytes"] = {"ana": 10**6}

    given = {"adapters": {"ana": lora}, "reports": [report(edit=same_size)], "device": [card()]}
    alone = advise(wish(targets=("gguf",)), **given)
    assert alone["advice"]["carrier"] == "merged"
    assert "costs 20% of the decode speed (measured" in alone["text"]
    assert find(alone, "q4_0", "merged")["decode_tok_s"]["value"] == pytest.approx(40)
    assert find(alone, "q4_0", "apart")["decode_tok_s"]["value"] == pytest.approx(32)
    assert find(alone, "q4_0", "merged")["kl"]["value"] is None, "a merged model has not been measured"
    several = advise(wish(targets=("gguf",), users=3), **given)
    assert several["advice"]["carrier"] == "apart"
    assert "Files for 3 users: apart" in several["text"]
    assert "from 2 users on apart is smaller" in several["text"]


def test_an_adapter_of_another_size_was_not_measured(advise: Advise, report: Any, card: Any, lora: Path) -> None:
    result = advise(adapters={"eve": lora}, reports=[report()], device=[card()])
    entry = find(result, "q4_0", "apart")
    assert (entry["decode_tok_s"]["source"], entry["adapter_bytes"]["source"]) == ("predicted", "computed")
    assert entry["kept"]["value"] is None


def make_bundle(out: Path, digest: str, *, kept: float, tolerance: float, users: dict[str, str] | None = None) -> Path:
    with publish(out, kind="bundle", format="gguf", stage="test", recipe={}) as draft:
        (draft.dir / "model.gguf").write_bytes(b"not read")
        (draft.dir / "ana.gguf").write_bytes(b"ana")
        draft.meta.update(target="gguf", quant="q4_0", model_file="model.gguf", model_digest=digest)
        draft.meta["adapters"] = {"ana": {"file": "ana.gguf", "digest": (users or {}).get("ana", "")}}
        draft.add_check(Check("quant.kl", 0.05, 0.25, True))
        draft.add_check(Check("survival.ana", kept, tolerance, kept >= tolerance))
    return out


@pytest.mark.parametrize(("kept", "tolerance", "warned"), [(0.97, 0.5, False), (0.8, 0.5, True), (0.93, 0.95, True)])
def test_a_change_that_is_lost_is_warned_about(
    kept: float, tolerance: float, warned: bool, advise: Advise, model: Path, lora: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", open_artifact(model).digest, kept=kept, tolerance=tolerance)
    result = advise(adapters={"ana": lora}, bundles=[bundle])
    assert find(result, "q4_0", "apart")["kept"]["value"] == kept
    assert any("of the user's change, wanted" in line for line in result["warnings"]) is warned


# --- input that cannot be used ---------------------------------------------------------------------------------------


def test_what_contradicts_the_model_is_refused(
    advise: Advise, model: Path, short_model: Path, lora: Path, tmp_path: Path
) -> None:
    foreign = make_bundle(tmp_path / "foreign", "e" * 64, kept=1.0, tolerance=0.5)
    with pytest.raises(InputError, match="was exported from the model eeeeeeeeeeee"):
        advise(bundles=[foreign])
    digest = open_artifact(model).digest
    other = make_bundle(tmp_path / "other", digest, kept=1.0, tolerance=0.5, users={"ana": "f" * 64})
    with pytest.raises(InputError, match="holds another adapter of ana"):
        advise(adapters={"ana": lora}, bundles=[other])
    with pytest.raises(UsageError, match="was fitted on the model"):
        advise(adapters={"ana": lora}, model=short_model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "ram_gb=8", "--decode-tok-s", "20"], "cannot be judged without a measurement"),
        (["--device", "ram_gb=1", "--memory-mib", "4000"], "is more than the device has"),
        (["--device", "bandwidth_gb_s=0"], "cannot be"), (["--device", "ram_gb=lots"], "is no number"),
        (["--device", "speed=3"], "is no fact of a machine card"), (["--device", "nowhere.json"], "is no machine card"),
        (["--device", "ram_gb=4", "--prompt-tokens", "99999"], "does not fit the model's context"),
        (["--kl", "0"], "must be more than 0"), (["--bench", "nowhere"], "no such directory"),
        (["--adapter", "a=x", "--adapter", "a=y"], "a second time"), (["--targets", "coreml"], "is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line_and_status_two(
    arguments: list[str], words: str, model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["edgealign", "advise", "--model", str(model), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert (stop.value.code, len(said.splitlines())) == (2, 1), said
    assert words in said


@pytest.mark.parametrize(
    "edit",
    [
        lambda result: result.update(bandwidth="fast"),
        lambda result: result.update(bandwidth=[{"threads": "x", "bytes_per_s": -1}, 3]),
        lambda result: [entry.update(token_bytes="?", adapter_bytes=[1], fidelity=None) for entry in result["bundles"]],
        lambda result: [entry.update(fidelity={"kl": "low", "change_kept": {"ana": 7}}) for entry in result["bundles"]],
        lambda result: [row.update(ttft_ns=["soon"], samples_ns=None) for row in result["results"]],
    ],
    ids=["bandwidth text", "bandwidth odd", "bundles", "fidelity", "rows"],
)  # fmt: skip
def test_a_report_with_odd_fields_is_used_without_them(edit: Any, advise: Advise, report: Any) -> None:
    assert advise(reports=[report(edit=edit)])["candidates"]


def test_advice_is_published_with_its_picture_and_nothing_fitting_is_status_one(
    report: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["edgealign", "advise", "--model", str(model), "--bench", str(report()), "--device", *PHONE[:1]]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out"), "--decode-tok-s", "30"])
    cli.main()
    made = open_artifact(tmp_path / "out", kind="report")
    assert {entry.path for entry in made.manifest.files} == {"result.json", "table.md", "advice.png"}
    assert [check.passed for check in made.manifest.checks] == [True]
    assert str(tmp_path) not in (tmp_path / "out" / "result.json").read_text(encoding="utf-8")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*command, "--decode-tok-s", "1000000", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert json.loads(capsys.readouterr().out)["advice"]["fits"] is False
