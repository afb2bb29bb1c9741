"""The judge: a small autoregressive model whose likelihood of generated text measures its quality.

    python -m training.judge --data judge.bin --valid test.bin --out runs/judge --minutes 4

Its numbers compare samples within this project only: it is neither GPT-2 nor trained on what GPT-2 was. The judge is
trained on text that no denoiser sees. `final/` is a bfloat16 ``transformers.GPT2LMHeadModel``.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.batches import even_windows, random_windows, step_generator
from training.data import TokenFileInfo, atomic_open, open_tokens
from training.loop import Trainer, World, joined_world
from training.optim import WeightAverage, make_optimizers
from training.options import add_loop_arguments, add_optimizer_arguments, check_arguments, loop_options, run_config

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

log = logging.getLogger(__name__)


def make_judge(info: TokenFileInfo, layers: int, width: int, heads: int, length: int) -> GPT2LMHeadModel:
    """A GPT-2 of this shape over the token file's vocabulary, without dropout, so that training is repeatable."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=info.vocab_size, n_positions=length, n_embd=width, n_layer=layers, n_head=heads,
        bos_token_id=info.eos_id, eos_token_id=info.eos_id, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def next_token_losses(model: nn.Module, input_ids: Tensor) -> Tensor:
    """-log p of every token but the first given those before it, nats: ``[B, L]`` int64 -> ``[B, L - 1]`` float32."""
    logits = model(input_ids).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none").view(len(input_ids), -1)


class NextTokenLoss(nn.Module):
    """``scale * sum of -log p``; see `training.evaluate.MaskedLoss` for the scale."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, input_ids: Tensor) -> Tensor:
        return next_token_losses(self.model, input_ids).sum() * self.scale


@torch.inference_mode()
def judge_nll(model: GPT2LMHeadModel, sequences: Tensor, batch_size: int = 64) -> Tensor:
    """Mean negative log-likelihood of each sequence under the judge, the first token not counted.

    Args:
        model: the judge, in any floating dtype and on any device.
        sequences: int ``[N, L]`` token ids, 2 <= L <= the judge's positions.
        batch_size: sequences at once.

    Returns nats a token, float32 ``[N]`` on the CPU; ``exp`` of their mean is the judge perplexity.
    Raises ValueError on another shape or on ids outside of the vocabulary.
    """
    positions, vocab_size = model.config.n_positions, model.config.vocab_size
    if sequences.ndim != 2 or not 2 <= sequences.shape[1] <= positions:
        raise ValueError(f"sequences must have shape [N, L] with 2 <= L <= {positions}, got {list(sequences.shape)}")
    if sequences.numel() and not (int(sequences.min()) >= 0 and int(sequences.max()) < vocab_size):
        raise ValueError(f"token ids must lie in 0..{vocab_size - 1}")
    chunks = [chunk.to(model.device, torch.int64) for chunk in sequences.split(batch_size)]
    return torch.cat([next_token_losses(model, chunk).mean(1).cpu() for chunk in chunks] or [torch.empty(0)])


def window_batches(
    tokens: np.ndarray, args: argparse.Namespace, world: World
) -> Callable[[int], list[tuple[Tensor, ...]]]:
    """The micro-batches of plain windows of a step, as `training.batches.MaskedBatches` shards them."""
    shards = world.size * args.grad_accum
    if args.batch_size % shards:
        raise ValueError(f"batch size {args.batch_size} does not divide into {shards} shards")

    def batches(step: int) -> list[tuple[Tensor, ...]]:
        windows = random_windows(tokens, args.batch_size, args.length, step_generator(args.seed, step)).astype(np.int64)
        own = range(world.rank * args.grad_accum, (world.rank + 1) * args.grad_accum)
        return [(torch.from_numpy(windows[k::shards].copy()),) for k in own]

    return batches


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.judge", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="training token file, not one that a denoiser saw")
    parser.add_argument("--valid", type=Path, required=True, help="held-out token file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="positions, and tokens of a training window")
    parser.add_argument("--tokens", type=float, default=1e9, help="tokens to train on at most")
    parser.add_argument("--minutes", type=float, help="finish after so long, whatever --tokens says")
    parser.add_argument("--batch-size", type=int, default=256, help="sequences a step, all processes together")
    parser.add_argument("--grad-accum", type=int, default=1, help="micro-batches a step and process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-samples", type=int, default=4096, help="held-out windows")
    add_optimizer_arguments(parser)
    add_loop_arguments(parser)
    parser.set_defaults(lr=1e-3, warmup=200, weight_decay=0.1, ema_decay=0.998)
    return parser


def train(args: argparse.Namespace, world: World, started: float) -> bool:
    """Train the judge, save it and write its held-out likelihood. Returns whether it was finished."""
    tokens, info = open_tokens(args.data)
    valid, valid_info = open_tokens(args.valid)
    if valid_info.tokenizer_sha256 != info.tokenizer_sha256:
        raise ValueError(f"{args.data} and {args.valid} were made with different tokenizers")
    batches = window_batches(tokens, args, world)
    torch.manual_seed(args.seed)
    model = make_judge(info, args.layers, args.width, args.heads, args.length).to(world.device)  # type: ignore[arg-type]
    objective = NextTokenLoss(model, world.size / (args.batch_size * (args.length - 1)))
    if world.device.type == "cuda" and not args.no_compile:
        objective.compile(dynamic=False)
    tokens_per_step = args.batch_size * args.length
    total_steps = math.ceil(args.tokens / tokens_per_step)
    options = loop_options(args, total_steps, tokens_per_step, started)
    settings = run_config(
        args, ["layers", "width", "heads", "length", "batch_size", "grad_accum", "seed"],
        total_steps=total_steps, data_sha256=info.sha256,
    )  # fmt: skip
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.muon_lr or args.lr, args.weight_decay)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, objective, optimizers, WeightAverage(model, args.ema_decay), settings, options, world)
    trainer.resume()
    if not trainer.run(batches) and not (args.minutes and time.monotonic() >= started + 60 * args.minutes):
        log.info("stopped at step %d; the same command goes on from there", trainer.step)
        return False
    if world.rank == 0:
        final = copy.deepcopy(model)
        trainer.average.copy_to(final)
        final.bfloat16().eval().save_pretrained(args.out / "final")
        windows = even_windows(valid, args.eval_samples, args.length).astype(np.int64)
        nll = judge_nll(final, torch.from_numpy(windows)).double()
        result = {
            "nats_per_token": float(nll.mean()),
            "standard_error": float(nll.std() / math.sqrt(len(nll))),
            "perplexity": math.exp(nll.mean()),
            "windows": len(nll),
            "step": trainer.step,
            "tokens": trainer.step * tokens_per_step,
            "valid": valid_info.sources,
        }
        with atomic_open(args.out / "eval.json", "w") as file:
            json.dump(result, file, indent=2)
        log.info("held-out %.4f nats a token", result["nats_per_token"])
    return True


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        check_arguments(args)
        if args.length < 2:
            raise ValueError(f"--length must be at least 2, got {args.length}")
        if args.width % args.heads:
            raise ValueError(f"--width {args.width} must be a multiple of --heads {args.heads}")
        if args.minutes is not None:
            args.stop_after = min(60 * args.minutes, args.stop_after or math.inf)
        torch.set_float32_matmul_precision("high")
        with joined_world(args.device) as world:
            train(args, world, started)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except (FloatingPointError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
