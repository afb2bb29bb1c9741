"""The whole sampler beside the samplers people run today, on the shipped pair: one run, rounds interleaved.

    pytest benchmarks/bench_sampling.py --benchmark-only -s
    pytest benchmarks/bench_sampling.py --benchmark-only -s --keep-results

The second writes ``benchmarks/results/sampling-<device>.json``: times, forward passes, device and versions. On a CPU
the first is a shorter run of fewer samples.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mdkern
from benchmarks.harness import processor, seconds, write_text_whole
from mdkern.profiling.eager import ddpm, ddpm_cache

SCHEDULES = {"all heavy": "H256", "25 % light": "L32 H192 L32", "all light": "L256"}
LENGTH = STEPS = 256
# Samples, rounds and schedules. On a CPU one baseline run takes minutes, and at 8 sequences its cache reuses next to
# nothing, so that `ddpm` alone stands for both.
DEVICES = {"cpu": (8, 3, ["25 % light"]), "cuda": (16, 3, list(SCHEDULES))}
SHOWN = DEVICES | {"cpu": (2, 1, ["25 % light"])}  # where the results are not kept


def versions(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "mdkern": mdkern.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


@pytest.mark.timeout(0)  # on a CPU a baseline run takes minutes
@pytest.mark.benchmark(group="whole sampler, shipped pair")
@pytest.mark.parametrize("device", DEVICES)
def test_sampler_against_ddpm(benchmark: Any, device: str, results: Path, kept: bool) -> None:
    """Seconds for all samples: ours, `ddpm`, `ddpm_cache`; the number shown by the benchmark is ours at 25 % light."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU's half of this benchmark is skipped")
    heavy, light, _ = mdkern.load_pair(device)
    samples, rounds, labels = (DEVICES if kept else SHOWN)[device]
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
                print(f"{device}, {label}, round {seed + 1} of {rounds}: {name} {took:.2f} s", flush=True)
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
    write_text_whole(results / f"sampling-{device}.json", json.dumps(content, indent=1) + "\n")
    shown = options if kept else options | {"num_samples": 1}
    benchmark.pedantic(
        lambda: mdkern.sample(models, SCHEDULES["25 % light"], **shown, seed=0, progress=False), rounds=1
    )
    benchmark.extra_info["ratios"] = {row["label"]: row["ratio"] for row in rows}
