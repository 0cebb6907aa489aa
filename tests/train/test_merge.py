"""Merging: closed forms, the key set, the base, the search. mergekit runs for real, on models of a few layers."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgealign.artifact import open_artifact, publish
from edgealign.errors import CheckFailed, InputError
from edgealign.train import merge
from edgealign.train.merge_recipe import METHODS, MergeRecipe
from edgealign.train.mergekit_merge import Merge, check_merge

MakeModel = Callable[..., Path]
WEIGHTS = "model.safetensors"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a merge went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def child(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A published model whose weights are those of `base` plus seeded noise, with the lineage that a stage writes."""

    def make(seed: int, *, base: Path | None = None, noise: float = 0.02, name: str = "model") -> Path:
        source = open_artifact(base or tiny_model)
        out = tmp_path_factory.mktemp("child") / name
        with publish(
            out, kind="model", format="huggingface", stage="sft", recipe={"seed": seed},
            inputs=[source.as_input("model")],
        ) as draft:
            for file in source.path.iterdir():
                if file.name != "manifest.json":
                    shutil.copyfile(file, draft.dir / file.name)
            generator = torch.Generator().manual_seed(seed)
            weights = load_file(draft.dir / WEIGHTS)
            shifted = {k: w + noise * torch.randn(w.shape, generator=generator) for k, w in weights.items()}
            from safetensors.torch import save_file

            save_file(shifted, draft.dir / WEIGHTS, metadata={"format": "pt"})
        return out

    return make


@pytest.fixture(scope="module")
def two(child: MakeModel) -> tuple[Path, Path]:
    return child(1), child(2)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: w for file in folder.glob("*.safetensors") for k, w in load_file(file).items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_loadable_model_with_its_parents_tensors(
    method: str, two: tuple[Path, Path], tiny_model: Path, tmp_path: Path, no_network: None
) -> None:
    from edgealign.models.load import load_model, load_tokenizer

    artifact = merge.run(MergeRecipe(method=method), models=two, base=tiny_model, out=tmp_path / "merged")
    merged = tensors(artifact.path)
    assert merged.keys() == tensors(two[0]).keys()
    assert any(not torch.equal(merged[k], w) for k, w in tensors(tiny_model).items()), "the merge changed nothing"
    assert load_model(artifact.path).config.model_type == "lfm2"
    assert load_tokenizer(artifact.path).chat_template == load_tokenizer(tiny_model).chat_template
    for name in ("tokenizer.json", "generation_config.json"):
        assert (artifact.path / name).read_bytes() == (tiny_model / name).read_bytes()
    assert artifact.manifest.template_hash == open_artifact(tiny_model).manifest.template_hash
    assert [check.name for check in artifact.manifest.checks] == ["same tensors"]
    assert {entry.role for entry in artifact.manifest.inputs} == {"base", "model 1", "model 2"}


def test_linear_is_the_weighted_mean(two: tuple[Path, Path], tmp_path: Path) -> None:
    artifact = merge.run(MergeRecipe(weights=(1.0, 3.0)), models=two, out=tmp_path / "merged")
    first, second, merged = tensors(two[0]), tensors(two[1]), tensors(artifact.path)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, 0.25 * first[name] + 0.75 * second[name], rtol=0, atol=1e-6)


def test_task_arithmetic_adds_the_scaled_differences(
    two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    recipe = MergeRecipe(method="task_arithmetic", weights=(0.5, 0.2), scale=0.8)
    artifact = merge.run(recipe, models=two, base=tiny_model, out=tmp_path / "merged")
    base, first, second, merged = (tensors(path) for path in (tiny_model, *two, artifact.path))
    for name, weight in merged.items():
        moved = 0.5 * (first[name] - base[name]) + 0.2 * (second[name] - base[name])
        torch.testing.assert_close(weight, base[name] + 0.8 * moved, rtol=0, atol=1e-6)


def test_ties_at_full_density_drops_only_the_minority_sign(
    two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    recipe = MergeRecipe(method="ties", density=1.0, weights=(1.0, 1.0))
    artifact = merge.run(recipe, models=two, base=tiny_model, out=tmp_path / "merged")
    base, first, second, merged = (tensors(path) for path in (tiny_model, *two, artifact.path))
    name = "model.layers.0.feed_forward.w1.weight"
    deltas = torch.stack((first[name] - base[name], second[name] - base[name]))
    elected = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = deltas.sign() == elected
    wanted = (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    torch.testing.assert_close(merged[name] - base[name], wanted, rtol=0, atol=1e-6)


def test_della_leaves_depthwise_kernels_whole_and_thins_the_rest(
    two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    recipe = MergeRecipe(method="della", density=0.5, epsilon=0.2, weights=(1.0, 1.0))
    artifact = merge.run(recipe, models=two, base=tiny_model, out=tmp_path / "merged")
    base, merged = tensors(tiny_model), tensors(artifact.path)
    kernels = [name for name in base if name.endswith("conv.conv.weight")]
    assert kernels
    assert all(bool((merged[name] != base[name]).all()) for name in kernels)
    dense = "model.layers.0.feed_forward.w1.weight"
    untouched = float((merged[dense] == base[dense]).float().mean())
    assert 0.15 < untouched < 0.35, "two task vectors at density 0.5 leave a quarter untouched"


def test_random_methods_repeat_for_one_seed_and_keep_the_callers_random_state(
    two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    state = torch.random.get_rng_state()
    digests = [
        merge.run(
            MergeRecipe(method="dare_ties", seed=seed), models=two, base=tiny_model, out=tmp_path / f"merged-{i}"
        ).digest
        for i, seed in enumerate((3, 3, 4))
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_path_with_signs_that_mergekit_parses_is_only_a_path(child: MakeModel, tmp_path: Path) -> None:
    models = [child(7, name="a+b"), child(8, name="c@d")]
    assert merge.run(MergeRecipe(), models=models, out=tmp_path / "merged").kind == "model"


def test_a_result_that_lost_a_tensor_is_not_published(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from edgealign.train import mergekit_merge

    complete = mergekit_merge.merge_weights

    def lossy(*args: object, **kwargs: object) -> None:
        complete(*args, **kwargs)  # type: ignore[arg-type]
        file = args[3] / WEIGHTS  # type: ignore[operator]
        kept = {k: w for k, w in load_file(file).items() if not k.endswith("conv.conv.weight")}
        save_file(kept, file, metadata={"format": "pt"})

    monkeypatch.setattr(mergekit_merge, "merge_weights", lossy)
    with pytest.raises(CheckFailed, match=r"other tensors than its parents: .*conv\.conv\.weight is missing"):
        merge.run(MergeRecipe(), models=two, out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_of_experts_is_merged_without_mergekit(tmp_path: Path) -> None:
    from transformers import Lfm2MoeConfig

    from edgealign.models.create import write_model
    from edgealign.models.tokenizer import train_tokenizer

    config = Lfm2MoeConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_dense_layers=1, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["conv", "full_attention"], max_position_embeddings=128,
    )
    tokenizer = train_tokenizer([], vocab_size=400, context=128, max_bytes=20_000)
    models = []
    for seed in (1, 2):
        models.append(tmp_path / f"expert-{seed}")
        models[-1].mkdir()
        write_model(models[-1], config, tokenizer, seed=seed, dtype="float32")
    artifact = merge.run(MergeRecipe(weights=(0.25, 0.75)), models=models, out=tmp_path / "merged")
    first, second, merged = tensors(models[0]), tensors(models[1]), tensors(artifact.path)
    assert merged.keys() == first.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, 0.25 * first[name] + 0.75 * second[name], rtol=0, atol=1e-6)


def test_lfm3_keeps_its_head_gates_which_mergekit_would_leave_out(tmp_path: Path) -> None:
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    models = [tmp_path / str(seed) for seed in (1, 2)]
    for seed, model in enumerate(models):
        create.run(InitRecipe(shape="tiny-lfm3", seed=seed, vocab_size=400, dtype="float32"), text=[], out=model)
        (model / "manifest.json").unlink()  # as if they came from elsewhere: these two have no common base
    artifact = merge.run(MergeRecipe(weights=(0.25, 0.75)), models=models, out=tmp_path / "merged")
    first, second, merged = (tensors(folder) for folder in (*models, artifact.path))
    gate = "model.layers.1.self_attn.gate_proj.weight"
    assert merged.keys() == first.keys()
    torch.testing.assert_close(merged[gate], 0.25 * first[gate] + 0.75 * second[gate], rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="slerp of lfm3: mergekit does not know this architecture"):
        merge.run(MergeRecipe(method="slerp"), models=models, out=tmp_path / "slerp")


def test_a_lora_merged_into_its_base_computes_the_same_logits(
    tiny_model: Path, tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = merge.run(MergeRecipe(), models=[tiny_model], adapter=tiny_lora(seed=5), out=tmp_path / "merged")
    (check,) = artifact.manifest.checks
    assert check.name == "merged equals attached"
    assert check.passed
    assert check.value is not None
    assert check.value <= 1e-4
    assert artifact.meta["adapter_moves_logits_by"] > 100 * check.value
    assert {entry.role for entry in artifact.manifest.inputs} == {"base", "adapter"}


def test_a_lora_without_effect_is_not_merged(
    tiny_model: Path, tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckFailed, match="changes no logit at all"):
        merge.run(MergeRecipe(), models=[tiny_model], adapter=tiny_lora(seed=6, strength=0.0), out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_search_publishes_the_best_candidate_and_leaves_nothing_else(
    child: MakeModel, tiny_model: Path, tmp_path: Path
) -> None:
    good, bad = child(11, noise=1e-4, name="good"), child(12, noise=0.3, name="bad")
    data = tmp_path / "held_out.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"word {i}"}, {"role": "assistant", "content": f"answer {i}"}]}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = MergeRecipe(search=True, search_methods=("linear", "ties"), search_weights=(0.5,), search_densities=(0.5,))
    out = tmp_path / "out" / "merged"
    artifact = merge.run(recipe, models=[good, bad], base=tiny_model, data=[str(data)], out=out)
    table = json.loads((artifact.path / "candidates.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in table["candidates"]]
    assert names == ["base", "model 1", "model 2", "linear w=0.5/0.5", "ties w=0.5/0.5 density=0.5 scale=1"]
    losses = {row["name"]: row["loss"] for row in table["candidates"]}
    assert table["best"] == min(losses, key=lambda name: losses[name])
    assert artifact.meta["candidates"] == table["candidates"]
    assert (artifact.path / "candidates.png").stat().st_size > 5_000
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged"]


def test_a_search_on_pairs_ranks_by_the_models_own_likelihood(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no, never, {i}"} for i in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = MergeRecipe(search=True, search_methods=("linear", "slerp"), search_weights=(0.5,), select="accuracy")
    artifact = merge.run(recipe, models=two, data=[str(data)], out=tmp_path / "merged")
    scored = artifact.meta["candidates"]
    assert [row["name"] for row in scored] == ["model 1", "model 2", "linear w=0.5/0.5", "slerp t=0.5"]
    assert all(0.0 <= row["accuracy"] <= 1.0 and row["rows"] == 5 for row in scored)
    best = max(row["accuracy"] for row in scored)
    assert next(row for row in scored if row["name"] == artifact.meta["best"])["accuracy"] == best


@pytest.mark.parametrize(("density", "epsilon", "fine"), [(0.5, 0.15, True), (0.1, 0.15, False), (0.9, 0.1, False)])
def test_della_refuses_probabilities_outside_zero_and_one(density: float, epsilon: float, fine: bool) -> None:
    one = Merge("della", (0.5, 0.5), density=density, epsilon=epsilon)
    if fine:
        check_merge(one, models=2, base=True)
    else:
        with pytest.raises(Exception, match=r"must lie inside \(0, 1\)"):
            check_merge(one, models=2, base=True)
