"""Random tensors for the tests of the inference operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.kernels.backbone.window_attention import new_arrivals


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def modulation(
    width: int, sequences: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight ``[D]``; shift, scale and gate ``[S, D]``, as parts of one matrix, or ``[D]`` if `sequences` is 0."""
    weight = 1 + 0.2 * normal(10, width)
    parts = 0.5 * normal(11, max(1, sequences), 3 * width)
    shift, scale, gate = (parts if sequences else parts[0]).to(dtype).to(device).chunk(3, dim=-1)
    return weight.to(dtype).to(device), shift, scale, gate


class HeadsCase(NamedTuple):
    """Arguments of `place_heads` for two sequences of three rows; heads are columns of a wider matrix."""

    queries: int
    keys: int
    head_dim: int
    normed: bool
    where: str  # "in place", "kept", "kept at columns"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    turned: int | None = None  # pairs of a head that are rotated, if not all

    def run(self, place: Callable[..., None]) -> tuple[Tensor, ...]:
        """What `place` makes of the queries, the keys, the values and the cache."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        cos, sin = (self.random(seed, 5, self.turned or self.head_dim // 2, dtype=wide) for seed in (1, 2))
        heads = self.random(3, 6, self.queries + 2 * self.keys, self.head_dim, dtype=self.dtype)
        query, key, value = heads.split((self.queries, self.keys, self.keys), 1)
        norms = [
            1 + 0.3 * self.random(seed, self.head_dim, dtype=self.dtype) if self.normed else None for seed in (4, 5)
        ]
        positions = columns = kept = None
        if self.where != "in place":
            kept = torch.full((2, 2, 5, self.keys, self.head_dim + 1), 7.0, dtype=self.dtype, device=self.device)
        if self.where == "kept at columns":
            positions = torch.tensor([4, 0, -1, 3, 5, 1], device=self.device)
            columns = torch.tensor([3, 4, 0, 4, 1, 4], device=self.device)  # 4 is scratch
        given = None if kept is None else kept[..., :-1]
        place(
            cos, sin, query if self.queries else None, key if self.keys else None, value if self.keys else None,
            positions, 3, *norms, 1e-2, given, columns,
        )  # fmt: skip
        return (query, key, value) if kept is None else (query, key, value, kept[:, :, :-1])

    def random(self, seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return normal(seed, *shape, dtype=dtype, device=self.device)


class WindowCase(NamedTuple):
    """Arguments of `window_attention` for three sequences; heads are columns of a wider matrix."""

    queries: int
    keys: int  # heads of keys
    head_dim: int
    width: int
    length: int
    normed: bool = False
    masked: str = ""  # "padding", "rows"
    turned: int | None = None  # pairs of a head that are rotated, if not all
    placed: bool = True  # whether positions are given
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def arguments(self, rounded: bool = False, sequences: int = 3) -> dict[str, Any]:
        """The arguments by name. The window's columns are scattered, some of them beyond the end, and the cache is NaN
        where the window will be."""
        rows = sequences * self.width
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        angle = self.random(1, self.length, self.turned or self.head_dim // 2, dtype=wide)
        heads = self.random(3, rows, self.queries + 2 * self.keys, self.head_dim, dtype=self.dtype)
        query, key, value = heads.split((self.queries, self.keys, self.keys), 1)
        norms = [
            1 + 0.3 * self.random(seed, self.head_dim, dtype=self.dtype) if self.normed else None for seed in (4, 5)
        ]
        shape = 2, sequences, self.length + 1, self.keys, self.head_dim + 1
        kept = self.random(6, *shape, dtype=self.dtype)[..., :-1]
        generator = torch.Generator().manual_seed(7)
        order = torch.stack([torch.randperm(self.length, generator=generator) for _ in range(sequences)])
        columns = order[:, : self.width].clone()
        positions = columns.flip(0).to(self.device)
        columns[-1, self.width // 2 :] = self.length  # scratch
        columns = columns.to(self.device)
        kept[:, torch.arange(sequences)[:, None], columns] = torch.nan
        mask = None
        if self.masked:
            shape = (sequences, 1, self.width if self.masked == "rows" else 1, self.length)
            mask = (torch.rand(shape, generator=generator) < 0.6).to(self.device)
            if self.masked == "rows":
                mask[0, 0, -1] = False  # sees nothing
        return {
            "cos": angle.cos(), "sin": angle.sin(), "query": query, "key": key, "value": value,
            "positions": positions.flatten() if self.placed else None, "columns": columns.flatten(),
            "query_norm": norms[0], "key_norm": norms[1], "eps": 1e-2, "kept": kept, "mask": mask,
            "scale": 0.7 * self.head_dim**-0.5,
            "arrived": new_arrivals(sequences, self.width, self.keys, self.queries // self.keys, query.device),
            "rounded": rounded,
        }  # fmt: skip

    def random(self, seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return normal(seed, *shape, dtype=dtype, device=self.device)
