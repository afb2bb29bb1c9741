"""Captures a step in a CUDA graph, after it has been warmed up and, where that is possible, rehearsed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch

from mdkern.kernels.compile_ahead import can_compile_ahead, launches_compile
from mdkern.models.fingerprint import no_collection

logger = logging.getLogger(__name__)

WARM_UPS = 2  # runs of a step before it is captured
LOCK = threading.Lock()  # one capture at a time in a process, and none while graphs are put away or dropped


class CaptureError(RuntimeError):
    """A step that runs eagerly but cannot be captured."""


def warm_up(step: Callable[[], None], idle: Callable[[], None], times: int = WARM_UPS) -> None:
    """Run a step a few times, each time from the idle state, so that kernels are compiled and algorithms chosen."""
    for _ in range(times):
        idle()
        step()


def capture(
    step: Callable[[], None],
    idle: Callable[[], None],
    pool: Any,
    device: torch.device,
    keep_graph: bool = False,
    warm_ups: int = WARM_UPS,
) -> tuple[torch.cuda.CUDAGraph, int]:
    """Capture `step` on a stream of its own, after it has been warmed up by `warm_ups` runs.

    `torch.cuda.graph` is not used, because it also collects garbage and empties the allocator's cache of the process.

    Returns:
        The graph, and the bytes by which PyTorch's reserved memory grew.

    Raises:
        CaptureError: the step can't be captured. The pool must not be used again.
    """
    with LOCK, torch.cuda.device(device):
        stream, current = capture_stream(device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            warm_up(step, idle, warm_ups)
            torch.cuda.synchronize()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
            try:
                record(graph, step, pool, device, "thread_local")
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise CaptureError(str(error)) from error
        current.wait_stream(stream)
        memory = torch.cuda.memory_reserved() - before
    logger.debug("captured a graph on %s: %.1f MiB", device, memory / 2**20)
    return graph, memory


def rehearse(
    step: Callable[[], None], idle: Callable[[], None], pool: Any, device: torch.device
) -> tuple[torch.cuda.CUDAGraph | None, int]:
    """Compile all kernels of a step at the same time, before it is run for the first time.

    Its launches only compile, and everything else is captured instead of run, because it would read what they have not
    written. Nothing of the step may keep a tensor that it makes, as a model's own forward does with tables of angles:
    it would never be filled.

    Returns:
        The graph, which is of no use but for the memory of the pool that it holds until the capture, and the bytes of
        that. None if nothing can be compiled ahead here.

    Raises:
        CaptureError: the step could not be rehearsed. The pool must not be used again.
    """
    if not can_compile_ahead(device):
        return None, 0
    with LOCK, torch.cuda.device(device):
        stream, current = capture_stream(device), torch.cuda.current_stream()
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(stream):
            idle()
            one = torch.ones(1, 1, device=device)
            one @ one  # cuBLAS's workspace of this stream must not be in the pool
            torch.cuda.synchronize()
            try:
                with launches_compile(device):
                    before = torch.cuda.memory_reserved()
                    record(graph, step, pool, device, "relaxed")  # libraries may do what they do once
                    memory = torch.cuda.memory_reserved() - before
            except Exception as error:
                raise CaptureError(str(error)) from error
        current.wait_stream(stream)
    return graph, memory


def record(graph: torch.cuda.CUDAGraph, step: Callable[[], None], pool: Any, device: torch.device, mode: str) -> None:
    """Capture a step on the current stream."""
    with no_collection():  # which could destroy an old graph in this thread, and that makes a capture invalid
        try:
            graph.capture_begin(pool=pool, capture_error_mode=mode)
            step()
            graph.capture_end()
        except BaseException:
            leave(graph, device, pool)
            raise


def leave(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Clean up after a capture that has failed."""
    try:
        graph.capture_end()  # takes the stream out of capture mode
    except RuntimeError:  # the capture is invalid, but PyTorch's allocator and generator are still in capture mode
        # Private names of PyTorch: without them the allocator keeps the memory of the pool, and nothing else breaks.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        with suppress(RuntimeError):
            nothing = torch.zeros(1, device=device)
            valid = torch.cuda.CUDAGraph()
            valid.capture_begin(capture_error_mode="thread_local")
            nothing.zero_()
            valid.capture_end()  # takes the generator out of capture mode, in which it refuses every draw


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all captures, because cuBLAS keeps 32 MiB of workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)
