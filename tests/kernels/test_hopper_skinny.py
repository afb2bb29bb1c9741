"""The Gluon kernels for few rows: they compile within a multiprocessor; on a GPU they answer as the reference does."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental.gluon import language as gl

from mdkern.kernels.head import hopper_skinny, hopper_skinny_reduce, launch, launch_skinny
from mdkern.kernels.head.launch import vocab_projection
from mdkern.kernels.head.launch_skinny import (
    ELEMENT,
    GROUP_SIZE,
    SHARED,
    SkinnyTiling,
    choose_skinny_tiling,
    held_bytes,
)
from tests.problems.projection import Problem, check_against_reference
from tests.suites import gluon

GREEDY = {"MODE": 0, "bias": None, "row_count": None, "temperature": None}
CAPPED = {"HAS_SCALE": True, "HAS_CAP": True, "temperature": None}
TEMPERED = {"WANT_ARGMAX": True, "OF_SAMPLER": True}
SHARD = {"WANT_ARGMAX": True, "first_id": "i32"}
FLOAT8 = {"weight_scale": gl.float8e4nv}


def build(rows: int, **constants: Any) -> Any:
    """Compile the kernel as `project_skinny` would ask for it."""
    tiling = SkinnyTiling(rows, 4, 256)
    if constants.get("weight_scale"):
        tiling = SkinnyTiling(rows, 4, 128, consumers=2)
    fixed = launch_skinny.tiling_constants(tiling, 768) | {
        "MODE": 1,
        "PROGRAMS": 132,
        "HAS_SCALE": False,
        "HAS_CAP": False,
        "WANT_ARGMAX": False,
        "OF_SAMPLER": False,
        "first_id": None,
        "weight_scale": None,
    }
    fixed |= constants
    element = gl.bfloat16
    if fixed["weight_scale"]:
        element = fixed.pop("weight_scale")
    types = {"weight": gluon.descriptor([GROUP_SIZE, tiling.hidden_dim], element)}
    if fixed["first_id"]:
        types["first_id"] = fixed.pop("first_id")
    return gluon.build(
        hopper_skinny.vocab_projection_skinny_kernel,
        fixed,
        types,
        num_warps=4,
        maxnreg=tiling.registers,
    )


@pytest.mark.parametrize(
    "constants",
    [{}, GREEDY, CAPPED, TEMPERED, SHARD, FLOAT8, FLOAT8 | GREEDY, FLOAT8 | TEMPERED | SHARD],
    ids=["drawn", "greedy", "capped", "tempered", "a shard", "float8", "float8, greedy", "float8, tempered shard"],
)
@pytest.mark.parametrize("rows", [8, 16])
def test_it_compiles_for_hopper(rows: int, constants: dict[str, Any]) -> None:
    built = build(rows, **constants)
    assert built.metadata.shared <= gluon.SHARED_MEMORY
    assert f"wgmma.mma_async.sync.aligned.m64n{rows}k16" in built.asm["ptx"]  # not a slot more than rows


@pytest.mark.parametrize("constants", [{"MODE": 0}, {"MODE": 1}, {"MODE": 1, "shard_records": "written"}], ids=str)
@pytest.mark.parametrize("consumers", [1, 2])
def test_the_choosing_kernel_compiles(constants: dict[str, Any], consumers: int) -> None:
    fixed = {"shard_records": None, "PROGRAMS": 132 * consumers, "SPLITS": 256 * consumers}
    fixed |= {"WANT_TOP": True, "WANT_ENTROPY": True} | constants
    fixed = {"WANT_ARGMAX": True, "OF_SAMPLER": constants["MODE"] == 1} | fixed
    if fixed["shard_records"]:  # a shard has no other outputs
        del fixed["shard_records"]
        fixed |= dict.fromkeys(("token_out", "log_prob", "logsumexp", "top1", "top2", "entropy", "argmax"))
    built = gluon.build(hopper_skinny_reduce.vocab_projection_skinny_reduce_kernel, fixed, {}, num_warps=consumers)
    assert "ld.global.v4" in built.asm["ptx"]  # a record is two loads, not eight


@pytest.mark.parametrize("rows", [1, 8, 9, 16])
@pytest.mark.parametrize("weight_bytes", [1, 2])
@pytest.mark.parametrize("dtype", ELEMENT)
def test_rows_and_ring_fit_in_shared_memory(rows: int, dtype: torch.dtype, weight_bytes: int) -> None:
    chosen = 0
    for depth in range(16, 12_000, 16):
        tiling = choose_skinny_tiling(rows, torch.empty(4, depth, dtype=dtype, device="meta"), weight_bytes)
        if tiling is None:
            continue
        chosen += 1
        assert tiling.rows >= rows
        assert tiling.stages >= 4 > tiling.head_start > 0
        assert (
            held_bytes(tiling.rows, tiling.hidden_dim, depth)
            + tiling.stages * tiling.consumers * GROUP_SIZE * tiling.hidden_dim * weight_bytes
            <= SHARED
        )
    assert chosen >= 4096 // 16


def test_what_it_does_not_take() -> None:
    assert choose_skinny_tiling(17, torch.empty(4, 4096, dtype=torch.bfloat16)) is None
    assert choose_skinny_tiling(4, torch.empty(4, 768)) is None
    assert choose_skinny_tiling(4, torch.empty(4, 776, dtype=torch.bfloat16)) is None
    assert choose_skinny_tiling(4, torch.empty(4, 32_768, dtype=torch.bfloat16, device="meta")) is None


# On a GPU.

needs_hopper = pytest.mark.skipif(not gluon.has_hopper(), reason="needs compute capability 9")
BASE = {"columns": 3_001, "depth": 768, "device": "cuda", "dtype": torch.bfloat16}
ON_GPU = [
    {"rows": 1, "biased": True, "columns": 50_258},
    {"rows": 13, "count": 11, "biased": True, "columns": 50_258},
    {"rows": 5, "count": 0},
    {"rows": 16, "temperature": "greedy", "biased": True},
    {"rows": 7, "temperature": "one", "depth": 144, "dtype": torch.float16, "options": {"soft_cap": 5.0, "scale": 0.7}},
    {"rows": 16, "columns": 70, "biased": True},
    {"rows": 3, "columns": 64},
    {"rows": 13, "count": 11, "biased": True, "columns": 50_258, "of": "sampler"},
    {"rows": 16, "depth": 4096, "columns": 1_000},
    {"rows": 1, "biased": True, "columns": 50_258, "float8": True},
    {"rows": 13, "count": 11, "biased": True, "columns": 50_258, "float8": True},
    {"rows": 16, "temperature": "greedy", "float8": True},
    {"rows": 7, "depth": 144, "dtype": torch.float16, "options": {"soft_cap": 5.0, "scale": 0.7}, "float8": True},
    {"rows": 16, "depth": 4096, "columns": 1_000, "of": "sampler", "float8": True},
    {"rows": 3, "columns": 64, "float8": True},  # nothing is left for a program's second consumer
    {"rows": 16, "columns": 70, "biased": True, "float8": True},
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("changes", ON_GPU, ids=lambda changes: "-".join(map(str, changes.values())))
def test_gpu_agrees_with_float64(changes: dict[str, Any], programs: int) -> None:
    problem = Problem(**BASE | changes)
    tiling = choose_skinny_tiling(problem.rows, problem.hidden, problem.weight.element_size())
    got = vocab_projection(*problem.arguments(False), tiling=tiling, programs=programs)
    check_against_reference(problem, got, differing=int(problem.rows > 8))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("temperature", ["mixed", "greedy"])
def test_gpu_tokens_do_not_depend_on_the_tiles(temperature: str) -> None:
    problem = Problem(rows=8, **BASE | {"columns": 50_258}, temperature=temperature)
    arguments = problem.arguments(False)
    want = vocab_projection(*arguments, tiling=launch.Tiling(16, 128, 128, 4, 3))[0]
    for tiling in (SkinnyTiling(8, 4, 256), SkinnyTiling(8, 8, 128), SkinnyTiling(16, 5, 128)):
        assert torch.equal(vocab_projection(*arguments, tiling=tiling)[0], want)


@pytest.mark.gpu
@needs_hopper
def test_gpu_tokens_from_float8_do_not_depend_on_the_tiles() -> None:
    problem = Problem(rows=8, **BASE | {"columns": 50_258}, float8=True)
    arguments = problem.arguments(False)
    want = vocab_projection(*arguments, tiling=launch.Tiling(16, 128, 128, 4, 3))[0]
    for shape in ((8, 8, 128, 2), (8, 3, 128, 2), (16, 5, 128, 2), (8, 8, 128, 1), (16, 4, 256, 1)):
        assert torch.equal(vocab_projection(*arguments, tiling=SkinnyTiling(*shape))[0], want), shape


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("float8", [False, True])
def test_gpu_bad_rows_touch_no_other(float8: bool) -> None:
    problem = Problem(rows=16, **BASE, biased=True, float8=float8)
    whole = problem.run()
    bad = [3, 9, 15]
    place = problem.row_index[bad]
    problem.hidden[place[0], 5], problem.hidden[place[1]], problem.hidden[place[2], 0] = torch.nan, torch.nan, torch.inf
    result = problem.run()
    kept = torch.ones(16, dtype=torch.bool, device="cuda")
    kept[bad] = False
    assert (result.token[bad] == -1).all()
    assert result.logsumexp[bad].isnan().all()
    assert torch.equal(result.token[kept], whole.token[kept])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("rows", [1, 16])
def test_gpu_graph_reads_the_count_and_repeats_itself(rows: int, float8: bool) -> None:
    """A race between the warps would show as a replay that differs."""
    problem = Problem(rows=rows, **BASE | {"columns": 50_258}, biased=True, count=rows, float8=float8)
    whole = problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run()
    for count in (rows, 0, rows // 2, *[rows] * 100):
        problem.row_count.fill_(count)
        graph.replay()
        assert torch.equal(captured.token[:count], whole.token[:count])
        assert (captured.token[count:] == -1).all()
        if count == rows:
            assert torch.equal(captured.entropy, whole.entropy)
