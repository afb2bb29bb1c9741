"""Problems for the kernels' tests, and what their answers must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdkern.kernels import RowStatistics, vocab_projection
from mdkern.kernels.head import reference
from mdkern.kernels.head.arguments import NO_FILTERS, Head, Rows, Wanted

SEED = 987654321012345
NAMES = ("log_prob", "top1", "top2", "entropy", "logsumexp")  # of the statistics, as the operator returns them


@dataclass
class Problem:
    """Random rows, weights and keys for `vocab_projection`, and float64 answers."""

    rows: int = 20
    columns: int = 777
    depth: int = 96
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    biased: bool = False
    from_logits: bool = False
    spread: float = 2.0  # standard deviation of the logits
    temperature: str = "mixed"  # greedy, one, mixed
    count: int | None = None
    of: str = "model"
    float8: bool = False  # whether the weight is in float8, with a scale for each id
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.rows * 31 + self.columns)
        source, width = self.rows + 9, self.columns if self.from_logits else self.depth

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype).to(self.device)

        self.hidden = normal(source, width, scale=self.spread if self.from_logits else 1.0)
        self.weight = None if self.from_logits else normal(self.columns, width, scale=self.spread / width**0.5)
        self.weight_scale = None
        if self.float8:
            self.weight, self.weight_scale = in_float8(self.weight)
        self.bias = None
        if self.biased:
            self.bias = torch.randn(self.columns, generator=generator)
            self.bias[torch.randint(0, self.columns, (self.columns // 5,), generator=generator)] = -torch.inf
            self.bias[-1] = -torch.inf
            self.bias = self.bias.to(self.device)
        self.row_index = torch.randperm(source, generator=generator)[: self.rows].to(self.device)
        number = torch.arange(self.rows)
        self.keys = torch.stack((number // 7 + 3, number % 7, number % 5 + 1), 1).to(self.device)
        self.seed = torch.tensor(SEED, device=self.device)
        pattern = {"greedy": [0.0], "one": [1.0], "mixed": [1.0, 0.0, 0.5, 2.0, 1.0, 1.0]}[self.temperature]
        self.temperatures = torch.tensor(pattern).repeat(self.rows)[: self.rows].to(self.device)
        self.row_count = None if self.count is None else torch.tensor(self.count, device=self.device)

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        rows = self.hidden[self.row_index].to(dtype)
        product = rows if self.weight is None else rows @ self.weight.to(dtype).T
        product = product if self.weight_scale is None else product * self.weight_scale.to(dtype)
        product = product * self.options.get("scale", 1.0)
        cap = self.options.get("soft_cap", 0.0)
        product = cap * torch.tanh(product / cap) if cap else product
        product = product if self.bias is None else product + self.bias.to(dtype)
        if self.of == "sampler":
            product = product / self.temperatures.masked_fill(self.temperatures == 0, 1.0)[:, None].to(dtype)
        return product

    def run(self, **changes: Any) -> RowStatistics:
        wanted = {"want_top": True, "want_entropy": True, "want_argmax": True, "of": self.of}
        arguments = {"row_count": self.row_count, "weight_scale": self.weight_scale} | wanted | self.options | changes
        temperature = arguments.pop("temperature", self.temperatures)
        return vocab_projection(
            self.hidden, self.weight, self.bias, self.row_index, temperature, self.seed, self.keys, **arguments
        )

    def arguments(self, uniform: bool = False) -> tuple[Tensor, Head, Rows, Wanted]:
        """Of the implementations behind the operator, without filters."""
        temperature = None if uniform else self.temperatures
        uniform_temperature = float(self.temperatures[0]) if uniform and self.rows else 1.0
        scale, cap = self.options.get("scale", 1.0), self.options.get("soft_cap", 0.0)
        rows = Rows(self.row_index, self.row_count, temperature, uniform_temperature, self.seed, self.keys)
        return (
            self.hidden,
            Head(self.weight, self.bias, scale, cap, self.weight_scale),
            rows,
            Wanted(True, True, self.of, True),
        )


# What `opcheck` can look at where a tensor is in float8: its check of the schema multiplies all of them.
FLOAT8_CHECKS = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


def in_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[V, D]`` in float8_e4m3fn, and the scale of each row, by which its largest entry is 448."""
    scale = weight.float().abs().amax(1) / 448.0
    return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def flat(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Bundles laid out, as the operator itself takes them."""
    return tuple(part for argument in arguments for part in (argument if isinstance(argument, tuple) else (argument,)))


def exact_statistics(logits: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    """log-probability, top-1, top-2, entropy, logsumexp, from float64 logits."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    top = p.topk(2, -1).values
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return log_p.gather(1, token[:, None])[:, 0], top[:, 0], top[:, 1], entropy, logits.logsumexp(-1)


def check_against_reference(problem: Problem, got: tuple[Tensor, ...], differing: int = 0) -> None:
    """Tokens are the reference's (but for `differing` near-ties), statistics float64's to float32 accuracy."""
    count = problem.rows if problem.count is None else problem.count
    token, statistics = got[0].cpu(), [value.cpu() for value in got[1:]]
    want = reference.vocab_projection(*problem.arguments(), NO_FILTERS)  # on a GPU too, where it is plain PyTorch
    assert int((token[:count] != want[0].cpu()[:count]).sum()) <= differing
    assert (token[count:] == -1).all()
    best = problem.logits()[:count].cpu().topk(2, -1)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-4  # elsewhere rounding may choose the other
    argmax = got[6].cpu()
    assert torch.equal(argmax[:count][clear], best.indices[:, 0][clear])
    assert (argmax[count:] == -1).all()
    exact = [value.cpu() for value in exact_statistics(problem.logits()[:count], got[0][:count])]
    for name, value, truth in zip(("log_prob", "top1", "top2", "entropy", "logsumexp"), statistics, exact):
        assert value[count:].isnan().all(), name
        torch.testing.assert_close(value[:count].double(), truth, rtol=2e-5, atol=2e-5, msg=name)
