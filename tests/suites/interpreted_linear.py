"""Products and attention of a thousand rows in Triton's interpreter: run by the tests in a process of its own."""

# mypy: ignore-errors

from __future__ import annotations

import pytest
import torch
import triton

from mdkern.kernels.backbone import triton_attention, triton_linear
from mdkern.kernels.backbone.attention import attention_reference
from mdkern.kernels.backbone.folded_norm import row_sums
from mdkern.kernels.backbone.linear import (
    linear_gelu_reference,
    linear_residual_reference,
    linear_rotary_reference,
)
from tests.problems.backbone import normal
from tests.suites.interpreter import mend_interpreter  # noqa: F401  a fixture, for every test here

assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"

ROWS, INNER, COLUMNS = 70, 128, 384  # two tiles of rows, one of them in part
WIDE = triton_linear.Tiling(32, 128, 4, 3)
NARROW = triton_linear.Tiling(32, 64, 4, 3)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weight and bias."""
    return normal(1, ROWS, INNER) + 0.3, normal(2, COLUMNS, INNER) * INNER**-0.5, normal(3, COLUMNS)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("folded", [False, True])
def test_rotated_heads_are_the_references(head_dim: int, folded: bool) -> None:
    x, weight, bias = operands()
    angle = normal(4, 40, head_dim // 2)
    cos, sin, sums, out = angle.cos(), angle.sin(), row_sums(x, 32) if folded else None, x.new_empty(ROWS, COLUMNS)
    triton_linear.linear(x, weight, out, bias=bias, cos=cos, sin=sin, length=35, rotated=256, sums=sums, tiling=WIDE)
    want = linear_rotary_reference(x, weight, cos, sin, 256 // head_dim, 35, bias, sums)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
def test_gelu_is_the_references(folded: bool) -> None:
    x, weight, bias = operands()
    sums, out = row_sums(x, 32) if folded else None, x.new_empty(ROWS, COLUMNS)
    triton_linear.linear(x, weight, out, bias=bias, gelu=True, sums=sums, tiling=WIDE)
    torch.testing.assert_close(out, linear_gelu_reference(x, weight, bias, sums), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequences", [0, 1, 7])
@pytest.mark.parametrize("summed", [False, True])
def test_residual_updates_are_the_references(sequences: int, summed: bool) -> None:
    x, weight, bias = operands()
    gate = normal(5, sequences, 3 * COLUMNS)[:, COLUMNS : 2 * COLUMNS] if sequences else normal(5, COLUMNS)
    outcomes = []
    for run in (linear_residual_reference, triton_linear.linear_residual):
        stream, sums = normal(6, ROWS, COLUMNS), torch.empty(COLUMNS // 64, 2, ROWS) if summed else None
        run(stream, x, weight, bias, gate, sums, *([] if run is linear_residual_reference else [NARROW]))
        outcomes.append((stream, sums) if summed else (stream,))
    for want, got in zip(*outcomes):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("length", [128, 100, 300])
@pytest.mark.parametrize("divided", [False, True])
def test_attention_is_the_references(length: int, divided: bool) -> None:
    """Whole tiles of keys, one in part and several; what follows a sequence is not seen, be it infinite."""
    query, key, value = normal(1, 2, length, 3, 2, 64).unbind(2)
    value[1] = float("inf")
    arrived = torch.zeros(2 * 2 * -(-length // 64) if divided else 0, dtype=torch.int32)
    got = triton_attention.attention(query, key, value, arrived, None)
    torch.testing.assert_close(got[0], attention_reference(query, key, value, arrived, None)[0], rtol=1e-5, atol=1e-5)
    assert not arrived.any()


def test_attention_with_a_mask_is_the_references() -> None:
    """Fewer queries than keys; where nothing is seen the result is 0."""
    query, (key, value) = normal(1, 3, 70, 2, 64), normal(2, 3, 140, 2, 2, 64).unbind(2)
    mask, none = normal(3, 3, 140) > 0.5, torch.zeros(0, dtype=torch.int32)
    mask[2] = False
    got = triton_attention.attention(query, key, value, none, mask)
    torch.testing.assert_close(got[:2], attention_reference(query, key, value, none, mask)[:2], rtol=1e-5, atol=1e-5)
    assert not got[2].any()
