"""The optimizers by name: AdamW, and Muon for the matrices with AdamW for everything else.

Muon (Jordan 2024, torch.optim.Muon) orthogonalises the momentum of a weight matrix. Its step is scaled to the size
of an AdamW step (`match_rms_adamw`, Moonlight, arXiv 2502.16982), so that one learning rate serves both halves.
Embeddings, norms and convolution kernels stay with AdamW, as in the papers. torch orthogonalises in bfloat16; where a
machine only emulates that (any CPU without AVX512-BF16, AMX or Arm's bf16), 32 bits are used: `Muon32`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgealign.train.precision import native_bfloat16

NO_DECAY_DIMENSIONS = 2  # norms and biases are not decayed
RMS_OF_ADAMW = 0.2  # of an AdamW step; Moonlight's, as torch's match_rms_adamw


class Muon32(torch.optim.Muon):
    """`torch.optim.Muon` with `match_rms_adamw`, orthogonalising in 32 bits."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; a closure is not supported."""
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = orthogonalise(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * RMS_OF_ADAMW * max(p.shape) ** 0.5)


def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """(R, C) -> (R, C) with singular values near 1, by Newton and Schulz's iteration as torch has it."""
    a, b, c = coefficients
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that a scheduler and a checkpoint see as one."""

    def __init__(
        self, matrices: Sequence[Tensor], others: Sequence[dict[str, Any]], *, lr: float, weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        kind = torch.optim.Muon if native_bfloat16() else Muon32
        self.muon = kind(
            [{"params": list(matrices)}], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(list(others), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        super().__init__([{"params": [*matrices, *(p for group in others for p in group["params"])]}], {"lr": lr})
        self._join()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both; a closure is not supported."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._join()

    def _join(self) -> None:
        """The halves' own group dictionaries, so that a changed learning rate reaches them."""
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Muon over the trainable weight matrices of linear layers, AdamW over the rest."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if id(p) in linear - embedded and p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in learned if id(p) not in taken]
    others = [
        {"params": [p for p in rest if p.ndim >= NO_DECAY_DIMENSIONS], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < NO_DECAY_DIMENSIONS], "weight_decay": 0.0},
    ]
    filled = [group for group in others if group["params"]]
    if not matrices or not filled:  # a LoRA is matrices alone, and Muon's peer needs something to do
        return torch.optim.AdamW(learned, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return MuonWithAdamW(matrices, filled, lr=lr, weight_decay=weight_decay, betas=betas)
