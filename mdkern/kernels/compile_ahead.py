"""Compiles the Triton kernels of a computation side by side, instead of each at its first launch.

Triton compiles a kernel when it is first launched, which takes seconds for the large ones. Inside `launches_compile` a
launch hands its kernel to threads and returns at once; nothing is launched. What a computation needs is thus known from
running it once in a way in which its results do not matter, whatever model and options it has. Most of the compiler
works outside of Python's lock, so that threads share its work out over the cores. What holds the lock, the translation
of Python into the compiler's language, takes turns, so that the first kernel goes on while the second is translated.
Times: docs/notes/first-call.md.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from mdkern.kernels.device import has_triton

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
        made = triton.AsyncCompileMode(Loading(threads, device), ignore_errors=True)
        with translated_in_turn(), made, warm_ups_for_launches():
            _rehearsing.value = True
            try:
                yield
            finally:
                _rehearsing.value = False


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

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def compiled() -> Any:
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


@contextmanager
def translated_in_turn() -> Iterator[None]:
    """Inside, one thread at a time translates a kernel from Python."""
    from triton.compiler.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    turn = threading.RLock()

    def taking_turns(plain: Callable[..., Any]) -> Callable[..., Any]:
        def make_ir(*args: Any, **kwargs: Any) -> Any:
            with turn:
                return plain(*args, **kwargs)

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
