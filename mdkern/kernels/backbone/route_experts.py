"""`route_experts`: which experts each row is given to, and with what weights, in one launch.

Scores are shares of a softmax over all experts (Mixtral, OLMoE, Qwen 3, LLaDA-MoE), or sigmoids that are compared
after a bias is added to them, within the best groups of experts only (DeepSeek-V3, 2412.19437; LLaDA 2, 2512.15745).
This file has the contract and the reference in plain PyTorch; `triton_route_experts` has the GPU kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator

SMALL = 1e-20  # is added to sums of weights, which sigmoids may bring to zero


class Routing(NamedTuple):
    """How a row's experts follow from the router's products."""

    chosen: int  # K, experts of a row
    softmax: bool = True  # scores are a softmax over all experts; else sigmoids
    normalised: bool = True  # weights of a row add up to `factor`
    bias_counts: bool = False  # the bias is part of the weights, too, not of the comparison only
    groups: int = 1  # consecutive experts, as many in each
    kept_groups: int = 1  # groups whose experts may be chosen, by the sum of their two highest scores
    factor: float = 1.0  # of all weights
    always: int = 0  # experts after all others that every row is given to, with weight 1


def route_experts_reference(products: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """`route_experts` in plain PyTorch."""
    scores = products.to(wide(products)).sum(0)
    scores = scores.softmax(-1) if routing.softmax else scores.sigmoid()
    ranked = scores if bias is None else scores + bias.to(scores.dtype)
    own = ranked if routing.bias_counts else scores
    if routing.groups > 1:
        grouped = ranked.unflatten(1, (routing.groups, -1))
        best = grouped.topk(min(2, grouped.shape[2]), dim=-1)[0].sum(-1).topk(routing.kept_groups, dim=-1)[1]
        kept = torch.zeros_like(grouped[:, :, 0], dtype=torch.bool).scatter_(1, best, True)
        ranked = grouped.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
    index = ranked.topk(routing.chosen, dim=-1)[1]
    weights = own.gather(1, index)
    if routing.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + SMALL)
    rows, experts = scores.shape
    rest = torch.arange(experts, experts + routing.always, device=index.device).expand(rows, -1)
    weights = torch.cat((weights * routing.factor, torch.ones_like(rest, dtype=weights.dtype)), 1)
    return weights.float(), torch.cat((index, rest), 1)


def route_outputs(products: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    shape = products.shape[1], routing.chosen + routing.always
    return products.new_empty(shape, dtype=torch.float32), products.new_empty(shape, dtype=torch.int64)


route_experts_operator = operator(
    route_experts_reference,
    route_outputs,
    "mdkern.kernels.backbone.triton_route_experts:route_experts",
    name="route_experts",
)


def route_experts(
    products: Tensor,  # [P, N, E]
    bias: Tensor | None,  # [E]
    routing: Routing,
) -> tuple[Tensor, Tensor]:
    """The experts of each row, and their weights.

    Args:
        products: floating, parts whose sum over P are the router's products.
        bias: floating, is added to the scores before they are compared; None: nothing is.

    Returns:
        weights float32 ``[N, K + always]`` and index int64 of that shape, the chosen ones in falling order of what was
        compared. Rows with NaN give weights of NaN and some index in 0..E-1.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a routing that leaves too few experts.
    """
    if products.ndim != 3 or not products.is_floating_point():
        raise ValueError(f"products must be floating [P, N, E], not {products.dtype} {list(products.shape)}")
    experts = products.shape[2]
    check_tensor("bias", bias, (experts,), products.dtype if bias is None else bias.dtype, products.device)
    groups, kept = routing.groups, routing.kept_groups
    if groups < 1 or experts % groups or not 1 <= kept <= groups:
        raise ValueError(f"{experts} experts cannot be {groups} groups of which {kept} are kept")
    if not 1 <= routing.chosen <= experts // groups * kept:
        raise ValueError(f"a row must be given to 1..{experts // groups * kept} experts, not {routing.chosen}")
    weights, index = route_experts_operator(products, bias, *routing)
    return weights, index
