"""Training batches as a pure function of (seed, step): windows, diffusion times and masks, prepared ahead on the CPU.

Every random number of a step is drawn for the whole global batch and then sharded, so the batches do not depend on
the number of processes, and a resumed run sees what the unbroken one would have seen. Masked rows are found on the
CPU, so the GPU never waits for the host and the head runs at masked rows only.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Floats = NDArray[np.float32]

ROW_MULTIPLE = 2048  # for large batches, so that there are few row counts and few compilations


class MaskedBatch(NamedTuple):
    """A batch of partly masked windows and the rows the head is run on.

    Attributes:
        input_ids: int64 ``[B, L]`` with masked positions set to the mask id.
        t: float32 ``[B]`` diffusion times in [eps, 1]; a position is masked with probability t.
        row_index: int64 ``[M]`` indices of masked positions in ``[B * L]``, padded with arbitrary rows.
        targets: int64 ``[M]`` the tokens of the unmasked windows at these rows.
        weights: float32 ``[M]``: 1/t of the row's sequence, 0 in the padding.
    """

    input_ids: Tensor
    t: Tensor
    row_index: Tensor
    targets: Tensor
    weights: Tensor


def step_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one step. `stream` separates the uses of one seed (training, evaluation)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, (stream << 48) + step], dtype=np.uint64)))


def stratified_times(count: int, eps: float, generator: np.random.Generator) -> Floats:
    """Low-discrepancy diffusion times, float32 ``[count]`` in [eps, 1]: one in each of `count` equal strata.

    One uniform u shifts the grid: ``t_i = (u + i / count) mod 1``, scaled (Kingma et al., 2107.00630, app. I.1).
    """
    unit = (generator.random() + np.arange(count) / count) % 1.0
    return (eps + (1.0 - eps) * unit).astype(np.float32)


def random_windows(tokens: Array, batch_size: int, length: int, generator: np.random.Generator) -> Array:
    """Windows ``[batch_size, length]`` of the token file at uniformly random offsets."""
    starts = generator.integers(0, len(tokens) - length + 1, size=batch_size)
    return np.stack([tokens[start : start + length] for start in starts])


def even_windows(tokens: Array, count: int, length: int) -> Array:
    """At most `count` windows ``[n, length]`` evenly spaced over the token file, without overlap."""
    starts = np.linspace(0, len(tokens) - length, min(count, len(tokens) // length)).astype(np.int64)
    return np.stack([tokens[start : start + length] for start in starts])


def masked_batch(windows: Array, t: Floats, uniforms: Floats, mask_id: int) -> MaskedBatch:
    """Mask each position of ``windows [B, L]`` where its ``uniforms [B, L]`` is below its sequence's ``t [B]``.

    The rows are padded to a number that a batch of stratified times exceeds only once in 10⁹ batches, so that nearly
    all batches have one shape; larger ones are padded to a multiple of `ROW_MULTIPLE` (1/32 of a small batch).
    """
    batch_size, length = windows.shape
    masked = uniforms < t[:, None]
    rows = np.flatnonzero(masked)
    # Stratified times average 1/2 within 1/(2B); given them the count's variance is L * sum t(1-t), about B L / 6.
    usual = batch_size * length / 2 + length / 2 + 6 * math.sqrt(batch_size * length / 6)
    multiple = min(ROW_MULTIPLE, max(1, batch_size * length // 32))
    capacity = math.ceil(max(usual, len(rows)) / multiple) * multiple
    row_index = np.arange(capacity, dtype=np.int64) % (batch_size * length)  # distinct rows: no contention in backward
    row_index[: len(rows)] = rows
    targets = windows.reshape(-1)[row_index].astype(np.int64)
    weights = np.zeros(capacity, dtype=np.float32)
    weights[: len(rows)] = 1.0 / t[rows // length]
    input_ids = np.where(masked, np.int64(mask_id), windows.astype(np.int64))
    return MaskedBatch(*map(torch.from_numpy, (input_ids, t, row_index, targets, weights)))


def own_shards(batch_size: int, rank: int, world: int, accumulate: int) -> list[slice]:
    """The sequences of a global batch that go into each micro-batch of a rank: every n-th, from another one on.

    Raises:
        ValueError: the batch does not divide.
    """
    shards = world * accumulate
    if batch_size % shards:
        raise ValueError(f"batch size {batch_size} does not divide into {world} processes x {accumulate} micro-batches")
    return [slice(k, None, shards) for k in range(rank * accumulate, (rank + 1) * accumulate)]


@dataclass(frozen=True)
class MaskedBatches:
    """The batches of a training run: ``batches(step)`` gives this rank's micro-batches of a step.

    They are shared out as `own_shards` says, so each shard's times are stratified, too.
    """

    tokens: Array  # [count] uint16 or uint32
    batch_size: int  # of all ranks and micro-batches together
    length: int
    mask_id: int
    seed: int
    eps: float = 1e-3
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        own_shards(self.batch_size, self.rank, self.world, self.accumulate)
        if len(self.tokens) < self.length:
            raise ValueError(f"the token file has {len(self.tokens)} tokens, fewer than the length {self.length}")

    def __call__(self, step: int) -> list[MaskedBatch]:
        generator = step_generator(self.seed, step)
        windows = random_windows(self.tokens, self.batch_size, self.length, generator)
        t = stratified_times(self.batch_size, self.eps, generator)
        uniforms = generator.random(windows.shape, dtype=np.float32)
        own = own_shards(self.batch_size, self.rank, self.world, self.accumulate)
        return [masked_batch(windows[part], t[part].copy(), uniforms[part], self.mask_id) for part in own]


@dataclass(frozen=True)
class Prefetched:
    """Iterate over the batches of steps first..last-1, at most `ahead` of them prepared in background threads."""

    make: Callable[[int], Sequence[tuple[Tensor, ...]]]  # a step's micro-batches
    first: int
    last: int
    workers: int = 2
    ahead: int = 8
    pin: bool = False  # page-locked memory, so that copies to the GPU do not block

    def prepare(self, step: int) -> list[tuple[Tensor, ...]]:
        batches = [tuple(batch) for batch in self.make(step)]
        return [tuple(x.pin_memory() for x in batch) for batch in batches] if self.pin else batches

    def __iter__(self) -> Iterator[list[tuple[Tensor, ...]]]:
        steps = iter(range(self.first, self.last))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="batches")
        try:
            pending = deque(pool.submit(self.prepare, step) for step in itertools.islice(steps, self.ahead))
            while pending:
                batches = pending.popleft().result()
                if (step := next(steps, None)) is not None:
                    pending.append(pool.submit(self.prepare, step))
                yield batches
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
