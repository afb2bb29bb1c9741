"""Compiles the inference kernels for GPUs that are not here."""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mdkern.kernels.backbone import (
    hopper_attention,
    hopper_attention_fp8,
    hopper_joint,
    hopper_linear,
    hopper_resident,
    hopper_residual,
    joint_tiles,
    launch_attention,
    launch_attention_fp8,
    launch_joint,
    launch_linear,
    triton_attention,
    triton_combine,
    triton_experts,
    triton_folded_norm,
    triton_invariant_attention,
    triton_invariant_linear,
    triton_linear,
    triton_modulated_norm,
    triton_place_heads,
    triton_rms_norm,
    triton_rotary,
    triton_route_experts,
    triton_sandwich,
    triton_skinny,
    triton_swiglu,
    triton_window_attention,
)
from tests.suites.gluon import short_lived_barriers
from tests.suites.machine_code import machine_code


def build(
    kernel: Any, source: Any, capability: int, types: dict[str, str], constants: dict[str, Any], **options: Any
) -> Any:
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
    build(triton_modulated_norm.modulated_norm_kernel, ASTSource, capability, types, constants, num_warps=4)


def rotary(capability: int, head_dim: int, placed: bool) -> None:
    types = {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "stride": "i64"}
    types |= dict.fromkeys(("rows", "length", "table_rows"), "i32")
    types |= {"positions": "*i64"} if placed else {}
    half = head_dim // 2
    constants = {"HEADS": 24, "HALF": half, "ROWS": 4, "HEAD_BLOCK": 8, "HALF_BLOCK": triton.next_power_of_2(half)}
    build(triton_rotary.rotary_kernel, ASTSource, capability, types, constants, num_warps=4)


def heads(capability: int) -> None:
    types = dict.fromkeys(("embedding", "table", "x", "qkv"), "*bf16") | {"row_index": "*i64"}
    types |= {"cos": "*fp32", "sin": "*fp32"} | dict.fromkeys(("rows", "table_rows", "length"), "i32")
    types |= {"embedding_stride": "i64", "table_stride": "i64"}
    constants = {"WIDTH": 768, "COLUMNS": 2304, "HEADS": 24, "HALF": 32, "ROWS": 4}
    constants |= {"HEAD_BLOCK": 8, "HALF_BLOCK": 32, "COLUMN_BLOCK": 256}
    build(triton_rotary.gathered_qkv_kernel, ASTSource, capability, types, constants, num_warps=4)


def fold(capability: int) -> None:
    types = dict.fromkeys(("weight", "bias", "norm_weight", "shift", "scale", "folded", "added"), "*bf16")
    constants = {"WIDTH": 768, "BLOCK": 1024, "ROUNDS": 3, "NEAR_ZERO": 0.2}
    build(triton_folded_norm.fold_norm_kernel, ASTSource, capability, types | {"stride": "i64"}, constants, num_warps=4)


def rms_norm(capability: int, width: int, gathered: bool, parts: int = 1, early: bool = False) -> None:
    types = dict.fromkeys(("x", "weight", "stream", "normed"), "*bf16")
    types |= {"row_index": "*i64"} if gathered else {"update": "*fp32" if parts > 1 and not early else "*bf16"}
    types |= {"table_rows": "i32", "x_stride": "i64", "update_stride": "i64", "part_stride": "i64", "eps": "fp32"}
    constants = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "PARTS": parts, "EARLY": early}
    built = build(triton_rms_norm.rms_norm_kernel, ASTSource, capability, types, constants, num_warps=8)
    before, waits, after = built.asm["ptx"].partition("griddepcontrol.wait")
    assert bool(waits) == early
    if early:
        assert "ld.global" in before, "the weight is not read before the wait"
        assert after.count("ld.global") >= 1 + parts


def skinny(capability: int, tiling: triton_skinny.Tiling, rows: int, splits: int, weights: int, biased: bool) -> None:
    """Three weights of the shapes of Qwen 2.5 7B, two for the MLP, one that is divided."""
    names = ("first", "second", "third")[:weights]
    types = dict.fromkeys(("x", *names), "*bf16") | {"rows": "i32", "x_stride": "i32"}
    types |= {f"{name}_bias": "*bf16" for name in names} if biased else {}
    types |= {"out": "*fp32" if splits > 1 else "*bf16"}
    columns = {3: (3584, 512, 512), 2: (18944, 18944, 0), 1: (3584, 0, 0)}[weights]
    constants = dict(zip(("FIRST", "SECOND", "THIRD"), columns)) | {"INNER": 3584, "GATED": weights == 2}
    constants |= {"SPLITS": splits, "BLOCK_ROWS": rows, "BLOCK": tiling.columns, "BLOCK_INNER": tiling.inner}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    built = build(triton_skinny.skinny_kernel, ASTSource, capability, types, constants, **options)
    if capability == 90:  # the one on which it runs
        assert built.metadata.shared <= 227 * 1024
        code = machine_code(built.asm["cubin"])
        assert "HGMMA" in code
        assert "LDGSTS.E.BYPASS.128" in code, "weights are not loaded ahead, 16 bytes a thread"


def swiglu(capability: int) -> None:
    types = dict.fromkeys(("gate", "up", "out"), "*bf16") | {"columns": "i32", "gate_stride": "i64", "up_stride": "i64"}
    for silu in (True, False):
        constants = {"SILU": silu, "BLOCK": triton_swiglu.COLUMNS}
        build(triton_swiglu.swiglu_kernel, ASTSource, capability, types, constants, num_warps=4)


def place_heads(capability: int, head_dim: int, normed: bool, kept: bool) -> None:
    types = dict.fromkeys(("query", "key"), "*bf16") | {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("query_norm", "key_norm"), "*bf16") if normed else {}
    types |= {"value": "*bf16", "kept": "*bf16", "columns": "*i64", "positions": "*i64"} if kept else {}
    types |= dict.fromkeys(("length", "table_rows", "room"), "i32")
    types |= {name: "i64" for name in triton_place_heads.place_heads_kernel.arg_names if name.endswith("_stride")}
    half = head_dim // 2
    constants = {
        "QUERIES": 32,
        "KEYS": 8,
        "HALF": half,
        "TURNED": half // 2 if kept else half,
        "HEADS": 8,
        "HALF_BLOCK": triton.next_power_of_2(half),
    }
    build(triton_place_heads.place_heads_kernel, ASTSource, capability, types, constants, num_warps=4)


def window_attention(capability: int, setting: triton_window_attention.Setting, **constants: Any) -> None:
    """Of LLaDA 8B, undivided and in parts; of heads with norms that are rotated in part, and with a mask."""
    kernel, room = triton_window_attention.window_attention_kernel, (163 if capability == 80 else 227) * 1024
    constants = {
        "HEADS": 8, "GROUPS": 4, "HALF": 64, "TURNED": 64, "MASK_ROWS": False, "ROUNDED": False,
        "SPLITS": setting.splits, "APART": setting.apart, "WINDOW": 32, "ROWS": setting.rows,
        "COLUMNS": setting.columns, "HALF_BLOCK": 64, "DIM_BLOCK": 128, "PRECISION": "ieee", "EARLY": capability >= 90,
    } | constants  # fmt: skip
    types = dict.fromkeys(("query", "key", "value", "kept"), "*bf16") | dict.fromkeys(("columns", "positions"), "*i64")
    types |= dict.fromkeys(("cos", "sin"), "*fp32") | {"arrived": "*i32", "eps": "fp32", "scale": "fp32"}
    types |= {"parts": "*fp32", "states": "*fp32"} if setting.splits > 1 else {}
    types |= {"mask": "*u8"} if constants["MASK_ROWS"] else {}
    types |= {"out": "*fp8e4nv", "out_scales": "*fp32"} if constants["ROUNDED"] else {"out": "*bf16"}
    types |= dict.fromkeys(("query_norm", "key_norm"), "*bf16") if constants["TURNED"] < 64 else {}
    types |= dict.fromkeys(("width", "keys", "table_rows", "span", "mask_sequence", "mask_row"), "i32")
    types |= {name: "i64" for name in kernel.arg_names if name.endswith("_stride")}
    options = {"num_warps": setting.warps, "num_stages": setting.stages}
    built = build(kernel, ASTSource, capability, types, constants, **options)
    assert built.metadata.shared <= room
    if capability >= 90:
        assert "griddepcontrol.wait" in built.asm["ptx"]
    if capability == 90:  # the one on which it runs
        early, _, late = built.asm["ptx"].partition("griddepcontrol.wait")
        assert ("wgmma.mma_async" if setting.rows >= 64 else "mma.sync") in late
        assert early.count("ld.global") > 16, "keys and values are not loaded before the wait"


def combine(capability: int) -> None:
    types = {
        "rows": "*bf16",
        "place": "*i64",
        "weights": "*fp32",
        "out": "*bf16",
        "columns": "i32",
        "out_stride": "i64",
    }
    build(triton_combine.combine_kernel, ASTSource, capability, types, {"K": 8, "BLOCK": 1024}, num_warps=4)


def options_of(tile: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and compiler options of a tile, with which it must fit into shared memory."""
    return ({name: value for name, value in tile.items() if part == name.isupper()} for part in (True, False))  # type: ignore[return-value]


def invariant(capability: int) -> None:
    """Products and attention of the batch-invariant mode."""
    room = (163 if capability == 80 else 227) * 1024
    for dtype, element in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        types = dict.fromkeys(("x", "weight", "bias", "out"), f"*{element}")
        types |= dict.fromkeys(("rows", "columns", "depth"), "i32")
        types |= dict.fromkeys(("x_stride", "weight_stride"), "i64")
        constants, options = options_of(triton_invariant_linear.tile_of(dtype))
        kernel = triton_invariant_linear.invariant_linear_kernel
        built = build(kernel, ASTSource, capability, types, constants | {"GROUP": 8, "EVEN_K": True}, **options)
        assert built.metadata.shared <= room
        for head_dim in (64, 128, 256):
            kernel = triton_invariant_attention.invariant_attention_kernel
            types = dict.fromkeys(("query", "key", "value", "out"), f"*{element}") | {"mask": "*u8", "scale": "fp32"}
            types |= dict.fromkeys(("queries", "keys", "row_tiles", "heads", "shared"), "i32")
            parts = ("_batch", "_head", "_row", "_column")
            types |= {name: "i64" for name in kernel.arg_names if name.endswith(parts)}
            tile = triton_invariant_attention.tile_of(dtype, head_dim, torch.device("cpu"))
            constants, options = options_of(tile | ({"num_stages": 2} if capability == 80 else {}))
            constants |= {"DIM": head_dim, "DIM_BLOCK": head_dim, "MASK_ROWS": head_dim == 128}
            built = build(kernel, ASTSource, capability, types, constants, **options)
            assert built.metadata.shared <= room


def experts(capability: int, gated: bool, rows: int, listed: bool) -> None:
    """Of DiffusionGemma; also with weights that are tensors of their own."""
    types = {"x": "*bf16", "weight": "*bf16", "order": "*i32", "ends": "*i32", "out": "*bf16", "pairs": "i32"}
    types |= {"places": "*i64"} if listed else {}
    tiling = triton_experts.GATED if gated else triton_experts.DOWN
    constants = {"EXPERTS": 128, "CHOICES": 8, "EXPERT_BLOCK": 128, "GATED": gated, "BLOCK_ROWS": rows, "SILU": listed}
    constants |= {"COLUMNS": 704, "INNER": 2816} if gated else {"COLUMNS": 2816, "INNER": 704}
    constants |= {"BLOCK": tiling.columns, "BLOCK_INNER": tiling.inner}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    built = build(triton_experts.expert_product_kernel, ASTSource, capability, types, constants, **options)
    if capability == 90:
        assert built.metadata.shared <= 113 * 1024, "two programs do not fit on a multiprocessor"
        code = machine_code(built.asm["cubin"])
        assert "HGMMA" in code
        assert "LDGSTS.E.BYPASS.128" in code, "weights are not loaded ahead, 16 bytes a thread"


def sandwich(capability: int) -> None:
    names = ("stream", "first", "second", "new", "first_weight", "second_weight", "outer_weight", "factor")
    after = (part for place in ("first", "second", "third") for part in (f"{place}_normed", f"after_{place}"))
    types = dict.fromkeys((*names, *after), "*bf16") | {"eps": "fp32"}
    constants = {"WIDTH": 2816, "BLOCK": 4096}
    build(triton_sandwich.sandwich_norm_kernel, ASTSource, capability, types, constants, num_warps=8)
    types = {"scores": "*bf16", "scales": "*bf16", "weights": "*fp32", "index": "*i64", "factor": "fp32"}
    types |= {"scores_stride": "i64"}
    constants = {"EXPERTS": 128, "COUNT": 8, "BLOCK": 128, "COUNT_BLOCK": 8}
    build(triton_sandwich.choose_experts_kernel, ASTSource, capability, types, constants, num_warps=1)


def routing(capability: int) -> None:
    """Of LLaDA 2."""
    types = {"products": "*fp32", "bias": "*fp32", "weights": "*fp32", "index": "*i64", "rows": "i32", "factor": "fp32"}
    constants = {"PARTS": 4, "EXPERTS": 256, "COUNT": 8, "ALWAYS": 1, "SOFTMAX": False, "NORMALISED": True}
    constants |= {"BIAS_COUNTS": False, "GROUPS": 8, "KEPT_GROUPS": 4, "GROUP_BLOCK": 8, "EACH_BLOCK": 32}
    constants |= {"COUNT_BLOCK": 16, "SMALL": 1e-20}
    build(triton_route_experts.route_experts_kernel, ASTSource, capability, types, constants, num_warps=1)


def sorted_pairs(capability: int) -> None:
    types = {"index": "*i64", "order": "*i32", "place": "*i64", "ends": "*i32", "pairs": "i32"}
    constants = {"BLOCK": triton_experts.SORT_BLOCK}
    build(triton_experts.sort_pairs_kernel, ASTSource, capability, types, constants, num_warps=8)


ELEMENTS = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp8e4nv": gl.float8e4nv}


def descriptor(element: str, block: list[int]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[element])
    return f"tensordesc<{element}[{','.join(map(str, block))}],{layout!r}>"


def product(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], setting: dict[str, int] = launch_linear.SETTING
) -> Any:
    """Only Hopper has its tensor-core instructions, and the compiler must let many of them be under way at a time."""
    options = {name: value for name, value in setting.items() if not name.isupper()}
    constants = {name: value for name, value in setting.items() if name.isupper()} | constants
    built = build(kernel, GluonASTSource, 90, types, {"PROGRAMS": 132, "GROUP": 8} | constants, **options)
    assert short_lived_barriers(built.asm["ttgir"]) == []
    assert built.metadata.shared <= 227 * 1024
    code = machine_code(built.asm["cubin"])
    assert code.count("WARPGROUP.DEPBAR") < code.count("GMMA."), "each waits for the one before it"
    return built


def linear(
    element: str = "bf16", bias: bool = True, gelu: bool = False, pairs: int = 0, spans: int = 0, sums: int = 1
) -> None:
    types = dict.fromkeys(hopper_linear.COUNTS, "i32")
    types |= {"left": descriptor(element, [64, 64]), "right": descriptor(element, [256, 64])}
    types |= {"out": descriptor(element, [64, 64])}
    types |= {"bias": f"*{element}"} if bias else {}
    types |= {"cos": "*fp32", "sin": "*fp32"} if pairs else {}
    types |= {"sums": "*fp32"} if spans else {}
    product(hopper_linear.linear_kernel, types, {"BK": 64, "GELU": gelu, "PAIRS": pairs, "SPANS": spans, "SUMS": sums})


def linear_fp8(gelu: bool, pairs: int) -> None:
    types = dict.fromkeys(hopper_linear.COUNTS, "i32") | dict.fromkeys(("bias", "scale"), "*fp32")
    types |= {"left": descriptor("fp8e4nv", [64, 128]), "right": descriptor("fp8e4nv", [256, 128])}
    types |= {"out": descriptor("fp8e4nv" if gelu else "bf16", [64, 64])} | ({"level": "*fp32"} if gelu else {})
    types |= {"cos": "*fp32", "sin": "*fp32"} if pairs else {}
    product(hopper_linear.linear_kernel, types, {"BK": 128, "GELU": gelu, "PAIRS": pairs, "SPANS": 0, "SUMS": 1})


def heads_fp8() -> None:
    """With values transposed. A thread stores them byte by byte, so none may be moved before."""
    types = dict.fromkeys(hopper_linear.COUNTS, "i32") | dict.fromkeys(("bias", "scale", "cos", "sin"), "*fp32")
    types |= {"left": descriptor("fp8e4nv", [64, 128]), "right": descriptor("fp8e4nv", [256, 128])}
    types |= dict.fromkeys(("out", "values"), descriptor("fp8e4nv", [64, 64]))
    constants = {"BK": 128, "GELU": False, "PAIRS": 32, "SPANS": 0, "SUMS": 1}
    built = product(hopper_linear.linear_kernel, types, constants)
    assert "SHFL" not in built.asm["sass"]


def attention_fp8() -> None:
    """Weights go from the scores' registers into a product without moving, and nothing is kept in memory."""
    types = dict.fromkeys(hopper_attention_fp8.COUNTS, "i32") | {"scale": "*fp32"}
    types |= {"key": descriptor("fp8e4nv", [1, launch_attention_fp8.KEYS, 64])}
    types |= {"values": descriptor("fp8e4nv", [1, 64, launch_attention_fp8.KEYS])}
    types |= dict.fromkeys(("query", "out"), descriptor("fp8e4nv", [1, 64, 64]))
    built = product(hopper_attention_fp8.attention_fp8_kernel, types, {"HEADS": 12}, launch_attention_fp8.SETTING)
    sass = built.asm["sass"]
    assert "LDL" not in sass
    assert "MUFU.EX2" in sass
    weights = sass.count("FFMA.SAT")
    assert sass.count("MUFU.EX2") < weights / 16, "of maxima alone"
    assert sass.count("PRMT") <= weights  # three for each four, and others for the results


def many_sequences(element: str, masked: bool) -> None:
    """Nothing is kept in memory."""
    types = dict.fromkeys(hopper_attention.COUNTS, "i32")
    types |= dict.fromkeys(("query", "out"), descriptor(element, [1, 64, 64]))
    types |= dict.fromkeys(("key", "values"), descriptor(element, [1, launch_attention.KEYS, 64]))
    constants = {"HEADS": 12, "MASKED": masked}
    built = product(hopper_attention.attention_kernel, types, constants, launch_attention.SETTING)
    assert not re.search(r"\b(STL|LDL)\b", machine_code(built.asm["cubin"]))


def resident_fp8(width: int) -> None:
    types = dict.fromkeys(hopper_resident.COUNTS, "i32") | dict.fromkeys(("bias", "scale", "level"), "*fp32")
    types |= {"left": descriptor("fp8e4nv", [64, 128]), "right": descriptor("fp8e4nv", [128, 128])}
    types |= {"out": descriptor("fp8e4nv", [64, 64])}
    constants = {"BK": 128, "STEPS": width // 128}
    product(hopper_resident.resident_kernel, types, constants, launch_linear.RESIDENT_SETTING)


def residual_fp8() -> None:
    types = dict.fromkeys((*hopper_residual.COUNTS, "gate_stride"), "i32") | dict.fromkeys(("bias", "gate"), "*fp32")
    types |= {"left": descriptor("fp8e4nv", [128, 128]), "right": descriptor("fp8e4nv", [256, 128])}
    types |= {"stream": descriptor("bf16", [64, 64])}
    product(hopper_residual.linear_residual_kernel, types, {"BK": 128, "SCALED": True})


def residual(element: str = "bf16", bias: bool = True, sums: bool = False) -> None:
    types = dict.fromkeys((*hopper_residual.COUNTS, "gate_stride"), "i32") | {"gate": f"*{element}"}
    types |= {"left": descriptor(element, [128, 64]), "right": descriptor(element, [256, 64])}
    types |= {"stream": descriptor(element, [64, 64])}
    types |= {"bias": f"*{element}"} if bias else {}
    types |= {"sums": "*fp32"} if sums else {}
    built = product(hopper_residual.linear_residual_kernel, types, {"BK": 64, "SCALED": False})
    # Sequences times the gate's stride may be past 2^31.
    assert re.search(r"%sequence_gate\S* = arith\.muli .* : i64", built.asm["source"])


def joint(tiling: joint_tiles.Tiling, weights: int, biased: bool, element: str = "bf16", parts: int = 1) -> None:
    """Up to three weights, or gate and up. The product must be turned by instructions that store 16 bytes at a time."""
    gated = weights == 0
    names = ("first", "second", "third")[: weights or 2]
    types = dict.fromkeys(hopper_joint.COUNTS, "i32") | {"x": descriptor(element, [tiling.rows, 64])}
    types |= {"out": descriptor(element, launch_joint.stored_block(tiling, gated))}
    if gated:
        types |= {"first": descriptor(element, launch_joint.pair_block())}
    else:
        types |= {name: descriptor(element, [64, 64]) for name in names}
    types |= {f"{name}_bias": f"*{element}" for name in names} if biased else {}
    constants = {"EARLY": True, "PARTS": parts}
    built = product(
        hopper_joint.joint_kernel, types, constants, launch_joint.setting(tiling, gated) | {"launch_pdl": True}
    )
    assert "griddepcontrol.wait" in built.asm["ptx"]
    starts = re.findall(r"(%\d+) = arith\.select ", built.asm["ttgir"])
    loops = re.findall(r"scf\.for \S+ = (%\d+) to ", built.asm["ttgir"])
    assert set(starts) & set(loops), "the steps that were begun early would be left out of all tiles"
    code = machine_code(built.asm["cubin"])
    assert re.search(r"STSM\.16\.M?T", code)
    assert "STL" not in code, "registers do not suffice"


def middle_product(capability: int, tiling: triton_linear.Tiling, added: bool, pairs: int = 0, spans: int = 0) -> None:
    """To queries, keys and values or hidden units of width 768, or back to the stream."""
    types = {"x": f"tensordesc<bf16[{tiling.rows}, 64]>", "weight": f"tensordesc<bf16[{tiling.columns}, 64]>"}
    types |= {"bias": "*bf16", "eps": "fp32"} | dict.fromkeys(("rows", "length", "rotated", "gate_rows"), "i32")
    types |= {"gate": "*bf16", "gate_stride": "i32", "stream": "*bf16"} if added else {"out": "*bf16"}
    types |= {"new_sums": "*fp32"} if added and spans else {}
    types |= {"sums": "*fp32"} if spans and not added else {}
    types |= {"cos": "*fp32", "sin": "*fp32"} if pairs else {}
    constants = {"COLUMNS": 768 if added else 2304, "INNER": 3072 if added else 768, "SPANS": 0 if added else spans}
    constants |= {"GELU": not added and not pairs, "HALF": pairs, "GATES": added and not spans}
    constants |= {"ROWS": tiling.rows, "BLOCK": tiling.columns, "DEPTH": triton_linear.DEPTH}
    constants |= {"GROUP": triton_linear.GROUP, "PDL": True, "FAST": True}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "launch_pdl": True}
    built = build(triton_linear.product_kernel, ASTSource, capability, types, constants, **options)
    if capability == 90:
        assert built.metadata.shared <= 227 * 1024
        code = machine_code(built.asm["cubin"])
        assert "HGMMA" in code
        assert "UTMALDG" in code


def attention(capability: int, splits: int, even: bool, masked: bool = False) -> None:
    """Of heads with 64 columns; two programs must fit on a multiprocessor."""
    types = {"query": f"tensordesc<bf16[{triton_attention.QUERIES}, 64]>", "out": "*bf16", "scale": "fp32"}
    keys = triton_attention.MASKED_KEYS if masked else triton_attention.KEYS
    types |= dict.fromkeys(("key", "value"), f"tensordesc<bf16[{keys}, 64]>")
    types |= dict.fromkeys(("queries", "length", "span"), "i32")
    types |= {"mask": "*u8"} if masked else {}
    types |= {"parts": "*fp32", "states": "*fp32", "arrived": "*i32"} if splits > 1 else {}
    constants = {"HEADS": 12, "DIM": 64, "EVEN": even, "SPLITS": splits, "EARLY": True}
    constants |= {"ROWS": triton_attention.QUERIES, "COLUMNS": keys}
    options = {
        "num_warps": triton_attention.WARPS,
        "num_stages": triton_attention.MASKED_STAGES if masked else triton_attention.STAGES,
        "launch_pdl": True,
    }
    built = build(triton_attention.attention_kernel, ASTSource, capability, types, constants, **options)
    if capability == 90:
        assert built.metadata.shared <= 227 * 1024 // 2
        code = machine_code(built.asm["cubin"])
        assert "HGMMA" in code
        assert "UTMALDG" in code
        assert "STL" not in code, "registers do not suffice"


def main() -> None:
    for capability in (80, 90, 100):
        for width in (768, 100, 4096):
            norm(capability, width, gathered=width == 100)
        for head_dim in (64, 80):
            rotary(capability, head_dim, placed=head_dim == 80)
        fold(capability)
        combine(capability)
        invariant(capability)
        sandwich(capability)
        sorted_pairs(capability)
        for gated in (False, True):
            experts(capability, gated, rows=32, listed=False)
            experts(capability, gated, rows=16, listed=True)
        routing(capability)
        heads(capability)
        for width in (4096, 3584):
            rms_norm(capability, width, gathered=width == 4096)
        rms_norm(capability, 4096, gathered=False, parts=4)
        if capability >= 90:
            rms_norm(capability, 4096, gathered=False, parts=4, early=True)
        for rows, linear_tiling in ((32, triton_skinny.FEW_LINEAR), (64, triton_skinny.LINEAR)):
            skinny(capability, linear_tiling, rows, splits=1, weights=3, biased=rows == 32)
            skinny(capability, triton_skinny.GATED, rows, splits=1, weights=2, biased=False)
            skinny(capability, triton_skinny.PARTS, rows, splits=4, weights=1, biased=rows == 64)
        swiglu(capability)
        undivided, divided = (
            triton_window_attention.Setting(64, 64, 1, False, 4, 2),
            triton_window_attention.Setting(64, 64, 5, True, 4, 2),
        )
        window_attention(capability, triton_window_attention.SEVERAL, HEADS=32, GROUPS=1)
        window_attention(capability, undivided, ROUNDED=capability > 80)
        window_attention(capability, divided, MASK_ROWS=True, TURNED=32)
        for normed, kept in ((False, False), (False, True), (True, True)):
            place_heads(capability, 80 if normed else 128, normed, kept)
    for capability in (90, 100):
        for splits in (1, 2):
            attention(capability, splits, even=splits == 1)
        for even in (False, True):
            attention(capability, 1, even, masked=True)
        middle_product(capability, triton_linear.HEADS, added=False, pairs=32, spans=6)
        middle_product(capability, triton_linear.NARROW_HEADS, added=False, pairs=32)
        middle_product(capability, triton_linear.GELU, added=False, spans=6)
        middle_product(capability, triton_linear.ADDED, added=True, spans=6)
        middle_product(capability, triton_linear.NARROW_ADDED, added=True)
    linear(pairs=32, bias=False)
    linear(pairs=32, spans=3)
    linear(pairs=64, bias=False, element="fp16")
    linear(gelu=True)
    linear(gelu=True, spans=3)
    linear(gelu=True, spans=3, sums=2)
    residual(bias=False)
    residual(bias=False, sums=True)
    residual()
    residual(element="fp16", sums=True)
    linear_fp8(gelu=True, pairs=0)
    for pairs in (0, 32, 64):
        linear_fp8(gelu=False, pairs=pairs)
    heads_fp8()
    attention_fp8()
    for element in ("bf16", "fp16"):
        many_sequences(element, masked=element == "fp16")
    for width in (256, 768):
        resident_fp8(width)
    residual_fp8()
    for tiling in joint_tiles.TILINGS:
        joint(tiling, weights=3, biased=False)
        joint(tiling, weights=0, biased=True)
    joint(joint_tiles.TILINGS[0], weights=1, biased=True, element="fp16")
    joint(joint_tiles.IN_PARTS, weights=1, biased=True, parts=4)


if __name__ == "__main__":
    main()
