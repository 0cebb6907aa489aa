"""Every loss that TRL has too, against TRL's own code: the branch is cut out of its installed source and run."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edgealign.objectives.entries import OBJECTIVES
from edgealign.objectives.loss import pair_loss
from edgealign.objectives.reduce import mean_tokens
from edgealign.objectives.scores import Scores, split_pairs
from edgealign.objectives.settings import read_settings
from edgealign.objectives.table import find

BRANCHES = {
    "dpo": "sigmoid", "ln_dpo": "sigmoid_norm", "hinge": "hinge", "ipo_mean": "ipo", "exo_pair": "exo_pair",
    "nca": "nca_pair", "rdpo_robust": "robust", "bco": "bco_pair", "sppo_hard": "sppo_hard",
    "apo_anchored_zero": "apo_zero", "apo_anchored_down": "apo_down", "discopop": "discopop",
}  # fmt: skip
ELSEWHERE = {"ld_dpo", "simpo", "tpo_triple", "kto", "rpo_regularized", "iterative_reasoning_rpo"}


def test_every_equivalent_is_tested():
    assert {key for key, entry in OBJECTIVES.items() if entry.trl_equivalent} == {*BRANCHES, *ELSEWHERE}


@pytest.mark.parametrize("key", BRANCHES)
def test_the_loss_is_the_one_in_trl(key, scores):
    objective = find(key)
    assert objective.trl_equivalent.startswith(BRANCHES[key])
    policy, reference = scores(seed=1), scores(seed=2)
    namespace = _sequences(policy, reference)
    settings = read_settings(objective, None)
    trainer = SimpleNamespace(
        beta=objective.beta, label_smoothing=settings.get("epsilon", 0.0),
        args=SimpleNamespace(discopop_tau=settings.get("tau")),
    )  # fmt: skip
    exec(_branch("trainer/dpo_trainer.py", BRANCHES[key]), {**namespace, "self": trainer}, namespace)
    mine = pair_loss(objective, policy, reference).loss
    assert (mine - namespace["per_sequence_loss"]).abs().max() < 1e-6


def test_ld_dpo_is_trls_ld_alpha(scores):
    policy, reference = scores(seed=1), scores(seed=2)
    block = re.search(
        r"^( +)if self\.ld_alpha is None:\n +logps = .*\n\1else:\n((?:\1 +.*\n)+)",
        _source("trainer/dpo_trainer.py"), re.MULTILINE,
    )  # fmt: skip
    assert block, "TRL computes ld_alpha otherwise now"

    def sums(each):
        mask = _stacked(Scores(each.mask.long(), each.mask))
        space = {"torch": torch, "self": SimpleNamespace(ld_alpha=0.5), "device": "cpu",
                 "per_token_logps": _stacked(each), "shift_completion_mask": mask}  # fmt: skip
        exec(textwrap.dedent(block[2]), space)
        return space["logps"]

    ratio = sums(policy) - sums(reference)
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratio[:3] - ratio[3:]))
    assert (pair_loss(find("ld_dpo"), policy, reference).loss - expected).abs().max() < 1e-6


def test_simpo_is_that_of_trls_cpo_trainer(scores):
    policy = scores(seed=1)
    means = mean_tokens(policy.values, policy.mask)
    objective = find("simpo")
    trainer = SimpleNamespace(beta=objective.beta, simpo_gamma=objective.settings["gamma"].default, label_smoothing=0.0)
    space = {"self": trainer, "F": torch.nn.functional, "logits": means[0::2] - means[1::2]}
    exec(_branch("experimental/cpo/cpo_trainer.py", "simpo", name="self.loss_type"), space)
    assert (pair_loss(objective, policy).loss - space["losses"]).abs().max() < 1e-6


def test_tpo_is_trls_tpo_l_and_the_gold_answers_likelihood(scores, columns):
    policy = scores(seed=1)
    means = mean_tokens(policy.values, policy.mask)
    objective = find("tpo_triple")
    trainer = SimpleNamespace(beta=objective.beta, tpo_l_gamma=objective.settings["gamma"].default, label_smoothing=0.0)
    space = {"self": trainer, "F": torch.nn.functional, "delta_score": means[0::2] - means[1::2]}
    exec(_branch("experimental/tpo/tpo_trainer.py", "tpo-l", name="self.loss_type"), space)
    gold = -mean_tokens(columns["gold"].values, columns["gold"].mask)
    mine = pair_loss(objective, policy, columns=columns).loss
    assert (mine - space["per_sequence_loss"] - gold).abs().max() < 1e-6


@pytest.mark.parametrize("names", [("unrelated", "unrelated_reference"), ("unrelated_reference", "unrelated")])
def test_kto_is_that_of_trls_kto_trainer(names, scores, columns):
    """Once with an estimate above 0, once with one below, which is taken as 0."""
    policy, reference = scores(seed=1), scores(seed=2)
    block = re.search(
        r"^        if self\.calculate_KL:\n +kl = (?:.*\n)*?        losses = torch\.cat\((?:.*\n)*?        \)\n",
        _source("trainer/kto_trainer.py"), re.MULTILINE,
    )  # fmt: skip
    assert block, "TRL computes its KTO loss otherwise now"
    sums = [(each.values * each.mask).sum(-1) for each in (policy, reference)]
    other = [(columns[name].values * columns[name].mask).sum(-1) for name in names]
    columns = dict(zip(("unrelated", "unrelated_reference"), (columns[name] for name in names), strict=True))
    weights = {"desirable": 1.3, "undesirable": 0.7}
    trainer = SimpleNamespace(
        beta=0.1, loss_type="kto", calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.7,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
    )  # fmt: skip
    space = {
        "self": trainer, "F": torch.nn.functional, "torch": torch, "KL_logps": other[0], "ref_KL_logps": other[1],
        "chosen_logps": sums[0][0::2], "rejected_logps": sums[0][1::2],
        "ref_chosen_logps": sums[1][0::2], "ref_rejected_logps": sums[1][1::2],
    }  # fmt: skip
    exec(textwrap.dedent(block[0]), space)
    expected = space["losses"][:3] + space["losses"][3:]
    mine = pair_loss(find("kto"), policy, reference, columns=columns, settings=weights).loss
    assert (float(space["kl"]) > 0) == (names[0] == "unrelated_reference")
    assert (mine - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("key", "weight"), [("rpo_regularized", 0.005), ("iterative_reasoning_rpo", 1.0)])
def test_dpo_with_likelihood_is_trls_sigmoid_and_sft_on_one_pair(key, weight, scores):
    """TRL's sft term is a mean over the batch's tokens: with one pair that is the answer's own mean."""
    policy, reference = scores((5, 3), seed=1), scores((5, 3), seed=2)
    objective, space = find(key), _sequences(policy, reference)
    space.update(shift_completion_mask=_stacked(Scores(policy.mask.double(), policy.mask)),
                 per_token_logps=_stacked(policy), self=SimpleNamespace(beta=objective.beta))  # fmt: skip
    exec(_branch("trainer/dpo_trainer.py", "sigmoid"), space)
    pair = space["per_sequence_loss"]
    exec(_branch("trainer/dpo_trainer.py", "sft"), space)
    tokens = 5 if key == "rpo_regularized" else 1  # summed there, per token here
    expected = pair + weight * tokens * space["per_sequence_loss"]
    assert (pair_loss(objective, policy, reference).loss - expected).abs().max() < 1e-6


def _sequences(policy: Scores, reference: Scores) -> dict[str, object]:
    """What TRL's branches read."""
    ratios = Scores(policy.values - reference.values, policy.mask)
    chosen, rejected = split_pairs(ratios)
    sums = {"chosen": chosen.values.sum(-1), "rejected": rejected.values.sum(-1)}
    return {
        "F": torch.nn.functional, "torch": torch, "device": "cpu",
        "chosen_scores": sums["chosen"], "rejected_scores": sums["rejected"],
        "chosen_logratios": sums["chosen"], "rejected_logratios": sums["rejected"],
        "delta_score": sums["chosen"] - sums["rejected"],
        "completion_mask": torch.cat([chosen.mask, rejected.mask]).long(),
    }  # fmt: skip


def _stacked(scores: Scores) -> torch.Tensor:
    """All chosen, then all rejected, as TRL's batches are."""
    return torch.cat([scores.values[0::2], scores.values[1::2]])


def _source(file: str) -> str:
    return (Path(importlib.util.find_spec("trl").origin).parent / file).read_text(encoding="utf-8")


def _branch(file: str, loss_type: str, *, name: str = "loss_type") -> str:
    """The lines of `if loss_type == "...":`, dedented; read, not imported, for speed."""
    pattern = rf'^( +)(?:el)?if {re.escape(name)} == "{loss_type}":\n((?:\1 +.*\n|\n)+)'
    found = re.findall(pattern, _source(file), re.MULTILINE)
    assert found, f"TRL has no branch for {loss_type} any more"
    return textwrap.dedent(found[-1][1])
