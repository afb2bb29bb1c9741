"""Kernels that are compiled beforehand: those of the first pass, at the same time, once."""

# mypy: ignore-errors

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mdkern import adapt
from mdkern.kernels.backbone import launch_linear, linear_fp8
from mdkern.kernels.backbone import linear as products
from mdkern.kernels.invariant import batch_invariant, is_batch_invariant
from mdkern.models import dit_compile, dit_fused

WIDE = {"width": 256, "num_heads": 4, "num_blocks": 3, "max_length": 64}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit_compile, "_compiled", set())


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The path of a Hopper GPU up to its two large kernels: what Triton would compile for each launch of them."""
    kinds: set[str] = set()

    def kind_of(argument: Any) -> Any:
        if isinstance(argument, int):  # counts are not specialised
            return argument % 16 == 0 and argument > 1 and "sixteens"
        if isinstance(argument, Tensor):
            return argument.dtype, argument.data_ptr() % 16
        return argument if argument is None else (argument.block_shape, argument.base.dtype)

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                every = [kind_of(x) for x in arguments if not isinstance(x, int)] + [kind_of(arguments[-1])]
                kinds.add(f"{self.name} {every} {sorted(constants.items(), key=str)}")

            return launch

    monkeypatch.setattr(launch_linear, "linear_kernel", Kernel("linear"))
    monkeypatch.setattr(launch_linear, "linear_residual_kernel", Kernel("residual"))
    monkeypatch.setattr(launch_linear, "num_sms", lambda device: 2)
    for name in ("linear_rotary", "linear_gelu", "linear_residual"):
        monkeypatch.setattr(products, f"{name}_operator", getattr(products, f"{name}_on_gpu"))
    for name in ("scaled_rotary", "scaled_gelu", "scaled_residual"):
        monkeypatch.setattr(linear_fp8, f"{name}_operator", getattr(linear_fp8, f"{name}_on_gpu"))
    for module in (products, linear_fp8):
        monkeypatch.setattr(module, "runs_fused", lambda *_: True)
    monkeypatch.setattr(products, "FEWEST_ROWS", 1)
    monkeypatch.setattr(dit_fused, "is_hopper", lambda device: True)
    monkeypatch.setattr(dit_fused, "covers", lambda model: True)
    return kinds


@pytest.mark.parametrize("invariant", [False, True])
def test_they_are_those_of_the_pass(make_dit: Any, on_hopper: set[str], invariant: bool) -> None:
    model = make_dit(**WIDE).bfloat16().requires_grad_(False)
    ids = torch.randint(10, (32, 64))
    positions = torch.arange(64).expand(32, -1) if invariant else None

    def both() -> None:
        prepared = adapt(model).prepared(ids.numel())
        beforehand = set(on_hopper)
        on_hopper.clear()
        prepared.hidden(ids, None, positions)
        late = on_hopper - beforehand
        assert len(beforehand) == (5 if invariant else 4)
        assert len(on_hopper) == 5
        assert len(late) == (0 if invariant else 1)  # all rows of the last block run the product that makes no sums

    if invariant:
        with batch_invariant():
            both()
    else:
        both()


def test_they_are_those_of_a_pass_in_e4m3(make_dit: Any, on_hopper: set[str]) -> None:
    model = make_dit(**WIDE).bfloat16().requires_grad_(False)
    ids = torch.randint(10, (32, 64))
    prepared = adapt(model, precision="fp8").prepared(ids.numel())
    beforehand = set(on_hopper)
    on_hopper.clear()
    prepared.hidden(ids)
    assert len(beforehand) == 4
    assert on_hopper == beforehand


def test_they_are_compiled_at_the_same_time_and_once(make_dit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    meet, seen = threading.Barrier(3, timeout=30), []

    def job() -> None:
        meet.wait()  # of which none returns before all are there
        seen.append(is_batch_invariant())

    def failing() -> None:
        meet.wait()
        raise RuntimeError

    monkeypatch.setattr(dit_compile, "first_launches", lambda *_: [job, failing, job])
    model = make_dit(**WIDE)
    for _ in range(2):
        dit_compile.compile_together(model, None, 100)
    assert seen == [False, False]
    with batch_invariant():
        dit_compile.compile_together(model, None, 100)
    assert seen == [False, False, True, True]
