"""The norm and rotary kernels in Triton's interpreter, on the CPU: run by the tests in a process of its own."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from mdkern.kernels.backbone import (
    triton_combine,
    triton_experts,
    triton_folded_norm,
    triton_invariant_attention,
    triton_invariant_linear,
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
from mdkern.kernels.backbone.combine import combine_reference
from mdkern.kernels.backbone.experts import gated_experts_reference, places_of
from mdkern.kernels.backbone.folded_norm import fold_norm_reference
from mdkern.kernels.backbone.fp8_skinny import Tiled
from mdkern.kernels.backbone.invariant_attention import invariant_attention_reference
from mdkern.kernels.backbone.joint import joint_linear_reference, joint_swiglu_reference
from mdkern.kernels.backbone.modulated_norm import gathered_norm_reference, modulated_norm_reference
from mdkern.kernels.backbone.place_heads import place_heads_reference
from mdkern.kernels.backbone.rms_norm import gathered_rms_norm_reference, rms_norm_reference
from mdkern.kernels.backbone.rotary import gathered_qkv_reference, rotary_reference
from mdkern.kernels.backbone.route_experts import Routing, route_experts_reference
from mdkern.kernels.backbone.sandwich import choose_experts_reference, sandwich_norm_reference
from mdkern.kernels.backbone.skinny import skinny_parts_reference
from mdkern.kernels.backbone.swiglu import swiglu_reference
from mdkern.kernels.backbone.triton_window_attention import Setting
from mdkern.kernels.backbone.window_attention import window_attention_reference
from tests.problems.backbone import HeadsCase, WindowCase, modulation, normal
from tests.problems.experts import experts_problem, listed, routing_problem, sandwich_problem
from tests.suites.interpreter import mend_interpreter  # noqa: F401  a fixture, for every test here

assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"


@pytest.mark.parametrize("sequences", [0, 1, 6])
@pytest.mark.parametrize(("rows", "width"), [(12, 64), (24, 100), (6, 1)])
@pytest.mark.parametrize("updated", [False, True])
def test_norm_is_the_references(sequences: int, rows: int, width: int, updated: bool) -> None:
    x, update = normal(1, rows, width), normal(2, rows, 3 * width)[:, width : 2 * width]
    weight, shift, scale, gate = modulation(width, sequences)
    outcomes = []
    for implementation in (modulated_norm_reference, triton_modulated_norm.modulated_norm):
        stream = x.clone()
        normed = implementation(stream, weight, shift, scale, update if updated else None, gate if updated else None)
        outcomes.append((stream, normed))
    for want, got in zip(*outcomes):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(outcomes[1][0], x) != updated


@pytest.mark.parametrize("rows_of_program", [1, 4, 8])
def test_rows_of_a_program_do_not_matter(rows_of_program: int) -> None:
    x, update = normal(1, 24, 40), normal(2, 24, 40)
    weight, shift, scale, gate = modulation(40, 3)  # 8 rows each
    want_stream, stream, normed = x.clone(), x.clone(), torch.empty_like(x)
    want = modulated_norm_reference(want_stream, weight, shift, scale, update, gate)
    arguments = (stream, None, update, gate, weight, shift, scale, stream, normed)
    triton_modulated_norm.launch(*arguments, rows_of_program=rows_of_program)
    torch.testing.assert_close(normed, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stream, want_stream)


@pytest.mark.parametrize("sequences", [0, 2])
def test_gathered_rows_are_the_references(sequences: int) -> None:
    table = normal(3, 9, 50)[:, 1:41]
    index = torch.tensor([0, 8, 3, 3, -1, 9, 5, 2], dtype=torch.int32)  # two of them are not there
    weight, shift, scale, _ = modulation(40, sequences)
    want = gathered_norm_reference(table, index, weight, shift, scale)
    got = triton_modulated_norm.gathered_norm(table, index, weight, shift, scale)
    for expected, tensor in zip(want, got):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert tensor.isnan().any(-1).tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert torch.equal(got[0][:4], table[index[:4].long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_folded_weights_are_the_references(dtype: torch.dtype, biased: bool) -> None:
    weight, bias = normal(1, 9, 256).to(dtype), normal(2, 9).to(dtype)
    norm, shift, scale, _ = modulation(256, 0, dtype)
    outcomes = []
    for implementation in (fold_norm_reference, triton_folded_norm.fold_norm):
        folded = torch.empty_like(weight), torch.empty_like(bias)
        implementation(*folded, weight, bias if biased else None, norm, shift, scale)
        outcomes.append(folded)
    precision = 1e-5 if dtype == torch.float32 else 2e-3  # a unit in the last place
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=precision, atol=precision)
    assert (outcomes[1][0].double().sum(1).abs() < 1e-5).all()


def rotated(x: Tensor, heads: int, implementation: Any, *arguments: Any) -> Tensor:
    x = x.clone()
    implementation(x[:, :heads], *arguments)
    return x


@pytest.mark.parametrize(("heads", "head_dim"), [(24, 64), (1, 2), (5, 20), (9, 6)])
@pytest.mark.parametrize("placed", [False, True])
def test_rotary_is_the_references(heads: int, head_dim: int, placed: bool) -> None:
    x, angle = normal(4, 14, heads + 2, head_dim), normal(5, 7, head_dim // 2)
    positions = torch.tensor([6, 0, 3, -1, 1, 7, 2] * 2) if placed else None  # two of them are not there
    want = rotated(x, heads, rotary_reference, angle.cos(), angle.sin(), positions, 7)
    got = rotated(x, heads, triton_rotary.rotary, angle.cos(), angle.sin(), positions, 7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[:, :heads].isnan().flatten(1).all(1).tolist() == [placed and place in (3, 5) for place in range(7)] * 2
    assert torch.equal(got[:, heads:], x[:, heads:])


@pytest.mark.parametrize(
    ("heads", "rotated", "head_dim"), [(36, 24, 64), (24, 12, 64), (9, 6, 20), (3, 3, 6), (2, 0, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gathered_qkv_are_the_references(heads: int, rotated: int, head_dim: int, dtype: torch.dtype) -> None:
    embedding, table = normal(3, 9, 50, dtype=dtype)[:, 1:41], normal(6, 9, (heads + 1) * head_dim, dtype=dtype)
    table = table[:, head_dim:]
    index = torch.tensor([0, 8, 3, 3, -1, 9, 5], dtype=torch.int32)  # two of them are not there
    angle = normal(5, 4, head_dim // 2)
    arguments = (embedding, table, index, angle.cos(), angle.sin(), rotated, 3)
    want, got = (gather(*arguments) for gather in (gathered_qkv_reference, triton_rotary.gathered_qkv))
    precision = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got, want, rtol=precision, atol=precision, equal_nan=True)
    for rows in got:
        assert rows.isnan().all(-1).tolist() == [False] * 4 + [True] * 2 + [False]
    assert torch.equal(got[0][:4], embedding[index[:4].long()])


@pytest.mark.parametrize(("rows", "width"), [(5, 64), (3, 100), (2, 1)])
@pytest.mark.parametrize("updated", [False, True])
def test_rms_norm_is_the_references(rows: int, width: int, updated: bool) -> None:
    x, update = normal(1, rows, width), normal(2, rows, 3 * width)[:, width : 2 * width] if updated else None
    outcomes = []
    for implementation in (rms_norm_reference, triton_rms_norm.rms_norm):
        stream = x.clone()
        outcomes.append((stream, implementation(stream, normal(3, width), 0.1, update)))
    for want, got in zip(*outcomes):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(outcomes[1][0], x) != updated


def test_gathered_rms_norm_is_the_references() -> None:
    table, index = normal(3, 9, 50)[:, 1:41], torch.tensor([0, 8, 3, 3, -1, 9, 5, 2], dtype=torch.int32)
    want, got = (
        implementation(table, index, normal(4, 40), 0.1)
        for implementation in (gathered_rms_norm_reference, triton_rms_norm.gathered_rms_norm)
    )
    for expected, tensor in zip(want, got):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert tensor.isnan().any(-1).tolist() == [False] * 4 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("columns", [7, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_swiglu_is_the_references(columns: int, dtype: torch.dtype) -> None:
    both = normal(1, 3, 2 * columns, dtype=dtype)
    gate, up = both[:, :columns], both[:, columns:]
    precision = 1e-5 if dtype == torch.float32 else 2e-3
    for activation in ("silu", "gelu"):
        got, want = (function(gate, up, activation) for function in (triton_swiglu.swiglu, swiglu_reference))
        torch.testing.assert_close(got, want, rtol=precision, atol=precision)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rms_norm_adds_the_parts_of_an_update(parts: int, dtype: torch.dtype) -> None:
    update = normal(2, parts, 8, 100, dtype=dtype)[:, :5]
    outcomes = []
    for implementation in (rms_norm_reference, triton_rms_norm.rms_norm):
        stream = normal(1, 5, 100).half()
        outcomes.append((stream, implementation(stream, normal(3, 100), 0.1, update)))
    for want, got in zip(*outcomes):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(outcomes[1][0], (normal(1, 5, 100).half() + update.float().sum(0)).half())


@pytest.mark.parametrize("rows", [1, 20, 64])
@pytest.mark.parametrize("biased", [(False, False, False), (True, True, True), (False, True, False)])
def test_skinny_products_are_the_references(rows: int, biased: tuple[bool, ...]) -> None:
    """One, two and three layers of unequal size, of which all, none or some have a bias."""
    x = normal(1, rows, 1024)[:, 256:768].half()
    weights = [normal(2 + n, columns, 512, dtype=torch.float16) / 20 for n, columns in enumerate((128, 256, 128))]
    columns = [normal(5 + n, len(w), 2).half()[:, 1] for n, w in enumerate(weights)]  # of a matrix: not contiguous
    biases = [bias if has else None for bias, has in zip(columns, biased)]
    same = [weights[0], weights[2]], [biases[0], biases[1][:128] if biased[1] else None]
    for reference, kernel, arguments in (
        (joint_linear_reference, triton_skinny.skinny_linear, (*weights, *biases)),
        (joint_linear_reference, triton_skinny.skinny_linear, (*weights[:2], None, *biases[:2], None)),
        (joint_linear_reference, triton_skinny.skinny_linear, (weights[1], None, None, biases[1], None, None)),
        (joint_swiglu_reference, triton_skinny.skinny_swiglu, (*same[0], *same[1])),
        (skinny_parts_reference, triton_skinny.skinny_parts, (weights[1], biases[1])),
    ):
        want, got = reference(x, *arguments), kernel(x, *arguments)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(32, 8, 16), (3, 1, 10), (9, 9, 2), (0, 4, 8), (5, 0, 8)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("where", ["in place", "kept", "kept at columns"])
def test_heads_are_placed_as_by_the_reference(queries: int, keys: int, head_dim: int, normed: bool, where: str) -> None:
    case = HeadsCase(queries, keys, head_dim, normed, where if keys else "in place")
    want, got = (case.run(implementation) for implementation in (place_heads_reference, triton_place_heads.place_heads))
    for expected, tensor in zip(want, got, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    if case.where == "kept at columns" and queries:  # positions that are not there
        assert got[0].isnan().flatten(1).all(1).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("turned", [1, 3])
@pytest.mark.parametrize("where", ["in place", "kept at columns"])
def test_heads_may_be_turned_in_part(turned: int, where: str) -> None:
    case = HeadsCase(3, 2, 10, True, where, turned=turned)
    want, got = (case.run(implementation) for implementation in (place_heads_reference, triton_place_heads.place_heads))
    for expected, tensor in zip(want, got, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


WINDOWS = [
    WindowCase(2, 2, 32, 5, 40),
    WindowCase(6, 2, 32, 30, 70, True, "rows"),  # two tiles of queries
    WindowCase(4, 4, 48, 32, 64, False, "padding", 8),
    WindowCase(4, 1, 80, 33, 100, True, turned=13, placed=False),
    WindowCase(2, 1, 32, 9, 9, masked="rows"),  # all columns
    WindowCase(2, 1, 32, 16, 50, dtype=torch.float16),
]
SETTINGS = [Setting(32, 32, 4, True, 4, 1), Setting(64, 16, 2, False, 4, 1), Setting(32, 32, 1, False, 4, 1)]


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_window_attention_is_the_references(case: WindowCase, setting: Setting) -> None:
    """By programs that are divided, also with one for the window alone, and by undivided ones."""
    close = {"rtol": 1e-5, "atol": 1e-5} if case.dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
    theirs, ours = case.arguments(), case.arguments()
    want, _ = window_attention_reference(**theirs)
    got, _ = triton_window_attention.window_attention(**ours, setting=setting)
    torch.testing.assert_close(got, want, **close)
    assert not got.isnan().any()
    torch.testing.assert_close(ours["kept"][:, :, :-1], theirs["kept"][:, :, :-1], **close)
    assert not ours["arrived"].any()
    assert torch.equal(ours["query"], case.arguments()["query"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_window_attention_is_rounded_once(setting: Setting) -> None:
    """To within half a step of e4m3, 1/16 of a number or 2^-10 of the scale; the largest of a head becomes 448."""
    case = WindowCase(4, 2, 128, 5, 40, masked="padding")
    exact, _ = window_attention_reference(**case.arguments())
    rounded = Tiled(*triton_window_attention.window_attention(**case.arguments(rounded=True), setting=setting))
    room = (exact.abs() / 16).clamp(min=rounded.scales.repeat_interleave(128, 1) * 2**-10)
    assert bool(((rounded.wide() - exact).abs() <= room * (1 + 1e-4) + 1e-6).all())
    seen = exact.unflatten(1, (-1, 128)).abs().amax(2) > 0
    assert bool((rounded.values.float().unflatten(1, (-1, 128)).abs().amax(2)[seen] == 448).all())


def test_positions_of_a_window_that_are_not_there() -> None:
    """Such queries are NaN; such keys make NaN of those that see them, and of no other sequence."""
    case = WindowCase(2, 2, 32, 5, 40)
    given = case.arguments()
    given["positions"][7] = 40
    got, _ = triton_window_attention.window_attention(**given, setting=SETTINGS[0])
    assert got.isnan().any(1).tolist() == [False] * 5 + [True] * 5 + [False] * 5


@pytest.mark.parametrize(("tokens", "columns"), [(7, 1500), (1, 3), (0, 8)])
def test_combine_is_the_references(tokens: int, columns: int) -> None:
    rows, place = normal(1, 20, columns), torch.arange(3 * tokens).view(tokens, 3) * 7 % 20
    weights = normal(2, tokens, 3)
    torch.testing.assert_close(
        triton_combine.combine(rows, place, weights), combine_reference(rows, place, weights), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 32, 9), (70, 50, 70), (130, 96, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_invariant_product_is_the_products(rows: int, depth: int, columns: int, biased: bool) -> None:
    x, weight = normal(1, rows, 2 * depth)[:, :depth], normal(2, columns, depth)
    bias = normal(3, columns) if biased else None
    got = triton_invariant_linear.invariant_linear(x, weight, bias)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_invariant_product_of_rows_alone() -> None:
    x, weight, bias = normal(1, 150, 72), normal(2, 40, 72), normal(3, 40)
    together = triton_invariant_linear.invariant_linear(x, weight, bias)
    for rows in (slice(0, 1), slice(77, 78), slice(60, 131)):
        assert torch.equal(triton_invariant_linear.invariant_linear(x[rows], weight, bias), together[rows])


def attention_case(batch: int, heads: int, shared: int, queries: int, keys: int, head_dim: int) -> tuple[Tensor, ...]:
    """Queries, keys and values as slices of one product, as models have them."""
    query = normal(1, batch * queries, heads * head_dim).view(batch, queries, heads, head_dim).transpose(1, 2)
    both = normal(2, batch * keys, 2 * (heads // shared) * head_dim).view(batch, keys, 2, heads // shared, head_dim)
    key, value = both.permute(2, 0, 3, 1, 4)
    return query, key, value


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("masked", ["", "padding", "pairs"])
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(40, 40, 16), (3, 70, 24)])
def test_invariant_attention_is_attention(shared: int, masked: str, queries: int, keys: int, head_dim: int) -> None:
    query, key, value = attention_case(2, 4, shared, queries, keys, head_dim)
    mask = None
    if masked == "padding":
        mask = (torch.arange(keys) < torch.tensor([keys, keys // 3])[:, None])[:, None, None]
    elif masked == "pairs":
        mask = (normal(5, queries, keys) > 0) | (torch.arange(keys) == 0)
    want = invariant_attention_reference(query.double(), key.double(), value.double(), mask, 0.3)
    got = triton_invariant_attention.invariant_attention(query, key, value, mask, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_invariant_attention_of_a_text_alone() -> None:
    """Beside others, with padding after it, at some of its queries."""
    query, key, value = attention_case(3, 2, 1, 90, 90, 16)
    own = torch.tensor([50, 33, 90])
    together = triton_invariant_attention.invariant_attention(
        query, key, value, (torch.arange(90) < own[:, None])[:, None, None], 0.25
    )
    for number, length in enumerate(own.tolist()):
        parts = [x[number : number + 1, :, :length] for x in (query, key, value)]
        alone = triton_invariant_attention.invariant_attention(*parts, None, 0.25)
        assert torch.equal(alone[0], together[number, :length])
        some = torch.tensor([length - 1, 4, 17])
        pruned = triton_invariant_attention.invariant_attention(parts[0][:, :, some], *parts[1:], None, 0.25)
        assert torch.equal(pruned[0], together[number, some])


def test_a_query_that_sees_nothing_gives_0() -> None:
    query, key, value = attention_case(1, 1, 1, 3, 40, 16)
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[1, 35] = True
    got = triton_invariant_attention.invariant_attention(query, key, value, mask, 0.25)
    assert got[0, [0, 2]].abs().max() == 0
    torch.testing.assert_close(got[0, 1], value[0, :, 35])


@pytest.mark.parametrize(("rows", "choices", "experts"), [(11, 2, 4), (1, 3, 7), (80, 2, 3), (0, 1, 2)])
def test_pairs_are_sorted_by_expert(rows: int, choices: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_experts, "SORT_BLOCK", 16)
    index = torch.randint(0, experts, (rows, choices), generator=torch.Generator().manual_seed(rows))
    order, place, ends = triton_experts.sort_pairs(index, experts)
    flat = index.flatten().tolist()
    assert [order.tolist().index(pair) for pair in range(len(flat))] == place.flatten().tolist()
    assert place.shape == index.shape
    assert order.tolist() == sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))
    assert ends.tolist() == [sum(chosen <= expert for chosen in flat) for expert in range(experts)]


@pytest.mark.parametrize(
    ("rows", "choices", "experts", "depth", "width"),
    [(11, 2, 4, 40, 24), (1, 3, 7, 16, 16), (80, 2, 3, 70, 70), (60, 1, 2, 64, 32), (0, 1, 2, 8, 8)],
)
def test_experts_are_the_references(
    rows: int, choices: int, experts: int, depth: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts with several tiles of rows and with none, and shapes that divide into tiles and do not."""
    monkeypatch.setattr(triton_experts, "rows_of_a_tile", lambda *_: 16)
    given = experts_problem(rows, choices, experts, depth, width)
    for activation in ("gelu", "silu"):
        want = gated_experts_reference(*given, activation)
        torch.testing.assert_close(triton_experts.gated_experts(*given, activation), want, rtol=1e-5, atol=1e-5)
    lists = listed(*given[3:])
    got = triton_experts.listed_experts(*given[:3], *lists, places_of(*lists), "silu")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_grouped_products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that end in the midst of an expert's pairs, an expert without any, and a last part that is shorter."""
    monkeypatch.setattr(triton_experts, "MOST_FEW", 0)
    x, index, *rest = experts_problem(43, 3, 5, 48, 32, torch.bfloat16)
    index[index == 2] = 3
    want = gated_experts_reference(x, index, *rest, "gelu")
    of_row, of_unit = 2 * (48 + 64), 2 * 16 * index.numel()
    for rows, columns in ((1000, 48), (50, 32), (7, 16)):
        monkeypatch.setattr(triton_experts, "MOST_GATHERED", rows * of_row)
        monkeypatch.setattr(triton_experts, "COLUMNS_UNIT", 16)
        monkeypatch.setattr(triton_experts, "MOST_OUTPUTS", columns // 16 * of_unit)
        got = triton_experts.gated_experts(x, index, *rest, "gelu")
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


ROUTINGS = [
    (13, False, Routing(3, normalised=False)),
    (16, True, Routing(4, bias_counts=True, factor=0.5)),
    (24, True, Routing(4, softmax=False, groups=6, kept_groups=3, factor=2.5, always=1)),
    (8, False, Routing(8, softmax=False, groups=8, kept_groups=8, always=3)),  # one expert a group
    (5, False, Routing(1)),
]


@pytest.mark.parametrize(("experts", "biased", "routing"), ROUTINGS)
@pytest.mark.parametrize("parts", [1, 4])
def test_experts_are_routed_to_as_by_the_reference(experts: int, biased: bool, routing: Routing, parts: int) -> None:
    given = routing_problem(7, experts, biased, parts)
    got = triton_route_experts.route_experts(*given, routing)
    for ours, theirs in zip(got, route_experts_reference(*given, routing), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routing", [Routing(2), Routing(2, softmax=False, groups=2)])
def test_bad_products_touch_no_other_row(routing: Routing) -> None:
    products, _ = routing_problem(4, 6, False)
    products[0, 1, 2], products[0, 3] = torch.nan, torch.nan
    weights, index = triton_route_experts.route_experts(products, None, routing)
    assert weights.isnan().any(-1).tolist() == [False, True, False, True]
    assert bool(((index >= 0) & (index < 6)).all()), "an index outside would be read by the experts"


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_sandwich_norms_are_the_references(after: int, whole: bool) -> None:
    given = sandwich_problem(5, 20, after, whole)
    want = sandwich_norm_reference(*given)
    torch.testing.assert_close(triton_sandwich.sandwich_norm(*given), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("experts", "count"), [(13, 3), (16, 8), (3, 3), (5, 1)])
def test_experts_are_chosen_as_by_the_reference(experts: int, count: int) -> None:
    scores, scales = normal(1, 7, experts), normal(2, experts)
    got = triton_sandwich.choose_experts(scores, scales, count, 0.3)
    for ours, theirs in zip(got, choose_experts_reference(scores, scales, count, 0.3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bad_scores_touch_no_other_row() -> None:
    scores = normal(1, 4, 6)
    scores[1, 2], scores[3] = torch.nan, torch.nan
    weights, index = triton_sandwich.choose_experts(scores, torch.ones(6), 2, 1.0)
    assert weights.isnan().any(-1).tolist() == [False, True, False, True]
    assert bool(((index >= 0) & (index < 6)).all()), "an index outside would be read by the experts"
