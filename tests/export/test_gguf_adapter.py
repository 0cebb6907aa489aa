"""User adapters as GGUF: the scale folded in once, the rows in the runtime's order, nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import ArtifactError, InputError
from edgealign.runtimes.gguf_adapter import read_lora_gguf, write_lora_gguf
from edgealign.runtimes.gguf_header import check_gguf
from edgealign.runtimes.gguf_names import permute
from edgealign.runtimes.lora_weights import read_lora, require_base

TinyLora = Callable[..., Path]
SmallModel = Callable[[str], Path]


def config_of(model: Path) -> dict[str, object]:
    return dict(json.loads((model / "config.json").read_text(encoding="utf-8")))


def peft_deltas(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What PEFT itself adds to each weight: the judge of scale, rank and pattern."""
    from peft import PeftModel

    from edgealign.models.load import load_model

    before = {name: tensor.clone() for name, tensor in load_model(base).state_dict().items()}
    merged = PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload()
    deltas = {}
    for name, tensor in merged.state_dict().items():
        delta = (tensor - before[name]).numpy()
        if np.abs(delta).max() > 0:
            deltas[name.removesuffix(".weight")] = delta
    return deltas


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"rslora": True, "rank": 9, "alpha": 6.0},
    "patterns": {
        "rank_pattern": {"layers.0.conv.in_proj": 2, "w1": 6}, "alpha_pattern": {"w1": 3.0, r"conv\.out_proj": 32.0}
    },
    "rslora with patterns": {"rslora": True, "rank_pattern": {"w2": 9}, "alpha_pattern": {"w3": 1.0}},
    "one layer": {"targets": ["self_attn.q_proj"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_scaling_rule_gives_what_peft_adds(
    tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path, variant: str
) -> None:
    adapter = tiny_lora(seed=3, **VARIANTS[variant])
    write_lora_gguf(adapter, tmp_path / "a.gguf", base_config=config_of(tiny_model))
    from edgealign.runtimes.gguf_names import adapter_row, architecture

    written = read_lora_gguf(tmp_path / "a.gguf").modules
    deltas = peft_deltas(tiny_model, adapter)
    assert len(written) == len(deltas)
    for module, delta in deltas.items():
        row = adapter_row(architecture("lfm2"), module)
        assert row is not None
        pair = written[row.gguf]
        np.testing.assert_allclose(pair.b @ pair.a, delta, atol=2e-6)


def test_llama_adapters_have_their_rows_in_rotary_order(
    small_model: SmallModel, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    base = small_model("llama")
    adapter = tiny_lora(seed=1, base=base)
    write_lora_gguf(adapter, tmp_path / "a.gguf", base_config=config_of(base))
    written = read_lora_gguf(tmp_path / "a.gguf").modules
    deltas = peft_deltas(base, adapter)
    for part, heads in (("q", 4), ("k", 2), ("v", 0)):
        delta = deltas[f"model.layers.1.self_attn.{part}_proj"]
        pair = written[f"blk.1.attn_{part}.weight"]
        expected = permute(delta, heads) if heads else delta
        np.testing.assert_allclose(pair.b @ pair.a, expected, atol=2e-6)
        if heads:
            assert np.abs(pair.b @ pair.a - delta).max() > 1e-3, "the order must matter in this test"


def test_alpha_is_zero_so_that_nothing_scales_twice(tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path) -> None:
    info = write_lora_gguf(tiny_lora(), tmp_path / "a.gguf", base_config=config_of(tiny_model))
    assert info.metadata["adapter.lora.alpha"] == 0.0
    assert info.metadata["general.type"] == "adapter"
    assert info.arch == "lfm2"


def test_half_precision_halves_the_file_and_stays_near(tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path) -> None:
    adapter = tiny_lora()
    for dtype in ("f32", "f16"):
        write_lora_gguf(adapter, tmp_path / dtype, base_config=config_of(tiny_model), dtype=dtype)
    assert (tmp_path / "f16").stat().st_size < 0.65 * (tmp_path / "f32").stat().st_size
    whole, half = read_lora_gguf(tmp_path / "f32").modules, read_lora_gguf(tmp_path / "f16").modules
    for name, pair in whole.items():
        np.testing.assert_allclose(half[name].b @ half[name].a, pair.b @ pair.a, atol=2e-3)


def test_a_16_bit_adapter_is_read_without_torch(tiny_lora: TinyLora) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tiny_lora(seed=8)
    (adapter / "manifest.json").unlink()
    whole = read_lora(adapter)
    for dtype in ("bfloat16", "float16"):
        import torch

        file = adapter / "adapter_model.safetensors"
        save_file({name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}, file)
        for module, pair in read_lora(adapter).modules.items():
            np.testing.assert_allclose(pair.a, whole.modules[module].a, atol=2e-3)


def test_the_file_names_its_base_and_the_wrong_base_is_refused_with_both_digests(
    tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path
) -> None:
    from edgealign.artifact import open_artifact

    model = open_artifact(tiny_model)
    adapter = tiny_lora(seed=4)
    write_lora_gguf(adapter, tmp_path / "a.gguf", base_config=config_of(tiny_model))
    assert read_lora_gguf(tmp_path / "a.gguf").base_digest == model.digest == require_base(adapter, model)
    stranger = tiny_lora(seed=5, base_digest="ab" * 32)
    with pytest.raises(ArtifactError, match=rf"fitted on the model abababababab, this one is {model.digest[:12]}"):
        require_base(stranger, model)


def test_an_adapter_without_a_manifest_does_not_say_its_base(tiny_model: Path, tiny_lora: TinyLora) -> None:
    from edgealign.artifact import open_artifact

    adapter = tiny_lora(seed=6)
    (adapter / "manifest.json").unlink()
    assert read_lora(adapter).base_digest is None
    with pytest.raises(ArtifactError, match="does not say which model it was fitted on"):
        require_base(adapter, open_artifact(tiny_model))


def test_writing_an_adapter_needs_no_torch(tiny_model: Path, tiny_lora: TinyLora, tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path; from edgealign.runtimes.gguf_adapter import write_lora_gguf\n"
        "write_lora_gguf(Path(sys.argv[1]), Path(sys.argv[2]), base_config=json.loads(Path(sys.argv[3]).read_text()))\n"
        "assert not {'torch', 'transformers', 'peft', 'llama_cpp'} & set(sys.modules), sorted(sys.modules)\n"
    )
    out = tmp_path / "a.gguf"
    subprocess.run([sys.executable, "-c", code, tiny_lora(), out, tiny_model / "config.json"], check=True)
    assert check_gguf(out).is_adapter


def test_reading_a_model_as_an_adapter_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(tmp_path / "m.gguf"), "lfm2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="is no LoRA adapter"):
        read_lora_gguf(tmp_path / "m.gguf")
