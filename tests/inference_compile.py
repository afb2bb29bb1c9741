"""Compiles the inference kernels for GPUs that are not here: run by the tests in a process of its own."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mdkern.kernels import hopper_linear, triton_folded_norm, triton_modulated_norm, triton_rotary

MOST_REGISTERS = 168  # at launch of `hopper_linear._linear`


def build(kernel: Any, source: Any, capability: int, types: dict[str, str], constants: dict[str, Any], **options: Any):
    """Compile to machine code; arguments without a type are absent (None)."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    values = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name == "gate_stride"
    }
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source(kernel, signature, values, aligned), target=target, options=options)
    assert len(built.asm["cubin"]) > 0
    print(kernel.__name__, f"sm_{capability}", constants)
    return built


def norm(capability: int, width: int, gathered: bool) -> None:
    types = dict.fromkeys(("x", "weight", "shift", "scale", "stream", "normed"), "*bf16")
    types |= {"row_index": "*i64"} if gathered else {"update": "*bf16", "gate": "*bf16"}
    types |= dict.fromkeys(("rows", "table_rows", "group"), "i32") | {"eps": "fp32"}
    types |= {f"{name}_stride": "i64" for name in ("x", "update", "shift", "scale", "gate")}
    constants = {"WIDTH": width, "ROWS": 4, "BLOCK": triton.next_power_of_2(width)}
    build(triton_modulated_norm._norm, ASTSource, capability, types, constants, num_warps=4)


def rotary(capability: int, head_dim: int, placed: bool) -> None:
    types = {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "rows": "i32", "length": "i32", "stride": "i64"}
    types |= {"positions": "*i64"} if placed else {}
    half = head_dim // 2
    constants = {"HEADS": 24, "HALF": half, "ROWS": 4, "HEAD_BLOCK": 8, "HALF_BLOCK": triton.next_power_of_2(half)}
    build(triton_rotary._rotate, ASTSource, capability, types, constants, num_warps=4)


def fold(capability: int) -> None:
    types = dict.fromkeys(("weight", "bias", "norm_weight", "shift", "scale", "folded", "added"), "*bf16")
    constants = {"WIDTH": 768, "BLOCK": 1024, "ROUNDS": 3, "NEAR_ZERO": 0.2}
    build(triton_folded_norm._fold, ASTSource, capability, types | {"stride": "i64"}, constants, num_warps=4)
    types = {"table": "*bf16", "row_index": "*i64", "x": "*bf16", "sums": "*fp32"}
    types |= {"rows": "i32", "table_rows": "i32", "stride": "i64"}
    constants = {"SPANS": 3, "SPAN": 256, "ROWS": 4}
    build(triton_folded_norm._gather, ASTSource, capability, types, constants, num_warps=4)


def linear(**changes: Any) -> None:
    """Only Hopper has its tensor-core instructions."""
    element = changes.get("element", "bf16")
    types = dict.fromkeys((*hopper_linear.COUNTS, "gate_stride"), "i32")
    constants = {"BN": 256, "BK": 64, "STAGES": 3, "GROUP": 16, "PROGRAMS": 132, "REGISTERS": 240}
    constants |= {"GELU": changes.get("gelu", False), "PAIRS": changes.get("pairs", 0)}
    constants |= {"SPANS": 3 if "left_sums" in changes else 0, "BUFFERS": changes.get("buffers", 4)}
    constants |= {"STAGES": changes.get("stages", 3)}
    blocks = {"left": [128, 64], "right": [256, 64], "out": [64, 64]}
    if "stream" in changes:
        blocks["stream"] = [64, 64]
    for name, block in blocks.items():
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if element == "bf16" else gl.float16)
        types[name] = f"tensordesc<{element}[{block[0]},{block[1]}],{layout!r}>"
    types |= {name: f"*{element}" for name in ("bias", "gate") if name in changes}
    types |= {"cos": "*fp32", "sin": "*fp32"} if changes.get("pairs") else {}
    types |= {name: "*fp32" for name in ("left_sums", "out_sums") if name in changes}
    built = build(hopper_linear._linear, GluonASTSource, 90, types, constants, num_warps=4, maxnreg=MOST_REGISTERS)
    assert built.metadata.shared <= 227 * 1024


def main() -> None:
    for capability in (80, 90, 100):
        for width in (768, 100, 4096):
            norm(capability, width, gathered=width == 100)
        for head_dim in (64, 80):
            rotary(capability, head_dim, placed=head_dim == 80)
        fold(capability)
    linear(pairs=32)
    linear(pairs=32, left_sums=True, bias=True, stages=4, buffers=2)
    linear(gelu=True, left_sums=True, bias=True, stages=4, buffers=2)
    linear(stream=True, gate=True, out_sums=True)
    linear(pairs=64, element="fp16")
    linear(bias=True, gelu=True)
    linear(stream=True, gate=True)
    linear(stream=True, gate=True, bias=True)


if __name__ == "__main__":
    main()
