"""Compiles the Triton kernels of a computation side by side, instead of each at its first launch.

Triton compiles a kernel when it is first launched, which takes seconds for the large ones. Inside `launches_compile` a
launch hands its kernel to threads and returns at once; nothing is launched. What a computation needs is thus known from
running it once in a way in which its results do not matter, whatever model and options it has. Most of the compiler
works outside of Python's lock, so that threads share its work out over the cores. What holds the lock, the translation
of Python into the compiler's language, takes half a second and more for a large kernel. So each of those is compiled in
a forked copy of this process (`forked`), and read from Triton's cache afterwards; the copy is made before a thread
compiles anything, because the locks of the compiler's threads would stay taken in it. What is translated here takes
turns, first those kernels that take the rest of the compiler longest, so that it has them while the next ones are
translated. Times: docs/notes/first-call.md.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from heapq import heappop, heappush
from typing import Any

import torch

from mdkern.kernels.device import has_triton
from mdkern.kernels.forked import forks, has_succeeded, start_in_copy

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
    with _alone, ThreadPoolExecutor(MOST_THREADS) as threads:
        start_triton(threads)
        turns, loading = Turns(), Loading(threads, device)
        with translated_in_turn(turns, loading), compiled_by(loading), warm_ups_for_launches():
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


def start_triton(threads: Executor) -> None:
    """What Triton does once in a process: it reads its own library for its cache's keys, while a C compiler makes the
    module by which it talks to the driver."""
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    key = threads.submit(triton_key)
    driver.active.get_current_target()
    key.result()


@contextmanager
def compiled_by(loading: Loading) -> Iterator[None]:
    """Inside, Triton has this thread's kernels compiled there. Also after an interrupt this ends with the block."""
    import triton
    from triton.runtime._async_compile import active_mode

    try:
        with triton.AsyncCompileMode(loading, ignore_errors=True):
            yield
    finally:
        active_mode.set(None)


class CompiledApart(Exception):  # noqa: N818  it is no error
    """Ends a compilation that was done in a copy of this process: its outcome is in Triton's cache."""


class Loading(Executor):
    """Compiles in threads, and loads the outcome into the device's memory there, too."""

    def __init__(self, threads: ThreadPoolExecutor, device: torch.device) -> None:
        self.threads, self.device = threads, device
        self.working: dict[int, Callable[[], Any] | None] = {}  # what each thread compiles, once a copy has not

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def compiled() -> Any:
            kernel, work = None, partial(function, *args, **kwargs)
            self.working[threading.get_ident()] = work
            with suppress(CompiledApart):
                kernel = work()
            kernel = kernel or work()
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                kernel.run  # noqa: B018  builds the launcher, by a C compiler, and loads the kernel
            return kernel

        return self.threads.submit(compiled)

    def start_apart(self) -> int | None:
        """Start this thread's work in a copy of the process, the first time that it is asked for; the copy's id."""
        from triton import knobs

        work, self.working[threading.get_ident()] = self.working[threading.get_ident()], None
        if work is None or knobs.compilation.always_compile or not forks.are_of_use():
            return None

        def apart() -> None:
            self.working.clear()  # nobody has a turn there
            knobs.compilation.listener = None  # is told when the cache is read
            work()

        return start_in_copy(apart)


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
    """Inside, one thread at a time translates a kernel from Python, or starts a copy that compiles a large one.

    Those of the most `weight_of` come first.
    """
    from triton.compiler.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    def taking_turns(plain: Callable[..., Any]) -> Callable[..., Any]:
        def make_ir(source: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() not in loading.working:  # of another computation
                return plain(source, *args, **kwargs)
            large = isinstance(source, GluonASTSource)
            turns.take(weight_of(source.name, source.fn.src, large))
            try:
                copy = loading.start_apart() if large else None
                if copy is None:
                    return plain(source, *args, **kwargs)
            finally:
                turns.give_back()
            has_succeeded(copy)
            raise CompiledApart

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
