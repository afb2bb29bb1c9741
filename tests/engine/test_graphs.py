"""CUDA graphs of the sampler: the same samples, kept and renewed as they should be, nothing leaked."""

from __future__ import annotations

import gc
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

import mdkern
from mdkern import DiT
from mdkern.engine import capture, graphs, planned, state
from mdkern.engine.capture import warm_up
from mdkern.engine.hooks import Drafts
from mdkern.engine.request import Request
from mdkern.engine.resolve import resolve
from mdkern.engine.state import SamplerState, TickBuffer, Timings
from mdkern.models.fingerprint import Mark, fingerprint, no_collection, remembered
from tests.conftest import random_dit
from tests.test_sampling import OPEN

SHAPE = {"vocab_size": 70, "mask_id": 69, "max_length": 64, "width": 64, "num_heads": 2}
OPTIONS = {"num_samples": 11, "length": 48, "steps": 40, "seed": 3, "batch_size": 4}


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, self.weight, self.bias)


class TestFingerprint:
    """Everything a graph takes for constant changes it; what it reads anew does not."""

    def test_it_is_the_same_twice_and_whatever_the_weights_values(self) -> None:
        model = random_dit()
        before = fingerprint(model)
        with torch.no_grad():
            model.head_bias += 1.0
        assert fingerprint(model) == before

    def test_a_mark_is_as_equal_as_its_content(self) -> None:
        """Also to one with the same hash, as -1 and -2 have in Python."""
        known = {Mark((1, "a", -1)): "first"}
        assert known.get(Mark((1, "a", -1))) == "first"
        assert Mark((1, "a", -2)) not in known
        assert hash(Mark((1, "a", -2))) == hash(Mark((1, "a", -1)))

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: setattr(model, "head_bias", nn.Parameter(model.head_bias + 1)),
            lambda model: setattr(model.blocks[0], "num_heads", 1),
            lambda model: model.blocks.__setitem__(1, model.blocks[0]),
            lambda model: model.double(),
            lambda model: model.blocks[0].attn_out.register_forward_hook(lambda *_: None),
            lambda model: setattr(model, "active_adapter", ["one"]),
            lambda model: model.blocks[0].tried[0].append(2),
            lambda model: setattr(model.head_bias, "data", model.head_bias.data.view(1, -1)),
            lambda model: setattr(model.blocks[0].table, "data", torch.zeros(2)),
            lambda model: model.blocks[0].register_parameter("more", nn.Parameter(torch.zeros(1))),
            lambda model: setattr(model.blocks[0].attn_out, "__class__", Doubled),
            lambda model: setattr(model, "__class__", type("Other", (DiT,), {})),
            lambda model: setattr(type(model.told), "forward", Doubled.forward),
            lambda model: setattr(model.told.config, "theta", 2.0),
        ],
        ids=[
            "parameter", "setting", "module", "dtype", "hook", "adapter", "nested", "shape", "tensor", "new",
            "class", "its own class", "forward of a class", "config of a part",
        ],
    )  # fmt: skip
    def test_changes_are_seen(self, change) -> None:
        """By a snapshot, and by a description where no snapshot can be taken."""
        for leads_back in (False, True):
            model = random_dit()
            model.blocks[0].tried, model.blocks[0].table = [[1]], torch.zeros(2)
            model.own = [model] if leads_back else []
            model.told = type("Told", (nn.Linear,), {})(2, 2)
            model.told.config = SimpleNamespace(theta=1.0)
            before = fingerprint(model)
            assert fingerprint(model) is before
            change(model)
            assert fingerprint(model) != before

    def test_what_is_known_of_a_model_ends_with_it(self) -> None:
        """Also if something in it leads back to it."""
        for change in (
            lambda model: None,
            lambda model: setattr(model.blocks[0], "whole", [model]),
            lambda model: setattr(model, "forward", model.forward),
            lambda model: setattr(model.blocks[0], "again", partial(model.forward)),
            lambda model: model.register_forward_hook(lambda *_: model),
            lambda model: setattr(model.blocks[0], "find", lambda: model),
            lambda model: setattr(model.blocks[0], "owners", {"all": [{"model": model}]}),
            lambda model: setattr(model.blocks[0], "owner", SimpleNamespace(deeper=SimpleNamespace(model=model))),
        ):
            model = random_dit()
            change(model)
            marks = [fingerprint(model) for _ in range(3)]
            remembered(model, "weights", partial(list, model.parameters()))
            assert marks[1] is marks[2]
            gone = weakref.ref(model)
            del model
            gc.collect()
            assert gone() is None

    def test_what_was_in_a_model_is_given_back(self) -> None:
        model = random_dit()
        fingerprint(model)
        weight = weakref.ref(model.blocks[0].attn_out.weight)
        model.blocks[0] = model.blocks[1]
        graphs.clear()
        gc.collect()
        assert weight() is None

    def test_what_is_remembered_is_made_anew_for_a_changed_model(self) -> None:
        model = random_dit()
        numbers = iter(range(9))

        def number() -> int:
            return remembered(model, "number", lambda: next(numbers))

        assert [number() for _ in range(3)] == [0, 0, 0]
        model.blocks[0].num_heads = 1
        assert [number() for _ in range(3)] == [1, 1, 1]
        before, layer = fingerprint(model), model.blocks[0].attn_out
        layer.weight = nn.Parameter(layer.weight.detach())  # another tensor at the same address
        assert [number() for _ in range(3)] == [2, 2, 2]
        assert fingerprint(model) is before, "what graphs assume still holds"

    def test_a_function_has_none(self) -> None:
        assert fingerprint(lambda ids: ids) is None

    def test_a_denoiser_of_ones_own(self) -> None:
        denoiser = mdkern.adapt(random_dit())
        before = fingerprint(denoiser)
        assert fingerprint(denoiser) == before
        denoiser.mask_id = 3
        assert fingerprint(denoiser) != before


class EarlyExit(mdkern.Denoiser):
    """The first blocks of a model as a light one: another denoiser around the same model."""

    def __init__(self, model: DiT, blocks: int) -> None:
        whole = mdkern.adapt(model)
        for name in ("vocab_size", "mask_id", "max_length", "device", "dtype", "head"):
            setattr(self, name, getattr(whole, name))
        self.model, self.blocks = model, blocks

    def hidden(self, input_ids: Tensor, t: Any = None, positions: Any = None, attention_mask: Any = None) -> Tensor:
        kept, self.model.blocks = self.model.blocks, self.model.blocks[: self.blocks]
        try:
            return self.model.hidden(input_ids, t, positions, attention_mask)
        finally:
            self.model.blocks = kept


class TestMark:
    """What tells the steps of two denoisers apart."""

    def test_denoisers_around_one_model_differ(self) -> None:
        model = random_dit()
        marks = [graphs.mark_of(EarlyExit(model, blocks)) for blocks in (1, 2, 2)]
        assert marks[0] != marks[1] == marks[2]

    def test_adapting_anew_makes_no_difference(self) -> None:
        model = random_dit()
        assert graphs.mark_of(mdkern.adapt(model)) == graphs.mark_of(mdkern.adapt(model))

    def test_the_process_counts(self) -> None:
        denoiser = mdkern.adapt(random_dit())
        before = graphs.mark_of(denoiser)
        with torch.autocast("cuda", torch.bfloat16, enabled=True):
            assert graphs.mark_of(denoiser) != before or not torch.is_autocast_enabled("cuda")

    def test_a_config_of_transformers_counts(self) -> None:
        from transformers import BertConfig, BertForMaskedLM

        small = BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        model = BertForMaskedLM(small).eval()
        before = fingerprint(model)
        model.set_attn_implementation("eager")
        assert fingerprint(model) != before


def test_a_failed_capture_is_left_without_pytorchs_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no promise to stay; what they would free is kept, and the failure is still told as what it was."""

    begun = []

    class Broken:
        def capture_begin(self, **_: object) -> None:
            begun.append(self)

        def capture_end(self) -> None:
            raise RuntimeError("operation would make the legacy stream depend on a capturing stream")

    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.delattr(torch._C, name, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    capture.leave(Broken(), torch.device("cpu"), None)
    assert len(begun) == 1  # the capture after which the generator draws again


def part(megabytes: int) -> SimpleNamespace:
    return SimpleNamespace(tensor=torch.empty(megabytes << 20, dtype=torch.uint8))


class TestWorkspace:
    """What is kept from call to call."""

    @pytest.fixture
    def request_of(self) -> Request:
        return resolve(mdkern.adapt(random_dit()), None, None, **(OPEN | {"length": 8}))

    def call(self, workspace: graphs.Workspace, request: Request, **sizes: int) -> dict[str, SimpleNamespace]:
        workspace.begin(request)
        return {key: workspace.part(key, partial(part, size)) for key, size in sizes.items()}

    def test_a_call_that_comes_again_keeps_its_parts(self, request_of: Request, monkeypatch) -> None:
        monkeypatch.setattr(graphs, "MOST_UNUSED", 1 << 20)
        workspace = graphs.Workspace((), SamplerState.of(request_of))
        first = self.call(workspace, request_of, cache=3, ticks=2)
        for _ in range(3):
            again = self.call(workspace, request_of, cache=3, ticks=2)
            assert all(again[key] is first[key] for key in first)

    def test_what_other_calls_left_is_bounded(self, request_of: Request, monkeypatch) -> None:
        monkeypatch.setattr(graphs, "MOST_UNUSED", 4 << 20)
        workspace = graphs.Workspace((), SamplerState.of(request_of))
        state, generator, renewed = workspace.memory(), random.Random(0), 0
        for _ in range(200):
            size = generator.randrange(1, 8)
            workspace.graphs["a graph"] = SimpleNamespace(mark=1, model=lambda: 1)
            before = len(workspace.parts)
            self.call(workspace, request_of, **{f"of {size}": size})
            renewed += len(workspace.parts) < before
            of_two_calls = 7 + size << 20  # the one before, at most, and this one
            assert workspace.memory() - state <= graphs.MOST_UNUSED + of_two_calls
            assert bool(workspace.graphs) == (len(workspace.parts) >= before)  # they hold the parts' addresses
        assert 20 < renewed < 200

    def test_ticks_are_counted(self, request_of: Request) -> None:
        workspace = graphs.Workspace((), SamplerState.of(request_of))
        before = workspace.memory()
        buffer = workspace.part("ticks", partial(TickBuffer, 4, 2, 8, 1, request_of.device))
        held = [value for value in vars(buffer.ticks).values() if isinstance(value, Tensor)]
        assert workspace.memory() - before == sum(tensor.nbytes for tensor in held) > 0


@pytest.mark.filterwarnings("ignore:.*runs by its logits")
class TestRefusal:
    """A model that can't be captured is not tried again, and warned of once; another one is."""

    @pytest.fixture(autouse=True)
    def nothing_can_be_captured(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def fail(*_: object) -> None:
            raise capture.CaptureError("no")

        monkeypatch.setattr(graphs, "capture", fail)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        graphs.clear()
        yield
        graphs.clear()

    def warnings_of(self, model: Any) -> int:
        request = resolve(model, None, None, **(OPEN | {"length": 8}))
        workspace = graphs.Workspace((), SamplerState.of(request))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert workspace.graph(request.denoisers["H"], "a step", print, lambda: None) is None
        return len(caught)

    def test_once_for_a_model(self) -> None:
        model = random_dit()
        assert [self.warnings_of(model) for _ in range(3)] == [1, 0, 0]
        assert self.warnings_of(random_dit()) == 1

    def test_functions_that_come_and_go(self) -> None:
        """They take each other's addresses."""
        seen = set()
        for _ in range(20):
            function = mdkern.adapt(lambda ids: torch.zeros(*ids.shape, 9), vocab_size=9, mask_id=8)
            seen.add(id(function.model))
            assert self.warnings_of(function) == 1
            assert self.warnings_of(function) == 0
            del function
        assert len(seen) < 20, "no address came again: nothing was put to the test"
        assert not graphs._refused

    def test_what_no_weak_reference_can_be_made_of(self) -> None:
        class Slotted:
            __slots__ = ()

            def __call__(self, ids: Tensor) -> Tensor:
                return torch.zeros(*ids.shape, 9)

        for _ in range(5):
            model = mdkern.adapt(Slotted(), vocab_size=9, mask_id=8)
            assert [self.warnings_of(model) for _ in range(2)] == [1, 0]
            del model


class TestOnTheHost:
    """Planned ticks, with steps in the place of their graphs."""

    @pytest.mark.parametrize("entries", [1, 4000])  # of a buffer of ticks: the first has room for one tick
    def test_captures_disturb_nothing(self, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A step that is run to warm up reads no tick that is not there: PyTorch would raise, a kernel reads wildly."""

        def capture(step: Callable[[], None], idle: Callable[[], None], *_: Any) -> tuple[SimpleNamespace, int]:
            warm_up(step, idle)
            return SimpleNamespace(replay=step), 0

        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(state, "MOST_ENTRIES", entries)
        models = {"H": random_dit(0, **SHAPE), "L": random_dit(1, num_blocks=1, **SHAPE)}
        asked = OPTIONS | {"length": 12, "steps": 6}
        request = resolve(models, "L2 H4", None, **(OPEN | asked))
        workspace = graphs.Workspace((), SamplerState.of(request))
        with torch.no_grad():
            bar, drafts = tqdm(disable=True), Drafts(None, workspace.state.input_ids, workspace.state.given)
            planned.run(request, workspace.state, workspace, bar, drafts, Timings(0.0))
        room = {len(part.ticks.row_count) for part in workspace.parts.values() if isinstance(part, TickBuffer)}
        assert (room == {1}) == (entries == 1)
        assert torch.equal(workspace.state.input_ids[:-1], mdkern.sample(models, "L2 H4", **asked).sequences)

    def test_what_an_exception_leaves_is_gone_with_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a collection of garbage, which could fall into a capture and destroy the run's graphs there."""
        model = random_dit(0, **SHAPE)
        kept: list[weakref.ref[SamplerState]] = []

        def interrupted(request: Request, denoiser: Any, state: SamplerState, *_: Any) -> None:
            kept.append(weakref.ref(state))
            raise KeyboardInterrupt

        monkeypatch.setattr(planned, "run_steps", interrupted)
        gc.disable()
        try:
            with pytest.raises(KeyboardInterrupt):
                mdkern.sample(model, **(OPTIONS | {"length": 12, "steps": 6}))
            assert kept
            assert all(state() is None for state in kept)
        finally:
            gc.enable()

    def test_a_tick_buffer_that_is_large_enough_serves(self) -> None:
        """Sizes are powers of two; one that is at most twice as large as needed is taken again."""
        workspace = graphs.Workspace((), SamplerState.allocate(1, 4, False, torch.device("cpu")))
        assert [workspace.round_up(size) for size in (1, 5, 9, 5, 3, 33, 17, 16)] == [4, 8, 16, 8, 4, 64, 64, 16]

    def test_no_garbage_is_collected_in_a_capture(self) -> None:
        assert gc.isenabled()
        with no_collection(), no_collection():
            assert not gc.isenabled()
        assert gc.isenabled()


@pytest.fixture
def pair() -> Iterator[tuple[DiT, DiT]]:
    graphs.clear()
    yield (
        random_dit(0, num_blocks=3, **SHAPE).to("cuda"),
        random_dit(1, num_blocks=1, **SHAPE).to("cuda"),
    )
    graphs.clear()


def draw(pair: tuple[DiT, DiT], **changes: object) -> Tensor:
    return mdkern.sample(*pair, "L10 H20 L10", **(OPTIONS | changes)).sequences


@pytest.mark.gpu
class TestReplay:
    def test_graph_eager_and_cpu_give_the_same_tokens(self, pair: tuple[DiT, DiT]) -> None:
        replayed, eager = draw(pair), draw(pair, cuda_graphs=False)
        assert {"DiT-3", "DiT-1"} <= {name for name, _ in graphs.held()}, "nothing was captured"
        assert torch.equal(replayed, eager)
        on_cpu = mdkern.sample(pair[0].cpu(), pair[1].cpu(), "L10 H20 L10", **OPTIONS).sequences
        assert (on_cpu == replayed.cpu()).float().mean() > 0.99

    @pytest.mark.parametrize("options", [{"steps": 3, "length": 64}, {"num_samples": 1}, {"temperature": 0.0},
                                         {"top_k": 5}, {"batch_size": 100}])  # fmt: skip
    def test_other_shapes(self, pair: tuple[DiT, DiT], options: dict[str, object]) -> None:
        schedule = {} if "steps" not in options else {"schedule": "L1 H1 L1"}
        both = [
            mdkern.sample(
                *pair, **({"schedule": "L10 H20 L10"} | schedule), **(OPTIONS | options | {"cuda_graphs": on})
            )
            for on in (True, False)
        ]
        assert torch.equal(both[0].sequences, both[1].sequences)

    def test_prompts_padding_and_time_conditioning(self) -> None:
        model = random_dit(2, **SHAPE, time_conditioning=True, cond_dim=16).to("cuda")
        ids = torch.randint(69, (6, 40), device="cuda")
        ids[:, 5::2] = 69
        mask = torch.ones_like(ids)
        mask[2:, 30:] = 0
        both = [
            mdkern.sample(model, input_ids=ids, attention_mask=mask, seed=0, steps=20, cuda_graphs=on).sequences
            for on in (True, False)
        ]
        assert torch.equal(*both)
        assert torch.equal(both[0][:, :5], ids[:, :5])

    def test_graphs_serve_the_next_call_and_see_new_weights(self, pair: tuple[DiT, DiT]) -> None:
        draw(pair)
        kept = [graph for space in graphs._idle for graph in space.graphs.values()]
        with torch.no_grad():
            pair[0].head_bias[:5] += 3.0  # in place: the same address
            pair[0].blocks[0].mlp_up.weight.mul_(1.5)
        replayed = draw(pair)
        now = [graph for space in graphs._idle for graph in space.graphs.values()]
        assert {id(graph) for graph in kept} == {id(graph) for graph in now}, "captured again"
        assert torch.equal(replayed, draw(pair, cuda_graphs=False))

    def test_a_batch_whose_ticks_are_loaded_one_by_one(self) -> None:
        """20,000 sequences of 256 in 8 steps: a tick is over half of a buffer. What lies beside it is no index."""
        graphs.clear()
        for size in (2**10, 2**16, 2**21, 2**26):
            poison = [torch.full((size,), 2**40, device="cuda") for _ in range(4)]
        del poison
        model = random_dit(3, num_blocks=1, **(SHAPE | {"max_length": 256})).to("cuda")
        options = {"num_samples": 20_000, "length": 256, "steps": 8, "batch_size": 20_000, "seed": 1}
        replayed = mdkern.sample(model, **options).sequences
        torch.cuda.synchronize()
        assert torch.equal(replayed, mdkern.sample(model, **options, cuda_graphs=False).sequences)
        graphs.clear()

    def test_a_changed_model_is_captured_anew(self, pair: tuple[DiT, DiT]) -> None:
        before = draw(pair)
        pair[0].head_weight = nn.Parameter(torch.randn_like(pair[0].head_weight))
        replayed = draw(pair)
        assert not torch.equal(before, replayed)
        assert torch.equal(replayed, draw(pair, cuda_graphs=False))

    def test_long_runs_do_not_grow(self, pair: tuple[DiT, DiT]) -> None:
        options = {"num_samples": 64, "length": 64, "steps": 1000, "batch_size": 2}
        for seed in range(6):
            small = mdkern.sample(pair[1], **options, seed=seed)
        assert int(small.nfe["H"].sum()) // 2 > 1700
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for seed in range(6):  # 10,000 replays and more
            mdkern.sample(pair[1], **options, seed=seed)
        del small
        assert torch.cuda.memory_allocated() <= before[0]
        assert torch.cuda.memory_reserved() <= before[1]

    def test_two_samplers_alive_at_once(self, pair: tuple[DiT, DiT]) -> None:
        alone = [draw(pair, seed=seed) for seed in (1, 2)]
        found: dict[int, Tensor] = {}
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for _ in range(3):
                    with torch.cuda.stream(torch.cuda.Stream()):
                        found[seed] = draw(pair, seed=seed)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert torch.equal(found[1], alone[0])
        assert torch.equal(found[2], alone[1])

    def test_what_inference_mode_made_serves_outside_of_it(self, pair: tuple[DiT, DiT]) -> None:
        graphs.clear()
        with torch.inference_mode():
            inside = draw(pair)
        assert torch.equal(draw(pair), inside)
        graphs.clear()

    def test_inside_a_stream_of_the_callers(self, pair: tuple[DiT, DiT]) -> None:
        plain = draw(pair)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            inside = draw(pair)
            assert torch.cuda.current_stream() == stream
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(plain, inside)

    def test_an_interrupt_leaves_a_process_that_can_sample(self, pair: tuple[DiT, DiT], monkeypatch) -> None:
        plain = draw(pair)
        for target, after in (("mdkern.engine.planned.reveal_tick", 3), ("mdkern.engine.planned.Pacer.replayed", 5)):
            graphs.clear()
            count = 0
            module, _, _ = target.rpartition(".")
            original = graphs.Pacer.replayed if "Pacer" in module else mdkern.engine.planned.reveal_tick

            def interrupted(*arguments: object, original=original, after=after, **named: object) -> object:
                nonlocal count
                count += 1
                if count == after:  # the third `reveal_tick` is the one that is captured
                    raise KeyboardInterrupt
                return original(*arguments, **named)

            with monkeypatch.context() as patch:
                patch.setattr(target, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    draw(pair)
            assert torch.equal(draw(pair), plain)

    def test_a_model_that_cannot_be_captured_runs_eagerly_with_one_warning(self) -> None:
        table = torch.randn(70, 70, device="cuda")

        class Reading(nn.Module):
            def forward(self, input_ids: Tensor) -> Tensor:
                return table[input_ids] * (1.0 if int(input_ids.sum()) >= 0 else 0.0)  # a host synchronisation

        model = Reading().eval()
        adapted = mdkern.adapt(model, vocab_size=70, mask_id=69, device="cuda")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            both = [mdkern.sample(adapted, num_samples=3, length=20, seed=1).sequences for _ in range(2)]
        told = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
        assert len(told) == 1
        assert "Reading" in told[0]
        assert torch.equal(*both)
        assert torch.equal(
            both[0], mdkern.sample(adapted, num_samples=3, length=20, seed=1, cuda_graphs=False).sequences
        )
        self.no_capture_is_left()

    def no_capture_is_left(self) -> None:
        """In one, the generator would draw nothing, and the allocator would take back no memory that another stream was
        recorded for, as long as the process lives."""
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # now it looks at what has been done
        before = torch.cuda.memory_allocated()
        torch.empty(1 << 24, device="cuda").record_stream(torch.cuda.Stream())
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")
        assert torch.cuda.memory_allocated() == before

    def test_work_that_is_left_on_another_stream_is_no_capture(self) -> None:
        table, side = torch.randn(70, 70, device="cuda"), torch.cuda.Stream()

        class Forking(nn.Module):
            def forward(self, input_ids: Tensor) -> Tensor:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    table.sum()  # the caller's stream never waits for it
                return table[input_ids]

        model = mdkern.adapt(Forking().eval(), vocab_size=70, mask_id=69, device="cuda")
        with pytest.warns(UserWarning, match="can't be captured"):
            drawn = mdkern.sample(model, num_samples=3, length=20, seed=1).sequences
        assert torch.equal(drawn, mdkern.sample(model, num_samples=3, length=20, seed=1, cuda_graphs=False).sequences)
        self.no_capture_is_left()

    def test_a_failing_call_waits_for_what_it_began(self, pair: tuple[DiT, DiT], monkeypatch) -> None:
        """Its workspace's memory goes back to the stream that it was made on, which may be another."""
        plain = draw(pair)

        def fail(*_: object) -> None:
            torch.cuda._sleep(10**9)
            raise ZeroDivisionError

        stream = torch.cuda.Stream()
        with monkeypatch.context() as patch:
            patch.setattr("mdkern.engine.planned.has_failed", fail)
            with torch.cuda.stream(stream), pytest.raises(ZeroDivisionError):
                draw(pair)
        assert stream.query(), "the device is still at work"
        assert torch.equal(draw(pair), plain)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_two_denoisers_around_one_model(self, pair: tuple[DiT, DiT]) -> None:
        models = {"H": EarlyExit(pair[0], 3), "L": EarlyExit(pair[0], 1)}
        both = [mdkern.sample(models, "L10 H20 L10", **OPTIONS, cuda_graphs=on).sequences for on in (True, False)]
        assert torch.equal(*both)

    def test_nan_is_reported_and_the_next_call_works(self, pair: tuple[DiT, DiT]) -> None:
        plain = draw(pair)

        class Broken(nn.Module):
            def forward(self, input_ids: Tensor) -> Tensor:
                return torch.full((*input_ids.shape, 70), torch.nan, device="cuda")

        with pytest.raises(FloatingPointError):
            mdkern.sample(mdkern.adapt(Broken().eval(), vocab_size=70, mask_id=69, device="cuda"), length=20)
        assert torch.equal(draw(pair), plain)

    def test_clear_gives_the_memory_back(self, pair: tuple[DiT, DiT]) -> None:
        draw(pair)  # the first call leaves behind what belongs to libraries, not to graphs
        graphs.clear()
        before = torch.cuda.memory_allocated()
        draw(pair)
        held = torch.cuda.memory_allocated()
        graphs.clear()
        assert torch.cuda.memory_allocated() < held
        assert torch.cuda.memory_allocated() <= before + 2**20
        assert graphs.held() == []

    def test_what_is_kept_is_bounded(self, pair: tuple[DiT, DiT]) -> None:
        for length in range(10, 22, 2):
            mdkern.sample(pair[1], num_samples=2, length=length, steps=6, seed=0)
        assert len(graphs._idle) <= graphs.MOST_WORKSPACES

    def test_a_dead_models_graphs_are_dropped(self, pair: tuple[DiT, DiT]) -> None:
        other = random_dit(5, **SHAPE).to("cuda")
        mdkern.sample(other, length=24, steps=6, seed=0)
        assert graphs.held()
        del other
        mdkern.sample(pair[1], length=24, steps=6, seed=0)
        assert {name for name, _ in graphs.held()} == {"DiT-1", "state"}

    def test_no_host_synchronisation_between_replays(self, pair: tuple[DiT, DiT], monkeypatch) -> None:
        draw(pair)
        original = planned.TickBuffer.load

        def watched(self, *arguments):
            torch.cuda.set_sync_debug_mode("error")
            return original(self, *arguments)

        monkeypatch.setattr(planned.TickBuffer, "load", watched)
        monkeypatch.setattr("mdkern.engine.planned.has_failed", lambda *_: torch.cuda.set_sync_debug_mode("default"))
        try:
            out = draw(pair)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        monkeypatch.undo()
        assert torch.equal(out, draw(pair))
