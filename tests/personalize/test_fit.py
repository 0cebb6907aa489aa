"""The fit's parts: low-rank layers against PEFT, the loss and its gradient against TRL, passes, anchor, reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgealign.errors import InputError
from edgealign.models.lint import lora_targets
from edgealign.models.load import load_model
from edgealign.objectives.scores import Scores
from edgealign.objectives.table import find
from edgealign.personalize.anchor import anchor_loss, base_answers
from edgealign.personalize.fit import fit, passes
from edgealign.personalize.lowrank import Factors, LowRankLinear, read_peft, scale_user, wrap, write_peft
from edgealign.personalize.recipes import LoraRecipe
from edgealign.train.layout import Tree, branches

TOKENS = torch.arange(10, 50)[None]


def random_ids(count: int, *, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    rng = random.Random(seed)
    return [tuple([rng.randrange(20, 500) for _ in range(rng.randrange(3, 9))] for _ in range(3)) for _ in range(count)]  # type: ignore[misc]


def random_trees(count: int) -> list[Tree]:
    return [branches(prompt, (chosen, rejected)) for prompt, chosen, rejected in random_ids(count)]


def adapted(tiny_model: Path, **more: Any) -> tuple[Any, dict[str, LowRankLinear]]:
    network: Any = load_model(tiny_model)
    return network, wrap(network, lora_targets(network).modules, rank=4, scale=2.0, seed=0, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=TOKENS).logits
    return out


def learn(network: Any, layers: dict[str, LowRankLinear], trees: list[Tree], **settings: Any) -> Any:
    recipe = LoraRecipe(**{"learning_rate": 1e-2, "epochs": 1, "anchor": 0.0, "chosen_nll": 0.0, **settings})
    parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
    return fit(network, parameters, trees, recipe, objective=find("ln_dpo"), beta=5.0)


def test_a_fresh_low_rank_layer_changes_no_bit(tiny_model: Path) -> None:
    plain = logits(load_model(tiny_model))
    assert torch.equal(logits(adapted(tiny_model)[0]), plain)


def test_what_is_written_is_what_peft_computes(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    network, layers = adapted(tiny_model)
    learn(network, layers, random_trees(4))
    scale_user(layers, 0.5)
    write_peft(tmp_path, layers, alpha=8, base_name="some-base")
    loaded = PeftModel.from_pretrained(load_model(tiny_model), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), logits(network), rtol=0, atol=1e-5)
    assert loaded.peft_config["default"].r == 4
    back = read_peft(tmp_path)
    for name, layer in layers.items():
        torch.testing.assert_close(back[name].b @ back[name].a, layer.user.b @ layer.user.a, rtol=0, atol=1e-6)


def test_population_and_user_together_are_one_plain_lora(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    name = "model.layers.0.feed_forward.w1"
    width = load_model(tiny_model).get_submodule(name)
    shared = {name: Factors(torch.randn(3, width.in_features), 0.02 * torch.randn(width.out_features, 3))}  # type: ignore[arg-type]
    network, layers = adapted(tiny_model, population=shared)
    start = logits(network)
    assert not torch.equal(start, logits(load_model(tiny_model)))
    learn(network, layers, random_trees(4))
    rank, _ = write_peft(tmp_path, layers, alpha=8, base_name="some-base")
    assert rank == 3 + 4
    loaded = PeftModel.from_pretrained(load_model(tiny_model), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), logits(network), rtol=0, atol=1e-5)
    assert float((logits(loaded) - start).abs().max()) > 1e-3


def test_a_rank_stabilised_population_keeps_its_scale(
    tiny_model: Path, tiny_lora: Callable[..., Path]
) -> None:
    from peft import PeftModel

    folder = tiny_lora(seed=4, rank=4, alpha=8.0, rslora=True)
    network, _ = adapted(tiny_model, population=read_peft(folder))
    loaded = PeftModel.from_pretrained(load_model(tiny_model), str(folder)).eval()
    torch.testing.assert_close(logits(network), logits(loaded), rtol=0, atol=1e-5)


def test_a_dora_population_is_refused_with_the_reason(tiny_lora: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"is no plain LoRA \(use_dora = True\)"):
        read_peft(tiny_lora(seed=5, use_dora=True))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # trl 1.16 uses transformers' old name
def test_loss_and_gradient_are_those_of_trl(tiny_model: Path, tmp_path: Path) -> None:
    """One batch at zero effect: the loss is log 2, and the LoRA gradients point the same way (fp32)."""
    import datasets
    import trl
    from peft import LoraConfig

    from edgealign.models.load import load_tokenizer
    from edgealign.objectives.loss import pair_loss
    from edgealign.train.layout import pack
    from edgealign.train.logprobs import sequence_logprobs
    from edgealign.train.shortconv import kernel_width, tree_rows

    pairs = random_ids(4)
    network, layers = adapted(tiny_model)
    with tree_rows(network):
        batch = pack([branches(p, (y, n)) for p, y, n in pairs], kernel=kernel_width(network))
        scores = sequence_logprobs(network, batch)
        ours = pair_loss(find("ln_dpo"), scores, scores.detach(), beta=5.0).loss.mean()
        ours.backward()  # type: ignore[no-untyped-call]

    other = load_model(tiny_model)
    config = trl.DPOConfig(
        output_dir=str(tmp_path), loss_type=["sigmoid_norm"], beta=5.0, use_cpu=True, bf16=False, report_to=[],
        per_device_train_batch_size=4, gradient_checkpointing=False, disable_tqdm=True, dataset_num_proc=None,
    )
    trainer = trl.DPOTrainer(
        model=other, args=config, processing_class=load_tokenizer(tiny_model),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=list(layers), task_type="CAUSAL_LM"),
    )
    theirs = {name.split("base_model.model.")[-1]: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, layer in layers.items():
            theirs[f"{name}.lora_A.default.weight"].copy_(layer.a)
    inputs = trainer.data_collator([{"prompt_ids": p, "chosen_ids": y, "rejected_ids": n} for p, y, n in pairs])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()

    assert float(ours.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    mine = torch.cat([layer.b.grad.flatten() for layer in layers.values() if layer.b.grad is not None])
    trls = torch.cat([theirs[f"{name}.lora_B.default.weight"].grad.flatten() for name in layers])
    assert float(torch.cosine_similarity(mine, trls, dim=0)) > 0.99
    torch.testing.assert_close(mine, trls, rtol=1e-3, atol=1e-5)


def test_every_choice_starts_at_the_reference_whenever_it_is_first_seen(tiny_model: Path) -> None:
    network, layers = adapted(tiny_model)
    steps = learn(network, layers, random_trees(7), learning_rate=1e-12, batch_pairs=2)
    assert len(steps) == 4
    assert [step.preference for step in steps] == pytest.approx([math.log(2)] * 4, abs=1e-5)
    assert [step.margin for step in steps] == pytest.approx([0.0] * 4, abs=1e-5)


def test_the_gradient_does_not_depend_on_how_the_passes_are_cut(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgealign.personalize import fit as module

    results = []
    for budget in (4096, 1):
        monkeypatch.setattr(module, "passes", lambda n_tokens, _, budget=budget: passes(n_tokens, budget))
        network, layers = adapted(tiny_model)
        learn(network, layers, random_trees(5))
        results.append(torch.cat([layer.user.b.flatten() for layer in layers.values()]))
    cosine = torch.cosine_similarity(results[0], results[1], dim=0)
    assert float(cosine) > 0.999


@pytest.mark.parametrize("lengths", [[280] * 8, [10, 500, 20, 30], [5000, 10], [7]])
def test_passes_hold_every_example_once_within_the_budget(lengths: list[int]) -> None:
    made = passes(lengths, 4096)
    assert sorted(i for one in made for i in one.examples) == list(range(len(lengths)))
    for one in made:
        assert one.examples == [i for row in one.rows for i in row]
        assert sum(lengths[i] for i in one.examples) <= 4096 or len(one.examples) == 1


def test_examples_of_one_length_get_a_row_each(tiny_model: Path) -> None:
    (one,) = passes([250] * 8, 2048)
    assert len(one.rows) == 8


def test_base_answers_in_one_padded_batch_are_those_given_alone(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    prompts = [[1, 40, 41], [1, 60, 61, 62, 63, 64, 65, 66], [1, 40, 41], [1, 99]]
    settings = {"n_tokens": 8, "end_id": 7, "pad_id": 0}
    together = base_answers(model, prompts, **settings)  # type: ignore[arg-type]
    alone = [base_answers(model, [prompt], **settings)[0] for prompt in prompts]  # type: ignore[arg-type]
    assert together == alone
    assert all(1 <= len(answer) <= 8 for answer in together)


def test_the_anchor_counts_only_what_became_less_likely() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    reference = Scores(torch.tensor([[-1.0, -1.0], [-2.0, 0.0]]), mask)
    policy = Scores(torch.tensor([[-2.0, -1.0], [-1.0, 0.0]]), mask)
    assert anchor_loss(policy, reference).tolist() == pytest.approx([0.5, 0.0])
    assert anchor_loss(reference, reference).tolist() == [0.0, 0.0]


def test_the_anchor_holds_the_bases_answers(tiny_model: Path) -> None:
    from edgealign.train.layout import pack
    from edgealign.train.logprobs import sequence_logprobs
    from edgealign.train.shortconv import kernel_width, tree_rows

    pairs = random_ids(6)
    base = load_model(tiny_model)
    said = base_answers(base, [prompt for prompt, _, _ in pairs], n_tokens=6, end_id=7, pad_id=0)
    spoken = [branches(p, (answer,)) for (p, _, _), answer in zip(pairs, said, strict=True)]
    batch = pack(spoken, kernel=kernel_width(base))

    def likelihood(model: Any) -> float:
        with torch.no_grad(), tree_rows(model):
            scores = sequence_logprobs(model, batch)
        return float(scores.values.sum() / scores.mask.sum())

    trees = [branches(p, (y, n, answer)) for (p, y, n), answer in zip(pairs, said, strict=True)]
    lost, learned = [], []
    for weight in (0.0, 3.0):
        network, layers = adapted(tiny_model)
        steps = learn(network, layers, trees, anchor=weight, epochs=8, learning_rate=2e-2)
        lost.append(likelihood(base) - likelihood(network))
        learned.append(steps[-1].margin)
    assert lost[0] > 0.02
    assert lost[1] < 0.5 * lost[0]
    assert learned[1] > 0.5 * learned[0]
