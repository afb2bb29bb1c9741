"""DMax's soft parallel decoding: its worked example, whole runs against a slow loop, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import decoders
from mdkern.decoders import SoftParallel
from mdkern.engine import block_cached
from mdkern.models import Denoiser, Head
from mdkern.models.soft import soften
from tests.conftest import random_dit
from tests.references import soft_decoding

NEVER = -math.inf


class Scripted(Denoiser):
    """A model that says in each pass what is written, and keeps the inputs that it was given."""

    takes_soft = True
    vocab_size, mask_id, max_length = 5, 4, 6
    device, dtype = torch.device("cpu"), torch.float32
    head = Head(None, torch.tensor([0.0, 0.0, 0.0, 0.0, NEVER]))
    EMBEDDING = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 4.0], [2.0, 2.0], [0.0, -1.0]])

    def __init__(self, *passes: str) -> None:
        """A pass: for every sequence and column, token:probability; sequences are divided by a slash."""
        self.passes = [[self.logits_of(row) for row in text.split("/")] for text in passes]
        self.inputs: list[Tensor] = []
        self.weight: Tensor | None = None

    @staticmethod
    def logits_of(row: str) -> Tensor:
        logits = []
        for cell in row.split():
            token, p = cell.split(":")
            others = [math.log((1 - float(p)) / 3)] * 4 + [NEVER]
            others[int(token)] = math.log(float(p))
            logits.append(others)
        return torch.tensor(logits)

    def softened(self, weight: Tensor) -> Denoiser:
        self.weight = weight
        return self

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        weight, self.weight = self.weight, None
        self.inputs.append(soften(self.EMBEDDING[input_ids], self.EMBEDDING[4], weight, positions))
        said = torch.stack(self.passes[len(self.inputs) - 1])
        return said if positions is None else said.gather(1, positions[..., None].expand(-1, -1, 5))


PASSES = [
    "3:.99 1:.80 2:.55 0:.45 1:.92 3:.70",
    "3:.99 1:.85 0:.60 0:.48 1:.93 3:.80",
    "3:.99 1:.91 0:.70 2:.62 1:.95 3:.85",
]
QUIET, SURE = "3:.99 1:.95 0:.80 2:.70 1:.96 3:.91", "3:.99 1:.95 0:.93 1:.92 1:.96 3:.91"
M = [0.0, -1.0]
INPUTS = [  # columns 1 to 5
    [M, M, M, M, M],
    [[0, 1.799999], [-2.195240, 2.328285], M, M, M],
    [[0, 1.849999], [0.832049, -0.554699], [0.678279, -0.734802], M, M],
    [[0, 1.909999], [0.919144, -0.393919], [-2.307362, 2.605086], [0, 1.949999], [1.887413, 1.720876]],
]


@pytest.mark.parametrize("block_length", [None, 6])
@pytest.mark.parametrize(("last", "ids"), [(QUIET, [3, 1, 0, 2, 1, 3]), (SURE, [3, 1, 0, 1, 1, 3])])
def test_the_worked_example(last: str, ids: list[int], block_length: int | None) -> None:
    model = Scripted(*PASSES, last)
    out = mdkern.sample(
        model, input_ids=torch.tensor([[3, 4, 4, 4, 4, 4]]), decoder=SoftParallel(), temperature=0.0,
        block_length=block_length, seed=0, return_history=True,
    )  # fmt: skip
    assert out.sequences.tolist() == [ids]
    assert out.nfe["H"].tolist() == [4]
    for got, want in zip(model.inputs, INPUTS, strict=True):
        assert got[0, 0].tolist() == [2.0, 2.0]
        torch.testing.assert_close(got[0, 1:], torch.tensor(want).float(), atol=1e-6, rtol=0.0)


def test_the_worked_example_step_by_step() -> None:
    """What is revealed and overwritten, from the texts that a run leaves when it is cut short."""
    texts = [[3, 1, 2, 4, 4, 4], [3, 1, 0, 0, 4, 4], [3, 1, 0, 2, 1, 3]]
    for number, text in enumerate(texts, start=1):
        seen = []

        class Watched(Scripted):
            def hidden(self, input_ids: Tensor, *more: Any, seen: list[Any] = seen) -> Tensor:
                seen.append(input_ids.tolist()[0])
                return super().hidden(input_ids, *more)

        mdkern.sample(
            Watched(*PASSES, QUIET), input_ids=torch.tensor([[3, 4, 4, 4, 4, 4]]), decoder=SoftParallel(),
            temperature=0.0, seed=0,
        )  # fmt: skip
        assert seen[number] == text


def test_a_block_never_ends_with_masks() -> None:
    """DMax's code stops after one pass here, with two masks left."""
    model = Scripted(*["0:.93 1:.93 2:.93"] * 3)
    out = mdkern.sample(model, length=3, decoder=SoftParallel(0.95), temperature=0.0, seed=0)
    assert (out.sequences.tolist(), out.nfe["H"].tolist()) == ([[0, 1, 2]], [3])


def test_no_sequence_waits_for_another() -> None:
    """DMax's code goes on with the first one, which then says something else, until the second one is done."""
    model = Scripted("0:.95 1:.95/2:.3 3:.3", "1:.7 1:.95/2:.6 3:.6")
    out = mdkern.sample(model, num_samples=2, length=2, decoder=SoftParallel(), temperature=0.0, seed=0)
    assert (out.sequences.tolist(), out.nfe["H"].tolist()) == ([[0, 1], [2, 3]], [1, 2])


@pytest.mark.parametrize(
    ("block_length", "padding", "passes"),
    [(2, 0, 4), (3, 0, 3), (5, 0, 5), (None, 0, 6), (100, 0, 6), (2, 2, 4), (5, 2, 4), (None, 2, 4), (100, 2, 4)],
)
def test_a_block_has_at_most_as_many_passes_as_positions(block_length: int | None, padding: int, passes: int) -> None:
    """A model that never says the same twice; three masks at the end of a text of six, or four and two of padding."""
    model = Scripted(*["0:.7 " * 6, "1:.7 " * 6] * 3)
    ids = torch.tensor([[3, 3, 3, 4, 4, 4]])
    mask = torch.arange(6)[None] >= padding
    out = mdkern.sample(
        model, input_ids=ids, attention_mask=mask, decoder=SoftParallel(), temperature=0.0, block_length=block_length,
        seed=0,
    )  # fmt: skip
    assert out.nfe["H"].tolist() == [passes]


LENGTH, MASK = 14, 10
MODELS = [random_dit(seed, max_length=LENGTH).double() for seed in range(3)]
for model in MODELS:
    with torch.no_grad():
        model.head_weight *= 2.5  # so that it is sure of some tokens and not of others


def starts(count: int, seed: int) -> Tensor:
    """Prompts of ragged lengths, and masks; some tokens are given among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(MASK, (count, LENGTH), generator=generator)
    given = torch.rand(count, LENGTH, generator=generator) < 0.1
    given |= torch.arange(LENGTH) < torch.randint(0, 5, (count, 1), generator=generator)
    given[:, -1] = False
    return torch.where(given, ids, MASK)


@torch.no_grad()
def logits_of(model: Any, inputs: Any) -> list[list[float]]:
    """The model's logits of input vectors."""
    cos, sin = model.rotary
    x = torch.tensor(inputs, dtype=torch.float64)[None]
    for block in model.blocks:
        x = block(x, (cos[:LENGTH], sin[:LENGTH]), None)
    rows: list[list[float]] = model.logits(model.norm_final(x, *model.modulation_final(None)))[0].tolist()
    return [row[:11] for row in rows]


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("block_length", [4, 5, LENGTH])
def test_whole_runs_are_those_of_the_slow_loop(soft: bool, block_length: int) -> None:
    different = set()
    for trial, (threshold, confident) in enumerate([(0.3, 0.9), (0.5, 0.6), (0.15, 0.45)]):
        model, ids = MODELS[trial], starts(5, trial)
        out = mdkern.sample(
            model, input_ids=ids, decoder=SoftParallel(threshold, confident, soft), temperature=0.0,
            block_length=block_length, batch_size=2, seed=0,
        )  # fmt: skip
        for number, row in enumerate(ids.tolist()):
            want = soft_decoding.decode(
                lambda inputs, model=model: logits_of(model, inputs), model.embedding.tolist(), row, mask_id=MASK,
                block_length=block_length, threshold=threshold, confident=confident, soft=soft,
            )  # fmt: skip
            assert out.sequences[number].tolist() == want.ids
            assert int(out.nfe["H"][number]) == want.passes
            different.add(want.passes)
    assert len(different) > 2


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("soft", [True, False])
def test_alone_or_among_others_a_sequence_is_the_same(soft: bool, cache: str) -> None:
    ids = starts(7, 3)
    model = random_dit(1, max_length=LENGTH)
    options: dict[str, Any] = {
        "decoder": SoftParallel(0.2, 0.5, soft),
        "temperature": 0.0,
        "block_length": 5,
        "seed": 0,
    }
    together = mdkern.sample(model, input_ids=ids, batch_size=3, cache=cache, **options)
    assert len(set(together.nfe["H"].tolist())) > 1
    for number in range(len(ids)):
        alone = mdkern.sample(model, input_ids=ids[number : number + 1], cache=cache, **options)
        assert torch.equal(alone.sequences[0], together.sequences[number])
        assert int(alone.nfe["H"]) == int(together.nfe["H"][number])


def test_padding_changes_nothing() -> None:
    """Also not the number of passes after which a block is over."""
    model, ids = MODELS[0], starts(4, 5)[:, :8]
    ids[:, -1] = MASK
    padded = torch.cat((torch.zeros(4, 6, dtype=torch.int64), ids), 1)
    mask = (torch.arange(LENGTH) >= 6).expand(4, -1)
    for block_length in (None, 3, 100):
        options: dict[str, Any] = {"decoder": SoftParallel(0.2, 1.0), "temperature": 0.0, "block_length": block_length}
        plain = mdkern.sample(model, input_ids=ids, seed=0, **options)
        out = mdkern.sample(model, input_ids=padded, attention_mask=mask, seed=0, **options)
        assert torch.equal(out.sequences[:, 6:], plain.sequences)
        assert torch.equal(out.nfe["H"], plain.nfe["H"])


@pytest.mark.parametrize("batch_size", [1, 2, 6])
@pytest.mark.parametrize("schedule", ["A3 B3", "A2 B2 A2"])
def test_two_models_take_turns_in_a_block(schedule: str, batch_size: int) -> None:
    """The share of a token stays with it when another model takes over; here the two are one."""
    ids, model = starts(6, 2), MODELS[2]
    options: dict[str, Any] = {"decoder": SoftParallel(0.5, 0.9), "temperature": 0.0, "block_length": 7, "seed": 0}
    one = mdkern.sample(model, input_ids=ids, **options)
    two = mdkern.sample({"A": model, "B": model}, schedule, input_ids=ids, batch_size=batch_size, **options)
    assert torch.equal(one.sequences, two.sequences)
    assert torch.equal(one.nfe["H"], two.nfe["A"] + two.nfe["B"])
    assert int(two.nfe["A"].min()) > 0 < int(two.nfe["B"].sum())


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("soft", [True, False])
def test_the_exact_cache_of_a_block_causal_model_changes_nothing(
    soft: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished blocks and prompts are read as tokens when their keys and values are kept, also beside a soft block."""
    monkeypatch.setattr(block_cached, "blocks_of_window", lambda segment: blocks)
    counts = set()
    for seed, (threshold, confident) in enumerate([(0.2, 0.5), (0.3, 0.95), (0.1, 1.0), (0.0, 0.8)]):
        model = random_dit(seed, max_length=LENGTH, block_causal=4).double()
        with torch.no_grad():
            model.head_weight *= 2.5
        ids = starts(4, seed)
        options: dict[str, Any] = {"decoder": SoftParallel(threshold, confident, soft), "temperature": 0.0, "seed": 0}
        plain = mdkern.sample(model, input_ids=ids, **options)
        out = mdkern.sample(model, input_ids=ids, batch_size=2 - seed % 2, cache="block", **options)
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.nfe["H"] - out.commits["H"], plain.nfe["H"])
        counts |= set(plain.nfe["H"].tolist())
    assert len(counts) > 3


class TestRefused:
    def sample(self, model: Any = MODELS[0], **options: Any) -> Any:
        return mdkern.sample(model, **({"length": 6, "decoder": SoftParallel(), "temperature": 0.0} | options))

    def test_temperatures(self) -> None:
        for soft in (True, False):
            with pytest.raises(ValueError, match="temperature must be 0 with SoftParallel, not 1"):
                self.sample(decoder=SoftParallel(soft=soft), temperature=1.0)

    def test_guidance(self) -> None:
        with pytest.raises(ValueError, match="guidance_scale must be 0 with SoftParallel: the passes with and without"):
            self.sample(guidance_scale=1.0)
        self.sample(decoder=SoftParallel(soft=False), guidance_scale=1.0)

    @pytest.mark.filterwarnings("ignore:.*runs by its logits")
    def test_functions(self) -> None:
        model = mdkern.adapt(lambda ids: torch.zeros(*ids.shape, 5), vocab_size=5, mask_id=4)
        with pytest.raises(
            ValueError, match=r"SoftParallel gives .* model H \(.*\) cannot take them because it runs by"
        ):
            self.sample(model)
        self.sample(model, decoder=SoftParallel(soft=False))

    def test_a_soft_decoder_that_draws(self) -> None:
        class Drawing(decoders.Threshold):
            soft = True

        with pytest.raises(ValueError, match="Drawing has soft inputs, so it must be greedy and adaptive"):
            self.sample(decoder=Drawing(0.5))

    def test_an_answer_of_the_wrong_shape(self) -> None:
        class Settled(SoftParallel):
            def settled(self, view: Any, proposal: Any) -> Tensor:
                return view.masked

        with pytest.raises(ValueError, match=r"Settled: settled must be torch.bool \[1\], not torch.bool \[1, 6\]"):
            self.sample(decoder=Settled(soft=False))
