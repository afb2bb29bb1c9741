"""Block-causal models with the exact block cache, beside passes over whole sequences: one GPU, two to three minutes.

    python -m benchmarks.block_cache FOLDER              # writes FOLDER/block-cache.json
    python -m benchmarks.block_cache FOLDER --tiny       # small models on a CPU, to try it out

Weights are random, so that texts mean nothing; the passes are what they would be. Every block takes the same number of
steps. Tokens a second count the tokens that are written, and all passes. The cache is run with windows of one, two and
four blocks (`mdkern.engine.block_cached.FREE_COLUMNS` chooses between them); the last part times single passes over
windows of more columns.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import mdkern
from benchmarks.harness import GpuTimer, compare_on_host, environment, host_environment
from mdkern import Denoiser, DiT, DiTConfig
from mdkern.engine import block_cached
from mdkern.files import write_whole

STEPS_PER_BLOCK = 8


@dataclass(frozen=True)
class Case:
    """Sampling with and without the cache: `batch` texts of `length` tokens of which `prompt` are given."""

    model: str
    batch: int
    length: int
    prompt: int
    windows: tuple[int, ...] = (0, 1, 2, 4)  # blocks that a pass runs; 0: whole sequences
    rounds: int = 3


def dit(blocks: int, width: int, vocab: int, block_causal: int, length: int, device: str) -> Denoiser:
    """A DiT with random weights, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    config = DiTConfig(vocab, vocab - 1, None, length, blocks, width, max(1, width // 64), block_causal=block_causal)
    model = DiT(config)
    with torch.no_grad():
        model.head_weight.normal_(std=0.02)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return mdkern.adapt(model.to(device, dtype).eval())


def qwen3(sizes: dict[str, Any], block_causal: int, device: str) -> Denoiser:
    """Qwen3 of SDAR's shape with random weights, its attention made block-causal."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**sizes, tie_word_embeddings=False, max_position_embeddings=4096)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return mdkern.adapt(model, mask_id=config.vocab_size - 1, block_causal=block_causal)


SDAR_4B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MODELS: dict[str, Callable[[], Denoiser]] = {
    "DiT 12 x 768": partial(dit, 12, 768, 50_304, 32, 1024, "cuda"),
    "SDAR-4B's shape": partial(qwen3, SDAR_4B, 32, "cuda"),
}
CASES = [
    *(Case("DiT 12 x 768", batch, 1024, 100) for batch in (1, 8)),
    *(Case("SDAR-4B's shape", batch, 1024, 896) for batch in (1, 8)),
    *(Case("SDAR-4B's shape", batch, 1024, 128, (1, 2, 4), 1) for batch in (1, 8)),
]
TINY_MODELS: dict[str, Callable[[], Denoiser]] = {
    "DiT 2 x 64": partial(dit, 2, 64, 128, 8, 64, "cpu"),
    "Qwen3 2 x 64": partial(qwen3, SMALL, 8, "cpu"),
}
TINY_CASES = [Case(model, batch, 64, 20, (0, 1, 2), 1) for model in TINY_MODELS for batch in (1, 3)]


def prompts(denoiser: Denoiser, case: Case) -> torch.Tensor:
    """Random tokens, then masks."""
    ids = torch.randint(
        1, denoiser.vocab_size - 1, (case.batch, case.length), generator=torch.Generator().manual_seed(0)
    )
    ids[:, case.prompt :] = denoiser.mask_id
    return ids.to(denoiser.device)


def run(denoiser: Denoiser, case: Case) -> dict[str, Any]:
    """Seconds, tokens a second, passes and peak memory, by blocks of a pass; the runs take turns."""
    on_gpu = denoiser.device.type == "cuda"
    options: dict[str, Any] = {
        "input_ids": prompts(denoiser, case),
        "decoder": "top_probability",
        "steps_per_block": STEPS_PER_BLOCK,
        "batch_size": case.batch,
        "temperature": 0.0,
        "progress": False,
        "seed": 0,
    }
    seconds: dict[int, list[float]] = {blocks: [] for blocks in case.windows}
    found: dict[int, Any] = {blocks: {} for blocks in case.windows}
    for turn in range(case.rounds + 1):  # the first one captures and compiles
        for blocks in case.windows:
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            with patch.object(block_cached, "blocks_of_window", lambda _, blocks=blocks: blocks):
                out = mdkern.sample(denoiser, cache="block" if blocks else "none", **options)
            if on_gpu:
                torch.cuda.synchronize()
                found[blocks]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if turn:
                seconds[blocks].append(time.perf_counter() - began)
            assert out.nfe is not None
            assert out.sequences is not None
            commits = 0 if out.commits is None else int(out.commits["H"][0])
            found[blocks] |= {"passes": int(out.nfe["H"][0]), "commits": commits, "ids": out.sequences.cpu()}
    texts = {blocks: found[blocks].pop("ids") for blocks in case.windows}
    written, first = case.batch * (case.length - case.prompt), texts[case.windows[0]]
    for blocks in case.windows:
        found[blocks] |= {
            "seconds": seconds[blocks],
            "tokens_per_second": written / min(seconds[blocks]),
            "same_tokens": float((texts[blocks] == first).double().mean()),
        }
    return asdict(case) | {"by_window": found}


def passes(denoiser: Denoiser, batch: int, length: int, widths: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of a pass over a window of each width at the end of the text, whose last block is wanted."""
    block = denoiser.block_causal
    assert block is not None
    cache = torch.zeros(denoiser.cache_shape(batch, length), dtype=denoiser.dtype, device=denoiser.device)

    def contender(width: int) -> Callable[[], object]:
        columns = torch.arange(length - width, length, device=denoiser.device).expand(batch, -1)
        positions = torch.arange(width - block, width, device=denoiser.device).expand(batch, -1)
        return partial(denoiser.window_hidden, cache, columns % 100, columns, positions)

    contenders = {str(width): contender(width) for width in widths}
    with torch.no_grad():
        if denoiser.device.type == "cuda":
            timings = GpuTimer().compare(contenders, turns=2, rounds=9)
        else:
            timings = compare_on_host(contenders, 3)
    return {"batch": batch, "length": length, "milliseconds": {name: time.median for name, time in timings.items()}}


def measure(folder: Path, tiny: bool) -> dict[str, Any]:
    """Run all cases, write what there is after each, and go on after one that fails."""
    content: dict[str, Any] = {
        "versions": host_environment() if tiny else environment("transformers"),
        "steps_per_block": STEPS_PER_BLOCK,
        "sampling": [],
        "passes": [],
        "failed": [],
    }
    models, cases, length = (TINY_MODELS, TINY_CASES, 64) if tiny else (MODELS, CASES, 1024)
    for name, make in models.items():
        try:
            denoiser = make()
            block = denoiser.block_causal or 1
            jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
                ("sampling", partial(run, denoiser, case)) for case in cases if case.model == name
            ]
            widths = (block, 2 * block, length // 4, length)
            jobs += [("passes", partial(passes, denoiser, batch, length, widths)) for batch in (1, 8)]
        except Exception:
            traceback.print_exc()
            content["failed"].append(name)
            continue
        for part, job in jobs:
            began = time.perf_counter()
            try:
                content[part].append({"model": name} | job())
            except Exception:
                traceback.print_exc()
                content["failed"].append(f"{name}, {part}")
            print(f"{name}, {part}: {time.perf_counter() - began:.1f} s", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "block-cache.json", json.dumps(content, indent=1) + "\n")
        del denoiser, jobs, job
        mdkern.graphs.clear()
    return content


def table(content: dict[str, Any]) -> str:
    """What was measured, for a person."""
    lines = ["model             batch prompt blocks passes commits  seconds  tokens/s    GB  same"]
    for row in content["sampling"]:
        for blocks, kept in row["by_window"].items():
            lines.append(
                f"{row['model']:17} {row['batch']:5} {row['prompt']:6} {blocks or 'all':>6} {kept['passes']:6}"
                f" {kept['commits']:7} {min(kept['seconds']):8.3f} {kept['tokens_per_second']:9.0f}"
                f" {kept.get('peak_gb', 0.0):5.1f} {kept['same_tokens']:5.3f}"
            )
    for row in content["passes"]:
        times = ", ".join(f"{width}: {value:.3f}" for width, value in row["milliseconds"].items())
        lines.append(f"{row['model']}, batch {row['batch']}: milliseconds of a pass over so many columns: {times}")
    lines += [f"failed: {what}" for what in content["failed"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.block_cache", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU")
    arguments = parser.parse_args(argv)
    content = measure(arguments.folder, arguments.tiny)
    print(table(content))
    return 1 if content["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
