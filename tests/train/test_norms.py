"""Norms as one function: transformers' own numbers and gradients, the module as before afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

from edgealign.train import norms
from edgealign.train.layout import pack, pair
from edgealign.train.logprobs import token_logprobs
from edgealign.train.norms import RMS_NORMS, quick_norms, rms_norm
from edgealign.train.shortconv import kernel_width, tree_rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_written_gradient_is_the_functions(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True), torch.randn(5, dtype=dtype, requires_grad=True)
    found = torch.autograd.grad((rms_norm(x, weight, 1e-5) ** 3).sum(), (x, weight))
    plain = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    wanted = torch.autograd.grad((plain**3).sum(), (x, weight))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe", "lfm3", "llama", "qwen3"])
def test_every_norm_of_a_model_gives_what_it_gave(name, make_model):
    model = make_model(name)
    found = [module for module in model.modules() if type(module).__name__ in RMS_NORMS]
    assert len(found) == sum("norm" in each.lower() for each, m in model.named_modules() if not list(m.children()))
    for norm in found:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(7, norm.weight.shape[0]).to(dtype)
            plain = norm(x)
            with quick_norms(model):
                quick = norm(x)
            assert quick.dtype == plain.dtype
            assert torch.equal(quick, plain)
    assert not any("forward" in vars(norm) for norm in found)


@pytest.mark.parametrize("name", ["lfm2", "qwen3"])
def test_a_step_has_the_same_gradients_with_and_without(name, make_model, tokens, monkeypatch):
    trees = [pair(tokens(4), tokens(3), tokens(5)), pair(tokens(2), tokens(6), tokens(1))]
    found = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(norms, "RMS_NORMS", ())
        model = copy.deepcopy(make_model(name))
        with tree_rows(model):
            assert any("forward" in vars(m) for m in model.modules() if "RMSNorm" in type(m).__name__) == quick
            token_logprobs(model, pack(trees, kernel=kernel_width(model))).sum().backward()
        found.append({each: p.grad for each, p in model.named_parameters()})
    for each, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][each], atol=1e-4, rtol=1e-4)
