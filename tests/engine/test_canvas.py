"""Canvases: step by step those of transformers' ``generate`` given the same noise; draws, ends, batches, refusals."""

# mypy: ignore-errors

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern.engine import canvas_run
from mdkern.engine.canvas import CanvasState
from mdkern.kernels import noise
from mdkern.kernels.head import reference
from mdkern.models.hf.block_diffusion import BlockDiffusion
from tests.problems.canvas_models import small_model

SEED = 7


class Noise:
    """Puts keyed noise in the place of `torch.randint` and `torch.multinomial` inside transformers' ``generate``."""

    def __init__(self, lengths: Tensor, canvas: int, vocab: int) -> None:
        self.lengths, self.canvas, self.vocab = lengths, canvas, vocab
        self.step = self.number = -1

    def keys(self) -> tuple[Tensor, Tensor]:
        sample = torch.arange(len(self.lengths))[:, None].expand(-1, self.canvas)
        return sample, (self.lengths + self.number * self.canvas)[:, None] + torch.arange(self.canvas)

    def randint(self, low: int, high: int, size: Any, device: Any) -> Tensor:
        assert (low, high, size) == (0, self.vocab, (len(self.lengths), self.canvas))
        sample, position = self.keys()
        return noise.uniform_ids(torch.tensor(SEED), sample, position, torch.full_like(sample, self.step + 1), high)

    def multinomial(self, probability: Tensor, num_samples: int) -> Tensor:
        self.step += 1
        sample, position = self.keys()
        keys = torch.stack((sample, position, torch.full_like(sample, self.step)), -1).view(-1, 3)
        return reference.sample_token(probability.log(), torch.tensor(SEED), keys)[:, None]


def theirs(model: Any, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, list]:
    """transformers' output, and of each step the accepted set, the new canvas and the most probable tokens."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    drawn = Noise(mask.sum(-1), model.config.canvas_length, model.config.text_config.vocab_size)
    steps: list[tuple[Tensor, ...]] = []
    own = model._denoising_step
    start = generation.EntropyBoundSampler.initialize_canvas

    def denoising_step(**given: Any) -> Any:
        new = own(**given)
        column = int(given["decoder_position_ids"][0, 0])
        steps.append((column, given["sampler"].accepted_token_mask, new[0], new[1]))
        return new

    def prepare(*args: Any, **given: Any) -> Any:
        drawn.step, drawn.number = -1, drawn.number + 1
        return type(model)._prepare_denoiser_inputs(model, *args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", drawn.randint)
        patch.setattr(torch, "multinomial", drawn.multinomial)
        patch.setattr(model, "_denoising_step", denoising_step)
        patch.setattr(model, "_prepare_denoiser_inputs", prepare)
        sampler = generation.EntropyBoundSamplerConfig(entropy_bound=options.pop("entropy_bound"))
        output = model.generate(ids, attention_mask=mask.long(), sampler_config=sampler, **options)
    assert start is generation.EntropyBoundSampler.initialize_canvas
    return output, steps


def ours(model: Any, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, list]:
    steps: list[tuple[Tensor, ...]] = []
    own = canvas_run.canvas_step

    def canvas_step(network: Any, state: CanvasState, *rest: Any) -> None:
        before = state.finished.clone()
        own(network, state, *rest)
        column = int(state.positions[0, 0])
        steps.append((column, state.accepted.clone(), state.canvas.clone(), state.argmax.clone(), before))

    with monkeypatch.context() as patch:
        patch.setattr(canvas_run, "canvas_step", canvas_step)
        output = mdkern.sample_canvas(model, ids, mask, seed=SEED, **options)
    return output, steps


CASES = {
    "all steps": {"entropy_bound": 1.0, "max_denoising_steps": 6, "max_new_tokens": 24, "sharpness": 3.0},
    "early ends": {
        "entropy_bound": 0.5,
        "max_denoising_steps": 12,
        "max_new_tokens": 24,
        "stability_threshold": 1,
        "confidence_threshold": 0.5,
        "sharpness": 12.0,
    },
    "stable for three steps": {
        "entropy_bound": 1.0,
        "max_denoising_steps": 20,
        "max_new_tokens": 8,
        "stability_threshold": 3,
        "confidence_threshold": 0.6,
        "sharpness": 25.0,
    },
    "no stability": {
        "entropy_bound": 0.3,
        "max_denoising_steps": 12,
        "max_new_tokens": 16,
        "stability_threshold": 0,
        "confidence_threshold": 0.4,
        "sharpness": 8.0,
    },
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_transformers(case: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(CASES[case])
    model = small_model(sharpness=options.pop("sharpness", 1.0))
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1, :4] = False
        ids[1, :4] = 0
    want, their_steps = theirs(model, ids, mask, monkeypatch, **options)
    got, our_steps = ours(model, ids, mask, monkeypatch, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert len(their_steps) >= len(our_steps)  # texts that have ended keep transformers waiting, and not us
    for column in {step[0] for step in our_steps}:
        their_canvas = [step[1:] for step in their_steps if step[0] == column]
        our_canvas = [step[1:] for step in our_steps if step[0] == column]
        for (accepted, canvas, argmax), (own_accepted, own_canvas, own_argmax, before) in zip(their_canvas, our_canvas):
            working = ~before
            assert torch.equal(own_accepted[working], accepted[working])
            assert torch.equal(own_canvas[working], canvas[working])
            assert torch.equal(own_argmax[working], argmax[working])
    if "stability_threshold" in options:
        early = [bool((later[4] & ~first[4]).any()) for first, later in pairwise(our_steps) if first[0] == later[0]]
        assert any(early), "the case has no early end"
    never_ended = ~torch.isin(want.sequences[:, ids.shape[1] :], torch.tensor([1, 2])).any(-1)
    torch.testing.assert_close(got.tokens_per_forward[never_ended], want.tokens_per_forward[never_ended])


def prompts(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(5))


SHORT = {"max_denoising_steps": 6, "max_new_tokens": 16, "entropy_bound": 1.0, "seed": SEED}


def test_samples_do_not_depend_on_the_batch() -> None:
    model, ids = small_model(sharpness=3.0), prompts(5)
    whole = mdkern.sample_canvas(model, ids, **SHORT)
    parts = mdkern.sample_canvas(model, ids, batch_size=2, **SHORT)
    assert torch.equal(whole.sequences, parts.sequences)
    assert torch.equal(whole.nfe["H"], parts.nfe["H"])
    alone = mdkern.sample_canvas(model, ids[3:4], sample_ids=[3], **SHORT)
    width = alone.sequences.shape[1]
    assert torch.equal(alone.sequences[0], whole.sequences[3, :width])


def test_padding_makes_no_difference() -> None:
    model, ids = small_model(sharpness=3.0), prompts(2)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(12) >= 3).expand(2, -1)
    want = mdkern.sample_canvas(model, ids, **SHORT)
    got = mdkern.sample_canvas(model, padded, mask, **SHORT)
    assert torch.equal(got.sequences[:, 3:], want.sequences)
    assert torch.equal(got.lengths, want.lengths)


def test_it_is_what_sample_calls() -> None:
    model, ids = small_model(sharpness=3.0), prompts(1)
    model.generation_config.max_new_tokens = 16
    want = mdkern.sample_canvas(model, ids, num_samples=2, seed=3, max_denoising_steps=4)
    got = mdkern.sample(model, input_ids=ids, num_samples=2, seed=3, steps=4)
    assert torch.equal(got.sequences, want.sequences)
    with pytest.raises(TypeError, match=r"give it to mdkern\.sample_canvas"):
        mdkern.adapt(model)
    with pytest.raises(ValueError, match="temperature cannot be given"):
        mdkern.sample(model, input_ids=ids, temperature=0.5)
    with pytest.raises(ValueError, match="input_ids must be given"):
        mdkern.sample(model, num_samples=2)


def test_the_first_step_has_the_exact_distribution() -> None:
    """A canvas of one position: what is drawn is from softmax(logits / t_max), whatever canvas of noise it had."""
    model = small_model(vocab=12, canvas=1, sharpness=4.0)
    model.generation_config.eos_token_id = None
    ids, count = prompts(1, 4) % 12, 3000
    drawn, started, laws = [], [], []
    own = canvas_run.canvas_step

    def canvas_step(network: Any, state: CanvasState, *rest: Any) -> None:
        started.append(state.canvas[:, 0].clone())
        own(network, state, *rest)
        drawn.append(state.canvas[:, 0].clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas_run, "canvas_step", canvas_step)
        mdkern.sample_canvas(
            model, ids, num_samples=count, max_new_tokens=1, max_denoising_steps=1, t_max=0.9, batch_size=count, seed=1
        )
    for canvas in range(12):
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[canvas]])).logits[0, 0].double()
        laws.append((logits / 0.9).softmax(-1))
    start = started[0]
    assert chi_square(torch.bincount(start, minlength=12), torch.full((12,), 1 / 12).double()) > 1e-3
    expected = sum((start == canvas).sum() / count * law for canvas, law in enumerate(laws))
    assert chi_square(torch.bincount(drawn[0], minlength=12), expected) > 1e-3
    wrong = sum((start == canvas).sum() / count * law.sqrt() / law.sqrt().sum() for canvas, law in enumerate(laws))
    assert chi_square(torch.bincount(drawn[0], minlength=12), wrong) < 1e-6


def chi_square(counts: Tensor, law: Tensor) -> float:
    """The p-value of counts under a law."""
    expected = law * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(law) - 1) / 2.0).double(), statistic / 2))


def test_noise_is_uniform_and_keyed() -> None:
    sample, position = torch.arange(50)[:, None], torch.arange(400)[None]
    ids = noise.uniform_ids(torch.tensor(3), *torch.broadcast_tensors(sample, position, torch.tensor([[2]])), vocab=7)
    assert chi_square(torch.bincount(ids.flatten(), minlength=7), torch.full((7,), 1 / 7).double()) > 1e-3
    big = noise.uniform_ids(torch.tensor(3), torch.arange(4000), torch.tensor(1), torch.tensor(0), vocab=262_144)
    assert 0 <= int(big.min()) < 1000
    assert 261_144 < int(big.max()) < 262_144


class Recorder:
    """A streamer that takes drafts."""

    def __init__(self) -> None:
        self.put_ids: list[Tensor] = []
        self.drafts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.put_ids.append(value)

    def put_draft(self, value: Tensor) -> None:
        self.drafts.append(value.clone())

    def end(self) -> None:
        self.ended = True


def test_streamers_get_drafts_and_canvases() -> None:
    model, streamer = small_model(sharpness=3.0), Recorder()
    model.generation_config.eos_token_id = None
    out = mdkern.sample_canvas(model, prompts(2), streamer=streamer, **SHORT)
    assert torch.equal(torch.cat(streamer.put_ids, dim=1), out.sequences)
    assert len(streamer.drafts) == 2 * 6
    assert torch.equal(streamer.drafts[-1], out.sequences[:, -8:])
    assert streamer.ended


def test_nothing_of_the_model_is_changed() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mdkern.sample_canvas(model, prompts(1), **SHORT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.model.decoder._forward_pre_hooks


def test_bad_logits_are_reported_and_the_others_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model(sharpness=3.0), prompts(3)
    want = mdkern.sample_canvas(model, ids, **SHORT)
    own = BlockDiffusion.hidden

    def hidden(self: BlockDiffusion, canvas: Tensor, *rest: Any) -> Tensor:
        states = own(self, canvas, *rest)
        states[1, 2] = torch.nan
        return states

    monkeypatch.setattr(BlockDiffusion, "hidden", hidden)
    with pytest.raises(FloatingPointError, match="sample 1: NaN or infinite logits in pass 0") as caught:
        mdkern.sample_canvas(model, ids, **SHORT)
    rest = caught.value.partial
    assert rest.sample_ids.tolist() == [0, 2]
    assert torch.equal(rest.sequences, want.sequences[[0, 2], : rest.sequences.shape[1]])


def test_what_makes_no_sense_is_refused() -> None:
    model, ids = small_model(), prompts(2)

    def refused(message: str, kind: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            mdkern.sample_canvas(model, options.pop("input_ids", ids), **options)

    refused("t_max must be above t_min", t_min=0.8, t_max=0.8)
    refused("entropy_bound must be", entropy_bound=-1.0)
    refused("max_new_tokens must be", max_new_tokens=0)
    refused("stability_threshold must be", stability_threshold=-1)
    refused("padding on the left only", attention_mask=torch.tensor([[1] * 9, [1] * 8 + [0]]))
    refused("does not fit the 2 rows", num_samples=3)
    refused("input_ids must lie in", input_ids=ids + 60)
    refused("takes no top_k", TypeError, top_k=3)
    refused("needs all samples in one batch", batch_size=1, streamer=Recorder())
    with pytest.raises(TypeError, match="needs a DiffusionGemmaForBlockDiffusion"):
        mdkern.sample_canvas(torch.nn.Linear(2, 2), ids)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:a step can't be captured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_graphs_give_what_eager_steps_give(dtype: torch.dtype) -> None:
    """One text, several, and padded ones; each twice, as the second call replays the first one's graphs."""
    model, ids = small_model(vocab=512, canvas=16, sharpness=4.0).to("cuda", dtype), prompts(3).cuda()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 48, "max_denoising_steps": 8, "entropy_bound": 3.0, "seed": SEED}
    for given in ((ids[:1], mask[:1]), (ids, torch.ones_like(ids)), (ids, mask)):
        want = mdkern.sample_canvas(model, *given, cuda_graphs=False, **options)
        for _ in range(2):
            got = mdkern.sample_canvas(model, *given, **options)
            assert torch.equal(got.sequences, want.sequences)
            assert torch.equal(got.nfe["H"], want.nfe["H"])
            assert not canvas_run._kept[model].passes.refused
