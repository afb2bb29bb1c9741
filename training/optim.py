"""Optimisers, learning-rate schedule and weight averaging for the training loops."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic iteration of Jordan et al.


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) with AdamW-sized updates (Liu et al., 2502.16982), matrices of one shape in one batch.

    The same updates as ``torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")``, in fewer kernels.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes matrices only")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[tuple(parameter.shape)].append(parameter)
            for (rows, columns), parameters in shapes.items():
                grads = [p.grad for p in parameters if p.grad is not None]
                for parameter in parameters:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                momenta = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                updates = orthogonalise(torch.stack(list(nesterov))).to(parameters[0].dtype)
                size = 0.2 * math.sqrt(max(rows, columns))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * size)


def orthogonalise(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly (singular values 0.7..1.2): ``[n, a, b] -> [n, a, b]`` bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(model: nn.Module, name: str, lr: float, muon_lr: float, weight_decay: float) -> list[Optimizer]:
    """AdamW alone (``"adamw"``), or with Muon for the matrices of the blocks (``"muon"``).

    Weight decay applies to parameters of two or more dimensions. Each group keeps its peak rate in ``peak_lr``.
    """
    muon: list[Tensor] = []
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter_name, parameter in model.named_parameters():
        in_block = "blocks." in parameter_name or ".h." in parameter_name  # a DiT's blocks or GPT-2's
        if name == "muon" and parameter.ndim == 2 and in_block and "modulation" not in parameter_name:
            muon.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.999), fused=True)
    optimizers: list[Optimizer] = [adamw, Muon(muon, muon_lr, weight_decay=weight_decay)] if muon else [adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_schedule(kind: str, warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """Fraction of the peak rate as a function of the step: linear warm-up, then constant or cosine down to `floor`."""

    def fraction(step: int) -> float:
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if kind == "constant":
            return ramp
        progress = min(1.0, max(0, step - warmup) / max(1, total - warmup))
        return ramp * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    return fraction


def set_lr(optimizers: Iterable[Optimizer], fraction: float) -> None:
    """Set every group's rate to this fraction of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction


class WeightAverage:
    """Exponential moving average of the parameters, float32; decay ``min(decay, (1 + step) / (10 + step))``."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [p.detach() for p in model.parameters()]
        self.averages = [p.detach().float().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in zip(self.names, self.averages):
            average.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of a model of the same architecture with the averages."""
        averages = self.state_dict()
        for name, parameter in model.named_parameters():
            parameter.copy_(averages[name])
