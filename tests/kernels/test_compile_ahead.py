"""Kernels that are compiled side by side before a step first runs."""

# mypy: ignore-errors

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import mdkern
from mdkern.engine import capture, graphs
from mdkern.kernels import compile_ahead
from mdkern.models.hf import llama_fused, pass_trial
from tests.own_process import run_in_own_process
from tests.problems.expert_models import qwen_experts
from tests.problems.hf_models import adapted, bert, llama, random_ids

pytest.importorskip("triton")


def test_launches_compile_in_threads_and_launch_nothing() -> None:
    run_in_own_process("tests.suites.compiled_ahead", TRITON_INTERPRET="0")


def test_turns_are_taken_one_at_a_time_by_weight() -> None:
    turns, taken, here = compile_ahead.Turns(), [], threading.Barrier(6)

    def work(weight: int) -> None:
        here.wait()
        turns.take(weight)
        taken.append(weight)
        assert turns.holder == threading.get_ident()
        turns.give_back()

    threads = [threading.Thread(target=work, args=(weight,)) for weight in (3, 1, 5, 2, 4)]
    for thread in threads:
        thread.start()
    here.wait()
    while len(turns.waiting) < 5:  # nobody has the turn before all wait for it
        threading.Event().wait(0.001)
    assert taken == []
    turns.give_back()
    for thread in threads:
        thread.join()
    assert taken == [5, 4, 3, 2, 1]


def test_the_slowest_kernels_are_translated_first() -> None:
    """By name, so each must be the name of a kernel; then those in Gluon, however short."""
    from mdkern.kernels.backbone import hopper_linear, hopper_resident, triton_modulated_norm
    from mdkern.kernels.head import hopper_projection, triton_projection

    slowest = hopper_linear.linear_kernel, hopper_resident.resident_kernel
    assert {kernel.__name__ for kernel in slowest} == set(compile_ahead.SLOWEST)
    gluon = hopper_projection.vocab_projection_hopper_kernel
    plain = triton_projection.vocab_projection_kernel, triton_modulated_norm.modulated_norm_kernel
    order = [compile_ahead.weight_of(kernel.__name__, kernel.src, True) for kernel in (*slowest[::-1], gluon)]
    order += [compile_ahead.weight_of(kernel.__name__, kernel.src, False) for kernel in plain]
    assert order == sorted(order, reverse=True)


def test_what_may_keep_something_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own forward may make a table of angles, which would never be filled."""
    own, fused, ids = adapted(bert()), adapted(llama()), random_ids(1, 6)
    dit = mdkern.DiT(mdkern.DiTConfig(vocab_size=9, mask_id=8, width=16, num_heads=2, num_blocks=1, max_length=8))
    monkeypatch.setattr(compile_ahead._rehearsing, "value", True)
    with torch.no_grad():
        fused.hidden(ids)
        with pytest.raises(RuntimeError, match="own forward is not rehearsed"):
            own.hidden(ids)
    denoiser = mdkern.adapt(dit)
    assert denoiser.keeps_nothing
    dit.blocks[0].mlp_up = torch.nn.Sequential(dit.blocks[0].mlp_up)
    assert not denoiser.keeps_nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = mdkern.adapt(lambda input_ids: torch.zeros(*input_ids.shape, 9), vocab_size=9, mask_id=8)
    assert not function.keeps_nothing


def test_adapting_a_model_compiles_all_kernels_of_its_passes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By two of its blocks; each pass that is then compared with the model's forward has been rehearsed."""
    passes, rehearsals, run = [], [], llama_fused.run

    def watched(parts, input_ids, rows, positions=None, mask=None, kept=None, columns=None, *rest, **more):
        kind = [x is None or tuple(x.shape) for x in (input_ids, rows, positions, mask, columns)]
        passes.append((len(parts.blocks), kept is None, kind))
        return run(parts, input_ids, rows, positions, mask, kept, columns, *rest, **more)

    def rehearse(key, work, device) -> None:
        with monkeypatch.context() as inside:  # where no forward of the model's own runs
            inside.setattr(compile_ahead._rehearsing, "value", True)
            work()
            rehearsals.append((key, list(passes)))
        passes.clear()

    monkeypatch.setattr(llama_fused, "run", watched)
    monkeypatch.setattr(pass_trial, "rehearse_once", rehearse)
    found = adapted(llama(num_hidden_layers=3))
    assert not found.anatomy.own_forward
    ((key, rehearsed),) = rehearsals
    hash(key)
    assert {blocks for blocks, *_ in rehearsed} == {2}
    assert {blocks for blocks, *_ in passes} == {3}
    wanted = [kinds for _, *kinds in passes]
    assert all(kinds in wanted for _, *kinds in rehearsed)
    assert all([True, kind] in [kinds for _, *kinds in rehearsed] for whole, kind in wanted[:4])
    assert all([False, kind] in [kinds for _, *kinds in rehearsed] for whole, kind in wanted if not whole)
    rehearsals.clear()
    adapted(qwen_experts())
    assert rehearsals == []


@pytest.mark.gpu
def test_gpu_a_step_finds_its_kernels_compiled(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the step are compiled in threads, and the tokens are those of a run without graphs."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    compiled: list[tuple[str, bool]] = []
    note = lambda **told: compiled.append((told["src"].name, threading.current_thread() is here))  # noqa: E731
    here = threading.current_thread()
    monkeypatch.setattr(triton.knobs.compilation, "listener", note)
    torch.manual_seed(0)
    config = mdkern.DiTConfig(vocab_size=611, mask_id=610, width=136, num_heads=2, num_blocks=2, max_length=40)
    model = mdkern.DiT(config).to("cuda", torch.bfloat16)
    options = {"num_samples": 3, "length": 40, "steps": 5, "seed": 0}
    drawn = mdkern.sample(model, **options).sequences
    asides = {name for name, inline in compiled if not inline}
    assert {"modulated_norm_kernel", "end_tick_kernel"} <= asides
    assert len(asides) > 4
    assert not [name for name, inline in compiled if inline and name in asides]
    assert torch.equal(drawn, mdkern.sample(model, cuda_graphs=False, **options).sequences)
    graphs.clear()


@pytest.mark.gpu
def test_gpu_a_step_that_cannot_be_rehearsed_is_captured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    record, failed = capture.record, []

    def failing(graph, step, pool, device, mode) -> None:
        def run() -> None:
            step()
            if mode == "relaxed":
                failed.append(mode)
                torch.cuda.synchronize()  # which no capture allows

        record(graph, run, pool, device, mode)

    monkeypatch.setattr(capture, "record", failing)
    graphs.clear()
    config = mdkern.DiTConfig(vocab_size=50, mask_id=49, width=64, num_heads=2, num_blocks=2, max_length=40)
    model = mdkern.DiT(config).to("cuda", torch.bfloat16)
    for decoder in ("ancestral", "threshold"):
        options = {"num_samples": 3, "length": 40, "steps": 5, "seed": 0, "decoder": decoder}
        captured = [name for name, _ in graphs.held()].count("DiT-2")
        with warnings.catch_warnings(action="error"):
            drawn = mdkern.sample(model, **options).sequences
        assert failed
        assert [name for name, _ in graphs.held()].count("DiT-2") > captured
        torch.rand(1, device="cuda")  # which a generator in capture mode refuses
        assert torch.equal(drawn, mdkern.sample(model, cuda_graphs=False, **options).sequences)
        failed.clear()
    graphs.clear()
