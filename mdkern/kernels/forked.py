"""Work in a forked copy of this process, which does not share Python's lock with it and needs no imports.

Only what the work leaves in files remains of it. It must not use a GPU: a copy of a process that does cannot.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SECONDS = 60  # for work that takes a few
logger = logging.getLogger(__name__)


class Forks:
    """Whether copies of this process are of use: until one of them has failed."""

    failed = False

    def are_of_use(self) -> bool:
        """Not with `torch.distributed`, whose memory a network card may have been told of, or if MDKERN_FORK is 0."""
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return hasattr(os, "fork") and os.environ.get("MDKERN_FORK") != "0" and not ready and not self.failed


forks = Forks()


def start_in_copy(work: Callable[[], Any], seconds: int = SECONDS) -> int | None:
    """Start some work in a copy of this process, which ends with it; None if there can be none, now or later.

    Threads that work outside of Python's lock should have no lock of their own now, as the copy has them without their
    threads. So it may stand still; a signal ends it after some seconds.

    Returns:
        The copy's id, for `has_succeeded`.
    """
    try:
        with no_warning_of_a_fork():
            child = os.fork()
    except (OSError, RuntimeError) as error:  # too many processes, or Python is about to end
        logger.debug("no copy of the process: %s", error)
        forks.failed = True
        return None
    if child == 0:
        work_and_end(work, seconds)
    return child


def work_and_end(work: Callable[[], Any], seconds: int) -> None:
    """In a copy: nothing of the process that was copied happens here, neither its handlers nor its last acts."""
    status = 1
    try:
        gc.disable()  # tensors on a GPU must not be destroyed
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits has been told, too
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        work()
        status = 0
    finally:
        os._exit(status)


def has_succeeded(child: int, seconds: float = SECONDS + 1) -> bool:
    """Wait for a copy. Whether its work was done; it is ended if it is late."""
    end = time.monotonic() + seconds
    try:
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.005)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
    except ChildProcessError:  # the program collects all children itself, and knows alone what became of it
        return True
    if ended[1]:
        logger.debug("the copy %d of the process ended with status %d", *ended)
        forks.failed = True
    return not ended[1]


@contextmanager
def no_warning_of_a_fork() -> Iterator[None]:
    """Inside, neither Python nor the tokenizers of Hugging Face warn of what a copy has without its threads."""
    name = "TOKENIZERS_PARALLELISM"
    silent = "tokenizers" in sys.modules and name not in os.environ
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        if silent:
            os.environ[name] = "true"  # as it is
        try:
            yield
        finally:
            if silent:
                os.environ.pop(name, None)
