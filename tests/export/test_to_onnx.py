"""The ONNX export from end to end: what passes is published, what is broken is not, what is unknown is one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgealign.artifact import Artifact, open_artifact
from edgealign.errors import (
    ArtifactError,
    CheckFailed,
    EdgealignError,
    InputError,
    RecipeError,
    ToolMissing,
    UsageError,
)
from edgealign.export_recipes import QUANTS, ExportRecipe
from edgealign.runtimes.lora_inputs import INPUTS_FILE
from edgealign.runtimes.onnx_adapter import read_lora_onnx
from edgealign.runtimes.onnx_session import OnnxSession
from edgealign.runtimes.session import read_bundle

TinyLora = Callable[..., Path]
QUICK = ("prompt_lengths=1,2,9", "steps=2", "windows=2", "window_tokens=24", "threads=1")


def export(model: Path, out: Path, adapters: Mapping[str, Path] | None = None, **fields: Any) -> Artifact:
    from to_onnx import export as run

    calibration = fields.pop("calibration", None)
    recipe = ExportRecipe(**{"verify": QUICK, **fields})
    return run(recipe, model=model, adapters=adapters or {}, out=out, calibration=calibration)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def in_process(onnx_tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate opens its sessions here and not in child processes: quick, and a test can break them."""
    from edgealign.parity_logits import Subject

    def opened(subject: Subject, *, exact: bool) -> OnnxSession:
        return OnnxSession(subject.bundle.model_file, threads=1, context=256, exact=exact)

    monkeypatch.setattr(Subject, "open", opened)


@pytest.mark.runtime
@pytest.mark.slow
def test_a_quantised_bundle_with_two_users_is_published_with_its_proofs(
    onnx_tools: None, tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    users = {"ana": tiny_lora(seed=1, strength=0.3), "ben": tiny_lora(seed=2, strength=0.3, rslora=True)}
    bundle = export(tiny_model, tmp_path / "bundle", users, quant="int4")
    model, meta = open_artifact(tiny_model), bundle.meta
    assert (meta["target"], meta["quant"], meta["model_file"]) == ("onnx", "int4", "model.onnx")
    assert (meta["model_digest"], meta["parameters"]) == (model.digest, model.meta["parameters"])
    assert meta["adapters"]["ana"]["file"] == "adapters/ana.onnx_adapter"
    assert meta["adapters"]["ana"]["digest"] == open_artifact(users["ana"]).digest
    names = {entry.path for entry in bundle.manifest.files}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", INPUTS_FILE, "adapters/ana.onnx_adapter",
            "adapters/ben.onnx_adapter", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "generation_config.json"} == names  # fmt: skip
    assert read_lora_onnx(bundle.path / "adapters/ben.onnx_adapter").base == model.digest[:7]
    checks = {check.name: check for check in bundle.manifest.checks}
    assert all(check.passed for check in checks.values())
    assert checks["float32 logits.ben"].value <= 1e-5
    assert checks["same_weights.ben"].value > 1 - 1e-6
    assert {"quant.kl", "survival.ana", "state.swap", "genai.tokens", "genai.ana", "genai.base_again"} <= set(checks)
    assert bundle.manifest.template_hash == model.manifest.template_hash
    assert [entry.role for entry in bundle.manifest.inputs] == ["model", "adapter ana", "adapter ben"]
    assert leftovers(tmp_path) == ["bundle"]


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("quant", "per_weight"), [("fp32", 4.0), ("int8", 9 / 8), ("int4", 5 / 8), ("int4_k", 5.1 / 8)]
)
def test_the_tied_head_is_stored_once_in_the_models_own_quantisation(
    onnx_bundle: Callable[[str], Path], tiny_model: Path, quant: str, per_weight: float
) -> None:
    """A 32-bit scale per 32 weights; in int4 the head has 8 bits. Norms, convolutions and rotary rows are in floats."""
    import onnx_ir as ir

    bundle = onnx_bundle(quant)
    assert read_bundle(bundle).model_bytes > (bundle / "model.onnx.data").stat().st_size
    config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    head = config["vocab_size"] * config["hidden_size"]
    weights = open_artifact(tiny_model).meta["parameters"]
    graph = ir.load(bundle / "model.onnx").graph
    rows = 2 * 4 * config["max_position_embeddings"] * config["hidden_size"] // config["num_attention_heads"] // 2
    allowed = per_weight * weights + (head / 2 if "int4" in quant else 0) + rows
    assert (bundle / "model.onnx.data").stat().st_size < 1.1 * allowed
    big = [value.name for value in graph.initializers.values() if value.const_value.size >= head / 2
           and tuple(value.const_value.shape)[:1] == (config["vocab_size"],)]  # fmt: skip
    assert len([name for name in big if "scale" not in name and "zp" not in name]) <= 1


@pytest.mark.runtime
def test_int4_holds_exactly_what_was_trained_on_the_q4_0_grid(onnx_tools: None) -> None:
    """`sft --qat q4_0` publishes such weights; the shipped starter is one of them."""
    import onnx_ir as ir
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    from edgealign.runtimes.onnx_weights import matrix
    from edgealign.train.qat import to_grid

    weight = to_grid(torch.randn(48, 64, generator=torch.Generator().manual_seed(0))).numpy()
    x, y = (ir.val(name, ir.DataType.FLOAT, shape) for name, shape in (("x", (1, 64)), ("y", (1, 48))))
    stored = ir.val("w", const_value=ir.tensor(weight.T.copy(), name="w"))
    node = ir.Node("", "MatMul", [x, stored], outputs=[y], name="product")
    graph = ir.Graph([x], [y], nodes=[node], initializers=[stored], opset_imports={"": 21}, name="one")
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    quantizer = MatMulNBitsQuantizer(proto, bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    rounded = next(node for node in ir.from_proto(quantizer.model.model).graph if node.op_type == "MatMulNBits")
    assert (matrix(rounded) == weight).all()


def scale_the_adapter_twice(monkeypatch: pytest.MonkeyPatch) -> str:
    from edgealign.runtimes import onnx_adapter
    from edgealign.runtimes.lora_weights import LoraWeights, LowRank, read_lora

    def doubled(adapter: Path) -> LoraWeights:
        lora = read_lora(adapter)
        return LoraWeights({name: LowRank(p.a, 2 * p.b) for name, p in lora.modules.items()}, lora.base_digest)

    monkeypatch.setattr(onnx_adapter, "read_lora", doubled)
    return "logits.ana"


def keep_the_convolutions_state(monkeypatch: pytest.MonkeyPatch) -> str:
    def reset(session: OnnxSession) -> None:
        for state in session._states:
            if state.grows:
                state.buffers[0].fill(0)
        session._filled = session._touched = session._turn = 0

    monkeypatch.setattr(OnnxSession, "reset", reset)
    return "state.second_conversation"


def swap_two_weights(monkeypatch: pytest.MonkeyPatch) -> str:
    import genai_model

    original = genai_model.tie_head

    def swapped(graph: Any) -> None:
        original(graph)
        nodes = {node.name.split("/MatMul")[0]: node for node in graph if node.name}
        one, two = (nodes[f"/model/layers.1/mlp/{name}_proj"] for name in ("gate", "up"))
        for place in range(1, len(one.inputs)):
            first, second = one.inputs[place], two.inputs[place]
            one.replace_input_with(place, second)
            two.replace_input_with(place, first)

    monkeypatch.setattr(genai_model, "tie_head", swapped)
    return "logits.base"


def ship_another_tokenizer(monkeypatch: pytest.MonkeyPatch) -> str:
    import export_program

    original = export_program.copy_texts

    def other(base: Artifact, folder: Path) -> None:
        original(base, folder)
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][::-1]
        file.write_text(json.dumps(tokenizer), encoding="utf-8")

    monkeypatch.setattr(export_program, "copy_texts", other)
    return "tokens.ids"


@pytest.mark.runtime
@pytest.mark.parametrize(
    "break_it", [scale_the_adapter_twice, keep_the_convolutions_state, swap_two_weights, ship_another_tokenizer]
)
def test_a_deliberately_broken_export_is_not_published(
    in_process: None, break_it: Callable[[pytest.MonkeyPatch], str], tiny_model: Path, tiny_lora: TinyLora,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = break_it(monkeypatch)
    with pytest.raises(CheckFailed, match=r"does not behave like the torch model .* nothing was published") as caught:
        export(tiny_model, tmp_path / "bundle", {"ana": tiny_lora(seed=1, strength=0.3)}, quant="fp32")
    assert expected in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.runtime
def test_swapped_weights_that_4_bits_would_hide_fail_too(
    in_process: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_two_weights(monkeypatch)
    with pytest.raises(CheckFailed, match=r"weights\.rounded"):
        export(tiny_model, tmp_path / "bundle", quant="int4", exact_gate=False)
    assert leftovers(tmp_path) == []


@pytest.mark.runtime
def test_the_numbers_of_torch_and_genai_in_32_bits(in_process: None, tiny_model: Path, tmp_path: Path) -> None:
    bundle = export(tiny_model, tmp_path / "bundle", quant="fp32", context=64)
    values = {check.name: check.value for check in bundle.manifest.checks}
    assert values["logits.base"] <= 1e-5
    assert values["genai.base"] <= 1e-5
    assert bundle.meta["context"] == 64


@pytest.mark.runtime
@pytest.mark.parametrize("quant", ["int8", "int4", "int4_k"])
def test_every_quantisation_is_exported_with_a_user(
    in_process: None, quant: str, tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    users = {"ana": tiny_lora(seed=1, strength=0.3)}
    bundle = export(tiny_model, tmp_path / "bundle", users, quant=quant, exact_gate=False)
    assert (bundle.meta["quant"], set(bundle.meta["adapters"])) == (quant, {"ana"})


def small_loras(base: Path, tiny_lora: TinyLora) -> dict[str, Path]:
    return {"ana": tiny_lora(seed=1, base=base, strength=0.3)}


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["lfm2-adjusted", "lfm2-moe", "llama", "llama-untied", "qwen3", "gemma3"])
def test_other_shapes_are_exported_with_a_user(
    in_process: None, small_model: Callable[[str], Path], tiny_lora: TinyLora, tmp_path: Path, name: str
) -> None:
    base = small_model(name)
    bundle = export(base, tmp_path / "bundle", small_loras(base, tiny_lora), quant="fp32")
    values = {check.name: check.value for check in bundle.manifest.checks}
    assert max(values["logits.base"], values["logits.ana"], values["genai.ana"]) <= 1e-4


# --- refused in one line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"quant": "q4_0"}, RecipeError, "q4_0: is no quantisation of the target onnx; choose one of: fp32"),
        ({"adapter_type": "f16"}, RecipeError, "the graph computes adapters in 32 bits"),
        ({"calibration": Path("text.txt")}, UsageError, "onnx quantises without a calibration text"),
    ],
)
def test_what_the_target_does_not_do_is_refused(
    onnx_tools: None, tiny_model: Path, tmp_path: Path, fields: dict[str, Any], kind: type[EdgealignError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        export(tiny_model, tmp_path / "bundle", **fields)
    assert leftovers(tmp_path) == []


@pytest.mark.runtime
def test_what_the_builder_cannot_build_is_one_line_and_leaves_nothing(
    onnx_tools: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime_genai.models.builder as builder

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such rotary embedding")

    monkeypatch.setattr(builder, "create_model", refuse)
    message = r"cannot be built as int8 by onnxruntime-genai \(RuntimeError: no such rotary embedding\); export it with"
    with pytest.raises(InputError, match=message):
        export(tiny_model, tmp_path / "bundle", quant="int8", exact_gate=False)
    assert leftovers(tmp_path) == []


def test_weights_of_another_architecture_than_the_config_says_are_refused(
    onnx_tools: None, tmp_path: Path, tiny_model: Path
) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/manifest.json").unlink()
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(InputError, match="Lfm2ForCausalLM has no language-model head to generate with; use: lfm2"):
        export(tmp_path / "model", tmp_path / "bundle")
    assert leftovers(tmp_path) == ["model"]


def test_an_adapter_of_another_base_is_refused_with_both_digests(
    onnx_tools: None, tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"was fitted on the model cdcdcdcdcdcd, this one is [0-9a-f]{12}"):
        export(tiny_model, tmp_path / "bundle", {"ana": tiny_lora(seed=9, base_digest="cd" * 32)})
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("module", ["onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir", "onnxscript"])
def test_a_missing_tool_is_named_with_its_install_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    import to_onnx

    monkeypatch.setattr(to_onnx, "find_spec", lambda name: None if name == module else object())
    assert to_onnx.main(["--model", str(tiny_model), "--out", str(tmp_path / "bundle")]) == 3
    with pytest.raises(ToolMissing, match=r"is not installed in this Python; pip install 'edgealign\[onnx\]'"):
        export(tiny_model, tmp_path / "bundle")


def test_auto_is_the_targets_four_bits_and_every_onnx_recipe_is_known() -> None:
    from edgealign.export_recipes import resolve

    assert resolve(ExportRecipe(), "onnx").quant == "int4"
    assert resolve(ExportRecipe(), "gguf").quant == "q4_0"
    recipes = (Path(__file__).parents[2] / "export/recipes").glob("onnx-*.toml")
    assert {file.stem.removeprefix("onnx-") for file in recipes} == set(QUANTS["onnx"])
