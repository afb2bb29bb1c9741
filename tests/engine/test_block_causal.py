"""Sampling from block-causal models, whose blocks are counted from the text's first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mdkern
from mdkern import DiT, decoders
from mdkern.decoders import Stepwise
from mdkern.engine import block_cached, cached, graphs, stepwise
from mdkern.engine.progress import Settings
from mdkern.engine.resolve import resolve
from mdkern.engine.state import SamplerState
from tests.conftest import random_dit
from tests.engine.test_stepwise import STEPWISE
from tests.references.slow_sampler import Outcome, decode
from tests.references.stale_cache import StaleDiT
from tests.test_sampling import OPEN

LENGTH, BLOCK, MASK = 14, 4, 9
SHAPE = {"vocab_size": 10, "mask_id": MASK, "eos_id": 2, "max_length": 24, "block_causal": BLOCK}
HEAVY, LIGHT = random_dit(0, **SHAPE), random_dit(1, num_blocks=1, **SHAPE)
WHOLE = random_dit(1, **(SHAPE | {"block_causal": None}))
MODELS = {"H": HEAVY, "L": LIGHT}
PROMPTS = (0, 1, 3, 4, 5, 8, 11)
BLOCKS = 4  # of LENGTH positions, the last of two
CACHED = STEPWISE | {"soft inputs": decoders.SoftParallel(0.05, 0.1)}
ONE, TWO = mdkern.Schedule.constant(), mdkern.Schedule.sandwich(0.25)


def prompts(lengths: Sequence[int] = PROMPTS, length: int = LENGTH) -> Tensor:
    ids = torch.randint(MASK, (len(lengths), length), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(length) < torch.tensor(lengths)[:, None], ids, MASK)


class CopiesInto(TorchDispatchMode):
    """Counts the copies into a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.address, self.count = tensor.data_ptr(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default and args[0].data_ptr() == self.address:
            self.count += 1
        return function(*args, **(kwargs or {}))


def draw(model: Any = HEAVY, schedule: mdkern.Schedule | None = None, **options: Any) -> mdkern.SampleOutput:
    defaults = {"input_ids": prompts(), "steps_per_block": 3, "seed": 7, "batch_size": 3, "decoder": "threshold"}
    arguments = (model,) if schedule is None else (model, schedule)
    return mdkern.sample(*arguments, **(defaults | options))


def block_by_block(model: DiT, ids: Sequence[int]) -> list[list[float]]:
    """Logits by position, of each block from its own pass, in float64, over keys and values of the blocks before."""
    slow = StaleDiT(model)
    states = []
    for first in range(0, len(ids), BLOCK):
        end = min(first + BLOCK, len(ids))
        states.append(slow.hidden(ids[:end], range(first, end)))
    logits: list[list[float]] = slow.model.logits(torch.cat(states)).tolist()
    return logits


def slow_runs(ids: Tensor, decoder: Stepwise, schedule: mdkern.Schedule, temperature: float) -> list[Outcome]:
    """Each sequence by the slow loop, 3 steps a block."""
    outcomes = []
    for number, row in enumerate(ids.tolist()):
        first = row.index(MASK) // BLOCK
        steps = 3 * (BLOCKS - first)
        of_step = "".join(s.model * (s.stop - s.first) for s in schedule.segments(steps))
        outcomes.append(
            decode(
                lambda at, step, of_step=of_step: block_by_block(MODELS[of_step[step]], at),
                row,
                decoder,
                steps=steps,
                mask_id=MASK,
                block=[i // BLOCK - first if token == MASK else -1 for i, token in enumerate(row)],
                temperature=temperature,
                seed=7,
                sample=number,
                limit=BLOCK,
            )
        )
    return outcomes


class TestBlocks:
    @pytest.mark.parametrize("name", STEPWISE)
    @pytest.mark.parametrize(("schedule", "temperature"), [(ONE, 0.0), (TWO, 0.8)])
    def test_the_slow_loops_sequences(self, name: str, schedule: mdkern.Schedule, temperature: float) -> None:
        ids, temperature = prompts()[1::3], 0.0 if STEPWISE[name].greedy else temperature
        expected = slow_runs(ids, STEPWISE[name], schedule, temperature)
        out = draw(MODELS, schedule, input_ids=ids, decoder=STEPWISE[name], temperature=temperature)
        assert out.sequences.tolist() == [outcome.ids for outcome in expected]

    @pytest.mark.parametrize("decoder", ["ancestral", "random", "top_probability"])
    def test_blocks_are_written_one_after_the_other(self, decoder: str) -> None:
        ids = prompts((0, 3, 6, 9))
        out = draw(input_ids=ids, decoder=decoder, return_history=True)
        assert out.steps is not None
        assert out.history is not None
        for number, row in enumerate(ids.tolist()):
            first = row.index(MASK) // BLOCK
            for column in range(LENGTH):
                step = int(out.history.step[number, column])
                if row[column] != MASK:
                    assert step == -1
                else:
                    assert 3 * (column // BLOCK - first) <= step < 3 * (column // BLOCK - first + 1)

    def test_only_finished_blocks_decide(self) -> None:
        """A text cut off behind a block is written as it is in a longer one."""
        whole = draw(input_ids=prompts((3, 5)))
        for end in (8, 12):
            cut = draw(input_ids=prompts((3, 5))[:, :end])
            assert torch.equal(cut.sequences, whole.sequences[:, :end])

    def test_a_model_of_the_whole_text_takes_turns_with_one_of_blocks(self) -> None:
        both = {"H": HEAVY, "L": WHOLE}
        out = draw(both, TWO, return_history=True)
        assert out.history is not None
        assert not bool((out.sequences == MASK).any())
        assert sorted(out.history.model.unique().tolist()) == [-1, 0, 1]


class TestPadding:
    @pytest.mark.parametrize("decoder", ["threshold", "ancestral"])
    def test_padding_changes_nothing(self, decoder: str) -> None:
        whole = draw(decoder=decoder)
        for before, after in ((0, 5), (4, 0), (8, 1)):
            ids = torch.nn.functional.pad(prompts(), (before, after), value=3)
            mask = torch.nn.functional.pad(torch.ones_like(prompts()), (before, after))
            out = draw(decoder=decoder, input_ids=ids, attention_mask=mask)
            assert torch.equal(out.sequences[:, before : before + LENGTH], whole.sequences)
            assert out.nfe is not None
            assert whole.nfe is not None
            assert torch.equal(out.nfe["H"], whole.nfe["H"])

    def test_padding_that_shifts_the_blocks_is_refused(self) -> None:
        mask = torch.nn.functional.pad(torch.ones_like(prompts()), (3, 0))
        ids = torch.nn.functional.pad(prompts(), (3, 0), value=3)
        with pytest.raises(ValueError, match="on the left by a multiple of 4"):
            draw(input_ids=ids, attention_mask=mask)
        with pytest.raises(ValueError, match="on the left by a multiple of 4"):
            mdkern.likelihood(HEAVY, input_ids=ids.clamp(max=8), attention_mask=mask)


class TestArguments:
    @pytest.mark.parametrize("block_length", [2, 8, 3, True])
    def test_other_blocks_are_refused(self, block_length: int) -> None:
        with pytest.raises(ValueError, match="block_length must be 4"):
            draw(block_length=block_length)

    def test_the_models_own_blocks_may_be_named(self) -> None:
        assert torch.equal(draw(block_length=4).sequences, draw().sequences)

    def test_models_of_different_blocks_are_refused(self) -> None:
        other = random_dit(1, **(SHAPE | {"block_causal": 8}))
        with pytest.raises(ValueError, match="L sees blocks of 8, H of 4"):
            draw({"H": HEAVY, "L": other}, TWO)

    def test_its_description_names_the_blocks(self) -> None:
        assert "sees blocks of 4" in repr(mdkern.adapt(HEAVY))


class TestLikelihood:
    """The likelihood of a text is that of its blocks one after the other."""

    def test_the_bound_of_texts_of_one_block_is_that_of_a_model_of_the_whole_text(self) -> None:
        whole = random_dit(0, **(SHAPE | {"block_causal": None}))
        texts = prompts((20, 20), 4)
        ours, theirs = (mdkern.likelihood(model, input_ids=texts, samples=8).nats for model in (HEAVY, whole))
        torch.testing.assert_close(ours, theirs)

    def test_blocks_of_one_give_the_chain_rule(self) -> None:
        """With blocks of one token every mask gives -log p of the same conditionals, only of more or fewer of them."""
        model = random_dit(3, **(SHAPE | {"block_causal": 1}))
        texts = prompts((20, 20), 6)
        log_prob = torch.zeros(2, dtype=torch.float64)
        for column in range(6):
            ids = torch.cat((texts[:, :column], torch.full((2, 1), MASK)), 1)
            log_prob += model(ids)[:, -1].log_softmax(-1).double()[torch.arange(2), texts[:, column]]
        exact = mdkern.likelihood(model, input_ids=texts, method="decoder", decoder="margin")
        torch.testing.assert_close(exact.nats, -log_prob, rtol=1e-5, atol=1e-5)
        bound = mdkern.likelihood(model, input_ids=texts, samples=2048)
        assert bool(((bound.nats + log_prob).abs() < 4 * bound.standard_error).all())
        assert bool((bound.standard_error < 0.05 * bound.nats).all())


def commits(ids: Tensor) -> list[int]:
    """Of each sequence the finished blocks of the prompt, and all blocks to write but the last."""
    return [row.index(MASK) // BLOCK + BLOCKS - 1 - row.index(MASK) // BLOCK for row in ids.tolist()]


def assert_same(out: mdkern.SampleOutput, plain: mdkern.SampleOutput) -> None:
    """The same samples from the same decoding passes, with and without the cache."""
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stop_reason == plain.stop_reason
    assert torch.equal(out.history.step, plain.history.step)
    assert torch.equal(out.history.model, plain.history.model)
    for model, passes in out.nfe.items():
        assert torch.equal(passes - out.commits[model], plain.nfe[model])


class TestCache:
    """Keys and values of finished blocks are exact, so that the cache changes nothing but the passes."""

    @pytest.mark.parametrize("name", CACHED)
    @pytest.mark.parametrize(("schedule", "temperature"), [(ONE, 0.0), (TWO, 0.8)])
    def test_the_same_as_without(self, name: str, schedule: mdkern.Schedule, temperature: float) -> None:
        temperature = 0.0 if CACHED[name].greedy else temperature
        options = {"decoder": CACHED[name], "temperature": temperature, "return_history": True}
        plain, out = (draw(MODELS, schedule, cache=cache, **options) for cache in ("none", "block"))
        assert_same(out, plain)
        if schedule is ONE:
            assert out.commits["H"].tolist() == commits(prompts())
        assert plain.commits is None

    @pytest.mark.parametrize("decoder", ["threshold", decoders.Edit(0.5, 0.3, 3)])
    def test_alone_or_among_others_in_any_order(self, decoder: Any) -> None:
        ids = prompts((9, 0, 5, 3, 12, 1, 8, 4))
        options = {"decoder": decoder, "cache": "block", "temperature": 0.7}
        together = draw(input_ids=ids, **options)
        assert together.nfe["H"].unique().numel() > 2
        order = torch.tensor([6, 2, 7, 0, 5, 1, 4, 3])
        for batch_size, rows in ((8, order), (2, order), *((1, order[i : i + 1]) for i in range(8))):
            out = draw(input_ids=ids[rows], sample_ids=rows, batch_size=batch_size, **options)
            assert torch.equal(out.sequences, together.sequences[rows])
            assert torch.equal(out.nfe["H"], together.nfe["H"][rows])

    def test_blocks_without_masks_are_passed_over(self) -> None:
        ids = prompts((2,) * 4)
        given = torch.tensor([[3, 1, 4, 1]])
        ids[0, 4:8], ids[1, 8:12], ids[2, 4:12], ids[3, 8:] = given, given, given.repeat(1, 2), given[:, :1]
        plain, out = (draw(input_ids=ids, cache=cache, return_history=True) for cache in ("none", "block"))
        assert_same(out, plain)
        assert out.commits["H"].tolist() == [3, 3, 3, 1]  # what lies behind the last mask is never seen

    def test_an_end_of_text_needs_no_commit(self) -> None:
        options = {"stop_at_eos": True, "input_ids": prompts((1,) * 12), "temperature": 1.0, "return_history": True}
        plain, out = (draw(cache=cache, **options) for cache in ("none", "block"))
        assert_same(out, plain)
        assert sorted(set(out.stop_reason)) == ["all_revealed", "end_of_text"]
        ended = [reason == "end_of_text" for reason in out.stop_reason]
        expected = [(length // BLOCK if end else BLOCKS - 1) for length, end in zip(out.lengths.tolist(), ended)]
        assert out.commits["H"].tolist() == expected
        assert min(expected) < BLOCKS - 1

    def test_guidance(self) -> None:
        options = {"guidance_scale": 1.5, "return_history": True}
        assert_same(draw(cache="block", **options), draw(**options))

    @pytest.mark.parametrize(("before", "after"), [(0, 5), (4, 0), (8, 1)])
    def test_padding(self, before: int, after: int) -> None:
        whole = draw(cache="block")
        ids = torch.nn.functional.pad(prompts(), (before, after), value=3)
        mask = torch.nn.functional.pad(torch.ones_like(prompts()), (before, after))
        out = draw(cache="block", input_ids=ids, attention_mask=mask)
        assert torch.equal(out.sequences[:, before : before + LENGTH], whole.sequences)
        assert torch.equal(out.nfe["H"], whole.nfe["H"])
        assert torch.equal(out.commits["H"], whole.commits["H"])

    def test_each_model_makes_its_own_keys_and_values(self) -> None:
        """A schedule that changes the model in the middle of a block: the other one commits all blocks before."""
        options = {"decoder": "top_probability", "input_ids": prompts((0,)), "return_history": True}
        schedule = mdkern.Schedule("L1 H6 L5")  # three steps a block: H works on blocks 0, 1 and 2, then L on 2 and 3
        out = draw(MODELS, schedule, cache="block", **options)
        assert_same(out, draw(MODELS, schedule, **options))
        assert {name: count.tolist() for name, count in out.commits.items()} == {"H": [2], "L": [3]}

    @pytest.mark.parametrize("blocks", [2, 3, 5])
    @pytest.mark.parametrize("name", ["threshold", "top probability", "edit", "soft inputs"])
    def test_windows_of_several_blocks(self, name: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a GPU: finished blocks ride along with the pass that begins the next, prompts take fewer passes."""
        monkeypatch.setattr(block_cached, "blocks_of_window", lambda segment: blocks)
        ids = prompts((0, 1, 3, 4, 9, 13, 16, 18), 23)
        ids[1, 4:8] = torch.tensor([3, 1, 4, 1])  # after the first block, two are to be committed
        options = {"input_ids": ids, "decoder": CACHED[name], "temperature": 0.0, "return_history": True}
        plain, out = (draw(cache=cache, **options) for cache in ("none", "block"))
        assert_same(out, plain)
        assert out.commits["H"].tolist() == [finished // blocks for finished in (0, 2, 0, 1, 2, 3, 4, 4)]
        assert_same(draw(MODELS, TWO, cache="block", **options), draw(MODELS, TWO, **options))

    @pytest.mark.parametrize("blocks", [1, 2])
    @pytest.mark.parametrize("name", ["threshold", "top probability", "edit", "soft inputs"])
    def test_long_prompts_are_filled_in(self, name: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """In one pass, at a segment's start; shorter ones, and those of sequences that wait for a slot, are not."""
        monkeypatch.setattr(block_cached, "LONG_PROMPT", 2)
        monkeypatch.setattr(block_cached, "blocks_of_window", lambda segment: blocks)
        ids = prompts((0, 7, 9, 17, 18, 18), 23)
        options = {"input_ids": ids, "decoder": CACHED[name], "temperature": 0.0, "return_history": True}
        plain, out = (draw(cache=cache, batch_size=5, **options) for cache in ("none", "block"))
        assert_same(out, plain)
        finished = (0, 1, 2, 4, 4)
        fills = [1 if count >= 2 * blocks else count // blocks for count in finished]
        between = [5 - count if blocks == 1 else 0 for count in finished]  # two blocks at once commit as they go
        assert out.commits["H"].tolist()[:5] == [a + b for a, b in zip(fills, between)]
        assert out.commits["H"].tolist()[5] == 4 // blocks + (blocks == 1), "it takes over a slot"
        assert_same(draw(MODELS, TWO, cache="block", **options), draw(MODELS, TWO, **options))

    def test_prompts_are_filled_in_with_padding_and_guidance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(block_cached, "LONG_PROMPT", 1)
        for before in (0, 8):
            ids = torch.nn.functional.pad(prompts(), (before, 1), value=3)
            mask = torch.nn.functional.pad(torch.ones_like(prompts()), (before, 1))
            options = {"input_ids": ids, "attention_mask": mask, "guidance_scale": 1.5, "return_history": True}
            out = draw(cache="block", batch_size=len(ids), **options)
            assert_same(out, draw(**options))
            assert out.commits["H"][-1] == 1 + 1  # two of the prompt at once, and the one before the last block

    def test_no_pass_fills_in_more_rows_than_memory_is_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(block_cached, "LONG_PROMPT", 1)
        monkeypatch.setattr(block_cached, "MOST_FILLED", 3 * LENGTH - 1)
        assert draw(cache="block").commits["H"].tolist() == commits(prompts())

    def test_windows_of_several_blocks_with_padding_and_guidance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(block_cached, "blocks_of_window", lambda segment: 2)
        ids = torch.nn.functional.pad(prompts(), (8, 1), value=3)
        mask = torch.nn.functional.pad(torch.ones_like(prompts()), (8, 1))
        options = {"input_ids": ids, "attention_mask": mask, "guidance_scale": 1.5, "return_history": True}
        assert_same(draw(cache="block", **options), draw(**options))

    def test_the_host_is_told_once_a_step(self) -> None:
        """It reads the number of slots with work at any time, and 0 ends the run: also while all slots only commit."""
        arguments = {"input_ids": prompts((9, 10, 11)), "decoder": "threshold", "cache": "block", "seed": 0}
        request = resolve(HEAVY, None, None, **(OPEN | arguments))
        state, settings = SamplerState.of(request), Settings.of(request)
        progress = stepwise.prepare(request, settings, state, None)
        segment = stepwise.SegmentRun(request.denoisers["H"], 0, request.steps, settings, state, progress, None)
        cache = cached.keys_and_values(segment)
        progress.begin_segment(state, settings, request.steps)
        for commits in (True, True, False):
            before = progress.commits.sum()
            with CopiesInto(progress.report) as copies, torch.no_grad():
                block_cached.block_tick(segment.denoiser, segment.denoiser.head, settings, state, progress, 0, cache)
            assert bool(progress.commits.sum() > before) == commits
            assert copies.count == 1
            assert progress.report.tolist() == progress.status.tolist()
            assert progress.report[0] == 3

    def test_a_pass_runs_one_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        denoiser = mdkern.adapt(HEAVY)
        run = type(denoiser).window_hidden

        def watched(self: Any, cache: Tensor, ids: Tensor, *rest: Any) -> Tensor:
            seen.append(tuple(ids.shape))
            return run(self, cache, ids, *rest)

        monkeypatch.setattr(type(denoiser), "window_hidden", watched)
        monkeypatch.setattr(type(denoiser), "hidden", None)
        out = draw(denoiser, cache="block", batch_size=7)
        assert set(seen) == {(7, BLOCK)}
        assert len(seen) == int(out.nfe["H"].max())  # no sequence waits for another


class TestRefusedCaches:
    @pytest.mark.parametrize(
        ("model", "schedule", "options", "message"),
        [
            (HEAVY, None, {"cache": "dual"}, "cache='block' is as fast and exact"),
            (HEAVY, None, {"cache": "block", "decoder": "ancestral"}, "needs a decoder that looks at the model"),
            (WHOLE, None, {"cache": "block"}, r"model H \(DiT-2\) sees the whole text"),
            ({"H": HEAVY, "L": WHOLE}, TWO, {"cache": "block"}, r"model L \(DiT-2\) sees the whole text"),
            (HEAVY, None, {"cache": "block", "block_length": 2}, "block_length must be 4"),
        ],
    )
    def test_with_what_to_do(self, model: Any, schedule: Any, options: dict[str, Any], message: str) -> None:
        defaults = {"steps_per_block": None} if model is WHOLE else {}
        with pytest.raises(ValueError, match=message):
            draw(model, schedule, **(defaults | options))


ON_GPU = {"vocab_size": 70, "mask_id": 69, "max_length": 64, "width": 64, "num_heads": 2, "block_causal": 8}


@pytest.mark.gpu
class TestGpu:
    def draw(self, dtype: torch.dtype = torch.float32, device: str = "cuda", **changes: Any) -> mdkern.SampleOutput:
        heavy, light = (random_dit(seed, num_blocks=2, **ON_GPU).to(device, dtype) for seed in (0, 1))
        ids = torch.full((7, 44), 69, device=device)
        ids[2:, :9], ids[4:, :21] = 5, 6
        options = {"steps_per_block": 4, "seed": 1, "batch_size": 3, "decoder": STEPWISE["threshold"]}
        return mdkern.sample(heavy, light, TWO, input_ids=ids, **(options | changes))

    @pytest.mark.parametrize("name", ["top probability", "threshold", "edit"])
    def test_device_loop_replays_and_eager_agree(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        options = {"decoder": STEPWISE[name], "cache": "block", "temperature": 0.8}
        graphs.clear()
        looped, again = self.draw(**options), self.draw(**options)
        kept = [graph for space in graphs._idle for graph in space.graphs.values()]
        assert any(graph.loop is not None for graph in kept)
        del kept
        graphs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "make_loop", lambda *_: None)
            replayed = self.draw(**options)
        graphs.clear()
        for other in (again, replayed, self.draw(cuda_graphs=False, **options)):
            assert torch.equal(looped.sequences, other.sequences)
            assert all(torch.equal(looped.nfe[model], other.nfe[model]) for model in "HL")
            assert all(torch.equal(looped.commits[model], other.commits[model]) for model in "HL")

    @pytest.mark.parametrize("name", ["top probability", "threshold"])
    def test_in_float32_the_cache_changes_nothing(self, name: str) -> None:
        plain, out = (self.draw(decoder=STEPWISE[name], cache=cache) for cache in ("none", "block"))
        assert torch.equal(out.sequences, plain.sequences)
        assert all(torch.equal(out.nfe[model] - out.commits[model], plain.nfe[model]) for model in "HL")

    def test_long_prompts_are_filled_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = self.draw(batch_size=7)
        for cuda_graphs in (True, False):
            options = {"cache": "block", "cuda_graphs": cuda_graphs, "batch_size": 7}
            every = self.draw(**options)
            with monkeypatch.context() as patch:
                patch.setattr(block_cached, "LONG_PROMPT", 1)
                out = self.draw(**options)
            assert torch.equal(out.sequences, plain.sequences)
            assert out.commits["H"].sum() < every.commits["H"].sum()

    def test_in_bfloat16_it_runs_to_the_end(self) -> None:
        out = self.draw(torch.bfloat16, cache="block")
        assert not bool((out.sequences == 69).any())
        assert out.stop_reason == ["all_revealed"] * 7

    @pytest.mark.parametrize("blocks", [1, 2])
    def test_no_host_synchronisation_in_a_step(self, blocks: int) -> None:
        model = random_dit(0, num_blocks=2, **ON_GPU).to("cuda")
        ids = torch.full((4, 44), 69, device="cuda")
        ids[1:, :19] = 5
        asked = {"input_ids": ids, "length": None, "num_samples": None, "seed": 0, "cache": "block"}
        request = resolve(model, None, None, **(OPEN | asked | {"decoder": "threshold"}))
        state, settings = SamplerState.of(request), stepwise.Settings.of(request)
        progress = stepwise.prepare(request, settings, state, None)
        denoiser = request.denoisers["H"]
        cache = cached.keys_and_values(stepwise.SegmentRun(denoiser, 0, ids, settings, state, progress, None))
        with torch.no_grad():
            for turn in range(4):
                if turn == 1:  # kernels are compiled
                    progress.begin_segment(state, settings, request.steps)
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    block_cached.block_tick(denoiser, denoiser.head, settings, state, progress, 0, cache, blocks)
                finally:
                    if turn == 3:
                        torch.cuda.set_sync_debug_mode("default")
        assert progress.commits[0, 1:4].tolist() == [2 // blocks] * 3
        assert int((state.input_ids[:4] != 69).sum()) > 3 * 19
