"""How PyTorch's threads wait, for programs whose process is ours."""

from __future__ import annotations

import os
import sys

CHOSEN_BY_THE_USER = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait. Call before PyTorch is imported; later it does nothing.

    Threads that spin take the cores from each other: on two cores that other programs use too, a command took 15 to
    40 s instead of 2. Whoever has set one of OpenMP's own variables for this keeps it. Programs that import mdkern
    decide for themselves.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOSEN_BY_THE_USER):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
