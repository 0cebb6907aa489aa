from __future__ import annotations

import pytest
import torch

from edgealign.train import scoring
from edgealign.train.layout import pair
from edgealign.train.precision import Precision
from edgealign.train.reference import cache_dir, cache_key, reference_scores
from edgealign.train.scoring import Passes

FLOAT32 = Precision("float32", "float32", False)


@pytest.fixture
def trees(tokens):
    return [pair(tokens(3), tokens(n), tokens(2)) for n in (4, 1, 6, 2)]


@pytest.fixture
def forwards(monkeypatch):
    """Counts forward passes."""
    calls = []
    original = scoring.token_logprobs
    monkeypatch.setattr(scoring, "token_logprobs", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def compute(model, trees, digest="d1", template="t1", tokens_per_pass=20):
    passes = Passes.of(model, FLOAT32, tokens_per_pass=tokens_per_pass)
    return reference_scores(model, trees, passes, model_digest=digest, template_hash=template)


def test_a_second_run_reads_the_cache_and_makes_no_forward_pass(lfm2, trees, forwards):
    first = compute(lfm2, trees)
    assert len(forwards) > 1
    forwards.clear()
    second = compute(lfm2, trees)
    assert forwards == []
    assert torch.equal(first.values, second.values)


def test_the_values_are_those_of_each_pair_alone_in_the_order_of_the_pairs(lfm2, trees, plain):
    reference = compute(lfm2, trees)
    for i, tree in enumerate(trees):
        with torch.no_grad():
            wanted = torch.cat([plain(lfm2, tree.segments[0].ids, s.ids) for s in tree.segments[1:]])
        assert (reference.take([i]) - wanted).abs().max() < 1e-5
    assert torch.equal(reference.take([2, 0]), torch.cat([reference.take([2]), reference.take([0])]))


@pytest.mark.parametrize("change", ["digest", "template", "tokens_per_pass", "data"])
def test_anything_that_could_change_a_value_makes_a_new_entry(change, lfm2, trees, forwards):
    compute(lfm2, trees)
    forwards.clear()
    if change == "data":
        compute(lfm2, [*trees[1:], trees[0]])
    else:
        compute(lfm2, trees, **{change: {"digest": "d2", "template": "t2", "tokens_per_pass": 21}[change]})
    assert forwards
    assert len(list(cache_dir().glob("*.safetensors"))) == 2


def test_the_same_tokens_cut_into_other_segments_have_another_key(lfm2):
    passes = Passes.of(lfm2, FLOAT32, tokens_per_pass=20)
    one, two = pair((1, 2), (3, 4), (5,)), pair((1, 2), (3,), (4, 5))
    assert cache_key([one], passes, "d", None) != cache_key([two], passes, "d", None)


def test_a_damaged_entry_is_computed_again(lfm2, trees, forwards, capsys):
    wanted = compute(lfm2, trees)
    (file,) = cache_dir().glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    forwards.clear()
    assert torch.equal(compute(lfm2, trees).values, wanted.values)
    assert forwards
    assert "is damaged: computing it again" in capsys.readouterr().err
    forwards.clear()
    compute(lfm2, trees)
    assert not forwards


def test_a_cache_that_cannot_be_written_costs_only_time(lfm2, trees, tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EDGEALIGN_CACHE", str(blocked))
    assert compute(lfm2, trees).values.numel() == sum(tree.n_learned for tree in trees)
    assert "cannot be written" in capsys.readouterr().err


def test_no_half_file_is_left_when_writing_fails(lfm2, trees, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgealign.train.reference.os.replace", fail)
    compute(lfm2, trees)
    assert list(cache_dir().iterdir()) == []


def test_scores_of_another_number_of_tokens_are_refused(trees):
    from edgealign.train.tasks import PerToken

    with pytest.raises(ValueError, match="3 values for 21 learned tokens"):
        PerToken.of(torch.zeros(3), trees)
