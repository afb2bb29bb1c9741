"""`batch_invariant`: what is refused, and on a GPU the bits of texts in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import adapt, decoders
from mdkern.engine import resolve_batch_invariant
from mdkern.engine.graphs import mark_of
from mdkern.kernels.backbone import linear
from mdkern.kernels.invariant import batch_invariant, is_batch_invariant
from mdkern.models import DiT
from tests.conftest import random_dit

MASK = 10


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels ran on this CPU, where the mode then changes nothing."""
    monkeypatch.setattr(resolve_batch_invariant, "has_triton", lambda device: True)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("decoder", ["ancestral", "threshold"])
def test_the_whole_run_is_in_the_mode_and_nothing_else(monkeypatch: pytest.MonkeyPatch, decoder: str) -> None:
    model, seen = random_dit(), []
    hidden = DiT.hidden

    def noting(*arguments: Any) -> Tensor:
        seen.append(is_batch_invariant())
        return hidden(*arguments)

    monkeypatch.setattr(DiT, "hidden", noting)
    asked: dict[str, Any] = {"num_samples": 3, "length": 8, "steps": 4, "seed": 1, "decoder": decoder}
    want = mdkern.sample(model, **asked).sequences
    assert not any(seen)
    seen.clear()
    groups = mdkern.sample_groups(model, group_size=2, batch_invariant=True, **asked)
    outputs = []
    for output in groups:
        assert not is_batch_invariant()  # between two groups the caller has its own mode
        outputs.append(output.sequences)
    assert torch.equal(torch.cat(outputs), want)
    assert seen
    assert all(seen)


def test_graphs_of_the_two_modes_are_two() -> None:
    denoiser = adapt(random_dit())
    with batch_invariant():
        inside = mark_of(denoiser)
    assert inside != mark_of(denoiser)
    assert mark_of(denoiser) == mark_of(denoiser)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        mdkern.sample(random_dit(), length=4, batch_invariant=True)
    with pytest.raises(TypeError, match="batch_invariant must be True or False"):
        mdkern.sample(random_dit(), length=4, batch_invariant=2)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": decoders.ReMDM("conf")}, "ReMDM: it adds up"),
        ({"decoder": decoders.SoftParallel(), "temperature": 0.0}, "SoftParallel: it adds up"),
        ({"attention_mask": [[0, 1, 1, 1]]}, "padding after the text"),
    ],
)
def test_sums_over_columns_and_padding_in_front_are_refused(change: dict[str, Any], message: str) -> None:
    change = {name: torch.tensor(value) if name == "attention_mask" else value for name, value in change.items()}
    ids = torch.full((1, 4), MASK)
    with pytest.raises(ValueError, match=message):
        mdkern.sample(random_dit(), input_ids=ids, batch_invariant=True, **change)
    mdkern.sample(random_dit(), input_ids=ids, **change)


@pytest.mark.usefixtures("allowed")
def test_models_that_run_by_their_own_forward_are_refused() -> None:
    def model(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, 11).float()

    own = adapt(model, vocab_size=11, mask_id=MASK, max_length=8)
    with pytest.raises(ValueError, match="model H: its forward is not mdkern's own"):
        mdkern.sample(own, length=4, batch_invariant=True)
    hooked = random_dit()
    hooked.blocks[1].mlp_up.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"its module blocks\.1\.mlp_up is not as mdkern made it"):
        mdkern.sample(hooked, length=4, batch_invariant=True)
    with pytest.raises(ValueError, match=r"of torch\.float64"):
        mdkern.sample(random_dit().double(), length=4, batch_invariant=True)


# On a GPU.

SIZES: dict[str, dict[str, Any]] = {
    "folded": {"width": 256, "num_heads": 4, "num_blocks": 3},
    "timed": {"width": 256, "num_heads": 4, "num_blocks": 2, "time_conditioning": True, "cond_dim": 32},
    "narrow": {"width": 96, "num_heads": 3, "num_blocks": 2},
}
RUNS: dict[str, dict[str, Any]] = {
    "planned": {"decoder": "ancestral"},
    "filtered": {"decoder": "ancestral", "top_p": 0.9},
    "top probability": {"decoder": "top_probability"},
    "threshold": {"decoder": decoders.Threshold(0.1), "temperature": 0.7},
    "entropy bound": {"decoder": decoders.EntropyBound(3.0)},
    "cached": {"decoder": "threshold", "block_length": 8, "cache": "dual"},
    "guided": {"decoder": "ancestral", "guidance_scale": 1.5},
}
LENGTHS = [40, 17, 90, 64, 33, 70, 5, 128, 100, 12, 51, 77, 24, 96, 60, 111]


def texts(mask_id: int, most: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        length = min(length, most)
        row = torch.full((length,), mask_id)
        row[: length // 4] = torch.randint(mask_id, (length // 4,), generator=generator)
        rows.append(row)
    return rows


def run(
    model: Any, rows: list[Tensor], order: list[int], padding: int, **options: Any
) -> dict[int, tuple[Tensor, ...]]:
    """Tokens, and their log-probabilities, of some of the texts, by their numbers."""
    longest = max(len(rows[number]) for number in order) + padding
    ids = torch.full((len(order), longest), 1)
    mask = torch.zeros(len(order), longest, dtype=torch.long)
    for place, number in enumerate(order):
        ids[place, : len(rows[number])] = rows[number]
        mask[place, : len(rows[number])] = 1
    out = mdkern.sample(
        model, input_ids=ids.cuda(), attention_mask=mask.cuda(), sample_ids=order, seed=3, return_history=True,
        batch_invariant=True, **options,
    )  # fmt: skip
    own = [len(rows[number]) for number in order]
    results = zip(order, own, out.sequences, out.history.log_prob)
    return {number: (tokens[:length], scores[:length]) for number, length, tokens, scores in results}


def check_in_any_company(model: Any, rows: list[Tensor], paddings: tuple[int, ...], **options: Any) -> None:
    everyone = run(model, rows, list(range(16)), 0, **options)
    orders = [[7], [6], [2, 14, 3], list(reversed(range(16))), [15, 0, 9, 4, 1]]
    for order, padding, batch_size in zip(orders, paddings, (1, 16, 2, 5, 16)):
        for number, results in run(model, rows, order, padding, batch_size=batch_size, **options).items():
            for got, want in zip(results, everyone[number]):
                assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (number, order)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", RUNS)
def test_bits_of_texts_in_any_company(monkeypatch: pytest.MonkeyPatch, size: str, settings: str) -> None:
    monkeypatch.setattr(linear, "MOST_MIDDLE_ROWS", 200)  # so that texts alone and together have different kernels
    monkeypatch.setattr(linear, "MOST_ALIKE_ROWS", 500)
    shape = {"vocab_size": 2000, "mask_id": 1999, "max_length": 256}
    model = random_dit(1, **shape, **SIZES[size]).to("cuda", torch.bfloat16).requires_grad_(False)
    check_in_any_company(model, texts(1999, 128), (0, 37, 5, 1, 64), **RUNS[settings])


@pytest.mark.gpu
@pytest.mark.parametrize("settings", ["planned", "threshold", "cached"])
def test_bits_of_a_llama_in_any_company(settings: str) -> None:
    pytest.importorskip("transformers")
    from tests.problems.hf_models import LONGEST, MASK, adapted, llama

    denoiser = adapted(llama().to("cuda", torch.bfloat16), shifted=False)
    check_in_any_company(denoiser, texts(MASK, LONGEST - 5), (0, 3, 5, 1, 2), **RUNS[settings])
