"""`window_attention` by its definition, in float64, and as an operator of `torch.library`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone import joint
from mdkern.kernels.backbone import window_attention as module
from mdkern.kernels.backbone.fp8_skinny import Tiled
from mdkern.kernels.backbone.window_attention import (
    new_arrivals,
    runs_window_attention,
    window_attention,
    window_attention_operator,
    window_attention_reference,
)
from mdkern.kernels.invariant import batch_invariant
from tests.problems.backbone import WindowCase


def turned(head: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """A head by the definition: pair (i, i + R) is a complex number, which is multiplied by cos + i sin."""
    if norm is not None:
        head = head / math.sqrt(float(head.square().mean()) + 1e-2) * norm
    half = len(cos)
    pairs = torch.complex(head[:half], head[half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat((pairs.real, pairs.imag, head[2 * half :]))


def attended_by_definition(given: dict[str, Any], row: int, head: int, width: int) -> Tensor:
    """Row and head of the result, from the arguments before the call."""
    sequence, kept, columns, key = row // width, given["kept"], given["columns"], given["key"]
    key_head, length = head // (given["query"].shape[1] // key.shape[1]), kept.shape[2] - 1
    keys, values = (list(part[sequence, :length, key_head]) for part in kept)
    for own in range(sequence * width, (sequence + 1) * width):
        if columns[own] < length:
            place = given["positions"][own]
            new = turned(key[own, key_head], given["key_norm"], given["cos"][place], given["sin"][place])
            keys[columns[own]], values[columns[own]] = new, given["value"][own, key_head]
    place = given["positions"][row]
    query = turned(given["query"][row, head], given["query_norm"], given["cos"][place], given["sin"][place])
    mask, weights = given["mask"], []
    for column in range(length):
        seen = mask is None or mask[sequence, 0, row % width if mask.shape[2] > 1 else 0, column]
        weights.append(math.exp(float(query @ keys[column]) * given["scale"]) if seen else 0.0)
    return torch.stack([w * v for w, v in zip(weights, values)]).sum(0) / sum(weights)


@pytest.mark.parametrize("masked", ["", "padding", "rows"])
@pytest.mark.parametrize(("normed", "half"), [(False, None), (True, 3)])
def test_window_attention_by_definition(masked: str, normed: bool, half: int | None) -> None:
    case = WindowCase(4, 2, 32, 5, 9, normed, masked, half, dtype=torch.float64)
    given, arguments = case.arguments(), case.arguments()
    arguments.pop("rounded")
    got = window_attention(arguments.pop("cos"), arguments.pop("sin"), *heads_of(arguments), **arguments)
    assert isinstance(got, Tensor)
    for row, head in ((1, 0), (7, 3), (13, 1), (14, 2)):
        want = attended_by_definition(given, row, head, 5)
        torch.testing.assert_close(got[row].view(4, 32)[head], want, rtol=1e-9, atol=1e-9)
    if masked == "rows":
        assert not got[4].any()  # which sees nothing
    outside = torch.ones(3, 10, dtype=torch.bool)
    outside[torch.arange(15) // 5, given["columns"]] = False
    assert torch.equal(arguments["kept"][:, outside], given["kept"][:, outside])


def heads_of(arguments: dict[str, Any]) -> list[Tensor]:
    return [arguments.pop(name) for name in ("query", "key", "value")]


def test_the_operator_is_well_registered() -> None:
    for case, rounded in ((WindowCase(2, 1, 32, 4, 6, True, "rows"), False), (WindowCase(2, 2, 128, 3, 5), True)):
        given = case.arguments(rounded)
        given["kept"] = given["kept"].nan_to_num()
        torch.library.opcheck(window_attention_operator, tuple(given.values()))


def test_arguments_that_do_not_fit_are_refused() -> None:
    given = WindowCase(4, 2, 32, 3, 5).arguments()
    given.pop("rounded")
    for match, changes in (
        ("do not fit a cache", {"kept": given["kept"][:, :2]}),
        ("do not fit a cache", {"query": given["query"][0]}),
        ("columns", {"columns": given["columns"][:5]}),
        ("key must be", {"key": given["key"][:5]}),
        ("4 heads of queries do not fit 3", {"key": torch.zeros(9, 3, 32), "value": torch.zeros(9, 3, 32),
                                             "kept": torch.zeros(2, 3, 6, 3, 32)}),
        ("mask must be bool", {"mask": torch.ones(3, 5, dtype=torch.bool)}),
        ("mask must be bool", {"mask": torch.ones(3, 1, 2, 5, dtype=torch.bool)}),
        ("mask must be bool", {"mask": torch.ones(3, 1, 3, 5)}),
        ("arrived", {"arrived": given["arrived"][:-1]}),
        ("heads must have 128 numbers", {"rounded": True}),
    ):  # fmt: skip
        arguments = given | changes
        with pytest.raises(ValueError, match=match):
            window_attention(arguments.pop("cos"), arguments.pop("sin"), *heads_of(arguments), **arguments)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"batch": 1, "width": 32, "heads": 32, "groups": 1, "keys": 256}
    shape |= {"head_dim": 128, "dtype": torch.bfloat16, "fp8": False}
    device = torch.device("cuda", 0)
    for owner in (module, joint):
        monkeypatch.setattr(owner, "is_hopper", lambda _: True)
    monkeypatch.setattr(joint, "num_sms", lambda _: 132)
    assert runs_window_attention(**shape, device=device)
    others: list[dict[str, Any]] = [{"width": 128, "heads": 8}, {"batch": 2}, {"heads": 4, "groups": 8}, {"keys": 2304}]
    for change in (*others, {"dtype": torch.float32}, {"head_dim": 64}):
        assert not runs_window_attention(**shape | change, device=device)
    several = shape | {"batch": 8}
    assert runs_window_attention(**several, device=device)
    assert runs_window_attention(**several | {"batch": 5}, device=device)
    others = [{"batch": 4}, {"batch": 9, "width": 28}, {"batch": 4, "width": 64}, {"keys": 257}, {"fp8": True}]
    for change in (*others, {"heads": 28}, {"heads": 8, "groups": 4}, {"dtype": torch.float16}):
        assert not runs_window_attention(**several | change, device=device)
    with batch_invariant():
        assert not runs_window_attention(**shape, device=device)
        assert not runs_window_attention(**several, device=device)
    monkeypatch.setattr(joint, "num_sms", lambda _: 114)
    assert not runs_window_attention(**several, device=device)


CASES = [
    WindowCase(32, 32, 128, 32, 256),
    WindowCase(32, 32, 128, 27, 200, True),
    WindowCase(28, 4, 128, 32, 700, masked="padding"),
    WindowCase(8, 2, 64, 64, 300, True, "rows"),
    WindowCase(4, 4, 80, 33, 2304, True, "", 16),
    WindowCase(3, 3, 32, 1, 40),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, dtype) for case in CASES for dtype in (torch.bfloat16, torch.float16)), (CASES[-1], torch.float32)],
)
def test_gpu_errors_are_those_of_rounding(case: WindowCase, dtype: torch.dtype) -> None:
    """No larger than twice those of the reference's kernels, and the same keys and values in the cache."""
    case = case._replace(dtype=dtype, device="cuda")
    given, theirs, wide = case.arguments(), case.arguments(), case.arguments()
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in wide.items()}
    exact, _ = window_attention_reference(**wide)
    want, _ = window_attention_reference(**theirs)
    for _ in range(2):  # what is counted is as before
        got, _ = window_attention_operator(*given.values())
        assert not given["arrived"].any()
    error, bound = ((x.double() - exact).norm() for x in (got, want))
    assert error <= 2 * bound + 1e-6 * exact.norm()
    ours, its = given["kept"][:, :, :-1].double(), wide["kept"][:, :, :-1]
    torch.testing.assert_close(ours, its, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [40, 256, 2304])
def test_gpu_results_in_e4m3(length: int) -> None:
    """Within half a step of e4m3 of what the same programs give in bfloat16."""
    from mdkern.kernels.backbone import triton_window_attention

    given, wide = (
        WindowCase(16, 4, 128, 32, length, dtype=torch.bfloat16, device="cuda").arguments(n) for n in (True, False)
    )
    setting = triton_window_attention.setting_for(length, rounded=True, queries=3 * 32 * 16)
    plain, _ = triton_window_attention.window_attention(*wide.values(), setting)
    got = Tiled(*window_attention_operator(*given.values()))
    room = (plain.float().abs() / 15).clamp(min=got.scales.repeat_interleave(128, 1) * 2**-9)
    assert bool(((got.wide() - plain.float()).abs() <= room).all())


@pytest.mark.gpu
def test_gpu_graphs_give_the_same_bits() -> None:
    """Whatever program is the last to end, in many replays."""
    given = WindowCase(32, 32, 128, 32, 1000, dtype=torch.bfloat16, device="cuda").arguments(sequences=1)
    want = window_attention_operator(*given.values())[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcomes = [window_attention_operator(*given.values())[0] for _ in range(8)]
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(got, want) for got in outcomes)
    assert not given["arrived"].any()


def test_what_is_counted_is_one_for_each_tile_of_queries() -> None:
    assert new_arrivals(3, 32, 4, 7, torch.device("cpu")).shape == (3 * 4 * 7,)  # 7 * 32 queries in tiles of 32
