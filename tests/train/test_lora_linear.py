"""A LoRA layer as one function: peft's numbers and gradients, and peft itself where there is more to do."""

from __future__ import annotations

import copy

import pytest
import torch

from edgealign.train import lora_linear
from edgealign.train.adapt import add_lora
from edgealign.train.layout import pack, pair
from edgealign.train.logprobs import token_logprobs
from edgealign.train.lora_linear import quick_lora
from edgealign.train.shortconv import kernel_width, tree_rows


@pytest.fixture
def adapted(make_model):
    def make(kind="lfm2", **options):
        model = add_lora(make_model(kind, **options), rank=3, alpha=6.0)
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        return model

    return make


def layers(model):
    return [m for m in model.modules() if type(m).__module__ == "peft.tuners.lora.layer" and hasattr(m, "lora_A")]


def learn(layer, x, quick, autocast):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if quick:
            with quick_lora(layer):
                out = layer(x)
        else:
            out = layer(x)
    out.float().pow(2).sum().backward()
    learned = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach().float(), "x": x.grad, **learned}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_what_peft_gives_and_learns_the_same(adapted, autocast, bias):
    model = adapted(bias=bias)
    for layer in layers(model)[:6]:
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        plain, quick = (learn(layer, x, each, autocast) for each in (False, True))
        assert plain.keys() == quick.keys()
        assert len([name for name in plain if "lora_" in name]) == 2
        for name, value in plain.items():
            scale = float(value.abs().max()) + 1e-6
            assert float((quick[name] - value).abs().max()) / scale < (0.03 if autocast else 1e-5), name
    assert not any("forward" in vars(layer) for layer in layers(model))


@pytest.mark.parametrize("kind", ["lfm2", "qwen3", "lfm3"])
def test_a_step_has_the_same_gradients_with_and_without(kind, adapted, tokens, monkeypatch):
    trees = [pair(tokens(4), tokens(3), tokens(5)), pair(tokens(2), tokens(6), tokens(1))]
    model = adapted(kind)
    found = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(lora_linear, "_only_adapter", lambda module: None)
        each = copy.deepcopy(model)
        with tree_rows(each):
            token_logprobs(each, pack(trees, kernel=kernel_width(each))).sum().backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-4, rtol=1e-4)


def test_what_is_not_one_plain_adapter_is_left_to_peft(adapted, make_model, tokens):
    model = adapted()
    layer = layers(model)[0]
    name = layer.active_adapters[0]
    assert lora_linear._only_adapter(layer) == name
    with model.disable_adapter():
        assert lora_linear._only_adapter(layer) is None
    layer.merge()
    assert lora_linear._only_adapter(layer) is None
    layer.unmerge()
    layer.base_layer.weight.requires_grad_(True)
    assert lora_linear._only_adapter(layer) is None
    dropping = layers(add_lora(make_model(), rank=3, alpha=6.0, dropout=0.5).train())[0]
    assert lora_linear._only_adapter(dropping) is None
    dropping.eval()
    assert lora_linear._only_adapter(dropping) == name


def test_a_disabled_adapter_is_the_base_inside_the_block(adapted, tokens):
    model = adapted()
    batch = pack([pair(tokens(4), tokens(3), tokens(5))], kernel=3)
    with torch.no_grad(), tree_rows(model):
        on = token_logprobs(model, batch)
        with model.disable_adapter():
            off = token_logprobs(model, batch)
    plain = model.unload()
    with torch.no_grad(), tree_rows(plain):
        base = token_logprobs(plain, batch)
    assert torch.equal(off, base)
    assert (on - off).abs().max() > 1e-2
