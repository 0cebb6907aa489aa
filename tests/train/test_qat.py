"""Training on the 4-bit grid: what is published is what a Q4_0 file holds, bit for bit."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgealign.errors import RecipeError
from edgealign.train import sft
from edgealign.train.qat import OnGrid, keep_on_grid, put_on_grid, to_grid
from edgealign.train.recipes import SftRecipe
from edgealign.train.trainer import AlignTrainer


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"Say {i}", "completion": f"{i}, of course."} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 3.0])
def test_the_grid_is_what_llama_cpps_q4_0_holds_and_rounding_twice_changes_nothing(scale):
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)) * scale
    weight[3, :32] = 0.0
    grid = to_grid(weight)
    packed = gguf.quants.quantize(grid.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0), grid.numpy())
    assert torch.equal(to_grid(grid), grid)
    assert torch.equal(grid.bfloat16().float(), grid)
    assert torch.equal(grid[3, :32], torch.zeros(32))


def test_rounding_is_about_as_close_as_q4_0_itself():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    plain = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0))
    ours, theirs = ((rounded - weight).pow(2).mean().sqrt() for rounded in (to_grid(weight), plain))
    assert ours < 1.05 * theirs


def test_the_gradient_passes_through_the_rounding():
    layer = nn.Linear(32, 8, bias=False)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", OnGrid())
    x, upstream = torch.randn(4, 32), torch.randn(4, 8)
    (layer(x) * upstream).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, upstream.T @ x)


def test_the_head_and_the_embedding_stay_as_they_are(make_model):
    model = make_model("llama")
    embedding = model.get_input_embeddings().weight.detach().clone()
    n = put_on_grid(model)
    keep_on_grid(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    on_grid = [m for m in linear if torch.equal(to_grid(m.weight), m.weight)] if n else []
    assert n == len([m for m in linear if m.weight.shape[-1] % 32 == 0]) > 0
    assert len(on_grid) >= n
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_published_model_lies_on_the_grid_and_learned_also_after_a_break(tiny_model, chats, tmp_path, monkeypatch):
    recipe = SftRecipe(
        epochs=4, batch_size=4, learning_rate=3e-3, qat="q4_0", valid_fraction=0.2, save_every_steps=3, save_every_s=0
    )
    whole = sft.run(recipe, model=tiny_model, data=[chats], out=tmp_path / "whole")
    original = AlignTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignTrainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            sft.run(recipe, model=tiny_model, data=[chats], out=tmp_path / "broken")
    resumed = sft.run(recipe, model=tiny_model, data=[chats], out=tmp_path / "broken")
    assert resumed.manifest.meta["resumed_at_step"] == 6
    weights, again = (load_file(a.path / "model.safetensors") for a in (whole, resumed))
    assert set(weights) == set(load_file(tiny_model / "model.safetensors"))
    for name, value in weights.items():
        assert torch.equal(value, again[name])
        if value.ndim == 2 and "embed" not in name:
            assert torch.equal(to_grid(value), value), name
    meta = whole.manifest.meta
    assert meta["after"]["loss"] < meta["before"]["loss"] - 0.5


def test_a_lora_on_rounded_weights_is_refused(tiny_model, chats, tmp_path):
    with pytest.raises(RecipeError, match="rounds the weights that a LoRA leaves alone"):
        sft.run(SftRecipe(lora=True, qat="q4_0"), model=tiny_model, data=[chats], out=tmp_path / "out")
