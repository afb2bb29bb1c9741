"""A pass with nothing in it but its matrix products and its attention, by the libraries that PyTorch calls.

This is what a pass costs that has no norm, no residual update, no activation, no rotation and no sampling: products by
cuBLAS of contiguous matrices without a bias, in 8 bits by ``torch._scaled_mm``, and attention by cuDNN or
FlashAttention. Each of these is run in the ways that the libraries offer, and the fastest counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import captured, compare_on_host, elapsed
from mdkern import DiTConfig
from mdkern.kernels.backbone.quantise import FP8

Ways = dict[str, Callable[[], object]]
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}
TRIALS = 5  # of each way of doing a piece of work


@dataclass(frozen=True)
class Product:
    """``[rows, inner] @ [inner, columns]``."""

    rows: int
    inner: int
    columns: int
    fp8: bool = False
    rounded: bool = False  # whether the result may be in e4m3, because the next product reads it

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    @property
    def weight_bytes(self) -> int:
        return self.inner * self.columns * (1 if self.fp8 else 2)


@dataclass(frozen=True)
class Attention:
    """Of `queries` positions over `keys` positions of each of `batch` texts."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    fp8: bool = False  # as far as arithmetic goes; the libraries have none

    weight_bytes = 0

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim


Work = Sequence[Product | Attention]


def dit_work(
    config: DiTConfig, batch: int, length: int, wanted: int, rows: int, *, fp8: bool = False, table: bool = True
) -> Work:
    """The work of mdkern's pass of a `DiT`.

    Args:
        wanted: positions of each text at which the last block runs queries, output and MLP.
        rows: rows of the output layer, of all texts.
        fp8: the products are in e4m3 where mdkern's are: not around attention in the first block, not at the wanted
            positions, not in the output layer. So is attention between these.
        table: the first block's queries, keys and values are looked up, and so not part of the work.
    """
    width, inside, whole = config.width, config.mlp_ratio * config.width, batch * length
    work: list[Product | Attention] = []
    for number in range(config.num_blocks):
        first, last = number == 0, number + 1 == config.num_blocks
        queries = wanted if last else length
        if not (first and table):
            work.append(Product(whole, width, (2 if last else 3) * width, fp8 and not first))
        if last:
            work.append(Product(batch * queries, width, width))
        rounds = fp8 and not last
        work += [
            Attention(batch, config.num_heads, queries, length, width // config.num_heads, rounds and not first),
            Product(batch * queries, width, width, rounds and not first),
            Product(batch * queries, width, inside, rounds, rounded=rounds),
            Product(batch * queries, inside, width, rounds),
        ]
    return [*work, Product(rows, width, config.padded_vocab_size)]


def llama_work(sizes: Mapping[str, int], batch: int, length: int, wanted: int, *, fp8: bool = False) -> Work:
    """The work of mdkern's pass of a model built like Llama, the output layer at the `wanted` positions of each text.

    Queries, keys and values are one product, as are the MLP's gate and up.
    """
    width, inside, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    head_dim = width // heads
    kept = 2 * sizes["num_key_value_heads"] * head_dim
    work: list[Product | Attention] = []
    for number in range(sizes["num_hidden_layers"]):
        last = number + 1 == sizes["num_hidden_layers"]
        queries = wanted if last else length
        work.append(Product(batch * length, width, kept if last else kept + width, fp8))
        if last:
            work.append(Product(batch * queries, width, width, fp8))
        work += [
            Attention(batch, heads, queries, length, head_dim),
            Product(batch * queries, width, width, fp8),
            Product(batch * queries, width, 2 * inside, fp8),
            Product(batch * queries, inside, width, fp8),
        ]
    return [*work, Product(batch * wanted, width, sizes["vocab_size"])]


class Bare:
    """The work on a device, with weights of its own for each product, so that caches hold no more than in a pass."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.dtype = torch.bfloat16
        self.shared: dict[tuple[Any, ...], Tensor] = {}
        self.ways = [self.product(item) if isinstance(item, Product) else self.attention(item) for item in work]
        self.milliseconds: dict[Product | Attention, dict[str, float]] = {}
        self.left_out: dict[str, str] = {}
        self.choose()

    def random(self, *shape: int) -> Tensor:
        """Random numbers, as with zeros a GPU draws less power and is faster."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def share(self, what: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A matrix that all pieces of work of this shape use."""
        key = what, shape, dtype
        if key not in self.shared:
            self.shared[key] = self.random(*shape).to(dtype or self.dtype)
        return self.shared[key]

    def product(self, item: Product) -> Ways:
        rows, inner, columns = item.rows, item.inner, item.columns
        weight = self.random(columns, inner)
        if not item.fp8:
            x, out = self.share("x", rows, inner), self.share("out", rows, columns)
            return {
                "weight by output": partial(torch.mm, x, weight.T, out=out),
                "weight by input": partial(torch.mm, x, weight.view(inner, columns), out=out),
            }
        x, weight = self.share("x", rows, inner, dtype=FP8), weight.to(FP8)
        scale = torch.full((), inner**-0.5, device=self.device)
        by_row = scale.expand(rows, 1).contiguous(), torch.ones(1, columns, device=self.device)

        def scaled(scales: tuple[Tensor, Tensor], dtype: torch.dtype) -> Callable[[], object]:
            out = self.share("out", rows, columns, dtype=dtype)
            return partial(
                torch._scaled_mm, x, weight.T, *scales, out_dtype=dtype, use_fast_accum=True, out=out
            )  # fmt: skip

        of_all = scale, torch.ones_like(scale)
        ways = {"scales of rows": scaled(by_row, self.dtype), "one scale": scaled(of_all, self.dtype)}
        return ways | ({"one scale, rounded": scaled(of_all, FP8)} if item.rounded else {})

    def attention(self, item: Attention) -> Ways:
        keys, values = (
            self.share(what, item.batch, item.heads, item.keys, item.head_dim) for what in ("keys", "values")
        )
        query = self.share("queries", item.batch, item.heads, item.queries, item.head_dim)

        def attend(backend: SDPBackend) -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, keys, values)

        backends = BACKENDS if self.device.type == "cuda" else {"PyTorch": SDPBackend.MATH}
        return {name: partial(attend, backend) for name, backend in backends.items()}

    def choose(self) -> None:
        """Time the ways of each piece of work, all pieces of a kind in a row, and remember what failed and why."""
        for item in dict.fromkeys(self.work):
            alike = [ways for other, ways in zip(self.work, self.ways) if other == item]
            times: dict[str, float] = {}
            for name in alike[0]:
                try:
                    times[name] = self.time([ways[name] for ways in alike])
                except RuntimeError as error:
                    self.left_out[f"{item}, {name}"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if not times:
                raise RuntimeError(f"no library runs {item}: {self.left_out}")
            self.milliseconds[item] = times

    def time(self, runs: Sequence[Callable[[], object]]) -> float:
        """Milliseconds of each of some runs, one after the other."""

        def all_of_them() -> None:
            for run in runs:
                run()

        if self.device.type != "cuda":
            return compare_on_host({"": all_of_them}, 2)[""].median / len(runs)
        graph = captured(all_of_them)
        return statistics.median(elapsed(graph) for _ in range(TRIALS)) / len(runs)

    def run(self) -> None:
        """All of the work, each piece in the way that was the fastest."""
        for item, ways in zip(self.work, self.ways):
            times = self.milliseconds[item]
            ways[min(times, key=times.__getitem__)]()
