"""How PyTorch's threads wait in mdkern's own commands."""

from __future__ import annotations

import os
import sys

CHOSEN_BY_THE_USER = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait. It must be called before PyTorch is imported.

    Threads that spin take the cores from each other: on two cores that other programs also used, a command took 15 to
    40 s instead of 2. Variables of OpenMP that are already set are respected. Programs that import mdkern decide for
    themselves.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOSEN_BY_THE_USER):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
