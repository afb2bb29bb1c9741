"""The vocabulary projection beside the padded GEMM alone, what people run today, and the nearest published kernels.

    pytest benchmarks/bench_vocab_projection.py --benchmark-only

With ``--keep-results`` it writes ``benchmarks/results/vocab_projection.json``, on a CPU ``vocab_projection-cpu.json``.
Ours returns the token, its log-probability, the two largest probabilities, the entropy and the logsumexp; every peer
returns less. FlashInfer and cut-cross-entropy take part where they are installed; FlashInfer's first call compiles its
sampler where ``flashinfer-jit-cache`` lacks it.
Peers may draw a column of the padding: only their time is compared. A row of the table holds ``ms``, milliseconds;
``peak_mib``, the most memory that one call takes at a time; and ``left_out``, why a peer has neither.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import GpuTimer, compare_on_host, environment, host_environment, write_text_whole
from mdkern.kernels import vocab_projection


@dataclass(frozen=True)
class Shape:
    columns: int
    depth: int
    rows: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"V = {self.columns:,}, D = {self.depth}"


SHAPES = (
    Shape(50_258, 768, (1, 16, 64, 128, 256, 512, 1024, 4096, 16_384)),
    Shape(126_464, 4096, (1, 16, 64, 1024, 4096, 16_384)),
)
COMPILED_ROWS = (16, 1024, 16_384)  # torch.compile takes many seconds for each
GREEDY, SAMPLED, MIXED = "mdkern, greedy", "mdkern, sampled", "mdkern, a temperature per row"
GEMM = "cuBLAS GEMM, V padded"
Runs = dict[str, Callable[[], object]]
INSTALLED = {"flashinfer": "flashinfer-python", "cut_cross_entropy": "cut-cross-entropy"}  # module: distribution


class Problem:
    def __init__(self, shape: Shape, rows: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(rows)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, device=device, generator=generator) * scale).to(dtype)

        self.source = normal(max(64, 2 * rows), shape.depth)
        self.row_index = torch.randperm(len(self.source), device=device, generator=generator)[:rows].sort().values
        self.hidden = self.source[self.row_index]
        self.weight = normal(shape.columns, shape.depth, scale=2.0 / shape.depth**0.5)
        self.padded = F.pad(self.weight, (0, 0, 0, -shape.columns % 64))
        self.bias = torch.zeros(shape.columns, device=device)
        self.bias[-1] = -torch.inf
        self.ones = torch.ones(rows, device=device)
        self.seed = torch.tensor(1, device=device)
        number = torch.arange(rows, device=device)
        self.keys = torch.stack((number // 1024, number % 1024, number * 0), 1)

    def ours(self, temperature: float | Tensor, bias: Tensor | None = None) -> object:
        return vocab_projection(
            self.source,
            self.weight,
            bias,
            self.row_index,
            temperature,
            self.seed,
            self.keys,
            want_top=True,
            want_entropy=True,
        )


def plain_sampler(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Token and its log-probability as people write it: float32 logits, Gumbel-max."""
    logits = F.linear(hidden, weight).float()
    noise = -torch.log(-torch.log(torch.rand_like(logits)))
    token = (logits + noise).argmax(-1)
    return token, logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)


def gemm_and_flashinfer(hidden: Tensor, weight: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
    """Token, int32 ``[M]``, as serving stacks draw it: logits in memory, then one kernel for Gumbel-max.

    ``seed`` and ``offset`` are int64 ``[1]`` on the device, as a captured graph needs them. FlashInfer copies the
    logits to float32. The import stands here, for a broken installation to leave out this peer alone.
    """
    from flashinfer.sampling import sampling_from_logits

    token: Tensor = sampling_from_logits(F.linear(hidden, weight), seed=seed, offset=offset)
    return token


def cce_logsumexp(source: Tensor, weight: Tensor, row_index: Tensor) -> Tensor:
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    logsumexp: Tensor = cce_lse_forward_kernel(source, weight, valids=row_index)
    return logsumexp


def contenders(problem: Problem, shape: Shape) -> Runs:
    from benchmarks import flash_sampling

    hidden, weight, padded = problem.hidden, problem.weight, problem.padded
    runs: Runs = {
        SAMPLED: lambda: problem.ours(1.0),
        GEMM: lambda: F.linear(hidden, padded),
        "PyTorch eager": lambda: plain_sampler(hidden, padded),
        "FlashSampling-style": lambda: flash_sampling.sample(hidden, weight, 7),
    }
    if shape is SHAPES[0]:
        runs[GREEDY] = lambda: problem.ours(0.0)
        runs[MIXED] = lambda: problem.ours(problem.ones, problem.bias)
    if shape is SHAPES[0] and len(hidden) in COMPILED_ROWS:
        compiled = torch.compile(plain_sampler, dynamic=False)
        runs["torch.compile"] = lambda: compiled(hidden, padded)
    if importlib.util.find_spec("flashinfer"):
        seed = problem.seed.view(1)
        offset = torch.zeros_like(seed)
        runs["GEMM + FlashInfer"] = lambda: gemm_and_flashinfer(hidden, padded, seed, offset)
    if importlib.util.find_spec("cut_cross_entropy"):
        runs["CCE, logsumexp only"] = lambda: cce_logsumexp(problem.source, weight, problem.row_index)
    return runs


@pytest.mark.benchmark(group="vocabulary projection")
def test_on_gpu(benchmark: Any, results: Path) -> None:
    """Every contender at every shape and number of rows; the benchmark itself shows ours at 1,024 rows of the first."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels' benchmark is skipped")
    timer = GpuTimer()
    table: list[dict[str, Any]] = []
    for shape in SHAPES:
        for rows in shape.rows:
            problem = Problem(shape, rows, "cuda", torch.bfloat16)
            torch._dynamo.reset()
            heavy = rows * shape.columns * shape.depth > 1e11
            runs, left_out = working(contenders(problem, shape))
            peaks = {name: peak_mib(run) for name, run in runs.items()}
            times = timer.compare(runs, turns=1 if heavy else 8, rounds=7 if heavy else 11)
            milliseconds = {name: timing.as_dict() for name, timing in times.items()}
            measured = {"ms": milliseconds, "peak_mib": peaks, "left_out": left_out}
            table.append({"columns": shape.columns, "depth": shape.depth, "rows": rows, **measured})
            write_result(results, table)
            if shape is SHAPES[0] and rows == 1024:
                benchmark.pedantic(timed, args=(problem,), rounds=20, warmup_rounds=3)
    benchmark.extra_info["table"] = table
    for row in table:
        ours, floor = row["ms"][SAMPLED]["median"], row["ms"][GEMM]["median"]
        assert ours < 2 * floor, f"{row['rows']} rows: {ours:.3f} ms, against {floor:.3f} ms of the GEMM alone"


def working(runs: Runs) -> tuple[Runs, dict[str, str]]:
    """Those that run here, after a first call each, and why the others do not; ours and the GEMM must."""
    left_out = {}
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            if name == GEMM or name.startswith("mdkern"):
                raise
            left_out[name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"{name} is left out: {left_out[name]}", stacklevel=1)
    return {name: run for name, run in runs.items() if name not in left_out}, left_out


def peak_mib(run: Callable[[], object]) -> float:
    """MiB that one call takes at most at a time, its outputs included; what an earlier call has kept does not count."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def timed(problem: Problem) -> None:
    problem.ours(1.0)
    torch.cuda.synchronize()


def write_result(results: Path, table: list[dict[str, Any]]) -> None:
    peers = {module: version(name) for module, name in INSTALLED.items() if importlib.util.find_spec(module)}
    record = {"environment": environment() | peers, "table": table}
    write_text_whole(results / "vocab_projection.json", json.dumps(record, indent=1) + "\n")


@pytest.mark.benchmark(group="vocabulary projection, CPU")
def test_on_cpu(benchmark: Any, results: Path) -> None:
    """The reference that runs without a GPU: what its exactness and statistics cost there, at 16 rows."""
    shape = SHAPES[0]
    problem = Problem(shape, 16, "cpu", torch.float32)
    runs: Runs = {
        SAMPLED: lambda: problem.ours(1.0),
        GREEDY: lambda: problem.ours(0.0),
        "PyTorch eager": lambda: plain_sampler(problem.hidden, problem.weight),
    }
    times = compare_on_host(runs, 11)
    print("output layer on the CPU: " + ", ".join(f"{n} {t.median:.1f} ms" for n, t in times.items()), flush=True)
    milliseconds = {name: timing.as_dict() for name, timing in times.items()}
    row = {"columns": shape.columns, "depth": shape.depth, "rows": 16, "ms": milliseconds}
    record = {"environment": host_environment(), "table": [row]}
    write_text_whole(results / "vocab_projection-cpu.json", json.dumps(record, indent=1) + "\n")
    benchmark.pedantic(runs[SAMPLED], rounds=5, warmup_rounds=1)
