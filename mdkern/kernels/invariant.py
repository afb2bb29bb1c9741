"""The batch-invariant mode: a row's bits do not depend on what other rows are computed with it.

Addition of floating-point numbers depends on the order, and fast libraries choose the order by the number of rows:
another algorithm of a matrix product, another division of its inner dimension or of the keys of attention. Inside
`batch_invariant`, products and attention run by kernels of ours with one tile shape and one order, whatever the number
of rows (`kernels.backbone.invariant_linear`, `kernels.backbone.invariant_attention`), and every launcher of this
package that would choose by the number of rows chooses as for many.

The idea is that of He et al., "Defeating Nondeterminism in LLM Inference" (Thinking Machines, 2025).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mdkern.kernels.backbone.invariant_attention import invariant_attention
from mdkern.kernels.backbone.invariant_linear import invariant_linear

MANY_ROWS = 1 << 20  # by which launchers choose in this mode


class Depth(threading.local):
    """How many times the mode has been entered in this thread."""

    value: int = 0


_depth = Depth()


def is_batch_invariant() -> bool:
    """Whether this thread is in the batch-invariant mode."""
    return _depth.value > 0


def rows_to_choose_by(rows: int) -> int:
    """The number of rows by which a launcher chooses its kernel and tiles: the same for all in this mode."""
    return MANY_ROWS if is_batch_invariant() else rows


OURS: dict[Any, Callable[..., Any]] = {
    F.linear: invariant_linear,
    F.scaled_dot_product_attention: invariant_attention,
}


class Replaced(TorchFunctionMode):
    """Runs our kernels where modules call PyTorch's products and attention."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return OURS.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Everything inside is computed in the batch-invariant mode. It holds for this thread."""
    _depth.value += 1
    try:
        with Replaced():
            yield
    finally:
        _depth.value -= 1
