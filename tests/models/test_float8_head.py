"""`head_precision="fp8"`: what is drawn is drawn from the rounded weight, exactly; the model itself stays as it is."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import graphs
from mdkern.digest import model_digest
from mdkern.engine.graphs import mark_of
from mdkern.models import Denoiser, DiT, Head, adapt, float8_head
from mdkern.models.shard import Shard
from mdkern.models.sharded import ShardedDenoiser
from tests.conftest import random_dit
from tests.problems.hf_models import MODELS, adapted, by_logits, random_ids, starts

VOCAB = 300
SIZE: dict[str, Any] = {"vocab_size": VOCAB, "mask_id": VOCAB - 1, "max_length": 12, "eos_id": 7}
RUNS: dict[str, dict[str, Any]] = {
    "planned": {"temperature": 0.7},
    "greedy": {"temperature": 0.0, "steps": 5},
    "filtered": {"top_p": 0.8, "top_k": 40},
    "step by step": {"decoder": "threshold", "of": None},
    "cached": {"decoder": "top_probability", "block_length": 4, "steps_per_block": 2, "cache": "dual"},
    "processed": {"logits_processor": lambda ids, scores: scores - 2.0 * (torch.arange(scores.shape[-1]) % 2)},
    "guided": {"guidance_scale": 1.5, "steps": 6},
}


def rounded(denoiser: Denoiser) -> Tensor:
    """What the weight of a denoiser's output layer stands for."""
    head = denoiser.head
    assert head.weight is not None
    assert head.weight_scale is not None
    return (head.weight.double() * head.weight_scale.double()[:, None]).float()


def with_rounded_head(model: DiT) -> DiT:
    """A copy whose output layer has the rounded weight; the embedding is the model's."""
    other = copy.deepcopy(model)
    other.head_weight = torch.nn.Parameter(rounded(adapt(model, head_precision="fp8")))
    return other


def check_rounding(denoiser: Denoiser, weight: Tensor) -> None:
    """Within half a step of e4m3: 1/16 of an entry, or 2^-10 of a scale by which the largest entry is 448."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448.0
    error = (rounded(denoiser) - weight.float()).abs()
    assert (error <= (weight.float().abs() / 16).maximum(scale * 2.0**-10) * 1.0001).all()


def draw(model: Any, **options: Any) -> mdkern.SampleOutput:
    options = {name: value for name, value in options.items() if value is not None}
    return mdkern.sample(model, **({"num_samples": 3, "length": 12, "seed": 5, "progress": False} | options))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("tied", [False, True])
def test_samples_are_those_of_the_rounded_weight(run: str, tied: bool) -> None:
    """In float32, in which near-ties are rare."""
    model = random_dit(2, **SIZE, tie_head=tied)
    got = draw(adapt(model, head_precision="fp8"), **RUNS[run]).sequences
    assert torch.equal(got, draw(with_rounded_head(model), **RUNS[run]).sequences)


def test_samples_are_not_those_of_the_weight_before() -> None:
    model = random_dit(2, **SIZE)
    many = {"num_samples": 40, "temperature": 1.5}
    got, before = (draw(one, **many).sequences for one in (adapt(model, head_precision="fp8"), model))
    assert 0.5 < float((got == before).double().mean()) < 1.0


def test_the_model_itself_is_not_changed() -> None:
    model = random_dit(2, **SIZE, tie_head=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    denoiser = adapt(model, head_precision="fp8")
    ids = torch.arange(12)[None]
    hidden = denoiser.hidden(ids)
    draw(denoiser)
    assert torch.equal(hidden, adapt(model).hidden(ids))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head_weight is model.embedding


@pytest.mark.parametrize("change", ["in place", "through data", "another parameter", "its dtype"])
def test_the_copy_follows_changes_of_the_weight(change: str) -> None:
    model = random_dit(2, **SIZE)
    denoiser = adapt(model, head_precision="fp8")
    before = rounded(denoiser)
    draw(denoiser)
    other = random_dit(3, **SIZE).head_weight.detach()
    if change == "in place":
        with torch.no_grad():
            model.head_weight.copy_(other)
    elif change == "through data":
        model.head_weight.data.copy_(other)
    elif change == "another parameter":
        model.head_weight = torch.nn.Parameter(other)
    else:  # and its place
        model.head_weight = torch.nn.Parameter(other.bfloat16())
        model.bfloat16()
    now = denoiser.current()
    check_rounding(now, model.head_weight.detach())
    assert float((rounded(now) - before).abs().mean()) > 0.01


def test_a_call_rounds_as_often_for_many_steps_as_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = list[int](), float8_head.in_float8

    def counted(*parts: Any) -> Head:
        calls.append(1)
        return plain(*parts)

    monkeypatch.setattr(float8_head, "in_float8", counted)
    model, counts = adapt(random_dit(2, **SIZE), head_precision="fp8"), []
    for steps in (1, 6):
        calls.clear()
        mdkern.sample(model, num_samples=2, length=12, steps=steps, decoder="top_probability", progress=False)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_graphs_find_the_copy_at_its_addresses() -> None:
    model = random_dit(2, **SIZE)
    first, second = (adapt(model, head_precision="fp8").current() for _ in range(2))
    assert mark_of(first) == mark_of(second) != mark_of(adapt(model).current())
    names = [name for name, _ in graphs.held()]
    assert "prepared weights" in names
    size = dict(graphs.held())["prepared weights"]
    assert size == model.head_weight.numel() + 4 * len(model.head_weight)
    graphs.clear()
    assert "prepared weights" not in [name for name, _ in graphs.held()]


def test_what_a_denoiser_tells() -> None:
    model = random_dit(2, **SIZE)
    plain, eight = adapt(model), adapt(model, head_precision="fp8", name="small")
    assert "e4m3" in repr(eight)
    assert "MiB more" in repr(eight)
    assert "e4m3" not in repr(plain)
    assert eight.name == "small"
    assert eight.eos_ids == (7,)
    assert adapt(eight) is adapt(eight, head_precision="fp8") is eight
    assert type(adapt(model, head_precision="bf16")) is type(plain)
    assert model_digest(eight) != model_digest(plain)  # so processes that differ in it are told
    assert type(adapt(plain, head_precision="fp8")) is type(eight)


@pytest.mark.parametrize("name", ["bert", "llama, tied", "dream", "llada, tied and scaled"])
def test_models_of_transformers(name: str) -> None:
    """With biases, tied embeddings, scales, logits of the position before: the logits are the rounded weight's."""
    plain = adapted(MODELS[name]())
    eight = adapt(plain.model, head_precision="fp8")
    ids = random_ids(2, 9)
    hidden = plain.hidden(ids)
    assert torch.equal(eight.hidden(ids), hidden)
    assert plain.head.weight is not None
    check_rounding(eight, plain.head.weight)
    exact = Head(rounded(eight), plain.head.bias, plain.head.scale, plain.head.soft_cap).logits(hidden)
    torch.testing.assert_close(eight.head.logits(hidden), exact, rtol=1e-5, atol=1e-5)
    out = mdkern.sample(eight, input_ids=starts(3), block_length=4, seed=7, progress=False)
    assert out.sequences.shape == (3, 12)


def test_likelihoods_and_divergences_are_those_of_the_rounded_weight() -> None:
    model = random_dit(2, **SIZE)
    eight, exact = adapt(model, head_precision="fp8"), with_rounded_head(model)
    ids = torch.randint(0, VOCAB - 1, (3, 12), generator=torch.Generator().manual_seed(1))
    got, want = (mdkern.likelihood(one, input_ids=ids, seed=3, progress=False) for one in (eight, exact))
    torch.testing.assert_close(got.nats, want.nats, rtol=1e-5, atol=1e-5)


class Own(Denoiser):
    """A user's denoiser around an output layer of any kind."""

    def __init__(self, weight: Tensor | None) -> None:
        self.vocab_size, self.mask_id, self.max_length = 20, 19, 8
        self.device, self.dtype = torch.device("cpu"), torch.float32 if weight is None else weight.dtype
        bias = torch.zeros(20)
        bias[19] = -torch.inf
        self.head = Head(weight, bias)

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        count = input_ids.shape[1] if positions is None else positions.shape[1]
        return torch.ones(len(input_ids), count, 4, dtype=self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_denoisers_of_ones_own(dtype: torch.dtype) -> None:
    weight = torch.zeros(20, 4, dtype=dtype)
    weight[13] = 3.0
    out = mdkern.sample(adapt(Own(weight), head_precision="fp8"), num_samples=2, length=8, seed=1, progress=False)
    assert int((out.sequences == 13).sum()) == 16  # probability 0.9999


def test_what_cannot_be_rounded_is_refused() -> None:
    model = random_dit(2, **SIZE)
    with pytest.raises(ValueError, match=r"head_precision must be 'bf16' .* or 'fp8', not 'int8'"):
        adapt(model, head_precision="int8")
    with pytest.raises(ValueError, match="must be given where the model is adapted"):
        adapt(adapt(model, head_precision="fp8"), head_precision="bf16")
    with pytest.raises(ValueError, match=r"of torch\.float64, and 16 or 32 floating bits are needed"):
        adapt(copy.deepcopy(model).double(), head_precision="fp8")
    with pytest.raises(ValueError, match="runs by its logits: it needs an output layer that mdkern runs"):
        adapt(by_logits(MODELS["bert"]()), head_precision="fp8")
    with pytest.raises(ValueError, match=r"of torch\.float8_e4m3fn, and 16 or 32"):
        adapt(Own(torch.ones(20, 4).to(torch.float8_e4m3fn)), head_precision="fp8")

    class Two:
        count = 2

    shard: Any = Shard(0, 256, None, Two())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whose vocabulary is divided: give shard_head the model"):
        adapt(ShardedDenoiser(adapt(model), shard), head_precision="fp8")
    part = ShardedDenoiser(adapt(model, head_precision="fp8"), shard).head
    assert part.weight is not None
    assert part.weight_scale is not None
    assert part.weight.shape[0] == len(part.weight_scale) == 256


def test_an_adapter_on_the_output_layer_is_refused_with_the_reason() -> None:
    """With a layer that computes something else than its weight says."""
    model = MODELS["llama"]()
    model.lm_head.register_forward_hook(lambda layer, given, output: output * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = adapt(model)
        if plain.head.weight is None:
            with pytest.raises(ValueError, match="runs by its logits because"):
                adapt(model, head_precision="fp8")
        else:  # a hook that is told apart as a scale
            eight = adapt(model, head_precision="fp8")
            assert eight.head.scale == plain.head.scale == 2.0


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [False, True])
def test_gpu_graphs_draw_from_the_weight_as_it_is(tied: bool) -> None:
    """A second call replays the first one's graphs, and draws what a new model with the second weight draws without."""
    size = SIZE | {"width": 128, "num_heads": 2, "vocab_size": 3000, "mask_id": 2999}
    model, other = (random_dit(seed, **size, tie_head=tied).cuda().bfloat16() for seed in (2, 3))
    denoiser = adapt(model, head_precision="fp8")
    first = draw(denoiser, num_samples=8).sequences
    kept = len(graphs.held())
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters()):
            mine.data.copy_(theirs)
    second = draw(denoiser, num_samples=8).sequences
    assert len(graphs.held()) == kept
    want = draw(adapt(other, head_precision="fp8"), num_samples=8, cuda_graphs=False).sequences
    assert torch.equal(second, want)
    assert not torch.equal(second, first)


@pytest.mark.gpu
def test_gpu_samples_are_those_of_the_rounded_weight() -> None:
    """In float32, but for near-ties, which are drawn the other way and then followed by other tokens."""
    model = random_dit(2, **SIZE).cuda()
    got, want = (
        draw(one, num_samples=20).sequences for one in (adapt(model, head_precision="fp8"), with_rounded_head(model))
    )
    assert float((got == want).double().mean()) > 0.95
