"""The first call on a fresh machine: how long a process whose kernels are not compiled yet waits for it, and for what.

    python -m benchmarks.bench_first_call FOLDER                                   # one GPU, a minute
    python -m benchmarks.bench_first_call FOLDER --parts paper paper-one-by-one    # some parts
    python -m benchmarks.bench_first_call FOLDER --tiny                            # a small model on a CPU

It writes FOLDER/first-call.json. Each part is a process of its own with an empty cache of Triton. All kernels of a step
are compiled side by side, as always; in the part `paper-one-by-one` each at its first launch. ``--anew`` measures again
what the folder has. Starting the process, with all imports that come before the call, and making the model are not part
of the first call; PyTorch's own libraries are warm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mdkern
from benchmarks.harness import RESULTS, environment, folder_command, host_environment, measure_parts
from benchmarks.kernel_tables import caption, markdown
from mdkern.engine import capture, graphs
from mdkern.kernels import compile_ahead
from mdkern.models.hf import pass_trial

KEPT = RESULTS / "first-call.json"
ABSENT = "Not measured yet.\n"
CALLS = 3
PAPER: dict[str, Any] = {
    "vocab_size": 50_258,
    "mask_id": 50_257,
    "width": 768,
    "num_heads": 12,
    "num_blocks": 12,
    "max_length": 1024,
}
SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "mask_id": 99,
    "width": 64,
    "num_heads": 2,
    "num_blocks": 2,
    "max_length": 32,
}


def paper_model(tiny: bool) -> Callable[[int], object]:
    """Of the paper's size; a call writes 16 texts of 1,024 tokens."""
    config = mdkern.DiTConfig(**(SMALL if tiny else PAPER))
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    with torch.device(device):
        model = mdkern.DiT(config).to(dtype)
    return lambda seed: mdkern.sample(
        model, num_samples=2 if tiny else 16, length=config.max_length, steps=32, seed=seed
    )


def shipped_pair(tiny: bool) -> Callable[[int], object]:
    pair = mdkern.load_pair("cpu" if tiny else "cuda")
    length = 16 if tiny else 256
    return lambda seed: mdkern.sample(pair.heavy, pair.light, "L8 H16 L8", num_samples=16, length=length, seed=seed)


def llama_model(tiny: bool) -> Callable[[int], object]:
    """A Llama whose attention sees everything; a call writes 128 tokens after 128 with a KV cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 32_000, "mask_token_id": 5, "max_position_embeddings": 1024}
    sizes |= {"attn_implementation": "sdpa", "is_causal": False}
    config = LlamaConfig(**sizes)
    with torch.device("cpu" if tiny else "cuda"):
        model: Any = LlamaForCausalLM(config).to(torch.float32 if tiny else torch.bfloat16).eval()  # type: ignore[arg-type]
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    ids = torch.full((1, 32 if tiny else 256), 5)
    ids[:, : ids.shape[1] // 2] = 7
    options: dict[str, Any] = {"block_length": ids.shape[1] // 8, "decoder": "threshold", "cache": "dual"}
    return lambda seed: mdkern.sample(model, input_ids=ids.to(model.device), seed=seed, **options)


@dataclass(frozen=True)
class Part:
    """What a process does."""

    case: str
    model: Callable[[bool], Callable[[int], object]]
    beside: bool = True  # whether kernels are compiled side by side


PARTS = {
    "paper": Part("the paper's size", paper_model),
    "pair": Part("the shipped pair", shipped_pair),
    "llama": Part("a Llama of 0.4 billion", llama_model),
    "paper-one-by-one": Part("the paper's size, compiling one by one", paper_model, False),
}


USUAL = tuple(name for name, part in PARTS.items() if part.beside)  # the other one takes half a minute


class Clock:
    """Seconds that were spent in functions, by what they are for. Of those inside each other only the outer count."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.inside = False

    def watch(self, owner: Any, name: str, what: str) -> None:
        """Let calls of a module's function count, from now on."""
        plain = getattr(owner, name)
        self.spent[what] = 0.0

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return plain(*args, **kwargs)
            self.inside, began = True, time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self.inside = False
                self.spent[what] += time.perf_counter() - began

        setattr(owner, name, watched)


def one_process(part: str, tiny: bool, began: float | None = None) -> dict[str, Any]:
    """Seconds of the calls of this process, which began at this `time.time`, and what the first call spent them on."""
    start = 0.0 if began is None else time.time() - began
    case, kernels, clock = PARTS[part], list[dict[str, Any]](), Clock()
    if not case.beside:
        capture.can_compile_ahead = compile_ahead.can_compile_ahead = lambda device: False
    if torch.cuda.is_available() and not tiny:
        import triton

        def compiled(*, src: Any, times: Any, **_: Any) -> None:
            # Side by side, translating from Python has to wait for its turn.
            kernels.append({"kernel": src.name, "seconds": times.total / 1e6, "python": times.ir_initialization / 1e6})

        triton.knobs.compilation.listener = compiled
        torch.cuda.synchronize()
    making = time.perf_counter()
    call = case.model(tiny)
    if torch.cuda.is_available() and not tiny:
        torch.cuda.synchronize()
    making = time.perf_counter() - making
    clock.watch(pass_trial, "rehearse_once", "kernels that a model is tried with")
    clock.watch(graphs, "rehearse", "kernels of the step")
    clock.watch(graphs, "capture", "capture")
    seconds = []
    for number in range(CALLS):
        began = time.perf_counter()
        call(number)
        if torch.cuda.is_available() and not tiny:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if number == 0:
            first, phases = list(kernels), dict(clock.spent)
    phases["the rest, first imports too"] = seconds[0] - sum(phases.values())
    return {
        "case": case.case, "side_by_side": case.beside, "start": start, "making": making, "seconds": seconds,
        "phases": phases, "kernels": first,
    }  # fmt: skip


def run_process(part: str, tiny: bool) -> dict[str, Any]:
    """`one_process` in a process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.bench_first_call", "--one", part, str(tiny), str(time.time())],
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no word").splitlines()[-1])
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(folder: Path, tiny: bool, parts: Sequence[str], anew: bool) -> dict[str, Any]:
    known = host_environment() | {"triton": "–"} if tiny else environment()
    known |= {"cores": len(os.sched_getaffinity(0))}
    jobs = {part: partial(run_process, part, tiny) for part in parts}
    return measure_parts(folder / "first-call.json", {"environment": known}, jobs, anew)


def table(content: dict[str, Any]) -> str:
    """Seconds of the first call and of its phases, of a later one, and of the compiler where it worked one by one."""
    text = f"{caption(content)}, {content['environment']['cores']} cores; seconds.\n\n"
    rows = [content[part] for part in PARTS if part in content]
    phases = list(dict.fromkeys(phase for row in rows for phase, took in row["phases"].items() if took))
    alone, body = not all(row["side_by_side"] for row in rows), []
    for row in rows:
        spent = (f"{row['phases'].get(phase, 0.0):.1f}" for phase in phases)
        compiling, python = (sum(kernel[key] for kernel in row["kernels"]) for key in ("seconds", "python"))
        later = f"{min(row['seconds'][1:]):.2f}"
        body.append([row["case"], f"{row['seconds'][0]:.1f}", *spent, later, str(len(row["kernels"]))])
        if alone:
            body[-1].append("" if row["side_by_side"] else f"{compiling:.1f} ({python:.1f})")
    header = ["model", "first call", *(f"of it {phase}" for phase in phases), "later call", "kernels"]
    if alone:
        header.append("of the compiler (translating from Python)")
    return text + markdown(header, body)


def first_call() -> str:
    """The table of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["--one"]:
        part, tiny, began = arguments[1:]
        print(json.dumps(one_process(part, tiny == "True", float(began))))
        return 0
    return folder_command("bench_first_call", __doc__ or "", measure, table, argv, list(PARTS), USUAL)


if __name__ == "__main__":
    raise SystemExit(main())
