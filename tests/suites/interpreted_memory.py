"""What kernels read and write, in Triton's interpreter: run by the tests in a process with TRITON_INTERPRET=1.

Every address must lie in an argument of the launch, whatever the counts; nothing is read that nobody wrote; and offsets
past 2^31 are what they should be.
"""

# mypy: ignore-errors

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from mdkern.kernels.backbone import (
    quantise,
    triton_experts,
    triton_folded_norm,
    triton_fp8_skinny,
    triton_invariant_attention,
    triton_invariant_linear,
    triton_modulated_norm,
    triton_place_heads,
    triton_quantise,
    triton_rms_norm,
    triton_rotary,
    triton_route_experts,
    triton_sandwich,
    triton_skinny,
    triton_swiglu,
    triton_window_attention,
)
from mdkern.kernels.backbone.fp8_skinny import tiled
from mdkern.kernels.backbone.quantise import quantise_rows
from mdkern.kernels.backbone.route_experts import Routing
from mdkern.kernels.head import launch, launch_soft
from mdkern.kernels.head.arguments import NO_FILTERS, Filters
from mdkern.kernels.loop import select, tick, triton_compact, triton_select, triton_tick
from tests.problems.backbone import HeadsCase, WindowCase, modulation, normal
from tests.problems.experts import experts_problem, routing_problem, sandwich_problem
from tests.problems.projection import Problem
from tests.problems.selection import RULES, random_selection
from tests.problems.soft import SoftProblem
from tests.problems.tick import arguments, random_state
from tests.suites.interpreter import mend_interpreter  # noqa: F401  a fixture, for every test here

assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"

POISON = 0x7F  # every byte of memory that nobody wrote


def extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() if tensor.numel() else 0


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads and stores outside of the launch's arguments fail, and so do loads of poison."""
    ranges: list[tuple[int, int]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    begin, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def note(self: Any, args: Any, kwargs: Any) -> Any:
        given = [getattr(x, "base", x) for x in (*args, *kwargs.values())]  # the matrix, of a descriptor
        ranges[:] = [extent(x) for x in given if isinstance(x, Tensor)]
        return begin(self, args, kwargs)

    def chosen(mask: Any) -> Any:
        return numpy.asarray(mask if isinstance(mask, numpy.ndarray) else mask.data).astype(bool)

    def look(pointers: Any, mask: Any, what: str) -> None:
        wanted = chosen(mask)
        at = numpy.broadcast_to(pointers.data, numpy.broadcast_shapes(pointers.data.shape, wanted.shape))
        at = at[numpy.broadcast_to(wanted, at.shape)].astype(numpy.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = numpy.zeros(at.shape, bool)
        for first, end in ranges:
            inside |= (at >= first) & (at + size <= end)
        assert inside.all(), f"{what} outside of every argument"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        look(pointers, mask, "a load")
        loaded = load(self, pointers, mask, *rest, **options)
        value = numpy.ascontiguousarray(loaded.data[chosen(mask)]).view(numpy.uint8)
        size = loaded.data.dtype.itemsize
        assert not value.size or not (value.reshape(-1, size) == POISON).all(1).any(), "a load of what nobody wrote"
        return loaded

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        look(pointers, mask, "a store")
        return store(self, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(executor, "_init_args_hst", note)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is asked for without a content has the worst one."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.numel() and tensor.device.type == "cpu":
                tensor.untyped_storage().fill_(POISON)
            return tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


def is_poisoned(tensor: Tensor) -> bool:
    entries = tensor.contiguous().view(-1).view(torch.uint8).view(-1, tensor.element_size())
    return bool((entries == POISON).all(1).any())


@pytest.mark.usefixtures("checked", "poisoned")
class TestEveryEntryIsWritten:
    """Outputs hold no poison, and no poison is read on the way."""

    def test_the_checks_see_faults(self) -> None:
        state, ticks = random_state(False)
        source, batch, capacity = arguments(state, ticks, 0)
        one_tick = source._replace(sequence=source.sequence[:1].clone(), tick=torch.tensor([1]))
        with pytest.raises(Exception, match="outside of every argument"):
            triton_tick.begin_tick(one_tick, batch, capacity)
        unwritten = source._replace(sequence=torch.empty(source.sequence.shape, dtype=torch.int64))
        with pytest.raises(Exception, match="nobody wrote"):
            triton_tick.begin_tick(unwritten, batch, capacity)

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("rows", [0, 1, 7])
    def test_ticks(self, padded: bool, rows: int) -> None:
        state, ticks = random_state(padded)
        ticks.row_count.clamp_(max=rows)
        if rows == 0:  # an idle one
            ticks.sequence.fill_(len(state.sample) - 1)
        source, batch, capacity = arguments(state, ticks, 1)
        outputs = triton_tick.begin_tick(source, batch, capacity)
        assert not any(map(is_poisoned, outputs))
        before = state.input_ids.clone()
        token = torch.full((capacity,), 3)
        triton_tick.end_tick(state.input_ids, state.failed, state.tick, token, outputs[8], outputs[5])
        changed = (state.input_ids != before).sum()
        assert int(changed) <= rows
        assert not state.failed

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("held", [4096, 32])
    def test_selections(self, rule: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_select, "MOST_HELD", held)
        for trial in (0, 3):
            given, ids = random_selection(rule, trial, sequences=2, entries=45)
            assert not is_poisoned(triton_select.select(*given[:3], ids, *given[3:]))
            assert not is_poisoned(ids)

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_masks(self, share: float) -> None:
        for size in (1, 33, 1500):
            mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < share
            assert not any(map(is_poisoned, triton_compact.compact(mask)))

    @pytest.mark.parametrize("rows", [1, 6])
    def test_norms(self, rows: int) -> None:
        weight, shift, scale, gate = modulation(20, rows // 2)
        x, index = normal(1, rows, 20), torch.arange(-1, rows - 1)
        assert not is_poisoned(triton_modulated_norm.modulated_norm(x, weight, shift, scale, normal(2, rows, 20), gate))
        assert not any(map(is_poisoned, triton_modulated_norm.gathered_norm(x, index, weight, shift, scale)))
        folded, added = torch.empty(7, 20), torch.empty(7)
        vectors = (weight, shift[0], scale[0]) if shift.ndim == 2 else (weight, shift, scale)
        triton_folded_norm.fold_norm(folded, added, normal(3, 7, 20), None, *vectors)
        assert not is_poisoned(folded)
        assert not is_poisoned(added)

    @pytest.mark.parametrize("heads", [0, 2, 3])
    def test_heads(self, heads: int) -> None:
        angle, table, index = normal(5, 4, 3), normal(6, 9, 18), torch.tensor([0, 8, -1, 9, 3])
        gathered = triton_rotary.gathered_qkv(normal(3, 9, 10), table, index, angle.cos(), angle.sin(), heads, 3)
        assert not any(map(is_poisoned, gathered))
        x = normal(4, 5, 3, 6)
        triton_rotary.rotary(x[:, :heads], angle.cos(), angle.sin(), torch.tensor([0, 3, -1, 4, 2]), 4)
        assert not is_poisoned(x)

    @pytest.mark.parametrize("rows", [1, 6])
    def test_llamas_operators(self, rows: int) -> None:
        x, weight, index = normal(1, rows, 20), normal(2, 20), torch.arange(-1, rows - 1)
        assert not is_poisoned(triton_rms_norm.rms_norm(x, weight, 0.1, normal(3, rows, 20)))
        assert not any(map(is_poisoned, triton_rms_norm.gathered_rms_norm(x, index, weight, 0.1)))
        assert not is_poisoned(triton_rms_norm.rms_norm(x, weight, 0.1, normal(3, 2, rows, 20)))
        assert not is_poisoned(triton_swiglu.swiglu(x, normal(3, rows, 20)))

    @pytest.mark.parametrize("rows", [1, 17])
    def test_skinny_products(self, rows: int) -> None:
        x, weight, bias = normal(1, rows, 512).half(), normal(2, 128, 512).half(), normal(3, 128).half()
        products = (
            triton_skinny.skinny_linear(x, weight, weight, weight, bias, bias, bias),
            triton_skinny.skinny_swiglu(x, weight, weight, bias, bias),
            triton_skinny.skinny_parts(x, weight, bias),
        )
        assert not any(map(is_poisoned, products))

    @pytest.mark.parametrize("rows", [1, 6])
    def test_results_in_e4m3(self, rows: int) -> None:
        x, weight, index = normal(1, rows, 20), normal(2, 20), torch.arange(rows)
        layer = torch.empty(rows, 20, dtype=torch.float8_e4m3fn), torch.empty(rows), torch.empty(rows)
        triton_quantise.quantise_layer(*layer, x, None, weight, weight, None)
        outcomes = (
            *layer,
            *triton_quantise.quantise_rows(x),
            triton_quantise.quantised_norm(x),
            triton_quantise.quantise_columns(x, weight),
            *triton_rms_norm.scaled_rms_norm(x, weight, 0.1, normal(3, 2, rows, 20)),
            *triton_rms_norm.gathered_scaled_rms_norm(x, index, weight, 0.1),
            *triton_swiglu.scaled_swiglu(x, normal(3, rows, 20)),
        )
        assert not any(map(is_poisoned, outcomes))

    @pytest.mark.parametrize("rows", [1, 17])
    def test_skinny_products_in_e4m3(self, rows: int) -> None:
        wide, layer, bias = normal(1, rows, 512).bfloat16(), quantise_rows(normal(2, 256, 512)), normal(3, 256)
        given = *quantise_rows(wide), *layer, bias.bfloat16()
        products = (
            triton_fp8_skinny.fp8_skinny_linear(*given, torch.bfloat16),
            *triton_fp8_skinny.fp8_skinny_swiglu(*given),
            triton_fp8_skinny.fp8_skinny_parts(wide, None, *given[2:]),
            triton_fp8_skinny.fp8_skinny_parts(*tiled(wide), *given[2:]),
        )
        assert not any(map(is_poisoned, products))

    @pytest.mark.parametrize("rows", [1, 70])
    def test_batch_invariant_operators(self, rows: int) -> None:
        x, weight, bias = normal(1, rows, 40), normal(2, 70, 40), normal(3, 70)
        assert not is_poisoned(triton_invariant_linear.invariant_linear(x, weight, bias))
        query, key = normal(4, 2, 2, rows, 24), normal(5, 2, 2, 37, 24)
        for mask in (None, normal(6, 2, 1, 1, 37) > 0, normal(7, rows, 37) > 0):
            assert not is_poisoned(triton_invariant_attention.invariant_attention(query, key, key, mask, 0.3))

    @pytest.mark.parametrize("where", ["in place", "kept", "kept at columns"])
    def test_placed_heads(self, where: str) -> None:
        for case in (HeadsCase(5, 3, 6, True, where), HeadsCase(0, 1, 4, False, where)):
            assert not any(map(is_poisoned, case.run(triton_place_heads.place_heads)))

    @pytest.mark.parametrize("setting", [(32, 32, 3, True, 4, 1), (64, 16, 1, False, 4, 1)])
    def test_windows(self, setting: tuple[Any, ...]) -> None:
        """What the window writes in the cache, NaN before, is not read."""
        for case in (WindowCase(6, 2, 48, 30, 70, True, "rows", 8), WindowCase(1, 1, 128, 3, 10)):
            given = case.arguments(case.head_dim == 128, sequences=2)
            given["kept"][given["kept"].isnan()] = torch.tensor([POISON] * 4, dtype=torch.uint8).view(torch.float32)
            window = triton_window_attention.Setting(*setting)
            assert not any(map(is_poisoned, triton_window_attention.window_attention(**given, setting=window)))

    @pytest.mark.parametrize("case", [(11, 2, 4, 40, 24), (40, 1, 2, 33, 70)], ids=str)
    def test_experts(self, case: tuple[int, ...]) -> None:
        assert not is_poisoned(triton_experts.gated_experts(*experts_problem(*case), "silu"))

    def test_routing(self) -> None:
        for routing in (Routing(3), Routing(2, False, groups=4, kept_groups=2, always=1)):
            outcome = triton_route_experts.route_experts(*routing_problem(3, 12, True, 2), routing)
            assert not any(map(is_poisoned, outcome))

    def test_sandwiches(self) -> None:
        for given in (sandwich_problem(3, 20, 3, True), sandwich_problem(1, 33, 0, False)):
            new, normed = triton_sandwich.sandwich_norm(*given)
            assert not any(map(is_poisoned, (new, *normed)))
        assert not any(map(is_poisoned, triton_sandwich.choose_experts(normal(1, 3, 13), normal(2, 13), 3, 1.0)))

    @pytest.mark.parametrize("float8", [False, True])
    @pytest.mark.parametrize("filters", [NO_FILTERS, Filters(5, 0.9)])
    def test_projections(self, filters: Filters, float8: bool) -> None:
        problem = Problem(rows=7, columns=300, depth=48, biased=True, float8=float8)
        given = problem.arguments()
        wanted = given[3]._replace(want_argmax=not filters.active())
        outputs = launch.vocab_projection(*given[:3], wanted, filters)
        assert not any(map(is_poisoned, outputs))

    @pytest.mark.parametrize("biased", [False, True])
    def test_soft_embeddings(self, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch_soft, "UNIT", 16)
        problem = SoftProblem(rows=3, columns=2100, biased=biased)
        for chunk in (1 << 20, 3 * 900):
            assert not is_poisoned(launch_soft.soft_embedding(*problem.arguments(), chunk_elements=chunk))


# Offsets past 2^31. Memory that is never touched costs nothing; only the last program of a launch is run.


def sparse(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros that take memory where they are touched."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.fixture
def last_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run their last program alone, and large tensors take no memory."""
    run, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder

    def run_last(self: Any, *args: Any, **kwargs: Any) -> Any:
        last, self.grid = self.grid[0] - 1, (1,)

        def put_last(*_: int) -> None:
            builder.grid_idx = last, 0, 0

        monkeypatch.setattr(builder, "set_grid_idx", put_last)
        return run(self, *args, **kwargs)

    def empty_like(tensor: Tensor, **_: Any) -> Tensor:
        return sparse(*tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_last)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # they were never moved
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(Tensor, "new_empty", lambda tensor, *shape, **_: sparse(*shape, dtype=tensor.dtype))


ROWS, WIDTH = 20_000 * 256, 576  # 2.9e9 entries


@pytest.mark.usefixtures("checked", "last_program")
class TestOffsetsPastTwoToThe31:
    def test_norms(self) -> None:
        weight, shift, scale, _ = modulation(WIDTH, 0, torch.float16)
        x = sparse(ROWS, WIDTH)
        x[-4:] = last = normal(1, 4, WIDTH).half()
        want = triton_modulated_norm.modulated_norm_reference(last, weight, shift, scale, None, None)
        got = triton_modulated_norm.modulated_norm(x, weight, shift, scale, None, None)
        torch.testing.assert_close(got[-4:], want, rtol=2e-3, atol=2e-3)
        index = torch.arange(ROWS)
        table, normed = triton_modulated_norm.gathered_norm(x, index, weight, shift, scale)
        assert torch.equal(table[-4:], last)
        torch.testing.assert_close(normed[-4:], want, rtol=2e-3, atol=2e-3)
        for rounded, reference in (
            (triton_quantise.quantised_norm(x), quantise.quantised_norm_reference(last)),
            (triton_quantise.quantise_rows(x)[0], quantise.quantise_rows_reference(last)[0]),
        ):
            filled = min(4, int(rounded[-4:].ne(0).any(1).sum()))  # rows of the last program
            assert filled
            torch.testing.assert_close(rounded[-filled:].float(), reference[-filled:].float(), rtol=0.13, atol=0.01)

    def test_rotations(self) -> None:
        angle = normal(5, 256, 32)
        x = sparse(ROWS, 9, 64)
        x[-4:] = want = normal(1, 4, 9, 64).half()
        triton_rotary.rotary_reference(want, angle.cos(), angle.sin(), torch.arange(252, 256), 256)
        triton_rotary.rotary(x, angle.cos(), angle.sin(), None, 256)
        torch.testing.assert_close(x[-4:], want, rtol=2e-3, atol=2e-3)
        table, embedding = normal(2, 5, WIDTH).half(), normal(3, 5, WIDTH).half()
        index = torch.arange(ROWS) % 5
        got = triton_rotary.gathered_qkv(embedding, table, index, angle.cos(), angle.sin(), 6, 256)
        assert torch.equal(got[0][-4:], embedding[index[-4:]])
        assert torch.equal(got[1][-4:, 6 * 64 :], table[index[-4:], 6 * 64 :])

    def test_llamas_operators(self) -> None:
        weight, x = normal(3, WIDTH).half(), sparse(ROWS, WIDTH)
        x[-4:] = last = normal(1, 4, WIDTH).half()
        got = triton_rms_norm.rms_norm(x, weight, 0.1, None)
        want = triton_rms_norm.rms_norm_reference(last, weight, 0.1, None)
        torch.testing.assert_close(got[-1], want[-1], rtol=2e-3, atol=2e-3)
        got = triton_swiglu.swiglu(x, x)
        torch.testing.assert_close(got[-1:, -64:], triton_swiglu.swiglu_reference(last, last)[-1:, -64:])

    def test_placed_heads(self) -> None:
        """The last keys of a cache, past 2^31."""
        angle, key = normal(5, 4, 32), normal(1, 4, 9, 64).half()
        kept = sparse(2, 1, ROWS, 9, 64)
        columns = torch.tensor([0, 1, 2, ROWS - 1])
        arguments = angle.cos(), angle.sin(), None, key, key, None, 4, None, None, 0.0, kept, columns
        triton_place_heads.place_heads(*arguments)
        triton_place_heads.place_heads_reference(*arguments[:3], key, None, None, 4, *arguments[7:10], None, None)
        torch.testing.assert_close(kept[0, 0, -1, :8], key[3, :8], rtol=2e-3, atol=2e-3)

    def test_windows(self) -> None:
        """The cache of the last of many sequences, past 2^31."""
        case, sequences, length = WindowCase(2, 2, 64, 3, 2000, dtype=torch.float16), 9000, 2000
        given = case.arguments(sequences=1)
        want, _ = triton_window_attention.window_attention_reference(**case.arguments(sequences=1))
        kept, rows = sparse(2, sequences, length + 1, 2, 64), 3 * sequences
        kept[:, -1:] = given["kept"]
        for name in ("query", "key", "value"):
            last, given[name] = given[name], sparse(rows, 2, 64)
            given[name][-3:] = last
        for name in ("positions", "columns"):
            given[name] = given[name].repeat(sequences)
        given |= {"kept": kept, "arrived": torch.zeros(2 * sequences, dtype=torch.int32)}
        setting = triton_window_attention.Setting(32, 512, 1, False, 4, 1)
        got, _ = triton_window_attention.window_attention(**given, setting=setting)
        torch.testing.assert_close(got[-3:, 64:], want[:, 64:], rtol=4e-3, atol=4e-3)

    def test_ticks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sequences, length = 40, 1 << 26  # 2.7e9 ids of a batch
        monkeypatch.setattr(tick.torch, "empty", lambda shape, dtype, device: sparse(*shape, 1, dtype=dtype)[..., 0])
        ids, whole = sparse(sequences + 1, length, dtype=torch.int64), partial(torch.zeros, dtype=torch.int64)
        ids[sequences - 1, -3:] = torch.tensor([7, 8, 9])
        source = tick.TickSource(
            ids, None, ids, whole(sequences + 1), torch.ones(()), whole(()), torch.arange(sequences)[None],
            whole(1, sequences), torch.zeros(1, sequences), torch.full((1, sequences, 1), length - 1), whole(1, 4) + 39,
            whole(1), whole(1),
        )  # fmt: skip
        assert triton_tick.begin_tick(source, sequences, 4)[0][-1, -3:].tolist() == [7, 8, 9]

    def test_selections(self) -> None:
        rows, entries, length = 3, 5, 1 << 30
        ids = sparse(rows, length, dtype=torch.int64)
        tokens = torch.full((rows, entries), 6)
        given = torch.rand(rows, entries), tokens.bool(), tokens
        chosen = triton_select.select(*given, ids, None, None, None, "threshold", 0.0, 0.0)
        assert chosen[-1].all()
        assert ids[-1, :6].tolist() == [6] * 5 + [0]
        assert select.RULES == RULES
