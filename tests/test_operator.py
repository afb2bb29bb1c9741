"""`mdkern.kernels.operator`: one signature becomes the schema, and reaches every implementation whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mdkern.kernels.operator import operator


class Affine(NamedTuple):
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0


def affine_for_tests(x: Tensor, affine: Affine, times: int = 1) -> tuple[Tensor, Tensor]:
    assert isinstance(affine, Affine)
    y = affine.scale * (x @ affine.weight) * times
    return y if affine.bias is None else y + affine.bias, x.sum()


def empty(x: Tensor, affine: Affine, times: int = 1) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], affine.weight.shape[1]), x.new_empty(())


AFFINE = operator(affine_for_tests, empty, kernels="tests.test_operator:affine_for_tests")


def add_for_tests(total: Tensor, part: Tensor) -> None:
    total += part


ADD = operator(add_for_tests, lambda total, part: None, kernels="tests.test_operator:add_for_tests", mutates=("total",))


def test_the_schema_is_the_signature_with_bundles_laid_flat() -> None:
    schema = str(torch.ops.mdkern.affine_for_tests.default._schema)
    arguments = "Tensor x, Tensor weight, Tensor? bias=None, float scale=1., SymInt times=1"
    assert schema == f"mdkern::affine_for_tests({arguments}) -> (Tensor, Tensor)"
    assert str(torch.ops.mdkern.add_for_tests.default._schema).startswith("mdkern::add_for_tests(Tensor(a0!) total,")


@pytest.mark.parametrize("affine", [Affine(torch.ones(3, 2)), Affine(torch.ones(3, 2), torch.ones(2), 0.5)], ids=len)
def test_every_implementation_gets_the_bundle_and_the_defaults(affine: Affine) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for arguments in ((x, *affine), (x, *affine, 3)):
        for got, want in zip(AFFINE(*arguments), affine_for_tests(x, affine, *arguments[4:])):
            torch.testing.assert_close(got, want)
        torch.library.opcheck(AFFINE, arguments)
    torch.library.opcheck(AFFINE, (x, affine.weight))  # PyTorch leaves the defaults out


def test_the_compiler_is_kept_out_of_operators_where_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    hidden = []

    def hide(function: Any, **_: Any) -> Any:
        hidden.append(function)
        return function

    def one_more_for_tests(x: Tensor) -> Tensor:
        return x + 1

    monkeypatch.setattr(torch._dynamo, "disable", hide)
    one_more = operator(one_more_for_tests, torch.empty_like, kernels="")
    for _ in range(2):
        assert one_more(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert len(hidden) == 1


def test_fields_whose_names_are_taken_get_the_parameters_name() -> None:
    schema = str(torch.ops.mdkern.divergence.default._schema)
    assert "Tensor hidden, Tensor? weight, Tensor? bias" in schema
    assert "Tensor other_hidden, Tensor? other_weight, Tensor? other_bias" in schema


def test_what_is_written_in_place_is_declared() -> None:
    total = torch.ones(3)
    ADD(total, torch.ones(3))
    assert total.tolist() == [2.0, 2.0, 2.0]
    torch.library.opcheck(ADD, (total, torch.ones(3)))
