"""What 8-bit products cost in quality and gain in time: `precision="fp8"` beside the model's own dtype.

    python -m benchmarks.bench_precision FOLDER                  # one GPU of 80 GB, two minutes; FOLDER/precision.json
    python -m benchmarks.bench_precision FOLDER --parts speed    # one part; --anew measures again what is there
    python -m benchmarks.bench_precision FOLDER --tiny           # small models on a CPU, to try it out

Quality is that of the shipped heavy model, in float32 and bfloat16 (on a CPU float32 only), with products in e4m3, and
with attention in e4m3, too, which wider models have. Its samples are judged by the shipped judge. It is asked for
likelihoods of texts that the judge wrote, which favour none of them: the exact one of sampling by the margin rule, and
the bound over random masks. At the masked positions of those texts its distributions are compared with those of the
first row.

Time is that of the paper's setting (`benchmarks.paper_setting`), whole runs with all steps by the heavy model, in
turns, and of a pass of its backbone again and again, at the power limit. Weights there are random.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import mdkern
from benchmarks import paper_setting
from benchmarks.decoder_setting import JUDGE
from benchmarks.harness import (
    RESULTS,
    captured,
    compare_on_host,
    environment,
    folder_command,
    host_environment,
    measure_parts,
    sustained,
)
from benchmarks.kernel_tables import caption, markdown
from benchmarks.paper_setting import HEAVY
from mdkern import Denoiser, adapt
from mdkern.engine import graphs
from mdkern.evaluation.text import judge, token_entropy
from mdkern.kernels.backbone import attention_fp8
from mdkern.pretrained import load_pair
from mdkern.profiling.profile import Setting, time_run

KEPT = RESULTS / "precision.json"
ABSENT = "Not measured yet.\n"
PRECISIONS = {"bf16": None, "fp8": "fp8"}
ATTENTION = "fp8, attention too"


@dataclass(frozen=True)
class Size:
    judged: int = 256  # samples
    texts: int = 64  # whose likelihood is asked for
    length: int = 256
    steps: int = 128
    masks: int = 16  # of each text
    runs: int = 3
    seconds: float = 4.0  # of passes
    shipped: str = "heavy"  # model
    paper: paper_setting.Size = field(default_factory=paper_setting.Size)


TINY = Size(
    2, 2, 128, 4, 2, 1, 0.0, "light", paper_setting.Size(Setting(2, 16, 8), (2, 1), 50, 256, 4, 16, 1, 2, "eager"),
)  # fmt: skip


def subjects(device: torch.device, shipped: str) -> dict[str, Denoiser]:
    """The shipped model in each precision; the first one is what others are compared with."""
    whole = getattr(load_pair(device, torch.float32), shipped)
    found = {"float32": adapt(whole)}
    if device.type == "cuda":
        half = getattr(load_pair(device, torch.bfloat16), shipped)
        found["bfloat16"], whole = adapt(half), half
    return found | {name: adapt(whole, precision="fp8") for name in ("fp8", ATTENTION)}


@torch.no_grad()
def written_by(model: Any, count: int, length: int, seed: int = 0) -> Tensor:
    """Texts that a causal language model writes at temperature 1, int64 ``[count, length]``."""
    torch.manual_seed(seed)
    ids = torch.zeros(count, 1, dtype=torch.int64, device=model.device)
    for _ in range(length):
        logits = model(ids, use_cache=False).logits[:, -1].float()
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1)), 1)
    return ids[:, 1:] if length < model.config.n_positions else ids[:, :length]


@torch.no_grad()
def masked_log_probs(denoiser: Denoiser, texts: Tensor, masked: Tensor) -> Tensor:
    """Log-probabilities at the masked positions, float32 ``[M, V]``."""
    prepared = denoiser.prepared(texts.numel())
    hidden = prepared.hidden(torch.where(masked, denoiser.mask_id, texts))
    return denoiser.head.logits(hidden[masked]).log_softmax(-1)


def quality(size: Size, device: torch.device) -> list[dict[str, Any]]:
    from transformers import GPT2LMHeadModel

    reader: Any = GPT2LMHeadModel.from_pretrained(JUDGE, dtype=torch.float32)
    reader = reader.to(device).eval()
    texts = written_by(reader, size.texts, size.length)
    share = torch.linspace(0.05, 0.95, size.texts)[:, None]
    masked = (torch.rand(texts.shape, generator=torch.Generator().manual_seed(1)) < share).to(device)
    first: Tensor | None = None
    rows = []
    for name, denoiser in subjects(device, size.shipped).items():
        row, scores = with_attention(name == ATTENTION, partial(quality_of, size, denoiser, reader, texts, masked))
        first = scores if first is None else first
        possible = first > -torch.inf
        divergence = torch.where(possible, first.exp() * (first - scores), 0.0).sum(-1)
        row |= {
            "agreement": float((scores.argmax(-1) == first.argmax(-1)).double().mean()),
            "divergence": float(divergence.double().mean()),
        }
        rows.append({"precision": name} | row)
    return rows


def with_attention(in_fp8: bool, run: Callable[[], Any]) -> Any:
    """Run with attention in e4m3, which the shipped model is too narrow for by itself on a GPU, or without."""
    graphs.clear()  # those of the model with other attention
    with patch.object(attention_fp8, "fits", lambda *_: in_fp8):
        return run()


def quality_of(
    size: Size, denoiser: Denoiser, reader: Any, texts: Tensor, masked: Tensor
) -> tuple[dict[str, float], Tensor]:
    """What is measured of a denoiser alone, and its log-probabilities at the masked positions."""
    options: dict[str, Any] = {"batch_size": size.texts, "progress": False}
    drawn = mdkern.sample(
        denoiser, num_samples=size.judged, length=size.length, steps=size.steps, seed=2, **options
    ).sequences
    assert drawn is not None
    nll = judge(reader, drawn).nats_per_token()
    exact = mdkern.likelihood(denoiser, input_ids=texts, method="decoder", decoder="margin", **options)
    bound = mdkern.likelihood(denoiser, input_ids=texts, samples=size.masks, seed=3, **options)
    return {
        "judge_nats": float(nll.mean()),
        "judge_error": float(nll.std()) / len(nll) ** 0.5,
        "token_entropy": float(token_entropy(drawn).mean()),
        "exact_nats": float(exact.nats.sum() / exact.tokens.sum()),
        "bound_nats": float(bound.nats.sum() / bound.tokens.sum()),
    }, masked_log_probs(denoiser, texts, masked)


def speed(size: Size, device: torch.device) -> dict[str, Any]:
    """Seconds of whole runs, milliseconds of a pass, and the eager baseline's run in the same process."""
    bench = paper_setting.Bench(size.paper, device)
    model, setting = bench.half[HEAVY], size.paper.setting
    denoisers = {name: adapt(model, precision=precision) for name, precision in PRECISIONS.items()}
    runs: dict[str, list[float]] = {name: [] for name in denoisers}
    for turn in range(-1, size.runs):  # the first ones compile kernels and capture graphs
        for name, denoiser in denoisers.items():
            took, _ = time_run(denoiser, setting, max(turn, 0))
            runs[name] += [took] * (turn >= 0)
    passes = pass_ms(denoisers, setting, size.seconds)
    eager = bench.eager(HEAVY, setting, size.paper.steps)["run"]
    return {"setting": vars(setting), "seconds": runs, "pass_ms": passes, "eager": eager}


@torch.no_grad()
def pass_ms(denoisers: dict[str, Denoiser], setting: Setting, spent: float) -> dict[str, float]:
    """Milliseconds of a backbone pass, in turns, at the card's power limit."""
    device = next(iter(denoisers.values())).device
    shape, generator = (setting.batch_size, setting.length), torch.Generator().manual_seed(0)
    runs: dict[str, Callable[[], object]] = {}
    for name, denoiser in denoisers.items():
        ids = torch.randint(denoiser.mask_id, shape, generator=generator).to(device)
        runs[name] = partial(denoiser.prepared(ids.numel()).hidden, ids, None, ids[:, :8] % setting.length)
    if device.type != "cuda":
        return {name: timing.median for name, timing in compare_on_host(runs, 2).items()}
    times = sustained({name: captured(run) for name, run in runs.items()}, spent)
    return {name: statistics.median(values) for name, values in times.items()}


PARTS = {"speed": speed, "quality": quality}


def measure(folder: Path, tiny: bool, parts: Sequence[str], anew: bool) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
    size = TINY if tiny else Size()
    known: dict[str, Any] = {"environment": environment() | ({} if device.type == "cuda" else host_environment())}
    known |= {"judged": size.judged, "texts": size.texts, "length": size.length, "steps": size.steps}
    jobs = {part: partial(PARTS[part], size, device) for part in parts}
    return measure_parts(folder / "precision.json", known, jobs, anew)


def table(content: dict[str, Any]) -> str:
    """Quality, then time."""
    text = f"{caption(content)}.\n"
    if "quality" in content:
        text += (
            f"\nThe shipped heavy model: {content['judged']} samples of {content['length']} tokens in "
            f"{content['steps']} steps; likelihoods and distributions of {content['texts']} texts that the judge "
            "wrote. All in nats a token; agreement is the share of masked positions with the same most probable "
            "token.\n\n"
        )
        rows = [
            [
                row["precision"],
                f"{row['judge_nats']:.3f} ± {row['judge_error']:.3f}",
                f"{row['token_entropy']:.2f}",
                f"{row['exact_nats']:.4f}",
                f"{row['bound_nats']:.4f}",
                f"{row['agreement']:.1%}",
                f"{row['divergence']:.4f}",
            ]
            for row in content["quality"]
        ]
        of_first = f"of {content['quality'][0]['precision']}"
        header = ["precision", "judge of samples", "entropy of their tokens", "exact likelihood", "bound"]
        text += markdown([*header, f"agreement with that {of_first}", f"KL from that {of_first}"], rows)
    if "speed" in content:
        found, setting = content["speed"], content["speed"]["setting"]
        text += (
            f"\nThe paper's setting, all steps by the heavy model: {setting['batch_size']} sequences of "
            f"{setting['length']:,} tokens in {setting['steps']:,} steps; eager PyTorch takes {found['eager']:.1f} s "
            "in the same process.\n\n"
        )
        rows = [
            [
                name,
                f"{statistics.median(runs):.3f}",
                f"{found['eager'] / statistics.median(runs):.1f} ×",
                f"{found['pass_ms'][name]:.2f}",
            ]
            for name, runs in found["seconds"].items()
        ]
        text += markdown(["precision", "seconds of a run", "to eager", "ms of a backbone pass"], rows)
    return text


def precision() -> str:
    """The table of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    return folder_command("bench_precision", __doc__ or "", measure, table, argv, list(PARTS))


if __name__ == "__main__":
    raise SystemExit(main())
