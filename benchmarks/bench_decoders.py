"""Every decoder beside the loop that its public code runs, at three sizes; and what caches do to the text.

    python -m benchmarks.bench_decoders                        # all parts: about two minutes on an H100
    python -m benchmarks.bench_decoders --parts pair --anew    # one part again
    pytest benchmarks/bench_decoders.py --benchmark-only -s    # the same, only shown

Every row goes into ``benchmarks/results/decoders.json`` as soon as it is measured, so that a run may be cut off and
gone on with: rows that the same machine has measured are not measured again. A GPU with 80 GB is needed: LLaDA-8B's
weights take 14 GiB, and the plain loops hold several copies of all logits in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.decoder_setting import PARTS, Bench, Row, Size, run_part
from benchmarks.harness import RESULTS, environment, write_text_whole
from mdkern.engine import graphs

FILE = RESULTS / "decoders.json"


def read(path: Path) -> dict[str, Any]:
    """What this machine, with these versions, has measured: ``{"environment": ..., "parts": {part: {name: row}}}``."""
    known = environment()
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("environment") == known else {"environment": known, "parts": {}}


def measure(
    bench: Bench, parts: Sequence[str], path: Path, limit: float = float("inf"), anew: bool = False
) -> dict[str, str]:
    """Measure what is missing, for about `limit` seconds; returns what was left out, and why."""
    until, left = time.monotonic() + limit, dict[str, str]()
    for part in parts:
        missed = measure_part(bench, part, path, until, anew)
        left |= {f"{part}, {name}": reason for name, reason in missed.items()}
        graphs.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for name, reason in left.items():
        print(f"{name}: left out, {reason}", flush=True)
    return left


def measure_part(bench: Bench, part: str, path: Path, until: float, anew: bool) -> dict[str, str]:
    record = read(path)
    rows: dict[str, Row] = {} if anew else record["parts"].get(part, {})
    began = time.monotonic()

    def keep(name: str, row: Row) -> None:
        nonlocal began
        rows[name] = row | {"took": time.monotonic() - began}
        record["parts"][part] = rows
        write_text_whole(path, json.dumps(record, indent=1) + "\n")
        print(f"{part}, {name}: {short(row)} [{rows[name]['took']:.1f} s]", flush=True)
        began = time.monotonic()

    return run_part(bench, part, set(rows), keep, until)


def short(row: Row) -> str:
    if "differ" in row:
        return f"{row['tokens_per_second']:,.0f} tokens/s, {row['differ']:.0%} differ, {row['loss']:.3f} nats"
    if "plain" not in row:
        return f"{row['way']} {row['tokens_per_second']:,.0f} tokens/s, peak {row.get('peak_gib', 0.0):.1f} GiB"
    ours, theirs = row["ours"], row["plain"]
    text = (
        f"{ours['passes']:.0f} passes, {ours['tokens_per_second']:,.0f} tokens/s, {row['ratio']:.2f} x the plain loop"
    )
    return text + (f", judge {ours['perplexity']:.1f} ({theirs['perplexity']:.1f})" if "perplexity" in ours else "")


@pytest.mark.timeout(0)
@pytest.mark.benchmark(group="decoders")
@pytest.mark.parametrize("part", PARTS)
def test_part(benchmark: Any, part: str, results: Path) -> None:
    """Measure what is missing of a part; the benchmark's own number is how long that took."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the plain loops take hours without one, so they are skipped")
    left = benchmark.pedantic(measure, (Bench(Size(), torch.device("cuda")), [part], results / FILE.name), rounds=1)
    assert not left


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_decoders", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="in this order")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--anew", action="store_true", help="measure again what is there")
    parser.add_argument("--output", type=Path, default=FILE)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the plain loops take hours without one, so nothing is measured", file=sys.stderr)
        return 0
    bench = Bench(Size(), torch.device("cuda"))
    return int(bool(measure(bench, arguments.parts, arguments.output, arguments.seconds, arguments.anew)))


if __name__ == "__main__":
    sys.exit(main())
