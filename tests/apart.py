"""Running tests in a process of their own, for what an environment variable decides at import."""

from __future__ import annotations

import os
import subprocess
import sys


def run_apart(*command: str, timeout: int = 500, **environment: str) -> str:
    """Run ``python -m command``; its standard output, and a failed assertion if it fails."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout
