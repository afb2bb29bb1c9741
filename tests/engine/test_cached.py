"""Block-wise caches: exactly the sampler of keys and values of mixed age; that of no cache where none can be stale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import mdkern
from mdkern import Denoiser, DiT, adapt, decoders
from mdkern.decoders import Stepwise
from mdkern.decoders.base import settles
from mdkern.engine import cached, graphs, stepwise
from mdkern.engine.groups import RUNS
from mdkern.engine.hooks import Drafts
from mdkern.engine.resolve import resolve
from mdkern.engine.state import SamplerState, Timings
from mdkern.models import Head, dit_window
from tests.conftest import random_dit
from tests.engine.test_stepwise import GPU_DECODERS, LENGTH, MASK, MODEL, STEPWISE, heat, starts
from tests.references.slow_sampler import PairModel, decode
from tests.references.stale_cache import BlockwiseCache, StaleDiT
from tests.test_sampling import OPEN

VOCAB = {"vocab_size": 10, "mask_id": MASK, "eos_id": 2, "max_length": 24}
HEAVY, LIGHT = random_dit(0, **VOCAB), random_dit(1, num_blocks=1, **VOCAB)
TIMED = random_dit(2, time_conditioning=True, cond_dim=8, **VOCAB)
CACHES = ["prefix", "dual"]
LAST_MASK = [name for name, decoder in STEPWISE.items() if not decoder.closing_steps and not settles(decoder)]
# Of decoders whose every step sees a mask. The slow loop has no pass where there is none, ours has one: it may be one
# that fills the cache, where a model takes over.
SWITCHING = [name for name in LAST_MASK if "remdm" not in name]
SLOW_CASES = [(name, "H12", 0.0) for name in LAST_MASK]  # whose blocks are over with their last masks
SLOW_CASES += [(name, "L5 T4 H3", 0.8) for name in SWITCHING]
FEW = ["top probability", "threshold", "remdm conf", "edit"]


def prompts(count: int) -> Tensor:
    """`starts`, none of them all masks: of a sequence of masks alone a `DiT` says the same everywhere, to rounding."""
    ids = starts(count)
    ids[:, 0] = torch.arange(count)
    return ids


def draw(model: Any, schedule: str | None = None, **options: Any) -> mdkern.SampleOutput:
    defaults = {"input_ids": prompts(5), "block_length": 4, "steps": 12, "seed": 7, "batch_size": 3}
    arguments = (model,) if schedule is None else (model, schedule)
    return mdkern.sample(*arguments, **(defaults | options))


class ShallowModel(Denoiser):
    """A `PairModel` that keeps what it reads of each column, its id: nothing kept is stale outside the window.

    A column that the sampler changes without ever running it again is, and so is another sequence's or model's.
    """

    takes_cache = True

    def __init__(self, model: PairModel) -> None:
        self.inner, self.name = model, "shallow"
        self.vocab_size, self.mask_id = model.vocab + 1, model.mask_id
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.head = Head(None, torch.zeros(model.vocab))
        self.windows: list[int] = []

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        logits = self.inner.logits(input_ids).float()
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        return batch, length + 1

    def window_hidden(
        self,
        cache: Tensor,
        input_ids: Tensor,
        columns: Tensor | None,
        positions: Tensor,
        t: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        self.windows.append(input_ids.shape[1])
        if columns is None:
            columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        cache.scatter_(1, columns, input_ids.float())
        at = columns.gather(1, positions).clamp(max=cache.shape[1] - 2)
        return self.hidden(cache[:, :-1].long(), t, at, attention_mask)


class TestLoop:
    """A model that loses nothing by a cache shows that each sequence has the very passes it would have without."""

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("name", STEPWISE)
    def test_the_same_run_as_without_a_cache(self, name: str, cache: str) -> None:
        models = {"H": ShallowModel(MODEL), "L": ShallowModel(PairModel(LENGTH, 9, seed=1))}
        ids = starts(7)
        ids[2] = torch.where(torch.arange(LENGTH) % 3 == 0, MASK, 1)  # holes
        options = {"input_ids": ids, "decoder": STEPWISE[name], "return_history": True} | heat(STEPWISE[name])
        plain, out = (draw(models, "H4 L4 H4", cache=c, **options) for c in ("none", cache))
        assert torch.equal(out.sequences, plain.sequences)
        assert all(torch.equal(out.nfe[model], plain.nfe[model]) for model in "HL")
        assert torch.equal(out.history.step, plain.history.step)
        assert torch.equal(out.history.model, plain.history.model)
        assert out.stop_reason == plain.stop_reason

    @pytest.mark.parametrize(
        ("cache", "windows"), [("dual", [16, 4, 4] * 4), ("prefix", [16, 16, 16, 16, 12, 12, 16, 8, 8, 16, 4, 4])]
    )
    def test_which_columns_run(self, cache: str, windows: list[int]) -> None:
        model = ShallowModel(PairModel(16, 9))
        options = {"decoder": "top_probability", "steps": 12, "input_ids": torch.full((3, 16), 9)}
        out = draw(model, cache=cache, **options)
        assert model.windows == windows
        assert out.nfe["H"].tolist() == [12] * 3
        assert out.flops_saved is None

    def test_a_new_sequence_and_a_new_model_begin_with_a_refresh(self) -> None:
        heavy, light = ShallowModel(PairModel(8, 9)), ShallowModel(PairModel(8, 9))
        options = {"decoder": "top_probability", "input_ids": torch.full((2, 8), 9), "steps": 8, "batch_size": 1}
        draw({"H": heavy, "L": light}, "H2 L4 H2", cache="dual", **options)
        assert heavy.windows == [8, 4] * 4  # steps 0, 1 of each sequence, then steps 6, 7
        assert light.windows == [8, 4, 8, 4] * 2  # a block's last two steps, then the next one's first two

    @pytest.mark.parametrize("cache", CACHES)
    def test_end_of_text_stops_a_sequence_and_not_its_neighbours(self, cache: str) -> None:
        options = {"decoder": "threshold", "stop_at_eos": True, "input_ids": starts(8), "seed": 1}
        model = ShallowModel(MODEL)
        model.eos_ids = (2,)
        plain, out = (draw(model, cache=c, **options) for c in ("none", cache))
        assert sorted(set(out.stop_reason)) == ["all_revealed", "end_of_text"]
        assert out.stop_reason == plain.stop_reason
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.nfe["H"], plain.nfe["H"])

    @pytest.mark.parametrize("cache", CACHES)
    def test_nan_ends_the_run_and_is_told(self, cache: str) -> None:
        model = ShallowModel(PairModel(LENGTH, 9, sharpness=float("nan")))
        with pytest.raises(FloatingPointError, match="NaN"):
            draw(model, cache=cache, decoder="threshold")


def slow(
    models: dict[str, DiT], ids: Tensor, decoder: Stepwise, schedule: str, steps: int, block_length: int,
    temperature: float, dual: bool,
):  # fmt: skip
    """Each sequence by the slow loop and the slow cache, and how often the cache was filled."""
    model_of_step = "".join(s.model * (s.stop - s.first) for s in mdkern.Schedule(schedule).segments(steps))
    outcomes, refreshes = [], []
    for number, row in enumerate(ids.tolist()):
        start = row.index(MASK)
        block = [(i - start) // block_length if token == MASK else -1 for i, token in enumerate(row)]
        block_steps = steps // (max(block) + 1)
        of_sequence = BlockwiseCache(
            models, model_of_step, start, block_length, MASK, dual, None if decoder.adaptive else block_steps,
            decoder.times(steps).float(),
        )  # fmt: skip
        outcomes.append(
            decode(
                of_sequence.logits,
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
        refreshes.append(of_sequence.refreshes)
    return outcomes, refreshes


@pytest.mark.slow
class TestStaleness:
    """What is kept is exactly as old as it should be."""

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize(("name", "schedule", "temperature"), SLOW_CASES)
    def test_the_slow_loops_sequences(self, name: str, cache: str, schedule: str, temperature: float) -> None:
        models, ids = {"H": HEAVY, "L": LIGHT, "T": TIMED}, prompts(4)
        ids[0, 1:] = MASK
        temperature = 0.0 if STEPWISE[name].greedy else temperature
        expected, refreshes = slow(models, ids, STEPWISE[name], schedule, 12, 4, temperature, cache == "dual")
        options = {"input_ids": ids, "decoder": STEPWISE[name], "temperature": temperature}
        out = draw(models, schedule, cache=cache, **options)
        assert out.sequences.tolist() == [outcome.ids for outcome in expected]
        if STEPWISE[name].adaptive:
            assert sum(out.nfe.values()).tolist() == [outcome.passes for outcome in expected]
        assert min(refreshes) < min(outcome.passes for outcome in expected)  # so that something was stale

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("model", [HEAVY, TIMED])
    def test_a_block_in_one_step_is_exact(self, model: DiT, cache: str) -> None:
        options = {"decoder": "top_probability", "steps": None, "steps_per_block": 1}
        plain, out = (draw(model, cache=c, **options) for c in ("none", cache))
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.nfe["H"], plain.nfe["H"])

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("name", FEW)
    @pytest.mark.parametrize("block_length", [LENGTH, 100])
    def test_a_block_that_is_the_whole_sequence_is_exact(self, name: str, cache: str, block_length: int) -> None:
        ids = torch.where(torch.arange(LENGTH) % 4 == 2, torch.arange(4)[:, None], MASK)
        options = {"decoder": STEPWISE[name], "input_ids": ids, "block_length": block_length}
        plain, out = (draw(HEAVY, cache=c, **options) for c in ("none", cache))
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.nfe["H"], plain.nfe["H"])

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("name", FEW)
    @pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
    def test_one_transformer_block_is_exact(self, name: str, cache: str, guidance_scale: float) -> None:
        """Its keys and values depend on their own column's id alone, which changes only in the window."""
        options = {"decoder": STEPWISE[name], "temperature": 0.7, "guidance_scale": guidance_scale}
        plain, out = (draw(LIGHT, cache=c, **options) for c in ("none", cache))
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.nfe["H"], plain.nfe["H"])

    @pytest.mark.parametrize("cache", CACHES)
    def test_alone_or_among_others_a_sequence_is_the_same(self, cache: str) -> None:
        ids = prompts(8)
        options = {"decoder": decoders.Threshold(0.3), "cache": cache, "stop_at_eos": True, "steps": None}
        together = draw(HEAVY, input_ids=ids, **options)
        assert together.nfe["H"].unique().numel() > 1
        for number in range(len(ids)):
            only = slice(number, number + 1)
            alone = draw(HEAVY, input_ids=ids[only], sample_ids=[number], **options)
            assert torch.equal(alone.sequences[0], together.sequences[number])
            assert int(alone.nfe["H"]) == int(together.nfe["H"][number])

    @pytest.mark.parametrize("cache", CACHES)
    def test_padding_changes_nothing(self, cache: str) -> None:
        whole = draw(HEAVY, cache=cache, decoder="top_probability", steps=12)
        for before, after in ((0, 5), (6, 0), (3, 2)):
            ids = torch.nn.functional.pad(prompts(5), (before, after), value=3)
            mask = torch.nn.functional.pad(torch.ones_like(prompts(5)), (before, after))
            out = draw(HEAVY, cache=cache, decoder="top_probability", steps=12, input_ids=ids, attention_mask=mask)
            assert torch.equal(out.sequences[:, before : before + LENGTH], whole.sequences)


@dataclass
class Replayed:
    """A step in the place of its graph, and of a device loop: one step, then more while there is work."""

    replay: Callable[[], None]
    status: Tensor | None = None

    def run(self, watch: Callable[[], None]) -> None:
        assert self.status is not None
        self.replay()
        while int(self.status[0]):
            self.replay()
        watch()


class TestGraphsOnTheHost:
    """The order of captures, rounds and replays, with steps in the place of their graphs."""

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("looped", [False, True])
    @pytest.mark.parametrize("guidance_scale", [0.0, 0.5])
    def test_captures_disturb_nothing(
        self, cache: str, looped: bool, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        captures = []

        def capture(step: Callable[[], None], *_: Any) -> tuple[Replayed, int]:
            captures.append(step)
            step()
            step()
            return Replayed(step), 0

        def make_loop(captured: Replayed, status: Tensor) -> Replayed | None:
            return Replayed(captured.replay, status) if looped else None

        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(graphs, "make_loop", make_loop)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        models = {"H": HEAVY, "L": LIGHT}
        asked = {"input_ids": prompts(7), "block_length": 4, "steps": 12, "batch_size": 3, "seed": 7, "cache": cache}
        asked |= {"decoder": "threshold", "guidance_scale": guidance_scale}
        request = resolve(models, "L5 H7", None, **(OPEN | asked))
        workspace = graphs.Workspace((), SamplerState.of(request))
        for _ in range(2):
            workspace.state.load(request)
            drafts = Drafts(None, workspace.state.input_ids, workspace.state.given)
            with torch.no_grad():
                RUNS[cache](request, workspace.state, workspace, tqdm(disable=True), drafts, Timings(0.0))
            expected = mdkern.sample(models, "L5 H7", **asked)
            assert torch.equal(workspace.state.input_ids[:7], expected.sequences)
        # For each model a refresh and, for each length of a window, a step: of 1, 2 and 3 blocks, if of more than one.
        assert 4 <= len(captures) <= (4 if cache == "dual" else 8)


def window_of(first: list[int], width: int, length: int) -> Tensor:
    return (torch.tensor(first)[:, None] + torch.arange(width)).clamp(max=length)


@pytest.fixture(params=["modules", "fused"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run a window; on a CPU the fused one's operators are their plain versions."""
    monkeypatch.setattr(dit_window.dit_fused, "covers", lambda _: request.param == "fused")
    return request.param


@pytest.mark.usefixtures("path")
class TestWindowHidden:
    @pytest.mark.parametrize("model", [HEAVY, LIGHT, TIMED])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_windows_of_a_sequence_that_changes(self, model: DiT, dtype: torch.dtype) -> None:
        """Passes over changing ids, each over other columns, the last one past the sequence's end."""
        generator = torch.Generator().manual_seed(0)
        model = adapt(random_dit(3, **vars(model.config)).to(dtype)).model  # rounded, then in float64 as it is
        expected_of = [StaleDiT(model), StaleDiT(model)]
        cache = torch.zeros(dit_window.cache_shape(model.config, 2, LENGTH), dtype=dtype)
        t = torch.tensor([0.9, 0.3])
        everything = torch.arange(LENGTH).expand(2, -1)
        for columns in (everything, window_of([2, 5], 4, LENGTH), None, everything, window_of([7, 10], 4, LENGTH)):
            ids = torch.randint(10, (2, LENGTH), generator=generator)
            positions = torch.tensor([[0, 1], [1, 0]])
            given = ids if columns is None else ids.gather(1, columns.clamp(max=LENGTH - 1))
            with torch.no_grad():
                hidden = dit_window.window_hidden(model, cache, given, columns, positions, t)
                columns = everything if columns is None else columns
                for row in range(2):
                    own = [column for column in columns[row].tolist() if column < LENGTH]
                    expected = expected_of[row].hidden(ids[row].tolist(), own, float(t[row]))[positions[row]]
                    error = float((hidden[row].double() - expected).abs().max())
                    assert error < (1e-5 if dtype == torch.float32 else 0.15)
            t = t * 0.7

    def test_a_window_of_everything_is_a_plain_pass(self) -> None:
        ids = torch.randint(10, (3, LENGTH), generator=torch.Generator().manual_seed(0))
        mask = torch.arange(LENGTH) < torch.tensor([[12], [7], [9]])
        positions = torch.tensor([[0, 11, 3]] * 3)
        cache = torch.full(dit_window.cache_shape(HEAVY.config, 3, LENGTH), torch.nan)  # none of it may be read
        with torch.no_grad():
            hidden = dit_window.window_hidden(HEAVY, cache, ids, None, positions, attention_mask=mask)
            expected = HEAVY.plain_hidden(ids, positions=positions, attention_mask=mask)
            again = dit_window.window_hidden(
                HEAVY, cache, ids[:, 2:7], window_of([2] * 3, 5, 12), positions % 5, None, mask
            )
        assert torch.allclose(hidden, expected, atol=1e-6)
        whole = HEAVY.plain_hidden(ids, attention_mask=mask).gather(
            1, (positions % 5 + 2)[..., None].expand(-1, -1, 16)
        )
        assert torch.allclose(again, whole, atol=1e-6)  # the ids are the same, so nothing is stale

    def test_without_a_time(self) -> None:
        cache = torch.zeros(dit_window.cache_shape(TIMED.config, 1, 2))
        zeros = torch.zeros(1, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match="t must be given"):
            dit_window.window_hidden(TIMED, cache, zeros, None, zeros)


@pytest.mark.parametrize("block_length", [1, 7, 32])
def test_window_lengths_are_enough_and_few(block_length: int) -> None:
    length = 1024
    widths = {needed: cached.window_length(needed, block_length, length) for needed in range(block_length, length + 1)}
    assert all(needed <= width <= length for needed, width in widths.items())
    assert all(width <= 1.5 * (needed + block_length - 1) for needed, width in widths.items())
    assert len(set(widths.values())) <= 2 * 11


SHAPE = {"vocab_size": 70, "mask_id": 69, "max_length": 64, "width": 64, "num_heads": 2}


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

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("name", ["top probability", "edit", "soft inputs"])
    def test_device_loop_replays_eager_and_cpu_agree(
        self, name: str, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graphs.clear()
        looped = self.draw(name, cache=cache)
        again = self.draw(name, cache=cache)  # with graphs that are there already
        kept = [graph for space in graphs._idle for graph in space.graphs.values()]
        assert any(graph.loop is not None for graph in kept)
        del kept
        graphs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "make_loop", lambda *_: None)
            replayed = self.draw(name, cache=cache)
        graphs.clear()
        eager = self.draw(name, cache=cache, cuda_graphs=False)
        for other in (again, replayed, eager):
            assert torch.equal(looped.sequences, other.sequences)
            assert all(torch.equal(looped.nfe[model], other.nfe[model]) for model in "HL")
        on_cpu, in_float64 = (
            self.draw(name, "cpu", dtype, cache=cache).sequences for dtype in (torch.float32, torch.float64)
        )
        # Masked positions of a random model are nearly alike: rounding alone turns their order.
        rounding = float((on_cpu == in_float64).float().mean())
        assert (on_cpu == looped.sequences.cpu()).float().mean() > rounding - 0.1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_window_hidden_is_the_cpus(self, dtype: torch.dtype) -> None:
        model = random_dit(0, num_blocks=2, **SHAPE).to(dtype)
        generator = torch.Generator().manual_seed(0)
        hidden: dict[str, list[Tensor]] = {"cpu": [], "cuda": []}
        caches = {device: torch.zeros(dit_window.cache_shape(model.config, 2, 40), dtype=dtype) for device in hidden}
        for columns in (None, window_of([10, 33], 10, 40)):
            ids = torch.randint(70, (2, 40 if columns is None else 10), generator=generator)
            positions = torch.arange(7).expand(2, -1)
            for device, results in hidden.items():
                caches[device] = caches[device].to(device)
                arguments = (None if x is None else x.to(device) for x in (ids, columns, positions))
                with torch.no_grad():
                    results.append(dit_window.window_hidden(model.to(device), caches[device], *arguments).cpu())
        for ours, theirs in zip(hidden["cuda"], hidden["cpu"]):
            assert (ours - theirs).abs().max() < (1e-3 if dtype == torch.float32 else 0.25)

    @pytest.mark.parametrize("window", [None, 10, 20])
    def test_no_host_synchronisation_in_a_step(self, window: int | None) -> None:
        model = random_dit(0, num_blocks=2, **SHAPE).to("cuda")
        asked = {"num_samples": 4, "length": 40, "seed": 0, "steps": 8, "block_length": 10, "cache": "dual"}
        request = resolve(model, None, None, **(OPEN | asked | {"decoder": "top_probability"}))
        state, settings = SamplerState.of(request), stepwise.Settings.of(request)
        progress = stepwise.prepare(request, settings, state, None)
        denoiser = request.denoisers["H"]
        kept = cached.prepare(stepwise.SegmentRun(denoiser, 0, 8, settings, state, progress, None))
        with torch.no_grad():
            for turn in range(3):
                if turn == 1:  # kernels are compiled
                    progress.begin_segment(state, settings, request.steps)
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    cached.cached_tick(denoiser, denoiser.head, settings, state, progress, 0, kept, window)
                finally:
                    if turn == 2:
                        torch.cuda.set_sync_debug_mode("default")
        assert int((state.input_ids[:4] != 69).sum()) > 0
