"""The command line: ``mdkern sample``, ``mdkern profile``. Results go to standard output, all else to standard error.

A command is a function that adds its parser and one that runs it. PyTorch is imported when a command runs, not before.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mdkern import __version__
from mdkern.cli.common import check_target, load_models, named_path, one_line, positive
from mdkern.cli.decoder import add_decoding, parse_decoder, sample_options
from mdkern.cli.profile import add_profile
from mdkern.threads import wait_without_spinning

if TYPE_CHECKING:
    from torch import Tensor

    from mdkern.models import DiT
    from mdkern.output import SampleOutput
    from mdkern.schedule import Schedule

LIGHT_SHARE = 0.25  # of the default schedule: L32 H192 L32 at 256 steps
PLACEHOLDER = re.compile(r"\[MASK:(\d{1,9})\]")
EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 for bad input, 1 for a failure, 130 for an interrupt."""
    wait_without_spinning()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets question marks, not an error
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("mdkern: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of standard output has left: nothing to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (FloatingPointError, TimeoutError) as error:
        return fail(error, EXIT_FAILED)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    return 0


def fail(error: Exception, code: int) -> int:
    if first_process() or isinstance(error, TimeoutError):  # every process knows an error, but for one that is lost
        print(f"mdkern: error: {one_line(error)}", file=sys.stderr)
    return code


def first_process() -> bool:
    """Whether this process is the one that speaks: not one of ``torchrun``'s further ones."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, the same for every command."""

    def error(self, message: str) -> NoReturn:
        text = f"mdkern: error: {message} (see {self.prog} --help)\n"
        self.exit(EXIT_BAD_INPUT, text if first_process() else None)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mdkern", description="Sampling from masked diffusion language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mdkern {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_sample(commands)
    add_profile(commands)
    return parser


def add_sample(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "sample",
        help="write text",
        description="Write text with a heavy and a light model under a schedule.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_sample)

    models = parser.add_argument_group("models", "Without any of these, the small pair that ships with mdkern.")
    models.add_argument("--heavy", metavar="PATH", help="checkpoint that the schedule calls H (ours or MDLM's layout)")
    models.add_argument("--light", metavar="PATH", help="checkpoint that the schedule calls L")
    models.add_argument(
        "--model", metavar="NAME=PATH", action="append", default=[], type=named_path, help="one more; repeatable"
    )
    models.add_argument("--tokenizer", metavar="PATH", help="their tokenizer: a folder or a tokenizer.json")
    models.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    models.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: bfloat16 on a GPU, else float32)",
    )

    text = parser.add_argument_group("what to write")
    text.add_argument(
        "--schedule",
        metavar="TEXT",
        help="models and step counts, e.g. 'L32 H192 L32', or 'sandwich:SHARE' with the light model's share of any "
        f"number of steps (default: sandwich:{LIGHT_SHARE})",
    )
    text.add_argument("--steps", metavar="T", type=positive, help="(default: the schedule's, or else the length)")
    text.add_argument("--length", metavar="L", type=positive, help="in tokens, prompt included (default: the longest)")
    text.add_argument("--num-samples", metavar="N", type=positive, default=1, help="(default: 1)")
    text.add_argument(
        "--prompt",
        metavar="TEXT",
        default="",
        help="text to continue. [MASK:12] in it stands for 12 tokens to be filled in; the text is then continued only "
        "up to a --length that is given",
    )
    text.add_argument("--temperature", metavar="X", type=float, default=1.0, help="0 is greedy (default: 1)")
    text.add_argument("--seed", metavar="S", type=int, help="whole number (default: a new one, told at the end)")
    text.add_argument("--batch-size", metavar="B", type=positive, help="speed and memory only (default: 16)")

    add_decoding(parser)

    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", type=Path, help="also write the samples as JSON lines")
    output.add_argument("--trace", metavar="FILE", type=Path, help="also write an HTML page that replays the denoising")
    output.add_argument("--quiet", action="store_true", help="text only: no progress bar, no summary")


def run_sample(arguments: argparse.Namespace) -> None:
    """Load, sample, write the files, print the texts, then the summary."""
    targets = {"--output": arguments.output, "--trace": arguments.trace}
    for option, path in targets.items():
        if path is not None:
            check_target(option, path)
    if None not in targets.values() and arguments.output.resolve() == arguments.trace.resolve():
        raise ValueError(f"--output and --trace are the same file {arguments.output}")

    import torch

    from mdkern.distributed import sample_distributed, torchrun_ranks
    from mdkern.engine.resolve import resolve_blocks
    from mdkern.sampling import sample

    with torchrun_ranks() as ranks:
        with ranks.together() if ranks else nullcontext():
            make_decoder = parse_decoder(arguments.decoder)
            models, tokenizer = load_models(arguments)
            schedule = choose_schedule(arguments.schedule, tuple(models))
            first = next(iter(models.values()))
            longest = min(model.config.max_length for model in models.values())
            ids = start_ids(arguments.prompt, tokenizer, first.config.mask_id, arguments.length, longest)
            decoder = make_decoder(tokenizer, first.config.vocab_size)
            steps = arguments.steps or schedule.total
            cached = arguments.cache != "none"
            steps = resolve_blocks(arguments.block_length, ids == first.config.mask_id, steps, cached)[2]
            schedule = schedule.fit(steps or ids.shape[1])
        try:
            output = (sample_distributed if ranks else sample)(
                models,
                schedule,
                input_ids=ids.to(first.embedding.device),
                num_samples=arguments.num_samples,
                batch_size=arguments.batch_size,
                temperature=arguments.temperature,
                decoder=decoder,
                **sample_options(arguments),
                seed=arguments.seed,
                return_history=arguments.trace is not None,
                progress=False if arguments.quiet else None,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError("out of memory: lower --batch-size or --length") from error
    if ranks and ranks.rank > 0:
        return
    write_samples(arguments, output, tokenizer, schedule)
    if not arguments.quiet:
        sys.stdout.flush()
        masked = int((ids == first.config.mask_id).sum())
        processes = ranks.count if ranks else 1
        print(summary(output, schedule, models, masked, arguments.decoder, processes), file=sys.stderr)


def write_samples(arguments: argparse.Namespace, output: SampleOutput, tokenizer: Any, schedule: Schedule) -> None:
    """The files that were asked for, then the texts on standard output."""
    from mdkern.trace import decode, render_trace, write_whole

    assert output.sequences is not None
    assert output.lengths is not None
    rows, lengths = output.sequences.tolist(), output.lengths.tolist()
    texts = [decode(tokenizer, row[:length] if arguments.stop_at_eos else row) for row, length in zip(rows, lengths)]
    records = "".join(json.dumps(record) + "\n" for record in sample_records(arguments, output, texts, schedule))
    page = render_trace(output, tokenizer, schedule=schedule) if arguments.trace else ""
    for path, content in ((arguments.output, records), (arguments.trace, page)):
        if path is not None:
            write_whole(path, content)
    for number, text in enumerate(texts):
        header = f"{'' if number == 0 else chr(10)}--- sample {number} ---\n" if len(texts) > 1 else ""
        print(f"{header}{text}")


def choose_schedule(text: str | None, models: Sequence[str]) -> Schedule:
    from mdkern.schedule import Schedule

    if text is None and len(models) == 1:
        return Schedule.constant(models[0])
    if text is None and set(models) == {"H", "L"}:
        return Schedule.sandwich(LIGHT_SHARE)
    if text is None:
        raise ValueError(f"--schedule must be given to say when each of {', '.join(models)} runs")
    kind, _, share = text.partition(":")
    if kind.strip().lower() != "sandwich":
        return Schedule(text)
    try:
        return Schedule.sandwich(float(share))
    except ValueError:
        raise ValueError(
            f"--schedule {text!r} must give the light model's share in 0..1, as in sandwich:0.25"
        ) from None


def start_ids(prompt: str, tokenizer: Any, mask_id: int, length: int | None, longest: int) -> Tensor:
    """The prompt's tokens, and mask ids for its placeholders and for what follows: int64 ``[1, L]``."""
    import torch

    if length is not None and length > longest:
        raise ValueError(f"--length {length} is beyond the {longest} positions of the models")
    ids: list[int] = []
    for index, piece in enumerate(PLACEHOLDER.split(prompt)):  # text, count, text, count, …, text
        if index % 2 == 0:
            ids += tokenizer.encode(piece, add_special_tokens=False)
        elif len(ids) + int(piece) > longest:
            raise ValueError(f"--prompt: with [MASK:{piece}] it is beyond the {longest} positions of the models")
        else:
            ids += [mask_id] * int(piece)
    length = length or (len(ids) if mask_id in ids else longest)
    if len(ids) > length:
        raise ValueError(f"--prompt has {len(ids)} tokens, beyond the {length} positions to be used")
    ids += [mask_id] * (length - len(ids))
    if mask_id not in ids:
        raise ValueError(f"--prompt fills all {length} positions: nothing is left to write")
    return torch.tensor([ids])


def sample_records(
    arguments: argparse.Namespace, output: SampleOutput, texts: Sequence[str], schedule: Schedule
) -> list[dict[str, Any]]:
    """One JSON object per sample."""
    assert output.sequences is not None
    assert output.nfe is not None
    assert output.stop_reason is not None
    return [
        {
            "sample": number,
            "text": text,
            "token_ids": token_ids,
            "nfe": {name: int(passes[number]) for name, passes in output.nfe.items()},
            "seed": output.seed,
            "schedule": str(schedule),
            "decoder": arguments.decoder,
            "stop_reason": output.stop_reason[number],
        }
        for number, (text, token_ids) in enumerate(zip(texts, output.sequences.tolist()))
    ]


def summary(
    output: SampleOutput, schedule: Schedule, models: dict[str, DiT], masked: int, decoder: str, processes: int
) -> str:
    """What was run, how many forward passes it took, how long, and what the schedule saved."""
    assert output.sequences is not None
    assert output.nfe is not None
    assert output.timings is not None
    count, length = output.sequences.shape
    device, dtype = output.sequences.device, str(next(iter(models.values())).embedding.dtype).removeprefix("torch.")
    where = f"{processes} processes on {device.type}" if processes > 1 else str(device)
    blocks = {name: models[name].config.num_blocks for name in schedule.models}
    passes = {name: float(nfe.float().mean()) for name, nfe in output.nfe.items()}
    each = ", ".join(f"{name} {passes[name]:.1f} ({blocks[name]} blocks)" for name in passes)
    seconds = output.timings["total"]
    parts = ", ".join(f"{name} {output.timings[name]:.2f} s" for name in passes)
    lines = [
        f"{count} x {length} tokens, decoder {decoder}, schedule {schedule}, seed {output.seed}, {where}, {dtype}",
        f"forward passes per sequence: {each}; {sum(passes.values()):.1f} for {schedule.total} steps",
        f"{seconds:.2f} s ({parts}), {count * masked / seconds:,.0f} tokens/s",
    ]
    if len(blocks) > 1:
        counted = "unknown" if output.flops_saved is None else f"{output.flops_saved:.1%}"
        dearest = max(blocks, key=lambda name: blocks[name])
        by_blocks = f"{schedule.saved(blocks):.1%}"
        lines.append(f"saved against {dearest} alone: {by_blocks} of the blocks (equation 3), {counted} of the FLOPs")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
