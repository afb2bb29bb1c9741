"""Compiles the kernels for e4m3 for GPUs that are not here."""

from __future__ import annotations

import triton
from triton.compiler import ASTSource

from mdkern.kernels.backbone import triton_quantise
from tests.suites.compiled_backbone import build


def rows(capability: int, width: int) -> None:
    types = {"x": "*bf16", "quantised": "*fp8e4nv", "scale": "*fp32", "stride": "i64"}
    constants = {"WIDTH": width, "BLOCK": min(triton_quantise.PART, triton.next_power_of_2(width))}
    built = build(triton_quantise.quantise_rows_kernel, ASTSource, capability, types, constants, num_warps=4)
    assert "e4m3x2" in built.asm["ptx"]


def layer(capability: int, whole: bool) -> None:
    types = {"weight": "*bf16", "quantised": "*fp8e4nv", "stride": "i64"}
    types |= dict.fromkeys(("factor", "scale", "added"), "*fp32")
    types |= dict.fromkeys(("bias", "shift", "gate"), "*bf16") if whole else {}
    constants = {"WIDTH": 768, "BLOCK": 1024}
    build(triton_quantise.quantise_layer_kernel, ASTSource, capability, types, constants, num_warps=4)


def columns(capability: int) -> None:
    types = {"x": "*bf16", "level": "*fp32", "quantised": "*fp8e4nv", "rows": "i32", "stride": "i64"}
    constants = {"WIDTH": 768, "ROWS": 4, "BLOCK": 1024}
    built = build(triton_quantise.quantise_columns_kernel, ASTSource, capability, types, constants, num_warps=4)
    assert "e4m3x2" in built.asm["ptx"]


def norm(capability: int) -> None:
    types = {"x": "*bf16", "normed": "*fp8e4nv", "rows": "i32", "stride": "i64", "eps": "fp32"}
    constants = {"WIDTH": 768, "LEVEL": 16.0, "ROWS": 4, "BLOCK": 1024}
    built = build(triton_quantise.quantised_norm_kernel, ASTSource, capability, types, constants, num_warps=4)
    assert "e4m3x2" in built.asm["ptx"]


def main() -> None:
    for capability in (89, 90, 100):
        for width in (768, 14336):
            rows(capability, width)
        columns(capability)
        for whole in (False, True):
            layer(capability, whole)
        norm(capability)


if __name__ == "__main__":
    main()
