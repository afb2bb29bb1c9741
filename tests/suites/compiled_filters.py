"""Compiles the kernels of the filters and of `divergence` for GPUs that are not here."""

from __future__ import annotations

from typing import Any

from mdkern.kernels.head import triton_divergence, triton_filter
from tests.suites.compiled_head import SCALARS, build

HEAD = {"EVEN_K": True, "HIDDEN_TMA": False, "FROM_LOGITS": False, "HAS_SCALE": False, "HAS_CAP": False}
TYPES = {"other_hidden": "*bf16", "other_weight": "*bf16", "top_p": "fp32", "log_min_p": "fp32"}
TYPES |= {f"other_{name}": "fp32" for name in SCALARS}
COUNTS = ("first_row", "chunk", "width", "tiles", "top_k", "count", "hidden_rows", "splits", "other_hidden_dim")
TYPES |= dict.fromkeys(COUNTS, "i32")
TYPES |= {"other_hidden_stride": "i64", "other_weight_stride": "i64"}


def descriptors(
    prefix: str, tile: tuple[int, int, int], bulk: bool, gather: bool, element: str = "bf16"
) -> dict[str, str]:
    rows, columns, depth = tile
    types = {f"{prefix}weight": f"tensordesc<{element}[{columns},{depth}]>" if bulk else f"*{element}"}
    return types | ({f"{prefix}hidden": f"tensordesc<bf16[{rows},{depth}]>"} if gather else {})


def head(depth: int, bulk: bool, gather: bool = False, **changes: Any) -> dict[str, Any]:
    return HEAD | {"BK": depth, "WEIGHT_TMA": bulk, "HIDDEN_TMA": gather, "PRECISION": "ieee"} | changes


def logits(capability: int, tile: tuple[int, int, int], warps: int, gather: bool, **changes: Any) -> None:
    bulk = capability >= 90 and not changes.get("FROM_LOGITS", False)
    float8 = changes.pop("float8", False)
    scales = {} if float8 else {"weight_scale": None}
    wanted = {"WANT_TOP": capability != 80, "WANT_ENTROPY": capability != 80, "OF_SAMPLER": False}
    constants = head(tile[2], bulk, gather) | {"BM": tile[0], "BN": tile[1]} | wanted | scales | changes
    types = TYPES | descriptors("", tile, bulk, gather, "u8" if float8 else "bf16")
    build(triton_filter.filtered_logits_kernel, capability, constants, types, warps)


def draw(capability: int, of_sampler: bool) -> None:
    constants = dict.fromkeys(("TOP_K", "TOP_P", "MIN_P", "WANT_TOP", "WANT_ENTROPY"), True)
    constants |= {"OF_SAMPLER": of_sampler, "WITHIN": of_sampler}
    shape = {"ROWS": 2, "LANES": 512, "RACERS": 1024}
    build(triton_filter.filtered_draw_kernel, capability, constants | shape, TYPES, 16)


def diverge(capability: int, tile: tuple[int, int, int], warps: int, gather: bool) -> None:
    bulk = capability >= 90
    flags = head(tile[2], bulk, gather)
    constants = {"BM": tile[0], "BN": tile[1], "EXCLUDES": True} | flags
    constants |= {f"OTHER_{name}": value for name, value in flags.items()}
    constants |= {"weight_scale": None}  # the first head's weight is in 16 bits, the other one's in float8
    types = TYPES | descriptors("", tile, bulk, gather) | descriptors("other_", tile, bulk, gather, "u8")
    build(triton_divergence.divergence_kernel, capability, constants, types, warps)


def main() -> None:
    for capability in (80, 90, 100):
        logits(capability, (16, 128, 64), 4, False)
        logits(capability, (64, 128, 64), 4, False, float8=True)
        logits(capability, (16, 256, 64), 4, False, FROM_LOGITS=True, weight=None)
        draw(capability, False)
        draw(capability, True)
        diverge(capability, (64, 128, 64), 4, False)
        build(triton_divergence.divergence_reduce_kernel, capability, {"ROWS": 1, "SPLITS": 512}, TYPES, 2)
    for capability in (90, 100):
        logits(capability, (128, 256, 64), 8, True, bias=None, row_count=None, temperature=None)
        diverge(capability, (128, 128, 64), 8, True)


if __name__ == "__main__":
    main()
