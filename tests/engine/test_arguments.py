"""Bad input is refused before the first forward pass, with a message that names the argument, what was given and what
is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TextIteratorStreamer

import mdkern
from mdkern import Ancestral, Denoiser, Schedule, adapt, sample
from mdkern.models import Head

VOCAB, MASK, WIDTH, LONGEST = 7, 6, 4, 16
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class CountingDenoiser(Denoiser):
    """Constant logits; counts its forward passes."""

    def __init__(self, vocab_size: int = VOCAB, mask_id: int = MASK, device: str = "cpu") -> None:
        self.vocab_size, self.mask_id, self.max_length = vocab_size, mask_id, LONGEST
        self.name, self.device, self.dtype = "counting", torch.device(device), torch.float32
        bias = torch.zeros(vocab_size)
        bias[mask_id] = -torch.inf
        self.head = Head(torch.zeros(vocab_size, WIDTH), bias)
        self.passes = 0

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        self.passes += 1
        return torch.zeros(*(input_ids if positions is None else positions).shape, WIDTH)

    def with_head(self, weight: Tensor) -> CountingDenoiser:
        self.head = Head(weight, self.head.bias)
        return self

    def with_bias(self, bias: Tensor) -> CountingDenoiser:
        self.head = Head(torch.zeros(len(bias), WIDTH), bias)
        return self


@dataclass
class Models:
    """Fresh denoisers of one case: two that fit together, and whatever else the case makes."""

    heavy: CountingDenoiser = field(default_factory=CountingDenoiser)
    light: CountingDenoiser = field(default_factory=CountingDenoiser)
    others: list[CountingDenoiser] = field(default_factory=list)

    def other(self, **options: Any) -> CountingDenoiser:
        self.others.append(CountingDenoiser(**options))
        return self.others[-1]

    @property
    def passes(self) -> int:
        return sum(denoiser.passes for denoiser in (self.heavy, self.light, *self.others))


@pytest.fixture
def models() -> Models:
    return Models()


def prompt(*ids: int) -> Tensor:
    return torch.tensor([ids])


RAGGED = torch.tensor([[MASK] * 6, [0, 0] + [MASK] * 4])  # in blocks of 2: 3 and 2
GOOD: dict[str, Any] = {"num_samples": 2, "length": 6, "steps": 4, "seed": 0, "progress": False}
WITH_PROMPT: dict[str, Any] = GOOD | {"num_samples": None, "length": None}
OPEN = prompt(1, MASK, 2, MASK)


def refuse(case: str, error: type[Exception], message: str, **options: Any) -> Any:
    """A call of `sample` with one good model and these options."""
    base = WITH_PROMPT if options.get("input_ids") is not None else GOOD
    return pytest.param(lambda m: sample(m.heavy, **(base | options)), error, message, id=case)


def refuse_call(
    case: str, error: type[Exception], message: str, call: Callable[[Models], Any], *marks: pytest.MarkDecorator
) -> Any:
    return pytest.param(call, error, message, id=case, marks=marks)


CASES = [
    # Models that do not fit together, or cannot be run.
    refuse_call(
        "vocabularies differ",
        ValueError,
        "models must share their vocab_size: L has 9, H has 7: their tokenizers differ",
        lambda m: sample(m.heavy, m.other(vocab_size=9), "H2 L2", **GOOD),
    ),
    refuse_call(
        "mask ids differ",
        ValueError,
        "models must share their mask_id: L has 5, H has 6: their tokenizers differ",
        lambda m: sample(m.heavy, m.other(mask_id=5), "H2 L2", **GOOD),
    ),
    refuse_call(
        "devices differ",
        ValueError,
        "models must share their device: L has meta, H has cpu: move one of them",
        lambda m: sample(m.heavy, m.other(device="meta"), "H2 L2", **GOOD),
    ),
    refuse_call(
        "devices differ, the odd one first",
        ValueError,
        "models must share their device: H has cpu, L has meta: move one of them",
        lambda m: sample(m.heavy, m.other(device="meta"), "L2 H2", **GOOD),
    ),
    refuse_call(
        "model without weights",
        ValueError,
        "model H is on the meta device, which holds no weights: load them first",
        lambda m: sample(m.other(device="meta"), **GOOD),
    ),
    refuse_call(
        "NaN in the weights",
        ValueError,
        "model L has NaN or infinite weights in head.weight",
        lambda m: sample(m.heavy, m.other().with_head(torch.full((VOCAB, WIDTH), torch.nan)), "L2 H2", **GOOD),
    ),
    refuse_call(
        "infinite weights",
        ValueError,
        "model H has NaN or infinite weights in head.weight",
        lambda m: sample(m.other().with_head(torch.full((VOCAB, WIDTH), -torch.inf)), **GOOD),
    ),
    refuse_call(
        "integer head",
        ValueError,
        "model H has a head of torch.int8: at least 16 floating bits are needed",
        lambda m: sample(m.other().with_head(torch.zeros(VOCAB, WIDTH, dtype=torch.int8)), **GOOD),
    ),
    refuse_call(
        "head of 8 bits",
        ValueError,
        "model H has a head of torch.float8_e4m3fn: at least 16 floating bits",
        lambda m: sample(m.other().with_head(torch.zeros(VOCAB, WIDTH).to(torch.float8_e4m3fn)), **GOOD),
    ),
    refuse_call(
        "model in training mode",
        ValueError,
        r"model L: model is in training mode.*call model\.eval\(\) first",
        lambda m: sample(m.heavy, nn.Embedding(VOCAB, VOCAB), "H2 L2", **GOOD),
    ),
    refuse_call(
        "no model",
        TypeError,
        r"model H: model must be loaded first: mdkern\.from_pretrained\('gpt2'\)",
        lambda m: sample("gpt2", **GOOD),
    ),
    refuse_call(
        "callable that is not described",
        ValueError,
        "model H: vocab_size must be given",
        lambda m: sample(lambda ids: ids, **GOOD),
    ),
    refuse_call(
        "no models",
        ValueError,
        "models must map at least one name, of letters only, to a model: it maps nothing",
        lambda m: sample({}, "H4", **GOOD),
    ),
    refuse_call(
        "name with a digit",
        ValueError,
        "models must map at least one name, of letters only, .* it maps 'H12', 'L'",
        lambda m: sample({"H12": m.heavy, "L": m.light}, "L4", **GOOD),
    ),
    refuse_call(
        "names that differ by case",
        ValueError,
        "model names must differ in more than their case: h, H",
        lambda m: sample({"h": m.heavy, "H": m.light}, "H4", **GOOD),
    ),
    # Schedules.
    refuse_call(
        "schedule and steps disagree",
        ValueError,
        r"schedule H2 L4 has 6 steps, but steps=4: make the two agree",
        lambda m: sample(m.heavy, m.light, "H2 L4", **GOOD),
    ),
    refuse_call(
        "unknown letter",
        ValueError,
        "schedule H2 X2 names X, but the models are H, L",
        lambda m: sample(m.heavy, m.light, "H2 X2", **GOOD),
    ),
    refuse_call(
        "empty schedule",
        ValueError,
        "schedule '' is not a list of names and step counts such as",
        lambda m: sample(m.heavy, m.light, "", **GOOD),
    ),
    refuse_call(
        "unreadable schedule",
        ValueError,
        r"schedule 'H2 \+ L2' is not a list of names and step counts such as",
        lambda m: sample(m.heavy, m.light, "H2 + L2", **GOOD),
    ),
    refuse_call(
        "part of no steps",
        ValueError,
        "schedule 'H4 L0' has a part of 0 steps: leave it out",
        lambda m: sample(m.heavy, m.light, "H4 L0", **GOOD),
    ),
    refuse_call(
        "schedule of another type",
        TypeError,
        "schedule must be a Schedule or a text such as 'L32 H192 L32', not list",
        lambda m: sample(m.heavy, m.light, ["H4"], **GOOD),
    ),
    refuse_call(
        "light without a schedule",
        ValueError,
        "schedule must be given to say when each of H, L runs",
        lambda m: sample(m.heavy, m.light, **GOOD),
    ),
    refuse_call(
        "schedule in the place of light",
        ValueError,
        "light must be a model, not",
        lambda m: sample(m.heavy, "H4", "H4", **GOOD),
    ),
    refuse_call(
        "light beside a mapping",
        ValueError,
        "light must not be given when the first argument is a mapping",
        lambda m: sample({"H": m.heavy}, m.light, "H4", **GOOD),
    ),
    refuse_call("share", ValueError, r"light_share must lie in 0\.\.1, not 1\.5", lambda m: Schedule.sandwich(1.5)),
    refuse_call("quarter", ValueError, "which must be 1, 2, 3 or 4, not 0", lambda m: Schedule.quarter(0)),
    refuse_call("shares", ValueError, "must be .* sum to 1", lambda m: Schedule.from_shares([("H", 0.5)])),
    # The prompt.
    refuse("id beyond", ValueError, r"input_ids must lie in 0\.\.6, but run from 6 to 7", input_ids=prompt(MASK, 7)),
    refuse("id below", ValueError, r"input_ids must lie in 0\.\.6, but run from -1 to 6", input_ids=prompt(MASK, -1)),
    refuse("float ids", TypeError, r"input_ids must be an integer tensor, not torch\.float32", input_ids=OPEN.float()),
    refuse("bool ids", TypeError, r"input_ids must be an integer tensor, not torch\.bool", input_ids=OPEN == MASK),
    refuse("ids in a list", TypeError, "input_ids must be an integer tensor, not list", input_ids=[[1, MASK]]),
    refuse("1-D ids", ValueError, r"input_ids must be \[N, L\] .* not \(4,\)", input_ids=OPEN[0]),
    refuse("3-D ids", ValueError, r"input_ids must be \[N, L\] .* not \(1, 1, 4\)", input_ids=OPEN[None]),
    refuse("no ids", ValueError, r"input_ids must be \[N, L\] .* at least 1, not \(1, 0\)", input_ids=OPEN[:, :0]),
    refuse(
        "ids elsewhere",
        ValueError,
        "input_ids is on meta, the model on cpu: move one of them",
        input_ids=OPEN.to("meta"),
    ),
    refuse(
        "nothing to reveal",
        ValueError,
        "input_ids row 1 has no masked position: put the mask id 6 where text is wanted",
        input_ids=torch.tensor([[1, MASK], [1, 2]]),
    ),
    refuse(
        "masks only under padding",
        ValueError,
        "input_ids row 0 has no masked position",
        input_ids=OPEN,
        attention_mask=torch.tensor([[1, 0, 1, 0]]),
    ),
    refuse(
        "attention_mask of another shape",
        ValueError,
        r"attention_mask must have input_ids' shape \(1, 4\), not \(4,\)",
        input_ids=OPEN,
        attention_mask=torch.ones(4),
    ),
    refuse(
        "attention_mask of another type",
        ValueError,
        r"attention_mask must have input_ids' shape \(1, 4\), not list",
        input_ids=OPEN,
        attention_mask=[[1, 1, 1, 1]],
    ),
    refuse(
        "attention_mask of other values",
        ValueError,
        r"attention_mask must hold 0 \(padding\) and 1 only, not values from 0 to 2",
        input_ids=OPEN,
        attention_mask=torch.tensor([[1, 2, 1, 0]]),
    ),
    refuse(
        "attention_mask elsewhere",
        ValueError,
        "attention_mask is on meta, input_ids on cpu: move one of them",
        input_ids=OPEN,
        attention_mask=torch.ones(1, 4, device="meta"),
    ),
    refuse("attention_mask alone", ValueError, "attention_mask needs input_ids", attention_mask=torch.ones(2, 6)),
    refuse(
        "rows and num_samples",
        ValueError,
        "num_samples=3 does not fit the 2 rows of input_ids",
        input_ids=OPEN.expand(2, -1),
        num_samples=3,
    ),
    refuse(
        "length beside input_ids",
        ValueError,
        "length=4 must not be given together with input_ids",
        input_ids=OPEN,
        length=4,
    ),
    refuse(
        "input_ids too long",
        ValueError,
        "input_ids' second dimension must be at most 16, the positions of counting, not 17",
        input_ids=torch.full((1, LONGEST + 1), MASK),
    ),
    refuse_call(
        "input_ids too long for light",
        ValueError,
        "input_ids' second dimension must be at most 3, the positions of counting, not 4",
        lambda m: (
            setattr(m.light, "max_length", 3),
            sample(m.heavy, m.light, "H2 L2", **(WITH_PROMPT | {"input_ids": OPEN})),
        ),
    ),
    refuse("too long", ValueError, "length must be at most 16, the positions of counting, not 17", length=LONGEST + 1),
    refuse_call(
        "no length known",
        ValueError,
        "length must be given: the model has no longest length",
        lambda m: (setattr(m.heavy, "max_length", None), sample(m.heavy, num_samples=1, steps=4)),
    ),
    # Numbers.
    *(
        refuse(
            f"{name}={value!r}",
            ValueError,
            f"{name} must be a whole number of at least 1, not {re.escape(repr(value))}",
            **{name: value},
        )
        for name in ("num_samples", "length", "steps", "batch_size")
        for value in (0, -3, True, 2.0, "4")
    ),
    *(
        refuse(
            f"temperature={value!r}",
            ValueError,
            f"temperature must be a finite number of at least 0, not {value!r}",
            temperature=value,
        )
        for value in (-0.1, float("nan"), float("inf"), True, "1", None)
    ),
    *(
        refuse(f"seed={value!r}", ValueError, rf"seed must be a whole number of 64 bits, not {value!r}", seed=value)
        for value in (1.5, "0", True, 2**63, -(2**63) - 1)
    ),
    refuse("seed and generator", ValueError, "seed and generator must not both be given", generator=torch.Generator()),
    refuse("generator", TypeError, r"generator must be a torch\.Generator, not int", seed=None, generator=3),
    refuse(
        "sample_ids too few", ValueError, r"sample_ids must be 2 whole numbers, not torch\.int64 \(1,\)", sample_ids=[0]
    ),
    refuse("sample_ids 2-D", ValueError, r"sample_ids must be 2 whole numbers, .* \(1, 2\)", sample_ids=[[0, 1]]),
    refuse("sample_ids floats", ValueError, r"sample_ids must be 2 whole numbers, .*float32", sample_ids=[0.0, 1.0]),
    refuse("sample_ids bools", ValueError, r"sample_ids must be 2 whole numbers, .*bool", sample_ids=[True, False]),
    refuse("sample_ids text", ValueError, "sample_ids must be 2 whole numbers, not 'ab'", sample_ids="ab"),
    refuse(
        "sample_ids negative",
        ValueError,
        r"sample_ids must lie in 0\.\.4294967295, but run from -1 to 3",
        sample_ids=[3, -1],
    ),
    refuse(
        "sample_ids large",
        ValueError,
        r"sample_ids must lie in 0\.\.\d+, but run from 0 to 4294967296",
        sample_ids=[0, 2**32],
    ),
    # Hooks.
    refuse("guidance", ValueError, "guidance_scale must be a finite number of at least 0, not -1", guidance_scale=-1),
    refuse("processor", TypeError, "logits_processor must be callable, as those of tr", logits_processor=[1]),
    refuse("criteria", TypeError, "stopping_criteria must be callable, as those of tr", stopping_criteria=3),
    refuse("streamer", TypeError, "streamer must have put and end, as those of tr", streamer=print),
    refuse("streamer's class", TypeError, "streamer must be made first: TextIter", streamer=TextIteratorStreamer),
    refuse(
        "criteria, no eos", ValueError, "stopping_criteria needs a model with eos_ids", stopping_criteria=lambda *_: 0
    ),
    # Decoders, blocks and devices.
    refuse("block_length", ValueError, "block_length must be a whole number of at least 1, not 0", block_length=0),
    refuse("cache", ValueError, "cache must be one of 'none', 'prefix', 'dual', 'block', not 'both'", cache="both"),
    refuse(
        "cache of another type",
        ValueError,
        "cache must be one of 'none', 'prefix', 'dual', 'block', not True",
        cache=True,
    ),
    refuse(
        "cache with an order drawn beforehand",
        ValueError,
        "cache='dual' needs a decoder that looks at the model, such as .*: a pass of Ancestral takes whatever",
        cache="dual",
        block_length=2,
    ),
    refuse(
        "cache without blocks",
        ValueError,
        "cache='prefix' needs a block_length, e.g. 32",
        cache="prefix",
        decoder="threshold",
    ),
    refuse(
        "cache of a model that has none",
        ValueError,
        r"cache='dual' needs models that can run a part of a sequence .* model H \(counting\) cannot",
        cache="dual",
        block_length=2,
        decoder="threshold",
    ),
    refuse(
        "steps and blocks",
        ValueError,
        "steps must be a multiple of the 3 blocks of row 0, not 4: e.g. 3, or give steps_per_block",
        block_length=2,
        steps=4,
    ),
    refuse_call(
        "steps and blocks of a shorter row",
        ValueError,
        "steps must be a multiple of the 2 blocks of row 1, not 3: e.g. 2, or give steps_per_block",
        lambda m: sample(m.heavy, input_ids=RAGGED, block_length=2, steps=3),
    ),
    refuse_call(
        "schedule and steps of a row",
        ValueError,
        "schedule H6 has 6 steps, but row 1 has 4: make them agree",
        lambda m: sample({"H": m.heavy}, "H6", input_ids=RAGGED, block_length=2, steps_per_block=2),
    ),
    refuse(
        "steps_per_block",
        ValueError,
        "steps_per_block must be a whole number of at least 1, not 0",
        steps=None,
        block_length=2,
        steps_per_block=0,
    ),
    refuse(
        "steps_per_block without blocks",
        ValueError,
        "steps_per_block needs a block_length, e.g. 32",
        steps=None,
        steps_per_block=2,
    ),
    refuse(
        "steps twice", ValueError, "steps and steps_per_block must not both be given", block_length=2, steps_per_block=2
    ),
    refuse("stop_at_eos", TypeError, "stop_at_eos must be True or False, not 1", stop_at_eos=1),
    refuse("no eos", ValueError, "stop_at_eos needs a model with eos_ids: counting has none", stop_at_eos=True),
    refuse(
        "decoder with a parameter of no default",
        ValueError,
        "decoder 'position_aware' has no default for frequency",
        decoder="position_aware",
    ),
    refuse("unknown decoder", ValueError, "decoder 'beam' is not known: there is ancestral", decoder="beam"),
    refuse(
        "no decoder",
        TypeError,
        r"decoder must be made first: Ancestral is a class, give Ancestral\(",
        decoder=Ancestral,
    ),
    refuse_call(
        "eps of 1",
        ValueError,
        r"eps must lie in \[0, 1\), not 1\.0",
        lambda m: sample(m.heavy, decoder=Ancestral(1.0), **GOOD),
    ),
    refuse_call(
        "eps below 0",
        ValueError,
        r"eps must lie in \[0, 1\), not -0\.1",
        lambda m: sample(m.heavy, decoder=Ancestral(-0.1), **GOOD),
    ),
    refuse_call(
        "eps NaN",
        ValueError,
        r"eps must lie in \[0, 1\), not nan",
        lambda m: sample(m.heavy, decoder=Ancestral(float("nan")), **GOOD),
    ),
    refuse_call(
        "pair on a GPU", ValueError, "device cuda was asked for, but", lambda m: mdkern.load_pair("cuda"), CPU_ONLY
    ),
    refuse_call("pair nowhere", ValueError, "device 'nowhere' is not known", lambda m: mdkern.load_pair("nowhere")),
    refuse_call(
        "pair in integers",
        ValueError,
        r"dtype must be a floating dtype such as torch\.bfloat16, not torch\.int8",
        lambda m: mdkern.load_pair("cpu", torch.int8),
    ),
    refuse_call(
        "callable on a GPU",
        ValueError,
        "device cuda was asked for, but the GPUs that PyTorch finds here are 0",
        lambda m: sample(adapt(m.heavy.hidden, vocab_size=WIDTH, mask_id=0, device="cuda"), **GOOD),
        CPU_ONLY,
    ),
    refuse_call(
        "denoiser on a GPU",
        ValueError,
        "device cuda:0 was asked for, but the GPUs that PyTorch finds here are 0",
        lambda m: sample(m.other(device="cuda:0"), **GOOD),
        CPU_ONLY,
    ),
    refuse("unknown keyword", TypeError, "unexpected keyword argument 'top_a'", top_a=5),
    *(
        refuse(f"{name}={value!r}", ValueError, f"{name} must be {wanted}, not {value!r}", **{name: value})
        for name, wanted, values in [
            ("top_k", "a whole number of at least 0", [-1, 2.5, True]),
            ("top_p", "a number above 0 and at most 1", [0, 1.5, float("nan")]),
            ("min_p", "a number from 0 to 1", [-0.1, 2]),
        ]
        for value in values
    ),
]


NUMBERS = torch.ones(2, dtype=torch.int64)
SECOND = torch.tensor([[0, 0, 1, 1]])
PADDED = torch.zeros(9).index_fill(0, torch.tensor(6), -torch.inf)
SPARSE = torch.ones(1, 4, dtype=torch.int64).to_sparse()
ITERATED = TextIteratorStreamer(tokenizer=None)
CASES += [
    *(
        refuse(f"{name}={value!r}", TypeError, f"{name} must be True or False, not", **{name: value})
        for name in ("return_history", "cuda_graphs", "stop_at_eos", "progress")
        for value in ("False", 0, torch.ones(2, 2))
    ),
    *(
        refuse(f"{name}={value!r}", ValueError, f"{name} must be {message}", **{name: value})
        for name, value, message in [
            ("temperature", 1e39, "at most 3.40282e"),
            ("temperature", 10**40, "at most 3.40282e"),
            ("temperature", 1j, "a finite number of at least 0"),
            ("guidance_scale", 1e308, "at most 1e"),
            ("steps", 2**63, "at most 2147483647"),
            ("steps", 2**24 + 1, "at most 16777216 for a sequence"),
            ("num_samples", 2**31, "at most 2147483647"),
            ("sample_ids", torch.tensor([1j, 2]), "2 whole numbers, not torch.complex64"),
        ]
    ),
    refuse("sparse ids", TypeError, "input_ids must be a dense tensor", input_ids=SPARSE),
    refuse("sparse mask", TypeError, "attention_mask must be a dense", input_ids=OPEN, attention_mask=SPARSE),
    refuse("sparse numbers", TypeError, "sample_ids must be a dense tensor", sample_ids=NUMBERS.to_sparse()),
    refuse("complex mask", TypeError, "attention_mask must be of", input_ids=OPEN, attention_mask=OPEN * 1j),
    refuse(
        "segments",
        ValueError,
        "token_type_ids must be all 0",
        input_ids=OPEN,
        token_type_ids=torch.tensor([[0, 0, 1, 1]]),
    ),
    refuse("a filter of greedy draws", ValueError, "left out at temperature 0", temperature=0.0, top_p=0.9),
    refuse("greedy, ranked by the model", ValueError, "left out", temperature=0, top_k=2, decoder="top_probability"),
    refuse("segments without ids", ValueError, "token_type_ids must be", token_type_ids=torch.zeros(2, 6)),
    refuse("two texts to iterate over", ValueError, "ends with the first text, and 2 samples", streamer=ITERATED),
    refuse_call(
        "a head that lets the mask win",
        ValueError,
        "model H could draw its mask id 6: set its head's bias to -inf there",
        lambda m: sample(m.other().with_bias(torch.zeros(VOCAB)), **GOOD),
    ),
    refuse_call(
        "padded ids that are open",
        ValueError,
        "model H could draw an id beyond its vocabulary, 8",
        lambda m: sample(m.other(vocab_size=8).with_bias(PADDED), **GOOD),
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_refused_before_the_first_forward_pass(
    models: Models, call: Callable[[Models], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call(models)
    assert type(caught.value) is error
    assert models.passes == 0


def test_the_calls_that_the_cases_spoil_are_good(models: Models) -> None:
    """Otherwise a case could be refused for another reason than its own."""
    for arguments in ((), (models.light, "H2 L2")):
        assert sample(models.heavy, *arguments, **GOOD).sequences.shape == (2, 6)
    mask = torch.tensor([[1, 1, 1, 0]])
    assert sample(models.heavy, input_ids=OPEN, attention_mask=mask, **WITH_PROMPT).sequences[0, 3] == MASK
    assert sample({"h": models.heavy, "l": models.light}, "H2 L2", **GOOD).nfe.keys() == {"H", "L"}
    assert models.passes > 0


def test_whole_numbers_of_every_kind_are_numbers(models: Models) -> None:
    small = {"num_samples": np.int64(2), "length": np.int32(6), "steps": np.int64(4), "batch_size": np.int16(1)}
    ids = torch.tensor([5, 9], dtype=torch.int32)
    ours = sample(models.heavy, **small, seed=np.int64(3), temperature=np.float64(0.7), sample_ids=ids)
    plain = sample(models.heavy, num_samples=2, length=6, steps=4, seed=3, temperature=0.7, sample_ids=[5, 9])
    assert ours.sequences.equal(plain.sequences)
    assert ours.seed == 3
    for dtype in (torch.int32, torch.uint8, torch.uint16):
        out = sample(models.heavy, input_ids=OPEN.to(dtype), steps=4, seed=3)
        assert out.sequences.equal(sample(models.heavy, input_ids=OPEN, steps=4, seed=3).sequences)
        assert out.sequences.dtype == torch.int64


def test_numbers_of_every_kind_are_numbers(models: Models) -> None:
    plain = sample(models.heavy, **GOOD, temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, guidance_scale=0.5)
    numpy = {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": np.float16(0.75), "min_p": np.float64(0.25)}
    ours = sample(models.heavy, **GOOD, **numpy, guidance_scale=Fraction(1, 2), return_history=np.bool_(False))
    assert ours.sequences.equal(plain.sequences)


def test_none_is_no_filter(models: Models) -> None:
    plain = sample(models.heavy, **GOOD, top_k=0, top_p=1.0, min_p=0.0)
    assert plain.sequences.equal(sample(models.heavy, **GOOD, top_k=None, top_p=None, min_p=None).sequences)


def test_the_schedule_may_be_the_second_argument(models: Models) -> None:
    by_name = sample(models.heavy, schedule="H4", **GOOD).sequences
    assert sample(models.heavy, "H4", **GOOD).sequences.equal(by_name)
    assert sample(models.heavy, Schedule("H4"), **GOOD).sequences.equal(by_name)


def test_what_a_tokenizer_returns_can_be_given(models: Models) -> None:
    plain = sample(models.heavy, input_ids=OPEN, **WITH_PROMPT).sequences
    for dtype in (torch.int64, torch.int32, torch.bool):
        for mask in (torch.ones_like(OPEN), torch.tensor([[1, 1, 0, 0]])):
            batch = {"input_ids": OPEN, "attention_mask": mask.to(dtype), "token_type_ids": torch.zeros_like(OPEN)}
            assert sample(models.heavy, **batch, **WITH_PROMPT).sequences[:, 1].equal(plain[:, 1])


def test_one_text_can_be_iterated_over(models: Models) -> None:
    class Spelling:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(chr(97 + int(item)) for item in ids)

    streamer = TextIteratorStreamer(Spelling(), skip_prompt=True)
    out = sample(models.heavy, **(GOOD | {"num_samples": 1}), streamer=streamer)
    assert "".join(streamer) == Spelling().decode(out.sequences[0])


def test_the_callers_tensors_are_left_as_they_are(models: Models) -> None:
    ids, mask, numbers = OPEN.clone(), torch.ones_like(OPEN), torch.tensor([4])
    sample(models.heavy, input_ids=ids, attention_mask=mask, sample_ids=numbers, steps=4, seed=0)
    assert ids.equal(OPEN)
    assert mask.equal(torch.ones_like(OPEN))
    assert numbers.tolist() == [4]


def test_a_model_that_the_schedule_does_not_name_is_not_looked_at(models: Models) -> None:
    stranger = models.other(vocab_size=9)
    assert sample({"H": models.heavy, "X": stranger}, "H4", **GOOD).nfe.keys() == {"H"}
    assert stranger.passes == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_and_never_a_token(
    models: Models, bad: float, everywhere: bool, temperature: float
) -> None:
    """This one only shows when it runs."""

    def spoiled(input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, VOCAB)
        logits[..., slice(None) if everywhere else 3] = bad
        return logits

    with pytest.warns(UserWarning, match="by its logits"):
        denoiser = adapt(spoiled, vocab_size=VOCAB, mask_id=MASK)
    with pytest.raises(FloatingPointError, match="spoiled gave NaN or infinite logits"):
        sample(denoiser, temperature=temperature, **GOOD)


def test_logits_that_allow_nothing_are_an_error(models: Models) -> None:
    with pytest.warns(UserWarning, match="by its logits"):
        denoiser = adapt(lambda ids: torch.full((*ids.shape, VOCAB), -torch.inf), vocab_size=VOCAB, mask_id=MASK)
    with pytest.raises(FloatingPointError, match="forbade every id"):
        sample(denoiser, **GOOD)


def test_weights_that_were_finite_are_looked_at_again_when_they_change() -> None:
    denoiser = CountingDenoiser()
    weight = denoiser.head.weight
    assert weight is not None
    for change in (lambda: weight[2].fill_(torch.nan), lambda: setattr(weight, "data", weight / 0)):
        weight.zero_()
        sample(denoiser, **GOOD)
        change()
        with pytest.raises(ValueError, match="NaN or infinite weights"):
            sample(denoiser, **GOOD)
        weight.data = torch.zeros_like(weight)
