"""The ExecuTorch export from end to end: what passes is published, what is broken is not, what is unknown is one line.

Lowering takes seconds for each layer: where a test needs no other program, the one of `executorch_bundle` is copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.artifact import Artifact, open_artifact
from edgealign.errors import ArtifactError, CheckFailed, EdgealignError, InputError, RecipeError, UsageError
from edgealign.export_recipes import QUANTS, ExportRecipe, resolve
from edgealign.runtimes.executorch_adapter import read_lora_executorch
from edgealign.runtimes.executorch_session import ExecutorchSession
from edgealign.runtimes.lora_inputs import INPUTS_FILE, read_inputs
from edgealign.runtimes.session import read_bundle

Bundles = Callable[[str], Path]
TinyLora = Callable[..., Path]
QUICK = ("prompt_lengths=1,2,9", "steps=2", "windows=2", "window_tokens=24", "threads=1")


def export(model: Path, out: Path, adapters: Mapping[str, Path] | None = None, **fields: Any) -> Artifact:
    from to_executorch import export as run

    calibration = fields.pop("calibration", None)
    recipe = ExportRecipe(**{"verify": QUICK, **fields})
    return run(recipe, model=model, adapters=adapters or {}, out=out, calibration=calibration)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def in_process(executorch_tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate opens its sessions here and not in child processes: quick, and a test can break them."""
    from edgealign.parity_logits import Subject

    def opened(subject: Subject, *, exact: bool) -> ExecutorchSession:
        return ExecutorchSession(subject.bundle.model_file, threads=1, context=256, exact=exact)

    monkeypatch.setattr(Subject, "open", opened)


@pytest.fixture
def lowered_once(executorch_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter finds its program made: the one that `executorch_bundle` lowered from the same model."""
    import executorch_lower

    made = {quant: executorch_bundle(quant) for quant in QUANTS["executorch"]}  # before the real one is replaced

    def copied(model: Path, file: Path, *, quant: str, digest: str, context: int | None) -> Any:
        bundle = made[quant]
        assert digest == read_manifest_digest(bundle)
        shutil.copyfile(bundle / "model.pte", file)
        shutil.copyfile(bundle / INPUTS_FILE, file.with_name(INPUTS_FILE))
        return executorch_lower.Lowered(read_inputs(bundle), 256)

    monkeypatch.setattr(executorch_lower, "write_program", copied)


def read_manifest_digest(bundle: Path) -> str:
    return str(open_artifact(bundle, check_digests=False).meta["model_digest"])


@pytest.mark.runtime
@pytest.mark.slow
def test_a_quantised_bundle_with_two_users_is_published_with_its_proofs(
    lowered_once: None, short_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    users = {
        "ana": tiny_lora(seed=1, strength=0.3, base=short_model),
        "ben": tiny_lora(seed=2, strength=0.3, rslora=True, base=short_model),
    }
    bundle = export(short_model, tmp_path / "bundle", users, quant="8da4w")
    model, meta = open_artifact(short_model), bundle.meta
    assert (meta["target"], meta["quant"], meta["model_file"]) == ("executorch", "8da4w", "model.pte")
    assert (meta["model_digest"], meta["architecture"], meta["context"]) == (model.digest, "lfm2", 256)
    assert meta["adapters"]["ana"]["file"] == "adapters/ana.safetensors"
    assert meta["adapters"]["ana"]["digest"] == open_artifact(users["ana"]).digest
    names = {entry.path for entry in bundle.manifest.files}
    assert {"model.pte", INPUTS_FILE, "adapters/ana.safetensors", "adapters/ben.safetensors", "tokenizer.json",
            "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} == names  # fmt: skip
    assert read_lora_executorch(bundle.path / "adapters/ben.safetensors").base_digest == model.digest
    checks = {check.name: check for check in bundle.manifest.checks}
    assert all(check.passed for check in checks.values())
    assert checks["float32 logits.ben"].value <= 1e-5
    assert checks["same_weights.ben"].value > 0.999
    assert checks["survival.ana"].value > 0.9
    assert {"quant.kl", "state.swap", "runner.first", "runner.after_reset"} <= set(checks)
    assert [entry.role for entry in bundle.manifest.inputs] == ["model", "adapter ana", "adapter ben"]
    assert leftovers(tmp_path) == ["bundle"]


@pytest.mark.runtime
@pytest.mark.slow
def test_a_program_of_32_bits_is_published_with_a_user(
    in_process: None, lowered_once: None, short_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    users = {"ana": tiny_lora(seed=1, strength=0.3, base=short_model)}
    bundle = export(short_model, tmp_path / "bundle", users, quant="fp32")
    values = {check.name: check.value for check in bundle.manifest.checks}
    assert max(values["logits.base"], values["logits.ana"], values["merged.ana"]) <= 1e-5


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp32", "8da4w"])
def test_every_weight_is_read_back_and_stored_once(executorch_bundle: Bundles, short_model: Path, quant: str) -> None:
    """Two methods, one set of weights; 4 bits in the blocks, 8 in the head and the embedding."""
    from safetensors.numpy import load_file

    from edgealign.runtimes.executorch_names import architecture
    from edgealign.runtimes.executorch_weights import stored_weights

    own = load_file(short_model / "model.safetensors")
    file = read_bundle(executorch_bundle(quant)).model_file
    loaders = {name: (lambda value=value: value) for name, value in own.items()}
    found = list(stored_weights(file, architecture("lfm2"), loaders))
    assert {name for name, _, _ in found} == set(own)
    for name, kept, values in found:
        gap = np.linalg.norm(values - own[name]) / np.linalg.norm(own[name])
        matrix = own[name].ndim == 2
        assert kept == (quant == "fp32" or not matrix)
        assert gap == 0 if kept else gap < (0.01 if "embed" in name else 0.12)
    embedding = own["model.embed_tokens.weight"].size
    matrices = sum(value.size for value in own.values() if value.ndim == 2) - embedding
    bytes_each = {"fp32": (4.0, 4.0), "8da4w": (1.1, 0.5625)}[quant]
    assert file.stat().st_size < 2 * embedding * bytes_each[0] + matrices * bytes_each[1] + 150_000


# --- broken on purpose -----------------------------------------------------------------------------------------------


def scale_the_adapter_twice(monkeypatch: pytest.MonkeyPatch) -> str:
    from edgealign.runtimes import executorch_adapter
    from edgealign.runtimes.lora_weights import LoraWeights, LowRank, read_lora

    def doubled(adapter: Path) -> LoraWeights:
        lora = read_lora(adapter)
        return LoraWeights({name: LowRank(p.a, 2 * p.b) for name, p in lora.modules.items()}, lora.base_digest)

    monkeypatch.setattr(executorch_adapter, "read_lora", doubled)
    return "logits.ana"


def give_the_matrices_in_another_order(monkeypatch: pytest.MonkeyPatch) -> str:
    original = ExecutorchSession._arrange

    def turned(session: ExecutorchSession, path: Path, values: Any, rank: int) -> tuple[Any, ...]:
        names = [entry.name for entry in session._inputs]
        one, two = (next(name for name in names if name.endswith(last)) for last in ("w1", "w3"))
        swapped = {one: two, two: one}
        renamed = {}
        for name, value in values.items():
            module, _, side = name.rpartition(".")
            renamed[f"{swapped.get(module, module)}.{side}"] = value
        return original(session, path, renamed, rank)

    monkeypatch.setattr(ExecutorchSession, "_arrange", turned)
    return "logits.ana"


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
@pytest.mark.slow
@pytest.mark.parametrize(
    "break_it", [scale_the_adapter_twice, give_the_matrices_in_another_order, ship_another_tokenizer]
)
def test_a_deliberately_broken_bundle_is_not_published(
    in_process: None, lowered_once: None, break_it: Callable[[pytest.MonkeyPatch], str], short_model: Path,
    tiny_lora: TinyLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = break_it(monkeypatch)
    users = {"ana": tiny_lora(seed=1, strength=0.3, base=short_model)}
    with pytest.raises(CheckFailed, match=r"does not behave like the torch model .* nothing was published") as caught:
        export(short_model, tmp_path / "bundle", users, quant="fp32")
    assert expected in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.runtime
@pytest.mark.slow
def test_a_program_whose_convolution_is_never_emptied_is_not_published(
    in_process: None, short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is what ExecuTorch's own definition does."""
    import executorch_lower
    import executorch_model

    class Upstream(executorch_model.Program):
        def forward(self, tokens: Any, input_pos: Any, *matrices: Any) -> Any:
            for convolution in self.convolutions:
                convolution.keep = (input_pos >= 0).float()
            for place in self.places:
                place.pair = None
            return self.net(tokens, {"input_pos": input_pos})

    monkeypatch.setattr(executorch_lower, "Program", Upstream)
    with pytest.raises(CheckFailed) as caught:
        export(short_model, tmp_path / "bundle", quant="fp32")
    assert "state.second_conversation" in str(caught.value)
    assert leftovers(tmp_path) == []


# --- refused in one line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"quant": "q4_0"}, RecipeError, "q4_0: is no quantisation of the target executorch; choose one of: fp32"),
        ({"adapter_type": "f16"}, RecipeError, "the program computes adapters in 32 bits"),
        ({"calibration": Path("text.txt")}, UsageError, "executorch quantises without a calibration text"),
    ],
)
def test_what_the_target_does_not_do_is_refused(
    executorch_tools: None, short_model: Path, tmp_path: Path, fields: dict[str, Any], kind: type[EdgealignError],
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(kind, match=message):
        export(short_model, tmp_path / "bundle", **fields)
    assert leftovers(tmp_path) == []


def test_a_model_that_is_not_what_it_says_is_refused(executorch_tools: None, tmp_path: Path, short_model: Path) -> None:
    shutil.copytree(short_model, tmp_path / "model")
    (tmp_path / "model/manifest.json").unlink()
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(InputError, match="Lfm2ForCausalLM has no language-model head to generate with; use: lfm2"):
        export(tmp_path / "model", tmp_path / "bundle")
    assert leftovers(tmp_path) == ["model"]


def test_an_adapter_of_another_base_is_refused_with_both_digests(
    executorch_tools: None, short_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    stranger = tiny_lora(seed=9, base=short_model, base_digest="cd" * 32)
    with pytest.raises(ArtifactError, match=r"was fitted on the model cdcdcdcdcdcd, this one is [0-9a-f]{12}"):
        export(short_model, tmp_path / "bundle", {"ana": stranger})
    assert leftovers(tmp_path) == []


@pytest.mark.runtime
def test_rows_that_groups_do_not_divide_are_one_line(
    executorch_tools: None, short_model: Path, tmp_path: Path
) -> None:
    import torch
    from executorch_model import round_weights

    with pytest.raises(InputError, match="rows of 40 weights in 0, which groups of 32 do not divide; export it as"):
        round_weights(torch.nn.Sequential(torch.nn.Linear(40, 8)), short_model)


def test_a_missing_tool_is_named_with_its_install_line(
    short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import to_executorch

    monkeypatch.setattr(to_executorch, "find_spec", lambda name: None)
    assert to_executorch.main(["--model", str(short_model), "--out", str(tmp_path / "bundle")]) == 3
    assert "pip install 'edgealign[executorch]'" in capsys.readouterr().err


def test_auto_is_8da4w_and_every_recipe_is_known() -> None:
    assert resolve(ExportRecipe(), "executorch").quant == "8da4w"
    recipes = (Path(__file__).parents[2] / "export/recipes").glob("executorch-*.toml")
    assert {file.stem.removeprefix("executorch-") for file in recipes} == set(QUANTS["executorch"])
