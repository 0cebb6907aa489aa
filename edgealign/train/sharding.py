"""Weights shared out over the processes of a run (FSDP2): each holds its part of weights, gradients and moments.

    EDGEALIGN_SHARD=1 torchrun --nproc-per-node 2 -m edgealign dpo --model M --data pairs.jsonl --out N
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 -m edgealign dpo ...

A decoder layer's weights are gathered for its forward pass, freed, and gathered again for its backward pass; what
stands around the layers (embedding, last norm, head) is gathered once for both. Each of these is a collective, so every
process runs the same number of passes (`processes.idle` says how many are to be made up).

Only training is sharded: what comes before (the reference's scores, the first evaluation) and after runs on the whole
model, so that must fit into one process; its gradients, AdamW's moments and the activations need not fit beside it.
Checkpoints hold whole tensors, in the files of any other run: another number of processes can go on from them.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from edgealign.errors import UsageError
from edgealign.progress import is_first_process, say
from edgealign.train import processes
from edgealign.train.logprobs import GATHERED, path_logprobs
from edgealign.train.recipes import PretrainRecipe, TrainRecipe

SWITCH = "EDGEALIGN_SHARD"


def wanted(recipe: TrainRecipe) -> bool:
    """Whether this run shards its weights: asked for, and there is more than one process.

    Accelerate's own switch becomes ours: with it, transformers and accelerate would wrap the model in their way.

    Raises:
        UsageError: what cannot be sharded is asked for, or another way of sharding.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _is_on(f"ACCELERATE_USE_{name}"):
            raise UsageError(
                f"accelerate's {name}", "is not used here: weights are sharded by FSDP2",
                "start it with torchrun, or accelerate launch --use_fsdp --fsdp_version 2",
            )
    if _is_on("ACCELERATE_USE_FSDP"):
        del os.environ["ACCELERATE_USE_FSDP"]
        os.environ[SWITCH] = "1"
    if processes.count() == 1 or not _is_on(SWITCH):
        return False
    reasons = {
        "--optimizer muon": (recipe.optimizer == "muon", "orthogonalises whole matrices", "choose --optimizer adamw"),
        "--qat": (recipe.qat != "none", "rounds whole weights in the forward pass", f"unset {SWITCH}"),
        "--lora": (recipe.lora, "learns too little for sharding to save anything", f"unset {SWITCH}"),
        "--compile on": (
            isinstance(recipe, PretrainRecipe) and recipe.compile == "on", "does not see through the gathering",
            "choose --compile off",
        ),
    }
    for option, (given, reason, way_out) in reasons.items():
        if given:
            raise UsageError(f"{option} with sharded weights", reason, way_out)
    return True


@contextmanager
def sharded(model: nn.Module, shard: bool) -> Iterator[nn.Module]:
    """The model to train: `model` itself, or, with `shard`, its sharded double, whose weights it gets at the end.

    Within the block the parameters of `model` are empty: a process holds its part and no more.
    """
    if not shard:
        yield model
        return
    say(f"weights, gradients and moments are shared out over {processes.count()} processes")
    double = _double(model)
    for p in model.parameters():
        p.data = p.data.new_empty(0)
    yield double
    for mine, part in zip(model.parameters(), double.parameters(), strict=True):
        mine.data = _full(part.detach())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model on the CPU, for process 0; all processes call it, and others get nothing."""
    found: dict[str, Tensor] = _whole(model.state_dict())
    return found


def save_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """The optimizer's whole state, in the form that a run without sharding writes; all processes call it."""
    state = _whole(optimizer.state_dict())
    if is_first_process():
        torch.save(state, file)


def load_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Take this process's part of the state in `file`, whether a sharded run wrote it or not."""
    found = torch.load(file, map_location="cpu", weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in found["param_groups"] for number in group["params"]]
    for p, number in zip(parameters, numbers, strict=True):
        for name, value in found["state"].get(number, {}).items():
            if value.shape == p.shape:
                found["state"][number][name] = _part_of(value, p)
    optimizer.load_state_dict(found)


def _double(model: nn.Module) -> nn.Module:
    """A sharded copy; it shares no memory with `model` in the end."""
    processes.begin()
    own = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    core: Any = copy.deepcopy(model, own)
    mesh = init_device_mesh(processes.device().type, (processes.count(),))
    for layer in core.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(core, mesh=mesh)  # the rest; norms and head keep their classes, which `norms` and `logprobs` compare
    for module in core.modules():
        if isinstance(module, FSDPModule):  # a loss is divided by the weight of the whole step: gradients are summed
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    core.set_reduce_scatter_unused_params(True)  # an expert that no token of a pass has chosen
    setattr(core, GATHERED, functools.partial(path_logprobs, core))
    register_fsdp_forward_method(core, GATHERED)
    core.register_load_state_dict_pre_hook(_take_parts)
    core._is_distributed_loading_by_transformers = True  # the Trainer wraps it in nothing and leaves it where it is
    return core  # type: ignore[no-any-return]


def _take_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Whole tensors that are about to be loaded become this process's parts of them."""
    for name, p in module.named_parameters(prefix.rstrip("."), remove_duplicate=False):
        if name in state_dict and not isinstance(state_dict[name], DTensor):
            state_dict[name] = _part_of(state_dict[name], p)


def _part_of(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor that every process has; nothing is sent."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _whole(value: Any) -> Any:
    """`value` with its tensors whole and on the CPU; empty ones in all processes but the first."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if not isinstance(value, Tensor):
        return value
    full = _full(value.detach())
    return full.cpu() if is_first_process() else full.new_empty(0)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
