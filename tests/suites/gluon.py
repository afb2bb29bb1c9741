"""Compiling Gluon kernels for compute capability 9 on any machine, for the tests."""

# mypy: ignore-errors

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mdkern.kernels.device import is_hopper

SHARED_MEMORY = 227 * 1024  # bytes that a program may have on compute capability 9
POINTERS = {
    "row_index": "*i64",
    "row_count": "*i64",
    "seed": "*i64",
    "keys": "*i64",
    "hidden": "*bf16",
    "token_out": "*i64",
}
NUMBERS = {
    "capacity": "i32",
    "vocab": "i32",
    "hidden_rows": "i32",
    "hidden_dim": "i32",
    "columns": "i32",
    "depth": "i32",
    "hidden_stride": "i64",
}
SCALARS = ("scale", "soft_cap", "uniform_temperature")


def descriptor(block: list[int], element: gl.dtype = gl.bfloat16) -> str:
    """The type of a matrix that bulk copies read in such blocks."""
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return f"tensordesc<{element}[{block[0]},{block[1]}],{layout!r}>"


def build(kernel: Any, constants: dict[str, Any], types: dict[str, str], **options: Any) -> Any:
    """Compile to machine code; arguments that are neither constants nor of `types` have the type of their name."""
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = types.get(name) or POINTERS.get(name) or NUMBERS.get(name) or ("fp32" if name in SCALARS else "*fp32")
        signature[name] = "constexpr" if name in constants else kind
        if signature[name].startswith("*") or name in ("depth", "hidden_dim", "hidden_stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, {k: v for k, v in constants.items() if k in signature}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert short_lived_barriers(built.asm["ttgir"]) == []
    return built


def short_lived_barriers(ttgir: str) -> list[str]:
    """The barriers that no group of warps is given: the compiler gives their memory to another buffer.

    Numbers that are written where a barrier was initialised are undefined.
    """
    barriers = re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<[\dx]+xi64", ttgir)
    given = ", ".join(re.findall(r"ttg\.warp_specialize\((.*?)\)", ttgir)).split(", ")
    assert bool(barriers) == ("init_barrier" in ttgir)
    return [barrier for barrier in barriers if barrier not in given]


def has_hopper() -> bool:
    return torch.cuda.is_available() and is_hopper(torch.device("cuda"))
