"""`compact`: the True entries of a mask in order, and no more; the kernel in the interpreter, compiled, on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from mdkern.kernels import compact
from mdkern.kernels.loop.compact import compact_operator, compact_reference
from tests.own_process import run_in_the_interpreter

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1, 1), (1, 31), (3, 40), (2, 512), (5, 700)]
SHARES = [0.0, 0.02, 0.6, 1.0]  # of True entries
if interpreted:
    from mdkern.kernels.loop import triton_compact
    from tests.suites.interpreter import mend_interpreter  # noqa: F401 (a fixture that all tests here use)


def random_mask(shape: tuple[int, int], share: float, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(shape[1])
    return (torch.rand(shape, generator=generator) < share).to(device)


def check_against_definition(mask: Tensor, row: Tensor, count: Tensor) -> None:
    true = mask.flatten().nonzero()[:, 0]
    assert row.shape == (mask.numel(),)
    assert row.dtype == count.dtype == torch.int64
    assert count.shape == ()
    assert int(count) == len(true)
    assert torch.equal(row[: len(true)], true)
    assert not row[len(true) :].any()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_entries_are_those_that_are_true(shape: tuple[int, int], share: float) -> None:
    mask = random_mask(shape, share)
    check_against_definition(mask, *compact(mask))
    check_against_definition(mask.T, *compact(mask.T))


def test_a_mask_without_entries_has_none() -> None:
    check_against_definition(torch.zeros(3, 0, dtype=torch.bool), *compact(torch.zeros(3, 0, dtype=torch.bool)))


def test_only_masks_are_compacted() -> None:
    with pytest.raises(ValueError, match="bool"):
        compact(torch.zeros(2, 2))


def test_the_operator_is_well_registered() -> None:
    torch.library.opcheck(compact_operator, (random_mask((3, 40), 0.5),))


def test_masks_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be torch\.bool"):
        compact(torch.ones(3))
    with pytest.raises(ValueError, match="meta"):
        compact(torch.ones(3, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="at most 2\\^30 entries"):
        compact(torch.ones(1, 1, dtype=torch.bool).expand(2, (1 << 29) + 1))


@pytest.mark.skipif(not interpreted, reason="the next test runs it in Triton's interpreter")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 9000)])
def test_kernel_interpreted(shape: tuple[int, int], share: float) -> None:
    mask = random_mask(shape, share)
    check_against_definition(mask, *triton_compact.compact(mask))


@pytest.mark.skipif(interpreted, reason="one interpreter is enough")
@pytest.mark.slow
def test_kernel_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/kernels/test_compact.py", "kernel_interpreted")


@pytest.mark.skipif(interpreted, reason="the interpreter compiles nothing")
@pytest.mark.slow
def test_kernel_compiles_for_every_gpu() -> None:
    from mdkern.kernels.loop import triton_compact
    from tests.suites.compiled_head import build

    types = {"mask": "*i1", "row": "*i64", "count": "*i64", "size": "i32"}
    for capability in (80, 90, 100):
        build(triton_compact.compact_kernel, capability, {"BLOCK": 1024, "WIDTH": 8192}, types, warps=4)


@pytest.mark.gpu
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 1024), (7, 4099), (128, 1024), (9, 32_768)])
def test_gpu_entries_are_those_that_are_true(shape: tuple[int, int], share: float) -> None:
    mask = random_mask(shape, share, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours, torchs = compact(mask), compact_reference(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_against_definition(mask, *ours)
    check_against_definition(mask, *torchs)
