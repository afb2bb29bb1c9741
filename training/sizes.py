"""Sizes of a training run: presets, the choice by data and machine, and the memory that training takes."""

from __future__ import annotations

import argparse
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch

from mdkern.models import DiT, DiTConfig
from training.loop import World

log = logging.getLogger(__name__)

# tiny: minutes on two CPU cores. small: the shipped pair's heavy model. mdlm: the size that MDLM publishes.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "blocks": 4, "width": 128, "heads": 4, "length": 64, "tokens": 2e6, "batch_size": 32, "optimizer": "muon",
        "lr": 4e-3, "muon_lr": 1e-2, "schedule": "cosine", "warmup": 50, "ema_decay": 0.99, "weight_decay": 0.05,
        "eval_samples": 1024,
    },
    "small": {
        "blocks": 12, "width": 192, "heads": 3, "length": 256, "tokens": 2e9, "batch_size": 512, "optimizer": "muon",
        "lr": 4e-3, "muon_lr": 6e-3, "schedule": "cosine", "warmup": 300, "ema_decay": 0.999, "weight_decay": 0.05,
        "eval_samples": 8192,
    },
    "mdlm": {
        "blocks": 12, "width": 768, "heads": 12, "length": 1024, "tokens": 2e9, "batch_size": 512, "optimizer": "adamw",
        "lr": 3e-4, "muon_lr": None, "schedule": "constant", "warmup": 2500, "ema_decay": 0.9999, "weight_decay": 0.0,
        "eval_samples": 8192,
    },
}  # fmt: skip
MOST_EPOCHS = 100  # most passes over the data, each with other masks, that a preset's number of tokens may amount to
ENOUGH_FOR_MDLM = 200_000_000  # tokens of data
SHARE_OF_MEMORY = 0.7  # share of the free memory that a run may use
PROCESS = 500 << 20  # bytes of the interpreter and its libraries


def choose_sizes(args: argparse.Namespace, data_tokens: int, valid_tokens: int) -> None:
    """Fill in the settings that were not given, from the preset, which ``auto`` chooses by the device and the data."""
    preset = args.preset
    if preset == "auto":
        on_gpu = torch.device(args.device).type == "cuda"
        preset = ("mdlm" if data_tokens >= ENOUGH_FOR_MDLM else "small") if on_gpu else "tiny"
    chosen = dict(PRESETS[preset])
    chosen["tokens"] = min(chosen["tokens"], MOST_EPOCHS * data_tokens)
    chosen["length"] = min(chosen["length"], data_tokens, valid_tokens)
    steps = (args.tokens or chosen["tokens"]) / ((args.batch_size or chosen["batch_size"]) * chosen["length"])
    chosen["warmup"] = min(chosen["warmup"], int(steps / 5))
    if args.optimizer == "adamw" and preset != "mdlm" and args.lr is None:
        chosen["lr"] = 1e-3
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    log.info("preset %s: %d blocks of width %d, windows of %d tokens", preset, args.blocks, args.width, args.length)


def parameter_count(config: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(config).parameters())


def training_bytes(config: DiTConfig, length: int, sequences: int, device: str) -> int:
    """An estimate of the most memory that training takes with so many sequences in a micro-batch.

    Weights, gradients, both moments, the average and its copy at the end are six float32 numbers for each parameter.
    For the backward pass, a block keeps ``16 + 2 mlp_ratio`` numbers for each token and unit of width. Half of the
    tokens, the masked ones, have logits, their softmax and its gradient. The passes of block-causal models are twice as
    long.
    """
    half = torch.device(device).type == "cuda"
    number = 2 if half else 4
    tokens = sequences * length
    columns = tokens if config.block_causal is None else 2 * tokens
    kept = columns * config.num_blocks * config.width * (16 + 2 * config.mlp_ratio) * number
    logits = (tokens // 2 + length) * config.padded_vocab_size * (8 + number)
    return PROCESS + 24 * parameter_count(config) + kept + logits


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device; on a CPU, what the system and the process's control group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):
        if "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return max(0, min(found)) if found else None


def fit_memory(args: argparse.Namespace, config: DiTConfig, world: World) -> None:
    """Split the batch into as many micro-batches as the memory requires.

    Raises:
        ValueError: not even one sequence at a time fits, or the given number of micro-batches is too small.
    """
    device, processes = world.device, world.size
    free = available_bytes(device)
    room = math.inf if free is None else free
    shard = max(1, args.batch_size // processes)
    sharing = processes if device.type == "cpu" else 1
    splits = [args.grad_accum] if args.grad_accum else [n for n in range(1, shard + 1) if shard % n == 0]
    for split in splits:
        needed = sharing * training_bytes(config, args.length, -(-shard // split), device.type)
        if needed <= SHARE_OF_MEMORY * room:
            break
    else:
        raise ValueError(
            f"training would take about {needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free: choose a smaller"
            " --preset, --width, --blocks or --length" + (", or a larger --grad-accum" if args.grad_accum else "")
        )
    args.grad_accum = split = world.largest(split)[0]
    log.info(
        "about %.1f GB of memory%s, %d micro-batches of %d sequences a step",
        needed / 1e9,
        "" if free is None else f" of {room / 1e9:.1f} GB free",
        split,
        -(-shard // split),
    )
