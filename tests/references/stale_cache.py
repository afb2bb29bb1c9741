"""A `DiT` on one sequence with keys and values of mixed age, written out: float64, one attention head at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern import DiT
from mdkern.models.dit import Block


class StaleDiT:
    """What a DiT says of some columns of a sequence when it sees the others as they were when they were last run."""

    def __init__(self, model: DiT) -> None:
        self.model = copy.deepcopy(model).double()
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by (block, column): key, value [D]

    def hidden(self, ids: Sequence[int], columns: Sequence[int], t: float | None = None) -> Tensor:
        """The head's input at `columns`, which are run anew, ``[W, D]``; all others must have been run before."""
        model = self.model
        condition = None if t is None or model.time_embedding is None else model.time_embedding(torch.tensor([t]))
        x = model.embedding[torch.tensor([ids[column] for column in columns])]
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            x = self.run_block(block, number, x, columns, len(ids), condition)
        shift, scale = (part.reshape(-1) for part in model.modulation_final(condition))
        return F.layer_norm(x, x.shape[-1:]) * model.norm_final.weight * (1 + scale) + shift

    def run_block(
        self, block: Block, number: int, x: Tensor, columns: Sequence[int], length: int, condition: Tensor | None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (part.reshape(-1) for part in block.modulation(condition))
        normed = F.layer_norm(x, x.shape[-1:]) * block.norm1.weight * (1 + scale1) + shift1
        query, key, value = (normed @ block.attn_qkv.weight.T).chunk(3, dim=-1)
        for row, column in enumerate(columns):
            self.seen[number, column] = self.turn(key[row], column, block.num_heads), value[row]
        keys, values = (torch.stack(rows) for rows in zip(*(self.seen[number, column] for column in range(length))))
        turned = torch.stack([self.turn(query[row], column, block.num_heads) for row, column in enumerate(columns)])
        attended = []
        for q, k, v in zip(*(rows.chunk(block.num_heads, dim=-1) for rows in (turned, keys, values))):
            attended.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
        x = x + gate1 * (torch.cat(attended, dim=-1) @ block.attn_out.weight.T)
        normed = F.layer_norm(x, x.shape[-1:]) * block.norm2.weight * (1 + scale2) + shift2
        return x + gate2 * block.mlp_down(F.gelu(block.mlp_up(normed), approximate="tanh"))

    def turn(self, row: Tensor, column: int, heads: int) -> Tensor:
        """Rotary positions: each head's pairs (i, i + half) as complex numbers."""
        first, second = row.unflatten(0, (heads, -1)).chunk(2, dim=-1)
        half = first.shape[-1]
        angle = column * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=-1).flatten()


class BlockwiseCache:
    """Logits of one sequence as a block-wise cache has them: a full pass where a block or a model begins."""

    def __init__(
        self,
        models: Mapping[str, DiT],
        model_of_step: str,
        start: int,
        block_length: int,
        mask_id: int,
        dual: bool,
        steps_of_block: int | None,
        times: Tensor,
    ) -> None:
        """`steps_of_block`: None if a block is over with its last mask."""
        self.models, self.model_of_step = models, model_of_step
        self.start, self.block_length, self.mask_id, self.dual = start, block_length, mask_id, dual
        self.steps_of_block, self.times = steps_of_block, times
        self.now: tuple[str, int] | None = None
        self.refreshes = 0

    def logits(self, ids: Sequence[int], step: int) -> dict[int, list[float]]:
        """By column of the block that is being decoded."""
        if self.steps_of_block is None:
            block = (list(ids).index(self.mask_id) - self.start) // self.block_length
        else:
            block = step // self.steps_of_block
        name, length = self.model_of_step[step], len(ids)
        first = self.start + block * self.block_length
        columns = list(range(first, min(first + self.block_length, length) if self.dual else length))
        if self.now != (name, block):
            self.now, self.model, columns = (name, block), StaleDiT(self.models[name]), list(range(length))
            self.refreshes += 1
        t = float(self.times[step]) if self.models[name].config.time_conditioning else None
        logits = self.model.model.logits(self.model.hidden(ids, columns, t))
        return dict(zip(columns, logits.tolist()))
