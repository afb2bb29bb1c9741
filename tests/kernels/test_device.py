"""What is asked of a device is asked in one place, and needs none of the others' answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mdkern
from mdkern.kernels import device

PREDICATES = ("get_device_capability", "get_device_properties", 'find_spec("triton")')


def test_every_question_is_asked_once() -> None:
    root = Path(mdkern.__file__).parent
    asking = {path.relative_to(root) for path in root.rglob("*.py") if any(p in path.read_text() for p in PREDICATES)}
    assert asking == {Path("kernels/device.py")}


@pytest.mark.parametrize(
    ("major", "triton", "hopper", "early"),
    [(7, False, False, False), (8, True, False, False), (9, True, True, True), (10, True, False, True)],
)
def test_what_a_card_can_do(
    monkeypatch: pytest.MonkeyPatch, major: int, triton: bool, hopper: bool, early: bool
) -> None:
    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(device, "find_spec", lambda _: object())
    questions = device.capability, device.has_triton, device.is_hopper, device.launches_early
    for question in questions:
        question.cache_clear()
    try:
        assert [question(gpu) for question in questions] == [major, triton, hopper, early]
    finally:
        for question in questions:
            question.cache_clear()


def test_a_cpu_has_no_kernels_of_its_own() -> None:
    cpu = torch.device("cpu")
    assert not device.has_triton(cpu)
    assert not device.is_hopper(cpu)
    assert not device.launches_early(cpu)


def test_bulk_copies_need_whole_aligned_rows() -> None:
    matrix = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert device.copies_in_bulk(matrix)
    assert device.copies_in_bulk(matrix[:, 8:])  # 16 bytes on
    assert not device.copies_in_bulk(matrix[:, 1:])
    assert not device.copies_in_bulk(torch.zeros(8, 63, dtype=torch.bfloat16))
    assert not device.copies_in_bulk(matrix.T)
