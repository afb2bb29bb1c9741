"""``mdkern sample``: its options, and the run from the models to the files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern import __version__
from mdkern.cli.common import (
    add_models,
    check_target,
    load_models,
    longest_of,
    positive,
    same_file,
    seconds,
    unicode_text,
)
from mdkern.cli.decoder import add_decoding, parse_decoder, sample_options
from mdkern.cli.prompt import (
    LIGHT_SHARE,
    all_start_ids,
    choose_schedule,
    in_conversation,
    read_prompt,
    read_prompts,
    start_ids,
)
from mdkern.cli.records import SampleFile, holds_samples, partial_path
from mdkern.cli.report import Job, Printer, decode_texts, response_records, sample_records, summary, without_texts

if TYPE_CHECKING:
    from mdkern.models import Denoiser
    from mdkern.output import SampleOutput
    from mdkern.ranks import Ranks

ANSWER = 128  # tokens of an answer with --chat
EXAMPLES = """\
examples:
  mdkern sample --prompt "Once upon a time" --length 32 --seed 0 --quiet
      Once upon a time. The event which had continued so long, on account of the inverse, that
      the divine is the most sensible
  mdkern sample --prompt "She went[MASK:5] home." --decoder threshold:threshold=0.9
  mdkern sample --num-samples 1000 --output texts.jsonl            the texts, one JSON object a line
  mdkern sample --num-samples 1000 --output texts.jsonl --resume   the rest of them, after an interrupt
  mdkern sample --prompts questions.jsonl --stop-at-eos --output pairs.jsonl   a response to each prompt of a file
  mdkern sample --heavy big/ --light small/ --tokenizer tokenizer.json --schedule "L32 H192 L32"
  mdkern sample --model instruct/ --chat --prompt "Why is the sky blue?" --decoder threshold --block-length 32
  torchrun --nproc-per-node 2 -m mdkern sample --num-samples 64    the samples shared out over two GPUs
"""


def add_sample(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "sample",
        help="write text",
        description="Write text with a heavy and a light model under a schedule.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_sample)
    add_models(parser)
    add_text(parser)
    add_decoding(parser)
    add_output(parser)


def add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to write")
    group.add_argument(
        "--schedule",
        metavar="TEXT",
        type=unicode_text,
        help="models and step counts, e.g. 'L32 H192 L32', or 'sandwich:SHARE' with the light model's share of any "
        f"number of steps (default: sandwich:{LIGHT_SHARE})",
    )
    group.add_argument("--steps", metavar="T", type=positive, help="(default: the schedule's, or else the length)")
    group.add_argument("--length", metavar="L", type=positive, help="in tokens, prompt included (default: the longest)")
    group.add_argument("--num-samples", metavar="N", type=positive, default=1, help="(default: 1)")
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        type=unicode_text,
        help="text to continue. [MASK:12] in it stands for 12 tokens to be filled in; the text is then continued only "
        "up to a --length that is given",
    )
    group.add_argument("--prompt-file", metavar="FILE", type=Path, help="the prompt from a file in UTF-8, as it is")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="many prompts, a sample each: JSON lines with `prompt`. Records then have the prompt and the `response`, "
        "as training.finetune reads them",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a question, in the tokenizer's chat template; print the answer",
    )
    group.add_argument(
        "--system", metavar="TEXT", type=unicode_text, help="with --chat: what comes before the question"
    )
    group.add_argument(
        "--new-tokens",
        metavar="N",
        type=positive,
        help=f"instead of --length: tokens after the prompt (default with --chat: {ANSWER}, or what fits)",
    )
    group.add_argument("--temperature", metavar="X", type=float, default=1.0, help="0 is greedy (default: 1)")
    group.add_argument("--seed", metavar="S", type=int, help="whole number (default: a new one, told at the end)")
    group.add_argument("--batch-size", metavar="B", type=positive, help="speed and memory only (default: 16)")


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="also write the samples as JSON lines: as they finish to FILE.partial, which becomes FILE at the end",
    )
    group.add_argument(
        "--resume", action="store_true", help="with --output: go on with the FILE.partial of an interrupted run, if any"
    )
    group.add_argument(
        "--history",
        action="store_true",
        help="with --output: also the step and the model that revealed each token, and its log-probability",
    )
    group.add_argument("--trace", metavar="FILE", type=Path, help="also write an HTML page that replays the denoising")
    group.add_argument("--trace-title", metavar="TEXT", type=unicode_text, help="the page's heading")
    group.add_argument("--quiet", action="store_true", help="text only: no progress bar, no summary")
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        help="under torchrun: how long a process waits for the others (default: 1800)",
    )


def run_sample(arguments: argparse.Namespace) -> None:
    """Load the models, sample, write the samples as they finish, then the page and the summary."""
    check_options(arguments)

    from mdkern.distributed import TIMEOUT, torchrun_ranks

    with torchrun_ranks(arguments.timeout or TIMEOUT) as ranks, ExitStack() as stack:
        if arguments.timeout is not None and ranks is None:
            raise ValueError("--timeout is for several processes, as torchrun starts them: there is only this one")
        speaks = ranks is None or ranks.rank == 0
        file: SampleFile | None = None
        with ranks.together() if ranks else nullcontext():
            job = prepare(arguments)
            seed, numbers = job.seed, list(range(arguments.num_samples))
            if speaks and arguments.output is not None:
                file = stack.enter_context(SampleFile(arguments.output, request_of(arguments, job), seed))
                if arguments.seed is not None and file.seed != seed:
                    raise ValueError(f"--seed {seed}: {file.path} was begun with seed {file.seed}")
                seed, numbers = file.seed, [number for number in numbers if number not in file.places]
        if ranks:
            seed, numbers = ranks.gather((seed, numbers))[0]
        receiver = Receiver(arguments, job, file) if speaks else None
        receive(run_groups(arguments, job, ranks, seed, numbers), receiver)
        if receiver is not None:
            receiver.finish(ranks.count if ranks else 1)


def receive(groups: Generator[SampleOutput], receiver: Receiver | None) -> None:
    """Hand over every group and, if one fails, what was finished of it."""
    try:
        with closing(groups):
            for output in groups:
                if receiver is not None:
                    receiver.take(output)
    except BaseException as error:
        rest: SampleOutput | None = getattr(error, "partial", None)
        if receiver is not None and rest is not None and rest.sample_ids is not None and len(rest.sample_ids):
            receiver.take(rest)
        if out_of_memory(error):
            raise MemoryError("out of memory: lower --batch-size, --length or --num-samples") from error
        raise


def out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse, before any work, options that do not go together and files that could not be written."""
    targets = {"--output": arguments.output, "--trace": arguments.trace}
    for option, path in targets.items():
        if path is not None:
            check_target(option, path)
    if None not in targets.values() and same_file(arguments.output, arguments.trace):
        raise ValueError(f"--output and --trace are the same file {arguments.output}")
    if arguments.prompts is not None:
        others = {"--prompt": arguments.prompt, "--prompt-file": arguments.prompt_file}
        taken = [name for name, value in others.items() if value is not None]
        if taken or arguments.num_samples != 1:
            raise ValueError(f"{taken[0] if taken else '--num-samples'} does not go with --prompts, a sample a prompt")
    if arguments.chat and arguments.prompts is None and arguments.prompt is None and arguments.prompt_file is None:
        raise ValueError("--chat needs --prompt, --prompt-file or --prompts, the question; mdkern chat asks for it")
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system goes with --chat")
    if arguments.new_tokens is not None and (arguments.length is not None or arguments.prompts is not None):
        other = "--length" if arguments.length is not None else "--prompts, whose texts have one --length"
        raise ValueError(f"--new-tokens does not go with {other}")
    if arguments.trace_title is not None and arguments.trace is None:
        raise ValueError("--trace-title goes with --trace")
    if arguments.history and arguments.output is None:
        raise ValueError("--history goes with --output, to whose records it adds")
    if arguments.resume and arguments.output is None:
        raise ValueError("--resume goes with --output, whose finished samples it goes on from")
    if arguments.resume and arguments.trace is not None:
        raise ValueError("--resume and --trace do not go together: of finished samples the steps are not known")
    if arguments.output is None:
        return
    partial = partial_path(arguments.output)
    check_target("--output", partial)
    if not arguments.resume and holds_samples(partial):
        raise ValueError(
            f"{partial} has samples of a run that was interrupted: go on with --resume, or delete it to begin anew"
        )


def prepare(arguments: argparse.Namespace) -> Job:
    """Load the models, and check everything that depends on them."""
    from mdkern.engine.resolve import resolve_seed
    from mdkern.engine.resolve_blocks import resolve_blocks, resolve_pace

    if arguments.prompts is None:
        prompts = [read_prompt(arguments.prompt, arguments.prompt_file)]
    else:
        prompts = read_prompts(arguments.prompts)
        arguments.num_samples = len(prompts)
    make_decoder = parse_decoder(arguments.decoder)
    models, tokenizer = load_models(arguments)
    if arguments.chat:
        prompts = in_conversation(prompts, tokenizer, arguments.system)
        arguments.stop_at_eos = True
    schedule = choose_schedule(arguments.schedule, tuple(models))
    first = next(iter(models.values()))
    many, new_tokens = arguments.prompts is not None, arguments.new_tokens
    longest = longest_of(models.values(), arguments.length, new_tokens)
    where = tokenizer, first.mask_id, arguments.length, longest
    if arguments.chat and not many and arguments.length is None and new_tokens is None:
        room = longest - len(tokenizer.encode(prompts[0], add_special_tokens=False))
        new_tokens = max(1, min(ANSWER, room))
    ids = all_start_ids(prompts, *where) if many else start_ids(prompts[0], *where, new_tokens)
    decoder = make_decoder(tokenizer, first.vocab_size)
    used = {name: models[name] for name in schedule.models if name in models}
    block_length, causal = resolve_blocks(arguments.block_length, used, None)
    wanted = ids == first.mask_id
    pace = resolve_pace(
        schedule, arguments.steps, block_length, arguments.steps_per_block, wanted, None, whole_text=causal
    )
    if not many:  # else each sequence has its own steps
        schedule = schedule.fit(pace.most_steps)
    return Job(models, tokenizer, schedule, ids.to(first.device), decoder, resolve_seed(arguments.seed, None))


def request_of(arguments: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Everything that the samples depend on except the seed, by option: its value, or a digest of it."""
    from mdkern.digest import digest, model_digest

    options = {f"--{name.replace('_', '-')}": value for name, value in sampling(arguments).items()}
    del options["--cuda-graphs"]  # the samples are the same
    options["--history"] = arguments.history  # the records are not
    return (
        {f"model {name}": model_digest(job.models[name]) for name in job.schedule.models}
        | {"the tokenizer": digest(job.tokenizer.get_vocab()), "the prompt": digest(job.ids)}
        | {"--schedule": str(job.schedule), "--decoder": digest(job.decoder), "mdkern's version": __version__}
        | options
    )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of `mdkern.sample`, without the decoder and those that only change the speed."""
    return sample_options(arguments) | {"temperature": arguments.temperature}


def run_groups(
    arguments: argparse.Namespace, job: Job, ranks: Ranks | None, seed: int, numbers: list[int]
) -> Generator[SampleOutput]:
    """The samples of these numbers, group by group; with several processes, all at once."""
    from mdkern.distributed import sample_distributed
    from mdkern.sampling import sample_groups

    if not numbers:
        return
    many = arguments.prompts is not None
    call: dict[str, Any] = {
        "input_ids": job.ids[numbers] if many else job.ids,
        "num_samples": None if many else len(numbers),
        "sample_ids": numbers,
        "batch_size": arguments.batch_size,
        "decoder": job.decoder,
        **sampling(arguments),
        "seed": seed,
        "return_history": arguments.history or arguments.trace is not None,
        "progress": False if arguments.quiet else None,
    }
    if ranks:
        yield sample_distributed(job.models, job.schedule, timeout=ranks.timeout, **call)
    else:
        yield from sample_groups(job.models, job.schedule, **call)


class Receiver:
    """Takes the samples as they finish: prints their texts, writes their records, keeps what is needed later."""

    def __init__(self, arguments: argparse.Namespace, job: Job, file: SampleFile | None) -> None:
        self.arguments, self.job, self.file = arguments, job, file
        to_files = arguments.output is not None or arguments.trace is not None
        self.printer = Printer(headed=arguments.num_samples > 1, essential=not to_files)
        self.outputs: list[SampleOutput] = []

    def take(self, output: SampleOutput) -> None:
        assert output.sample_ids is not None
        if self.arguments.chat:
            texts = output.decode(self.job.tokenizer, skip_prompt=True, skip_special_tokens=True)
        else:
            texts = decode_texts(output, self.job.tokenizer, self.arguments.stop_at_eos)
        self.printer.show(output.sample_ids.tolist(), texts)
        if self.file is not None:
            history = output.history if self.arguments.history else None
            records = sample_records(output, texts, self.job.schedule, self.arguments.decoder, history)
            if self.arguments.prompts is not None:
                pairs = response_records(output, self.job.tokenizer)
                records = [pair | record for pair, record in zip(pairs, records)]
            self.file.append(*records)
        self.outputs.append(output if self.arguments.trace is not None else without_texts(output))

    def finish(self, processes: int) -> None:
        """Move the files into place and print the summary."""
        import torch

        from mdkern.engine.resolve import DEFAULT_BATCH_SIZE
        from mdkern.output import joined

        arguments, job = self.arguments, self.job
        if self.file is not None:
            self.file.finish(range(arguments.num_samples))
        if self.outputs:
            output = joined(self.outputs, torch.cat, sum)  # `flops_saved` is the first's
            if arguments.trace is not None:
                write_page(arguments, job, output)
            if not arguments.quiet:
                sys.stdout.flush()
                size = arguments.batch_size or DEFAULT_BATCH_SIZE
                print(summary(output, job, arguments.decoder, processes, size), file=sys.stderr)
        if self.printer.failure is not None:
            raise self.printer.failure


def write_page(arguments: argparse.Namespace, job: Job, output: SampleOutput) -> None:
    """The page that replays the denoising."""
    from mdkern.trace import USUAL_MODELS, About, write_trace

    described = {name: size_of(model) for name, model in job.models.items()}
    about: About = {
        "schedule": job.schedule,
        "decoder": arguments.decoder,
        "models": {name: ", ".join(filter(None, (USUAL_MODELS.get(name), text))) for name, text in described.items()},
    }
    if arguments.trace_title is not None:
        about["title"] = arguments.trace_title
    write_trace(arguments.trace, output, job.tokenizer, **about)


def size_of(model: Denoiser) -> str:
    """A model's size in words, as far as it is known."""
    count, weight = model.num_blocks, model.head.weight
    blocks = "" if count is None else f"{count} block{'s' * (count != 1)}"
    return blocks if not blocks or weight is None else f"{blocks} of width {weight.shape[1]}"
