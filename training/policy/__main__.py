"""Train a learned decoder for a model.

    python -m training.policy --model mdkern/pretrained/heavy --tokenizer mdkern/pretrained/tokenizer \\
        --text held-out.txt --out runs/policy

Texts are cut from a file that the model has not seen. In each, `--written` positions are masked, which the model then
writes in blocks of `--block-length`. The network learns which of its proposals are what it writes in the end
(`training.policy.states`). The folders `linear` and `mlp` of --out are policies for `mdkern.decoders.Learned`;
`report.json` says how good they are on the last texts, beside the probability itself.

With --closed-loop the linear one is improved in use: by a judge of the finished texts, and their passes
(`training.policy.closed_loop`). With --order a network learns in which order texts are the most likely
(`training.policy.order`). The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import mdkern
from mdkern.decoders import Policy
from mdkern.digest import model_digest
from mdkern.files import replacing, write_whole
from mdkern.models import Denoiser
from training.data import TextEncoder, paragraphs
from training.options import command_parser, refuse_idle
from training.policy.closed_loop import Strategy, improve, value_in_use
from training.policy.fit import HIDDEN, fit_filter, report, split, table
from training.policy.order import train_order
from training.policy.states import FIELDS, States, collect

log = logging.getLogger("training.policy")
SETTING = "setting.json"
ENCODED_AT_ONCE = 256  # paragraphs


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("training.policy", __doc__, "--model FOLDER --text FILE --out FOLDER")
    parser.add_argument("--model", required=True, help="what mdkern.from_pretrained takes")
    parser.add_argument("--tokenizer", type=Path, help="its folder (default: the model's)")
    parser.add_argument("--text", required=True, help="a text file, plain or .xz, that the model was not trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--texts", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--test-share", type=float, default=0.2, help="of the texts, the last ones, for testing")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--written", type=int, default=128, help="of them those that are written")
    parser.add_argument("--task", choices=["infill", "continue"], default="infill",
                        help="whether they lie in the middle or at the end (default: infill)")  # fmt: skip
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0, help="with the same noise at every step (default: 0)")
    parser.add_argument("--bound", type=float, default=0.9, help="default bound of the policies (default: 0.9)")
    parser.add_argument("--steps", type=int, default=2000, help="of fitting")
    parser.add_argument("--chunk", type=int, default=512, help="texts in a batch, and in a file of states")
    parser.add_argument("--closed-loop", metavar="PRICE", type=float,
                        help="improve the linear score in use; of a pass per token, in nats per token")  # fmt: skip
    parser.add_argument("--judge", type=Path, help="a causal model of transformers with the same tokenizer")
    parser.add_argument("--rounds", type=int, default=12, help="of the closed loop")
    parser.add_argument("--loop-texts", type=int, default=256, help="texts of a round")
    parser.add_argument("--order", action="store_true", help="also train an order")
    parser.add_argument("--order-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work, before any file is read or written."""
    if (args.closed_loop is None) != (args.judge is None):
        raise ValueError("--closed-loop and --judge go together: a judge says how good the finished texts are")
    if args.closed_loop is None:
        refuse_idle(build_parser(), args, ["rounds", "loop_texts"], "without --closed-loop")
    if not args.order:
        refuse_idle(build_parser(), args, ["order_steps"], "without --order")
    for name in ("texts", "length", "written", "block_length", "steps", "chunk", "rounds", "loop_texts", "order_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.written >= args.length:
        raise ValueError(f"--written {args.written} must be less than --length {args.length}: nothing would be given")
    if not 0.0 < args.test_share < 1.0 or round(args.texts * args.test_share) in (0, args.texts):
        raise ValueError(f"--test-share must leave texts on both sides, not {args.test_share:g} of {args.texts}")
    if not 0.0 < args.bound < 1.0:
        raise ValueError(f"--bound must lie between 0 and 1, not {args.bound:g}")


def read_texts(source: str, encoder: TextEncoder, count: int, length: int) -> Tensor:
    """The first `count` windows of a text, int64 ``[count, length]``.

    Raises:
        ValueError: a text that is too short.
    """
    ids: list[int] = []
    pending: list[str | None] = []
    for item in paragraphs(source):
        pending.append(item)
        if len(pending) == ENCODED_AT_ONCE:
            ids += encoder.encode(pending)
            pending = []
        if len(ids) >= count * length:
            break
    ids += encoder.encode(pending) if pending else []
    if len(ids) < count * length:
        raise ValueError(f"{source} has {len(ids)} tokens, fewer than {count} texts of {length}: give fewer --texts")
    return torch.tensor(ids[: count * length]).view(count, length)


def masked(texts: Tensor, task: str, written: int, mask_id: int) -> Tensor:
    """The texts with masks where the model is to write."""
    length = texts.shape[1]
    first = (length - written) // 2 if task == "infill" else length - written
    column = torch.arange(length)
    return torch.where((column >= first) & (column < first + written), mask_id, texts)


def same_setting(folder: Path, setting: dict[str, Any]) -> None:
    """Note the setting of a run, or refuse one that differs from what is noted."""
    path = folder / SETTING
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(setting, indent=1) + "\n")
        return
    known = json.loads(path.read_text())
    differing = [name for name in setting if known.get(name) != setting[name]]
    if differing:
        raise ValueError(f"{folder} is another run ({', '.join(differing)} differ): give another --out")


def collect_all(denoiser: Denoiser, ids: Tensor, args: argparse.Namespace) -> States:
    """The states of all texts, chunk after chunk; those that are there are read."""
    parts = []
    for first in range(0, len(ids), args.chunk):
        path = args.out / f"states-{first:06d}.safetensors"
        if not path.exists():
            rows = ids[first : first + args.chunk].to(denoiser.device)
            states, _ = collect(denoiser, rows, first, args.block_length, args.temperature, args.seed)
            with replacing(path) as file:
                file.write(save({name: getattr(states, name).cpu().contiguous() for name in FIELDS}))
            log.info("texts %d to %d: %d positions", first, first + len(rows) - 1, len(states.right))
        found = load_file(path, device=str(denoiser.device))
        parts.append(States(*(found[name] for name in FIELDS)))
    return States.join(parts)


def close_loop(denoiser: Denoiser, policy: Policy, ids: Tensor, args: argparse.Namespace) -> None:
    """Improve a policy in use, and save it."""
    from transformers import AutoModelForCausalLM

    judging: Any = AutoModelForCausalLM.from_pretrained(args.judge, dtype=torch.float32)
    judging = judging.to(denoiser.device).eval()
    options = {"block_length": args.block_length, "temperature": args.temperature, "seed": args.seed}
    options["batch_size"] = min(args.chunk, len(ids))
    value_of = value_in_use(denoiser, judging, ids.to(denoiser.device), args.closed_loop, **options)
    name = f"closed-loop-{args.closed_loop:g}"
    history = improve(policy, value_of, args.out / f"{name}.json", args.seed, Strategy(rounds=args.rounds))
    policy.save(args.out / name)
    values = [entry["value"] for entry in history]
    print(f"closed loop, a pass at {args.closed_loop:g}: value {values[0]:.4f} at first, {max(values):.4f} at best")


def run(args: argparse.Namespace) -> dict[str, Policy]:
    """Collect, fit and save; the policies that were fitted."""
    denoiser = mdkern.from_pretrained(args.model, device_map=args.device)
    encoder = TextEncoder.load(args.tokenizer or Path(args.model))
    if encoder.vocab_size > denoiser.vocab_size:
        raise ValueError(f"the tokenizer has {encoder.vocab_size} ids, the model {denoiser.vocab_size}: give its own")
    facts = {
        "block_length": args.block_length, "vocab_size": denoiser.vocab_size, "model_sha256": model_digest(denoiser)
    }  # fmt: skip
    kept = ("texts", "length", "written", "task", "temperature", "chunk", "seed")
    same_setting(args.out, {name: getattr(args, name) for name in kept} | facts)
    texts = read_texts(args.text, encoder, args.texts, args.length)
    states = collect_all(denoiser, masked(texts, args.task, args.written, denoiser.mask_id), args)
    fitting, testing = split(states, args.test_share, args.texts)
    policies = {
        name: fit_filter(fitting, hidden, args.seed, args.steps, bound=args.bound, **facts)
        for name, hidden in (("linear", None), ("mlp", HIDDEN))
    }
    for name, policy in policies.items():
        policy.save(args.out / name)
    found = report(testing, policies)
    write_whole(args.out / "report.json", json.dumps(found, indent=1) + "\n")
    print(table(found))
    if args.closed_loop is not None:
        logit = math.log(args.bound / (1.0 - args.bound))  # the loop begins at the bound, and moves the bias
        ((weight, bias),) = policies["linear"].layers
        start = replace(policies["linear"], layers=((weight.clone(), bias - logit),), bound=0.5)
        ids = masked(texts[: args.loop_texts], args.task, args.written, denoiser.mask_id)
        close_loop(denoiser, start, ids, args)
    if args.order:
        fitting_texts = texts[: args.texts - round(args.texts * args.test_share)]
        order, bounds = train_order(denoiser, fitting_texts, seed=args.seed, steps=args.order_steps, bound=1.0, **facts)
        order.save(args.out / "order")
        tail = bounds[-max(1, len(bounds) // 10) :]
        print(f"order: the bound is {sum(tail) / len(tail):.4f} nats a token at the end")
    return policies


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    try:
        check(args)
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
