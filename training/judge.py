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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mdkern.evaluation.intervals import estimate
from mdkern.evaluation.text import judge, next_token_losses
from mdkern.files import write_whole
from training.batches import even_windows, own_shards, random_windows, step_generator
from training.data import TokenFileInfo, open_pair
from training.loop import Objective, World
from training.options import add_loop_arguments, add_optimizer_arguments, command_parser, make_trainer, run_command

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


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("training.judge", __doc__, "--data FILE --valid FILE --out FOLDER")
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


def train(args: argparse.Namespace, world: World, started: float) -> None:
    """Train the judge; once it is finished, save it and write its held-out likelihood."""
    (tokens, info), (valid, valid_info) = open_pair(args.data, args.valid)
    own = own_shards(args.batch_size, world.rank, world.size, args.grad_accum)

    def batches(step: int) -> list[tuple[Tensor, ...]]:
        windows = random_windows(tokens, args.batch_size, args.length, step_generator(args.seed, step)).astype(np.int64)
        return [(torch.from_numpy(windows[part].copy()),) for part in own]

    torch.manual_seed(args.seed)
    model = make_judge(info, args.layers, args.width, args.heads, args.length).to(world.device)  # type: ignore[arg-type]
    objective = Objective(model, next_token_losses, world.size / (args.batch_size * (args.length - 1)))
    settings = {name: getattr(args, name) for name in ("layers", "width", "heads")} | {"data_sha256": info.sha256}
    trainer = make_trainer(args, objective, settings, world, started)
    if not trainer.run(batches) and not (args.minutes and time.monotonic() >= started + 60 * args.minutes):
        log.info("stopped at step %d; the same command goes on from there", trainer.step)
    elif world.rank == 0:
        final = copy.deepcopy(model)
        trainer.average.copy_to(final)
        final.bfloat16().eval().save_pretrained(args.out / "final")
        windows = even_windows(valid, args.eval_samples, args.length).astype(np.int64)
        judged = estimate(judge(final, torch.from_numpy(windows)).nats_per_token())
        result = {
            "nats_per_token": judged.mean,
            "standard_error": judged.standard_error,
            "perplexity": math.exp(judged.mean),
            "windows": judged.count,
            "step": trainer.step,
            "tokens": trainer.step * trainer.options.tokens_per_step,
            "valid": valid_info.sources,
        }
        write_whole(args.out / "eval.json", json.dumps(result, indent=2))
        log.info("held-out %.4f nats a token", judged.mean)


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work, and let --minutes stop the loop."""
    if args.length < 2:
        raise ValueError(f"--length must be at least 2, got {args.length}")
    if args.width % args.heads:
        raise ValueError(f"--width {args.width} must be a multiple of --heads {args.heads}")
    if args.minutes is not None:
        args.stop_after = min(60 * args.minutes, args.stop_after or math.inf)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), argv, check, train)


if __name__ == "__main__":
    raise SystemExit(main())
