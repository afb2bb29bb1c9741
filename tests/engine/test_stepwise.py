"""The stepwise loop against a slow one: the very same sequences, whatever the batch; and what it must never do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mdkern
from mdkern import decoders
from mdkern.decoders import Stepwise
from mdkern.engine import graphs, stepwise
from mdkern.engine.resolve import resolve
from mdkern.engine.state import SamplerState
from tests.conftest import random_dit
from tests.problems.policies import random_policy
from tests.references.slow_sampler import PairModel, decode
from tests.test_sampling import OPEN

LENGTH, VOCAB = 12, 9
MODEL = PairModel(LENGTH, VOCAB)
OTHER = PairModel(LENGTH, VOCAB, seed=1)
MASK = MODEL.mask_id
FREQUENCY = torch.rand(VOCAB + 1, generator=torch.Generator().manual_seed(0))
STEPWISE: dict[str, Stepwise] = {
    "top probability": decoders.TopProbability(),
    "top probability, Dream's quota": decoders.TopProbability(quota="dream"),
    "random positions": decoders.TopProbability(position_temperature=0.5),
    "margin": decoders.Margin(),
    "entropy": decoders.Entropy(),
    "threshold": decoders.Threshold(0.5),
    "factor": decoders.Factor(0.8),
    "entropy bound": decoders.EntropyBound(0.8),
    "position aware": decoders.PositionAware(FREQUENCY / FREQUENCY.sum()),
    "remdm cap": decoders.ReMDM("cap", eta=0.2),
    "remdm conf": decoders.ReMDM("conf"),
    "remdm loop": decoders.ReMDM("loop", eta=0.2),
    "edit": decoders.Edit(0.5, 0.3, 3),
    "soft parallel": decoders.SoftParallel(0.2, 0.6, soft=False),
    "learned": decoders.Learned(random_policy(vocab_size=VOCAB + 1), 0.8),
    "learned order": decoders.Learned(random_policy("order", vocab_size=VOCAB + 1), 0.8, fresh_noise=False),
}
TESTED = tuple({type(decoder) for decoder in STEPWISE.values()})
STEPWISE |= {
    name: decoders.by_name(name)
    for name, kind in decoders.DECODERS.items()
    if issubclass(kind, Stepwise) and not issubclass(kind, TESTED)
}
EVERY: dict[str, mdkern.decoders.Decoder] = STEPWISE | {
    "ancestral": decoders.Ancestral(0.1),
    "random": decoders.RandomRemask(),
    "first hitting": decoders.FirstHitting(),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")


def starts(count: int) -> Tensor:
    """Prompts of ragged lengths at the left, and masks."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (count, LENGTH), generator=generator)
    prompt = torch.randint(0, 6, (count, 1), generator=generator)
    return torch.where(torch.arange(LENGTH) < prompt, ids, MASK)


def heat(decoder: mdkern.decoders.Decoder) -> dict[str, Any]:
    """Arguments for a decoder that needs temperature 0."""
    return {"temperature": 0.0} if getattr(decoder, "greedy", False) else {}


def slow(ids: Tensor, decoder: Stepwise, schedule: str, steps: int, block_length: int | None, temperature: float):
    """The slow loop's outcomes, a model for each step of the schedule."""
    model_of_step = "".join(s.model * (s.stop - s.first) for s in mdkern.Schedule(schedule).segments(steps))
    models = {"H": MODEL, "L": OTHER}
    outcomes = []
    for number, row in enumerate(ids.tolist()):
        start = row.index(MASK)
        block = [(i - start) // (block_length or LENGTH) if token == MASK else -1 for i, token in enumerate(row)]
        outcomes.append(
            decode(
                lambda at, step: models[model_of_step[step]].of(at, step),
                row,
                decoder,
                steps=steps,
                mask_id=MASK,
                block=block,
                temperature=temperature,
                seed=7,
                sample=number,
                limit=block_length,
            )
        )
    return outcomes


@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize(
    ("steps", "block_length", "temperature", "schedule"),
    [(6, None, 0.0, "H6"), (12, None, 1.0, "L3 H6 L3"), (12, 4, 0.7, "L5 H7")],
)
def test_the_slow_loops_sequences(
    name: str, steps: int, block_length: int | None, temperature: float, schedule: str
) -> None:
    decoder, ids = STEPWISE[name], starts(5)
    ids[0] = MASK
    temperature = 0.0 if decoder.greedy else temperature
    expected = slow(ids, decoder, schedule, steps, block_length, temperature)
    models = {"H": MODEL.denoiser(), "L": OTHER.denoiser()}
    for batch_size in (1, 4):
        out = mdkern.sample(
            models,
            schedule,
            input_ids=ids,
            decoder=decoder,
            steps=steps,
            block_length=block_length,
            temperature=temperature,
            seed=7,
            batch_size=batch_size,
            return_history=True,
        )
        assert out.sequences.tolist() == [outcome.ids for outcome in expected]
        if decoder.adaptive:
            assert sum(out.nfe.values()).tolist() == [outcome.passes for outcome in expected]
        assert out.history.step.tolist() == [outcome.reveal_step for outcome in expected]
        assert out.stop_reason == ["all_revealed"] * len(ids)


class TestBlocksAndStops:
    """What public loops get wrong."""

    @pytest.mark.parametrize("name", STEPWISE)
    def test_no_mask_is_left_and_the_prompt_is_untouched(self, name: str) -> None:
        ids = starts(6)
        ids[2] = torch.where(torch.arange(LENGTH) % 3 == 0, MASK, 1)  # holes
        options = heat(STEPWISE[name]) | {"steps": 6, "block_length": 5, "seed": 0}
        out = mdkern.sample(MODEL.denoiser(), input_ids=ids, decoder=STEPWISE[name], **options)
        assert not (out.sequences == MASK).any()
        assert torch.equal(out.sequences[ids != MASK], ids[ids != MASK])

    def test_blocks_are_revealed_from_left_to_right(self) -> None:
        out = mdkern.sample(
            MODEL.denoiser(), num_samples=4, length=LENGTH, decoder="top_probability", steps=12, block_length=4, seed=0,
            return_history=True,
        )  # fmt: skip
        step = out.history.step.view(4, 3, 4)
        assert (step[:, 1:].amin(-1) > step[:, :-1].amax(-1)).all()

    @pytest.mark.parametrize("decoder", ["threshold", "top_probability", "ancestral", "random", "first_hitting"])
    def test_end_of_text_stops_a_sequence_and_not_its_neighbours(self, decoder: str) -> None:
        """A model that ends odd samples' text in the second block and never the even ones'."""

        def logits(input_ids: Tensor) -> Tensor:
            scores = torch.zeros(*input_ids.shape, 5)
            scores[..., 1] = 5.0
            odd = input_ids[:, 0] == 2
            scores[odd, 4:8, 3] = 50.0
            return scores

        denoiser = mdkern.adapt(logits, vocab_size=5, mask_id=4, eos_id=3)
        ids = torch.full((6, 13), 4)
        ids[:, 0] = torch.tensor([1, 2, 1, 2, 1, 2])
        out = mdkern.sample(
            denoiser, input_ids=ids, decoder=decoder, block_length=4, steps=12, temperature=0.0, seed=0, batch_size=2,
            stop_at_eos=True, return_history=True,
        )  # fmt: skip
        whole = mdkern.sample(
            denoiser, input_ids=ids, decoder=decoder, block_length=4, steps=12, temperature=0.0, seed=0
        )
        assert out.stop_reason == ["all_revealed", "end_of_text"] * 3
        assert (out.sequences[1::2, 9:] == 3).all()
        assert (out.sequences[::2, 1:] == 1).all()
        assert (out.nfe["H"][1::2] < whole.nfe["H"][1::2]).all()
        assert torch.equal(out.nfe["H"][::2], whole.nfe["H"][::2])
        filled = out.history.model[:, 1:] == -1
        assert torch.equal(filled.any(-1), torch.tensor([False, True] * 3))
        assert (out.history.step[:, 1:] >= 0).all()
        assert torch.equal(out.tokens_per_forward, (~filled).sum(-1) / out.nfe["H"])

    @pytest.mark.parametrize("decoder", ["threshold", "top_probability", "random"])
    def test_the_end_of_text_in_the_last_block_counts(self, decoder: str) -> None:
        ends = mdkern.adapt(lambda ids: torch.eye(5)[3].expand(*ids.shape, 5) * 50, vocab_size=5, mask_id=4, eos_id=3)
        out = mdkern.sample(ends, length=4, decoder=decoder, steps=4, temperature=0.0, seed=0, stop_at_eos=True)
        assert out.stop_reason == ["end_of_text"]

    @pytest.mark.parametrize("block_length", [None, 4])
    @pytest.mark.parametrize("name", EVERY)
    def test_the_text_is_cut_at_its_first_end_and_nothing_before_it_changes(
        self, name: str, block_length: int | None
    ) -> None:
        """The sampler that never stops says what there is to cut: of two ends of text, whichever comes first."""
        ids = starts(8)
        ids[:, 0] = 2  # an end of text that is given ends nothing
        ids[1] = torch.where(torch.arange(LENGTH) % 3 == 0, 5, MASK)  # nor does one between masks
        ids[2:6, 1:11] = torch.arange(4)[:, None]  # texts of one token, so that some have no end
        options = {"input_ids": ids, "decoder": EVERY[name], "seed": 1, "steps": 12, "block_length": block_length}
        options |= heat(EVERY[name])
        plain = mdkern.sample(MODEL.denoiser(), return_history=True, **options)
        ends = MODEL.denoiser()
        ends.eos_ids = (2, 5)
        out = mdkern.sample(ends, stop_at_eos=True, return_history=True, batch_size=3, **options)
        reasons = set()
        for row, (whole, given) in enumerate(zip(plain.sequences.tolist(), (ids != MASK).tolist())):
            first = next((i for i, token in enumerate(whole) if token in (2, 5) and not given[i]), LENGTH)
            cut = [token if i <= first or given[i] else whole[first] for i, token in enumerate(whole)]
            assert out.sequences[row].tolist() == cut
            assert int(out.lengths[row]) == first
            assert int(out.prompt_lengths[row]) == given.index(False)
            assert out.stop_reason[row] == ("all_revealed" if first == LENGTH else "end_of_text")
            kept = [i for i in range(LENGTH) if not given[i] and i <= first]
            assert out.history.step[row][kept].equal(plain.history.step[row][kept])
            assert (out.history.model[row][kept] == 0).all()
            written = torch.tensor([not given[i] and i > first for i in range(LENGTH)])
            assert (out.history.model[row][written] == -1).all()
            assert (out.history.step[row][written] >= 0).all()
            needed = int(plain.history.step[row][kept].max()) + 1  # steps until the end and all before it are known
            if name == "top probability" and first < LENGTH:
                assert int(out.nfe["H"][row]) == needed
            assert int(out.nfe["H"][row]) <= int(plain.nfe["H"][row])
            reasons.add(out.stop_reason[row])
        assert len(reasons) == 2
        if not isinstance(EVERY[name], decoders.ReMDM | decoders.Edit | decoders.SoftParallel) or block_length:
            assert int(out.nfe["H"].sum()) < int(plain.nfe["H"].sum())

    def test_texts_are_decoded_up_to_their_end(self) -> None:
        class Letters:
            def decode(self, ids: list[int], upper: bool = False) -> str:
                text = "".join("abcdefghi"[i] for i in ids)
                return text.upper() if upper else text

        ids = torch.full((2, 9), 4)
        ids[:, :4] = torch.tensor([[0, 0, 3, 1], [3, 1, 1, 2]])  # two of padding; a prompt with an end of text
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :2] = 0

        def logits(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return (
                torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 0, 1, 2, 3, 1, 1]), 5).expand(len(input_ids), 9, 5)
                * 50.0
            )

        model = mdkern.adapt(logits, vocab_size=5, mask_id=4, eos_id=3)
        out = mdkern.sample(model, input_ids=ids, attention_mask=mask, steps=5, temperature=0.0, stop_at_eos=True)
        assert out.sequences.tolist() == [[0, 0, 3, 1, 1, 2, 3, 3, 3], [3, 1, 1, 2, 1, 2, 3, 3, 3]]
        assert (out.lengths.tolist(), out.prompt_lengths.tolist()) == ([4, 6], [2, 4])
        assert out.decode(Letters()) == ["dbbc", "dbbcbc"]
        assert out.decode(Letters(), skip_prompt=True, upper=True) == ["BC", "BC"]

    @pytest.mark.slow
    def test_an_infinite_entropy_bound_reveals_all(self) -> None:
        flat = mdkern.adapt(lambda ids: torch.zeros(*ids.shape, 50_000), vocab_size=50_000, mask_id=50_000)
        bound = decoders.EntropyBound(float("inf"))
        out = mdkern.sample(flat, length=1600, decoder=bound, seed=0, top_k=3)
        assert int(out.nfe["H"]) == 1

    def test_sequences_take_their_own_number_of_passes(self) -> None:
        """No sequence waits for, or is cut short by, another: alone or together it is the same."""
        ids = starts(8)
        options = {"decoder": decoders.Threshold(0.4), "steps": 12, "seed": 3}
        together = mdkern.sample(MODEL.denoiser(), input_ids=ids, batch_size=3, **options)
        assert together.nfe["H"].unique().numel() > 1
        for number, row in enumerate(ids):
            alone = mdkern.sample(MODEL.denoiser(), input_ids=row[None], sample_ids=[number], **options)
            assert torch.equal(alone.sequences[0], together.sequences[number])
            assert int(alone.nfe["H"]) == int(together.nfe["H"][number])

    def test_nan_ends_the_run_and_is_told(self) -> None:
        broken = mdkern.adapt(lambda ids: torch.full((*ids.shape, 5), torch.nan), vocab_size=5, mask_id=4)
        with pytest.raises(FloatingPointError, match="NaN"):
            mdkern.sample(broken, length=6, decoder="threshold", seed=0)


SHAPE = {"vocab_size": 70, "mask_id": 69, "max_length": 64, "width": 64, "num_heads": 2}
GPU_DECODERS = STEPWISE | {
    "position aware": decoders.PositionAware(torch.full((70,), 1 / 70)),
    "learned": decoders.Learned(random_policy(vocab_size=70)),
    "learned order": decoders.Learned(random_policy("order", vocab_size=70), 0.8, fresh_noise=False),
    "soft inputs": decoders.SoftParallel(0.05, 0.1),
}


class Weighed(nn.Module):
    """A learned part of a decoder."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))


@dataclass(frozen=True)
class Learned(Stepwise):
    part: Any


class TestKey:
    """A captured step serves a decoder only if all that it takes for constant is the same."""

    @staticmethod
    def key(decoder: Stepwise) -> object:
        options = OPEN | {"length": LENGTH, "decoder": decoder} | heat(decoder)
        request = resolve(MODEL.denoiser(), None, None, **options)
        return stepwise.Settings.of(request).key()

    @pytest.mark.parametrize("name", STEPWISE)
    def test_decoders_made_alike_are_alike(self, name: str) -> None:
        decoder = STEPWISE[name]
        assert self.key(decoder) == self.key(replace(decoder))
        assert hash(self.key(decoder)) == hash(self.key(replace(decoder)))

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (0.5, 0.25),
            (Weighed(1.0), Weighed(2.0)),  # written alike
            ([1, [2]], [1, [3]]),
            (torch.zeros(3), torch.zeros(3)),
            ("even", "dream"),
        ],
    )
    def test_other_parameters_are_told_apart(self, one: Any, other: Any) -> None:
        assert self.key(Learned(one)) == self.key(Learned(one))
        assert self.key(Learned(one)) != self.key(Learned(other))

    def test_a_modules_new_weights_are_seen(self) -> None:
        part = Weighed(1.0)
        before = self.key(Learned(part))
        part.weight = nn.Parameter(torch.tensor(1.0))
        assert self.key(Learned(part)) != before

    @pytest.mark.parametrize("wrap", [lambda part: part, lambda part: [part], lambda part: {"part": (part,)}])
    def test_no_function_gets_the_address_of_one_that_is_gone(self, wrap: Any) -> None:
        keys = [self.key(Learned(wrap(lambda view: view))) for _ in range(20)]
        assert len(set(keys)) == len(keys)

    def test_what_may_change_unseen_is_never_the_same(self) -> None:
        part = bytearray(b"one")
        before = self.key(Learned(part))
        part[:] = b"two"
        assert self.key(Learned(part)) != before


@pytest.mark.gpu
class TestGpu:
    def draw(
        self, name: str, device: str = "cuda", dtype: torch.dtype = torch.float32, **changes: Any
    ) -> mdkern.SampleOutput:
        heavy, light = (random_dit(seed, num_blocks=2, **SHAPE).to(device, dtype) for seed in (0, 1))
        ids = torch.full((7, 40), 69, device=device)
        ids[3:, :9] = 5
        options = {"steps": 16, "block_length": 10, "seed": 1, "batch_size": 3, "decoder": GPU_DECODERS[name]}
        options |= heat(GPU_DECODERS[name])
        return mdkern.sample(heavy, light, "L4 H8 L4", input_ids=ids, **(options | changes))

    @pytest.mark.parametrize("name", GPU_DECODERS)
    def test_device_loop_replays_eager_and_cpu_agree(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        graphs.clear()
        looped = self.draw(name)
        kept = [graph for space in graphs._idle for graph in space.graphs.values()]
        assert kept
        assert all(graph.loop is not None for graph in kept)
        del kept
        graphs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "make_loop", lambda *_: None)
            replayed = self.draw(name)
        graphs.clear()
        eager = self.draw(name, cuda_graphs=False)
        for other in (replayed, eager):
            assert torch.equal(looped.sequences, other.sequences)
            assert all(torch.equal(looped.nfe[model], other.nfe[model]) for model in "HL")
        # Masked positions of a random model have nearly equal entropies and margins: rounding alone turns their order,
        # and one turn changes a tenth of a run's tokens. So the bound is on the mean of several runs.
        runs = {
            (device, dtype): torch.cat(
                [self.draw(name, device, dtype, seed=seed).sequences.cpu() for seed in (1, 2, 3)]
            )
            for device, dtype in (("cuda", torch.float32), ("cpu", torch.float32), ("cpu", torch.float64))
        }
        on_gpu, on_cpu, in_float64 = runs.values()
        rounding = float((on_cpu == in_float64).float().mean())
        assert (on_cpu == on_gpu).float().mean() > rounding - 0.1

    @pytest.mark.parametrize("name", GPU_DECODERS)
    def test_no_host_synchronisation_in_a_step(self, name: str) -> None:
        model = random_dit(0, num_blocks=2, **SHAPE).to("cuda")
        asked = {"num_samples": 4, "length": 40, "seed": 0, "steps": 8, "block_length": 10}
        asked |= {"decoder": GPU_DECODERS[name]} | heat(GPU_DECODERS[name])
        request = resolve(model, None, None, **(OPEN | asked))
        state, settings = SamplerState.of(request), stepwise.Settings.of(request)
        progress = stepwise.prepare(request, settings, state, None)
        denoiser = request.denoisers["H"]
        with torch.no_grad():
            for turn in range(4):
                if turn == 1:  # kernels are compiled
                    progress.begin_segment(state, settings, request.steps)
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    stepwise.decode_tick(denoiser, denoiser.head, settings, state, progress, 0)
                finally:
                    if turn == 3:
                        torch.cuda.set_sync_debug_mode("default")
        assert int((state.input_ids[:4] != 69).sum()) > 0

    def test_an_interrupt_ends_the_device_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        graphs.clear()
        plain = self.draw("top probability")

        def interrupt(_: float) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("mdkern.engine.device_loop.time.sleep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                self.draw("top probability")
        assert torch.equal(self.draw("top probability").sequences, plain.sequences)
