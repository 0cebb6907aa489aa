"""An architecture that no builder knows, through to a bundle: LFM3, with its users, and what the gate finds broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.artifact import Artifact, open_artifact
from edgealign.errors import ArtifactError, CheckFailed, InputError
from edgealign.export_recipes import ExportRecipe
from edgealign.runtimes.lora_inputs import read_inputs
from edgealign.runtimes.onnx_session import OnnxSession
from edgealign.runtimes.onnx_states import GRAPH_CONFIG, AppendedState
from edgealign.runtimes.torch_session import TorchSession

pytestmark = pytest.mark.runtime
TinyLora = Callable[..., Path]
SmallModel = Callable[[str], Path]
# The window has 16 tokens; random weights keep less of a user at 4 bits than trained ones.
QUICK = ("prompt_lengths=1,2,9,60", "steps=3", "windows=2", "window_tokens=40", "threads=1", "survival_4bit=0.5")
TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 400, 127)]


def export(model: Path, out: Path, adapters: Mapping[str, Path] | None = None, **fields: Any) -> Artifact:
    from to_onnx import export as run

    recipe = ExportRecipe(**{"verify": QUICK, **fields})
    return run(recipe, model=model, adapters=adapters or {}, out=out, calibration=None)


@pytest.fixture
def in_process(onnx_tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate opens its sessions here and not in child processes: quick, and a test can break them."""
    from edgealign.parity_logits import Subject

    def opened(subject: Subject, *, exact: bool) -> OnnxSession:
        return OnnxSession(subject.bundle.model_file, threads=1, context=256, exact=exact)

    monkeypatch.setattr(Subject, "open", opened)


@pytest.fixture(scope="module")
def folder(
    onnx_tools: None, small_model: SmallModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Factory of graphs of the small LFM3 by quantisation; made once."""
    made: dict[str, Path] = {}

    def make(quant: str) -> Path:
        if quant not in made:
            from general_model import write_model

            out = tmp_path_factory.mktemp("graph") / quant
            out.mkdir()
            write_model(small_model("lfm3"), out, quant=quant, digest="ab" * 32)
            made[quant] = out
        return made[quant]

    return make


# --- the graph and its states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[127], [1] * 127, [3, 4, 120], [7, 1, 119], [15, 1, 1, 110], [16, 17, 1, 1, 92]])
def test_a_prompt_in_pieces_around_the_convolutions_width_and_the_window_is_torchs(
    folder: Callable[[str], Path], small_model: SmallModel, cuts: list[int]
) -> None:
    oracle = TorchSession(small_model("lfm3"), threads=1)
    with closing(OnnxSession(folder("fp32") / "model.onnx", threads=1)) as session:
        rows, start = oracle.score(TOKENS), 0
        for length in cuts:
            got, torchs = (s.prefill(TOKENS[start : start + length]) for s in (session, oracle))
            start += length
            assert np.abs(got - rows[start - 1]).max() < 1e-4
            assert np.abs(torchs - rows[start - 1]).max() < 1e-4
    assert rows.std() > 0.1


def test_only_the_layers_that_see_everything_have_a_cache_that_grows(folder: Callable[[str], Path]) -> None:
    with closing(OnnxSession(folder("fp32") / "model.onnx", threads=1, context=200)) as session:
        states = {state.past: state for state in session._states}
        assert list(states) == ["past.layers.0.conv", "past.layers.1.key", "past.layers.1.value", "past.layers.2.key",
                                "past.layers.2.value", "past.layers.3.conv"]  # fmt: skip
        window, whole = states["past.layers.1.key"], states["past.layers.2.key"]
        assert not isinstance(window, AppendedState)
        assert window.buffers[0].shape == (1, 2, 15, 16)
        assert isinstance(whole, AppendedState)
        assert [whole.shape(tokens) for tokens in (0, 200)] == [(1, 2, 0, 16), (1, 2, 200, 16)]
        assert [buffer.size for buffer in whole.buffers] == [2 * 200 * 16] * 2
        session.prefill(TOKENS)
        assert all(any(buffer.any() for buffer in state.buffers) for state in session._states)
        session.reset()
        assert not any(buffer.any() for state in session._states for buffer in state.buffers)


@pytest.mark.parametrize(("quant", "per_weight"), [("fp32", 4.0), ("int8", 9 / 8), ("int4", 5 / 8), ("int4_k", 5 / 8)])
def test_the_tied_head_is_stored_once(
    folder: Callable[[str], Path], small_model: SmallModel, quant: str, per_weight: float
) -> None:
    config = json.loads((small_model("lfm3") / "config.json").read_text(encoding="utf-8"))
    head = config["vocab_size"] * config["hidden_size"]
    from safetensors import safe_open

    with safe_open(small_model("lfm3") / "model.safetensors", "np") as file:  # type: ignore[no-untyped-call]
        weights = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    extra = head / 2 if quant.startswith("int4") else 0
    kept = 4 * 40 * config["hidden_size"]  # norms and convolutions
    assert (folder(quant) / "model.onnx.data").stat().st_size < 1.1 * (per_weight * weights + extra + kept)


def test_every_linear_layer_has_an_input_under_its_own_name(folder: Callable[[str], Path]) -> None:
    names = {entry.name for entry in read_inputs(folder("int4"))}
    attention = {f"self_attn.{part}_proj" for part in "qkvog"}
    mlp = {f"feed_forward.{part}" for part in ("w1", "w2", "w3")}
    conv = {"conv.in_proj", "conv.out_proj"}
    assert names == {
        f"model.layers.{layer}.{name}"
        for layer in range(4) for name in mlp | (attention if layer in (1, 2) else conv)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"past": "past.layers.9.key"}, r"no input past.layers.9.key of the shape \[1, 2, None, 16\], as graph"),
        ({"shape": [1, 2, 16]}, r"of the shape \[1, 2, 16\], as graph.json says"),
        ({"shape": [1, None, None, 16]}, "which no session can hold"),
        ({"shape": [1, 2**30, None, 16]}, "has no input past.layers.2.key of the shape"),
        ({"shape": [1, 2, None, -4]}, "graph.json: is missing or damaged"),
        ({"past": 7}, "graph.json: is missing or damaged"),
    ],
)
def test_a_description_that_does_not_fit_its_graph_is_one_line(
    folder: Callable[[str], Path], tmp_path: Path, edit: dict[str, Any], message: str
) -> None:
    import shutil

    shutil.copytree(folder("fp32"), tmp_path / "g")
    file = tmp_path / "g" / GRAPH_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["decoder"]["states"][3].update(edit)
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises((ArtifactError, InputError), match=message):
        OnnxSession(tmp_path / "g/model.onnx")


# --- published, or not -----------------------------------------------------------------------------------------------


def test_two_users_pass_the_gate_in_32_bits(
    in_process: None, small_model: SmallModel, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    base = small_model("lfm3")
    users = {"ana": tiny_lora(seed=1, base=base, strength=0.3),
             "ben": tiny_lora(seed=2, base=base, strength=0.3, rslora=True)}  # fmt: skip
    bundle = export(base, tmp_path / "bundle", users, quant="fp32", verify=(*QUICK[1:], "prompt_lengths=1,2,3,24,127"))
    checks = {check.name: check for check in bundle.manifest.checks}
    assert max(checks[name].value for name in ("logits.base", "logits.ana", "logits.ben", "merged.ana")) < 1e-5
    assert checks["genai"].note.startswith("not asked: onnxruntime-genai has no pipeline")
    assert {"model.onnx", GRAPH_CONFIG} <= {entry.path for entry in bundle.manifest.files}
    assert "genai_config.json" not in {entry.path for entry in bundle.manifest.files}
    assert (bundle.meta["architecture"], bundle.meta["context"]) == ("lfm3", 256)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_quantised_graph_keeps_what_a_user_changed(
    in_process: None, small_model: SmallModel, tiny_lora: TinyLora, tmp_path: Path, quant: str
) -> None:
    base = small_model("lfm3")
    bundle = export(base, tmp_path / "bundle", {"ana": tiny_lora(seed=1, base=base, strength=0.3)}, quant=quant)
    checks = {check.name: check for check in bundle.manifest.checks}
    assert all(check.passed for check in checks.values())
    assert checks["weights.kept"].value == 0
    assert checks["same_weights.base"].value > 1 - 1e-6
    assert "not judged" not in checks["same_weights.ana"].note


@pytest.mark.parametrize("quant", ["fp32", "int4"])
@pytest.mark.parametrize("name", ["mistral", "smollm3"])
def test_others_that_have_no_table_go_the_same_way(
    in_process: None, small_model: SmallModel, tiny_lora: TinyLora, tmp_path: Path, name: str, quant: str
) -> None:
    base = small_model(name)
    user = tiny_lora(seed=1, base=base, strength=0.3, targets=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
    bundle = export(base, tmp_path / "bundle", {"ana": user}, quant=quant)
    checks = {check.name: check for check in bundle.manifest.checks}
    assert all(check.passed for check in checks.values())
    judged = "logits.ana" if quant == "fp32" else "same_weights.ana"
    assert checks[judged].value is not None


def let_the_window_see_one_token_more(monkeypatch: pytest.MonkeyPatch) -> str:
    import stateful_model

    original = stateful_model._mask
    monkeypatch.setattr(stateful_model, "_mask", lambda places, length, window: original(places, length, window and 17))
    return "logits.base"


def exchange_the_convolutions_states(monkeypatch: pytest.MonkeyPatch) -> str:
    import general_model

    original = general_model.describe

    def crossed(*arguments: Any) -> dict[str, Any]:
        described = original(*arguments)
        states = described["model"]["decoder"]["states"]
        states[0]["present"], states[-1]["present"] = states[-1]["present"], states[0]["present"]
        return described

    monkeypatch.setattr(general_model, "describe", crossed)
    return "feed.one_by_one"


def forget_the_adapters_scale(monkeypatch: pytest.MonkeyPatch) -> str:
    from edgealign.runtimes import onnx_adapter
    from edgealign.runtimes.lora_weights import LoraWeights, LowRank, read_lora

    def unscaled(adapter: Path) -> LoraWeights:
        lora = read_lora(adapter)
        return LoraWeights({name: LowRank(p.a, p.b / 2) for name, p in lora.modules.items()}, lora.base_digest)

    monkeypatch.setattr(onnx_adapter, "read_lora", unscaled)
    return "logits.ana"


def swap_two_matrices(monkeypatch: pytest.MonkeyPatch) -> str:
    import general_model

    original = general_model.name_layers

    def swapped(graph: Any, **options: Any) -> None:
        original(graph, **options)
        nodes = {node.name: node for node in graph}
        one, two = (nodes[f"/model/layers.1/feed_forward/{name}/MatMul"] for name in ("w1", "w3"))
        first, second = one.inputs[1], two.inputs[1]
        one.replace_input_with(1, second)
        two.replace_input_with(1, first)

    monkeypatch.setattr(general_model, "name_layers", swapped)
    return "logits.base"


@pytest.mark.parametrize("break_it", [
    let_the_window_see_one_token_more, exchange_the_convolutions_states, forget_the_adapters_scale, swap_two_matrices,
])  # fmt: skip
def test_a_deliberately_broken_graph_is_not_published(
    in_process: None, break_it: Callable[[pytest.MonkeyPatch], str], small_model: SmallModel, tiny_lora: TinyLora,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = small_model("lfm3")
    user = tiny_lora(seed=1, base=base, strength=0.3)
    expected = break_it(monkeypatch)
    with pytest.raises(CheckFailed, match=r"does not behave like the torch model .* nothing was published") as caught:
        export(base, tmp_path / "bundle", {"ana": user}, quant="fp32")
    assert expected in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_swapped_matrices_that_4_bits_would_hide_fail_too(
    in_process: None, small_model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_two_matrices(monkeypatch)
    with pytest.raises(CheckFailed, match=r"weights\.rounded"):
        export(small_model("lfm3"), tmp_path / "bundle", quant="int4", exact_gate=False)


# --- refused in one line ---------------------------------------------------------------------------------------------


def test_gguf_says_what_is_missing_and_where_to_look(
    small_model: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    from to_gguf import main

    assert main(["--model", str(small_model("lfm3")), "--out", str(tmp_path / "bundle")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: lfm3: llama.cpp (llama-cpp-python 0.3.36) has no graph for it: it lacks short convolutions beside "
        "sliding-window attention, a gate for each head and norms after each block; look for lfm3 in llama.cpp's "
        "src/llama-arch.cpp and src/models/; until then: --target onnx"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_library_that_is_installed_really_lacks_it() -> None:
    """When llama.cpp learns LFM3, this fails, and `NOT_IN_LLAMA_CPP` loses its row."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from edgealign.runtimes.gguf_names import NOT_IN_LLAMA_CPP

    library = next(file for file in (Path(llama_cpp.__file__).parent / "lib").glob("libllama.*"))
    names = library.read_bytes()
    assert b"\0lfm2moe\0" in names
    assert all(f"\0{name}\0".encode() not in names for name in NOT_IN_LLAMA_CPP)


def test_a_model_that_remembers_something_else_is_refused(onnx_tools: None, tmp_path: Path) -> None:
    from stateful_model import StatefulModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=["linear_attention", "full_attention"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"qwen3_next: keeps a LinearAttentionLayer between tokens, neither"):
        StatefulModel(AutoModelForCausalLM.from_config(config).eval())


def test_layers_that_are_no_matrix_products_are_refused(
    in_process: None, small_model: SmallModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="has no linear layers that the graph's operators show"):
        export(small_model("gpt2"), tmp_path / "bundle", quant="fp32")
    assert list(tmp_path.iterdir()) == []


def test_rotary_angles_that_depend_on_the_length_are_refused(small_model: SmallModel) -> None:
    from stateful_model import StatefulModel

    from edgealign.models.load import load_model

    network = load_model(small_model("lfm3"))
    network.config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    with pytest.raises(InputError, match="lfm3: turns its heads by dynamic rotary angles"):
        StatefulModel(network)


def test_what_torch_cannot_write_is_one_line(
    onnx_tools: None, small_model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import general_model

    def refuse(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(general_model, "lower", refuse)
    message = r"cannot be written as an ONNX graph by torch \(RuntimeError: no such operator\)"
    with pytest.raises(InputError, match=message):
        export(small_model("lfm3"), tmp_path / "bundle", quant="fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_from_random_weights_to_a_bundle_with_two_users(onnx_tools: None, tmp_path: Path) -> None:
    """init, sft, dpo, two people's choices, int4 in the program's own process: the path of a user."""
    from edgealign import targets
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe
    from edgealign.personalize import lora
    from edgealign.personalize.recipes import LoraRecipe
    from edgealign.train import preference, sft
    from edgealign.train.recipes import PreferenceRecipe, SftRecipe

    def rows(name: str, entries: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in entries), encoding="utf-8")
        return str(tmp_path / name)

    def choice(n: int, user: str) -> dict[str, Any]:
        answers = (f"It is {n}.", f"Well, let me think about it: I would say that it may well be {n}.")
        chosen, rejected = answers if user == "ana" else answers[::-1]
        return {"prompt": f"Say {n}.", "chosen": chosen, "rejected": rejected, "user_id": user}

    small = {"threads": 1, "batch_size": 8, "tokens_per_pass": 256, "valid_fraction": 0.15}
    create.run(InitRecipe(shape="tiny-lfm3", vocab_size=512, context=512, norm_noise=0.1), text=[], out=tmp_path / "m")
    turns = rows("turns.jsonl", [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(24)])
    pairs = rows("pairs.jsonl", [choice(i, "ana") for i in range(24)])
    taught = sft.run(
        SftRecipe(**small, epochs=4, learning_rate=5e-3), model=tmp_path / "m", data=[turns], out=tmp_path / "sft"
    )
    assert taught.meta["after"]["loss"] < 0.7 * taught.meta["before"]["loss"]
    aligned = preference.run(
        PreferenceRecipe(**small, epochs=1), model=taught.path, data=[pairs], out=tmp_path / "dpo"
    )
    users = {}
    recipe = LoraRecipe(learning_rate=1e-2, epochs=4, anchor_tokens=6, threads=1)
    for user in ("ana", "ben"):
        choices = rows(f"{user}.jsonl", [choice(i, user) for i in range(12)])
        users[user] = tmp_path / user
        made = lora.run(recipe, model=aligned.path, choices=choices, user=user, out=users[user])
        assert made.meta["coverage"] == 1.0
    bundle = targets.run(
        ExportRecipe(quant="int4", verify=QUICK), target="onnx", model=aligned.path, out=tmp_path / "bundle",
        adapters=users,
    )
    checks = {check.name: check for check in bundle.manifest.checks}
    assert all(check.passed for check in checks.values())
    assert {"float32 logits.ben", "survival.ana", "survival.ben", "state.swap", "same_weights.ben"} <= set(checks)
    assert bundle.meta["adapters"]["ana"]["digest"] == open_artifact(users["ana"]).digest
