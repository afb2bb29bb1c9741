"""`sample_distributed`: one call of `sample`, divided among the processes of a `torch.distributed` group.

A sample depends on the seed, its number and its prompt, and not on the other samples. So each rank draws a contiguous
share of the samples under their own numbers, and together they are the samples that one process would have drawn. Only
digests and results are exchanged, by collectives on the CPU over a gloo group of this call, with a time limit.

    torchrun --nproc-per-node 2 script.py

with, in ``script.py``::

    torch.distributed.init_process_group()
    heavy, light, _ = mdkern.load_pair(f"cuda:{os.environ['LOCAL_RANK']}")
    out = sample_distributed(heavy, light, "L32 H192 L32", num_samples=256, seed=0)  # the same on every rank
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mdkern.digest import digest, model_digest
from mdkern.engine.groups import Groups
from mdkern.engine.request import Request, rows_of
from mdkern.engine.resolve import resolve
from mdkern.models.sharded import refuse_sharded
from mdkern.output import SampleOutput, flops_saved, joined
from mdkern.ranks import TIMEOUT, Ranks, check_equal, check_timeout
from mdkern.schedule import Schedule

# Fields of a request that are not compared: each rank's own, those that follow from others, and those compared
# otherwise.
NOT_COMPARED = {"streamer", "stopping_criteria", "blocks", "edges", "start", "denoisers", "seed"}


def local_rank() -> int:
    """Number of this process's own GPU; 0 unless ``torchrun`` started it."""
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_torchelastic_launched() else 0


@contextmanager
def torchrun_ranks(timeout: float = TIMEOUT) -> Iterator[Ranks | None]:
    """The processes that ``torchrun`` started, as a process group inside of this context; None without ``torchrun``.

    `timeout`: seconds that a process waits for the others.
    """
    if not dist.is_torchelastic_launched():
        yield None
        return
    check_timeout(timeout)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        yield Ranks(timeout)
    finally:
        dist.destroy_process_group()


def request_digests(request: Request, models: bool = True) -> dict[str, str]:
    """Digests of what the samples of a call depend on, except the seed, by the names used in messages.

    `models`: whether those of the weights are among them, for which all weights are read.
    """
    names = {field.name for field in fields(request)} - NOT_COMPARED
    digests = {name: digest(getattr(request, name)) for name in names}
    if not models:
        return digests
    return digests | {f"model {name}": model_digest(denoiser) for name, denoiser in request.denoisers.items()}


def share(count: int, rank: int, ranks: int) -> slice:
    """The samples of a rank: contiguous, and at most one more than any other rank's."""
    return slice(rank * count // ranks, (rank + 1) * count // ranks)


def sample_distributed(
    heavy: Any,
    light: Any = None,
    schedule: str | Schedule | None = None,
    *,
    seed: int | None = None,
    return_history: bool = False,
    cuda_graphs: bool = True,
    progress: bool | None = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> SampleOutput:
    """`mdkern.sample` with its samples divided among the ranks of the default process group.

    Call it on every rank with the same arguments and with the models on the rank's own device. There may be fewer
    samples than ranks.

    Args:
        heavy, light, schedule, options: as in `mdkern.sample`; `input_ids`, `num_samples` and the like are those of all
            samples, not of the rank's share. Hooks (a streamer, stopping criteria) belong to each rank and are called
            for its share.
        seed: as in `mdkern.sample`; without one, rank 0 draws one for all.
        progress: as in `mdkern.sample`, for rank 0's share; the other ranks show none.
        timeout: seconds that a rank waits for the slowest one to begin and to finish its share. Default: half an hour.

    Returns:
        All samples in order, on every rank, as tensors on the rank's device. ``timings`` are those of the slowest rank,
        except ``total``, which is this rank's time in this call with all exchanges.

    Raises:
        RuntimeError: there is no process group.
        ValueError: arguments or weights differ between the ranks; the message names the ranks and what differs.
        TimeoutError: the other ranks did not answer in time.
        Otherwise what `mdkern.sample` raises. An error on one rank is raised on every rank, and its ``partial`` has
        what all ranks had finished.
    """
    began = time.perf_counter()
    ranks = Ranks(timeout)
    try:
        with ranks.together():
            request = resolve(heavy, light, schedule, seed=seed, **options)
            refuse_sharded(request.denoisers.values(), "sample_distributed")
            ids = request.input_ids
            facts = request_digests(request) | {"seed": digest(seed), "return_history": digest(return_history)}
        calls = ranks.gather((facts, request.seed))
        check_equal([theirs for theirs, _ in calls])
        mine = share(len(ids), ranks.rank, ranks.count)
        part = replace(rows_of(request, mine), seed=calls[0][1]) if len(ids[mine]) else None
        output, failure = run_share(ranks, part, return_history, cuda_graphs, progress if ranks.rank == 0 else False)
        parts = [part for part in ranks.gather(moved(output, "cpu")) if part is not None]
    finally:
        ranks.close()
    parts = [part for part in parts if len(part.sequences)] or parts[:1]
    whole = joined_ranks(parts, request, began) if parts else None
    if failure is not None:
        failure.partial = whole  # type: ignore[attr-defined]
        raise failure
    assert whole is not None
    return whole


def run_share(
    ranks: Ranks, part: Request | None, return_history: bool, cuda_graphs: bool, progress: bool | None
) -> tuple[SampleOutput | None, Exception | None]:
    """What this rank has finished of its share, if it has one, and the error of any rank, if there is one.

    Raises:
        TimeoutError: at once, as other ranks can no longer be asked for what they have finished.
    """
    output: SampleOutput | None = None
    try:
        with ranks.together():
            if part is not None:
                output = Groups(part, None, return_history, cuda_graphs, progress).all()
    except TimeoutError:
        raise
    except Exception as error:
        return error.partial if hasattr(error, "partial") else output, error
    return output, None


def joined_ranks(parts: list[SampleOutput], request: Request, began: float) -> SampleOutput:
    """The outputs of all ranks joined, on the device of this rank's request."""
    whole: SampleOutput = moved(joined(parts, torch.cat), request.device)
    assert whole.timings is not None
    whole.flops_saved = flops_saved(request, whole)
    whole.timings["total"] = time.perf_counter() - began
    return whole


def moved(output: Any, device: torch.device | str) -> Any:
    """The output with its tensors on `device`."""
    return joined([output], lambda tensors: tensors[0].to(device))
