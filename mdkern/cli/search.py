"""``mdkern search``: every way to put the light model into k of n segments of the steps."""

from __future__ import annotations

import argparse
import glob
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern.cli.common import (
    add_judge,
    add_models,
    check_plot,
    check_target,
    load_judge,
    load_models,
    longest_of,
    positive,
    seconds,
)

if TYPE_CHECKING:
    from mdkern.evaluation.search import Found
    from mdkern.ranks import Ranks

EXAMPLES = """\
examples:
  mdkern search --judge judge/ --segments 4 --light-segments 2 --num-samples 4 --length 32 --output s.jsonl
      6 schedules, 4 samples each; judge, nats a token (95 % interval)
        best  HLHL  4.6317 ± 0.5552
        best  LHLH  4.7291 ± 0.8514
        ...
  torchrun --nproc-per-node 2 -m mdkern search --judge judge/ --output s.jsonl   schedules shared out over two GPUs
"""


def add_search(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "search",
        help="try every schedule of n segments",
        description="Sample with every schedule that has a light model in k of n equal segments, on the same\nseeds, "
        "and rank them by a judge (Sedykh et al., 2604.02340: 10 segments, 4 light, 210\nschedules, 160 samples each). "
        "Schedules that begin alike share those passes. Results are\nkept as they come; the same command goes on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_search)
    add_models(parser)
    what = parser.add_argument_group("what is tried")
    what.add_argument("--segments", metavar="N", type=positive, default=10, help="of the steps (default: 10)")
    what.add_argument("--light-segments", metavar="K", type=positive, default=4, help="of them (default: 4)")
    what.add_argument("--num-samples", metavar="N", type=positive, default=160, help="a schedule (default: 160)")
    what.add_argument("--steps", metavar="T", type=positive, help="(default: one a token)")
    what.add_argument("--length", metavar="L", type=positive, help="in tokens (default: the models' longest)")
    what.add_argument("--temperature", metavar="X", type=float, default=1.0, help="(default: 1)")
    what.add_argument("--batch-size", metavar="B", type=positive, default=64, help="(default: 64)")
    what.add_argument("--seed", metavar="S", type=int, default=0, help="of all schedules (default: 0)")
    add_judge(parser.add_argument_group("the judge"), required=True)
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", type=Path, required=True, help="JSON lines, one for each schedule")
    output.add_argument("--plot", metavar="FILE", type=Path, help="the best and worst, frequencies, influence")
    output.add_argument("--top", metavar="N", type=positive, default=5, help="printed, best and worst (default: 5)")
    output.add_argument("--timeout", metavar="SECONDS", type=seconds, help="to wait for a process (default: 1800)")


def run_search(arguments: argparse.Namespace) -> None:
    """Run the rest of the search, and print the best and worst schedules and the influence of each segment."""
    check_target("--output", arguments.output)
    check_plot("--plot", arguments.plot)

    from mdkern.distributed import TIMEOUT, torchrun_ranks

    with torchrun_ranks(arguments.timeout or TIMEOUT) as ranks:
        if ranks is None and arguments.timeout is not None:
            raise ValueError("--timeout is for several processes: start them with torchrun")
        found, heavy = find(arguments, ranks)
        if ranks is None or ranks.rank == 0:
            report(arguments, found, heavy)


def find(arguments: argparse.Namespace, ranks: Ranks | None) -> tuple[list[Found], str]:
    """All schedules with their scores, the best first, and the heavy model's name."""
    from mdkern.distributed import share
    from mdkern.engine.branches import run_schedules, share_of_passes
    from mdkern.evaluation.search import Results, all_schedules, search
    from mdkern.schedule import check_segments

    number, count = (0, 1) if ranks is None else (ranks.rank, ranks.count)
    own = arguments.output if number == 0 else arguments.output.with_name(f"{arguments.output.name}.rank{number}")
    left: list[tuple[str, ...]] = []
    with ranks.together() if ranks else nullcontext():
        models, tokenizer = load_models(arguments)
        names = list(models)
        schedules = all_schedules(arguments.segments, arguments.light_segments, names)
        length = arguments.length or longest_of(models.values(), None)
        check_segments(arguments.segments, arguments.steps or length)
        causal, judge = load_judge(arguments.judge, arguments.judge_tokenizer, models[names[0]], tokenizer)
        asked = setting(arguments, models, causal, length)
        if number == 0:
            results = Results(own, asked)
            results.absorb(parts(arguments.output))  # left by an interrupted run
            left = [models for models in schedules if models not in results.found]
    if ranks is not None:
        left = ranks.gather(left)[0]
    if number:
        results = Results(own, asked)
    left = left[share(len(left), number, count)]
    if left and number == 0:
        done = f", {len(results.found)} of them done" if results.found else ""
        print(f"mdkern: {len(schedules)} schedules{done}; what they have in common is run once: "
              f"{share_of_passes(left):.0%} of the passes", file=sys.stderr)  # fmt: skip
    options = {name: getattr(arguments, name) for name in ("num_samples", "steps", "temperature", "batch_size", "seed")}
    run = partial(run_schedules, models, length=length, **options)
    search(run, lambda ids: judge(ids).nats_per_token(), left, results, progress=None if number == 0 else False)
    if ranks is not None:
        ranks.gather(None)  # all parts are written
    if number == 0:
        results.absorb(parts(arguments.output))
    return results.ranked(), names[0]


def parts(path: Path) -> list[Path]:
    """The files in which other processes keep their results until all are done."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.rank*"))


def setting(arguments: argparse.Namespace, models: dict[str, Any], judge: Any, length: int) -> dict[str, Any]:
    """Everything that the scores in a file depend on."""
    from mdkern.digest import digest, model_digest
    from mdkern.models import adapt

    names = ("segments", "light_segments", "num_samples", "steps", "temperature", "seed", "judge_tokenizer")
    asked = {name: getattr(arguments, name) for name in names} | {"length": length}
    weights = {name: model_digest(adapt(model)) for name, model in models.items()}
    return asked | {"models": weights, "judge": digest(dict(judge.named_parameters()))}


def report(arguments: argparse.Namespace, found: list[Found], heavy: str) -> None:
    """The best and worst schedules and the influence of a light segment."""
    from mdkern.evaluation.intervals import estimate
    from mdkern.evaluation.search import best_and_mean, influence

    shown = min(arguments.top, max(1, len(found) // 2))
    print(f"{len(found)} schedules, {arguments.num_samples} samples each; judge, nats a token (95 % interval)")
    for title, entries in (("best", found[:shown]), ("worst", found[-shown:])):
        for entry in entries:
            print(f"{title:>6}  {entry.name}  {estimate(entry.scores)}")
    _, better = best_and_mean(found)
    print(f"the best is {-better} below the mean of all, by pairs")
    for name, values in influence(found).items():
        if name != heavy:
            shown_values = "  ".join(f"{value.mean:+.4f}" for value in values)
            print(f"influence of {name} by segment: {shown_values}")
    if arguments.plot is not None:
        from mdkern.evaluation.plots import plot_search

        plot_search(found, heavy, arguments.plot, f"{len(found)} schedules, {arguments.num_samples} samples each")
