"""The log-probability function against transformers' own forward pass, and what must not leak where."""

from __future__ import annotations

import warnings

import pytest
import torch

from edgealign.errors import InputError
from edgealign.train import logprobs
from edgealign.train.adapt import add_lora
from edgealign.train.layout import document, pack, pair, stack
from edgealign.train.logprobs import check_layout, output_projection, sequence_logprobs, token_logprobs
from edgealign.train.precision import Precision
from edgealign.train.scoring import Passes
from edgealign.train.shortconv import follows_taps, kernel_width, short_convolutions, tree_rows

ARCHITECTURES = ("lfm2", "lfm2_moe", "lfm3", "llama", "qwen3", "gemma3")
TOLERANCE = 1e-5


def scored(model, trees, layout=pack, **options):
    with tree_rows(model):
        return token_logprobs(model, layout(trees, kernel=kernel_width(model)), **options)


@pytest.mark.parametrize("layout", [pack, stack])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trees_score_like_separate_sequences(architecture, layout, make_model, tokens, plain):
    """Prompts of 1, 2 and 3 tokens are shorter than the convolution's reach."""
    model = make_model(architecture)
    trees = [pair(tokens(n), tokens(5), tokens(2 * n)) for n in (1, 2, 3, 9)] + [document(tokens(7), (True,) * 7)]
    with torch.no_grad():
        got = scored(model, trees, layout)
        parts = [plain(model, t.segments[0].ids, s.ids) for t in trees[:-1] for s in t.segments[1:]]
        whole = trees[-1].segments[0].ids
        parts.append(plain(model, whole[:1], whole[1:]))
    assert (got - torch.cat(parts)).abs().max() < TOLERANCE


@pytest.mark.parametrize("options", [{"kernel": 2}, {"kernel": 4}, {"kernel": 5, "bias": True}])
def test_convolutions_of_other_widths_and_with_a_bias_agree(options, make_model, tokens, plain):
    model = make_model("lfm2", **options)
    trees = [pair(tokens(n), tokens(6), tokens(1)) for n in (1, 2, 4, 7)]
    with torch.no_grad():
        got = scored(model, trees)
        parts = [plain(model, t.segments[0].ids, s.ids) for t in trees for s in t.segments[1:]]
    assert (got - torch.cat(parts)).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "facts",
    [
        {"window": 1}, {"window": 30}, {"conv_bias": True}, {"use_sandwich_norm": False}, {"use_attention_gate": False},
        {"layers": ("conv", "full_attention")}, {"layers": ("sliding_attention", "conv")},
    ],
)
def test_lfm3_agrees_with_itself_whichever_of_its_parts_it_has(facts, make_model, tokens, plain):
    """Rows of 30 tokens: longer than the window and the convolution, and packed across both."""
    model = make_model("lfm3", **facts)
    trees = [pair(tokens(n), tokens(12), tokens(3)) for n in (1, 6, 7, 18)]
    with torch.no_grad():
        got = scored(model, trees)
        parts = [plain(model, t.segments[0].ids, s.ids) for t in trees for s in t.segments[1:]]
    assert (got - torch.cat(parts)).abs().max() < TOLERANCE


@pytest.mark.parametrize("architecture", ["lfm2", "lfm3", "gemma3"])
def test_eager_attention_gets_the_same_mask(architecture, make_model, tokens):
    model = make_model(architecture)
    trees = [pair(tokens(3), tokens(5), tokens(4)), document(tokens(4), (True,) * 4)]
    with torch.no_grad():
        wanted = scored(model, trees, stack)
        model.set_attn_implementation("eager")
        got = scored(model, trees, stack)
    assert (got - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("chunk", "kept"), [(1, 0), (3, 0), (3, 2**24), (1000, 2**24)])
def test_values_and_gradients_equal_the_plain_computation(
    architecture, chunk, kept, make_model, tokens, plain, monkeypatch
):
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", kept)  # 0: logits are made again in backward
    model = make_model(architecture)
    tree = pair(tokens(4), tokens(6), tokens(3))
    weights = torch.linspace(-1.0, 2.0, 9)  # an arbitrary upstream gradient, of both signs
    wanted = torch.cat([plain(model, tree.segments[0].ids, s.ids) for s in tree.segments[1:]])
    (wanted * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got = scored(model, [tree], chunk=chunk)
    (got * weights).sum().backward()
    assert (got - wanted).abs().max() < TOLERANCE
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max().clamp(min=1.0)
        assert (parameter.grad - gradients[name]).abs().max() / scale < TOLERANCE, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_has_the_gradients_of_the_plain_computation(checkpointing, make_model, tokens, plain):
    """The frozen vocabulary projection takes the shortcut that makes its gradient in the forward pass."""
    model = add_lora(make_model("lfm2"), rank=2, alpha=4.0, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    tree = pair(tokens(4), tokens(6), tokens(3))
    wanted = torch.cat([plain(model, tree.segments[0].ids, s.ids) for s in tree.segments[1:]])
    wanted.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) > 10
    model.zero_grad()
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with tree_rows(model):
        got = token_logprobs(model, pack([tree], kernel=kernel_width(model)), chunk=4)
        got.square().sum().backward()
    assert (got - wanted).abs().max() < TOLERANCE
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = gradients[name].abs().max().clamp(min=1.0)
            assert (parameter.grad - gradients[name]).abs().max() / scale < TOLERANCE, name


def test_never_more_logits_than_one_chunk_and_none_that_no_loss_reads(make_model, tokens, monkeypatch):
    model = make_model("lfm2", vocab=101)  # the width of no other layer
    widest = 0
    linear = torch.nn.functional.linear

    def spy(x, weight, bias=None):
        nonlocal widest
        out = linear(x, weight, bias)
        if out.shape[-1] == model.config.vocab_size:
            widest = max(widest, out.numel() // out.shape[-1])
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    scored(model, [pair(tokens(40), tokens(5), tokens(6))], chunk=4).sum().backward()
    assert widest == 4
    scored(model, [pair(tokens(40), tokens(5), tokens(6))])
    assert widest == 11


@pytest.mark.parametrize("architecture", ["lfm2", "lfm2_moe", "lfm3", "qwen3"])
def test_nothing_leaks_from_one_packed_document_into_another(architecture, make_model, tokens):
    model = make_model(architecture)
    first, second = tokens(9), tokens(8)
    changed = (*first[:-1], (first[-1] + 1) % 96)
    mask = (False, *(True,) * 8)
    with torch.no_grad():
        before = scored(model, [document(first, mask), document(second, mask[:8])])
        after = scored(model, [document(changed, mask), document(second, mask[:8])])
    assert not torch.equal(before[:8], after[:8])
    assert torch.equal(before[8:], after[8:])  # the last token of document 1 stands right before document 2


def test_without_the_layout_a_document_would_leak_through_attention_and_convolution(lfm2, tokens):
    """The control: the same tokens as one ordinary sequence do influence each other."""
    first, second = tokens(9), tokens(8)
    changed = (*first[:-1], (first[-1] + 1) % 96)
    with torch.no_grad():
        before, after = (lfm2(input_ids=torch.tensor([[*ids, *second]])).logits[0, 9:] for ids in (first, changed))
    assert (before - after).abs().max() > 0.1


def test_nothing_leaks_between_chosen_and_rejected(lfm2, tokens):
    prompt, chosen, rejected = tokens(2), tokens(6), tokens(6)
    other = tuple((token + 1) % 96 for token in chosen)
    with torch.no_grad():
        before = scored(lfm2, [pair(prompt, chosen, rejected)])
        after = scored(lfm2, [pair(prompt, other, rejected)])
    assert torch.equal(before[6:], after[6:])


@pytest.mark.parametrize("architecture", ["lfm2", "lfm2_moe", "lfm3", "llama"])
def test_a_padded_batch_of_two_is_two_batches_of_one(architecture, make_model, tokens):
    model = make_model(architecture)
    trees = [document(tokens(12), (True,) * 12), document(tokens(5), (True,) * 5)]
    with torch.no_grad():
        together = scored(model, trees, stack)
        apart = torch.cat([scored(model, [tree]) for tree in trees])
    assert (together - apart).abs().max() < TOLERANCE


def test_scores_become_a_table_with_a_mask(lfm2, tokens):
    with torch.no_grad(), tree_rows(lfm2):
        scores = sequence_logprobs(lfm2, pack([pair(tokens(3), tokens(4), tokens(2))], kernel=3))
    assert scores.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert scores.lengths.tolist() == [4.0, 2.0]
    assert scores.values[1, 2:].tolist() == [0.0, 0.0]
    assert (scores.values[scores.mask] < 0).all()


def test_bfloat16_autocast_stays_close_and_trains_all_weights(lfm2, tokens):
    trees = [pair(tokens(4), tokens(6), tokens(5))]
    exact = scored(lfm2, trees).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = scored(lfm2, trees)
    rough.sum().backward()
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.5
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in lfm2.parameters())


def test_the_convolutions_are_as_before_after_the_block(lfm2, tokens):
    module = short_convolutions(lfm2)[0]
    original = module.forward.__func__
    with tree_rows(lfm2):
        assert follows_taps(module)
        with tree_rows(lfm2):  # nested blocks do not stack up
            assert follows_taps(module)
        assert follows_taps(module)
    assert not follows_taps(module)
    assert module.forward.__func__ is original


def test_an_ordinary_forward_inside_the_block_is_unchanged(lfm2, tokens):
    ids = torch.tensor([tokens(9)])
    with torch.no_grad():
        wanted = lfm2(input_ids=ids).logits
        with tree_rows(lfm2):
            assert torch.equal(lfm2(input_ids=ids).logits, wanted)
            first = lfm2.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(lfm2.generate(ids, max_new_tokens=4, do_sample=False), first)


def test_scoring_outside_the_block_is_an_error(lfm2, tokens):
    with pytest.raises(RuntimeError, match="with tree_rows"):
        token_logprobs(lfm2, pack([document(tokens(4), (True,) * 4)], kernel=3))


def test_an_untried_architecture_is_checked_against_its_own_forward_pass(make_model, monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(logprobs, "VERIFIED", ("lfm2",))
    check_layout(model)
    original = logprobs.hidden_states
    monkeypatch.setattr(logprobs, "hidden_states", lambda *args: 1.2 * original(*args))
    with pytest.raises(InputError, match=r"llama: scores differ by .* nats from its own forward pass"):
        check_layout(model)


def test_a_lora_in_bfloat16_scores_the_same_without_the_casts_of_peft(make_model, tokens):
    model = add_lora(make_model("lfm2").bfloat16(), rank=2, alpha=4.0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    passes = Passes.of(model, Precision("bfloat16", "bfloat16", True), tokens_per_pass=64)
    trees = [pair(tokens(4), tokens(6), tokens(3))]
    with tree_rows(model):
        batch = passes.batch(trees, [0], "cpu")
        quick = passes.logprobs(model, batch)
        with passes.precision.context():
            slow = token_logprobs(model, batch)
    assert torch.equal(quick, slow)
    quick.sum().backward()


def test_a_model_with_recurrent_layers_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(InputError, match="carry state between tokens"), tree_rows(model):
        pass


def test_an_adapter_on_the_head_is_refused(lfm2):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(action="ignore"):  # peft has doubts of its own
        model = get_peft_model(lfm2, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(InputError, match="not a plain linear layer"):
        output_projection(model)
