"""Compiles the kernel of `soft_embedding` for GPUs that are not here."""

from __future__ import annotations

from typing import Any

from mdkern.kernels.head import launch_soft, triton_soft
from tests.suites.compiled_head import build

TYPES = {"logits": "*fp32", "weights": "*bf16", "ids": "i32", "logits_stride": "i32", "weights_stride": "i32"}


def main() -> None:
    constants: dict[str, Any] = {
        "BLOCK": launch_soft.BLOCK,
        "SHIFT": 0,
        "HAS_SCALE": False,
        "HAS_CAP": True,
        "bias": None,
    }
    for capability in (80, 90, 100):
        for scales in ({}, {"weight_scale": None}):
            build(triton_soft.soft_weights_kernel, capability, constants | scales, TYPES, 4)


if __name__ == "__main__":
    main()
