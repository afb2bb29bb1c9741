"""`vocab_projection`: exact draws, accurate statistics, tokens that depend on the row, its key and the seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from mdkern.kernels import vocab_projection
from mdkern.kernels.head.vocab_projection import _vocab_projection
from tests.own_process import run_in_the_interpreter
from tests.problems.projection import (
    FLOAT8_CHECKS,
    SEED,
    Problem,
    check_against_reference,
    exact_statistics,
    flat,
)

V = 50_258


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_head.py", "not shards")  # those: test_sharded.py


@pytest.mark.slow
def test_kernels_compile_for_every_gpu() -> None:
    from tests.suites import compiled_head

    compiled_head.main()


# Distribution: the draws of many keys from one row of logits.


def draw(logits: Tensor, draws: int, temperature: float = 1.0) -> Tensor:
    number = torch.arange(draws)
    keys = torch.stack((number, number * 0 + 5, number * 0 + 9), 1)
    row = torch.zeros(draws, dtype=torch.int64)
    return vocab_projection(logits[None], None, None, row, temperature, torch.tensor(SEED), keys).token


def chi_square(token: Tensor, probability: Tensor, expected_per_bin: float = 40.0) -> float:
    """p-value of the tokens' counts; ids are put together in order of probability until a bin is expected to fill."""
    order = probability.argsort(descending=True)
    expected = probability[order] * len(token)
    bin_of_rank = (expected.cumsum(0) / expected_per_bin).floor().long()
    bin_of_rank = torch.unique(bin_of_rank, return_inverse=True)[1]
    bin_of_id = torch.empty_like(order).scatter_(0, order, bin_of_rank)
    bins = int(bin_of_rank.max()) + 1
    want = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, bin_of_rank, expected)
    got = torch.bincount(bin_of_id[token], minlength=bins).double()
    if bins > 1 and want[-1] < 5:
        want[-2], got[-2] = want[-2:].sum(), got[-2:].sum()
        want, got = want[:-1], got[:-1]
    assert ((want > 0) | (got == 0)).all(), "an id of probability 0 was drawn"
    return float(stats.chisquare(got.numpy(), (want * got.sum() / want.sum()).numpy()).pvalue) if len(want) > 1 else 1.0


def head(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(300, generator=generator)
    if kind == "one token holds 0.999":
        logits = torch.zeros(300)
        logits[123] = torch.log(torch.tensor(299 * 999.0))
    elif kind == "flat":
        logits = torch.zeros(300)
    elif kind == "logits at 80 and -80":
        logits = torch.where(torch.arange(300) % 3 == 0, 80.0, -80.0) + logits
    elif kind == "-inf entries":
        logits[::2] = -torch.inf
    elif kind == "duplicated maxima":
        logits[[5, 64, 128, 299]] = 4.0
    elif kind == "one group":
        logits = logits[:50]
    return logits


KINDS = [
    "normal",
    "one token holds 0.999",
    "flat",
    "logits at 80 and -80",
    "-inf entries",
    "duplicated maxima",
    "one group",
]


@pytest.mark.parametrize(
    ("kind", "temperature"), [*((kind, 1.0) for kind in KINDS), ("normal", 0.7), ("one group", 3.0)]
)
def test_draws_have_the_exact_distribution(kind: str, temperature: float) -> None:
    logits = head(kind)
    token = draw(logits, 12_000, temperature)
    assert chi_square(token, (logits.double() / temperature).softmax(-1)) > 1e-4


def in_float8(columns: int, temperature: float) -> tuple[dict[str, Any], Tensor]:
    """Arguments of 12,000 draws from one row of a head in float8, and the float64 probabilities of its weight as it is
    after rounding, which chi-square tells from those before."""
    problem = Problem(rows=12_000, columns=columns, depth=24, float8=True, spread=1.5)
    number = torch.arange(problem.rows)
    problem.row_index, problem.keys = number * 0, torch.stack((number, number * 0 + 5, number * 0 + 9), 1)
    probability = (problem.logits()[0] / temperature).softmax(-1)
    return {"temperature": temperature, "want_argmax": False, "problem": problem}, probability


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_from_a_weight_in_float8_have_the_exact_distribution(temperature: float) -> None:
    options, probability = in_float8(130, temperature)
    problem = options.pop("problem")
    assert chi_square(problem.run(**options).token, probability) > 1e-4
    filters = {"top_k": 20, "top_p": 0.9}
    token = problem.run(**options, **filters).token
    assert chi_square(token, filtered(probability.log(), 20, 0.9, 0.0)) > 1e-4


def test_chi_square_would_find_the_weight_before_rounding() -> None:
    options, _ = in_float8(130, 0.1)
    problem = options.pop("problem")
    before = Problem(rows=12_000, columns=130, depth=24, spread=1.5)
    before.row_index = problem.row_index[:1]
    assert chi_square(problem.run(**options).token, (before.logits()[0] / 0.1).softmax(-1)) < 1e-6


def filtered(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Probabilities after the filters, id by id as their definitions say (no two logits are equal)."""
    order = logits.double().argsort(descending=True).tolist()
    kept = order[:top_k] if top_k else order
    p = logits.double()[kept].softmax(-1)
    kept = [token for i, token in enumerate(kept) if float(p[:i].sum()) < top_p]
    kept = [token for token in kept if float(logits[token] - logits[kept[0]]) >= torch.tensor(min_p).log().item()]
    probability = torch.zeros(len(logits), dtype=torch.float64)
    probability[kept] = logits.double()[kept].softmax(-1)
    return probability


@pytest.mark.parametrize("filters", [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (40, 0.7, 0.05), (1, 1.0, 0.0)])
def test_filters_leave_the_exact_distribution_of_the_rest(filters: tuple[int, float, float]) -> None:
    logits, temperature = head("normal") * 2, 0.8
    top_k, top_p, min_p = filters
    number = torch.arange(10_000)
    keys = torch.stack((number, number * 0 + 5, number * 0 + 9), 1)
    row = torch.zeros(len(number), dtype=torch.int64)
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "want_top": True}
    result = vocab_projection(logits[None], None, None, row, temperature, torch.tensor(SEED), keys, **options)
    assert chi_square(result.token, filtered(logits / temperature, *filters)) > 1e-4
    torch.testing.assert_close(result.top1, logits.softmax(-1).max().expand(len(number)))


def test_chi_square_would_find_a_wrong_temperature() -> None:
    logits = head("normal")
    assert chi_square(draw(logits, 20_000, 1.1), logits.double().softmax(-1)) < 1e-6


@pytest.mark.slow
def test_draws_have_the_exact_distribution_at_full_vocabulary() -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2
    assert chi_square(draw(logits, 1500), logits.double().softmax(-1)) > 1e-4


# Statistics.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"biased": True},
        {"options": {"scale": 0.5, "soft_cap": 5.0}},
        {"from_logits": True},
        {"spread": 40.0},
        {"of": "sampler", "biased": True},
        {"float8": True, "biased": True, "options": {"scale": 0.5, "soft_cap": 5.0}},
        {"float8": True, "of": "sampler", "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_statistics_are_those_of_float64(changes: dict[str, Any]) -> None:
    problem = Problem(**changes)
    check_against_reference(problem, reordered(problem.run()))


def reordered(result: Any) -> tuple[Tensor, ...]:
    return result.token, result.log_prob, result.top1, result.top2, result.entropy, result.logsumexp, result.argmax


def test_errors_are_within_twice_those_of_pytorch_in_bfloat16() -> None:
    problem = Problem(rows=64, columns=1000, depth=768, dtype=torch.bfloat16)
    ours = problem.run()
    exact = exact_statistics(problem.logits(), ours.token)
    assert problem.weight is not None
    theirs = torch.nn.functional.linear(problem.hidden[problem.row_index], problem.weight).float()
    plain = exact_statistics(theirs, ours.token)
    for name, truth, other in zip(("log_prob", "top1", "top2", "entropy", "logsumexp"), exact, plain):
        assert (getattr(ours, name) - truth).abs().max() <= 2 * (other - truth).abs().max(), name


def test_only_what_is_asked_for_is_returned() -> None:
    problem = Problem()
    full, bare = problem.run(), problem.run(want_top=False, want_entropy=False, want_argmax=False)
    assert bare.top1 is bare.top2 is bare.entropy is bare.argmax is None
    assert torch.equal(full.token, bare.token)
    assert torch.equal(full.log_prob, bare.log_prob)


# Tokens.


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    logits = torch.zeros(4, 200)
    logits[0, [7, 63, 64, 199]], logits[1, [199, 130]], logits[2, 0] = 3.0, 3.0, 3.0
    result = vocab_projection(
        logits, None, None, torch.arange(4), 0.0, torch.tensor(1), torch.zeros(4, 3, dtype=torch.int64)
    )
    assert result.token.tolist() == [7, 130, 0, 0]


def test_suppressed_ids_are_never_drawn() -> None:
    problem = Problem(rows=500, columns=70, temperature="one")
    problem.bias = torch.full((70,), -torch.inf)
    problem.bias[[3, 64]] = torch.tensor([-20.0, 20.0])
    assert set(problem.run().token.tolist()) <= {3, 64}


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_bad_rows_are_reported(fill: float) -> None:
    problem = Problem(rows=5, from_logits=True)
    problem.hidden[problem.row_index[2], 400] = fill
    result = problem.run()
    assert result.token[2] == -1
    *statistics, argmax = reordered(result)[1:]
    assert all(bool(value[2].isnan()) for value in statistics)
    assert argmax[2] == -1
    assert (result.token[[0, 1, 3, 4]] >= 0).all()


def test_a_row_with_nothing_possible_is_reported() -> None:
    problem = Problem(rows=5)
    problem.bias = torch.full((problem.columns,), -torch.inf)
    result = problem.run()
    assert (result.token == -1).all()
    assert result.logsumexp.isnan().all()


def test_tokens_do_not_depend_on_the_other_rows() -> None:
    problem = Problem(rows=40)
    together = problem.run()
    order = torch.randperm(40)
    for part in (order[:1], order[:13], order):
        problem_part = Problem(rows=40)
        problem_part.row_index, problem_part.keys = problem.row_index[part], problem.keys[part]
        problem_part.temperatures = problem.temperatures[part]
        alone = problem_part.run()
        assert torch.equal(alone.token, together.token[part])
        torch.testing.assert_close(alone.entropy, together.entropy[part])


def test_count_and_index_types() -> None:
    problem = Problem(rows=20, count=11)
    result = problem.run()
    assert (result.token[11:] == -1).all()
    assert (result.token[:11] >= 0).all()
    problem.row_index = problem.row_index.int()
    assert torch.equal(problem.run().token, result.token)


def test_row_strides_and_number_of_rows() -> None:
    problem = Problem(rows=30, temperature="one")
    result = problem.run(temperature=1.0)
    wide = torch.full((problem.hidden.shape[0], 200), torch.nan)
    wide[:, 10 : 10 + problem.depth] = problem.hidden
    problem.hidden = wide[:, 10 : 10 + problem.depth]
    assert torch.equal(problem.run().token, result.token)
    assert Problem(rows=0).run().token.shape == (0,)
    assert Problem(rows=1).run().token.shape == (1,)


def test_shapes_that_do_not_fit_are_refused() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="temperature"):
        problem.run(temperature=torch.ones(3))
    with pytest.raises(ValueError, match="top_p"):
        problem.run(top_p=0.0)
    with pytest.raises(ValueError, match="does not fit hidden"):
        vocab_projection(problem.hidden, torch.ones(9, 5), None, problem.row_index, 1.0, problem.seed, problem.keys)


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a weight in float8 needs weight_scale"):
        Problem(float8=True).run(weight_scale=None)
    with pytest.raises(ValueError, match="weight_scale is for a weight in float8_e4m3fn"):
        Problem().run(weight_scale=torch.ones(777))
    with pytest.raises(ValueError, match="there is no weight"):
        Problem(from_logits=True).run(weight_scale=torch.ones(777))
    with pytest.raises(ValueError, match="weight_scale must be float32"):
        Problem(float8=True).run(weight_scale=torch.ones(776))
    with pytest.raises(ValueError, match="weight_scale must be float32"):
        Problem(float8=True).run(weight_scale=torch.ones(777, dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_scale_that_is_no_number_spoils_the_rows(value: float) -> None:
    """So does a weight with such an entry, whose scale is that."""
    problem = Problem(rows=5, float8=True)
    assert problem.weight_scale is not None
    problem.weight_scale[3] = value
    result = problem.run()
    finite = problem.logits()[:, 3] < 0  # infinitely improbable, if it is infinite
    assert (result.token[~finite | (value != value)] == -1).all()


BAD: dict[str, tuple[str, Any]] = {
    "seed": ("seed must be int64", lambda seed: seed.int()),
    "row_index": ("row_index must be int32 or int64", lambda index: index.double()),
    "keys": ("keys must be int64", lambda keys: keys.int()),
    "temperatures": ("temperature must be float32", lambda temperature: temperature.double()),
    "row_count": ("row_count must be int32 or int64", lambda _: torch.tensor([3])),
    "hidden": ("hidden must be floating .* with values", lambda hidden: hidden.to("meta")),
    "weight": ("does not fit hidden", lambda weight: weight.to("meta")),
    "bias": ("bias must be float32", lambda _: torch.zeros(3)),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    message, spoil = BAD[name]
    problem = Problem()
    setattr(problem, name, spoil(getattr(problem, name)))
    with pytest.raises(ValueError, match=message):
        problem.run()
    if name in ("seed", "keys", "row_index"):  # on another device
        problem = Problem()
        setattr(problem, name, getattr(problem, name).to("meta"))
        with pytest.raises(ValueError, match=f"{name} must be .* on cpu, not .* on meta"):
            problem.run()


@pytest.mark.parametrize("value", [-0.5, torch.nan, torch.inf, 1e39])
def test_temperatures_that_mean_nothing_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="temperature must be"):
        Problem().run(temperature=value)
    if not value > 0:
        problem = Problem()
        problem.temperatures[3] = value
        with pytest.raises(ValueError, match="temperature must be at least 0"):
            problem.run()


@pytest.mark.parametrize("row", [-1, 29, 10**12])
def test_rows_that_are_not_there_are_refused(row: int) -> None:
    """20 rows of 29; what is past `row_count` is not looked at."""
    problem = Problem(count=11)
    problem.row_index[10] = row
    with pytest.raises(ValueError, match=rf"row_index must lie in 0..28, rows of hidden, not {row}"):
        problem.run()
    problem = Problem(count=11)
    want = problem.run().token
    problem.row_index[11] = row
    assert torch.equal(problem.run().token, want)


@pytest.mark.gpu
def test_gpu_rows_that_are_not_there_are_reported() -> None:
    """Few enough that the kernels read the rows themselves: PyTorch gathers more, and asserts."""
    for rows in (3, 16, 40):
        problem = Problem(rows=rows, columns=3_001, depth=768, dtype=torch.bfloat16, device="cuda", biased=True)
        want = problem.run().token
        problem.row_index[1] = -1
        token = problem.run().token
        assert token[1] == -1
        assert torch.equal(token[2:], want[2:])


@pytest.mark.parametrize("uniform", [False, True])
def test_the_operator_is_well_registered(uniform: bool) -> None:
    torch.library.opcheck(_vocab_projection, flat(Problem(rows=5, columns=90, biased=True).arguments(uniform)))
    eight = Problem(rows=5, columns=90, biased=True, float8=True)
    torch.library.opcheck(_vocab_projection, flat(eight.arguments(uniform)), test_utils=FLOAT8_CHECKS)


# On a GPU.

HALF, FULL = torch.bfloat16, torch.float32
ON_GPU = [
    {"rows": 1, "columns": 50_257, "depth": 768, "dtype": HALF},
    {"rows": 16, "columns": V, "depth": 768, "dtype": HALF, "biased": True},
    {"rows": 100, "columns": 4_095, "depth": 1000, "dtype": torch.float16, "count": 77},
    {"rows": 300, "columns": 126_464, "depth": 512, "dtype": HALF, "biased": True},
    {"rows": 1000, "columns": 5000, "depth": 8192, "dtype": HALF, "options": {"soft_cap": 5.0, "scale": 0.7}},
    {"rows": 70_000, "columns": 300, "depth": 64, "dtype": HALF, "temperature": "one"},
    {"rows": 40, "columns": 151_936, "depth": 136, "dtype": HALF, "temperature": "greedy"},
    {"rows": 70, "columns": 777, "depth": 77, "dtype": HALF},
    {"rows": 60, "columns": 3000, "depth": 100, "dtype": FULL},
    {"rows": 50, "columns": 3000, "dtype": FULL, "from_logits": True, "biased": True},
    {"rows": 300, "columns": 5_000, "depth": 512, "dtype": HALF, "biased": True, "of": "sampler"},
    {"rows": 1, "columns": V, "depth": 768, "dtype": HALF, "float8": True},
    {"rows": 16, "columns": V, "depth": 768, "dtype": HALF, "float8": True, "biased": True},
    {"rows": 100, "columns": 4_095, "depth": 1008, "dtype": torch.float16, "count": 77, "float8": True},
    {"rows": 300, "columns": 126_464, "depth": 512, "dtype": HALF, "biased": True, "float8": True},
    {"rows": 1000, "columns": 5000, "depth": 4096, "dtype": HALF, "options": {"soft_cap": 5.0}, "float8": True},
    {"rows": 70, "columns": 777, "depth": 77, "dtype": HALF, "float8": True},
    {"rows": 60, "columns": 3000, "depth": 100, "dtype": FULL, "float8": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", ON_GPU, ids=lambda changes: "-".join(map(str, changes.values())))
def test_gpu_agrees_with_float64(changes: dict[str, Any]) -> None:
    problem = Problem(device="cuda", **changes)
    check_against_reference(problem, reordered(problem.run()), differing=problem.rows // 1000 + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", ["mixed", "greedy"])
@pytest.mark.parametrize("rows", [3, 16, 40, 200, 1500])
@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_gpu_long_runs_of_suppressed_ids(dtype: torch.dtype, rows: int, temperature: str) -> None:
    """A program's first tile, or all of its tiles, may hold nothing that is possible."""
    for columns, possible in ((20_000, slice(12_000, 12_500)), (129, slice(0, 128))):
        problem = Problem(rows, columns, 128, dtype, "cuda", biased=True, temperature=temperature)
        assert problem.bias is not None
        kept = problem.bias[possible].clone()
        problem.bias.fill_(-torch.inf)
        problem.bias[possible] = kept
        check_against_reference(problem, reordered(problem.run()), differing=rows // 1000 + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [12, 16_384])
def test_gpu_sums_over_hundreds_of_tiles_stay_exact(rows: int) -> None:
    problem = Problem(rows, V, 64, HALF, "cuda", biased=True, temperature="one")
    result = problem.run()
    some = torch.arange(0, rows, max(1, rows // 50), device="cuda")
    logits = problem.hidden[problem.row_index[some]].double() @ problem.weight.double().T + problem.bias
    torch.testing.assert_close(result.logsumexp[some].double(), logits.logsumexp(-1), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_gpu_addresses_past_two_billion_elements() -> None:
    """Rows of logits that together are more than 2^31 elements; the last ones are looked at."""
    rows = (1 << 31) // V + 10
    logits = torch.zeros(rows, V, dtype=HALF, device="cuda")
    logits[-1, 12_345], logits[-2, 49_999] = 9.0, 9.0
    index = torch.tensor([rows - 1, rows - 2], device="cuda")
    keys = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    result = vocab_projection(logits, None, None, index, 0.0, torch.tensor(1, device="cuda"), keys)
    assert result.token.tolist() == [12_345, 49_999]


@pytest.mark.gpu
def test_gpu_draws_have_the_exact_distribution() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    weight = torch.randn(V, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(1, 64, generator=generator, device="cuda", dtype=torch.bfloat16) / 4
    draws = 100_000
    number = torch.arange(draws, device="cuda")
    keys = torch.stack((number, number * 0, number * 0 + 2), 1)
    row = torch.zeros(draws, dtype=torch.int64, device="cuda")
    token = vocab_projection(hidden, weight, None, row, 1.0, torch.tensor(7, device="cuda"), keys).token.cpu()
    logits = (hidden.double() @ weight.double().T)[0].cpu()
    assert chi_square(token, logits.softmax(-1)) > 1e-4


@pytest.mark.gpu
def test_gpu_bad_rows_are_reported() -> None:
    problem = Problem(rows=300, columns=1000, depth=128, dtype=torch.bfloat16, device="cuda")
    bad = problem.row_index[[0, 150, 299]]
    problem.hidden[bad[0], 5], problem.hidden[bad[1]], problem.hidden[bad[2], 0] = torch.nan, torch.nan, torch.inf
    token = problem.run().token.cpu()
    assert (token[[0, 150, 299]] == -1).all()
    assert int((token == -1).sum()) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 4096])
def test_gpu_memory_has_no_logits(rows: int) -> None:
    problem = Problem(rows=rows, columns=V, depth=256, dtype=torch.bfloat16, device="cuda")
    problem.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.run()
    assert torch.cuda.max_memory_allocated() - before < 32 << 20


@pytest.mark.gpu
def test_gpu_memory_has_no_copy_of_many_rows() -> None:
    """Rows that are gathered first are so in parts: 16,384 rows of 8 KiB are 128 MiB."""
    problem = Problem(rows=16_384, columns=1000, depth=4096, dtype=torch.bfloat16, device="cuda", count=16_000)
    whole = problem.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.run()
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    assert (whole.token[16_000:] == -1).all()
    some = torch.arange(0, 16_000, 997, device="cuda")
    few = vocab_projection(
        problem.hidden,
        problem.weight,
        None,
        problem.row_index[some],
        problem.temperatures[some],
        problem.seed,
        problem.keys[some],
    )
    assert int((whole.token[some] != few.token).sum()) <= 1


@pytest.mark.gpu
def test_gpu_graph_reads_the_count_and_never_synchronises() -> None:
    problem = Problem(rows=200, columns=3000, depth=128, dtype=torch.bfloat16, device="cuda", count=200)
    whole = problem.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = problem.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert problem.row_count is not None
    for count in (200, 3, 0, 111):
        problem.row_count.fill_(count)
        graph.replay()
        assert torch.equal(captured.token[:count], whole.token[:count])
        assert (captured.token[count:] == -1).all()
