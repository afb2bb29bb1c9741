"""Runs a request in groups of consecutive samples: finished samples can be handed over, or kept after a failure.

The samples of a group go through the schedule together, segment by segment. A group has as few batches as possible
without many more forward passes than one run of all samples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.decoders import Planned, Stepwise
from mdkern.engine import block_cached, cached, planned, stepwise
from mdkern.engine.checks import check_flag
from mdkern.engine.graphs import lease
from mdkern.engine.hooks import Drafts
from mdkern.engine.request import Request, rows_of
from mdkern.engine.state import FAILED, RUNNING, IncompleteError, Outcome, SamplerState, Timings
from mdkern.kernels.invariant import batch_invariant
from mdkern.output import SampleOutput, flops_saved, joined, summarise

logger = logging.getLogger(__name__)

RUNS: dict[str, Callable[..., Outcome]] = {
    "none": stepwise.run,
    "prefix": partial(stepwise.run, decode=partial(cached.decode_segment, dual=False)),
    "dual": partial(stepwise.run, decode=partial(cached.decode_segment, dual=True)),
    "block": partial(stepwise.run, decode=block_cached.decode_segment),
}  # of decoders that look at the model, by `cache`

MOST_GROWTH = 1.02  # largest number of passes of all groups, over that of one run
LEAST_PASSES, LEAST_PASSES_ON_GPU = 32, 256  # of a group; beginning one costs as much as a few passes of a small model
UNEVEN_BATCHES = 32  # of a group whose sequences differ in passes, as half a batch is idle while the last ones finish
SEQUENCES_PLANNED = 4096  # at a time, to count passes


class Groups:
    """An iterator that runs a request group by group.

    Raises:
        FloatingPointError: no token could be drawn for some samples. It is raised when all others are finished, or at
            once if all samples of a group failed; the outputs are without the failed samples.
        Any exception of a model or hook. ``partial`` of any exception is a `SampleOutput` of the samples that were
        finished and not yet handed over.
    """

    def __init__(
        self,
        request: Request,
        group_size: int | None = None,
        return_history: bool = False,
        cuda_graphs: bool = True,
        progress: bool | None = None,
        began: float | None = None,
    ) -> None:
        """`group_size`: samples of a group; None lets `choose_groups` decide. `began`: start of the first group's time;
        default now."""
        self.request = replace(request, record=check_flag("return_history", return_history))
        self.group_size = group_size
        self.cuda_graphs = check_flag("cuda_graphs", cuda_graphs)
        self.disable = None if progress is None else not check_flag("progress", progress)
        self.began = time.perf_counter() if began is None else began
        self.pending: SampleOutput | None = None  # finished and not yet given

    def __iter__(self) -> Iterator[SampleOutput]:
        try:
            with tqdm(unit="pass", desc="denoising", disable=self.disable, leave=False) as bar:
                yield from self.run(bar)
        except (
            GeneratorExit
        ):  # the iteration was given up, so nothing more is computed, in particular not while Python exits
            raise
        except BaseException as error:
            with suppress(Exception):
                error.partial = self.empty() if self.pending is None else self.pending  # type: ignore[attr-defined]
            raise

    def all(self) -> SampleOutput:
        """Run all groups and join their outputs. ``partial`` of an exception is joined likewise."""
        outputs = []
        began = self.began
        try:
            for output in self:
                outputs.append(output)
        except BaseException as error:
            with suppress(Exception):
                error.partial = self.joined([*outputs, error.partial], began)  # type: ignore[attr-defined]
            raise
        return self.joined(outputs, began)

    def run(self, bar: tqdm) -> Iterator[SampleOutput]:
        count, size = len(self.request.input_ids), self.group_size
        with torch.no_grad(), device_of(self.request):
            if size is None:
                groups, bar.total = choose_groups(self.request)
            else:
                groups = [slice(first, min(first + size, count)) for first in range(0, count, size)]
            most = max(rows.stop - rows.start for rows in groups)
            request = prepared(self.request, most)
        drafts = Drafts(request.streamer, request.input_ids, ~request.masked, request.attention_mask)
        failure, failed = None, 0
        for rows in groups:
            with device_of(request):
                outcome = self.run_group(rows_of(request, rows), most, bar, drafts, rows.start)
            if outcome.failure is not None:
                failure = failure or outcome.failure
                failed += int((outcome.stop_reason == FAILED).sum())
                if not bool(outcome.finished.any()):
                    break
                logger.warning("%s; the other samples go on", outcome.failure)
            output, self.pending, self.began = self.pending, None, time.perf_counter()
            assert output is not None
            yield output
        if failure is not None:
            others = f"; {failed - 1} more failed" if failed > 1 else ""
            raise type(failure)(f"{failure}{others}. What is finished is this error's `partial`")

    def run_group(self, request: Request, most: int, bar: tqdm, drafts: Drafts, first: int) -> Outcome:
        """Run one group, whose samples begin at number `first` of the call; its output goes to `pending`.

        `most` is the size of the largest group.
        """
        run: Callable[..., Outcome] = planned.run if isinstance(request.decoder, Planned) else RUNS[request.cache]
        asked = run is not planned.run and request.stopping_criteria is not None  # called by the host after every step
        graphed = self.cuda_graphs and request.device.type == "cuda" and request.logits_processor is None and not asked
        timings, count = Timings(self.began), len(request.input_ids)
        with torch.no_grad(), lease(request, most) if graphed else nullcontext() as workspace:
            state = SamplerState.of(request) if workspace is None else workspace.state
            drafts.begin(first, state.input_ids[:count])
            if request.stopping_criteria is not None:
                request.stopping_criteria.begin(count)
            cause: BaseException | None = None
            try:
                outcome = run(request, state, workspace, bar, drafts, timings)
            except IncompleteError as incomplete:
                outcome, cause = incomplete.outcome(), incomplete.__cause__
            sequences = state.input_ids[:count].clone()
            self.pending = summarise(request, sequences, outcome, timings.total())
            if cause is not None:
                try:
                    raise cause
                finally:
                    del cause  # this frame is in its traceback: together they would live until garbage is collected
        drafts.end(first, sequences, outcome.finished)
        return outcome

    def joined(self, outputs: list[SampleOutput], began: float) -> SampleOutput:
        output = outputs[0]
        if len(outputs) > 1:
            output = joined([replace(part, flops_saved=None) for part in outputs], torch.cat, sum)
            output.flops_saved = flops_saved(self.request, output)
        assert output.timings is not None
        output.timings["total"] = time.perf_counter() - began
        return output

    def empty(self) -> SampleOutput:
        """The output of no sample."""
        request = rows_of(self.request, slice(0, 0))
        none, nfe = request.input_ids, dict.fromkeys(request.denoisers, request.sample_ids)
        outcome = Outcome(none, none, none.float(), nfe, torch.full_like(request.sample_ids, RUNNING))
        return summarise(request, none, outcome, {"total": time.perf_counter() - self.began})


@contextmanager
def device_of(request: Request) -> Iterator[None]:
    """Kernels are launched on the current device, and in the batch-invariant mode if the request asks for it."""
    device = torch.cuda.device(request.device) if request.device.type == "cuda" else nullcontext()
    with device, batch_invariant() if request.batch_invariant else nullcontext():
        yield


def prepared(request: Request, most: int) -> Request:
    """The request with denoisers prepared for groups of at most `most` samples; cached passes in the weights' own dtype
    need no preparation."""
    rows = min(request.batch_size, most) * request.input_ids.shape[1] * (2 if request.guidance_scale else 1)
    prepared = {
        name: denoiser if request.cache != "none" and denoiser.precision is None else denoiser.prepared(rows)
        for name, denoiser in request.denoisers.items()
    }
    return replace(request, denoisers=prepared)


def choose_groups(request: Request) -> tuple[list[slice], int | None]:
    """The groups to run a request in, and the progress bar's total if there are several.

    The last group also takes the remaining samples, so that no batch is smaller than in one run.
    """
    count, batch = request.input_ids.shape[0], request.batch_size
    passes, total = None, None
    if count >= 2 * batch:
        passes, total = count_passes(request)
    least = LEAST_PASSES_ON_GPU if request.device.type == "cuda" else LEAST_PASSES
    size = batch if passes is not None else batch * UNEVEN_BATCHES
    while passes is not None and 2 * size <= count:
        number = passes_of_groups(passes, size, batch)
        if number <= MOST_GROWTH * passes_of_groups(passes, count, batch) and number >= least * (count // size):
            break
        size *= 2
    if 2 * size > count:
        return [slice(0, count)], None
    firsts = range(0, count - size + 1, size)
    return [slice(first, first + size) for first in firsts[:-1]] + [slice(firsts[-1], count)], total


def passes_of_groups(passes: Tensor, size: int, batch: int) -> int:
    """Number of forward passes of batches in groups of `size` samples.

    Args:
        passes: int64 ``[N, S]``, number of passes of each sequence in each segment.
    """
    groups = len(passes) // size
    cut = (groups - 1) * size
    first, last = passes[:cut].view(groups - 1, size, passes.shape[1]), passes[None, cut:]
    return sum(int(torch.maximum(-(-part.sum(1) // batch), part.amax(1)).sum()) for part in (first, last) if len(part))


def count_passes(request: Request) -> tuple[Tensor | None, int]:
    """Forward passes of each sequence in each segment, int64 ``[N, S]`` on the CPU, and the progress bar's total.

    None instead of the passes if only the run itself shows how many each sequence takes.
    """
    masked = request.masked.sum(-1)
    if isinstance(request.decoder, Stepwise):
        even = int(masked.min()) == int(masked.max()) and not request.decoder.adaptive and not planned.stops(request)
        return request.edges.diff(dim=-1).cpu() if even else None, int(masked.sum())
    parts = []
    for first in range(0, len(masked), SEQUENCES_PLANNED):
        part = rows_of(request, slice(first, first + SEQUENCES_PLANNED))
        plan = planned.draw_plan(part, SamplerState.of(part))
        parts.append(torch.stack([plan.events(piece.first, piece.stop) for piece in planned.pieces(part)], -1).cpu())
    most = max(part.shape[1] for part in parts)  # sequences with fewer steps may have fewer pieces
    passes = torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in parts])
    return passes, int(passes.sum())
