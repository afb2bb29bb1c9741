"""Fine-tune a denoiser on prompts with responses: supervised, or on its own answers so that decoding can be parallel.

    python -m training.finetune --model runs/base --tokenizer tokenizer/ --data pairs.jsonl --out runs/sft
    python -m training.finetune --model runs/base --data answers.jsonl --out runs/oput --objective oput
    torchrun --nproc-per-node 8 -m training.finetune ...

A line of the data is {"prompt": ..., "response": ...}, texts or lists of token ids, as `mdkern sample --prompts FILE
--stop-at-eos --output pairs.jsonl` writes the model's own. Responses are padded with end of
text to the longest of the batch; prompts are never masked. Objectives (`training.pairs.Noise`): sft is LLaDA's
(2502.09992); oput is DMax's on-policy uniform training, for which the responses should be the model's own; masked and
uniform are what it is to be compared with, on the same data. The run's folder and resumption are as of
`training.train`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mdkern.digest import digest
from mdkern.files import write_whole
from mdkern.models import DiT, load_dit, save_dit
from training.checkpoint import saved_config
from training.data import TextEncoder
from training.evaluate import held_out_responses
from training.loop import Objective, World
from training.objectives import response_losses
from training.options import (
    add_loop_arguments,
    add_optimizer_arguments,
    command_parser,
    make_trainer,
    refuse_idle,
    run_command,
)
from training.pairs import NORMALISERS, Epochs, Noise, Pairs, ResponseBatches, Source, read_pairs
from training.sizes import fit_memory

log = logging.getLogger(__name__)

OBJECTIVES = "sft", "oput", "masked", "uniform"


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("training.finetune", __doc__, "--model FOLDER --data FILE --out FOLDER")
    parser.add_argument("--model", type=Path, required=True, help="folder of the denoiser to start from")
    parser.add_argument("--data", type=Path, required=True, help="pairs as JSON lines, plain or .xz")
    parser.add_argument("--tokenizer", type=Path, help="its folder, if the pairs are texts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--valid", type=Path, help="held-out pairs (default: a share of the data)")
    parser.add_argument("--valid-share", type=float, default=0.05, help="of the data, held out without --valid")
    noise = parser.add_argument_group("objective")
    noise.add_argument("--objective", choices=OBJECTIVES, default="sft")
    noise.add_argument(
        "--normalise",
        choices=NORMALISERS,
        default="sequence",
        help="divide each sequence's loss by its own length (LLaDA, DMax), the batch's by its tokens (SMDM) or by its"
        " sequences",
    )
    noise.add_argument("--eps", type=float, default=1e-3, help="sft: smallest diffusion time")
    noise.add_argument(
        "--ratio", type=float, nargs="+", default=[0.75], help="others: share that is noisy, or LOW HIGH"
    )
    noise.add_argument("--tail", type=int, default=32, help="others: ends of text that are predicted after a response")
    noise.add_argument("--masked-labels", action="store_true", help="others: predict noisy tokens only")
    noise.add_argument("--share-on-policy", type=float, default=0.5, help="oput: share of sequences with roll-out")
    noise.add_argument("--rollout", choices=["argmax", "sample"], default="argmax", help="oput: the model's own tokens")
    run = parser.add_argument_group("run")
    run.add_argument("--epochs", type=float, default=3, help="passes over the data")
    run.add_argument("--batch-size", type=int, default=64, help="sequences a step, all processes together")
    run.add_argument("--grad-accum", type=int, help="micro-batches a step and process; default: by the memory")
    run.add_argument("--length", type=int, help="longest pair in tokens (default: the model's longest)")
    run.add_argument("--drop-long", action="store_true", help="leave out longer pairs instead of refusing them")
    run.add_argument("--finished-only", action="store_true", help="leave out samples that did not end by themselves")
    run.add_argument("--round-to", type=int, default=32, help="batches' widths are multiples of so many tokens")
    run.add_argument("--random-length", type=float, default=0.0, help="share of steps cut to a random length")
    run.add_argument("--seed", type=int, default=0)
    add_optimizer_arguments(parser)
    add_loop_arguments(parser)
    parser.set_defaults(lr=1e-5, warmup=50, weight_decay=0.1, ema_decay=0.99, schedule="cosine", lr_floor=0.1)
    end = parser.add_argument_group("evaluation")
    end.add_argument("--eval-samples", type=int, default=1024, help="(pair, t) pairs; before and after")
    end.add_argument("--eval-batch-size", type=int, default=64)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work, or that have no effect with the objective."""
    if len(args.ratio) > 2 or not all(0 < ratio <= 1 for ratio in args.ratio) or args.ratio[0] > args.ratio[-1]:
        raise ValueError(f"--ratio must be a share in 0..1, or two in order, got {args.ratio}")
    parser = build_parser()
    without_effect = {
        "sft": ("ratio", "tail", "masked_labels", "share_on_policy", "rollout"),
        "oput": ("eps",),
    }.get(args.objective, ("eps", "share_on_policy", "rollout"))
    refuse_idle(parser, args, without_effect, f"with --objective {args.objective}")
    if args.valid is not None:
        refuse_idle(parser, args, ["valid_share"], "with --valid")


def noise_of(args: argparse.Namespace, model: DiT) -> Noise:
    """The objective of a command line, for a model.

    Raises:
        ValueError: the model has no end of text, or several.
    """
    config = model.config
    if not isinstance(config.eos_id, int):
        raise ValueError(f"{args.model}: its config must have one end of text (eos_id), not {config.eos_id!r}")
    return Noise(
        args.objective,
        config.mask_id,
        config.eos_id,
        config.vocab_size,
        normalise=args.normalise,
        eps=args.eps,
        ratio=(args.ratio[0], args.ratio[-1]),
        tail=args.tail,
        share_on_policy=args.share_on_policy,
        masked_labels=args.masked_labels,
    )


def fit(
    args: argparse.Namespace,
    model: DiT,
    source: Source,
    steps: int,
    world: World,
    started: float,
    settings: dict[str, Any],
) -> DiT | None:
    """Train `model` in place for so many steps, from its checkpoint in ``args.out`` if there is one.

    Args:
        args: of `build_parser`; `length` must be the widest batch's.
        source: step -> the pairs of the global batch.
        settings: what the source depends on; resuming with others is refused.
        started: the `time.monotonic()` from which --stop-after counts.

    Returns:
        A model with the averaged weights, or None if the run was stopped before its end.
    """
    noise = noise_of(args, model)
    args.tokens = steps * args.batch_size * args.length
    if args.grad_accum is None and args.resume != "never":  # a resumed run keeps its number of micro-batches
        args.grad_accum = saved_config(args.out).get("grad_accum")
    fit_memory(args, model.config, world)
    batches = ResponseBatches(
        source, noise, args.batch_size, args.seed, args.random_length, args.round_to,
        world.rank, world.size, args.grad_accum,
    )  # fmt: skip
    losses = partial(response_losses, sampled=args.rollout == "sample")
    objective = Objective(model, losses, world.size)
    settings = settings | {f"noise.{name}": listed(value) for name, value in asdict(noise).items()}
    settings |= {"random_length": args.random_length, "round_to": args.round_to, "rollout": args.rollout}
    settings["start_sha256"] = digest(dict(model.named_parameters()))
    trainer = make_trainer(args, objective, settings, world, started)
    log.info("%s: %d steps of %d sequences", args.objective, trainer.options.total_steps, args.batch_size)
    if not trainer.run(batches):
        log.info("stopped at step %d; the same command goes on from there", trainer.step)
        return None
    final = copy.deepcopy(model)
    trainer.average.copy_to(final)
    return final


def listed(value: Any) -> Any:
    """As it is after a round through a checkpoint, so that settings can be compared."""
    return list(value) if isinstance(value, tuple) else value


def finetune(args: argparse.Namespace, world: World, started: float) -> None:
    """Fine-tune, and save and evaluate the averaged weights once the run is complete."""
    model = load_dit(args.model, device=world.device).float()
    pairs, valid = open_data(args, model)
    args.length = math.ceil(int(pairs.lengths.max()) / args.round_to) * args.round_to
    if args.length > model.config.max_length:
        args.round_to = 1
        args.length = int(pairs.lengths.max())
    log.info("%d pairs to train on, %d held out, at most %d tokens", len(pairs), len(valid), args.length)
    source = Epochs(pairs, args.batch_size, noise_of(args, model).eos_id, args.seed, args.round_to)
    steps = math.ceil(args.epochs * len(pairs) / args.batch_size)
    evaluated = partial(
        held_out_responses,
        pairs=valid,
        samples=args.eval_samples,
        batch_size=min(args.eval_batch_size, args.eval_samples),
        world=world,
        seed=args.seed,
        multiple=args.round_to,
    )
    before = evaluated(model)
    final = fit(args, model, source, steps, world, started, {"data_sha256": pairs.sha256})
    if final is None or world.rank:
        return
    save_dit(final, args.out / "final")
    after = evaluated(final)
    write_whole(args.out / "eval.json", json.dumps({"before": before, "after": after}, indent=2))
    save_dit(final.bfloat16(), args.out / "final-bf16")
    log.info(
        "held-out responses: %.3f nats before, %.3f after",
        before["nelbo_nats_per_response"],
        after["nelbo_nats_per_response"],
    )


def open_data(args: argparse.Namespace, model: DiT) -> tuple[Pairs, Pairs]:
    """The pairs to train on and the held-out ones, none longer than the model takes.

    Raises:
        ValueError: what `read_pairs` raises; longer pairs without --drop-long; too few pairs.
    """
    encoder = None if args.tokenizer is None else TextEncoder.load(args.tokenizer)
    eos_id, size = noise_of(args, model).eos_id, model.config.vocab_size
    if encoder is not None and (encoder.vocab_size, encoder.eos_id) != (size, eos_id):
        raise ValueError(f"{args.tokenizer} is not the tokenizer of {args.model}: vocabulary or end of text differ")
    most = min(args.length or model.config.max_length, model.config.max_length)
    files = [args.data] if args.valid is None else [args.data, args.valid]
    found = [read_pairs(path, encoder, eos_id, size, args.finished_only) for path in files]
    read = [fitting(pairs, most, args.drop_long, path) for pairs, path in zip(found, files)]
    if args.valid is not None:
        return read[0], read[1]
    order = np.random.default_rng(0).permutation(len(read[0]))
    count = max(1, round(args.valid_share * len(order)))
    if count >= len(order):
        raise ValueError(f"{args.data} has {len(order)} pairs: with {count} held out none is left to train on")
    return read[0].select(np.sort(order[count:])), read[0].select(np.sort(order[:count]))


def fitting(pairs: Pairs, most: int, drop: bool, path: Path) -> Pairs:
    """The pairs of at most so many tokens. Raises ValueError if there are longer ones that may not be dropped."""
    fits = pairs.lengths <= most
    if fits.all():
        return pairs
    count = int((~fits).sum())
    if not drop or not fits.any():
        raise ValueError(
            f"{path}: {count} of {len(pairs)} pairs have more than {most} tokens: --drop-long leaves them out"
        )
    log.info("%s: %d of %d pairs have more than %d tokens and are left out", path, count, len(pairs), most)
    return pairs.select(np.flatnonzero(fits))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), argv, check, finetune)


if __name__ == "__main__":
    raise SystemExit(main())
