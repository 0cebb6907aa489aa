"""The export program from end to end: what passes is published, what is broken is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.artifact import Artifact, open_artifact
from edgealign.errors import ArtifactError, CheckFailed, OutputError, RecipeError, ToolMissing, UsageError
from edgealign.export_recipes import QUANTS, ExportRecipe
from edgealign.runtimes.gguf_header import check_gguf

TinyLora = Callable[..., Path]
QUICK = ("prompt_lengths=1,2,9", "steps=2", "windows=2", "window_tokens=24", "threads=1")


def export(model: Path, out: Path, adapters: Mapping[str, Path] | None = None, **fields: Any) -> Artifact:
    from to_gguf import export as run

    calibration = fields.pop("calibration", None)
    recipe = ExportRecipe(**{"verify": QUICK, "threads": 1, **fields})
    return run(recipe, model=model, adapters=adapters or {}, out=out, calibration=calibration)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.runtime
@pytest.mark.slow
def test_a_quantised_bundle_with_two_users_is_published_with_its_proofs(
    tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "The river froze and no boats came at all."}) for _ in range(40)))
    users = {"ana": tiny_lora(seed=1, strength=0.3), "ben": tiny_lora(seed=2, strength=0.3, rslora=True)}
    bundle = export(tiny_model, tmp_path / "bundle", users, quant="q4_k_m", calibration=text, calibration_tokens=256)
    model = open_artifact(tiny_model)
    meta = bundle.meta
    assert (meta["target"], meta["quant"], meta["model_file"]) == ("gguf", "q4_k_m", "model.gguf")
    assert (meta["model_digest"], meta["parameters"]) == (model.digest, model.meta["parameters"])
    assert meta["calibration"]["tokens"] == 256
    assert meta["adapters"]["ana"]["file"] == "adapters/ana.gguf"
    assert meta["adapters"]["ana"]["digest"] == open_artifact(users["ana"]).digest
    names = {entry.path for entry in bundle.manifest.files}
    assert {"model.gguf", "adapters/ana.gguf", "adapters/ben.gguf", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "generation_config.json"} == names  # fmt: skip
    assert check_gguf(bundle.path / "adapters/ben.gguf").metadata["edgealign.base_digest"] == model.digest
    assert check_gguf(bundle.path / "model.gguf").metadata["quantize.imatrix.chunks_count"] == 1
    checks = {check.name: check for check in bundle.manifest.checks}
    assert all(check.passed for check in checks.values())
    assert checks["float32 logits.base"].value <= 1e-4
    assert any("ana" in name for name in checks)
    assert "quant.kl" in checks
    assert bundle.manifest.template_hash == model.manifest.template_hash
    assert [entry.role for entry in bundle.manifest.inputs] == ["model", "adapter ana", "adapter ben", "calibration"]
    assert "boats" not in (bundle.path / "manifest.json").read_text(encoding="utf-8")
    assert not [name for name in leftovers(tmp_path) if name.startswith(".")]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate opens its sessions here and not in child processes, which is quicker."""
    from edgealign.parity_logits import Subject
    from edgealign.runtimes.llamacpp import LlamaSession

    def opened(subject: Subject, *, exact: bool) -> LlamaSession:
        return LlamaSession(subject.bundle.model_file, threads=1, context=256, exact=exact)

    monkeypatch.setattr(Subject, "open", opened)


@pytest.mark.runtime
@pytest.mark.parametrize("quant", QUANTS["gguf"])
def test_every_quantisation_is_exported_with_a_user(
    in_process: None, quant: str, tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    users = {"ana": tiny_lora(seed=1, strength=0.3)}
    bundle = export(tiny_model, tmp_path / "bundle", users, quant=quant, exact_gate=False)
    assert (bundle.meta["quant"], set(bundle.meta["adapters"])) == (quant, {"ana"})


def direction(model: Path, out: Path, seed: int = 0, size: float = 0.3) -> Path:
    """A published user as a control vector behind the middle layer."""
    from edgealign.artifact import publish
    from edgealign.models.load import read_config
    from edgealign.runtimes.control_vector import FILE, write_control_vector

    config, base = read_config(model), open_artifact(model)
    values = size * np.random.default_rng(seed).normal(size=config["hidden_size"])
    with publish(out, kind="adapter", format="direction", stage="test", recipe={}) as draft:
        write_control_vector(
            {3: values}, draft.dir / FILE, base_digest=base.digest, model_type=config["model_type"]
        )
        draft.meta["base_digest"] = base.digest
    return out


@pytest.mark.runtime
@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_a_direction_is_exported_beside_a_lora_and_held_against_torch(
    in_process: None, quant: str, tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    from edgealign import recipe as recipes
    from edgealign.parity import verify
    from edgealign.parity_recipes import VerifyRecipe

    users = {"dora": direction(tiny_model, tmp_path / "dora"), "ana": tiny_lora(seed=1, strength=0.3)}
    bundle = export(tiny_model, tmp_path / "bundle", users, quant=quant, exact_gate=False)
    entries = bundle.meta["adapters"]
    assert {name: (entry["kind"], entry["file"]) for name, entry in entries.items()} == {
        "dora": ("direction", "adapters/dora.gguf"), "ana": ("lora", "adapters/ana.gguf")
    }  # fmt: skip
    assert entries["dora"]["dtype"] == "f32"
    shipped = bundle.path / "adapters/dora.gguf"
    assert shipped.read_bytes() == (users["dora"] / "direction.gguf").read_bytes()
    names = {check.name for check in bundle.manifest.checks}
    wanted = {"effect.dora", "logits.dora", "merged.ana"} if quant == "f32" else {"effect.dora", "survival.dora"}
    assert wanted <= names
    recipe = recipes.build(VerifyRecipe, dict(entry.split("=") for entry in QUICK), where="test")
    other = direction(tiny_model, tmp_path / "other", seed=1)
    checks = verify(bundle.path, model=tiny_model, adapters={**users, "dora": other}, recipe=recipe)
    failed = {check.name for check in checks if not check.passed}
    assert failed
    assert all("dora" in name for name in failed)


@pytest.mark.parametrize(
    ("target", "format", "options", "message"),
    [
        ("gguf", "shots", {}, r"is choices in the prompt and no weights.*chat --bundle --user"),
        ("gguf", "preference", {}, r"is an embedding and no weights"),
        ("gguf", "direction", {"kit": "android"}, r"dora: is a direction, which the kit's scripts do not switch on"),
        ("onnx", "direction", {}, r"is a direction, and an exported onnx program has no place.*--method lora"),
    ],
)
def test_a_user_whom_a_bundle_cannot_carry_is_refused_with_the_way_that_works(
    target: str, format: str, options: dict[str, str], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    from importlib import import_module

    from edgealign.artifact import publish

    if format == "direction":
        user = direction(tiny_model, tmp_path / "dora")
    else:
        user = tmp_path / "dora"
        with publish(user, kind="adapter", format=format, stage="test", recipe={}) as draft:
            draft.meta["base_digest"] = open_artifact(tiny_model).digest
    program = import_module(f"to_{target}")
    with pytest.raises(UsageError, match=message):
        program.export(
            ExportRecipe(threads=1), model=tiny_model, adapters={"dora": user}, out=tmp_path / "out", calibration=None,
            **options,
        )  # fmt: skip
    assert leftovers(tmp_path) == ["dora"]


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["lfm2-moe", "llama", "qwen3", "gemma3"])
def test_other_architectures_are_exported_with_a_user(
    in_process: None, name: str, small_model: Callable[[str], Path], tiny_lora: TinyLora, tmp_path: Path
) -> None:
    base = small_model(name)
    users = {"ana": tiny_lora(seed=1, strength=0.3, base=base)}
    for quant in ("f32", "q8_0"):
        bundle = export(base, tmp_path / quant, users, quant=quant, exact_gate=False)
        assert all(check.passed for check in bundle.manifest.checks)


def swap_two_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf_model

    original = gguf_model.expand

    def swapped(*arguments: Any) -> list[Any]:
        names = {"blk.0.ffn_gate.weight": "blk.0.ffn_up.weight", "blk.0.ffn_up.weight": "blk.0.ffn_gate.weight"}
        return [type(row)(row.hf, names.get(row.gguf, row.gguf), row.rule, row.linear) for row in original(*arguments)]

    monkeypatch.setattr(gguf_model, "expand", swapped)


def swap_two_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf_model

    original = gguf_model.expand

    def swapped(*arguments: Any) -> list[Any]:
        names = {"blk.1.attn_norm.weight": "blk.1.ffn_norm.weight", "blk.1.ffn_norm.weight": "blk.1.attn_norm.weight"}
        return [type(row)(row.hf, names.get(row.gguf, row.gguf), row.rule, row.linear) for row in original(*arguments)]

    monkeypatch.setattr(gguf_model, "expand", swapped)


def turn_the_rotary_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_model.rope_theta", lambda config: 500.0)


def ignore_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgealign.runtimes.gguf_adapter as adapter
    from edgealign.runtimes.lora_weights import LowRank

    monkeypatch.setattr(adapter, "_in_runtime_order", lambda row, pair, config: LowRank(pair.a, np.zeros_like(pair.b)))


def scale_the_adapter_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgealign.runtimes.gguf_adapter as adapter
    from edgealign.runtimes.lora_weights import LowRank

    monkeypatch.setattr(adapter, "_in_runtime_order", lambda row, pair, config: LowRank(pair.a, pair.b * 2))


def end_turns_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_vocab.rendered_end_of_turn", lambda tokenizer: 2)


@pytest.mark.runtime
@pytest.mark.parametrize(
    "break_it",
    [swap_two_tensors, swap_two_norms, turn_the_rotary_base, ignore_the_adapter, scale_the_adapter_twice,
     end_turns_elsewhere],
)  # fmt: skip
def test_a_deliberately_broken_export_is_not_published(
    break_it: Callable[[pytest.MonkeyPatch], None],
    tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    break_it(monkeypatch)
    users = {"ana": tiny_lora(seed=1, strength=0.3)} if "adapter" in break_it.__name__ else {}
    with pytest.raises(CheckFailed, match=r"does not behave like the torch model .* nothing was published"):
        export(tiny_model, tmp_path / "bundle", users, quant="q4_0")
    assert leftovers(tmp_path) == []


@pytest.mark.runtime
def test_a_32_bit_bundle_is_published_and_equals_torch(tiny_model: Path, tmp_path: Path) -> None:
    bundle = export(tiny_model, tmp_path / "bundle", quant="f32")
    values = {check.name: check.value for check in bundle.manifest.checks}
    assert values["logits.base"] <= 1e-4
    assert bundle.meta["adapters"] == {}
    assert check_gguf(bundle.path / "model.gguf").metadata["general.file_type"] == 0


def test_an_adapter_of_another_base_is_refused_with_both_digests(
    tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    stranger = tiny_lora(seed=9, base_digest="cd" * 32)
    with pytest.raises(ArtifactError, match=r"was fitted on the model cdcdcdcdcdcd, this one is [0-9a-f]{12}"):
        export(tiny_model, tmp_path / "bundle", {"ana": stranger})
    assert leftovers(tmp_path) == []


def test_a_model_whose_turns_have_two_ends_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/manifest.json").unlink()
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"eos_token_id": 2}), encoding="utf-8")
    with pytest.raises(CheckFailed, match="turn end in config: ends with 2, the template with 7; set eos_token_id"):
        export(tmp_path / "model", tmp_path / "bundle")
    assert leftovers(tmp_path) == ["model"]


@pytest.mark.parametrize(("module", "package"), [("gguf", "gguf"), ("llama_cpp", "llama-cpp-python")])
def test_a_missing_tool_is_named_with_its_install_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    import to_gguf

    monkeypatch.setattr(to_gguf, "find_spec", lambda name: None if name == module else object())
    arguments = ["--model", str(tiny_model), "--out", str(tmp_path / "bundle")]
    assert to_gguf.main(arguments) == 3
    with pytest.raises(ToolMissing, match=rf"{package}: is not installed in this Python; pip install"):
        export(tiny_model, tmp_path / "bundle")


def test_a_disk_that_is_too_small_is_known_before_the_work(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"the export needs 0\.0 GB for a while, 0\.0 GB are free"):
        export(tiny_model, tmp_path / "bundle")
    assert leftovers(tmp_path) == []


def test_gate_fields_come_from_the_recipe_and_unknown_ones_are_refused() -> None:
    from to_gguf import verify_recipe

    from edgealign.runtimes.gguf_names import ARCHITECTURES

    lfm2, gemma = ARCHITECTURES["lfm2"], ARCHITECTURES["gemma3_text"]
    gate = verify_recipe(ExportRecipe(verify=("kl_4bit = 0.55", "windows=3")), lfm2)
    assert (gate.kl_4bit, gate.windows, gate.exact_tolerance) == (0.55, 3, 1e-4)
    assert verify_recipe(ExportRecipe(), gemma).exact_tolerance == 2e-3
    assert verify_recipe(ExportRecipe(verify=("exact_tolerance=0.05",)), gemma).exact_tolerance == 0.05
    with pytest.raises(RecipeError, match=r"unknown key kl_4bits \(did you mean kl_4bit\?\)"):
        verify_recipe(ExportRecipe(verify=("kl_4bits=1",)), lfm2)
    with pytest.raises(UsageError, match="is not name=value"):
        verify_recipe(ExportRecipe(verify=("kl_4bit",)), lfm2)


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "export/recipes").glob("*.toml")), ids=str)
def test_every_shipped_recipe_is_valid(recipe: Path) -> None:
    from edgealign.recipe import load

    assert load(ExportRecipe, recipe, {}).quant == recipe.stem.partition("-")[2]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--quant", "q3"], 2, "quant = 'q3' is not one of f32"),
        (["--adapter", "ana"], 2, "ana: is not USER=DIR"),
        (["--adapter", "../x=."], 2, "../x: is no user name"),
        (["--calibration", "absent.txt"], 2, "absent.txt: no such file"),
        (["--adapter", "ana=absent"], 2, "absent: no such directory"),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_two(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    from to_gguf import main

    common = ["--model", str(tiny_model), "--out", str(tmp_path / "out")]
    assert main([*common, *arguments]) == status
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert main([*common, *arguments, "--json"]) == status
    answer = json.loads(capfd.readouterr().out)
    assert answer["status"] == status
    assert message in ": ".join(answer["error"])
