"""Block-causal models: what sees what, in whole passes and in the pass over a noisy and a clean text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mdkern import DiT, DiTConfig
from mdkern.models import dit_fused, dit_window, load_dit
from mdkern.models.block_causal import block_mask, paired_hidden, paired_mask, with_padding
from tests.conftest import SHAPE, random_dit

LENGTH, BLOCK, MASK = 16, 4, 10
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def model_and_ids(block_length: int = BLOCK) -> tuple[DiT, Tensor]:
    ids = torch.randint(MASK, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    return random_dit(num_blocks=3, block_causal=block_length), ids


def noised(ids: Tensor) -> Tensor:
    return torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.5, MASK, ids)


def test_four_tokens_in_blocks_of_two() -> None:
    rows = ["11000000", "11000000", "00111100", "00111100", "00001100", "00001100", "00001111", "00001111"]
    assert paired_mask(4, 2).int().tolist() == [[int(digit) for digit in row] for row in rows]
    assert block_mask(5, 2).int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0]] * 2 + [[1] * 5]


def test_a_block_sees_itself_and_what_comes_before() -> None:
    model, ids = model_and_ids()
    states = model.hidden(ids)
    for changed in range(LENGTH):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % MASK
        moved = (model.hidden(other) - states).abs().amax((0, 2)) > 1e-4
        assert moved.tolist() == [position // BLOCK >= changed // BLOCK for position in range(LENGTH)]


@pytest.mark.parametrize("length", [1, 3, 4, 6, 13])
def test_a_text_that_goes_on_changes_nothing_in_its_finished_blocks(length: int) -> None:
    model, ids = model_and_ids()
    whole = length // BLOCK * BLOCK
    torch.testing.assert_close(model.hidden(ids[:, :length])[:, :whole], model.hidden(ids)[:, :whole], **CLOSE)


def test_wanted_rows_equal_those_of_the_full_pass() -> None:
    model, ids = model_and_ids()
    positions = torch.tensor([[5, 0, 15, 5], [8, 9, 10, 11]])
    padding = torch.arange(LENGTH) < torch.tensor([[LENGTH], [12]])
    for mask in (None, padding):
        full = model.hidden(ids, attention_mask=mask)
        expected = torch.stack([row[position] for row, position in zip(full, positions)])
        torch.testing.assert_close(model.hidden(ids, None, positions, mask), expected, **CLOSE)


@pytest.mark.parametrize("blocks", [1, 2])
def test_padding_of_whole_blocks_changes_nothing(blocks: int) -> None:
    """On the right any number of columns, on the left whole blocks; also where a block is nothing but padding."""
    model, ids = model_and_ids()
    text = ids[:, : LENGTH - blocks * BLOCK]
    alone = model.hidden(text)
    padding = torch.full((2, blocks * BLOCK), 7)
    for left in (False, True):
        padded = torch.cat((padding, text) if left else (text, padding), 1)
        mask = (torch.arange(LENGTH) >= blocks * BLOCK) if left else (torch.arange(LENGTH) < text.shape[1])
        states = model.hidden(padded, attention_mask=mask.expand(2, -1))
        assert states.isfinite().all()
        torch.testing.assert_close(states[:, mask], alone, **CLOSE)


@pytest.mark.parametrize("length", [LENGTH, 14])
@pytest.mark.parametrize("block_length", [1, 4, 5, 16])
def test_one_pass_over_both_texts_is_a_pass_for_each_block(length: int, block_length: int) -> None:
    """Against passes of [clean blocks before, noisy block] by a model that sees all that it is given."""
    model, ids = model_and_ids(block_length)
    ids = ids[:, :length]
    noisy = noised(ids)
    states = paired_hidden(model, noisy, ids)
    assert states.shape == (2, length, model.config.width)
    for first in range(0, length, block_length):
        block = slice(first, min(first + block_length, length))
        own = model.hidden(torch.cat((ids[:, :first], noisy[:, block]), 1))[:, block]
        torch.testing.assert_close(states[:, block], own, **CLOSE)


def test_a_block_as_long_as_the_text_is_attention_to_all_of_it() -> None:
    model, ids = model_and_ids(LENGTH)
    everything = random_dit(num_blocks=3)
    torch.testing.assert_close(model.hidden(ids), everything.hidden(ids), **CLOSE)
    torch.testing.assert_close(paired_hidden(model, noised(ids), ids), everything.hidden(noised(ids)), **CLOSE)


PADDING = [None, torch.arange(LENGTH) < torch.tensor([[13], [9]]), torch.arange(LENGTH) >= torch.tensor([[4], [0]])]


@pytest.mark.parametrize("mask", PADDING)
@pytest.mark.parametrize("positions", [None, torch.tensor([[4, 7, 12], [8, 6, 5]])])
def test_the_pass_for_gpus_has_the_same_mask(mask: Tensor | None, positions: Tensor | None) -> None:
    model, ids = model_and_ids()
    with torch.no_grad():
        ours = dit_fused.hidden(model, ids, None, positions, with_padding(model.own_mask(LENGTH), mask))
        theirs = model.plain_hidden(ids, None, positions, mask)
    seen = slice(None) if mask is None or positions is not None else mask
    torch.testing.assert_close(ours[seen], theirs[seen], **CLOSE)


@pytest.mark.parametrize("run", [dit_window.plain_window_hidden, dit_window.fused_window_hidden])
@pytest.mark.parametrize("mask", PADDING)
def test_windows_of_whole_blocks_are_exact(run: object, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From left to right, of one block or several, each sequence at its own; whatever lies behind, or was there."""
    model, ids = model_and_ids()
    full = model.plain_hidden(ids, attention_mask=mask)
    cache = torch.randn(dit_window.cache_shape(model.config, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(dit_window, "plain_window_hidden", run)
    firsts, widths = ([0, 0], [4, 0], [8, 4], [8, 12]), (4, 4, 8, 4)
    for first, width in zip(firsts, widths):
        columns = torch.tensor(first)[:, None] + torch.arange(width)
        positions = torch.tensor([[0, width - 1, 1], [2, 2, 0]])
        with torch.no_grad():
            states = dit_window.window_hidden(
                model, cache, ids.gather(1, columns), columns, positions, attention_mask=mask
            )
        wanted = columns.gather(1, positions)
        seen = torch.ones_like(wanted, dtype=torch.bool) if mask is None else mask.gather(1, wanted)
        expected = full.gather(1, wanted[..., None].expand(-1, -1, full.shape[-1]))
        torch.testing.assert_close(states[seen], expected[seen], **CLOSE)
        assert states.isfinite().all()


def test_the_block_length_is_saved(tmp_path: Path) -> None:
    model, ids = model_and_ids()
    model.save_pretrained(tmp_path / "model")
    loaded = load_dit(tmp_path / "model")
    assert loaded.config.block_causal == BLOCK
    assert torch.equal(loaded.hidden(ids), model.hidden(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_causal": 0}, "block_causal must be at least 1"),
        ({"block_causal": 4.0}, "whole number"),
        ({"block_causal": True}, "whole number"),
        ({"block_causal": 4, "time_conditioning": True}, "time_conditioning=False"),
    ],
)
def test_impossible_blocks_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTConfig(**(SHAPE | changes))


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [256, 301])
def test_gpu_passes_are_as_exact_as_the_modules(padded: bool, length: int) -> None:
    """In bfloat16, the passes over whole texts and over windows against float64."""
    shape = {"vocab_size": 400, "mask_id": 399, "width": 256, "num_heads": 4, "max_length": 512, "num_blocks": 3}
    exact = random_dit(block_causal=32, **shape).to("cuda", torch.bfloat16).double()
    model = random_dit(block_causal=32, **shape).to("cuda", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(399, (3, length), generator=generator).cuda()
    mask = None
    if padded:
        column = torch.arange(length, device="cuda")
        mask = torch.stack((column < 170, column >= 64, column < length))
    columns = torch.tensor([64, 128, 96], device="cuda")[:, None] + torch.arange(32, device="cuda")
    positions = torch.arange(0, 32, 5, device="cuda").expand(3, -1)
    wanted = columns.gather(1, positions)
    cache = torch.zeros(dit_window.cache_shape(model.config, 3, length), dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        assert dit_fused.covers(model)
        want = exact.hidden(ids, None, wanted, mask)
        bound = 2 * float((model.plain_hidden(ids, None, wanted, mask) - want).norm())
        assert float((model.hidden(ids, None, wanted, mask) - want).norm()) < bound
        dit_window.window_hidden(model, cache, ids, None, positions, attention_mask=mask)
        window = ids.gather(1, columns)
        states = dit_window.window_hidden(model, cache, window, columns, positions, attention_mask=mask)
        assert float((states - want).norm()) < bound
