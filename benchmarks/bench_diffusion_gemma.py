"""DiffusionGemma at its true size with random weights: mdkern beside transformers' own ``generate``.

    python -m benchmarks.bench_diffusion_gemma FOLDER          # one GPU of 80 GB, a minute; FOLDER/diffusion-gemma.json
    python -m benchmarks.bench_diffusion_gemma FOLDER --tiny   # a small model on a CPU, to try it out

A canvas of 256 tokens after prompts of 64. No canvas ends early, so that every call takes all its steps; their time
contains the encoder's. Of each way the first call captures graphs and compiles kernels, and is not counted in the time.
Memory is that of all calls, the first one included, above the weights.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mdkern
from benchmarks.harness import RESULTS, environment, folder_command, host_environment
from benchmarks.kernel_tables import caption, markdown
from mdkern.engine import canvas_run
from mdkern.files import write_whole

TRUE_SIZES: dict[str, Any] = {
    "vocab_size": 262_144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512,
    "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 128, "top_k_experts": 8,
    "moe_intermediate_size": 704,
}  # fmt: skip
SMALL_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
    "sliding_window": 64, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
CANVAS, PROMPT = 256, 64
OURS, THEIRS = "mdkern", "transformers"
CASES = ((OURS, 1, 16, 3), (OURS, 8, 16, 3), (THEIRS, 1, 8, 2), (THEIRS, 8, 5, 2), (OURS, 32, 4, 1))  # steps, calls
TINY_CASES = ((OURS, 1, 2, 1), (THEIRS, 1, 2, 1), (OURS, 2, 2, 1))
KEPT = RESULTS / "diffusion-gemma.json"
ABSENT = "Not measured yet.\n"


def random_model(sizes: dict[str, Any], canvas: int, device: str) -> Any:
    """A DiffusionGemma with random weights. Its tower for images is tiny."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    vision = {"model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    config = DiffusionGemmaConfig(text_config=sizes, vision_config=vision, canvas_length=canvas)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = DiffusionGemmaForBlockDiffusion(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def one_canvas(model: Any, way: str, batch: int, steps: int) -> None:
    vocab, canvas = model.config.get_text_config().vocab_size, model.config.canvas_length
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (batch, PROMPT), generator=generator).to(model.lm_head.weight.device)
    options = {"max_new_tokens": canvas, "max_denoising_steps": steps, "confidence_threshold": 1e-9}
    if way == OURS:
        mdkern.sample_canvas(model, ids, batch_size=batch, seed=1, **options)
        return
    with torch.no_grad():
        model.generate(ids, **options)


def measure_case(model: Any, way: str, batch: int, steps: int, calls: int) -> dict[str, Any]:
    """Milliseconds a step of the first call and of later ones, and GiB above the weights."""
    device = model.lm_head.weight.device
    on_gpu = device.type == "cuda"
    canvas_run.clear()
    before = 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    found = []
    for _ in range(1 + calls):
        began = time.perf_counter()
        one_canvas(model, way, batch, steps)
        if on_gpu:
            torch.cuda.synchronize(device)
        found.append(1e3 * (time.perf_counter() - began) / steps)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else 0
    row = {"way": way, "batch": batch, "steps": steps, "first_ms": found[0], "ms": found[1:], "gib": peak / 2**30}
    workspace = canvas_run._kept.get(model)
    if way == OURS and workspace is not None and workspace.passes.found:
        row["device_ms"] = device_time(workspace)
    return row


def device_time(workspace: Any) -> float:
    """Milliseconds of a step alone: the median of replays of its graph."""
    graph, times = next(own.graph for key, own in workspace.passes.found.items() if key[0] == "step"), []
    for _ in range(5):
        workspace.state.step.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(folder: Path, tiny: bool) -> dict[str, Any]:
    """Run all cases, write what there is after each, and go on after one that fails."""
    sizes, cases = (SMALL_SIZES, TINY_CASES) if tiny else (TRUE_SIZES, CASES)
    model = random_model(sizes, 16 if tiny else CANVAS, "cpu" if tiny else "cuda")
    return measure_cases(
        model,
        sizes,
        cases,
        folder,
        host_environment() | {"triton": "–", "transformers": version("transformers")} if tiny else None,
    )


def measure_cases(
    model: Any, sizes: dict[str, Any], cases: Sequence[tuple[str, int, int, int]], folder: Path, host: Any = None
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "environment": host or environment("transformers"),
        "sizes": sizes,
        "canvas": model.config.canvas_length,
        "prompt": PROMPT,
        "rows": [],
        "failed": [],
    }
    for case in cases:
        job: Callable[[], dict[str, Any]] = partial(measure_case, model, *case)
        began = time.perf_counter()
        try:
            content["rows"].append(job())
        except Exception:
            traceback.print_exc()
            content["failed"].append(f"{case[0]}, {case[1]} texts")
        print(f"{case}: {time.perf_counter() - began:.1f} s", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "diffusion-gemma.json", json.dumps(content, indent=1) + "\n")
    return content


def table(content: dict[str, Any]) -> str:
    """Both ways at each number of texts."""
    sizes = content["sizes"]
    text = (
        f"{caption(content)}, transformers {content['environment']['transformers']}. {sizes['num_hidden_layers']} "
        f"layers of {sizes['num_experts']} experts, width {sizes['hidden_size']:,}, V = {sizes['vocab_size']:,}, "
        f"bfloat16, random weights; canvases of {content['canvas']} tokens after prompts of {content['prompt']}. "
        "Milliseconds a denoising step, the encoder's share included, medians; GiB above the weights.\n\n"
    )
    found = {(row["way"], row["batch"]): row for row in content["rows"]}
    body = []
    for batch in sorted({batch for _, batch in found}):
        ours, theirs = found.get((OURS, batch)), found.get((THEIRS, batch))
        times = [statistics.median(row["ms"]) if row else None for row in (ours, theirs)]
        body.append(
            [
                str(batch),
                *("–" if value is None else f"{value:.1f}" for value in times),
                "–" if None in times else f"{times[1] / times[0]:.1f} ×",  # type: ignore[operator]
                *("–" if row is None else f"{row['gib']:.2f}" for row in (ours, theirs)),
            ]
        )
    header = ["texts", f"{OURS}, ms", f"`{THEIRS}`, ms", "", f"{OURS}, GiB", f"`{THEIRS}`, GiB"]
    return text + markdown(header, body)


def diffusion_gemma() -> str:
    """The table of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    return folder_command("bench_diffusion_gemma", __doc__ or "", measure, table, argv)


if __name__ == "__main__":
    raise SystemExit(main())
