"""Models that people use: a Llama of LLaDA-8B's shape by mdkern's own passes, by its own forward, and in a plain loop.

    python -m benchmarks.bench_people FOLDER              # one GPU, two minutes; writes FOLDER/people.json
    python -m benchmarks.bench_people FOLDER --tiny       # a small model on a CPU, to try it out

The model is transformers' Llama with attention in both directions and random weights, so that texts mean nothing; the
passes are what they would be. All three decode with LLaDA's rule, 32 columns a block and 32 steps, greedily. The plain
loop has no cache and computes the logits of all positions. mdkern also runs with ``precision="fp8"``. Beside single
passes stands the larger of two floors: their FLOPs at the rate of a large product, and their weights at the rate at
which memory is read, both measured in the run.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import mdkern
from benchmarks.harness import (
    RESULTS,
    GpuTimer,
    compare_on_host,
    environment,
    folder_command,
    host_environment,
    seconds,
)
from benchmarks.kernel_tables import caption, markdown
from benchmarks.plain_decoders import top_probability
from benchmarks.plain_loop import Plain, decode
from mdkern import Denoiser
from mdkern.files import write_whole
from mdkern.models.hf import llama_fused

LLADA_8B: dict[str, Any] = {
    "vocab_size": 126464, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
BLOCK, STEPS = 32, 32
CASES = ((1, 128, 128), (8, 128, 128), (1, 512, 256), (1, 2048, 256))  # texts, tokens given, tokens written
TINY_CASES = ((2, 32, 64),)
CACHES = ("none", "dual")
OURS = ("mdkern", "fp8")  # contenders that are timed more than once
KEPT = RESULTS / "people.json"
ABSENT = "Not measured yet.\n"


def bidirectional_llama(sizes: dict[str, Any], device: str) -> Any:
    """The model and its denoiser."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096)).eval()
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model, mdkern.adapt(model, mask_id=sizes["vocab_size"] - 1)


@contextmanager
def by_its_own_forward() -> Iterator[None]:
    """Runs backbones by the model's own forward instead of mdkern's passes."""
    mdkern.graphs.clear()
    try:
        with patch.object(llama_fused, "runs_now", lambda: False):
            yield
    finally:
        mdkern.graphs.clear()


def texts(denoiser: Denoiser, batch: int, given: int, written: int) -> Tensor:
    """Random tokens, then masks."""
    ids = torch.full((batch, given + written), denoiser.mask_id)
    generator = torch.Generator().manual_seed(0)
    ids[:, :given] = torch.randint(1, denoiser.mask_id, (batch, given), generator=generator)
    return ids.to(denoiser.device)


def plain_run(model: Any, denoiser: Denoiser, ids: Tensor, steps: int) -> Tensor:
    """A whole run by the plain loop."""

    def logits_of(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, use_cache=False).logits
        logits[..., denoiser.mask_id] = -torch.inf
        return logits

    return decode(logits_of, ids, Plain(top_probability), steps=steps, mask_id=denoiser.mask_id, block_length=BLOCK)


def runs(
    model: Any, denoiser: Denoiser, in_fp8: Denoiser, rounds: int, batch: int, given: int, written: int
) -> dict[str, Any]:
    """Seconds of whole runs by each contender, their passes, and the share of tokens that are the same in fp8."""
    ids, device = texts(denoiser, batch, given, written), denoiser.device.type

    def ours(cache: str, denoiser: Denoiser = denoiser) -> Any:
        return mdkern.sample(
            denoiser, input_ids=ids, decoder="top_probability", steps=STEPS, block_length=BLOCK, cache=cache,
            batch_size=batch, temperature=0.0, seed=0, progress=False,
        )  # fmt: skip

    found: dict[str, list[float]] = {}
    passes = {}

    def measure(name: str, run: Callable[[], Any]) -> Any:
        result = run()  # compiles and captures
        times = rounds if name.startswith(OURS) else 1
        found[name] = [seconds(run, device)[0] for _ in range(times)]
        return result

    same = {}
    for cache in CACHES:
        own = measure(f"mdkern, {cache}", partial(ours, cache))
        passes[cache] = int(own.nfe["H"].max())
        rounded = measure(f"fp8, {cache}", partial(ours, cache, in_fp8))
        same[cache] = float((rounded.sequences == own.sequences)[:, given:].float().mean())
    with by_its_own_forward():
        for cache in CACHES:
            measure(f"own forward, {cache}", partial(ours, cache))
    measure("plain loop", partial(plain_run, model, denoiser, ids, STEPS))
    case = {"batch": batch, "given": given, "written": written}
    return case | {"passes": passes, "seconds": found, "same_in_fp8": same}


def passes(denoiser: Denoiser, in_fp8: Denoiser, batch: int, given: int, written: int) -> dict[str, Any]:
    """Milliseconds of a pass over whole texts whose first masked block is wanted, and of one over this block.

    With them go the differences of the states of a whole pass from those of mdkern's pass, relative.
    """
    length = given + written
    ids = texts(denoiser, batch, given, written)
    columns = (given + torch.arange(BLOCK, device=ids.device)).expand(batch, -1).contiguous()
    rows = torch.arange(BLOCK, device=ids.device).expand(batch, -1).contiguous()
    block = ids[:, given : given + BLOCK].contiguous()
    times: dict[str, dict[str, float]] = {}
    states: dict[str, Tensor] = {}

    def measure(name: str, denoiser: Denoiser) -> None:
        now = denoiser.current()
        cache = torch.zeros(now.cache_shape(batch, length), dtype=now.dtype, device=now.device)
        ways: dict[str, Callable[[], object]] = {
            "whole": lambda: now.hidden(ids, None, columns),
            "window": lambda: now.window_hidden(cache, block, columns, rows),
        }
        times[name] = medians(now, ways)
        states[name] = now.hidden(ids, None, columns).double()

    with torch.no_grad():
        measure("mdkern", denoiser)
        measure("fp8", in_fp8)
        with by_its_own_forward():
            measure("own forward", denoiser)
    ours = states.pop("mdkern")
    differences = {name: float((other - ours).norm() / ours.norm()) for name, other in states.items()}
    counts = {"whole": batch * length, "window": batch * BLOCK}
    case = {"batch": batch, "given": given, "written": written}
    return case | {"columns": counts, "ms": times, "differences": differences}


def medians(denoiser: Denoiser, ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    if denoiser.device.type == "cuda":
        timings = GpuTimer().compare(ways, turns=2, rounds=5)
    else:
        timings = compare_on_host(ways, 3)
    return {name: timing.median for name, timing in timings.items()}


def rates(device: str) -> dict[str, float]:
    """TFLOP/s of a product of 8,192³ in bfloat16 and in e4m3, and TB/s of reading memory."""
    if device == "cpu":  # not measured: a CPU's times are not shown
        return {"tflops": 0.1, "fp8_tflops": 0.1, "tb_per_second": 0.01}
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    large, sink = torch.ones(1 << 30, device=device), torch.zeros((), device=device)
    product, out, one = torch.empty_like(left), GpuTimer(), torch.ones((), device=device)
    rounded = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).T
    scaled = partial(torch._scaled_mm, *rounded, one, one, out_dtype=torch.bfloat16, use_fast_accum=True, out=product)
    ways: dict[str, Callable[[], object]] = {
        "product": partial(torch.mm, left, right, out=product),
        "fp8": scaled,
        "read": partial(torch.amax, large, 0, out=sink),
    }
    times = out.compare(ways, 4, 9)
    return {
        "tflops": 2 * 8192**3 / times["product"].median / 1e9,
        "fp8_tflops": 2 * 8192**3 / times["fp8"].median / 1e9,
        "tb_per_second": 4 * 2**30 / times["read"].median / 1e9,
    }


def floor(content: dict[str, Any], columns: int, in_fp8: bool = False) -> float:
    """Milliseconds that a pass over so many columns takes at least, attention and the output layer left out."""
    weights, measured, size = content["weights_of_blocks"], content["rates"], 1 if in_fp8 else 2
    arithmetic = 2 * columns * weights / measured["fp8_tflops" if in_fp8 else "tflops"] / 1e9
    return max(arithmetic, size * weights / measured["tb_per_second"] / 1e9)


def measure(folder: Path, tiny: bool) -> dict[str, Any]:
    """Run all cases, write what there is after each, and go on after one that fails."""
    device = "cpu" if tiny else "cuda"
    sizes, cases, rounds = (SMALL, TINY_CASES, 1) if tiny else (LLADA_8B, CASES, 2)
    model, denoiser = bidirectional_llama(sizes, device)
    in_fp8 = mdkern.adapt(model, mask_id=denoiser.mask_id, precision="fp8")
    content: dict[str, Any] = {
        "environment": host_environment() | {"triton": "–"} if tiny else environment("transformers"),
        "sizes": sizes,
        "weights_of_blocks": sum(parameter.numel() for parameter in model.model.layers.parameters()),
        "how": denoiser.description,
        "how_in_fp8": in_fp8.description,
        "rates": rates(device),
        "block": BLOCK,
        "steps": STEPS,
        "passes": [],
        "runs": [],
        "failed": [],
    }
    jobs: list[tuple[str, Any, Callable[[], dict[str, Any]]]] = [
        *(("passes", case, partial(passes, denoiser, in_fp8, *case)) for case in cases),
        *(("runs", case, partial(runs, model, denoiser, in_fp8, rounds, *case)) for case in cases),
    ]
    for part, case, job in jobs:
        began = time.perf_counter()
        try:
            content[part].append(job())
        except Exception:
            traceback.print_exc()
            content["failed"].append(f"{part} {case}")
        print(f"{part} {case}: {time.perf_counter() - began:.1f} s", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "people.json", json.dumps(content, indent=1) + "\n")
    return content


def place(row: dict[str, Any]) -> str:
    return f"{row['batch']} × ({row['given']:,} + {row['written']})"


def table(content: dict[str, Any]) -> str:
    """Single passes with their floors, then whole runs."""
    sizes, found = content["sizes"], content["rates"]
    text = (
        f"{caption(content)}. {sizes['num_hidden_layers']} blocks, width {sizes['hidden_size']:,}, V = "
        f"{sizes['vocab_size']:,}, bfloat16, random weights; blocks of {content['block']}. Milliseconds of a pass "
        "without its output layer, by the model's own forward and by mdkern's passes in bfloat16 and in fp8, all in "
        f"CUDA graphs. Floor: the larger of the arithmetic at {found['tflops']:.0f} ({found['fp8_tflops']:.0f} in fp8) "
        f"TFLOP/s and of reading the weights at {found['tb_per_second']:.2f} TB/s. Difference: that of the states of a "
        "whole pass in fp8 from those of mdkern's pass in bfloat16, and in brackets that of the own forward's.\n\n"
    )
    rows = []
    for row in content["passes"]:
        for kind, name in (("window", "one block, cached"), ("whole", "whole texts")):
            own, ours, rounded = (row["ms"][way][kind] for way in ("own forward", "mdkern", "fp8"))
            least = [floor(content, row["columns"][kind], in_fp8) for in_fp8 in (False, True)]
            shown = [f"{ms:.2f}" for ms in (own, ours, least[0], rounded, least[1])]
            apart = row["differences"]
            differences = f"{apart['fp8']:.1%} ({apart['own forward']:.1%})" if kind == "whole" else ""
            rows.append([place(row), name, *shown, f"{own / ours:.1f} ×", f"{own / rounded:.1f} ×", differences])
    header = ["texts × tokens", "pass", "own forward", "mdkern", "floor", "fp8", "floor in fp8"]
    header += ["gain", "gain in fp8", "difference"]
    text += markdown(header, rows)
    text += (
        f"\nWhole runs of {content['steps']} steps with LLaDA's rule, in seconds; the plain loop, in eager PyTorch, "
        "has no cache and takes as many steps. Same tokens: the share that fp8 leaves as they are, which says "
        "little where weights are random.\n\n"
    )
    return text + runs_table(content["runs"])


def runs_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for row in found:
        times = {name: statistics.median(values) for name, values in row["seconds"].items()}
        for cache in CACHES:
            names = ("plain loop", f"own forward, {cache}", f"mdkern, {cache}", f"fp8, {cache}")
            plain, own, ours, rounded = (times[name] for name in names)
            shown = [f"{time:.2f}" for time in (plain, own, ours, rounded)]
            ratios = [f"{plain / ours:.1f} ×", f"{plain / rounded:.1f} ×", f"{row['same_in_fp8'][cache]:.0%}"]
            rows.append([place(row), cache, *shown, *ratios])
    header = ["texts × tokens", "cache", "plain loop", "own forward", "mdkern", "fp8"]
    return markdown([*header, "gain", "gain in fp8", "same tokens"], rows)


def people() -> str:
    """The table of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    return folder_command("bench_people", __doc__ or "", measure, table, argv)


if __name__ == "__main__":
    raise SystemExit(main())
