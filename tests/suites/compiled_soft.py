"""Compiles the kernel of `soft_embedding` for GPUs that are not here: run by the tests in a process of its own."""

from __future__ import annotations

from mdkern.kernels.head import triton_soft
from tests.suites.compiled_head import build

TYPES = {"weights": "*bf16", "first_tile": "i32", "tiles": "i32", "rows": "i32", "part": "i32"}


def main() -> None:
    for capability in (80, 90, 100):
        bulk = capability >= 90
        rows, ids, depth = (128, 256, 64) if bulk else (128, 128, 64)
        types = TYPES | (
            {"weight": f"tensordesc<bf16[{ids},{depth}]>", "hidden": f"tensordesc<bf16[{rows},{depth}]>"}
            if bulk
            else {}
        )
        constants = {
            "BM": rows,
            "BN": ids,
            "BK": depth,
            "SHIFT": 0,
            "EVEN_K": True,
            "HIDDEN_TMA": bulk,
            "WEIGHT_TMA": bulk,
            "FROM_LOGITS": False,
            "HAS_SCALE": False,
            "HAS_CAP": True,
            "PRECISION": "ieee",
            "bias": None,
        }
        build(triton_soft.soft_weights_kernel, capability, constants, types, 8)


if __name__ == "__main__":
    main()
