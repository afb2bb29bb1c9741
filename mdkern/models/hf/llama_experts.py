"""Mixtures of experts in place of a block's MLP: found by their modules, and run by `mdkern.kernels.backbone.experts`.

LLaDA-MoE, LLaDA 2 and Qwen 3's mixture (SDAR): a router, experts that are gated MLPs, and perhaps an expert that every
row is given to. Experts may be modules of a list or one tensor of all of them; both are read where they are. How the
router's products become weights is found out by giving a copy of the module, with random weights in its router, random
rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.kernels.backbone.experts import gated_experts, listed_experts, mixture, places_of
from mdkern.kernels.backbone.route_experts import Routing, route_experts, route_experts_reference
from mdkern.kernels.backbone.skinny import runs_skinny, skinny_parts
from mdkern.kernels.invariant import is_batch_invariant
from mdkern.models.hf.introspect import first_setting

ROUTERS = ("gate", "router")
SHARED = ("mlp.shared_experts", "mlp.shared_expert", "shared_expert", "shared_experts")
BIASES = ("expert_bias", "e_score_correction_bias")
COUNTS, GROUPS, KEPT_GROUPS = ("top_k", "num_experts_per_tok"), ("n_group",), ("topk_group",)
FACTORS = ("routed_scaling_factor",)
ROWS = 16  # by which a routing is recognised
# Largest difference between the module's rows and ours, relative and in the median of rows: a rounding may give a row
# to another expert.
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Kind(NamedTuple):
    """How a mixture of experts chooses and weighs, beside the numbers that its modules have as settings."""

    softmax: bool = True  # see `Routing`
    normalised: bool = True
    bias_counts: bool = False
    grouped: bool = False  # whether only the best groups' experts may be chosen
    scaled: bool = False  # whether the weights are scaled


class Experts(NamedTuple):
    """A mixture of experts of a block; its weights are the model's own tensors."""

    router: Tensor  # [E, D]
    bias: Tensor | None  # [E]
    routing: Routing
    gates: tuple[Tensor, ...]  # each [F, D], or one [E, 2 F, D] with the experts' ups
    ups: tuple[Tensor, ...]  # each [F, D], or none
    downs: tuple[Tensor, ...]  # each [D, F], or one [E, D, F]
    places: Tensor | None  # of listed weights


class UnknownExpertsError(Exception):
    """The reason, in words that follow "because"."""


_places: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Tensor]] = WeakKeyDictionary()


def run_experts(x: Tensor, experts: Experts) -> Tensor:
    """The mixture's output, ``[N, D]`` of rows ``[N, D]``."""
    weights, index = route_experts(router_products(x, experts.router), experts.bias, experts.routing)
    if experts.places is None:
        return gated_experts(x, index, weights, experts.gates[0], experts.downs[0], "silu")
    return listed_experts(x, index, weights, experts.gates, experts.ups, experts.downs, experts.places)


def router_products(x: Tensor, router: Tensor) -> Tensor:
    """``[P, N, E]``, parts whose sum are the products; in float32 where that is fast, as some models have them."""
    if runs_skinny(x, router):
        return skinny_parts(x, router)
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and not is_batch_invariant():
        return torch.mm(x, router.t(), out_dtype=torch.float32)[None]
    return F.linear(x, router)[None]


def experts_of(block: nn.Module, path: str, kind: Kind) -> tuple[Experts, str] | None:
    """The mixture of experts at `path` in a block and, if an MLP beside it stays one, the path of that; None if none.

    Raises:
        UnknownExpertsError: there is one that is built differently.
    """
    module = submodule(block, path)
    listed = getattr(module, "experts", None)
    router = router_of(module)
    if module is None or not isinstance(listed, nn.Module) or router is None:
        return None
    weight = router._parameters.get("weight")
    if weight is None or weight.ndim != 2 or router._parameters.get("bias") is not None:
        raise UnknownExpertsError("its router is no product with a weight alone")
    owners = router, module
    settings = routing_of(owners, kind)
    bias = next((found for owner in owners if (found := bias_of(owner)) is not None), None)
    beside = next((name for name in SHARED if submodule(block, name) is not None), "")
    if isinstance(listed, nn.ModuleList):
        experts = list(listed)
        if beside and same_shape(block.get_submodule(beside), experts[0]):
            experts, beside, settings = [*experts, block.get_submodule(beside)], "", settings._replace(always=1)
        gates, ups, downs = (
            tuple(weight_of(expert, name) for expert in experts) for name in ("gate_proj", "up_proj", "down_proj")
        )
        return Experts(weight, bias, settings, gates, ups, downs, known_places(listed, gates, ups, downs)), beside
    gate_up, down = (listed._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    whole = None if gate_up is None or down is None else (len(weight), 2 * down.shape[2], weight.shape[1])
    if gate_up is None or down is None or gate_up.shape != whole or not gate_up.is_contiguous():
        raise UnknownExpertsError(f"its {type(listed).__name__} does not hold gates with ups, and downs")
    return Experts(weight, bias, settings, (gate_up,), (), (down,), None), beside


def has_experts(block: nn.Module, path: str) -> bool:
    """Whether there may be a mixture of experts at `path`."""
    return submodule(block, f"{path}.experts") is not None


def submodule(module: nn.Module | None, path: str) -> nn.Module | None:
    part: Any = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return part if isinstance(part, nn.Module) else None


def router_of(module: nn.Module | None) -> nn.Module | None:
    return next((part for name in ROUTERS if (part := submodule(module, name)) is not None), None)


def routing_of(owners: tuple[nn.Module, ...], kind: Kind) -> Routing:
    """The routing of this kind, with the numbers that the modules have now."""

    def setting(names: tuple[str, ...]) -> float:
        for source in (getattr, first_setting):
            for owner, name in itertools.product(owners, names):
                value = source(owner, name, None) if source is getattr else source(owner, name)
                if isinstance(value, int | float):
                    return value
        return 1

    groups, kept = (int(setting(names)) if kind.grouped else 1 for names in (GROUPS, KEPT_GROUPS))
    factor = float(setting(FACTORS)) if kind.scaled else 1.0
    return Routing(
        int(setting(COUNTS)), kind.softmax, kind.normalised, kind.bias_counts, groups, kept, factor
    )  # fmt: skip


def bias_of(owner: nn.Module) -> Tensor | None:
    for name in BIASES:
        found = getattr(owner, name, None)
        if isinstance(found, Tensor):
            return found
    return None


def weight_of(expert: nn.Module, name: str) -> Tensor:
    layer = submodule(expert, name)
    if layer is None or type(layer).forward is not nn.Linear.forward or layer._parameters.get("bias") is not None:
        raise UnknownExpertsError(f"an expert's {name} is not a plain linear layer without a bias")
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def same_shape(mlp: nn.Module, other: nn.Module) -> bool:
    """Whether two MLPs are of one shape."""
    return all(weight_of(mlp, name).shape == weight_of(other, name).shape for name in ("gate_proj", "down_proj"))


def known_places(
    owner: nn.Module, gates: tuple[Tensor, ...], ups: tuple[Tensor, ...], downs: tuple[Tensor, ...]
) -> Tensor:
    """`places_of` the weights, the same tensor while these stay where they are, as graphs hold its address."""
    addresses = tuple(tensor.data_ptr() for tensor in itertools.chain(gates, ups, downs))
    known = _places.get(owner)
    if known is None or known[0] != addresses or known[1].device != gates[0].device:
        try:
            known = addresses, places_of(gates, ups, downs)
        except ValueError as error:
            raise UnknownExpertsError(str(error)) from error
        _places[owner] = known
    return known[1]


def kind_of(block: nn.Module, path: str) -> Kind:
    """How the mixture of experts at `path` in a block chooses and weighs.

    Raises:
        UnknownExpertsError: in none of the ways that are known.
    """
    found, module = experts_of(block, path, Kind()), submodule(block, path)
    assert found is not None
    assert module is not None
    experts, beside = found
    generator = torch.Generator().manual_seed(0)
    count, depth = experts.router.shape

    def random(*shape: int, like: Tensor, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(like)

    rows = random(ROWS, depth, like=experts.router, scale=1.0)
    router = random(count, depth, like=experts.router, scale=2.0 * depth**-0.5)
    bias = None if experts.bias is None else random(count, like=experts.bias, scale=0.2)
    output = with_tensors(module, experts.router, router, experts.bias, bias)(rows[None])
    theirs = (output[0] if isinstance(output, tuple) else output).reshape(ROWS, depth).double()
    each = outputs_of(rows, experts).double()  # [N, E + always, D]
    inside = any(submodule(module, name.removeprefix("mlp.")) is not None for name in SHARED)
    if not inside:
        each[:, count:] = 0.0  # the block adds it
    elif beside:
        theirs = theirs - block.get_submodule(beside)(rows).double()
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    products = F.linear(rows.to(wide), router.to(wide))[None]
    best, least = Kind(), torch.inf
    for kind in every_kind(bias is not None):
        routing = experts_of(block, path, kind)[0].routing  # type: ignore[index]
        weights, index = route_experts_reference(products, bias, routing)
        ours = (each.gather(1, index[:, :, None].expand(-1, -1, depth)) * weights[:, :, None]).sum(1)
        error = float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).median())
        best, least = (kind, error) if error < least else (best, least)
    if not least <= CLOSE.get(rows.dtype, 1e-3):
        raise UnknownExpertsError(f"its {type(module).__name__} chooses experts in another way than is known")
    return best


def every_kind(biased: bool) -> Iterator[Kind]:
    some = (True, False)
    yield from itertools.starmap(Kind, itertools.product(some, some, some if biased else (False,), some, some))


def outputs_of(rows: Tensor, experts: Experts) -> Tensor:
    """``[N, E + always, D]``: what each expert makes of each row."""
    gates, ups, downs = experts.gates, experts.ups, experts.downs
    if experts.places is None:
        gates, ups = (part.unbind() for part in gates[0].chunk(2, dim=1))
        downs = downs[0].unbind()
    one, every = rows.new_ones(len(rows), 1, dtype=torch.float32), range(len(downs))
    index = torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
    of_each = [mixture(rows, index + e, one, gates, ups, downs, "silu") for e in every]
    return torch.stack(of_each, 1)


def with_tensors(module: nn.Module, *pairs: Tensor | None) -> nn.Module:
    """A shallow copy of a module and its submodules, each second tensor in the place of the one before it."""
    copied = copy(module)
    for kind in ("_parameters", "_buffers"):
        own = dict(getattr(module, kind))
        for old, new in zip(pairs[::2], pairs[1::2]):
            for name, tensor in own.items():
                if tensor is not None and tensor is old:
                    own[name] = new
        setattr(copied, kind, own)
    children = module._modules.items()
    copied._modules = {
        name: child if child is None or isinstance(child, nn.ModuleList) else with_tensors(child, *pairs)
        for name, child in children
    }
    return copied
