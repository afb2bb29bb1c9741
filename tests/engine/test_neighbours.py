"""A sequence is what it is alone, whoever else is in the batch: its tokens, its steps, its models, its passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import decoders
from mdkern.engine.resolve import resolve
from mdkern.models import DiT
from tests.conftest import random_dit
from tests.test_sampling import OPEN

VOCAB, MASK = 20, 19
SETTINGS = {"vocab_size": VOCAB, "mask_id": MASK, "max_length": 40, "cond_dim": 8}
MODELS = {
    "H": random_dit(0, num_blocks=2, time_conditioning=True, **SETTINGS),
    "L": random_dit(1, num_blocks=1, **SETTINGS),
}
EVERY: dict[str, Any] = {
    "ancestral": decoders.Ancestral(0.1),
    "cosine": decoders.Ancestral(alpha="cosine"),
    "first hitting": decoders.FirstHitting(),
    "random": decoders.RandomRemask(),
    "sliding": decoders.Hyperschedule("sliding", 3),
    "genmd4": decoders.GenMD4(torch.linspace(0.3, 3.0, 40)),
    "top probability": decoders.TopProbability(),
    "dream": decoders.TopProbability(quota="dream"),
    "margin": decoders.Margin(),
    "entropy": decoders.Entropy(),
    "threshold": decoders.Threshold(0.3),
    "factor": decoders.Factor(1.5),
    "entropy bound": decoders.EntropyBound(1.0),
    "position aware": decoders.PositionAware(torch.full((VOCAB,), 1 / VOCAB)),
    "remdm": decoders.ReMDM("loop", eta=0.2),
    "edit": decoders.Edit(0.3, 0.1, 3),
}
FEW = ["ancestral", "first hitting", "random", "top probability", "threshold"]
# Of each sequence: length of the prompt, tokens to write, given tokens after them.
SHAPES = [(3, 13, 0), (2, 4, 0), (7, 9, 2), (1, 1, 0)]


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for prompt, written, rest in SHAPES:
        ids = torch.randint(VOCAB - 1, (prompt + written + rest,), generator=generator)
        ids[prompt : prompt + written] = MASK
        out.append(ids)
    return out


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows)) + 2
    ids, mask = torch.full((len(rows), longest), 3), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        first = {"left": longest - len(row), "right": 0, "both": (longest - len(row)) // 2}[side]
        ids[number, first : first + len(row)], mask[number, first : first + len(row)] = row, 1
    return ids, mask


def check(side: str = "left", **options: Any) -> mdkern.SampleOutput:
    """Each sequence is the same alone as with all the others; gives what they are together."""
    arguments: dict[str, Any] = {"schedule": mdkern.Schedule.sandwich(0.5), "seed": 3, "return_history": True}
    arguments |= options
    ids, mask = padded(texts(), side)
    together = mdkern.sample(MODELS, input_ids=ids, attention_mask=mask, batch_size=2, **arguments)
    for row, text in enumerate(texts()):
        alone = mdkern.sample(MODELS, input_ids=text[None], sample_ids=[row], **arguments)
        kept = mask[row].bool()
        assert alone.sequences[0].equal(together.sequences[row][kept]), row
        assert alone.history.step[0].equal(together.history.step[row][kept])
        assert alone.history.model[0].equal(together.history.model[row][kept])
        for field in ("steps", "lengths", "prompt_lengths"):
            assert int(getattr(alone, field)) == int(getattr(together, field)[row]), field
        assert int(alone.history.own_steps) == int(together.history.own_steps[row])
        assert {name: int(n) for name, n in alone.nfe.items()} == {n: int(p[row]) for n, p in together.nfe.items()}
        assert alone.stop_reason[0] == together.stop_reason[row]
    return together


@pytest.mark.slow
@pytest.mark.parametrize(("side", "block_length"), [("left", None), ("right", 4)])
@pytest.mark.parametrize("name", EVERY)
def test_steps_left_open(name: str, block_length: int | None, side: str) -> None:
    out = check(side, decoder=EVERY[name], block_length=block_length)
    lengths = [sum(shape) for shape in SHAPES]
    # 13 in blocks of 4: 4 of 4 steps; 4: 1 of 4; 9: 3 of 4; 1: 1 of 1
    assert out.history.own_steps.tolist() == ([16, 4, 12, 1] if block_length else lengths)


@pytest.mark.parametrize("name", FEW)
def test_steps_per_block(name: str) -> None:
    out = check("both", decoder=EVERY[name], block_length=4, steps_per_block=3)
    assert out.history.own_steps.tolist() == [12, 3, 9, 3]


@pytest.mark.parametrize("name", FEW)
def test_steps_given(name: str) -> None:
    """12 steps: a sequence has them all, however many blocks there are beside it."""
    options = {"decoder": EVERY[name], "block_length": 5, "schedule": "L3 H3 L6"}
    assert check(steps=12, **options).history.own_steps.tolist() == [12] * 4
    check(decoder=EVERY[name], schedule="L3 H3 L6")


@pytest.mark.parametrize(("side", "cache"), [("right", "prefix"), ("left", "dual")])
@pytest.mark.parametrize("name", ["top probability", "threshold", "edit"])
def test_caches(name: str, side: str, cache: str) -> None:
    check(side, decoder=EVERY[name], block_length=4, cache=cache)


@pytest.mark.parametrize("name", ["ancestral", "top probability", "edit"])
@pytest.mark.parametrize("block_length", [None, 4])
def test_ends_of_text(name: str, block_length: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {key: mdkern.adapt(model) for key, model in MODELS.items()}
    for model in models.values():
        model.eos_ids = (4, 7, 11)
    monkeypatch.setattr("tests.engine.test_neighbours.MODELS", models)
    out = check(decoder=EVERY[name], block_length=block_length, stop_at_eos=True)
    assert len(set(out.stop_reason)) == 2


def test_closing_passes_beside_texts_of_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most positions are left to the closing pass, which a text of few steps takes once, however many others have."""
    models = {key: mdkern.adapt(random_dit(n, num_blocks=1, eos_id=4, **SETTINGS)) for n, key in enumerate("HL")}
    monkeypatch.setattr("tests.engine.test_neighbours.MODELS", models)
    out = check(decoder=decoders.Ancestral(0.9), stop_at_eos=True)
    assert bool((sum(out.nfe.values()) <= out.history.own_steps + 1).all())


def test_sequences_of_different_steps_share_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = DiT.hidden

    def counted(model: DiT, input_ids: Tensor, *arguments: Any) -> Tensor:
        calls.append(len(input_ids))
        return plain(model, input_ids, *arguments)

    monkeypatch.setattr(DiT, "hidden", counted)
    ids, mask = padded(texts() * 4, "right")
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "batch_size": 4, "seed": 0}
    out = mdkern.sample(MODELS, mdkern.Schedule.sandwich(0.5), **options)
    assert out.nfe["H"].unique().numel() > 3
    passes = int(sum(out.nfe.values()).sum())
    assert sum(calls) == passes
    assert len(calls) < passes / 4 * 1.2


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 11, 24, 39])
def test_the_schedule_is_fitted_to_each_sequences_steps(steps: int) -> None:
    schedule = mdkern.Schedule.from_shares([("L", 0.3), ("H", 0.5), ("L", 0.2)])
    ids = torch.full((3, 40), MASK)
    mask = torch.arange(40) < torch.tensor([[steps], [7], [40]])
    asked = OPEN | {"input_ids": ids, "attention_mask": mask.long(), "seed": 0}
    request = resolve({"H": MODELS["L"], "L": MODELS["L"]}, None, schedule, **asked)
    assert request.steps.tolist() == [steps, 7, 40]
    first, second = (int(share * steps + 0.5) for share in (0.3, 0.8))
    assert request.edges[0].tolist() == [0, first, second, steps]
