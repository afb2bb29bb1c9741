"""Many schedules at once: the samples are those of each schedule by itself, at fewer passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mdkern import Denoiser, DiT, Schedule, adapt, sample
from mdkern.engine.branches import run_schedules, share_of_passes

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")
SCHEDULES = [models for models in itertools.product("HL", repeat=4) if models.count("L") == 2]


def test_samples_are_those_of_every_schedule_alone(make_dit: Callable[..., DiT]) -> None:
    models = {"H": make_dit(seed=1), "L": make_dit(seed=2, num_blocks=1)}
    asked = {"num_samples": 5, "length": 12, "steps": 10, "batch_size": 3, "seed": 7}
    found = dict(run_schedules(models, SCHEDULES[::-1], **asked))
    assert list(found) == SCHEDULES
    for schedule, ids in found.items():
        alone = sample(models, Schedule.from_segments(schedule), **asked).sequences
        assert ids.equal(alone)
    assert len({tuple(ids.flatten().tolist()) for ids in found.values()}) == len(SCHEDULES)


def test_prompts_of_unequal_length_have_steps_of_their_own(make_dit: Callable[..., DiT]) -> None:
    models = {"H": make_dit(seed=1), "L": make_dit(seed=2), "M": make_dit(seed=3)}
    ids = torch.full((2, 9), 10)
    ids[0, :6] = torch.arange(6)
    schedules = [("H", "L", "M"), ("H", "M", "L"), ("M", "M", "M")]
    for schedule, out in run_schedules(models, schedules, input_ids=ids, seed=0):
        assert out.equal(sample(models, Schedule.from_segments(schedule), input_ids=ids, seed=0).sequences)


def test_what_schedules_share_is_run_once() -> None:
    passes = {"H": 0, "L": 0}

    def counted(name: str) -> Denoiser:
        def logits(input_ids: Tensor) -> Tensor:
            passes[name] += len(input_ids)
            return torch.zeros(*input_ids.shape, 4)

        return adapt(logits, vocab_size=4, mask_id=4)

    models = {"H": counted("H"), "L": counted("L")}
    passes.update(H=0, L=0)  # `adapt` has tried them
    asked = {"num_samples": 4, "length": 8, "steps": 8, "seed": 0}
    list(run_schedules(models, SCHEDULES, **asked))
    shared = sum(passes.values())
    passes.update(H=0, L=0)
    for schedule in SCHEDULES:
        sample(models, Schedule.from_segments(schedule), **asked)
    assert shared / sum(passes.values()) == pytest.approx(share_of_passes(SCHEDULES), abs=0.08)
    # HHLL 4, HLHL 3, HLLH 2, LHHL 4, LHLH 2, LLHH 3 segments of 6 x 4
    assert share_of_passes(SCHEDULES) == 18 / 24


@pytest.mark.parametrize(
    ("schedules", "more", "message"),
    [
        ([("H",), ("H", "L")], {}, "same number"),
        (SCHEDULES, {"decoder": "threshold"}, "looks at the model"),
        (SCHEDULES, {"stop_at_eos": True}, "stop_at_eos"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    make_dit: Callable[..., DiT], schedules: list[tuple[str, ...]], more: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(run_schedules({"H": make_dit(), "L": make_dit()}, schedules, length=8, **more))


def test_nothing_to_run_is_nothing(make_dit: Callable[..., DiT]) -> None:
    assert list(run_schedules({"H": make_dit()}, [])) == []
