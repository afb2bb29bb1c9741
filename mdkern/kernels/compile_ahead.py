"""Compiles the Triton kernels of a computation side by side, instead of each at its first launch.

Triton compiles a kernel when it is first launched, which takes seconds for the large ones. Inside `launches_compile` a
launch hands its kernel to threads and returns at once; nothing is launched. What a computation needs is thus known from
running it once in a way in which its results do not matter, whatever model and options it has. Most of the compiler
works outside of Python's lock, so that threads share its work out over the cores. What holds the lock, the translation
of Python into the compiler's language, takes turns, first those kernels that take the rest of the compiler longest, so
that it has them while the next ones are translated. Times: docs/notes/first-call.md.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from heapq import heappop, heappush
from typing import Any

import torch

from mdkern.kernels.device import has_triton

SLOWEST = ("linear_kernel", "resident_kernel")  # which take the compiler longest once they have been translated
MOST_THREADS = 2 * (os.cpu_count() or 1)  # as some wait for their turn, or for a C compiler
logger = logging.getLogger(__name__)


class Rehearsing(threading.local):
    """Whether this thread's launches compile and do nothing else."""

    value: bool = False


_rehearsing = Rehearsing()
_alone = threading.Lock()  # as classes of Triton are changed meanwhile
_rehearsed: set[Hashable] = set()


def can_compile_ahead(device: torch.device) -> bool:
    """Whether Triton is there, and its version compiles asynchronously."""
    if not has_triton(device):
        return False
    import triton

    return hasattr(triton, "AsyncCompileMode")


@contextmanager
def launches_compile(device: torch.device) -> Iterator[None]:
    """Inside, this thread's launches of mdkern's kernels compile them and do nothing else. At the end all are ready.

    A kernel that cannot be compiled is left to its launch, which raises the error where it belongs.
    """
    import triton

    with _alone, ThreadPoolExecutor(MOST_THREADS) as threads:
        turns, loading = Turns(), Loading(threads, device)
        made = triton.AsyncCompileMode(loading, ignore_errors=True)
        with translated_in_turn(turns, loading), made, warm_ups_for_launches():
            _rehearsing.value = True
            try:
                yield
            finally:
                _rehearsing.value = False
                turns.give_back()


def is_rehearsing() -> bool:
    """Whether this thread is inside `launches_compile`."""
    return _rehearsing.value


def rehearse_once(key: Hashable, work: Callable[[], Any], device: torch.device) -> None:
    """Compile the kernels of some work, by doing it once without its launches, unless that has been done.

    Args:
        key: of the work. If that returns None, there was nothing to do, and it is rehearsed again the next time.
        work: may write what it likes, as it is done again, and must not look up places that kernels compute.
    """
    if key in _rehearsed or not can_compile_ahead(device):
        return
    try:
        with launches_compile(device):
            done = work()
    except Exception as error:  # the work itself will meet it
        logger.debug("some work could not be rehearsed: %s", error)
        return
    if done is not None:
        _rehearsed.add(key)


class Loading(Executor):
    """Compiles in threads, and loads the outcome into the device's memory there, too."""

    def __init__(self, threads: ThreadPoolExecutor, device: torch.device) -> None:
        self.threads, self.device = threads, device
        self.working: set[int] = set()  # threads

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def compiled() -> Any:
            self.working.add(threading.get_ident())
            kernel = function(*args, **kwargs)
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                kernel.run  # noqa: B018  builds the launcher, by a C compiler, and loads the kernel
            return kernel

        return self.threads.submit(compiled)


@contextmanager
def warm_ups_for_launches() -> Iterator[None]:
    """Inside, this thread's launches of mdkern's kernels are Triton's warm-ups, which compile and launch nothing."""
    from triton.runtime.jit import JITFunction

    plain = JITFunction.run
    package = __name__.partition(".")[0]

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        ours = _rehearsing.value and self.fn.__module__.partition(".")[0] == package
        return plain(self, *args, grid=grid, warmup=warmup or ours, **kwargs)

    with replaced(JITFunction, "run", run):
        yield


class Turns:
    """One thread at a time has the turn, those that wait for it by their weight. At first nobody's thread has it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: list[tuple[float, int]] = []  # the heaviest first
        self.taken, self.number = True, 0

    def take(self, weight: float) -> None:
        with self.changed:
            self.number += 1
            mine = -weight, self.number
            heappush(self.waiting, mine)
            self.changed.wait_for(lambda: not self.taken and self.waiting[0] == mine)
            heappop(self.waiting)
            self.taken = True

    def give_back(self) -> None:
        with self.changed:
            self.taken = False
            self.changed.notify_all()


def weight_of(name: str, source: str, gluon: bool) -> float:
    """How early a kernel should be translated: the slowest, then those in Gluon, then the longest."""
    return len(source) + (1e9 if name in SLOWEST else 1e6 if gluon else 0.0)


@contextmanager
def translated_in_turn(turns: Turns, loading: Loading) -> Iterator[None]:
    """Inside, one of the threads at a time translates a kernel from Python, the one of the most `weight_of` first."""
    from triton.compiler.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    def taking_turns(plain: Callable[..., Any]) -> Callable[..., Any]:
        def make_ir(source: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() not in loading.working:  # of another computation
                return plain(source, *args, **kwargs)
            turns.take(weight_of(source.name, source.fn.src, isinstance(source, GluonASTSource)))
            try:
                return plain(source, *args, **kwargs)
            finally:
                turns.give_back()

        return make_ir

    with ExitStack() as changes:
        for kind in (ASTSource, GluonASTSource):
            changes.enter_context(replaced(kind, "make_ir", taking_turns(kind.make_ir)))
        yield


@contextmanager
def replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of a class has another value."""
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)
