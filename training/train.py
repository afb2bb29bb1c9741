"""Train a masked diffusion denoiser with the objective of MD4 (2406.04329) and MDLM (2406.07524).

    python -m training.train --data book.txt --out runs/mine                 # any text; minutes on a CPU
    python -m training.train --data train.bin --valid test.bin --out runs/heavy --preset mdlm
    torchrun --nproc-per-node 8 -m training.train ...                        # the same run on eight GPUs

t is uniform in [eps, 1] (stratified over the global batch), each token is masked with probability t, and the loss is
the sum over masked tokens of -log p / t, divided by the number of tokens. With --block-causal, each block of a text is
predicted given the unmasked blocks before it (BD3-LM, 2503.09573), in passes of twice the length. The run's folder
holds checkpoints, log.jsonl, loss.png, and at the end final/ (float32), final-bf16/ and eval.json, all three of the
averaged weights. Starting the same command again goes on where it stopped; with one thread (OMP_NUM_THREADS=1) on a CPU
the pieces give the same run as one piece, to the bit. With more threads sums are taken in another order each time.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mdkern.files import write_whole
from mdkern.models import DiT, DiTConfig, load_dit, save_dit
from training.batches import MaskedBatches
from training.checkpoint import load_checkpoint, saved_config
from training.data import open_pair, open_tokens
from training.evaluate import held_out_nelbo, weighted_losses
from training.loop import Objective, World
from training.optim import WeightAverage
from training.options import (
    add_loop_arguments,
    add_optimizer_arguments,
    check_arguments,
    command_parser,
    make_trainer,
    run_command,
)
from training.prepare import prepare_text
from training.sizes import PRESETS, choose_sizes, fit_memory

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("training.train", __doc__, "--data FILE --out FOLDER")
    parser.add_argument("--data", type=Path, help="a text file, plain or .xz, or a token file (.bin of training.data)")
    parser.add_argument("--valid", type=Path, help="held-out token file; default for a text: its last 5 %%")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer's folder; default for a text: one trained on it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--preset",
        choices=["auto", *PRESETS],
        default="auto",
        help="what is not given below: tiny trains in minutes on a CPU, small is the shipped heavy model, mdlm has"
        " MDLM's size; auto (default) chooses by device and data",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--blocks", type=int)
    model.add_argument("--width", type=int)
    model.add_argument("--heads", type=int)
    model.add_argument("--mlp-ratio", type=int, default=4)
    model.add_argument("--length", type=int, help="tokens of a window")
    model.add_argument("--time-conditioning", action="store_true")
    model.add_argument("--untied-head", action="store_true", help="a head of its own instead of the embedding")
    model.add_argument("--block-causal", type=int, metavar="B", help="see only the blocks of B tokens up to one's own")
    run = parser.add_argument_group("run")
    run.add_argument("--tokens", type=float, help="tokens to train on, rounded up to whole steps")
    run.add_argument("--batch-size", type=int, help="sequences a step, all processes together")
    run.add_argument("--grad-accum", type=int, help="micro-batches a step and process; default: by the memory")
    run.add_argument("--eps", type=float, default=1e-3, help="smallest diffusion time")
    run.add_argument("--seed", type=int, default=0)
    add_optimizer_arguments(parser)
    add_loop_arguments(parser)
    open_settings = ("optimizer", "lr", "weight_decay", "schedule", "warmup", "ema_decay")
    parser.set_defaults(**dict.fromkeys(open_settings))  # the preset's
    end = parser.add_argument_group("evaluation")
    end.add_argument("--eval-samples", type=int, help="(window, t) pairs of the held-out NELBO")
    end.add_argument("--eval-batch-size", type=int, default=64)
    end.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint or final model in --out")
    return parser


def train(args: argparse.Namespace, world: World, started: float) -> None:
    """Train, and save and evaluate the averaged weights once the run is complete."""
    prepare(args, world)
    (tokens, info), (valid_tokens, _) = open_pair(args.data, args.valid)
    choose_sizes(args, len(tokens), len(valid_tokens))
    check_arguments(args)
    config = DiTConfig(
        vocab_size=info.vocab_size,
        mask_id=info.mask_id,
        eos_id=info.eos_id,
        max_length=args.length,
        num_blocks=args.blocks,
        width=args.width,
        num_heads=args.heads,
        mlp_ratio=args.mlp_ratio,
        time_conditioning=args.time_conditioning,
        tie_head=not args.untied_head,
        block_causal=args.block_causal,
    )
    if args.grad_accum is None and args.resume != "never":  # a resumed run keeps its number of micro-batches
        args.grad_accum = saved_config(args.out).get("grad_accum")
    fit_memory(args, config, world)
    batches = MaskedBatches(
        tokens, args.batch_size, args.length, info.mask_id, args.seed, args.eps, world.rank, world.size, args.grad_accum
    )
    torch.manual_seed(args.seed)
    model = DiT(config).to(world.device)
    objective = Objective(model, weighted_losses, world.size / (args.batch_size * args.length))
    settings = {"eps": args.eps, "data_sha256": info.sha256} | {f"model.{k}": v for k, v in asdict(config).items()}
    trainer = make_trainer(args, objective, settings, world, started)
    log.info(
        "%.2f M parameters, %d steps of %d tokens",
        sum(p.numel() for p in model.parameters()) / 1e6,
        trainer.options.total_steps,
        trainer.options.tokens_per_step,
    )
    if not trainer.run(batches):
        log.info("stopped at step %d; the same command goes on from there", trainer.step)
    elif world.rank == 0:
        final = copy.deepcopy(model)
        trainer.average.copy_to(final)
        save_dit(final, args.out / "final")
        evaluate(final, args, world, trainer.step)
        save_dit(final.bfloat16(), args.out / "final-bf16")
        log.info("sample from it:\n    %s", sampling_command(args))


def prepare(args: argparse.Namespace, world: World) -> None:
    """Replace a text file in the arguments by token files made from it."""
    if args.data.suffix == ".bin":
        if args.valid is None:
            raise ValueError("--valid is needed with a token file: a text has its own last part held out")
        return
    if args.valid is not None:
        raise ValueError("--valid goes with a token file (.bin) as --data: of a text the last part is held out")
    if world.size > 1:
        raise ValueError("--data must be a token file (.bin) for several processes: make it with training.data")
    args.data, args.valid, args.tokenizer = prepare_text(args.data, args.out / "data", args.tokenizer)


def sampling_command(args: argparse.Namespace) -> str:
    """The command line that samples from the finished run."""
    tokenizer = "TOKENIZER" if args.tokenizer is None else shlex.quote(str(args.tokenizer))
    steps = f"--steps {args.length}" if args.block_causal is None else f"--steps-per-block {args.block_causal}"
    return (
        f"mdkern sample --heavy {shlex.quote(str(args.out))} --tokenizer {tokenizer} --num-samples 2"
        f" --length {args.length} {steps}"
    )


def evaluate(model: DiT, args: argparse.Namespace, world: World, step: int | None = None) -> None:
    """Write the held-out NELBO of a model to eval.json."""
    tokens, info = open_tokens(args.valid)
    length = min(args.length or model.config.max_length, model.config.max_length, len(tokens))
    batch_size = min(args.eval_batch_size, args.eval_samples)
    result = held_out_nelbo(model.eval(), tokens, length, args.eval_samples, batch_size, world, args.seed, args.eps)
    bytes_per_token = info.text_bytes / info.count
    result |= {
        "bits_per_byte": result["nelbo_nats_per_token"] / math.log(2) / bytes_per_token,
        "valid": info.sources,
        "valid_sha256": info.sha256,
        "step": step,
    }
    write_whole(args.out / "eval.json", json.dumps(result, indent=2))
    log.info(
        "held-out NELBO %.4f nats a token, %.4f bits a byte", result["nelbo_nats_per_token"], result["bits_per_byte"]
    )


def evaluate_only(args: argparse.Namespace, world: World) -> None:
    """Evaluate the averaged weights of the checkpoint in --out, or its final model where there is no checkpoint."""
    state = load_checkpoint(args.out)
    if state is None:
        if not (args.out / "final").is_dir():
            raise FileNotFoundError(f"{args.out} has neither a checkpoint nor a final model")
        evaluate(load_dit(args.out / "final", device=world.device), args, world)
        return
    prefix = "model."
    settings = {k.removeprefix(prefix): v for k, v in state["config"].items() if k.startswith(prefix)}
    model = DiT(DiTConfig(**settings)).to(world.device)
    average = WeightAverage(model, 0.0)
    average.load_state_dict(state["average"])
    average.copy_to(model)
    evaluate(model, args, world, state["step"])


def check(args: argparse.Namespace) -> None:
    """Refuse a run without data, and fill in what evaluation alone needs."""
    if args.eval_only:
        args.valid = args.valid or args.out / "data" / "valid.bin"
        args.eval_samples = args.eval_samples or PRESETS["tiny"]["eval_samples"]
    elif args.data is None:
        raise ValueError("--data is needed to train")


def work(args: argparse.Namespace, world: World, started: float) -> None:
    if args.eval_only:
        evaluate_only(args, world)
    else:
        train(args, world, started)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), argv, check, work)


if __name__ == "__main__":
    raise SystemExit(main())
