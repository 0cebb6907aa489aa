"""An architecture that ExecuTorch has no definition of, through to a bundle: LFM3, with its users.

The compiler is asked twice in all, for `lfm3-short` in 32 bits and in 8da4w; every test works on those programs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.artifact import Artifact, open_artifact
from edgealign.errors import ArtifactError, CheckFailed, InputError, UsageError
from edgealign.export_recipes import QUANTS, ExportRecipe
from edgealign.runtimes.executorch_adapter import write_lora_executorch
from edgealign.runtimes.executorch_session import ExecutorchSession
from edgealign.runtimes.executorch_states import CarriedStates
from edgealign.runtimes.lora_inputs import INPUTS_FILE, read_inputs
from edgealign.runtimes.onnx_states import GRAPH_CONFIG
from edgealign.runtimes.torch_session import TorchSession

pytestmark = [pytest.mark.runtime, pytest.mark.slow]
TinyLora = Callable[..., Path]
SmallModel = Callable[[str], Path]
QUICK = ("prompt_lengths=1,2,9,60", "steps=3", "windows=2", "window_tokens=40", "threads=1")  # the window has 16 tokens
TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 400, 200)]
MODEL = "lfm3-short"


def export(model: Path, out: Path, adapters: Mapping[str, Path] | None = None, **fields: Any) -> Artifact:
    from to_executorch import export as run

    recipe = ExportRecipe(**{"verify": QUICK, **fields})
    return run(recipe, model=model, adapters=adapters or {}, out=out, calibration=None)


@pytest.fixture(scope="module")
def programs(
    executorch_tools: None, small_model: SmallModel, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """Quantisation -> folder with the program of the small LFM3."""
    from executorch_general import write_program

    model, made = small_model(MODEL), {}
    for quant in QUANTS["executorch"]:
        made[quant] = tmp_path_factory.mktemp("program") / quant
        made[quant].mkdir()
        write_program(model, made[quant] / "model.pte", quant=quant, digest=open_artifact(model).digest)
        shutil.copyfile(model / "tokenizer.json", made[quant] / "tokenizer.json")
    return made


@pytest.fixture
def lowered_once(programs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter finds its program made."""
    import executorch_general

    def copied(model: Path, file: Path, *, quant: str, digest: str, context: int | None) -> Any:
        assert digest == open_artifact(model).digest
        for name in (file.name, INPUTS_FILE, GRAPH_CONFIG):
            shutil.copyfile(programs[quant] / name, file.with_name(name))
        return executorch_general.Lowered(read_inputs(programs[quant]), 256)

    monkeypatch.setattr(executorch_general, "write_program", copied)


@pytest.fixture
def in_process(lowered_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate opens its sessions here and not in child processes, so that a test can break them."""
    from edgealign.parity_logits import Subject

    def opened(subject: Subject, *, exact: bool) -> ExecutorchSession:
        return ExecutorchSession(subject.bundle.model_file, threads=1, context=256, exact=exact)

    monkeypatch.setattr(Subject, "open", opened)


@pytest.fixture
def users(small_model: SmallModel, tiny_lora: TinyLora) -> dict[str, Path]:
    base = small_model(MODEL)
    return {"ana": tiny_lora(seed=1, base=base, strength=0.3),
            "ben": tiny_lora(seed=2, base=base, strength=0.3, rank=6, rslora=True)}  # fmt: skip


@pytest.fixture
def session(programs: Mapping[str, Path]) -> Iterator[ExecutorchSession]:
    with closing(ExecutorchSession(programs["fp32"] / "model.pte", threads=1)) as opened:
        yield opened


# --- the program and its states --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cuts", [[127], [1] * 40, [3, 4, 120], [7, 1, 119], [15, 1, 1, 110], [16, 17, 1, 1, 92], [200]]
)
def test_a_prompt_in_pieces_around_the_convolutions_width_and_the_window_is_torchs(
    session: ExecutorchSession, small_model: SmallModel, cuts: list[int]
) -> None:
    rows, start = TorchSession(small_model(MODEL), threads=1).score(TOKENS), 0
    for length in cuts:
        got = session.prefill(TOKENS[start : start + length])
        start += length
        assert np.abs(got - rows[start - 1]).max() < 1e-5
    assert rows.std() > 0.1


def test_only_the_layer_that_sees_everything_has_a_cache_that_grows(session: ExecutorchSession) -> None:
    states = session._states
    assert isinstance(states, CarriedStates)
    assert states.shapes == ((1, 64, 7), *[(1, 2, 15, 16)] * 2, *[(1, 2, None, 16)] * 2)
    session.prefill(TOKENS)
    assert [tuple(state.shape)[2] for state in states.values] == [7, 15, 15, 200, 200]
    assert all(state.any() for state in states.values)
    session.reset()
    assert [state.numel() for state in states.values] == [64 * 7, *[2 * 15 * 16] * 2, 0, 0]
    assert not any(state.any() for state in states.values)


def test_a_second_conversation_and_a_swap_leave_no_trace(
    session: ExecutorchSession, users: dict[str, Path], tmp_path: Path
) -> None:
    for name, adapter in users.items():
        write_lora_executorch(adapter, tmp_path / name, inputs=session._inputs)

    def say(user: str | None) -> Any:
        session.set_user(tmp_path / user if user else None)
        return np.stack([session.prefill(TOKENS[:40]), session.step(9), session.step(11)])

    base, ana, ben = say(None), say("ana"), say("ben")
    assert np.array_equal(say("ana"), ana)
    assert np.array_equal(say(None), base)
    session.reset()
    assert np.array_equal(session.prefill(TOKENS[:40]), base[0])
    assert min(np.abs(one - other).max() for one, other in ((base, ana), (base, ben), (ana, ben))) > 0.05


def test_every_linear_layer_has_an_input_under_its_own_name(session: ExecutorchSession) -> None:
    mlp = [f"feed_forward.{part}" for part in ("w1", "w2", "w3")]
    attention = [f"self_attn.{part}_proj" for part in "qkvog"]
    wanted = {0: ["conv.in_proj", "conv.out_proj", *mlp], 1: [*attention, *mlp], 2: [*attention, *mlp]}
    assert {entry.name for entry in session._inputs} == {
        f"model.layers.{layer}.{name}" for layer, names in wanted.items() for name in names
    }


def test_more_than_the_context_is_refused(session: ExecutorchSession) -> None:
    session.prefill([*TOKENS, *TOKENS[:56]])
    with pytest.raises(UsageError, match="257 tokens: do not fit the context of 256"):
        session.step(5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"shape": [1, 2, 16]}, "has 5 states, and not all of them as graph.json says"),
        ({"shape": [1, 64, None]}, "has 5 states, and not all of them as graph.json says"),
        ({"shape": [1, 1, None, 7]}, "has 5 states, and not all of them as graph.json says"),
        ({"shape": [1, 2**30, 7]}, "has 5 states, and not all of them as graph.json says"),
        ({"shape": [1, 64, -7]}, "graph.json: is missing or damaged; export it again: edgealign export --target exec"),
        ({"past": 7}, "graph.json: is missing or damaged"),
        (None, "has 5 states, and not all of them as graph.json says"),
        ("", "lacks the graph.json that names its states"),
    ],
)
def test_a_description_that_does_not_fit_its_program_is_one_line(
    programs: Mapping[str, Path], tmp_path: Path, edit: Any, message: str
) -> None:
    shutil.copytree(programs["fp32"], tmp_path / "p")
    file = tmp_path / "p" / GRAPH_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    states = config["model"]["decoder"]["states"]
    if edit:
        states[0].update(edit)
    else:
        states.pop()
    file.write_text(json.dumps(config), encoding="utf-8")
    if edit == "":
        file.unlink()
    with pytest.raises((ArtifactError, InputError), match=message):
        ExecutorchSession(tmp_path / "p/model.pte", threads=1)


# --- published, or not -----------------------------------------------------------------------------------------------


def test_two_users_pass_the_gate_in_32_bits(
    lowered_once: None, small_model: SmallModel, users: dict[str, Path], tmp_path: Path
) -> None:
    lengths = (*QUICK[1:], "prompt_lengths=1,2,3,24,127")
    bundle = export(small_model(MODEL), tmp_path / "bundle", users, quant="fp32", verify=lengths)
    checks = {check.name: check for check in bundle.manifest.checks}
    assert max(checks[name].value for name in ("logits.base", "logits.ana", "logits.ben", "merged.ana")) < 1e-5
    assert {"state.swap", "state.second_conversation", "feed.one_by_one"} <= set(checks)
    assert checks["runner"].note.startswith("not asked: TextLLMRunner gives a program tokens and a position")
    assert (bundle.meta["architecture"], bundle.meta["context"]) == ("lfm3", 256)
    assert {"model.pte", GRAPH_CONFIG, INPUTS_FILE} <= {entry.path for entry in bundle.manifest.files}


def test_a_quantised_program_keeps_what_its_users_changed(
    lowered_once: None, small_model: SmallModel, users: dict[str, Path], tmp_path: Path
) -> None:
    bundle = export(small_model(MODEL), tmp_path / "bundle", users, quant="8da4w")
    checks = {check.name: check for check in bundle.manifest.checks}
    assert all(check.passed for check in checks.values())
    assert checks["float32 logits.ben"].value < 1e-5
    assert checks["weights.kept"].value == 0
    assert 0.01 < checks["weights.rounded"].value < 0.15
    assert checks["same_weights.ana"].value > 0.99
    assert checks["survival.ana"].value > 0.9


@pytest.mark.parametrize("quant", ["fp32", "8da4w"])
def test_every_weight_is_read_back(programs: Mapping[str, Path], small_model: SmallModel, quant: str) -> None:
    from edgealign.models.load import load_model
    from edgealign.runtimes.executorch_weights import stored_weights

    own = {name: value.detach().numpy() for name, value in load_model(small_model(MODEL)).named_parameters()}
    loaders = {name: (lambda value=value: value) for name, value in own.items()}
    found = list(stored_weights(programs[quant] / "model.pte", None, loaders))
    assert {name for name, _, _ in found} == set(own)
    for name, kept, values in found:
        gap = np.linalg.norm(values - own[name]) / np.linalg.norm(own[name])
        assert kept == (quant == "fp32" or own[name].ndim != 2)
        assert gap == 0 if kept else gap < (0.01 if "embed" in name else 0.12)


def forget_the_adapters_scale(monkeypatch: pytest.MonkeyPatch) -> str:
    from edgealign.runtimes import executorch_adapter
    from edgealign.runtimes.lora_weights import LoraWeights, LowRank, read_lora

    def unscaled(adapter: Path) -> LoraWeights:
        lora = read_lora(adapter)
        return LoraWeights({name: LowRank(p.a, p.b / 2) for name, p in lora.modules.items()}, lora.base_digest)

    monkeypatch.setattr(executorch_adapter, "read_lora", unscaled)
    return "logits.ana"


def exchange_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> str:
    original = CarriedStates.advance

    def crossed(states: CarriedStates, tokens: Any, outputs: Any) -> None:
        original(states, tokens, outputs)
        states.values[1:3] = states.values[2:0:-1]

    monkeypatch.setattr(CarriedStates, "advance", crossed)
    return "feed.one_by_one"


def keep_the_convolutions_state(monkeypatch: pytest.MonkeyPatch) -> str:
    original = CarriedStates.clear

    def kept(states: CarriedStates) -> None:
        before = getattr(states, "values", None)
        original(states)
        if before is not None:
            states.values[0] = before[0]

    monkeypatch.setattr(CarriedStates, "clear", kept)
    return "state.second_conversation"


@pytest.mark.parametrize(
    "break_it", [forget_the_adapters_scale, exchange_keys_and_values, keep_the_convolutions_state]
)
def test_a_deliberately_broken_bundle_is_not_published(
    in_process: None, break_it: Callable[[pytest.MonkeyPatch], str], small_model: SmallModel, users: dict[str, Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = break_it(monkeypatch)
    with pytest.raises(CheckFailed, match=r"does not behave like the torch model .* nothing was published") as caught:
        export(small_model(MODEL), tmp_path / "bundle", {"ana": users["ana"]}, quant="fp32")
    assert expected in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- refused in one line ---------------------------------------------------------------------------------------------


def test_linear_layers_of_another_kind_are_refused(
    executorch_tools: None, small_model: SmallModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="has no linear layers of torch's own kind"):
        export(small_model("gpt2"), tmp_path / "bundle", quant="fp32")
    assert list(tmp_path.iterdir()) == []
