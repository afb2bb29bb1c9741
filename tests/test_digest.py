"""Digests: equal for what is equal, different for what differs, whatever its place in memory."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from mdkern import adapt, decoders
from mdkern.digest import CHUNK, digest, model_digest, word_sum


class Settings:
    def __init__(self, value: Any) -> None:
        self.value, self.itself = value, self


def above(limit: float) -> Any:
    return lambda scores: scores > limit


DIFFERENT: list[Any] = [
    None, True, 1, 1.0, "1", b"1", [1], (1,), {1}, {1: 1}, [[1], 2], [1, [2]], [[1, 2]], {"a": 1, "b": 2},
    {"a": 2, "b": 1},
    torch.tensor([1, 2]), torch.tensor([2, 1]), torch.tensor([[1], [2]]), torch.tensor([1, 2], dtype=torch.int32),
    torch.tensor([0.0]), torch.tensor([-0.0]), torch.tensor([float("nan")]), torch.ones(2, dtype=torch.bfloat16),
    np.array([1, 2]), np.array([2, 1]), decoders.Threshold(0.5), decoders.Threshold(0.6), decoders.Factor(0.5),
    decoders.GenMD4(torch.tensor([1.0, 2.0])), decoders.GenMD4(torch.tensor([2.0, 1.0])), Settings(1), Settings(2),
    above(1.0), above(2.0), partial(above, 1.0), partial(above, 2.0), Settings(1).__init__, torch.float16, int,
    Settings,
]  # fmt: skip


def test_what_differs_has_another_digest() -> None:
    digests = [digest(value) for value in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("value", "same"),
    [
        ({"a": 1, "b": {2, 3}}, {"b": {3, 2}, "a": 1}),
        (torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T.contiguous()),
        (decoders.Threshold(0.5), decoders.Threshold(0.5)),
        (Settings([1]), Settings([1])),
        (above(1.0), above(1.0)),
    ],
)
def test_what_is_the_same_has_the_same_digest(value: Any, same: Any) -> None:
    assert digest(value) == digest(same)


def test_another_process_gives_the_same_digest() -> None:
    """Strings hash differently there, and objects lie elsewhere."""
    value = "{'a': {'x', 'y', 'z'}, 'decoder': decoders.Edit(0.01, 0.02, 2)}"
    code = f"from mdkern import decoders; from mdkern.digest import digest; print(digest({value}))"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert theirs == digest({"a": {"x", "y", "z"}, "decoder": decoders.Edit(0.01, 0.02, 2)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("count", [1, 7, 8, 1001])
def test_any_change_of_a_weight_changes_its_sum(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    weight = torch.randint(0, 2, (count,), generator=generator).to(dtype)
    weight[0] = 1
    before = int(word_sum(weight))
    assert int(word_sum(weight.clone())) == before
    changed = weight.clone()
    changed[0] = 0
    assert int(word_sum(changed)) != before
    if count > 1:
        moved = torch.cat((weight[weight == 0], weight[weight != 0]))  # the same elements in another order
        assert int(word_sum(moved)) != before


def test_exchanged_elements_change_the_sum() -> None:
    """All exchanges of two words of a few with few bits set, which a sum weighted by place alone might miss."""
    words = torch.tensor([1 << shift for shift in range(0, 62, 5)])
    sums = {int(word_sum(words))}
    for first in range(len(words)):
        for second in range(first):
            other = words.clone()
            other[first], other[second] = words[second], words[first]
            sums.add(int(word_sum(other)))
    assert len(sums) == 1 + len(words) * (len(words) - 1) // 2


def test_chunks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33)
    whole = int(word_sum(weight))
    monkeypatch.setattr("mdkern.digest.CHUNK", 4)
    assert CHUNK > 4
    assert int(word_sum(weight)) == whole
    assert int(word_sum(weight[1:])) != whole  # an address that is no multiple of eight


@pytest.mark.parametrize("name", ["head_weight", "blocks.1.mlp_up.weight", "embedding"])
def test_a_model_is_known_by_each_of_its_weights(make_dit: Any, name: str) -> None:
    model, same = make_dit(0), make_dit(0)
    assert model_digest(adapt(model)) == model_digest(adapt(same)) != model_digest(adapt(make_dit(1)))
    with torch.no_grad():
        rows = same.get_parameter(name)
        rows[[2, 3]] = rows[[3, 2]]
    assert model_digest(adapt(model)) != model_digest(adapt(same))


def test_a_model_is_known_by_its_configuration(make_dit: Any) -> None:
    """Two and four heads have the same weights."""
    two, four = make_dit(0), make_dit(0, num_heads=4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(two.parameters(), four.parameters()))
    assert model_digest(adapt(two)) != model_digest(adapt(four))


@pytest.mark.gpu
def test_the_gpu_gives_the_same_digest(make_dit: Any) -> None:
    model = make_dit(0).to(torch.bfloat16)
    here = model_digest(adapt(model))
    assert model_digest(adapt(model.cuda())) == here
