"""Several processes as one trainer (`torchrun`): every one takes its share of a step's passes, gradients are added.

A step's loss is already divided by the weight of the whole step, so the sum over all processes is the gradient that
one process would have found, whatever the number of processes. Alone, every function here does nothing.

    torchrun --nproc-per-node 4 -m edgealign pretrain --model M --data text.jsonl --out N
    accelerate launch --multi_gpu --num_processes 4 -m edgealign dpo --model M --data pairs.jsonl --out N
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; process 0 writes and publishes (`progress.is_first_process`)."""
    return int(os.environ.get("RANK", "0"))


def local_count() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """Where this process computes: its own GPU if there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def share(groups: Sequence[T]) -> Sequence[T]:
    """Every `count()`-th pass of a step, from this process's own."""
    return groups if count() == 1 else groups[rank() :: count()]


def idle(groups: Sequence[T]) -> int:
    """Passes that this process has fewer than the one with most; sharded weights need as many of all."""
    return -(-len(groups) // count()) - len(share(groups))


def add_gradients(model: nn.Module, *more: Tensor) -> None:
    """Sum gradients (a process without a pass counts as zero) and `more` over all processes, in place."""
    if count() == 1:
        return
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    tensors = [*(p.grad for p in learned if p.grad is not None), *more]
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def add(tensor: Tensor) -> None:
    """Sum `tensor` over all processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)


def add_counts(sums: Counter[str], tokens: int) -> tuple[Counter[str], int]:
    """Summed metrics and tokens of all processes."""
    if count() == 1:
        return sums, tokens
    gathered = gather((dict(sums), tokens))
    total: Counter[str] = Counter()
    for part, _ in gathered:
        total.update(part)
    return total, sum(n for _, n in gathered)


def gather(mine: T) -> list[T]:
    """Every process's object, in the order of their numbers."""
    if count() == 1:
        return [mine]
    begin()
    gathered: list[Any] = [None] * count()
    dist.all_gather_object(gathered, mine)
    return gathered


def begin() -> None:
    """Meet the other processes, if that has not happened yet (the trainer does so when it is made)."""
    if count() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def first_says(mine: bool) -> bool:
    """What process 0 says, for every process: clocks differ, and some things all do together or none."""
    if count() == 1:
        return mine
    begin()
    said = torch.tensor([int(mine)])
    dist.broadcast(said, 0)
    return bool(said)


def first_then_all(make: Callable[[], T]) -> T:
    """What `make` gives, called by process 0 and then by the others: so that it may make what they find."""
    found = make() if rank() == 0 else None
    if count() > 1:
        begin()
        dist.barrier()
    return make() if found is None else found


def wait() -> None:
    """Until every process is here."""
    if count() > 1 and dist.is_initialized():
        dist.barrier()
