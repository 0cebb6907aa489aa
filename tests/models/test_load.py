"""Loading: a directory or a cached hub id, with every tensor accounted for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgealign.artifact import open_model
from edgealign.errors import InputError
from edgealign.models.load import check_safetensors, load_model, load_tokenizer, resolve_model


def cache(model: Path, root: Path, name: str) -> str:
    """Lay a model out as huggingface_hub caches it; returns the commit."""
    commit = "0" * 39 + "1"
    home = root / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit, encoding="utf-8")
    shutil.copytree(model, home / "snapshots" / commit)
    return commit


def test_a_model_loads_for_evaluation_with_torch_attention(tiny_model: Path) -> None:
    import torch

    model = load_model(tiny_model)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == torch.float32
    assert load_model(tiny_model, dtype="bfloat16").dtype == torch.bfloat16


def test_a_hub_id_loads_from_the_cache_without_a_network(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = cache(tiny_model, tmp_path, "someone/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("someone/tiny", f"someone/tiny@{commit}"):
        assert resolve_model(name) == tmp_path / "models--someone--tiny/snapshots" / commit
    assert load_tokenizer("someone/tiny").eos_token_id == 7
    assert load_model("someone/tiny").config.model_type == "lfm2"


def test_a_foreign_directory_gets_a_digest_on_the_way_in(tiny_model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_model, foreign)
    (foreign / "manifest.json").unlink()
    assert open_model(foreign).digest == open_model(tiny_model).digest


def test_a_name_that_is_neither_directory_nor_hub_id_says_how_to_make_one() -> None:
    with pytest.raises(InputError, match="no-such-model: no such model directory; make one with: edgealign init"):
        resolve_model("no-such-model")


def test_a_hub_id_out_of_reach_names_the_download_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="out of reach with no copy in the cache; connect once and run: hf download"):
        resolve_model("someone/absent")


def test_a_proven_header_lists_every_tensor(tiny_model: Path) -> None:
    header = check_safetensors(tiny_model / "model.safetensors")
    assert header["model.embed_tokens.weight"]["shape"] == [512, 128]
    assert "__metadata__" not in header


@pytest.mark.parametrize("shape", ["tiny-moe"])
def test_a_mixture_of_experts_loads_with_all_its_tensors(shape: str, tmp_path: Path) -> None:
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    create.run(InitRecipe(shape=shape, vocab_size=400, norm_noise=0.1), text=[], out=tmp_path / "moe")
    model = load_model(tmp_path / "moe")
    assert model.state_dict()["model.layers.2.feed_forward.expert_bias"].abs().sum() > 0
