"""The output of ``mdkern sample``: texts on standard output, JSON records, and the summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mdkern.cli.common import discard_stdout

if TYPE_CHECKING:
    from torch import Tensor

    from mdkern.decoders import Decoder
    from mdkern.models import Denoiser
    from mdkern.output import History, SampleOutput
    from mdkern.schedule import Schedule


@dataclass(frozen=True)
class Job:
    """What is to be sampled, as the options say."""

    models: dict[str, Denoiser]
    tokenizer: Any
    schedule: Schedule
    ids: Tensor  # int64 [1, L], the start of every sample, with masks, or [N, L], of each
    decoder: Decoder
    seed: int


def decode_texts(output: SampleOutput, tokenizer: Any, cut: bool) -> list[str]:
    """The samples' texts, special tokens included; with `cut`, only up to their end of text."""
    from mdkern.trace import decode

    assert output.sequences is not None
    assert output.lengths is not None
    rows, lengths = output.sequences.tolist(), output.lengths.tolist()
    return [decode(tokenizer, row[:length] if cut else row) for row, length in zip(rows, lengths)]


def sample_records(
    output: SampleOutput, texts: Sequence[str], schedule: Schedule, decoder: str, history: History | None = None
) -> list[dict[str, Any]]:
    """One JSON object per sample; with a history, also the step, model and log-probability of each token."""
    assert output.sequences is not None
    assert output.sample_ids is not None
    assert output.nfe is not None
    assert output.stop_reason is not None
    return [
        {
            "sample": number,
            "text": texts[row],
            "token_ids": token_ids,
            "nfe": counts_of(output.nfe, row),
            **({} if output.commits is None else {"commits": counts_of(output.commits, row)}),
            "seed": output.seed,
            "schedule": str(schedule),
            "decoder": decoder,
            "stop_reason": output.stop_reason[row],
            **({} if history is None else history_record(history, row)),
        }
        for row, (number, token_ids) in enumerate(zip(output.sample_ids.tolist(), output.sequences.tolist()))
    ]


def counts_of(counts: Mapping[str, Tensor], row: int) -> dict[str, int]:
    """A sample's counts by model."""
    return {name: int(count[row]) for name, count in counts.items()}


def response_records(output: SampleOutput, tokenizer: Any) -> list[dict[str, Any]]:
    """Prompt and response of each sample, as texts and as ids, without the end of text and what follows it."""
    from mdkern.trace import decode

    assert output.sequences is not None
    assert output.lengths is not None
    assert output.prompt_lengths is not None
    records = []
    for ids, prompt, end in zip(
        output.sequences.tolist(), output.prompt_lengths.tolist(), output.lengths.tolist(), strict=True
    ):
        before, after = ids[:prompt], ids[prompt:end]
        records.append(
            {
                "prompt": decode(tokenizer, before),
                "response": decode(tokenizer, after),
                "prompt_ids": before,
                "response_ids": after,
            }
        )
    return records


def history_record(history: History, row: int) -> dict[str, list[Any]]:
    """When, by which model and with which log-probability (nats) each token was revealed; null where it was given."""
    assert history.log_prob is not None
    names = [*history.models, None]  # -1: by none
    log_probs = history.log_prob[row].tolist()
    return {
        "reveal_step": [None if step < 0 else step for step in history.step[row].tolist()],
        "reveal_model": [names[model] for model in history.model[row].tolist()],
        "log_prob": [None if value != value else value for value in log_probs],
    }


class Printer:
    """Prints texts to standard output as the samples finish."""

    def __init__(self, headed: bool, essential: bool) -> None:
        """`headed`: print the sample number before a text. `essential`: the texts go nowhere else, so that a failure to
        print them ends the run."""
        self.headed, self.essential = headed, essential
        self.printed = 0
        self.failure: OSError | None = None

    def show(self, numbers: Sequence[int], texts: Sequence[str]) -> None:
        """Print texts with their samples' numbers.

        Raises:
            OSError: the texts could not be written and are `essential`. Otherwise the error is kept as `failure`.
        """
        from tqdm import tqdm

        try:
            for number, text in zip(numbers, texts):
                if self.failure is None:
                    header = f"{'' if self.printed == 0 else chr(10)}--- sample {number} ---\n" if self.headed else ""
                    tqdm.write(f"{header}{text}", file=sys.stdout)  # does not disturb the progress bar
                    self.printed += 1
            sys.stdout.flush()
        except OSError as error:
            discard_stdout()
            self.failure = type(error)(error.errno, error.strerror, "standard output")
            if self.essential:
                raise self.failure from error


def without_texts(output: SampleOutput) -> SampleOutput:
    """The part of an output that the summary needs."""
    return replace(output, sequences=None, lengths=None, prompt_lengths=None, stop_reason=None, history=None)


def number_formats(denoiser: Denoiser, rows: int) -> str:
    """In which formats a model runs whose largest pass has so many positions."""
    dtype = str(denoiser.dtype).removeprefix("torch.")
    if denoiser.precision_of(rows) is not None:
        dtype += f" in {denoiser.precision}"
    elif denoiser.precision is not None:
        dtype += f", not {denoiser.precision} as no pass has more than {rows:,} positions"
    return dtype if denoiser.head_precision is None else f"{dtype} (output layer in {denoiser.head_precision})"


def summary(output: SampleOutput, job: Job, decoder: str, processes: int, batch_size: int) -> str:
    """What was run, how many forward passes it took, how long, and what the schedule saved.

    `processes`: number of processes that shared the work; `batch_size`: sequences in a pass, at most.
    """
    from mdkern.output import counted_saving

    assert output.tokens_per_forward is not None
    assert output.nfe is not None
    assert output.timings is not None
    denoisers = {name: job.models[name] for name in job.schedule.models}
    first = next(iter(denoisers.values()))
    count, length = len(output.tokens_per_forward), job.ids.shape[1]
    masked = float((job.ids == first.mask_id).sum()) / len(job.ids)  # of a sample
    where = f"{processes} processes on {first.device.type}" if processes > 1 else str(first.device)
    dtype = number_formats(first, min(batch_size, -(-count // processes)) * length)
    blocks = {name: denoiser.num_blocks for name, denoiser in denoisers.items() if denoiser.num_blocks is not None}
    passes = {name: float(nfe.float().mean()) for name, nfe in output.nfe.items()}
    sizes = {name: f" ({blocks[name]} blocks)" if name in blocks else "" for name in passes}
    each = ", ".join(f"{name} {passes[name]:.1f}{sizes[name]}" for name in passes)
    steps = job.schedule.total or "their own number of"
    commits = sum(float(count.float().mean()) for count in (output.commits or {}).values())
    kept = f", {commits:.1f} of them for keys and values alone" if output.commits is not None else ""
    seconds = output.timings["total"]
    parts = ", ".join(f"{name} {output.timings[name]:.2f} s" for name in passes)
    lines = [
        f"{count} x {length} tokens, decoder {decoder}, schedule {job.schedule}, seed {output.seed}, {where}, {dtype}",
        f"forward passes per sequence: {each}; {sum(passes.values()):.1f} for {steps} steps{kept}",
        f"{seconds:.2f} s ({parts}), {count * masked / seconds:,.0f} tokens/s",
    ]
    if len(blocks) == len(denoisers) > 1:
        saved = output.flops_saved
        if saved is not None:
            saved = counted_saving(denoisers, output.nfe, output.tokens_per_forward, length)
        counted = "unknown" if saved is None else f"{saved:.1%}"
        dearest = max(blocks, key=lambda name: blocks[name])
        by_blocks = f"{job.schedule.saved(blocks):.1%}"
        lines.append(f"saved against {dearest} alone: {by_blocks} of the blocks (equation 3), {counted} of the FLOPs")
    return "\n".join(lines)
