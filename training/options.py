"""What the commands that train a denoiser and the judge have in common: arguments, the trainer, errors."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from training.loop import LoopOptions, Objective, Trainer, World, joined_world
from training.optim import WeightAverage, lr_schedule, make_optimizers

# What all runs have of what makes them what they are.
SETTINGS = ("length", "batch_size", "grad_accum", "seed", "optimizer", "lr", "muon_lr", "weight_decay", "schedule",
            "lr_floor", "warmup", "clip", "ema_decay")  # fmt: skip

BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    ("blocks width heads mlp_ratio length tokens batch_size grad_accum workers log_every lr muon_lr clip eval_samples "
     "eval_batch_size stop_after block_causal epochs round_to", lambda value: value > 0, "be greater than 0"),
    ("eps", lambda value: 0 < value < 0.5, "lie between 0 and 0.5"),
    ("random_length share_on_policy", lambda value: 0 <= value <= 1, "lie between 0 and 1"),
    ("lr_floor ema_decay valid_share", lambda value: 0 <= value < 1, "lie between 0 and 1"),
    ("warmup weight_decay checkpoint_every seed tail", lambda value: value >= 0, "not be negative"),
]  # fmt: skip


def command_parser(module: str, document: str | None, needed: str = "") -> argparse.ArgumentParser:
    """A parser of ``python -m module``, which says of itself the first line of the module's documentation.

    Args:
        needed: the options that must be given, for the line of usage: all of them would hide an error.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        usage=f"%(prog)s {needed} [options]" if needed else None,
        description=(document or "").split("\n")[0],
        allow_abbrev=False,
    )


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimiser")
    group.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    group.add_argument("--lr", type=float, default=3e-4, help="peak rate of AdamW")
    group.add_argument("--muon-lr", type=float, help="peak rate of Muon (default: --lr)")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of matrices")
    group.add_argument("--schedule", choices=["constant", "cosine"], default="constant")
    group.add_argument("--lr-floor", type=float, default=0.0, help="last rate of the cosine, as a fraction of the peak")
    group.add_argument("--warmup", type=int, default=2500, help="steps of linear warm-up")
    group.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    group.add_argument("--ema-decay", type=float, default=0.9999)


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--float32", action="store_true", help="neither bfloat16 nor TF32 (both are for CUDA only)")
    group.add_argument("--no-compile", action="store_true", help="no torch.compile (used on CUDA only)")
    group.add_argument("--workers", type=int, default=3, help="threads that prepare batches")
    group.add_argument("--log-every", type=int, default=20, help="steps between two readings of the loss")
    group.add_argument("--checkpoint-every", type=float, default=120.0, help="seconds")
    group.add_argument("--stop-after", type=float, help="seconds after which to checkpoint and stop")
    group.add_argument("--resume", choices=["auto", "must", "never"], default="auto")


def refuse_idle(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise ValueError if one of these options was given, because it has no effect: `why` follows these words."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect {why}")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError on the first argument that cannot work, before any file is read or written."""
    for names, holds, wanted in BOUNDS:
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not holds(value):
                raise ValueError(f"--{name.replace('_', '-')} must {wanted}, got {value}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device here")


def make_trainer(
    args: argparse.Namespace, objective: Objective, settings: dict[str, Any], world: World, started: float
) -> Trainer:
    """The trainer of ``objective.model``, at its checkpoint if there is one.

    Args:
        objective: a batch's loss.
        settings: beside the arguments that all runs have, what makes the run what it is: resuming with others is
            refused.
        started: the `time.monotonic()` from which --stop-after counts.
    """
    if world.device.type == "cuda" and not args.no_compile:
        objective.compile(dynamic=False)
    tokens_per_step = args.batch_size * args.length
    total_steps = math.ceil(args.tokens / tokens_per_step)
    options = LoopOptions(
        out=args.out,
        total_steps=total_steps,
        tokens_per_step=tokens_per_step,
        schedule=lr_schedule(args.schedule, args.warmup, total_steps, args.lr_floor),
        clip=args.clip,
        checkpoint_every=args.checkpoint_every,
        log_every=args.log_every,
        deadline=None if args.stop_after is None else started + args.stop_after,
        resume=args.resume,
        workers=args.workers,
    )
    config = {name: getattr(args, name) for name in SETTINGS} | {"total_steps": total_steps} | settings
    model = objective.model
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.muon_lr or args.lr, args.weight_decay)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(objective, optimizers, WeightAverage(model, args.ema_decay), config, options, world)
    trainer.resume()
    return trainer


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    check: Callable[[argparse.Namespace], None],
    work: Callable[[argparse.Namespace, World, float], None],
) -> int:
    """Parse and check a command line, join the other processes and work. Returns the exit code.

    `work` takes the arguments, the processes and the `time.monotonic()` at which the command began.
    """
    started = time.monotonic()
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s")
    set_level(logging.INFO)
    try:
        check_arguments(args)
        check(args)
        torch.set_float32_matmul_precision("highest" if args.float32 else "high")
        with joined_world(args.device, args.float32) as world:
            if world.rank:
                set_level(logging.WARNING)
            work(args, world, started)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except (FloatingPointError, OSError) as error:  # a full disk: what was written before is whole
        logging.getLogger(__name__).error("%s", error)
        return 1
    return 0


def set_level(level: int) -> None:
    """Of what the commands themselves log; of libraries only warnings are shown."""
    for name in ("training", "__main__"):
        logging.getLogger(name).setLevel(level)
