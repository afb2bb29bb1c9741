"""The first call on a fresh machine: how long a process whose kernels are not compiled yet waits for it.

    python -m benchmarks.bench_first_call FOLDER          # one GPU, two minutes
    python -m benchmarks.bench_first_call FOLDER --tiny   # a small model on a CPU, to try it out

It writes FOLDER/first-call.json. Each case is a process of its own with an empty cache of Triton, once with all kernels
of a step compiled side by side, as always, and once with each at its first launch. Importing and loading are not part
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
from pathlib import Path
from typing import Any

import torch

import mdkern
from benchmarks.harness import RESULTS, environment, folder_command, host_environment
from benchmarks.kernel_tables import caption, markdown
from mdkern.engine import capture
from mdkern.files import write_whole
from mdkern.kernels import compile_ahead

KEPT = RESULTS / "first-call.json"
ABSENT = "Not measured yet.\n"
CALLS = 3
ENOUGH_SECONDS = 100.0  # processes that would begin later are left out
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


CASES = {"the paper's size": paper_model, "the shipped pair": shipped_pair, "a Llama of 0.4 billion": llama_model}


def one_process(case: str, beside: bool, tiny: bool) -> dict[str, Any]:
    """Seconds of the calls of this process, and the kernels that the first one compiled."""
    kernels: list[dict[str, Any]] = []
    if not beside:
        capture.can_compile_ahead = compile_ahead.can_compile_ahead = lambda device: False
    if torch.cuda.is_available():
        import triton

        def compiled(*, src: Any, times: Any, **_: Any) -> None:
            kernels.append({"kernel": src.name, "seconds": times.total / 1e6})

        triton.knobs.compilation.listener = compiled
        torch.cuda.synchronize()
    call, seconds = CASES[case](tiny), []
    for number in range(CALLS):
        began = time.perf_counter()
        call(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if number == 0:
            first = list(kernels)
    return {"case": case, "side_by_side": beside, "seconds": seconds, "kernels": first}


def measure(folder: Path, tiny: bool) -> dict[str, Any]:
    """A process for each case and way; write what there is after each, and go on after one that fails."""
    known = host_environment() | {"triton": "–"} if tiny else environment()
    content: dict[str, Any] = {
        "environment": known | {"cores": len(os.sched_getaffinity(0))}, "rows": [], "failed": [],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for beside in (True, False):
        for case in CASES:
            if time.perf_counter() - began > ENOUGH_SECONDS:
                content["failed"].append(f"{case}, {'side by side' if beside else 'one by one'}: no time left")
                continue
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.bench_first_call", "--one", case, str(beside), str(tiny)],
                    env=os.environ | {"TRITON_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    check=False,
                )
            if done.returncode:
                content["failed"].append(f"{case}: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
                continue
            content["rows"].append(json.loads(done.stdout.splitlines()[-1]))
            write_whole(folder / "first-call.json", json.dumps(content, indent=1) + "\n")
    return content


def table(content: dict[str, Any]) -> str:
    """Seconds of the first call in both ways, of a later one, and of the compiler."""
    text = f"{caption(content)}, {content['environment']['cores']} cores; seconds.\n\n"
    found = {(row["case"], row["side_by_side"]): row for row in content["rows"]}
    body = []
    for case in dict.fromkeys(row["case"] for row in content["rows"]):
        ours, other = found.get((case, True)), found.get((case, False))
        some = ours or other
        assert some is not None
        body.append(
            [
                case,
                *("–" if row is None else f"{row['seconds'][0]:.1f}" for row in (ours, other)),
                f"{min(some['seconds'][1:]):.2f}",
                str(len(some["kernels"])),
                "–" if other is None else f"{sum(kernel['seconds'] for kernel in other['kernels']):.1f}",
            ]
        )
    header = ["model", "first call", "compiling one by one", "later call", "kernels", "of the compiler, one by one"]
    return text + markdown(header, body)


def first_call() -> str:
    """The table of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["--one"]:
        case, beside, tiny = arguments[1:]
        print(json.dumps(one_process(case, beside == "True", tiny == "True")))
        return 0
    return folder_command("bench_first_call", __doc__ or "", measure, table, argv)


if __name__ == "__main__":
    raise SystemExit(main())
