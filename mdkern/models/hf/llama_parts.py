"""Recognises transformers built like Llama's by their modules and parameters, and gives their weights.

That is a stack of blocks, each with attention and an MLP behind a norm of its own (RMS norms, rotary positions, SwiGLU;
Touvron et al., 2302.13971): Llama, Mistral, Qwen 2 and 3, Dream and SDAR; LLaDA's code with the names of OLMo; and
models with mixtures of experts in place of MLPs (`llama_experts`), LLaDA-MoE, LLaDA 2 and Qwen 3's. Classes are not
relied on. Every parameter must have one of the roles below, and `probe` compares the passes of `llama_fused` with the
model's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.kernels.backbone.rms_norm import normalise
from mdkern.models.dit_fused import is_hooked
from mdkern.models.hf.introspect import OutputLayer, accepted_arguments, longest_input
from mdkern.models.hf.llama_experts import (
    Experts,
    Kind,
    UnknownExpertsError,
    experts_of,
    has_experts,
    kind_of,
)
from mdkern.models.hf.llama_experts import submodule as part_of

MOST_POSITIONS = 1 << 15  # of a model whose config does not tell how many it can read
EPS_NAMES = ("variance_epsilon", "eps")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds of rotary embedding whose angles depend on the length of a text


class Names(NamedTuple):
    """Names of a block's parts."""

    attn_norm: str
    query: str  # or all three in one, if they have one name
    key: str
    value: str
    query_norm: str
    key_norm: str
    attn_out: str
    mlp_norm: str
    gate: str
    up: str
    down: str


HEAD_NORMS = ("query_norm", "key_norm")
MLP = ("gate", "up", "down")
OPTIONAL = (*HEAD_NORMS, *MLP)  # a block may have a mixture of experts instead of an MLP
NORMS = ("attn_norm", "mlp_norm", *HEAD_NORMS)
KINDS = (
    Names(
        attn_norm="input_layernorm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        attn_out="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    ),
    Names(
        attn_norm="input_layernorm",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        query_norm="attention.query_layernorm",
        key_norm="attention.key_layernorm",
        attn_out="attention.dense",
        mlp_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    ),
    Names(
        attn_norm="attn_norm",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        query_norm="q_norm",
        key_norm="k_norm",
        attn_out="attn_out",
        mlp_norm="ff_norm",
        gate="ff_proj",
        up="up_proj",
        down="ff_out",
    ),
)


class Plan(NamedTuple):
    """Where the parts of a model are. It is a tuple so that graphs compare it, and holds no module."""

    embedding: str
    blocks: str
    norm: str
    names: Names
    head_dim: int
    cos: Tensor  # float32 [P, R], of the first 2R dimensions of a head
    sin: Tensor
    scale: float | None  # of the products of queries and keys; None: head_dim ** -0.5
    eps: float  # of norms that have none of their own
    experts: Kind | None = None  # of mixtures of experts; None: there are none


class Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None


class Norm(NamedTuple):
    weight: Tensor
    eps: float


class Block(NamedTuple):
    attn_norm: Norm
    query: Linear
    key: Linear
    value: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    attn_out: Linear
    mlp_norm: Norm
    gate: Linear | None  # of an MLP, which may stand beside a mixture of experts
    up: Linear | None
    down: Linear | None
    experts: Experts | None = None


class Parts(NamedTuple):
    """The weights of a model, which are the model's own tensors. It is a tuple so that graphs find their addresses."""

    embedding: Tensor
    blocks: tuple[Block, ...]
    norm: Norm
    head_dim: int
    cos: Tensor
    sin: Tensor
    scale: float | None


class UnlikeLlamaError(Exception):
    """The reason, in words that follow "because"."""


def plan_of(model: nn.Module, head: OutputLayer, head_dim: int, turning: str, longest: int) -> Plan:
    """The plan of a model.

    Args:
        head_dim: numbers of each of its heads.
        turning: name of the module that rotates queries and keys, as in `Anatomy.rotary`.
        longest: the least number of positions to have angles for.

    Raises:
        UnlikeLlamaError: it is built differently.
    """
    blocks, names = find_blocks(model)
    outside = [(name, module) for name, module in model.named_modules() if not f"{name}.".startswith(f"{blocks}.")]
    tables = [(name, module) for name, module in outside if isinstance(module, nn.Embedding)]
    if len(tables) != 1:
        raise UnlikeLlamaError(f"it has {len(tables)} embeddings")
    name, table = tables[0]
    if table.max_norm is not None:
        raise UnlikeLlamaError("its embedding has a max_norm")
    width = table.weight.shape[1]
    norms = [
        name
        for name, module in outside
        if [tuple(p.shape) for p in module._parameters.values() if p is not None] == [(width,)]
    ]
    if len(norms) != 1:
        raise UnlikeLlamaError(f"it has {len(norms)} norms outside of its blocks")
    positions = max(longest, longest_input(model) or MOST_POSITIONS)
    cos, sin = angles(model, turning, head_dim // 2, positions, table.weight.device)
    scale = attention_scale(model.get_submodule(blocks)[0], names)  # type: ignore[index]
    experts = kind_of_experts(model.get_submodule(blocks), names)  # type: ignore[arg-type]
    error = UnlikeLlamaError()
    for kind in (table.weight.dtype, torch.float32):  # PyTorch's default, by its version
        plan = Plan(name, blocks, norms[0], names, head_dim, cos, sin, scale, torch.finfo(kind).eps, experts)
        try:
            check_complete(model, plan, head)
            return plan
        except UnlikeLlamaError as reason:
            error = reason
    raise error


def attention_scale(block: nn.Module, names: Names) -> float | None:
    """What products of queries and keys are multiplied by, if the module that has the projection to queries tells."""
    attention = part_of(block, names.query.rpartition(".")[0])
    scale = getattr(attention, "scaling", None)
    return scale if isinstance(scale, float) else None


def kind_of_experts(blocks: nn.ModuleList, names: Names) -> Kind | None:
    """Of the first mixture of experts in the blocks; None if there is none."""
    for block in blocks:
        if part_of(block, names.gate) is None:
            try:
                return kind_of(block, mlp_path(names))
            except UnknownExpertsError as error:
                raise UnlikeLlamaError(str(error)) from error
    return None


def mlp_path(names: Names) -> str:
    """The module of an MLP, or of the mixture of experts in its place."""
    return names.gate.rpartition(".")[0]


def find_blocks(model: nn.Module) -> tuple[str, Names]:
    """The name of the list of blocks, and the names of a block's parts."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        for names in KINDS:
            roles = names._asdict().items()
            whole = part_of(module[0], names.gate) is not None or has_experts(module[0], mlp_path(names))
            if whole and all(part_of(module[0], path) is not None for role, path in roles if role not in OPTIONAL):
                return name, names
    raise UnlikeLlamaError("its blocks are not built like Llama's")


def angles(model: nn.Module, turning: str, half: int, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the model's rotary embedding, float32 ``[P, R]`` each, R at most head_dim / 2."""
    if turning:  # it rotates queries and keys itself, in which (1, 0) becomes (cos, sin)
        unit = torch.zeros(1, 1, positions, 2 * half, device=device)
        unit[..., :half] = 1.0
        turned = model.get_submodule(turning)(unit, unit)[0][0, 0]
        cos, sin = turned[:, :half], turned[:, half:]
        return cos.float().contiguous(), sin.float().contiguous()
    for module in model.modules():
        if not isinstance(getattr(module, "inv_freq", None), Tensor) or "position_ids" not in accepted_arguments(
            module
        ):
            continue
        kind = getattr(module, "rope_type", "default")
        if kind in LENGTH_DEPENDENT:
            raise UnlikeLlamaError(f"its rotary embedding is of the kind {kind!r}")
        x, place = torch.zeros(1, 1, 1, device=device), torch.arange(positions, device=device)[None]
        both = [table[0].float() for table in module(x, position_ids=place)]
        half = min(half, both[0].shape[-1] // 2)
        if any(table.shape != (positions, 2 * half) or not table[:, :half].equal(table[:, half:]) for table in both):
            raise UnlikeLlamaError("its rotary embedding does not pair the halves of a head")
        cos, sin = (table[:, :half].contiguous() for table in both)
        return cos, sin
    raise UnlikeLlamaError("its rotary embedding is not found")


def check_complete(model: nn.Module, plan: Plan, head: OutputLayer) -> None:
    """Refuse a model with parameters that have no role, with several dtypes, or with norms that are not RMS norms."""
    parts = resolve(model, plan)
    if parts.embedding.dtype == torch.float64:
        raise UnlikeLlamaError("it is of torch.float64, and mdkern's own passes compute with 32 bits at most")
    tensors = (*tensors_of(parts), head.weight, head.bias)
    used = {tensor.data_ptr() for tensor in tensors if tensor is not None}  # of views, too
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() not in used:
            raise UnlikeLlamaError(f"it has a parameter besides those of a Llama, {name}")
        if parameter.dtype != parts.embedding.dtype and parameter is not head.weight and parameter is not head.bias:
            raise UnlikeLlamaError(f"its parameters are {parts.embedding.dtype} and {parameter.dtype}")
    first = model.get_submodule(plan.blocks)[0]  # type: ignore[index]
    modules = [part_of(first, getattr(plan.names, role)) for role in NORMS]
    for module in (*modules, model.get_submodule(plan.norm)):
        if module is not None:
            check_norm(module, norm_of(module, plan.eps))
    for activation in ("mlp.act_fn", "act"):
        module = part_of(first, activation)
        x = torch.linspace(-4, 4, 33, device=parts.embedding.device)
        if module is not None and not torch.allclose(module(x), nn.functional.silu(x), rtol=1e-3, atol=1e-3):
            raise UnlikeLlamaError(f"its activation is not SiLU but a {type(module).__name__}")


def tensors_of(parts: Any) -> list[Tensor]:
    """All tensors in a nest of tuples."""
    if isinstance(parts, Tensor):
        return [parts]
    return [tensor for part in parts for tensor in tensors_of(part)] if isinstance(parts, tuple) else []


def check_norm(module: nn.Module, norm: Norm) -> None:
    """Refuse a norm that does not do what `rms_norm` does; also for small rows, in which `eps` matters."""
    width, device = len(norm.weight), norm.weight.device
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(2)).to(device)
    rows = (rows * torch.tensor([[1.0], [max(norm.eps, 1e-12) ** 0.5]], device=device)).to(norm.weight.dtype)
    theirs, ours = module(rows).double(), normalise(rows, norm.weight, norm.eps).double()
    bound = max(8 * torch.finfo(norm.weight.dtype).eps, 1e-6)  # of float64 rows, too, many compute it in float32
    if (ours - theirs).norm() > bound * theirs.norm():
        raise UnlikeLlamaError(f"a {type(module).__name__} of it is no RMS norm")


def resolve(model: nn.Module, plan: Plan) -> Parts:
    """The weights of a model as they are now.

    Raises:
        UnlikeLlamaError: a module is hooked, or is not what it was.
    """
    for name, module in model.named_modules():
        if is_hooked(module):
            raise UnlikeLlamaError(f"{name or 'it'} has a hook or a forward of its own")
        if any(type(tensor) not in (nn.Parameter, Tensor, type(None)) for tensor in module._parameters.values()):
            raise UnlikeLlamaError(f"{name} holds weights of a kind of their own")
    blocks = model.get_submodule(plan.blocks)
    embedding, norm = model.get_submodule(plan.embedding), model.get_submodule(plan.norm)
    assert isinstance(blocks, nn.ModuleList)
    assert isinstance(embedding, nn.Embedding)
    return Parts(
        embedding.weight, tuple(block_of(block, plan) for block in blocks), norm_of(norm, plan.eps), plan.head_dim,
        plan.cos, plan.sin, plan.scale,
    )  # fmt: skip


def block_of(block: nn.Module, plan: Plan) -> Block:
    names, parts = plan.names, dict[str, Any]()
    if part_of(block, names.gate) is None and plan.experts is not None:
        try:
            found = experts_of(block, mlp_path(names), plan.experts)
        except UnknownExpertsError as error:
            raise UnlikeLlamaError(str(error)) from error
        if found is None:
            raise UnlikeLlamaError(f"a block of it has no {names.gate} and no experts")
        parts["experts"], beside = found
        paths = [f"{beside}.{names._asdict()[role].rpartition('.')[2]}" if beside else "" for role in MLP]
        names = names._replace(**dict(zip(MLP, paths)))
    for role, path in names._asdict().items():
        module = part_of(block, path)
        if module is None:
            if role in HEAD_NORMS or ("experts" in parts and not path):
                parts[role] = None
                continue
            raise UnlikeLlamaError(f"a block of it has no {path}")
        parts[role] = norm_of(module, plan.eps) if role in NORMS else linear_of(module, path)
    if names.query == names.key:
        parts |= zip(("query", "key", "value"), split(parts["query"], parts["attn_out"].weight.shape[1]))
    return Block(**parts)


def split(packed: Linear, queries: int) -> list[Linear]:
    """The projections to queries, keys and values that are one, as views of it."""
    weight, bias = packed
    sizes = [queries, *[(len(weight) - queries) // 2] * 2]
    if sum(sizes) != len(weight):
        raise UnlikeLlamaError(f"its {len(weight)} queries, keys and values cannot be told apart")
    biases = [None] * 3 if bias is None else bias.split(sizes)
    return [Linear(*pair) for pair in zip(weight.split(sizes), biases)]


def linear_of(module: nn.Module, path: str) -> Linear:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module).forward is not nn.Linear.forward or weight is None:
        raise UnlikeLlamaError(f"its {path} is a {type(module).__name__}, not a plain linear layer")
    return Linear(weight, bias)


def norm_of(module: nn.Module, default: float) -> Norm:
    weight, settings = module._parameters.get("weight"), (getattr(module, name, None) for name in EPS_NAMES)
    if weight is None or module._parameters.get("bias") is not None:
        raise UnlikeLlamaError(f"a {type(module).__name__} of it is no RMS norm with a weight")
    return Norm(weight, float(next((eps for eps in settings if eps is not None), default)))
