"""Compiles the kernels that round to e4m3 or multiply it for GPUs that are not here."""

from __future__ import annotations

import triton
from triton.compiler import ASTSource

from mdkern.kernels.backbone import triton_fp8_skinny, triton_rms_norm, triton_swiglu
from tests.suites.compiled_backbone import build
from tests.suites.machine_code import machine_code


def norm(capability: int, gathered: bool, parts: int = 1) -> None:
    types = dict.fromkeys(("x", "weight", "stream"), "*bf16") | {"normed": "*fp8e4nv", "scales": "*fp32"}
    types |= {"row_index": "*i64"} if gathered else {"update": "*fp32" if parts > 1 else "*bf16"}
    types |= {"table_rows": "i32", "x_stride": "i64", "update_stride": "i64", "part_stride": "i64", "eps": "fp32"}
    constants = {"WIDTH": 4096, "BLOCK": 4096, "PARTS": parts, "EARLY": False}
    built = build(triton_rms_norm.rms_norm_kernel, ASTSource, capability, types, constants, num_warps=8)
    assert "e4m3x2" in built.asm["ptx"]


def swiglu(capability: int, width: int) -> None:
    types = {"gate": "*bf16", "up": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"}
    types |= {"gate_stride": "i64", "up_stride": "i64"}
    constants = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width)}
    kernel = triton_swiglu.scaled_swiglu_kernel
    built = build(kernel, ASTSource, capability, types, constants, num_warps=triton_swiglu.warps_of(width))
    assert "e4m3x2" in built.asm["ptx"]


def skinny(
    capability: int, kind: str, tiling: triton_fp8_skinny.Tiling, rows: int, columns: int, inner: int, *, biased: bool
) -> None:
    """Products of the shapes of Qwen 2.5 7B."""
    types = {"weight": "*fp8e4nv", "weight_scales": "*fp32", "rows": "i32", "x_stride": "i32", "x": "*fp8e4nv"}
    types |= {"x": "*bf16"} if kind == "wide parts" else {"x_scales": "*fp32"}
    types |= {"bias": "*bf16"} if biased else {}
    if kind == "gated":
        types |= {"out": "*fp8e4nv", "out_scales": "*fp32"}
    else:
        types |= {"out": "*bf16" if kind == "linear" else "*fp32"}
    constants = {"COLUMNS": columns, "INNER": inner, "GATED": kind == "gated", "TILED": kind == "parts"}
    constants |= {"SPLITS": 4 if kind.endswith("parts") else 1, "EARLY": True}
    constants |= {"BLOCK_ROWS": rows, "BLOCK": tiling.columns, "BLOCK_INNER": tiling.inner}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    built = build(triton_fp8_skinny.fp8_skinny_kernel, ASTSource, capability, types, constants, **options)
    before, wait, _ = built.asm["ptx"].partition("griddepcontrol.wait")
    assert wait
    assert "ld.global" in before, "the weight's scales are not read before the wait"
    assert "cp.async" not in before, "rows are read before the wait"
    if capability == 90:  # the one on which it runs
        assert built.metadata.shared <= 227 * 1024
        code = machine_code(built.asm["cubin"])
        assert "QGMMA" in code
        assert "LDGSTS.E.BYPASS.128" in code, "weights are not loaded ahead, 16 bytes a thread"


def main() -> None:
    tilings = triton_fp8_skinny
    for capability in (90, 100):
        norm(capability, gathered=True)
        norm(capability, gathered=False)
        norm(capability, gathered=False, parts=4)
        for width in (12288, 18944):
            swiglu(capability, width)
        for rows, gated in ((32, tilings.FEW_GATED), (64, tilings.GATED)):
            skinny(capability, "linear", tilings.LINEAR, rows, 4608, 3584, biased=rows == 32)
            skinny(capability, "gated", gated, rows, 18944, 3584, biased=rows == 64)
            skinny(capability, "parts", tilings.PARTS, rows, 3584, 18944, biased=rows == 64)
            skinny(capability, "wide parts", tilings.WIDE_PARTS, rows, 3584, 3584, biased=rows == 32)


if __name__ == "__main__":
    main()
