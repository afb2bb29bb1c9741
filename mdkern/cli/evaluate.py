"""``mdkern evaluate``: the likelihood of held-out text, and statistics of samples."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern.cli.common import (
    add_judge,
    add_models,
    check_target,
    load_judge,
    load_models,
    longest_of,
    one_line,
    positive,
)
from mdkern.cli.decoder import add_decoding, parse_decoder, sample_options
from mdkern.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from mdkern.evaluation.kept import Kept
    from mdkern.evaluation.text import JudgedTexts
    from mdkern.models import Denoiser
    from mdkern.schedule import Schedule

EXAMPLES = """\
examples:
  mdkern evaluate --data held-out.txt --texts 8 --masks 4 --num-samples 4 --length 64 --judge judge/
      schedule: H:100%
      length: 64
      held-out text, windows: 8
      bound, nats a token: 4.7165 (95 % of 4.0523 to 5.3808, n = 8)
      perplexity bound: 111.7801
      samples: 4
      judge, nats a token: 4.6370 (95 % of 4.0603 to 5.2138, n = 4)
      ...
  mdkern evaluate --num-samples 16 --schedule "L64 H128 L64"   samples alone, under a schedule
  mdkern evaluate --data held-out.txt --num-samples 16 --decoder margin --exact
"""


def add_evaluate(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure likelihood and samples",
        description="Measure a model or a schedule: the likelihood of held-out text (a bound, by masks of\n"
        "fixed sizes; with --exact also that of the sampler itself), and samples: generative\n"
        "perplexity under a judge, entropies, distinct n-grams, self-BLEU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_evaluate)
    add_models(parser)
    parser.add_argument("--schedule", metavar="TEXT", help="such as 'L32 H192 L32' (default: the first model alone)")
    text = parser.add_argument_group("held-out text")
    text.add_argument("--data", metavar="FILE", type=Path, help=".txt or .txt.xz; without it no likelihood")
    text.add_argument("--texts", metavar="N", type=positive, help="windows of it (default: 128)")
    text.add_argument("--masks", metavar="N", type=positive, help="for each window (default: 32)")
    text.add_argument(
        "--exact",
        action="store_true",
        help="also the exact likelihood of what is drawn with --decoder, --block-length and --steps at temperature 1: "
        "for decoders that choose by what is written so far, such as margin",
    )
    text.add_argument(
        "--by", choices=["top1"], help="with --exact: let the decoder score the most probable token, not the drawn one"
    )
    samples = parser.add_argument_group("samples")
    samples.add_argument("--num-samples", metavar="N", type=int, default=64, help="(default: 64; 0: none)")
    samples.add_argument("--steps", metavar="T", type=positive, help="(default: the schedule's, or one a token)")
    add_judge(samples)
    samples.add_argument("--batch-size", metavar="B", type=positive, default=32, help="(default: 32)")
    samples.add_argument("--seed", metavar="S", type=int, default=0, help="(default: 0)")
    add_decoding(parser)
    parser.add_argument("--length", metavar="L", type=positive, help="tokens of windows and samples")
    parser.add_argument("--json", action="store_true", help="JSON instead of lines")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="also write the figures as JSON; what is measured is kept in FILE.partial, and the same command goes on",
    )


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Measure what was asked for and print it, each figure with its 95 % confidence interval."""
    from mdkern.schedule import Schedule

    if arguments.num_samples < 0:
        raise ValueError(f"--num-samples must be at least 0, not {arguments.num_samples}")
    if arguments.data is None and not arguments.num_samples:
        raise ValueError("nothing to measure: give --data, or --num-samples of at least 1")
    check_effect(arguments)
    if arguments.output is not None:
        check_target("--output", arguments.output)
    decoder = parse_decoder(arguments.decoder)
    models, tokenizer = load_models(arguments)
    schedule = Schedule.constant(next(iter(models))) if arguments.schedule is None else Schedule(arguments.schedule)
    used = [models[name] for name in schedule.models if name in models] or list(models.values())
    length = arguments.length or longest_of(used, None)
    found: dict[str, Any] = {"schedule": str(schedule), "length": length}
    first = next(iter(models.values()))
    sampler = sample_options(arguments) | {"steps": arguments.steps}
    sampler["decoder"] = decoder(tokenizer, first.vocab_size)
    judge = None
    if arguments.judge is not None:
        _, judge = load_judge(arguments.judge, arguments.judge_tokenizer, first, tokenizer)
    subject = Subject(models, first, tokenizer, schedule, length, sampler, judge)
    kept = None if arguments.output is None else kept_results(arguments, models)
    once = (lambda _, measure: measure()) if kept is None else kept.once
    if arguments.data is not None:
        measured = {name: once(name, measure) for name, measure in of_held_out(arguments, subject).items()}
        found |= measured["bound"] | measured.get("exact", {})
    if arguments.num_samples:
        found |= once("samples", partial(of_samples, arguments, subject))
    if kept is not None:
        write_whole(arguments.output, json.dumps(found, indent=1) + "\n")
        kept.remove()
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name}: {shown(value)}")


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    models: dict[str, Denoiser]
    first: Denoiser
    tokenizer: Any
    schedule: Schedule
    length: int
    sampler: dict[str, Any]  # options of `mdkern.sample`
    judge: Callable[[Tensor], JudgedTexts] | None


OF_SAMPLER = {"decoder": "ancestral", "block_length": None, "steps": None, "steps_per_block": None}  # with defaults
NOT_EXACT = {"cache": "none", "stop_at_eos": False, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def check_effect(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect, and those that the exact likelihood does not take."""

    def refuse(defaults: dict[str, Any], reason: str) -> None:
        for name, default in defaults.items():
            if getattr(arguments, name) != default:
                raise ValueError(reason.format(f"--{name.replace('_', '-')}"))

    if arguments.judge is None:
        refuse({"judge_tokenizer": None}, "{} goes with --judge")
    if arguments.data is None:
        refuse({"exact": False}, "{} needs --data: it is the likelihood of that text")
        refuse({"texts": None, "masks": None}, "{} goes with --data")
    if not arguments.exact:
        refuse({"by": None}, "{} goes with --exact")
    else:
        refuse(NOT_EXACT, "--exact is the likelihood of samples without {}: leave that out")
    if not arguments.num_samples:
        drawn = {"judge": None} | NOT_EXACT | ({} if arguments.exact else OF_SAMPLER)
        refuse(drawn, "{} is about samples, of which --num-samples 0 draws none")


def kept_results(arguments: argparse.Namespace, models: dict[str, Denoiser]) -> Kept:
    """The file beside --output, for this command on these models and this text."""
    from mdkern.digest import digest, model_digest
    from mdkern.evaluation.kept import Kept

    apart = "run", "output", "json"
    setting = {name: str(value) for name, value in vars(arguments).items() if name not in apart}
    setting |= {name: model_digest(model) for name, model in models.items()}
    if arguments.data is not None and arguments.data.is_file():
        setting["text"] = digest(arguments.data.read_bytes())
    return Kept(arguments.output.with_name(f"{arguments.output.name}.partial"), setting)


def of_held_out(arguments: argparse.Namespace, subject: Subject) -> dict[str, Callable[[], dict[str, Any]]]:
    """What measures windows of held-out text: a bound on their -log p and, with --exact, that of a sampler."""
    from mdkern.evaluation.corpus import windows
    from mdkern.evaluation.intervals import estimate
    from mdkern.evaluation.likelihood import likelihood

    ids = windows(arguments.data, subject.tokenizer, subject.length, arguments.texts or 128)
    ids = ids.to(subject.first.device)
    nats = partial(likelihood, subject.models, subject.schedule, input_ids=ids, batch_size=arguments.batch_size)

    def exact() -> dict[str, Any]:
        sampler = {name: subject.sampler[name] for name in ("decoder", "steps", "block_length", "steps_per_block")}
        found = nats(method="decoder", by=arguments.by, **sampler)
        return {
            "exact, nats a token": estimate(found.nats / found.tokens).as_dict(),
            "exact perplexity": found.perplexity_bound(),
            "exact, passes a text": {name: float(count.double().mean()) for name, count in found.nfe.items()},
        }

    def bound() -> dict[str, Any]:
        found = nats(samples=arguments.masks or 32, seed=arguments.seed)
        return {
            "held-out text, windows": len(ids),
            "bound, nats a token": estimate(found.nats / found.tokens).as_dict(),
            "perplexity bound": found.perplexity_bound(),
        }

    # The exact one first, so that an unsuitable decoder is refused at once.
    return ({"exact": exact} if arguments.exact else {}) | {"bound": bound}


def of_samples(arguments: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """Statistics of samples."""
    from mdkern.evaluation.intervals import estimate
    from mdkern.evaluation.text import distinct, self_bleu, token_entropy, unigram_entropy
    from mdkern.sampling import sample

    run = {name: getattr(arguments, name) for name in ("num_samples", "batch_size", "seed")}
    out = sample(subject.models, subject.schedule, length=subject.length, **run, **subject.sampler)
    ids: Tensor = out.sequences.cpu()  # type: ignore[union-attr]
    texts = subject.tokenizer.batch_decode(ids, skip_special_tokens=True)
    found: dict[str, Any] = {"samples": len(ids)}
    if subject.judge is not None:
        scored = subject.judge(ids)
        found["judge, nats a token"] = estimate(scored.nats_per_token()).as_dict()
        found["generative perplexity"] = scored.perplexity()
    found["token entropy, nats"] = estimate(token_entropy(ids)).as_dict()
    found["unigram entropy, nats"] = unigram_entropy(ids)
    found |= {f"distinct-{n}": distinct(ids, n) for n in (1, 2, 3) if n <= subject.length}
    if len(texts) > 1:
        try:
            found["self-BLEU"] = self_bleu(texts)
        except ImportError as error:
            found["self-BLEU"] = f"not measured: {one_line(error)}"
    passes = {name: float(count.double().mean()) for name, count in (out.nfe or {}).items()}
    return found | {"passes a sample": passes}


def shown(value: Any) -> str:
    """A figure in the form in which it is printed."""
    if isinstance(value, dict) and "interval_95" in value:
        low, high = value["interval_95"]
        return f"{value['mean']:.4f} (95 % of {low:.4f} to {high:.4f}, n = {value['count']})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(entry)}" for name, entry in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
