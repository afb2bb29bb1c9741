"""DiffusionGemma at its true size with random weights: mdkern beside transformers' own ``generate``.

    python -m benchmarks.bench_diffusion_gemma FOLDER          # one GPU of 80 GB, two minutes
    python -m benchmarks.bench_diffusion_gemma FOLDER --tiny   # a small model on a CPU, to try it out

It writes FOLDER/diffusion-gemma.json. A canvas of 256 tokens after prompts of 64. No canvas ends early, so that every
call takes all its steps; their time contains the encoder's. Both ways take turns. The first calls of each, which
capture graphs and compile kernels, are not counted in the time. Memory is that of all calls, the first ones included,
above the weights. Profiles are of replays of mdkern's captured step.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mdkern
from benchmarks.graph_profile import by_kind, by_name, traced
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
FIRST_CALLS = {OURS: 2, THEIRS: 1}  # that are not timed: mdkern captures the encoder's pass in the second one
CASES = ((1, 16, 4, (OURS, THEIRS)), (8, 16, 3, (OURS, THEIRS)), (32, 8, 2, (OURS,)))  # texts, steps, rounds, ways
TINY_CASES = ((1, 2, 1, (OURS, THEIRS)), (2, 2, 1, (OURS,)))
ENOUGH_SECONDS = 80.0  # cases that would begin later are left out
PROFILED_STEPS = 3
KINDS = (  # of kernels, by parts of their names; the first that fits
    ("products of the experts", ("expert_product", "group")),
    ("output layer", ("vocab_projection", "hopper_projection", "project")),
    ("soft embedding's exponentials", ("soft_weights",)),
    ("attention", ("flash", "fmha", "attention", "softmax")),
    ("other matrix products", ("gemm", "nvjet", "cutlass", "splitk", "cublas")),
    ("norms, rotations, routing", ("norm", "place_heads", "choose_experts", "sort_pairs", "combine", "sandwich")),
    ("other kernels", ("",)),
)
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


class Contender:
    """One way at one number of texts: the times and memory of its calls."""

    def __init__(self, model: Any, way: str, batch: int, steps: int) -> None:
        self.model, self.way, self.batch, self.steps = model, way, batch, steps
        self.device = model.lm_head.weight.device
        self.on_gpu = self.device.type == "cuda"
        self.first: list[float] = []  # milliseconds a step
        self.later: list[float] = []
        self.peak = 0
        self.before = torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    def call(self) -> float:
        """Milliseconds a step."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        one_canvas(self.model, self.way, self.batch, self.steps)
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - self.before)
        return 1e3 * (time.perf_counter() - began) / self.steps

    def row(self) -> dict[str, Any]:
        """Milliseconds a step of the first call and of timed ones, and GiB above the weights."""
        row = {"way": self.way, "batch": self.batch, "steps": self.steps, "first_ms": self.first[0], "ms": self.later}
        row["gib"] = self.peak / 2**30
        workspace = canvas_run._kept.get(self.model)
        if self.on_gpu and self.way == OURS and workspace is not None and workspace.passes.found:
            row["device_ms"] = device_time(workspace)
            row["profile"] = profile(workspace)
        return row


def measure_case(model: Any, batch: int, steps: int, rounds: int, ways: Sequence[str]) -> dict[str, Any]:
    """The rows of the ways that work, and what failed."""
    canvas_run.clear()
    if model.lm_head.weight.is_cuda:
        torch.cuda.empty_cache()
    contenders: list[Contender] = []
    failed: dict[str, str] = {}

    def attempt(contender: Contender, job: Callable[[], Any]) -> Any:
        if contender.way in failed:
            return None
        try:
            return job()
        except Exception as error:
            traceback.print_exc()
            failed[contender.way] = f"{contender.way}, {batch} texts: {type(error).__name__}"
            return None

    for way in ways:
        contender = Contender(model, way, batch, steps)
        contenders.append(contender)
        for _ in range(FIRST_CALLS[way]):
            took = attempt(contender, contender.call)
            contender.first += [] if took is None else [took]
    for _ in range(rounds):
        for contender in contenders:
            took = attempt(contender, contender.call)
            contender.later += [] if took is None else [took]
    rows = [attempt(contender, contender.row) for contender in contenders]
    return {"rows": [row for row in rows if row is not None], "failed": list(failed.values())}


def captured_step(workspace: Any) -> torch.cuda.CUDAGraph:
    graph: torch.cuda.CUDAGraph = next(own.graph for key, own in workspace.passes.found.items() if key[0] == "step")
    return graph


def device_time(workspace: Any) -> float:
    """Milliseconds of a step alone: the median of replays of its graph."""
    graph, times = captured_step(workspace), []
    for _ in range(5):
        workspace.state.step.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def profile(workspace: Any) -> list[dict[str, Any]]:
    """Milliseconds and launches a step of each kernel, those of most time first."""
    graph = captured_step(workspace)

    def replays() -> None:
        for _ in range(PROFILED_STEPS):
            workspace.state.step.zero_()
            graph.replay()

    return by_name(traced(replays), KINDS, PROFILED_STEPS)


def measure(folder: Path, tiny: bool) -> dict[str, Any]:
    """Run all cases, write what there is after each, and go on after one that fails."""
    began = time.perf_counter()
    sizes, cases = (SMALL_SIZES, TINY_CASES) if tiny else (TRUE_SIZES, CASES)
    host = host_environment() | {"triton": "–", "transformers": version("transformers")} if tiny else None
    model = random_model(sizes, 16 if tiny else CANVAS, "cpu" if tiny else "cuda")
    content: dict[str, Any] = {
        "environment": host or environment("transformers"),
        "sizes": sizes,
        "canvas": model.config.canvas_length,
        "prompt": PROMPT,
        "rows": [],
        "failed": [],
    }
    for case in cases:
        if time.perf_counter() - began > ENOUGH_SECONDS:
            content["failed"].append(f"{case[0]} texts: no time left")
            continue
        found = measure_case(model, *case)
        content["rows"] += found["rows"]
        content["failed"] += found["failed"]
        print(f"{case[0]} texts: {time.perf_counter() - began:.1f} s", flush=True)
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
    return text + markdown(header, body) + profile_table(content)


def profile_table(content: dict[str, Any]) -> str:
    """Where the device's time of a step goes, by kinds of kernels; nothing without a profile."""
    profiles = {str(row["batch"]): by_kind(row["profile"], KINDS) for row in content["rows"] if row.get("profile")}
    if not profiles:
        return ""
    body = [[kind, *(f"{sums[kind]:.2f}" for sums in profiles.values())] for kind, _ in KINDS]
    body.append(["sum", *(f"{sum(sums.values()):.2f}" for sums in profiles.values())])
    header = ["kernels, ms a step", *(f"{batch} texts" if batch != "1" else "1 text" for batch in profiles)]
    return "\n" + markdown(header, body)


def diffusion_gemma() -> str:
    """The table of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    return folder_command("bench_diffusion_gemma", __doc__ or "", measure, table, argv)


if __name__ == "__main__":
    raise SystemExit(main())
