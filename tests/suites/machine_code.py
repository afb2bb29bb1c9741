"""The instructions of a compiled kernel."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache

import triton


@cache
def machine_code(cubin: bytes) -> str:
    """As NVIDIA's disassembler prints them. ``asm["sass"]`` has them too, but also their encoding and the graph of
    their branches, which takes twice as long."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-ndf", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
