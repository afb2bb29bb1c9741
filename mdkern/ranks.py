"""The processes of a group: what they tell each other, with a time limit, and errors that reach all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 1800.0  # seconds
LONGEST_TIMEOUT = 1e8  # three years; beyond about three hundred the milliseconds overflow in PyTorch
MOST_TOLD = 4  # ranks that a message names
# Types of errors that are raised as such on the other ranks; any other becomes a RuntimeError there.
TOLD: tuple[type[Exception], ...] = (
    torch.OutOfMemoryError,
    ValueError,
    TypeError,
    FloatingPointError,
    TimeoutError,
    OSError,
)


class Ranks:
    """The processes of the default group, with a gloo group over them; or those of a group."""

    def __init__(self, timeout: float = TIMEOUT, group: Any = None, what: str = "sample_distributed") -> None:
        """To be called on every one of them.

        Args:
            timeout: seconds that a rank waits for the others; those of `group`, if it is given, are its own.
            what: what needs them, for the message.
        """
        check_timeout(timeout)
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(f"{what} needs torch.distributed.init_process_group() to be called first")
        self.rank, self.count, self.timeout = dist.get_rank(group), dist.get_world_size(group), timeout
        self.group = group
        if group is None:
            with self.waiting():
                self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def close(self) -> None:
        dist.destroy_process_group(self.group)

    def gather(self, item: Any) -> list[Any]:
        """The items of all ranks in order, on every rank."""
        items: list[Any] = [None] * self.count
        with self.waiting():
            dist.all_gather_object(items, item, group=self.group)
        return items

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Turn gloo's errors, a timeout or a lost connection, into a `TimeoutError` that says so."""
        began = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise TimeoutError(
                f"rank {self.rank} lost another rank after waiting {time.perf_counter() - began:.1f} s of at most "
                f"{self.timeout:g}: it has died or hangs ({first_line(error)})"
            ) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error inside on one rank is raised on all: there as it is, elsewhere with that rank's number."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        told = None if own is None else (kind_of(own).__name__, str(own))
        failures = [(rank, failure) for rank, failure in enumerate(self.gather(told)) if failure is not None]
        if own is not None:
            raise own
        if failures:
            rank, (kind, message) = failures[0]
            known = {error.__name__: error for error in TOLD}
            raise known.get(kind, RuntimeError)(f"rank {rank}: {message}")


def check_timeout(timeout: Any) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, Real) or not 0 < float(timeout) <= LONGEST_TIMEOUT:
        raise ValueError(
            f"timeout must be a number of seconds above 0 and at most {LONGEST_TIMEOUT:g}, not {timeout!r}"
        )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def kind_of(error: Exception) -> type[Exception]:
    return next((kind for kind in TOLD if isinstance(error, kind)), RuntimeError)


def check_equal(facts: Sequence[Mapping[str, str]]) -> None:
    """Refuse a call that differs between the ranks, with the ranks and what differs."""
    differing: dict[int, str] = {}
    for rank, theirs in enumerate(facts):
        unequal = sorted(name for name in {*theirs, *facts[0]} if theirs.get(name) != facts[0].get(name))
        if unequal:
            differing[rank] = ", ".join(unequal)
    if differing:
        told = [f"on rank {rank} in {names}" for rank, names in differing.items()]
        told[0] = told[0].replace(" in ", " differ from those on rank 0 in ", 1)
        more = len(told) - MOST_TOLD
        rest = [f"on {more} more ranks, too"] if more > 0 else []
        raise ValueError(f"the arguments {'; '.join(told[:MOST_TOLD] + rest)}")
