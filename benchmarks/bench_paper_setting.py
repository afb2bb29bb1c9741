"""The clock follows the FLOPs: `mdkern.sample` at the paper's size beside an eager and a compiled baseline.

    pytest benchmarks/bench_paper_setting.py --benchmark-only --keep-results             # all parts: a few minutes
    pytest benchmarks/bench_paper_setting.py --benchmark-only --keep-results -k savings  # one part again

With ``--keep-results`` every part goes into ``benchmarks/results/paper-setting.json`` as soon as it is measured. A GPU
with 80 GB is needed: the eager baseline holds several copies of 824 million float32 logits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper_setting import PARTS, Bench, Size, keep


@pytest.fixture(scope="module")
def bench() -> Bench:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the paper's setting takes hours without one, so it is skipped")
    return Bench(Size(), "cuda")


@pytest.mark.benchmark(group="paper's setting")
@pytest.mark.parametrize("part", PARTS)
def test_part(benchmark: Any, bench: Bench, part: str, results: Path) -> None:
    """Measure a part and keep it; the benchmark's own number is how long that took."""

    def measure() -> None:
        began = time.perf_counter()
        content = PARTS[part](bench)
        keep(results / "paper-setting.json", part, content, time.perf_counter() - began)

    benchmark.pedantic(measure, rounds=1)
