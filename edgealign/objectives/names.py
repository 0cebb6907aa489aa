"""Names that are no key and no alias: short names that several published methods have, and methods that are not here.

Both are refused with what to say instead; see `table.find`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Collision:
    """What a short name can mean: `keys` of the table, and `others`, which are no objective here."""

    keys: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


_ACCELERATED = "accelerated PO (2410.06293): a loop, edgealign run accelerated"
_UNCERTAIN = "uncertainty-enhanced PO (2409.11212): a filter, edgealign pairs filter --drop-unsure"
_SELF = "self-supervised PO (2409.17791): not here"
_SELF_PLAY = "self-play PO (2401.04056): not here"
_TREE = "preference trees (2410.12854): not here; of a ranked list use lipo_lambda"
_F_DIVERGENCE = "alpha-divergence DPO: not here, in TRL f_divergence_type"

AMBIGUOUS: Mapping[str, Collision] = MappingProxyType({
    "rpo": Collision(("rpo_regularized", "rpo_relative", "lcpo_latent", "iterative_reasoning_rpo")),
    "apo": Collision(("apo_anchored_zero", "apo_anchored_down"), (_ACCELERATED,)),
    "ipo": Collision(("ipo_mean", "ipo_sum")),
    "rdpo": Collision(("rdpo_robust", "rdpo_length")),
    "irpo": Collision(("irpo_ranking", "iterative_reasoning_rpo")),
    "exo": Collision(("exo_pair", "exo_lists")),
    "tpo": Collision(("tpo_triple",), (_TREE,)),
    "upo": Collision(("upo_unified",), (_UNCERTAIN,)),
    "pro": Collision(("pro_ranking",), ("Preference Orchestrator (2511.10656): not here",)),
    "spo": Collision((), (_SELF, _SELF_PLAY)),
    "drpo": Collision((), ("prompt optimisation (2411.08733): not here", "decoupled rewards (2510.04474): not here")),
    "lcpo": Collision(("lcpo_latent",), ("length-controlled PO: not here; for shorter answers use rdpo_length",)),
    "inpo": Collision(("inpo_nash",), ("DDIM inversion, of pictures: not here",)),
    "hypo": Collision(("hypo_online_kl",), ("hybrid PO without a pessimistic reference: not here",)),
    "bapo": Collision(("bapo_base_anchor",), ("boundary-aware and off-policy RL of that name: not here",)),
    "alpha_dpo": Collision(("alpha_dpo_margin",), (_F_DIVERGENCE,)),
})  # fmt: skip

_RL = "learns from rewards of answers drawn while training, which edgealign does not do: use TRL"
# Methods that people ask for by a name of their own: what to use in their place.
NOT_HERE: Mapping[str, str] = MappingProxyType({
    "orpo": "use simpo, which needs no reference either, or TRL's experimental ORPOTrainer",
    "cpo": "use simpo, which needs no reference either, or TRL's experimental CPOTrainer",
    "alphapo": "use simpo, or TRL's experimental CPOTrainer",
    "aot": "use TRL's DPOTrainer with loss_type aot",
    "aot_unpaired": "use TRL's DPOTrainer with loss_type aot_unpaired",
    "wpo": "use TRL's DPOTrainer with use_weighting",
    "mpo": "a sum of several losses: use iterative_reasoning_rpo, or TRL's DPOTrainer with loss_weights",
    "fdiv_alpha": _F_DIVERGENCE,
    "bco_pair": "TRL's bco_pair has no threshold: use bco, which has BCO's own",
    "sft": "no objective of pairs: edgealign sft",
    "rso": "a way of sampling: edgealign pairs sample --rso 8, then hinge",
    "clair": "a way of making pairs: edgealign pairs revise",
    "apo_accelerated": _ACCELERATED,
    "upo_uncertainty": _UNCERTAIN,
    "spo_self_sup": _SELF,
    "spo_minimax": _SELF_PLAY,
    "tpo_tree": _TREE,
    **dict.fromkeys(("grpo", "ppo", "rloo", "online_dpo", "xpo", "nash_md"), _RL),
})  # fmt: skip
