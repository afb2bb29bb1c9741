"""Learn the exponents of `mdkern.decoders.GenMD4` for a trained denoiser.

    python -m training.exponents --model runs/heavy/final --data train.bin --valid test.bin --out runs/exponents
    mdkern sample --decoder genmd4:exponents=runs/exponents/exponents.txt

With the noise schedule ``alpha_{t,i} = 1 - t^{w_i}`` of GenMD4 (Shi et al., 2406.04329, section 6), here with one w for
each position, position i is masked at time t with probability t^{w_i}, and the negative evidence lower bound is

    E_t E_masks sum over masked i of (w_i / t) (-log p(x_i | what is not masked)).

The masks depend on w, so the gradient has a part by REINFORCE: two sets of masks are drawn at each time, and each is
the other's baseline (leave-one-out). The bound does not change when all exponents are multiplied by one number; their
geometric mean is kept at 1. The denoiser is not trained. Exponents are easily fitted to noise: the command prints the
bound with them and with w = 1 on held-out text, with the standard error of the difference. It goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mdkern
from mdkern.digest import model_digest
from mdkern.evaluation.intervals import estimate
from mdkern.evaluation.scores import masked_hidden, target_log_prob
from mdkern.files import write_whole
from mdkern.models import Denoiser
from training.batches import Array, even_windows, random_windows, step_generator, stratified_times
from training.checkpoint import check_same_config, load_checkpoint, save_checkpoint
from training.data import open_pair
from training.options import command_parser

log = logging.getLogger("training.exponents")
EPS = 1e-3
LATEST = 1.0 - 2.0**-20  # at 1 nothing can be revealed, and the logarithm of that has no gradient
TEST_STREAM = 7  # of `step_generator`
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]  # ids [B, L], masks bool [B, L], t [B] -> nats [B, L]


def log_mask(exponents: Tensor, t: Tensor, masked: Tensor) -> Tensor:
    """Log-probability of ``masked [B, L]`` at times ``t [B]``: ``[B]``."""
    log_p = exponents * t.log()[:, None]
    return torch.where(masked, log_p, torch.log(-torch.expm1(log_p))).sum(-1)


def integrand(exponents: Tensor, t: Tensor, masked: Tensor, losses: Tensor) -> Tensor:
    """The bound's integrand: the sum over masked positions of ``(w / t) losses``, ``[B]``."""
    return (torch.where(masked, losses, 0.0) * exponents).sum(-1) / t


def surrogate(exponents: Tensor, t: Tensor, masks: tuple[Tensor, Tensor], losses: tuple[Tensor, Tensor]) -> Tensor:
    """A function ``[B]`` whose gradient is an unbiased estimate of that of the integrand's mean.

    Args:
        exponents: ``[L]``.
        masks: two draws, bool ``[B, L]`` each, at the same times ``t [B]``.
        losses: the cross-entropies with either, ``[B, L]``; not read where nothing is masked.
    """
    a, b = (integrand(exponents, t, masked, loss) for masked, loss in zip(masks, losses))
    log_a, log_b = (log_mask(exponents, t, masked) for masked in masks)
    return 0.5 * (a + b) + 0.5 * (a - b).detach() * (log_a - log_b)


def losses_of(denoiser: Denoiser) -> Losses:
    """Cross-entropies of a denoiser at masked positions, nats, 0 elsewhere."""

    @torch.no_grad()
    def losses(ids: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        rows = masked.flatten().nonzero()[:, 0]
        hidden = masked_hidden(denoiser, ids, masked, t)
        found = torch.zeros(ids.numel(), device=ids.device)
        found[rows] = -target_log_prob(denoiser.head, hidden, rows, ids.flatten()[rows])
        return found.view(ids.shape)

    return losses


def train(
    losses: Losses,
    windows_of: Callable[[np.random.Generator], Tensor],
    length: int,
    seed: int,
    steps: int,
    lr: float,
    state: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    keep_every: int = 100,
) -> Tensor:
    """Learn exponents, float32 ``[length]``, with a geometric mean of 1. Each step is a function of seed and number.

    Args:
        windows_of: draws a batch of texts, int64 ``[B, length]``, on the device.
        state, keep: where to go on, and what to do with the state every `keep_every` steps and at the end.
    """
    first = int(state["step"]) if state else 0
    device = windows_of(step_generator(seed, first)).device
    log_w = (state["log_w"] if state else torch.zeros(length)).clone().to(device).requires_grad_()
    optimizer = torch.optim.Adam([log_w], lr=lr)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, steps):
        generator = step_generator(seed, step)
        ids = windows_of(generator)
        t = torch.from_numpy(stratified_times(len(ids), EPS, generator)).to(device).clamp(max=LATEST)
        exponents = log_w.exp()
        chance = t[:, None] ** exponents.detach()
        uniforms = torch.from_numpy(generator.random((2, *ids.shape), dtype=np.float32)).to(device)
        masks = uniforms[0] < chance, uniforms[1] < chance
        found = losses(ids, masks[0], t), losses(ids, masks[1], t)
        optimizer.zero_grad()
        (surrogate(exponents, t, masks, found).mean() / length).backward()
        optimizer.step()
        with torch.no_grad():
            log_w -= log_w.mean()
        if keep is not None and ((step + 1) % keep_every == 0 or step + 1 == steps):
            now = {"step": step + 1, "log_w": log_w.detach().cpu(), "optimizer": optimizer.state_dict()}
            keep(copy.deepcopy(now))
    return log_w.detach().exp()


def bounds(losses: Losses, ids: Tensor, exponents: Tensor, seed: int, batch: int) -> Tensor:
    """The bound's integrand by text, nats a token, float64 ``[N]``; equal draws for all exponents."""
    parts = []
    for number, texts in enumerate(ids.split(batch)):
        generator = step_generator(seed, number, TEST_STREAM)
        times = generator.permutation(stratified_times(batch, EPS, generator))[: len(texts)]
        t = torch.from_numpy(times).to(ids.device)
        uniforms = torch.from_numpy(generator.random(texts.shape, dtype=np.float32)).to(ids.device)
        masked = uniforms < t[:, None] ** exponents
        found = integrand(exponents, t, masked, losses(texts, masked, t)) / texts.shape[1]
        parts.append(found.double().cpu())
    return torch.cat(parts)


def compare(losses: Losses, ids: Tensor, exponents: Tensor, seed: int, batch: int) -> dict[str, float]:
    """The bound with the exponents and with w = 1, and their difference with its standard error."""
    ours, plain = (bounds(losses, ids, w, seed, batch) for w in (exponents, torch.ones_like(exponents)))
    difference = estimate(ours - plain)
    return {
        "learned": float(ours.mean()),
        "plain": float(plain.mean()),
        "difference": difference.mean,
        "standard_error": difference.standard_error,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("training.exponents", __doc__, "--model FOLDER --data FILE --valid FILE --out FOLDER")
    parser.add_argument("--model", required=True, help="what mdkern.from_pretrained takes")
    parser.add_argument("--data", type=Path, required=True, help="training token file")
    parser.add_argument("--valid", type=Path, required=True, help="held-out token file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--length", type=int, default=256, help="positions (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--eval-samples", type=int, default=4096, help="held-out windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def run(args: argparse.Namespace) -> None:
    for name in ("length", "steps", "batch_size", "lr", "eval_samples"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(args, name)}")
    (tokens, info), (valid, _) = open_pair(args.data, args.valid)
    denoiser = mdkern.from_pretrained(args.model, device_map=args.device)
    if denoiser.vocab_size < info.vocab_size or denoiser.mask_id != info.mask_id:
        raise ValueError(f"{args.data} was made with another tokenizer than {args.model}")
    settings = {name: getattr(args, name) for name in ("length", "batch_size", "lr", "seed")}
    config = settings | {"data_sha256": info.sha256, "model_sha256": model_digest(denoiser)}
    args.out.mkdir(parents=True, exist_ok=True)
    state = load_checkpoint(args.out)
    if state is not None:
        check_same_config(state["config"], config, args.out)

    def on_device(windows: Array) -> Tensor:
        return torch.from_numpy(windows.astype(np.int64)).to(denoiser.device)

    losses = losses_of(denoiser)
    exponents = train(
        losses,
        lambda generator: on_device(random_windows(tokens, args.batch_size, args.length, generator)),
        args.length,
        args.seed,
        args.steps,
        args.lr,
        state,
        lambda found: save_checkpoint(args.out, found | {"config": config}),
    )
    write_whole(args.out / "exponents.txt", "\n".join(f"{w:.8g}" for w in exponents.tolist()) + "\n")
    seen = {"train": tokens, "held out": valid}
    found = {
        name: compare(losses, on_device(even_windows(data, args.eval_samples, args.length)), exponents, args.seed,
                      args.batch_size)
        for name, data in seen.items()
    }  # fmt: skip
    write_whole(args.out / "eval.json", json.dumps(found, indent=1) + "\n")
    for name, row in found.items():
        print(f"{name}: {row['learned']:.4f} nats a token, {row['plain']:.4f} with w = 1, "
              f"difference {row['difference']:+.4f} +- {row['standard_error']:.4f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s")
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
