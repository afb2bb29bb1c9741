"""The whole sampler beside the samplers people run today, on the shipped pair: one run, rounds interleaved.

    pytest benchmarks/bench_sampling.py --benchmark-only

Writes ``benchmarks/results/sampling-<device>.json``: medians and quartiles, forward passes, device and versions.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mdkern
from mdkern.profiling.eager import ddpm, ddpm_cache

RESULTS = Path(__file__).parent / "results"
SCHEDULES = {"all heavy": "H256", "25 % light": "L32 H192 L32", "all light": "L256"}
LENGTH = STEPS = 256
# Samples, rounds and schedules. On a CPU one baseline run takes minutes, and at 8 sequences its cache reuses next to
# nothing, so that `ddpm` alone stands for both.
DEVICES = {"cpu": (8, 3, ["25 % light"]), "cuda": (16, 3, list(SCHEDULES))}


def versions(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "mdkern": mdkern.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The CPU's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def write_text_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def seconds(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


@pytest.mark.timeout(0)  # on a CPU a baseline run takes minutes
@pytest.mark.benchmark(group="whole sampler, shipped pair")
@pytest.mark.parametrize("device", DEVICES)
def test_sampler_against_ddpm(benchmark: Any, device: str) -> None:
    """Seconds for all samples: ours, `ddpm`, `ddpm_cache`; the number shown by the benchmark is ours at 25 % light."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU's half of this benchmark is skipped")
    heavy, light, _ = mdkern.load_pair(device)
    samples, rounds, labels = DEVICES[device]
    models = {"H": heavy, "L": light}
    options: dict[str, Any] = {"num_samples": samples, "length": LENGTH, "steps": STEPS}
    rows = []
    for label in labels:
        schedule = SCHEDULES[label]
        contenders: dict[str, Callable[..., Any]] = {
            "mdkern": partial(mdkern.sample, models, schedule, progress=False, **options),
            "ddpm": partial(ddpm, models, schedule, **options),
            "ddpm_cache": partial(ddpm_cache, models, schedule, **options),
        }
        if device == "cpu":
            del contenders["ddpm_cache"]
        else:
            contenders["mdkern without graphs"] = partial(contenders["mdkern"], cuda_graphs=False)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        if device == "cuda":  # warm-up
            for contender in contenders.values():
                contender(seed=0)
        for seed in range(rounds):
            for name, contender in contenders.items():
                took, result = seconds(partial(contender, seed=seed), device)
                times[name].append(took)
                if name == "mdkern":
                    nfe = {model: float(count.double().mean()) for model, count in result.nfe.items()}
        median = {name: statistics.median(values) for name, values in times.items()}
        rows.append(
            {
                "label": label,
                "schedule": schedule,
                "nfe_per_sequence": nfe,
                "seconds": times,
                "median": median,
                "ratio": {name: value / median["mdkern"] for name, value in median.items() if name != "mdkern"},
                "flops_saved": mdkern.Schedule(schedule).saved(
                    {"H": heavy.flops(LENGTH, 2), "L": light.flops(LENGTH, 2)}
                ),
            }
        )
    content = {"versions": versions(device), **options, "rows": rows}
    write_text_whole(RESULTS / f"sampling-{device}.json", json.dumps(content, indent=1) + "\n")
    benchmark.pedantic(
        lambda: mdkern.sample(models, SCHEDULES["25 % light"], **options, seed=0, progress=False), rounds=1
    )
    benchmark.extra_info["ratios"] = {row["label"]: row["ratio"] for row in rows}
