"""Running tests in a process of their own, for what an environment variable decides at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_in_own_process(*command: str, timeout: int = 500, **environment: str) -> str:
    """Run ``python -m command`` in the repository's root; its standard output, and a failed assertion if it fails."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def run_in_the_interpreter(tests: str, part: str = "") -> None:
    """Run a file's tests (those that match `part`) with Triton's kernels interpreted on the CPU."""
    selected = ("-k", part) if part else ()
    run_in_own_process("pytest", "-q", "-x", "-p", "no:cacheprovider", tests, *selected, TRITON_INTERPRET="1")
