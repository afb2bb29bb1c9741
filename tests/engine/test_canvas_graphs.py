"""Captured passes of canvases, with stand-ins for CUDA graphs: what they serve, and when they must not."""

# mypy: ignore-errors

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern.engine import canvas_graphs, canvas_run
from mdkern.engine.capture import CaptureError
from tests.engine.test_canvas import CASES, SEED, SHORT, Recorder, prompts
from tests.problems.canvas_models import small_model


class Replayed:
    """In the place of a CUDA graph: runs again what was captured, over the tensors that it was captured with."""

    def __init__(self, run: Any) -> None:
        self.run, self.replays = run, 0

    def replay(self) -> None:
        self.replays += 1
        self.run()


class Looped:
    """In the place of the loop on the device."""

    def __init__(self, graph: Replayed, left: Tensor) -> None:
        self.graph, self.left = graph, left

    def run(self, _: Any) -> None:
        self.graph.replay()
        while int(self.left[0]):
            self.graph.replay()


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Graphs on the CPU; the list of those captured."""
    captured: list[Replayed] = []

    def capture(run: Any, *_: Any, **__: Any) -> tuple[Replayed, int]:
        graph = Replayed(run)
        captured.append(graph)
        return graph, 0

    monkeypatch.setattr(canvas_graphs, "can_capture", lambda _: True)
    monkeypatch.setattr(canvas_graphs, "capture", capture)
    monkeypatch.setattr(canvas_graphs, "make_loop", Looped)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return captured


@pytest.mark.parametrize("streamed", [False, True])
def test_captured_passes_serve_later_calls(streamed: bool, replayed: list[Replayed], monkeypatch: Any) -> None:
    """Other prompts, other padding and other seeds, by the graphs of earlier calls, give what eager passes give."""
    monkeypatch.setattr(canvas_run, "LENGTH_UNIT", 1)
    model = small_model(sharpness=3.0)
    model.generation_config.eos_token_id = None
    mask = torch.ones(3, 9, dtype=torch.bool)
    options = SHORT | {"max_denoising_steps": 3}
    counts = []
    for seed in range(3):
        ids, padded = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(seed)), mask.clone()
        padded[seed % 3, : seed + 1] = False
        for given in (mask, padded):
            got_drafts, want_drafts = (Recorder(), Recorder()) if streamed else (None, None)
            got = mdkern.sample_canvas(model, ids, given, streamer=got_drafts, **options | {"seed": seed})
            counts.append(len(replayed))
            eager = {"streamer": want_drafts, "cuda_graphs": False, "seed": seed}
            want = mdkern.sample_canvas(model, ids, given, **options | eager)
            assert torch.equal(got.sequences, want.sequences)
            assert torch.equal(got.nfe["H"], want.nfe["H"])
            if streamed:
                assert torch.equal(torch.stack(got_drafts.drafts), torch.stack(want_drafts.drafts))
    # At once a step of each canvas, with and without padding; at the second time the encoder before each, of which the
    # one before the second canvas has a mask in any case.
    assert counts == [2, 5, 6, 7, 7, 7]
    assert all(graph.replays > 1 for graph in replayed)


def test_prompts_of_many_lengths_share_their_passes(replayed: list[Replayed], monkeypatch: Any) -> None:
    model = small_model(sharpness=3.0)
    model.generation_config.eos_token_id = None
    got, counts = {}, []
    for unit in (1, 16):
        monkeypatch.setattr(canvas_run, "LENGTH_UNIT", unit)
        got[unit] = [mdkern.sample_canvas(model, prompts(2, length), **SHORT) for length in (5, 9, 12, 16)]
        counts.append(len(replayed))
        replayed.clear()
        canvas_run.clear()
    # Two canvases at each of 4 lengths; else two steps and encoders of padded prompts, and two steps of full ones.
    assert counts == [8, 6]
    for one, padded in zip(*got.values()):
        assert torch.equal(one.sequences, padded.sequences)
        assert torch.equal(one.lengths, padded.lengths)
        assert torch.equal(one.prompt_lengths, padded.prompt_lengths)


def test_calls_inside_inference_mode_and_outside_of_it(replayed: list[Replayed]) -> None:
    model, ids = small_model(sharpness=3.0), prompts(2)
    with torch.inference_mode():
        want = [mdkern.sample_canvas(model, ids.clone(), **SHORT) for _ in range(2)]
    got = mdkern.sample_canvas(model, ids, **SHORT)
    assert torch.equal(got.sequences, want[0].sequences)
    assert torch.equal(got.sequences, want[1].sequences)
    assert not want[0].sequences.is_inference()


def test_a_canvas_that_ends_early_takes_no_further_step(replayed: list[Replayed]) -> None:
    model, options = small_model(sharpness=12.0), dict(CASES["early ends"])
    options.pop("sharpness")
    options["max_new_tokens"] = 8
    ran = []
    own = canvas_run.canvas_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas_run, "canvas_step", lambda *given: (ran.append(1), own(*given)))
        for _ in range(2):
            ran.clear()
            out = mdkern.sample_canvas(model, prompts(1), seed=SEED, **options)
            assert len(ran) == int(out.nfe["H"][0]) < options["max_denoising_steps"]
    assert replayed


def test_a_pass_that_cannot_be_captured_runs_eagerly(replayed: list[Replayed], monkeypatch: Any) -> None:
    """The failed capture of the encoder leaves the cache half-filled."""
    model, ids = small_model(sharpness=3.0), prompts(2)
    want = mdkern.sample_canvas(model, ids, **SHORT, cuda_graphs=False)

    def capture(run: Any, *_: Any, **__: Any) -> Any:
        run()
        raise CaptureError("no")

    monkeypatch.setattr(canvas_graphs, "capture", capture)
    with pytest.warns(UserWarning, match=r"can't be captured in a CUDA graph"):
        runs = [mdkern.sample_canvas(model, ids, **SHORT) for _ in range(2)]
    assert torch.equal(runs[1].sequences, want.sequences)


def test_passes_after_one_that_failed_have_another_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others share one for as long as there are graphs in it."""
    pools: list[Any] = []

    def capture(run: Any, _: Any, pool: Any, *__: Any, **___: Any) -> tuple[Replayed, int]:
        pools.append(pool)
        run()
        return Replayed(run), 0

    def fail(_: Any) -> None:
        raise CaptureError("no")

    monkeypatch.setattr(canvas_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    passes = canvas_graphs.CapturedPasses(torch.device("cpu"))
    for kind in ("one", "two", "bad", "three", "four"):
        with pytest.warns(UserWarning, match="bad can't") if kind == "bad" else nullcontext():
            passes.capture(kind, {}, fail if kind == "bad" else lambda _: None, kind)
    before, after = pools[:3], pools[3:]
    assert before == before[:1] * 3
    assert after == after[:1] * 2
    assert before[0] != after[0]


@pytest.mark.gpu
def test_gpu_passes_are_captured_after_one_that_failed() -> None:
    """They and those before it replay, and the generator draws."""
    out, given = torch.zeros(3, device="cuda"), {"x": torch.ones(3, device="cuda")}
    passes = canvas_graphs.CapturedPasses(out.device)

    def times(factor: float) -> Any:
        return lambda inputs: out.copy_(inputs["x"] * factor)  # the product lies in the pool

    first = passes.capture("first", given, times(2.0), "a product")
    with pytest.warns(UserWarning, match="a look can't be captured"):
        assert passes.capture("bad", given, lambda inputs: inputs["x"].sum().item(), "a look") is None
    torch.rand(1, device="cuda")  # which a generator in capture mode refuses
    second = passes.capture("second", given, times(3.0), "a product")
    for captured, factor in ((first, 2.0), (second, 3.0), (first, 2.0)):
        captured.graph.replay()
        assert out.tolist() == [factor] * 3


def test_a_changed_model_is_run_as_it_is_now(replayed: list[Replayed]) -> None:
    """A hook added after the first call, and a weight in another place: both need new captures, as the old graphs know
    nothing of them. The workspace does not keep a model alive."""
    model, ids = small_model(sharpness=3.0), prompts(1)
    before = mdkern.sample_canvas(model, ids, **SHORT)
    assert torch.equal(mdkern.sample_canvas(model, ids, **SHORT).sequences, before.sequences)
    captured = len(replayed)
    norm = model.model.decoder.layers[0].post_feedforward_layernorm
    hook = norm.register_forward_hook(lambda _, __, output: -3.0 * output)
    for _ in range(2):
        hooked = mdkern.sample_canvas(model, ids, **SHORT)
        assert torch.equal(hooked.sequences, mdkern.sample_canvas(model, ids, **SHORT, cuda_graphs=False).sequences)
    assert not torch.equal(hooked.sequences, before.sequences)
    assert len(replayed) == 2 * captured
    hook.remove()
    mdkern.sample_canvas(model, ids, **SHORT)
    captured = len(replayed)
    model.lm_head.weight.data = model.lm_head.weight.flip(0).contiguous()
    moved = mdkern.sample_canvas(model, ids, **SHORT)
    assert len(replayed) > captured
    assert not torch.equal(moved.sequences, before.sequences)
    alive = weakref.ref(model)
    del model, norm, hook
    gc.collect()
    assert alive() is None
