"""The parity gate bites: a sound export passes, and each way to break one fails the check that is there for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign import parity, parity_logits
from edgealign.artifact import Check, open_artifact
from edgealign.errors import InputError, UsageError
from edgealign.parity_metrics import correlation, decided, log_softmax, measure, strength
from edgealign.parity_recipes import VerifyRecipe
from edgealign.runtimes.session import Bundle, read_bundle

Bundles = Callable[[str], Path]
Edit = Callable[[str, Any], Any]
RECIPE = VerifyRecipe(threads=1, prompt_lengths=(1, 2, 3, 24, 60), steps=3, windows=6)


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_kl_and_correlation_are_zero_and_one_for_equal_logits_whatever_their_offset() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (5, 50)).astype(np.float32)
    found = measure([(rows, rows + 3)], admitted_noise=0.1)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.correlation == pytest.approx(1)
    assert found.entropy < np.log(50)
    assert found.positions == 5
    assert found.largest == pytest.approx(3)


def test_kl_is_the_sum_of_p_log_p_over_q() -> None:
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.5, 0.25, 0.25]])
    found = measure([(np.log(p).astype(np.float32), np.log(q).astype(np.float32))], admitted_noise=0.1)
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert np.exp(log_softmax(np.log(p).astype(np.float32))).sum() == pytest.approx(1)


def test_only_positions_with_a_clear_lead_are_judged_by_their_likeliest_token() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(0, 1, (200, 1000)).astype(np.float32)
    clear = flat.copy()
    clear[:100, 7] = 10.0
    assert decided(clear, 0.5).tolist() == [True] * 100 + [False] * 100
    noisy = clear + rng.normal(0, 0.5, clear.shape).astype(np.float32)
    found = measure([(clear, noisy)], admitted_noise=0.5)
    assert (found.decided, found.top1) == (100, 1.0)
    wrong = np.roll(clear, 1, axis=-1)
    assert measure([(clear, wrong)], admitted_noise=0.5).top1 == 0.0
    assert measure([(flat, wrong)], admitted_noise=0.5).top1 is None


def test_noise_that_the_recipe_admits_does_not_fail_the_top1_gate_and_five_times_of_it_does() -> None:
    rng = np.random.default_rng(1)
    recipe = VerifyRecipe()
    rows = rng.normal(0, 2, (500, 300)).astype(np.float32)
    rows[np.arange(500), rng.integers(0, 300, 500)] += rng.exponential(8, 500)
    noise = rows.std(axis=-1, keepdims=True) * rng.normal(0, 1, rows.shape) * recipe.noise_4bit
    for factor, passes in ((1, True), (5, False)):
        found = measure([(rows, rows + factor * noise)], admitted_noise=recipe.noise_4bit)
        assert found.decided > 100
        assert found.top1 is not None
        assert (found.top1 >= recipe.top1_4bit) is passes


def test_correlation_of_a_constant_is_zero_and_strength_is_a_ratio_of_norms() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (3, 10)).astype(np.float32)
    assert correlation(rows, np.zeros_like(rows)).tolist() == [0, 0, 0]
    assert strength(rows, 0.5 * rows) == pytest.approx(0.5)
    assert strength(np.zeros_like(rows), rows) == 0


def test_numbers_that_are_none_fail() -> None:
    check = parity_logits.largest("x", np.array([0.0, np.nan], dtype=np.float32), 1.0, "note")
    assert not check.passed
    assert check.value is None
    assert "not all numbers" in check.note


# --- sound exports ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def users(tiny_lora: Callable[..., Path]) -> dict[str, Path]:
    return {"ana": tiny_lora(seed=1), "ben": tiny_lora(seed=2)}


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.runtime
def test_a_32_bit_export_gives_torchs_numbers_in_every_way(
    tiny_bundle: Bundles, tiny_model: Path, users: Mapping[str, Path]
) -> None:
    checks = parity.verify(tiny_bundle("f32"), model=tiny_model, adapters=users, recipe=VerifyRecipe(threads=1))
    assert failed(checks) == set()
    by_name = {check.name: check for check in checks}
    assert set(by_name) == {
        "template.rendered", "template.embedded", "tokens.files", "tokens.ids", "tokens.typed", "tokens.end",
        "feed.one_by_one", "feed.split", "state.second_conversation", "logits.base", "logits.ana", "logits.ben",
        "effect.ana", "effect.ben", "state.swap", "state.base_after_users", "logits.default_mode", "merged.ana",
    }  # fmt: skip
    for name in ("logits.base", "logits.ana", "feed.split", "merged.ana"):
        assert by_name[name].value < 1e-5
    assert by_name["logits.base"].tolerance == 1e-4
    assert by_name["effect.ana"].value > 1e-2


@pytest.mark.runtime
@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0", "q4_k_m"])
def test_a_quantised_export_gives_torchs_distribution(
    quant: str, tiny_bundle: Bundles, tiny_model: Path, users: Mapping[str, Path]
) -> None:
    checks = parity.verify(tiny_bundle(quant), model=tiny_model, adapters=users, recipe=RECIPE)
    assert failed(checks) == set()
    names = {check.name for check in checks}
    assert {"quant.kl", "quant.correlation", "quant.top1", "survival.ana", "strength.ben", "state.swap"} <= names
    assert {"weights.kept", "weights.rounded", "same_weights.base", "same_weights.ben"} <= names


@pytest.mark.runtime
def test_an_export_without_users_is_verified_too(tiny_bundle: Bundles, tiny_model: Path) -> None:
    bundle = replace(read_bundle(tiny_bundle("f32")), adapters={})
    checks = parity.verify(bundle, model=tiny_model, adapters={}, recipe=RECIPE)
    assert failed(checks) == set()
    assert not any("effect" in check.name or "swap" in check.name for check in checks)


@pytest.mark.runtime
def test_the_verdict_is_published_as_a_report(
    tiny_bundle: Bundles, tiny_model: Path, users: Mapping[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    result = parity.run(RECIPE, bundle=tiny_bundle("f32"), model=tiny_model, adapters=users, out=out)
    report = open_artifact(out, kind="report")
    assert result == report
    assert {entry.role for entry in report.manifest.inputs} == {"bundle", "model"}
    assert all(check.passed for check in report.manifest.checks)
    assert "18 of 18 checks passed" in (out / "table.md").read_text()


# --- broken exports --------------------------------------------------------------------------------------------------


def rewrite(source: Path, target: Path, edit: Edit = lambda name, data: data, **metadata: Any) -> None:
    """Copy a GGUF file; `edit` may change a tensor, `metadata` (dots as two underscores) replaces values."""
    import gguf

    reader = gguf.GGUFReader(source)
    changed = {key.replace("__", "."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, changed.pop(name, field.contents()), field.types[0], inner)
    assert not changed, f"no such metadata: {changed}"
    for tensor in reader.tensors:
        data = np.array(edit(tensor.name, np.array(tensor.data)))
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def swap(one: str, two: str, source: Path) -> Edit:
    """Exchange two tensors of the same shape."""
    import gguf

    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(source).tensors}
    assert tensors[one].shape == tensors[two].shape
    return lambda name, data: tensors[two] if name == one else tensors[one] if name == two else data


def with_model(bundle: Path, tmp_path: Path, edit: Edit = lambda name, data: data, **metadata: Any) -> Bundle:
    """The facts of a bundle whose model file was edited."""
    facts = read_bundle(bundle)
    rewrite(facts.model_file, tmp_path / "model.gguf", edit, **metadata)
    return replace(facts, model_file=tmp_path / "model.gguf")


def with_adapter(bundle: Path, tmp_path: Path, user: str, edit: Edit) -> Bundle:
    facts = read_bundle(bundle)
    rewrite(facts.adapters[user], tmp_path / "adapter.gguf", edit)
    return replace(facts, adapters={**facts.adapters, user: tmp_path / "adapter.gguf"})


def chunks(*order: int) -> Edit:
    """The three parts of a short convolution's in_proj (B, C, x) in another order."""

    def edit(name: str, data: Any) -> Any:
        if name != "blk.0.shortconv.in_proj.weight":
            return data
        parts = np.split(data, 3)
        return np.concatenate([parts[place] for place in order])

    return edit


def reversed_taps(name: str, data: Any) -> Any:
    return data[:, ::-1].copy() if name == "blk.0.shortconv.conv.weight" else data


BROKEN_MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "swapped gate and up": lambda file: {"edit": swap("blk.1.ffn_gate.weight", "blk.1.ffn_up.weight", file)},
    "swapped norms": lambda file: {"edit": swap("blk.2.attn_norm.weight", "blk.3.ffn_norm.weight", file)},
    "swapped key and value": lambda file: {"edit": swap("blk.2.attn_k.weight", "blk.2.attn_v.weight", file)},
    "conv parts C, B, x": lambda file: {"edit": chunks(1, 0, 2)},
    "conv parts x, B, C": lambda file: {"edit": chunks(2, 0, 1)},
    "conv taps reversed": lambda file: {"edit": reversed_taps},
    "wrong rope base": lambda file: {"lfm2__rope__freq_base": 10_000.0},
    "wrong norm epsilon": lambda file: {"lfm2__attention__layer_norm_rms_epsilon": 1e-2},
}


@pytest.mark.runtime
@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_a_broken_model_file_fails_against_torch(
    name: str, tiny_bundle: Bundles, tiny_model: Path, tmp_path: Path
) -> None:
    source = tiny_bundle("f32")
    broken = replace(with_model(source, tmp_path, **BROKEN_MODELS[name](source / "model.gguf")), adapters={})
    checks = parity.verify(broken, model=tiny_model, adapters={}, recipe=RECIPE)
    assert "logits.base" in failed(checks)
    assert not any(check.startswith(("template", "tokens", "state")) for check in failed(checks))


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swapped gate and up", "weights.rounded"), ("swapped norms", "weights.kept"),
        ("conv parts C, B, x", "weights.rounded"), ("conv taps reversed", "weights.kept"),
        ("wrong rope base", "same_weights.base"), ("wrong norm epsilon", "same_weights.base"),
    ],
)  # fmt: skip
def test_what_4_bits_would_hide_fails_too(
    name: str, expected: str, tiny_bundle: Bundles, tiny_model: Path, tmp_path: Path
) -> None:
    source = tiny_bundle("q4_0")
    broken = replace(with_model(source, tmp_path, **BROKEN_MODELS[name](source / "model.gguf")), adapters={})
    checks = parity.verify(broken, model=tiny_model, adapters={}, recipe=RECIPE)
    assert expected in failed(checks)


def times(factor: float) -> Edit:
    return lambda name, data: (data * factor).astype(data.dtype) if name.endswith("lora_b") else data


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("quant", "factor", "expected"),
    [
        ("f32", 0.0, {"effect.ana", "logits.ana", "merged.ana"}),
        ("f32", 0.5, {"logits.ana", "merged.ana"}),
        ("q4_0", 0.0, {"effect.ana", "strength.ana", "survival.ana", "same_weights.ana"}),
        ("q4_0", 0.5, {"strength.ana", "same_weights.ana"}),
    ],
)
def test_an_adapter_that_does_nothing_or_lost_its_scale_fails(
    quant: str, factor: float, expected: set[str], tiny_bundle: Bundles, tiny_model: Path, users: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    broken = with_adapter(tiny_bundle(quant), tmp_path, "ana", times(factor))
    checks = parity.verify(broken, model=tiny_model, adapters=users, recipe=RECIPE)
    assert failed(checks) - {"survival.ana"} == expected - {"survival.ana"}


@pytest.mark.runtime
@pytest.mark.parametrize("quant", ["f32", "q4_0"])
def test_one_users_adapter_under_another_users_name_fails(
    quant: str, tiny_bundle: Bundles, tiny_model: Path, users: Mapping[str, Path]
) -> None:
    facts = read_bundle(tiny_bundle(quant))
    broken = replace(facts, adapters={"ana": facts.adapters["ana"], "ben": facts.adapters["ana"]})
    checks = parity.verify(broken, model=tiny_model, adapters=users, recipe=RECIPE)
    assert failed(checks) == ({"logits.ben"} if quant == "f32" else {"survival.ben", "same_weights.ben"})


@pytest.mark.runtime
def test_another_end_of_turn_template_or_vocabulary_fails_before_any_logit(
    tiny_bundle: Bundles, tiny_model: Path, tmp_path: Path
) -> None:
    source = tiny_bundle("f32")
    other = (source / "chat_template.jinja").read_text().replace("<|im_start|>", "<|im_start|> ")
    broken = replace(
        with_model(source, tmp_path, tokenizer__ggml__eos_token_id=2, tokenizer__chat_template=other), adapters={}
    )
    checks = parity.verify(broken, model=tiny_model, adapters={}, recipe=RECIPE)
    assert failed(checks) == {"template.embedded", "tokens.end"}

    folder = tmp_path / "folder"
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(other)
    facts = replace(read_bundle(folder, check_digests=False), adapters={})
    assert failed(parity.verify(facts, model=tiny_model, adapters={}, recipe=RECIPE)) == {"template.rendered"}


@pytest.mark.runtime
def test_another_way_to_split_text_fails(tiny_bundle: Bundles, tiny_model: Path, tmp_path: Path) -> None:
    import gguf

    source = tiny_bundle("f32")
    merges = gguf.GGUFReader(source / "model.gguf").fields["tokenizer.ggml.merges"].contents()
    broken = replace(with_model(source, tmp_path, tokenizer__ggml__merges=merges[::-1]), adapters={})
    checks = parity.verify(broken, model=tiny_model, adapters={}, recipe=RECIPE)
    assert failed(checks) == {"tokens.ids"}


@pytest.mark.runtime
def test_state_that_survives_a_swap_fails(
    tiny_bundle: Bundles, tiny_model: Path, users: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's session is replaced by one whose set_user keeps the tokens of the user before."""
    from edgealign.runtimes.llamacpp import LlamaSession

    class Leaking(LlamaSession):
        def set_user(self, adapter: Path | None) -> None:
            clear, self._lib = self._lib, _WithoutClearing(self._lib)
            filled = self._filled
            super().set_user(adapter)
            self._lib, self._filled = clear, filled

    monkeypatch.setattr(
        parity_logits.Subject, "open",
        lambda self, *, exact: Leaking(self.bundle.model_file, exact=exact, threads=1, context=1024, extra_bufts=True),
    )
    checks = parity.verify(tiny_bundle("f32"), model=tiny_model, adapters=users, recipe=RECIPE)
    assert {"state.swap", "state.base_after_users"} <= failed(checks)


class _WithoutClearing:
    def __init__(self, lib: Any) -> None:
        self.lib = lib

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lib, name)

    def llama_memory_clear(self, memory: object, data: bool) -> None:
        """Leave everything as it is."""


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.runtime
def test_users_must_be_on_both_sides(tiny_bundle: Bundles, tiny_model: Path, users: Mapping[str, Path]) -> None:
    with pytest.raises(UsageError, match="ben: is not on both sides"):
        parity.verify(tiny_bundle("f32"), model=tiny_model, adapters={"ana": users["ana"]}, recipe=RECIPE)


@pytest.mark.runtime
def test_another_model_than_the_bundles_is_refused(
    tiny_bundle: Bundles, tiny_model: Path, tmp_path: Path, users: Mapping[str, Path]
) -> None:
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    (other / "manifest.json").unlink()
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"was exported from the model [0-9a-f]{12}, .* is [0-9a-f]{12}"):
        parity.verify(tiny_bundle("f32"), model=other, adapters=users, recipe=RECIPE)


@pytest.mark.runtime
def test_an_unknown_quantisation_has_no_gates(tiny_bundle: Bundles, tiny_model: Path) -> None:
    facts = replace(read_bundle(tiny_bundle("f32")), quant="q1_magic", adapters={})
    with pytest.raises(InputError, match="quantised as q1_magic, which has no gates"):
        parity.verify(facts, model=tiny_model, adapters={}, recipe=RECIPE)
