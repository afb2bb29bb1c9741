"""Models with mixtures of experts, with the interfaces of published ones and small random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.problems.hf_models import (
    HEADS,
    LONGEST,
    MASK,
    WIDTH,
    WORDS,
    Config,
    Output,
    both_ways,
    decoder_config,
    randomize,
)

EXPERTS, CHOSEN, EXPERT_WIDTH, HEAD_DIM, TURNED, KV_HEADS = 8, 3, 16, 16, 8, 2


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, WIDTH, bias=False)
        self.act_fn: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """LLaDA 2's: sigmoids, of which those count that are highest with a bias in the best two groups of four."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, WIDTH))
        self.register_buffer("expert_bias", 0.3 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(3)))
        self.top_k, self.n_group, self.topk_group, self.routed_scaling_factor = CHOSEN, 4, 2, 2.5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        ranked = scores + self.expert_bias
        groups = ranked.unflatten(1, (self.n_group, -1))
        best = groups.topk(2, -1)[0].sum(-1).topk(self.topk_group, -1)[1]
        hidden = torch.ones_like(groups[..., 0]).scatter(1, best, 0.0).bool()
        index = groups.masked_fill(hidden[..., None], -torch.inf).flatten(1).topk(self.top_k, -1)[1]
        weights = scores.gather(1, index)
        return index, self.routed_scaling_factor * weights / weights.sum(-1, keepdim=True)


class Sparse(nn.Module):
    """A mixture of experts that looks at its rows on the host, as those of remote code do."""

    def __init__(self, kind: str, shared: int) -> None:
        super().__init__()
        self.kind, self.top_k = kind, CHOSEN
        self.gate: nn.Module = Gate() if kind == "llada2_moe" else nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MLP(EXPERT_WIDTH) for _ in range(EXPERTS))
        if kind == "llada2_moe" and shared:
            self.shared_experts = MLP(shared)

    def forward(self, x: Tensor) -> Any:
        rows = x.reshape(-1, WIDTH)
        if self.kind == "llada2_moe":
            index, weights = self.gate(rows)
        else:
            weights, index = F.softmax(self.gate(rows), dim=-1, dtype=torch.float).topk(self.top_k, -1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, choice = (index == number).nonzero(as_tuple=True)
            if len(row):
                out.index_add_(0, row, expert(rows[row]) * weights[row, choice, None].to(rows.dtype))
        out = out.view_as(x)
        if hasattr(self, "shared_experts"):
            out = out + self.shared_experts(x)
        return (out, index) if self.kind == "llada2_moe" else out


class Rotary(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 100.0 ** (-torch.arange(width // 2) * 2 / width))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = (position_ids[..., None].float() * self.inv_freq).repeat(1, 1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first dimensions of ``[B, H, L, head_dim]``, as many as there are angles."""
    some, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = some.chunk(2, -1)
    return torch.cat((some * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None], rest), -1)


class Attention(nn.Module):
    """LLaDA 2's: queries, keys and values are one projection, normed, and rotated in part."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.scaling = HEAD_DIM**-0.5
        self.query_key_value = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=biased)
        self.query_layernorm, self.key_layernorm = Norm(HEAD_DIM), Norm(HEAD_DIM)
        self.dense = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=biased)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
        query, key = turn(self.query_layernorm(query), *angles), turn(self.key_layernorm(key), *angles)
        key, value = (heads.repeat_interleave(HEADS // KV_HEADS, 1) for heads in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        return self.dense(attended.transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    """LLaDA-MoE's."""

    def __init__(self) -> None:
        super().__init__()
        head_dim = WIDTH // HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = Norm(head_dim), Norm(head_dim)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        layers = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in layers)
        query, key = turn(self.q_norm(query), *angles), turn(self.k_norm(key), *angles)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class SparseBlock(nn.Module):
    def __init__(self, kind: str, sparse: bool, shared: int, biased: bool) -> None:
        super().__init__()
        if kind == "llada2_moe":
            self.attention: nn.Module = Attention(biased)
        else:
            self.self_attn = SeparateAttention()
            if sparse and shared:
                self.shared_expert = MLP(shared)
        self.mlp: nn.Module = Sparse(kind, shared) if sparse else MLP(24)
        self.input_layernorm, self.post_attention_layernorm = Norm(WIDTH), Norm(WIDTH)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        attention = self.attention if hasattr(self, "attention") else self.self_attn
        x = x + attention(self.input_layernorm(x), angles, mask)
        normed = self.post_attention_layernorm(x)
        out = self.mlp(normed)
        out = out[0] if isinstance(out, tuple) else out
        return x + (out + self.shared_expert(normed) if hasattr(self, "shared_expert") else out)


class SparseModel(nn.Module):
    """LLaDA 2, whose first block is dense, or LLaDA-MoE. `shared`: width of the expert of all rows; 0: none."""

    def __init__(self, kind: str, shared: int = 0, layers: int = 3, biased: bool = False) -> None:
        super().__init__()
        self.config = Config(
            model_type="sparse", vocab_size=WORDS, num_key_value_heads=KV_HEADS if kind == "llada2_moe" else HEADS,
            max_position_embeddings=LONGEST, mask_token_id=MASK, eos_token_id=3, num_experts_per_tok=CHOSEN,
        )  # fmt: skip
        self.model = nn.Module()
        self.model.embed = nn.Embedding(WORDS, WIDTH)
        self.model.layers = nn.ModuleList(
            SparseBlock(kind, number > 0 or kind != "llada2_moe", shared, biased) for number in range(layers)
        )
        self.model.norm = Norm(WIDTH)
        self.model.rotary_emb = Rotary(TURNED if kind == "llada2_moe" else WIDTH // HEADS)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Output:
        x = self.model.embed(input_ids)
        place = torch.arange(input_ids.shape[1], device=x.device)[None] if position_ids is None else position_ids
        angles = self.model.rotary_emb(x, place)
        for layer in self.model.layers:
            x = layer(x, angles, attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None)
        return Output(self.lm_head(self.model.norm(x)))


def sparse(kind: str, **options: Any) -> SparseModel:
    return randomize(SparseModel(kind, **options))


def qwen_experts(**changes: Any) -> Any:
    settings = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": EXPERT_WIDTH}
    settings |= {"norm_topk_prob": True, "head_dim": 8, "mlp_only_layers": []}
    return both_ways(Qwen3MoeForCausalLM(decoder_config(Qwen3MoeConfig, **(settings | changes))))


SPARSE: dict[str, Callable[[], Any]] = {
    "qwen 3, experts": qwen_experts,
    "qwen 3, experts, not normalised": lambda: qwen_experts(norm_topk_prob=False, mlp_only_layers=[1]),
    "llada-moe": lambda: sparse("llada_moe"),
    "llada-moe, wide shared expert": lambda: sparse("llada_moe", shared=20),
    "llada-moe, shared expert": lambda: sparse("llada_moe", shared=EXPERT_WIDTH),
    "llada 2": lambda: sparse("llada2_moe", shared=EXPERT_WIDTH),
    "llada 2, wide shared expert": lambda: sparse("llada2_moe", shared=2 * EXPERT_WIDTH, biased=True),
}
