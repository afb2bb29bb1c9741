"""A run in groups gives the same samples in hardly more passes, and what is finished is not lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import decoders, sample, sample_groups
from mdkern.engine import graphs, groups, hooks
from tests.conftest import random_dit
from tests.references.slow_sampler import PairModel

LENGTH, VOCAB = 16, 7
MASK = VOCAB
MODELS = {"H": PairModel(LENGTH, VOCAB), "L": PairModel(LENGTH, VOCAB, seed=1)}
SCHEDULE = "L4 H8 L4"
DECODERS = ["ancestral", "top_probability", "threshold"]
pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")


def pair(watch: Callable[[Tensor], Any] = lambda _: None) -> dict[str, mdkern.Denoiser]:
    """Two models; `watch` sees the ids of every pass of a run, and may give other logits."""
    adapted = False

    def of(model: PairModel) -> Callable[[Tensor], Tensor]:
        def logits(input_ids: Tensor) -> Tensor:
            watched = watch(input_ids) if adapted else None
            return model.logits(input_ids).float() if watched is None else watched

        return logits

    models = {name: mdkern.adapt(of(model), vocab_size=VOCAB, mask_id=MASK) for name, model in MODELS.items()}
    adapted = True
    return models


def starts(count: int) -> Tensor:
    """Prompts of two ids each, all different for up to 49."""
    ids = torch.full((count, LENGTH), MASK)
    ids[:, 0], ids[:, 1] = torch.arange(count) // VOCAB, torch.arange(count) % VOCAB
    return ids


def options(count: int, decoder: str, **others: Any) -> dict[str, Any]:
    return {"input_ids": starts(count), "decoder": decoder, "seed": 3, "batch_size": 2, "return_history": True} | others


def one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "choose_groups", lambda request: ([slice(0, len(request.input_ids))], None))


def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "LEAST_PASSES", 1)
    monkeypatch.setattr(groups, "UNEVEN_BATCHES", 4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_groups_have_the_samples_of_one_run(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [7, 3, 9, 0, 1, 12, 4]
    arguments = options(7, decoder, sample_ids=numbers)
    parts = list(sample_groups(pair(), SCHEDULE, group_size=3, **arguments))
    one_group(monkeypatch)
    whole = sample(pair(), SCHEDULE, **arguments)
    assert [part.sample_ids.tolist() for part in parts] == [numbers[:3], numbers[3:6], numbers[6:]]
    assert torch.equal(torch.cat([part.sequences for part in parts]), whole.sequences)
    assert torch.equal(torch.cat([part.history.step for part in parts]), whole.history.step)
    assert [reason for part in parts for reason in part.stop_reason] == whole.stop_reason
    for name in "HL":
        assert torch.equal(torch.cat([part.nfe[name] for part in parts]), whole.nfe[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "count", "batch", "block_length"),
    [
        ("ancestral", 48, 4, None),
        ("ancestral", 90, 5, 4),
        ("top_probability", 45, 4, None),
        ("threshold", 128, 2, None),
    ],
)
def test_groups_take_hardly_more_passes(
    decoder: str, count: int, batch: int, block_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 3 % more, the samples are the same, and there are several groups."""
    sizes: list[int] = []
    models = pair(lambda ids: sizes.append(len(ids)))
    ids = starts(49).repeat(6, 1)[:count]
    arguments = options(count, decoder, input_ids=ids, batch_size=batch, block_length=block_length)
    found = list(sample_groups(models, SCHEDULE, **arguments))
    passes, largest = len(sizes), max(sizes)
    sizes.clear()
    one_group(monkeypatch)
    whole = sample(models, SCHEDULE, **arguments)
    assert len(found) > 1
    assert all(len(part.sequences) % batch == 0 for part in found[:-1])
    assert passes <= 1.03 * len(sizes)
    assert largest == batch
    assert torch.equal(torch.cat([part.sequences for part in found]), whole.sequences)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_output_is_that_of_one_run(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"H": random_dit(), "L": random_dit(1)}
    arguments = {"num_samples": 16, "length": 6, "seed": 0, "decoder": decoder, "batch_size": 2}
    small_groups(monkeypatch)
    ours = sample(models, "L2 H2 L2", **arguments)
    one_group(monkeypatch)
    whole = sample(models, "L2 H2 L2", **arguments)
    assert ours.keys() == whole.keys()
    assert whole.flops_saved is not None
    for name in set(ours.keys()) - {"timings"}:
        assert str(ours[name]) == str(whole[name])
    assert ours.timings.keys() == whole.timings.keys()
    assert sum(ours.timings.values()) < 2.0 * ours.timings["total"] + 1e-6


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_interrupt_keeps_what_is_finished(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch)
    arguments = options(32, decoder)
    seen: list[Tensor] = []
    whole = sample(pair(seen.append), SCHEDULE, **arguments)
    left = 3 * len(seen) // 4

    def interrupt(_: Tensor) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        sample(pair(interrupt), SCHEDULE, **arguments)
    partial = caught.value.partial
    assert 16 <= len(partial.sequences) < 32
    kept = partial.sample_ids
    assert torch.equal(partial.sequences, whole.sequences[kept])
    assert torch.equal(partial.history.step, whole.history.step[kept])
    assert torch.equal(partial.nfe["H"], whole.nfe["H"][kept])


def test_an_interrupt_before_anything_is_finished_leaves_an_empty_output() -> None:
    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        sample(pair(interrupt), SCHEDULE, **options(4, "ancestral"))
    assert caught.value.partial.sequences.shape == (0, LENGTH)
    assert caught.value.partial.sample_ids.tolist() == []


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("group_size", [4, 20])
def test_a_sample_without_tokens_takes_no_other_along(decoder: str, group_size: int) -> None:
    """One of ten gives NaN once its fifth position is written; it is named, with the step and the model."""

    def spoil(ids: Tensor) -> Tensor | None:
        bad = (ids[:, 1] == 5) & (ids[:, 4] != MASK)
        return torch.where(bad[:, None, None], torch.nan, MODELS["H"].logits(ids).float()) if bad.any() else None

    arguments = options(10, decoder, sample_ids=range(100, 110))
    arguments["input_ids"][:, 0], arguments["input_ids"][:, 1] = 0, torch.tensor([0, 1, 2, 5, 3, 4, 0, 1, 2, 3])
    others = torch.tensor([number for number in range(10) if number != 3])
    whole = sample(pair()["H"], **arguments)
    parts: list[mdkern.SampleOutput] = []
    running = sample_groups({"H": pair(spoil)["H"]}, "H16", group_size=group_size, **arguments)
    with pytest.raises(FloatingPointError, match=r"^sample 103, step \d+, position \d+: logits gave NaN"):
        parts.extend(running)
    assert torch.equal(torch.cat([part.sequences for part in parts]), whole.sequences[others])
    assert torch.equal(torch.cat([part.sample_ids for part in parts]), 100 + others)
    with pytest.raises(FloatingPointError) as caught:
        sample({"H": pair(spoil)["H"]}, "H16", **arguments)
    assert torch.equal(caught.value.partial.sequences, whole.sequences[others])


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_step_and_source_of_a_failure_are_named(decoder: str) -> None:
    """A processor that forbids everything for one sample is blamed, not the model."""

    def forbid(ids: Tensor, logits: Tensor) -> Tensor:
        return logits.masked_fill((ids[:, 1] == 2)[:, None], -torch.inf)

    message = r"^sample 2, step 0, position \d+: the logits processor forbade every id"
    arguments = options(5, decoder)
    if decoder == "ancestral":
        message = message.replace("step 0", r"step \d+")
    with pytest.raises(FloatingPointError, match=message) as caught:
        sample(pair(), SCHEDULE, logits_processor=forbid, **arguments)
    assert caught.value.partial.sample_ids.tolist() == [0, 1, 3, 4]
    assert torch.equal(caught.value.partial.sequences, sample(pair(), SCHEDULE, **arguments).sequences[[0, 1, 3, 4]])


def test_nothing_more_is_run_where_a_whole_group_fails() -> None:
    passes: list[int] = []

    def spoil(ids: Tensor) -> Tensor:
        passes.append(len(ids))
        return torch.full((*ids.shape, VOCAB), torch.nan)

    with pytest.raises(FloatingPointError, match=r"model L\) gave NaN or infinite logits, .*; 1 more failed"):
        list(sample_groups(pair(spoil), SCHEDULE, group_size=2, **options(40, "top_probability")))
    assert len(passes) == 2  # one pass of two samples, and one more to tell why


def test_arguments_are_checked_before_the_first_group_is_asked_for() -> None:
    passes: list[Tensor] = []
    with pytest.raises(ValueError, match="temperature"):
        sample_groups(pair(passes.append), SCHEDULE, **options(4, "ancestral", temperature=-1.0))
    with pytest.raises(ValueError, match="group_size must be a whole number of at least 1, not 0"):
        sample_groups(pair(passes.append), SCHEDULE, group_size=0, **options(4, "ancestral"))
    with pytest.raises(TypeError, match="top_a"):
        sample_groups(pair(passes.append), SCHEDULE, top_a=3, **options(4, "ancestral"))
    assert passes == []


class Recorder:
    """A streamer that fails at one of its texts."""

    def __init__(self, last: int = 1000) -> None:
        self.last, self.texts = last, 0
        self.drafts: list[Tensor] = []

    def put_draft(self, ids: Tensor) -> None:
        self.drafts.append(ids)

    def put(self, ids: Tensor) -> None:
        if self.texts == self.last:
            raise OSError("disk full")

    def end(self) -> None:
        self.texts += 1


def test_drafts_are_of_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "SECONDS_BETWEEN_DRAFTS", 0.0)
    recorder = Recorder()
    parts = list(sample_groups(pair(), SCHEDULE, group_size=2, streamer=recorder, **options(6, "ancestral")))
    assert recorder.texts == 6
    sequences = torch.cat([part.sequences for part in parts])
    left = [(draft == MASK).any(-1).tolist() for draft in recorder.drafts]
    assert [False, False, True, True, True, True] in left
    assert [False, False, False, False, True, True] in left
    for draft in recorder.drafts:
        assert torch.equal(draft, torch.where(draft == MASK, MASK, sequences))


def test_a_failing_streamer_leaves_the_group_that_it_was_given() -> None:
    with pytest.raises(OSError, match="disk full") as caught:
        list(sample_groups(pair(), SCHEDULE, group_size=2, streamer=Recorder(3), **options(6, "ancestral")))
    assert caught.value.partial.sample_ids.tolist() == [2, 3]
    with pytest.raises(OSError, match="disk full") as caught:
        sample(pair(), SCHEDULE, streamer=Recorder(3), **options(6, "ancestral"))
    assert caught.value.partial.sample_ids.tolist() == list(range(6))


def test_an_abandoned_iterator_runs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it compute: it may be closed by the garbage collector, which is about to clear the request's tensors."""
    passes: list[Tensor] = []
    iterator = sample_groups(pair(passes.append), SCHEDULE, group_size=2, **options(6, "top_probability"))
    next(iterator)
    before = len(passes)
    assert torch.is_grad_enabled()
    monkeypatch.setattr(groups, "summarise", lambda *_: pytest.fail("computed for nobody"))
    iterator.close()
    assert len(passes) == before == LENGTH - 2  # all masks, one a step, of both at once


@pytest.mark.parametrize("decoder", ["ancestral", "first_hitting", "threshold", "edit", decoders.ReMDM("cap", eta=0.5)])
@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 1.0}, {"block_length": 4}, {"cache": "dual", "block_length": 4}], ids=str
)
def test_failures_of_every_kind_of_pass_are_told(decoder: Any, options: dict[str, Any]) -> None:
    """Padded and timed sequences, one of them with an id that overflows wherever it is read."""
    if "cache" in options and decoder in ("ancestral", "first_hitting"):
        pytest.skip("no passes to keep keys and values of")
    model = random_dit(time_conditioning=True, cond_dim=8)
    with torch.no_grad():
        model.head_bias[5] = -1e4  # no other sequence comes to have it
    ids = torch.full((4, 12), model.config.mask_id)
    ids[:, 2], ids[2, 2] = 1, 5
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    arguments: dict[str, Any] = {"decoder": decoder, "seed": 0, "batch_size": 2, "attention_mask": mask} | options
    others = sample(model, input_ids=ids[[0, 1, 3]], sample_ids=[0, 1, 3], **(arguments | {"attention_mask": mask[:3]}))
    with torch.no_grad():
        model.embedding[5] = 3e38
    with pytest.raises(FloatingPointError, match=r"^sample 2, step \d+, position \d+: DiT-\d gave NaN") as caught:
        sample(model, input_ids=ids, **arguments)
    assert caught.value.partial.sample_ids.tolist() == [0, 1, 3]
    assert torch.equal(caught.value.partial.sequences, others.sequences)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", DECODERS)
def test_groups_share_graphs(decoder: str) -> None:
    """Few graphs serve all groups of a run, again in the next run, and the samples are those of an eager run."""
    model = random_dit().to("cuda")
    arguments: dict[str, Any] = {"num_samples": 168, "length": 12, "seed": 0, "decoder": decoder, "batch_size": 4}
    graphs.clear()
    parts = list(sample_groups(model, group_size=16, **arguments))
    assert [len(part.sequences) for part in parts] == [16] * 10 + [8]
    held = [name for name, _ in graphs.held()]
    assert len(held) <= 9  # the state; and two batch sizes by at most two widths and two numbers of rows
    list(sample_groups(model, group_size=16, **arguments))
    assert [name for name, _ in graphs.held()] == held
    eager = sample(model, cuda_graphs=False, **arguments)
    assert torch.equal(torch.cat([part.sequences for part in parts]), eager.sequences)
