"""Are learned exponents of GenMD4 worth anything on prose, and are they soon fitted to noise?

    python -m benchmarks.learning.exponents --data train.bin --valid test.bin --device cuda --size full

`training.exponents` for the shipped heavy model, on all of a text and on little of it: the bound with the exponents,
less that with w = 1, on the text that they were fitted to and on text that is held out. Token files are those of
`training.data`, made with the shipped tokenizer. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import RESULTS, environment, host_environment, write_text_whole
from mdkern import load_pair
from mdkern.models import Denoiser, adapt
from training.batches import Array, even_windows, random_windows, step_generator
from training.data import open_pair
from training.exponents import compare, losses_of, train
from training.options import command_parser

EVALUATION_STREAM = 8  # of `step_generator`: windows of the text that was trained on


@dataclass(frozen=True)
class Size:
    """How much of everything; by default what docs/learning.md is made with."""

    windows: tuple[int, ...] = (0, 256, 32)  # of the text that are trained on; 0: all
    seeds: int = 2
    length: int = 256
    steps: int = 1000
    batch_size: int = 128
    lr: float = 0.01
    evaluated: int = 4096  # windows


SIZES = {
    "full": Size(),
    "small": Size(windows=(0, 16), length=64, steps=300, batch_size=8, evaluated=512),
    "tiny": Size(windows=(0, 2), seeds=1, length=16, steps=4, batch_size=4, evaluated=8),
}


def run(denoiser: Denoiser, tokens: Array, valid: Array, size: Size, seed: int) -> dict[str, Any]:
    """Exponents learned on `tokens`, and what they are worth there and on `valid`."""
    losses = losses_of(denoiser)

    def on_device(windows: Array) -> Tensor:
        return torch.from_numpy(windows.astype(np.int64)).to(denoiser.device)

    def draw(count: int, generator: np.random.Generator) -> Tensor:
        return on_device(random_windows(tokens, count, size.length, generator))

    exponents = train(
        losses, lambda generator: draw(size.batch_size, generator), size.length, seed, size.steps, size.lr
    )
    seen = {
        "train": draw(size.evaluated, step_generator(seed, 0, EVALUATION_STREAM)),
        "held out": on_device(even_windows(valid, size.evaluated, size.length)),
    }
    found: dict[str, Any] = {name: compare(losses, ids, exponents, seed, size.batch_size) for name, ids in seen.items()}
    return found | {"exponents": exponents.tolist()}


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.learning.exponents", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="training token file (.bin)")
    parser.add_argument("--valid", type=Path, required=True, help="held-out token file (.bin)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small", help="(default: small, minutes on a CPU)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="(default: full: benchmarks/results, else runs/)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are not in the file yet, each kept as soon as it is done."""
    parser = build_parser()
    asked = parser.parse_args(arguments)
    size, device = SIZES[asked.size], torch.device(asked.device)
    path = asked.output or (RESULTS if asked.size == "full" else Path("runs")) / "learning-exponents.json"
    try:
        (tokens, info), (valid, _) = open_pair(asked.data, asked.valid)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    denoiser = adapt(load_pair(device, torch.bfloat16 if device.type == "cuda" else torch.float32).heavy)
    if (denoiser.vocab_size, denoiser.mask_id) != (info.vocab_size, info.mask_id):
        parser.error(f"{asked.data} was made with another tokenizer than the shipped one")
    setting = json.loads(json.dumps(asdict(size))) | {"data_sha256": info.sha256, "tokens": info.count}
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"setting": setting, "runs": []}
    if content["setting"] != setting:
        parser.error(f"{path} has another setting: give another --output")
    there = {(known["windows"], known["seed"]) for known in content["runs"]}
    for windows in size.windows:
        for seed in range(size.seeds):
            if (windows, seed) in there:
                continue
            start = time.monotonic()
            found = run(denoiser, tokens[: windows * size.length] if windows else tokens, valid, size, seed)
            machine = environment() if device.type == "cuda" else host_environment()
            entry = {"windows": windows, "seed": seed, "environment": machine, "seconds": time.monotonic() - start}
            content["runs"].append(entry | found)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_whole(path, json.dumps(content, indent=1) + "\n")
            print(f"{windows or 'all'} windows, seed {seed}: " + "; ".join(
                f"{name} {found[name]['difference']:+.4f} ± {found[name]['standard_error']:.4f} nats a token"
                for name in ("train", "held out")
            ) + f", {entry['seconds']:.0f} s", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
