"""The Gluon kernel for Hopper: it compiles within the machine's bounds; on a GPU it answers as the reference does."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental.gluon import language as gl

from mdkern.kernels.head import hopper_projection, launch, launch_hopper
from mdkern.kernels.head.launch_hopper import HEAD_START, HIDDEN_DIM, HopperTiling, choose_hopper_tiling
from mdkern.kernels.head.launch_skinny import ELEMENT, SHARED, SkinnyTiling
from tests.problems.projection import Problem, check_against_reference
from tests.suites import gluon
from tests.suites.gluon import SHARED_MEMORY


def build(tiling: HopperTiling, depth: int, **constants: Any) -> Any:
    """Compile the kernel for compute capability 9, as `project_on_hopper` would ask for it."""
    fixed = launch_hopper.tiling_constants(tiling, depth) | {"MODE": 1, "WANT_TOP": True, "WANT_ENTROPY": True}
    fixed |= {"WANT_ARGMAX": False, "OF_SAMPLER": False}
    fixed |= {"PROGRAMS": 132, "FIXED": False, "HAS_SCALE": False, "HAS_CAP": False, "first_id": None} | constants
    element = gl.float8e4nv if tiling.float8 else gl.bfloat16
    if not tiling.float8:
        fixed["weight_scale"] = None
    types = {"weight": gluon.descriptor([tiling.vocab, HIDDEN_DIM], element)}
    if fixed["first_id"]:
        types["first_id"] = fixed.pop("first_id")
    if not tiling.stationary:
        types["hidden"] = gluon.descriptor([tiling.rows, HIDDEN_DIM])
    return gluon.build(
        hopper_projection.vocab_projection_hopper_kernel, fixed, types, num_warps=4, maxnreg=tiling.registers
    )


TILINGS = {
    "few": HopperTiling(1, 128, 7, stationary=True),
    "few, deep": HopperTiling(1, 128, 8),
    "middling": HopperTiling(2, 128, 6),
    "many": HopperTiling(2, 256, 4),
}
FLOAT8_TILINGS = {
    "few, float8": HopperTiling(1, 128, 4, stationary=True, raw_stages=8),
    "few and deep, float8": HopperTiling(1, 128, 6, raw_stages=8),
    "middling, float8": HopperTiling(2, 128, 5, raw_stages=8),
}


GREEDY = {"MODE": 0, "bias": None, "row_count": None, "temperature": None}
BARE = {"WANT_TOP": False, "WANT_ENTROPY": False, "HAS_CAP": True}
TEMPERED = {"WANT_TOP": False, "WANT_ARGMAX": True, "OF_SAMPLER": True, "HAS_CAP": True, "bias": None}


@pytest.mark.parametrize(
    ("tiling", "constants"),
    [
        ("few", {}),
        ("few", GREEDY),
        ("few", BARE),
        ("few, deep", {}),
        ("middling", {}),
        ("many", {}),
        ("many", GREEDY),
        ("many", {"FIXED": True}),
        ("few", TEMPERED),
        ("middling", TEMPERED),
        ("many", TEMPERED),
        ("many", {"first_id": "i32"}),
        *((tiling, {}) for tiling in FLOAT8_TILINGS),
        ("few, float8", GREEDY),
        ("middling, float8", TEMPERED | {"first_id": "i32"}),
    ],
)
def test_it_compiles_for_hopper(tiling: str, constants: dict[str, Any]) -> None:
    built = build((TILINGS | FLOAT8_TILINGS)[tiling], 768, **constants)
    assert built.metadata.shared <= SHARED_MEMORY
    assert "wgmma.mma_async" in built.asm["ptx"]
    assert "cp.async.bulk.tensor" in built.asm["ptx"]


@pytest.mark.parametrize("rows", [1, 16, 64, 128, 500, 1024, 5000])
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("dtype", ELEMENT)
def test_tiles_fit_in_shared_memory(rows: int, dtype: torch.dtype, float8: bool) -> None:
    for depth in range(8, 9000, 8):
        hidden = torch.empty(4, depth, dtype=dtype, device="meta")
        tiling = choose_hopper_tiling(rows, hidden, float8)
        if tiling is None or isinstance(tiling, SkinnyTiling):  # test_hopper_skinny has the latter
            continue
        assert tiling.float8 == float8
        stage = (tiling.vocab + (0 if tiling.stationary else tiling.rows)) * HIDDEN_DIM * 2
        held = -(-depth // HIDDEN_DIM) * 64 * HIDDEN_DIM * 2 if tiling.stationary else 0
        held += tiling.raw_stages * tiling.vocab * HIDDEN_DIM
        assert tiling.raw_stages % 2 == 0  # a stage belongs to one of two converters
        assert tiling.stages >= 4
        assert tiling.stages >= HEAD_START
        assert held + tiling.stages * stage <= SHARED


def test_gathered_rows_are_whole_tiles() -> None:
    hidden, row_index = torch.randn(9, 16), torch.tensor([8, 0, 3, 3, 5])
    gathered = launch_hopper.gather_rows(hidden, row_index, 4)
    assert gathered.shape == (8, 16)
    assert torch.equal(gathered[:5], hidden[row_index])


def test_what_bulk_copies_cannot_describe_is_left_to_triton() -> None:
    assert choose_hopper_tiling(16, torch.empty(4, 768)) is None
    assert choose_hopper_tiling(16, torch.empty(4, 77, dtype=torch.bfloat16)) is None
    assert launch.hopper_launcher(torch.device("cpu")) is None


# On a GPU.

needs_hopper = pytest.mark.skipif(not gluon.has_hopper(), reason="needs compute capability 9")
HALF = torch.bfloat16
ON_GPU = [
    {"rows": 1, "count": 1, "biased": True},
    {"rows": 25, "count": 19, "biased": True},
    {"rows": 64, "temperature": "one"},
    {"rows": 200, "count": 65, "biased": True, "temperature": "greedy"},
    {"rows": 50, "columns": 4_095, "depth": 136, "dtype": torch.float16, "options": {"soft_cap": 5.0, "scale": 0.7}},
    {"rows": 40, "columns": 3_000, "depth": 4096, "biased": True, "count": 0},
    {"rows": 100, "columns": 3_000, "depth": 4096, "biased": True, "count": 90},
    {"rows": 300, "columns": 3_000, "depth": 4096},
    {"rows": 511, "columns": 5_001, "biased": True, "count": 300},
    {"rows": 3000, "columns": 5_001, "biased": True, "count": 2900},
    {"rows": 65, "biased": True, "of": "sampler"},
    {"rows": 300, "columns": 5_001, "of": "sampler", "options": {"soft_cap": 5.0}},
    {"rows": 3000, "columns": 5_001, "of": "sampler"},
    {"rows": 25, "count": 19, "biased": True, "float8": True},
    {"rows": 50, "columns": 4_095, "depth": 144, "dtype": torch.float16, "options": {"scale": 0.7}, "float8": True},
    {"rows": 200, "count": 65, "biased": True, "temperature": "greedy", "float8": True},
    {"rows": 60, "columns": 3_000, "depth": 4096, "float8": True},
    {"rows": 300, "columns": 3_000, "depth": 4096, "biased": True, "float8": True},
    {"rows": 3000, "columns": 5_001, "biased": True, "count": 2900, "of": "sampler", "float8": True},
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("changes", ON_GPU, ids=lambda changes: "-".join(map(str, changes.values())))
def test_gpu_agrees_with_float64(changes: dict[str, Any]) -> None:
    problem = Problem(**{"columns": 50_258, "depth": 768, "device": "cuda", "dtype": HALF} | changes)
    got = launch.vocab_projection(*problem.arguments(False))
    check_against_reference(problem, got, differing=problem.rows // 1000 + 1)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", [1, 65, 300])
@pytest.mark.parametrize("tiling", TILINGS | FLOAT8_TILINGS)
def test_gpu_tilings_agree_with_each_other(tiling: str, rows: int) -> None:
    """Any tiles at any number of rows, more or fewer than the tiles' own, in any number of programs."""
    chosen = (TILINGS | FLOAT8_TILINGS)[tiling]
    given = {"columns": 3_001, "depth": 768, "device": "cuda", "dtype": HALF, "biased": True, "float8": chosen.float8}
    problem = Problem(rows=rows, count=rows, **given)
    for programs in (1, 132):
        arguments = problem.arguments(False)
        got = launch.vocab_projection(*arguments, tiling=chosen, programs=programs)
        check_against_reference(problem, got, differing=1)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("temperature", ["mixed", "greedy"])
def test_gpu_bad_rows_are_reported(rows: int, temperature: str) -> None:
    problem = Problem(rows=rows, columns=1000, depth=768, dtype=HALF, device="cuda", temperature=temperature)
    bad = [0, rows // 2, rows - 1]
    whole = problem.run()
    place = problem.row_index[bad]
    problem.hidden[place[0], 5], problem.hidden[place[1]], problem.hidden[place[2], 0] = torch.nan, torch.nan, torch.inf
    result = problem.run()
    kept = torch.ones(rows, dtype=torch.bool, device="cuda")
    kept[bad] = False
    assert (result.token[bad] == -1).all()
    assert result.logsumexp[bad].isnan().all()
    assert torch.equal(result.token[kept], whole.token[kept])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", [40, 600])
def test_gpu_what_is_not_asked_for_changes_nothing(rows: int) -> None:
    problem = Problem(rows=rows, columns=50_258, depth=768, dtype=HALF, device="cuda", biased=True)
    full, bare = problem.run(), problem.run(want_top=False, want_entropy=False)
    assert torch.equal(full.token, bare.token)
    assert torch.equal(full.log_prob, bare.log_prob)
    assert torch.equal(full.logsumexp, bare.logsumexp)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("rows", [64, 200, 600])
def test_gpu_graph_reads_the_count_and_repeats_itself(rows: int, float8: bool) -> None:
    """A race between copying, converting and multiplying would show as a replay that differs."""
    given = {"columns": 50_258, "depth": 768, "device": "cuda", "dtype": HALF, "biased": True, "float8": float8}
    problem = Problem(rows=rows, count=rows, **given)
    whole = problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run()
    for count in (rows, 1, 0, rows // 2, *[rows] * 50):
        problem.row_count.fill_(count)
        graph.replay()
        assert torch.equal(captured.token[:count], whole.token[:count])
        assert (captured.token[count:] == -1).all()
        if count == rows:
            assert torch.equal(captured.entropy, whole.entropy)
