"""The Triton kernels in Triton's interpreter, on the CPU: run by the tests in a process with TRITON_INTERPRET=1."""

# mypy: ignore-errors
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from mdkern.kernels import noise, triton_noise
from mdkern.kernels.head import launch, launch_sharded
from mdkern.kernels.head.arguments import Filters
from mdkern.kernels.head.launch import Tiling, vocab_projection
from mdkern.kernels.head.sharded import shard_of
from mdkern.kernels.head.triton_projection import count_items, locate_item, schedule_tiles
from mdkern.kernels.invariant import batch_invariant
from mdkern.kernels.triton_common import from_float8
from tests.problems.projection import SEED, Problem, check_against_reference
from tests.suites.interpreter import mend_interpreter  # noqa: F401  a fixture, for every test here

assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"


@triton.jit
def draw_kernel(out, index, seed, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    key = tl.load(index + at).to(tl.uint32)
    w0, w1, w2, w3 = triton_noise.random_words(
        tl.load(seed), key, key + 1, key + 2, tl.load(index + at), triton_noise.TOKEN
    )
    tl.store(out + at * 2, triton_noise.gumbel(w0, w1))
    tl.store(out + at * 2 + 1, triton_noise.gumbel(w2, w3))


def test_noise_is_the_references() -> None:
    pair = torch.cat((torch.arange(60), torch.tensor([2**27 - 1, 12345, 99999, 2**26])))
    out = torch.empty(64, 2)
    draw_kernel[(1,)](out, pair, torch.tensor(SEED), BLOCK=64)
    for odd in range(2):
        want = noise.gumbel(torch.tensor(SEED), pair, pair + 1, pair + 2, 2 * pair + odd, noise.TOKEN)
        torch.testing.assert_close(out[:, odd], want, rtol=2e-6, atol=2e-6)


@triton.jit
def from_float8_kernel(bits, out):
    at = tl.arange(0, 256)
    tl.store(out + at, from_float8(tl.load(bits + at)))


def test_every_float8_is_read_as_what_it_is() -> None:
    bits, got = torch.arange(256).to(torch.uint8), torch.empty(256)
    from_float8_kernel[(1,)](bits, got)
    want = bits.view(torch.float8_e4m3fn).float()
    number = ~want.isnan()
    assert int(number.sum()) == 254
    assert torch.equal(got[number], want[number])
    assert torch.equal(got.signbit(), want.signbit())


SMALL = Tiling(16, 128, 64, 4, 3)
TILINGS = {
    "bulk": SMALL,
    "pointers": SMALL,
    "gathered": Tiling(32, 256, 64, 8, 3, gather=True),
    "one group": Tiling(16, 64, 32, 4, 3),
}


def unaligned(matrix: torch.Tensor) -> torch.Tensor:
    """The same with rows that bulk copies cannot read."""
    wide = matrix.new_empty(matrix.shape[0], matrix.shape[1] + 1)
    wide[:, :-1] = matrix
    return wide[:, :-1]


@pytest.mark.parametrize("temperature", ["greedy", "mixed"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_tilings_agree_with_the_reference(tiling: str, temperature: str) -> None:
    problem = Problem(temperature=temperature)
    if tiling == "pointers":
        problem.weight = unaligned(problem.weight)
    got = vocab_projection(*problem.arguments(temperature == "greedy"), tiling=TILINGS[tiling], programs=3)
    check_against_reference(problem, got)


@pytest.mark.parametrize(
    "changes",
    [
        {"biased": True, "count": 13},
        {"count": 0},
        {"rows": 1, "count": None},
        {"from_logits": True},
        {"from_logits": True, "biased": True, "columns": 300},
        {"options": {"scale": 0.5, "soft_cap": 5.0}},
        {"depth": 200, "columns": 130},
        {"temperature": "one", "dtype": torch.bfloat16, "biased": True},
        {"spread": 40.0},
        {"of": "sampler"},
        {"of": "sampler", "biased": True, "count": 13, "options": {"soft_cap": 5.0}},
        {"of": "sampler", "from_logits": True, "biased": True, "columns": 300},
        {"float8": True, "biased": True, "count": 13},
        {"float8": True, "dtype": torch.bfloat16, "options": {"scale": 0.5, "soft_cap": 5.0}, "columns": 390},
        {"float8": True, "dtype": torch.float16, "depth": 200, "columns": 130, "of": "sampler"},
        {"float8": True, "depth": 77, "temperature": "greedy"},
    ],
    ids=str,
)
def test_variations_agree_with_the_reference(changes: dict[str, Any]) -> None:
    problem = Problem(**changes)
    uniform = problem.temperature == "one"
    check_against_reference(problem, vocab_projection(*problem.arguments(uniform), tiling=SMALL, programs=3))


@pytest.mark.parametrize("programs", [1, 2, 8, 40])
def test_programs_do_not_matter(programs: int) -> None:
    """Whole waves of row tiles, split remainders, more programs than work."""
    problem = Problem(rows=37, columns=390, depth=32)
    check_against_reference(problem, vocab_projection(*problem.arguments(False), tiling=SMALL, programs=programs))


@triton.jit
def walk_kernel(
    visits,
    slots,
    loads,
    count,
    columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Count who is where, as the projections' kernels walk."""
    program = tl.program_id(0)
    schedule = schedule_tiles(count, columns, BM, BN, PROGRAMS, FIXED)
    whole, _, chunk, _, _, vocab_tiles = schedule
    for item in range(count_items(program, schedule, PROGRAMS, FIXED)):
        row_tile, part, slot = locate_item(item, program, schedule, PROGRAMS, FIXED)
        first, last = 0, vocab_tiles
        if row_tile >= whole:
            first, last = part * chunk, tl.minimum((part + 1) * chunk, vocab_tiles)
        tl.store(slots + slot, tl.load(slots + slot) + 1)
        tl.store(loads + program, tl.load(loads + program) + last - first)
        for tile in range(first, last):
            at = visits + row_tile * vocab_tiles + tile
            tl.store(at, tl.load(at) + 1)


@pytest.mark.parametrize("columns", [60, 3000])
@pytest.mark.parametrize("rows", [1, 40, 100, 130, 208, 500])
@pytest.mark.parametrize("programs", [1, 7, 13])
def test_every_tile_is_visited_once_and_work_is_even(programs: int, rows: int, columns: int) -> None:
    row_tiles, vocab_tiles = triton.cdiv(rows, 16), triton.cdiv(columns, 64)
    visits = torch.zeros(row_tiles, vocab_tiles, dtype=torch.int32)
    slots = torch.zeros(row_tiles + programs, dtype=torch.int32)
    loads = torch.zeros(programs, dtype=torch.int32)
    walk_kernel[(programs,)](visits, slots, loads, rows, columns, BM=16, BN=64, PROGRAMS=programs, FIXED=False)
    assert (visits == 1).all()
    assert slots.max() == 1  # nobody overwrites another's results
    rest = row_tiles % programs
    alone = triton.cdiv(vocab_tiles, programs // rest) if rest else 0  # were the programs that are left idle
    assert loads.max() <= row_tiles // programs * vocab_tiles + alone
    if (rows, columns, programs) == (130, 3000, 13):  # 9 row tiles of 47: 4 programs are left, and take 3 x 11
        assert loads.max() == 36


@pytest.mark.parametrize("columns", [60, 3000])
@pytest.mark.parametrize("rows", [1, 40, 208])
@pytest.mark.parametrize("programs", [1, 7, 60])
def test_fixed_splits_visit_every_tile_once(programs: int, rows: int, columns: int) -> None:
    row_tiles, vocab_tiles = triton.cdiv(rows, 16), triton.cdiv(columns, 64)
    parts = triton.cdiv(vocab_tiles, triton.cdiv(vocab_tiles, programs))
    visits = torch.zeros(row_tiles, vocab_tiles, dtype=torch.int32)
    slots = torch.zeros(row_tiles * parts, dtype=torch.int32)
    loads = torch.zeros(programs, dtype=torch.int32)
    walk_kernel[(programs,)](visits, slots, loads, rows, columns, BM=16, BN=64, PROGRAMS=programs, FIXED=True)
    assert (visits == 1).all()
    assert (slots == 1).all()


@pytest.mark.parametrize("filters", [None, Filters(top_k=5, top_p=0.9)])
@pytest.mark.parametrize("temperature", ["greedy", "mixed"])
def test_rows_alone_have_the_bits_of_rows_in_a_batch(temperature: str, filters: Filters | None) -> None:
    problem = Problem(rows=37, columns=390, depth=64, temperature=temperature)
    hidden, head, rows, wanted = problem.arguments(temperature == "greedy")
    options = {} if filters is not None else {"programs": 3}

    def outputs(part: slice) -> list[torch.Tensor | None]:
        with batch_invariant():
            own = wanted._replace(want_argmax=filters is None)
            given = hidden, head, rows.part(part), own
            return list(vocab_projection(*given, *([] if filters is None else [filters]), **options))

    together = outputs(slice(0, 37))
    for part in (slice(0, 1), slice(20, 21), slice(5, 23)):
        for alone, all_of_them in zip(outputs(part), together):
            if alone is not None and all_of_them is not None:
                assert torch.equal(alone.nan_to_num(7.0), all_of_them[part].nan_to_num(7.0))


def test_strides() -> None:
    """Rows of a wider tensor, one temperature for all rows, columns of a matrix of keys."""
    problem = Problem(rows=9, columns=200, depth=64)
    problem.temperatures = torch.tensor(0.5).expand(9)
    problem.keys = problem.keys.T.contiguous().T
    wide = torch.full((problem.hidden.shape[0], 100), torch.nan)
    wide[:, 5:69] = problem.hidden
    problem.hidden = wide[:, 5:69]
    check_against_reference(problem, vocab_projection(*problem.arguments(False), tiling=SMALL, programs=3))


@pytest.mark.parametrize("count", [None, 130, 20])
def test_rows_gathered_in_parts_are_the_same(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(rows=132, columns=130, depth=32, count=count)
    arguments = problem.arguments(False)
    whole = vocab_projection(*arguments, tiling=TILINGS["gathered"], programs=3)
    monkeypatch.setattr(launch, "GATHERED", 128 * 32 * 4)
    sizes = [part.stop - part.start for part in launch.parts(132, problem.hidden, True)]
    assert sizes == [128, 128]
    for want, got in zip(whole, vocab_projection(*arguments, tiling=TILINGS["gathered"], programs=3)):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_no_rows() -> None:
    assert vocab_projection(*Problem(rows=0).arguments(False), tiling=SMALL)[0].shape == (0,)


@pytest.mark.parametrize("temperature", ["greedy", "mixed"])
def test_rows_that_are_not_there_are_reported(temperature: str) -> None:
    """And their neighbours are what they were."""
    problem = Problem(rows=20, temperature=temperature)
    whole = vocab_projection(*problem.arguments(temperature == "greedy"), tiling=SMALL, programs=3)
    problem.row_index[[1, 18]] = torch.tensor([-1, 10**12])
    outputs = vocab_projection(*problem.arguments(temperature == "greedy"), tiling=SMALL, programs=3)
    kept = torch.ones(20, dtype=torch.bool)
    kept[[1, 18]] = False
    assert (outputs[0][~kept] == -1).all()
    *statistics, argmax = outputs[1:]
    assert all(bool(value[~kept].isnan().all()) for value in statistics)
    assert (argmax[~kept] == -1).all()
    assert all(torch.equal(value[kept], want[kept]) for value, want in zip(outputs, whole))


@pytest.mark.parametrize("temperature", ["greedy", "mixed"])
def test_bad_rows_are_reported_and_ties_go_to_the_lowest_id(temperature: str) -> None:
    problem = Problem(rows=6, columns=300, from_logits=True, temperature=temperature)
    logits = problem.hidden
    first = problem.row_index[:4]
    logits[first[0], 77], logits[first[1], 299], logits[first[2]] = torch.nan, torch.inf, -torch.inf
    logits[first[3], [70, 71, 290]] = 500.0
    problem.hidden = logits
    token, log_prob, top1, top2, *_ = vocab_projection(
        *problem.arguments(temperature == "greedy"), tiling=Tiling(16, 64, 64, 4, 3), programs=3
    )
    assert token[:3].tolist() == [-1, -1, -1]
    assert log_prob[:3].isnan().all()
    assert top1[:3].isnan().all()
    assert token[3] in ((70,) if problem.temperatures[3] == 0 else (70, 71, 290))
    assert abs(top1[3] - 1 / 3) < 1e-6
    assert abs(top2[3] - 1 / 3) < 1e-6
    assert (token[3:] >= 0).all()


@pytest.mark.parametrize("of", ["model", "sampler"])
@pytest.mark.parametrize("temperature", ["greedy", "mixed"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_shards_agree_with_the_reference(tiling: str, temperature: str, of: str) -> None:
    """Records of each shard, the last of them ragged and one without ids, merged by the kernel."""
    float8 = tiling == "bulk"
    problem = Problem(columns=800, biased=True, count=17, temperature=temperature, of=of, float8=float8)
    hidden, head, rows, wanted = problem.arguments(temperature == "greedy")
    records = []
    for rank in range(5):
        first, stop = shard_of(problem.columns, rank, 5)
        part = head.part(slice(first, stop))
        records.append(launch_sharded.project_shard(hidden, part, rows, wanted, first, TILINGS[tiling], 3))
    check_against_reference(problem, launch_sharded.merge_shards(torch.stack(records), rows, wanted))
