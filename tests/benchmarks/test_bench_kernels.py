"""The kernels' benchmarks write down why a peer is missing and what a call takes, and their tables can be drawn."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import bench_vocab_projection, kernel_tables
from benchmarks.bench_vocab_projection import GEMM, SAMPLED, SHAPES, Problem, Shape, contenders, working


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def failing() -> None:
    raise RuntimeError("no such kernel")


@pytest.mark.usefixtures("without_gpu")
def test_a_peer_that_fails_is_left_out_and_says_why() -> None:
    with pytest.warns(UserWarning, match="peer is left out: RuntimeError: no such kernel"):
        runs, left_out = working({GEMM: lambda: None, "peer": failing})
    assert list(runs) == [GEMM]
    assert left_out == {"peer": "RuntimeError: no such kernel"}


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("name", [GEMM, SAMPLED])
def test_ours_and_the_gemm_may_not_fail(name: str) -> None:
    with pytest.raises(RuntimeError, match="no such kernel"):
        working({name: failing})


def install(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """A package `flashinfer` whose `sampling` holds `functions`."""
    modules = ModuleType("flashinfer"), ModuleType("flashinfer.sampling")
    vars(modules[1]).update(functions)
    monkeypatch.setattr(bench_vocab_projection.importlib.util, "find_spec", lambda name: name == "flashinfer")
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_flashinfer_gets_the_padded_logits_and_numbers_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampling_from_logits(logits: Tensor, *, seed: Tensor, offset: Tensor) -> Tensor:
        assert logits.shape == (4, 128)
        for number in (seed, offset):
            assert number.shape == (1,)
            assert number.dtype == torch.int64
            assert number.device == logits.device
        return logits.argmax(-1)

    pytest.importorskip("triton")
    install(monkeypatch, sampling_from_logits=sampling_from_logits)
    problem = Problem(Shape(100, 32, (4,)), 4, "cpu", torch.float32)
    token = contenders(problem, SHAPES[1])["GEMM + FlashInfer"]()
    assert torch.equal(token, F.linear(problem.hidden, problem.padded).argmax(-1))


@pytest.mark.usefixtures("without_gpu")
def test_a_broken_flashinfer_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    install(monkeypatch)  # without the function that the benchmark imports
    runs = contenders(Problem(Shape(100, 32, (4,)), 4, "cpu", torch.float32), SHAPES[1])
    with pytest.warns(UserWarning, match="left out"):
        kept, left_out = working({name: runs[name] for name in (GEMM, "GEMM + FlashInfer")})
    assert list(kept) == [GEMM]
    assert left_out["GEMM + FlashInfer"].startswith("ImportError")


def test_the_table_tells_times_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column for every contender, a dash where one was left out, and a line of memory for the most rows."""

    def row(rows: int, times: dict[str, float]) -> dict[str, Any]:
        milliseconds = {name: {"median": time} for name, time in times.items()}
        return {"columns": 100, "depth": 32, "rows": rows, "ms": milliseconds, "peak_mib": {GEMM: 1234.5 * rows}}

    table = [row(1, {SAMPLED: 0.3, GEMM: 0.2, "peer": 0.5}), row(2, {SAMPLED: 0.5, GEMM: 0.4})]
    environment = {"device": "a card", "torch": "2", "triton": "3"}
    monkeypatch.setattr(kernel_tables, "load", lambda _: {"environment": environment, "table": table})
    text = kernel_tables.vocab_projection()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[2:] == ["| 1 | 300.0 (1.50 ×) | 200.0 | 500.0 |", "| 2 | 500.0 (1.25 ×) | 400.0 | – |"]
    assert f"one call at 2 rows, outputs included: {GEMM} 2,469.0 MiB." in text


@pytest.mark.gpu
def test_peak_memory_counts_what_a_call_gives_back_and_what_it_returns() -> None:
    def run() -> Tensor:
        return torch.empty(16 << 20, dtype=torch.uint8, device="cuda").float()  # 16 MiB, then 64 beside it

    run()
    assert 80 <= bench_vocab_projection.peak_mib(run) < 82  # the allocator may leave a block a little too large


@pytest.mark.parametrize("draw", ["plot_vocab_projection", "plot_select"])
def test_a_line_has_one_colour_in_every_panel(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a legend names each line once."""
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    getattr(kernel_tables, draw)()
    (figure,) = drawn
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    looks = {(line.get_label(), line.get_color(), line.get_linestyle()) for line in lines}
    labels = [label for label, *_ in looks]
    assert len(set(labels)) == len(labels) == len({look[1:] for look in looks}) < len(lines)
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(labels)
