"""Compiles every kernel for GPUs that are not here. Prints what it built."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mdkern.kernels.head import triton_projection, triton_reduce
from mdkern.kernels.loop import triton_select

POINTERS = {
    "hidden": "*bf16",
    "weight": "*bf16",
    "bias": "*fp32",
    "row_index": "*i64",
    "row_count": "*i64",
    "temperature": "*fp32",
    "seed": "*i64",
    "keys": "*i64",
    "scores": "*fp32",
    "candidates": "*i1",
    "tokens": "*i64",
    "token": "*i64",
    "input_ids": "*i64",
    "quota": "*i64",
    "revealed": "*i1",
}
NUMBERS = {
    "capacity": "i32",
    "vocab": "i32",
    "hidden_rows": "i32",
    "hidden_dim": "i32",
    "hidden_stride": "i64",
    "weight_stride": "i64",
    "entries": "i32",
    "length": "i32",
    "limit": "i64",
}
SCALARS = ("scale", "soft_cap", "bound", "uniform_temperature")
SHARED = {"HAS_SCALE": False, "HAS_CAP": False, "PROGRAMS": 132, "FIXED": False, "WANT_TOP": True, "WANT_ENTROPY": True}
SHARED |= {"WANT_ARGMAX": True, "OF_SAMPLER": True}


def build(
    kernel: Any, capability: int, constants: dict[str, Any], types: dict[str, str], warps: int, stages: int = 3
) -> None:
    """Compile to machine code, and say what it needs."""
    signature, values = {}, {}
    for name in kernel.arg_names:
        if name in constants:  # and the kernel has it
            signature[name], values[name] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name) or POINTERS.get(name) or NUMBERS.get(name)
            if signature[name] is None:
                signature[name] = "fp32" if name in SCALARS else "*fp32"
    if kernel is triton_select.select_kernel:
        signature["temperature"] = "fp32"
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name in ("hidden_dim", "hidden_stride", "weight_stride")
    }
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(built.asm["cubin"]) > 0
    print(
        kernel.__name__, f"sm_{capability}", {k: v for k, v in constants.items() if k in ("MODE", "BM", "BN", "RULE")}
    )


def projection(
    capability: int, mode: int, tile: tuple[int, int, int], warps: int, bulk: bool, **constants: Any
) -> None:
    rows, columns, depth = tile
    float8 = constants.pop("float8", False)
    types = {"weight": "*u8" if float8 else "*bf16"}
    if bulk:
        types["weight"] = f"tensordesc<{'u8' if float8 else 'bf16'}[{columns},{depth}]>"
        if constants.get("HIDDEN_TMA"):
            types["hidden"] = f"tensordesc<bf16[{rows},{depth}]>"
    fixed = {
        "BM": rows,
        "BN": columns,
        "BK": depth,
        "MODE": mode,
        "EVEN_K": True,
        "HIDDEN_TMA": False,
        "WEIGHT_TMA": bulk,
        "FROM_LOGITS": False,
        "PRECISION": "ieee",
        "PDL": capability >= 90,
        "FIXED": capability == 90,
        "first_id": None,
    }
    if not float8:
        fixed["weight_scale"] = None
    if constants.pop("shard", False):
        types["first_id"] = "i32"
        del fixed["first_id"]
    build(triton_projection.vocab_projection_kernel, capability, SHARED | fixed | constants, types, warps)


def finish(capability: int, mode: int) -> None:
    constants = {
        "BM": 64,
        "BN": 128,
        "PROGRAMS": 132,
        "FIXED": capability == 90,
        "ROWS": 1,
        "SPLITS": 256,
        "MODE": mode,
        "PDL": capability >= 90,
    }
    reduce = triton_reduce.vocab_projection_reduce_kernel
    build(reduce, capability, SHARED | constants | {"records": None}, {}, 1)
    none = dict.fromkeys(("token", "log_prob", "logsumexp", "top1", "top2", "entropy", "argmax"))
    build(reduce, capability, SHARED | constants | none, {}, 1)
    merging = {"SHARDS": 8, "SPLITS": 8, "ROWS": 16, "MODE": mode}
    build(triton_reduce.merge_shards_kernel, capability, SHARED | merging, {}, 1)


def main() -> None:
    for capability in (80, 90, 100):
        bulk = capability >= 90
        projection(capability, 1, (16, 128, 64), 4, bulk)
        if bulk:
            projection(capability, 1, (128, 256, 64), 8, bulk, HIDDEN_TMA=True, bias=None, row_count=None)
        projection(capability, 0, (16, 128, 64), 4, False, FROM_LOGITS=True, weight=None)
        projection(capability, 1, (16, 128, 64), 4, bulk, shard=True)
        projection(capability, 1, (16, 128, 128 if bulk else 64), 4, bulk, float8=True)
        projection(capability, 1, (64, 128, 64), 4, bulk, float8=True, bias=None)
        finish(capability, 1)
        for rule in (0, 3):
            constants = {"RULE": rule, "RANDOM": rule == 0, "BLOCK": 1024, "BITS": 42}
            build(triton_select.select_kernel, capability, constants, {}, 4)


if __name__ == "__main__":
    main()
