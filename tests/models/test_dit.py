"""The DiT: pruning, padding, time, what it may never produce, and its count of operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdkern import DiT, DiTConfig, adapt

MakeDiT = Callable[..., DiT]
MASK = 10
SHAPES = [
    {},
    {"num_blocks": 1},
    {"num_blocks": 3, "num_heads": 1},
    {"time_conditioning": True, "cond_dim": 12},
    {"tie_head": True, "mlp_ratio": 3},
]


def ids_and_time(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(MASK + 1, (batch, length), generator=generator)
    return ids, torch.rand(batch, generator=generator).clamp(min=0.01)


def rows_of(hidden: Tensor, positions: Tensor) -> Tensor:
    return torch.stack([row[position] for row, position in zip(hidden, positions)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_pruned_rows_equal_the_full_pass(make_dit: MakeDiT, shape: dict[str, int], rows: int) -> None:
    model = make_dit(**shape)
    ids, t = ids_and_time(3, 16)
    positions = torch.randint(16, (3, rows), generator=torch.Generator().manual_seed(rows))  # any order, with repeats
    full = model.hidden(ids, t)
    torch.testing.assert_close(model.hidden(ids, t, positions), rows_of(full, positions), rtol=1e-5, atol=1e-5)


def test_pruned_rows_equal_the_full_pass_under_padding(make_dit: MakeDiT) -> None:
    model = make_dit()
    ids, _ = ids_and_time(2, 16)
    mask = torch.arange(16) < torch.tensor([[9], [16]])
    positions = torch.tensor([[8, 0, 8], [15, 3, 4]])
    full = model.hidden(ids, attention_mask=mask)
    pruned = model.hidden(ids, None, positions, mask)
    torch.testing.assert_close(pruned, rows_of(full, positions), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_does_not_reach_the_text(make_dit: MakeDiT, shape: dict[str, int], left: bool) -> None:
    """A padded sequence gives, where it is text, what it gives alone; left padding moves it by the rotary symmetry."""
    model = make_dit(**shape)
    ids, t = ids_and_time(4, 9)
    alone = model(ids, t)
    for count in (1, 7):
        padding, _ = ids_and_time(4, count, seed=1)
        padded = torch.cat((padding, ids) if left else (ids, padding), dim=1)
        text = torch.arange(9 + count) >= count if left else torch.arange(9 + count) < 9
        masked = model(padded, t, text.expand(4, -1))[:, text]
        torch.testing.assert_close(masked, alone, rtol=1e-4, atol=1e-4)
        unmasked = model(padded, t)[:, text]
        assert not torch.allclose(unmasked[..., :MASK], alone[..., :MASK], atol=1e-2)  # it is the mask that does it


def test_the_order_of_the_text_matters(make_dit: MakeDiT) -> None:
    """Without positions attention would be blind to it: reversed text would give the reversed logits."""
    model = make_dit()
    ids, _ = ids_and_time(2, 12)
    backwards = model(ids.flip(1)).flip(1)
    assert not torch.allclose(backwards[..., :MASK], model(ids)[..., :MASK], atol=1e-2)


def test_attention_looks_both_ways(make_dit: MakeDiT) -> None:
    model = make_dit(num_blocks=1)
    ids, _ = ids_and_time(1, 8)
    for changed in (0, 7):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % 11
        moved = (model(other) - model(ids))[0, :, :MASK].abs().amax(-1)
        assert (moved > 1e-4).all()


def test_time_is_required_and_is_used(make_dit: MakeDiT) -> None:
    model = make_dit(time_conditioning=True, cond_dim=12)
    ids, _ = ids_and_time(2, 8)
    with pytest.raises(ValueError, match="t must be given"):
        model(ids)
    times = torch.tensor([0.2, 0.9])
    both, early, late = model(ids, times), model(ids[:1], times[:1]), model(ids[1:], times[1:])
    torch.testing.assert_close(both, torch.cat((early, late)), rtol=1e-4, atol=1e-4)  # each sequence its own time
    assert not torch.allclose(both[..., :MASK], model(ids, times.flip(0))[..., :MASK], atol=1e-2)


def test_without_time_conditioning_time_changes_nothing(make_dit: MakeDiT) -> None:
    model = make_dit()
    ids, t = ids_and_time(2, 8)
    assert torch.equal(model(ids, t), model(ids))
    assert not any("time" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("vocab_size", "mask_id"), [(11, 10), (11, 0), (128, 77), (129, 128), (517, 3)])
@pytest.mark.parametrize("tie_head", [False, True])
def test_mask_and_padded_ids_can_never_be_produced(
    make_dit: MakeDiT, vocab_size: int, mask_id: int, tie_head: bool
) -> None:
    model = make_dit(vocab_size=vocab_size, mask_id=mask_id, tie_head=tie_head)
    ids = torch.arange(6)[None] % vocab_size
    logits = model(ids)
    assert logits.shape[-1] % 128 == 0
    assert logits.shape[-1] - vocab_size < 128
    never = torch.ones(logits.shape[-1], dtype=torch.bool)
    never[:vocab_size] = False
    never[mask_id] = True
    assert (logits[..., never] == -torch.inf).all()
    assert logits[..., ~never].isfinite().all()
    torch.testing.assert_close(adapt(model).logits(ids), logits)  # the split head says the same


def test_tied_head_is_the_embedding(make_dit: MakeDiT) -> None:
    tied, untied = make_dit(tie_head=True), make_dit(tie_head=False)
    assert tied.head_weight is tied.embedding
    assert untied.head_weight is not untied.embedding
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in (("tied", tied), ("untied", untied))}
    assert count["untied"] - count["tied"] == tied.embedding.numel()
    for moved in (tied.to(torch.bfloat16), tied.to(torch.float32)):
        assert moved.head_weight is moved.embedding
    ids = torch.tensor([[0, 1, 2, 4]])  # not id 3, whose embedding row only the head then reads
    bias = tied.head_bias[3].item()
    with torch.no_grad():
        once = tied(ids)[..., 3] - bias
        tied.embedding[3] *= 2
        torch.testing.assert_close(tied(ids)[..., 3] - bias, 2 * once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 6, 16])
def test_counted_operations(make_dit: MakeDiT, shape: dict[str, int], rows: int) -> None:
    """`DiT.flops` is what PyTorch counts on the pass that the sampler runs, the head at the same rows."""
    model = make_dit(**shape).requires_grad_(False)
    ids, t = ids_and_time(1, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model.hidden(ids, t, torch.arange(rows)[None]))
    assert model.flops(16, rows) == counter.get_total_flops()
    if rows == 16:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(ids, t)
        assert model.flops(16, rows) == counter.get_total_flops()


def test_operations_of_a_batch_add_up(make_dit: MakeDiT) -> None:
    model = make_dit().requires_grad_(False)
    ids, _ = ids_and_time(3, 12)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model.hidden(ids, None, torch.tensor([[0, 5], [1, 2], [11, 3]])))
    assert 3 * model.flops(12, 2) == counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_close_to_float32(make_dit: MakeDiT, shape: dict[str, int]) -> None:
    """Relative error of a few bf16 roundings (2^-8 each), on the pruned pass too."""
    exact, rounded = make_dit(**shape), make_dit(**shape).to(torch.bfloat16)
    ids, t = ids_and_time(4, 16)
    want = exact(ids, t)[..., :MASK]
    got = rounded(ids, t)
    assert got.dtype == torch.float32
    assert (got[..., :MASK] - want).norm() < 0.03 * want.norm()
    positions = torch.tensor([[2, 9]] * 4)
    pruned = rounded.logits(rounded.hidden(ids, t, positions))[..., :MASK].float()
    assert (pruned - want[:, [2, 9]]).norm() < 0.03 * want.norm()


def test_rotary_tables_stay_float32_and_follow_the_device(make_dit: MakeDiT) -> None:
    model = make_dit()
    angles = torch.outer(torch.arange(16.0), 10_000.0 ** (-torch.arange(0, 8, 2) / 8))
    for moved in (model.to(torch.bfloat16), model.double()):
        torch.testing.assert_close(moved.rotary[0], angles.cos())
        torch.testing.assert_close(moved.rotary[1], angles.sin())
    assert model.to("meta").rotary[0].device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 15}, "heads"),
        ({"width": 6, "num_heads": 2}, "even"),
        ({"mask_id": 11}, r"mask_id 11 must lie in 0\.\.10"),
        ({"mask_id": -1}, "mask_id -1"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTConfig(**({"vocab_size": 11, "mask_id": 10, "width": 16, "num_heads": 2} | changes))


def test_numpys_whole_numbers_are_whole_numbers() -> None:
    config = DiTConfig(vocab_size=np.int64(11), mask_id=np.int32(10), width=16, num_heads=2)
    assert config == DiTConfig(vocab_size=11, mask_id=10, width=16, num_heads=2)
    assert type(config.vocab_size) is int
