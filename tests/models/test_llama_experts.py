"""Mixtures of experts in mdkern's own passes: the same as by the models' own forward, with their weights in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mdkern
from mdkern.models.hf import llama_fused
from mdkern.models.hf.llama_experts import Kind
from mdkern.models.hf.llama_parts import tensors_of
from mdkern.models.hf.probe import Probe
from mdkern.models.hf.split import SplitDenoiser
from tests.models.test_llama import (  # noqa: F401  tests and fixtures, here for models with experts
    CLOSE,
    KEPT,
    TestPasses,
    fused,
    without_gradients,
)
from tests.problems.expert_models import EXPERT_WIDTH, SPARSE, Gate, qwen_experts, sparse
from tests.problems.hf_models import adapted, draw, random_ids

KINDS = {
    "qwen 3, experts": Kind(True, True, False, True, True),
    "qwen 3, experts, not normalised": Kind(True, False, False, True, True),
    "llada-moe": Kind(True, False, False, True, True),
    "llada 2": Kind(False, True, False, True, True),
}


@pytest.fixture(params=["qwen 3, experts", "llada-moe, shared expert", "llada 2", "llada 2, wide shared expert"])
def model(request: pytest.FixtureRequest) -> Any:
    return SPARSE[request.param]()


def test_how_experts_are_chosen_is_found_out() -> None:
    """Also whether groups and factors count, where the model has any, which only LLaDA 2 has here."""
    for name, kind in KINDS.items():
        denoiser = adapted(SPARSE[name]())
        assert isinstance(denoiser, SplitDenoiser)
        assert denoiser.anatomy.plan is not None
        assert denoiser.anatomy.plan.experts == kind, name


@pytest.mark.parametrize("name", ["llada 2", "llada 2, wide shared expert", "qwen 3, experts"])
def test_no_weight_is_copied(name: str) -> None:
    model = SPARSE[name]()
    parts = adapted(model).parts  # type: ignore[attr-defined]
    owned = [parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())]
    others = [tensor for tensor in tensors_of(parts) if tensor.untyped_storage().data_ptr() not in owned]
    assert sum(tensor.numel() for tensor in others if tensor.dtype == torch.float32) == parts.cos.numel() * 2
    assert all(tensor.shape[0] == 3 for tensor in others if tensor.dtype == torch.int64), "only where weights lie"


def test_places_keep_their_address_while_weights_keep_theirs() -> None:
    """Graphs hold it."""
    model = sparse("llada2_moe", shared=EXPERT_WIDTH)
    denoiser = adapted(model)

    def places() -> list[Tensor]:
        return [block.experts.places for block in denoiser.parts.blocks if block.experts is not None]  # type: ignore[attr-defined]

    before = places()
    assert [now.data_ptr() for now in places()] == [then.data_ptr() for then in before]
    other = sparse("llada2_moe", shared=EXPERT_WIDTH)
    model.load_state_dict(other.state_dict(), assign=True)
    assert not any(torch.equal(now, then) for now, then in zip(places(), before))


def test_block_causal_experts() -> None:
    """As LLaDA 2 is run: every position sees the blocks up to its own."""
    model, ids = sparse("llada2_moe", shared=EXPERT_WIDTH), random_ids(2, 12)
    denoiser = adapted(model, block_causal=4)
    assert "mdkern's own passes" in denoiser.description
    block = torch.arange(12) // 4
    want = model(ids, attention_mask=(block[:, None] >= block).expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(denoiser.logits(ids)[..., KEPT], want[..., KEPT], **CLOSE)


def test_sampled_tokens_are_those_of_its_own_forward() -> None:
    model = sparse("llada_moe", shared=EXPERT_WIDTH)
    options: dict[str, Any] = {"decoder": "threshold", "cache": "dual"}
    ours = draw(model, **options).sequences
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_fused, "runs_now", lambda: False)
        assert torch.equal(draw(model, **options).sequences, ours)


def with_biased_expert(model: Any) -> None:
    model.model.layers[1].mlp.experts[3].up_proj = nn.Linear(
        *model.model.layers[1].mlp.experts[3].up_proj.weight.T.shape
    )


def with_other_activation(model: Any) -> None:
    for block in model.model.layers[1:]:
        for expert in block.mlp.experts:
            expert.act_fn = nn.GELU()


def with_another_choice(model: Any) -> None:
    class Squared(Gate):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            index, weights = super().forward(x)
            return index, weights * weights

    for block in model.model.layers[1:]:
        block.mlp.gate.__class__ = Squared


def with_biased_router(model: Any) -> None:
    for block in model.model.layers[1:]:
        block.mlp.gate.bias = nn.Parameter(torch.zeros(1))


def with_expert_elsewhere(model: Any) -> None:
    """At an address that is no multiple of 16 bytes."""
    layer = model.model.layers[2].mlp.experts[0].up_proj
    room = torch.zeros(layer.weight.numel() + 1)[1:].view_as(layer.weight)
    layer.weight = nn.Parameter(room.copy_(layer.weight.detach()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_biased_expert, "an expert's up_proj is not a plain linear layer without a bias"),
        (with_other_activation, "its Sparse chooses experts in another way than is known"),
        (with_another_choice, "its Sparse chooses experts in another way than is known"),
        (with_biased_router, "its router is no product with a weight alone"),
        (with_expert_elsewhere, "must be contiguous, at addresses that are multiples of 16 bytes"),
    ],
)
def test_what_is_built_differently_runs_by_its_own_forward(change: Any, reason: str) -> None:
    model, ids = sparse("llada2_moe"), random_ids(2, 9)
    change(model)
    denoiser = adapted(model)
    assert reason in denoiser.description, denoiser.description
    torch.testing.assert_close(denoiser.logits(ids)[..., KEPT], model(ids).logits[..., KEPT], **CLOSE)


def test_models_that_roundings_change_are_recognised_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which right passes differ by more than is allowed of others. Wrong ones differ by more still."""
    model = sparse("llada2_moe", layers=9).bfloat16()
    own = "with its backbone run by mdkern's own passes"
    assert own in adapted(model).description
    embedding = model.model.embed
    model.model.embed = ScaledEmbedding.from_pretrained(embedding.weight.detach())
    assert "mdkern's own passes do not give what it gives" in adapted(model).description
    model.model.embed = embedding
    monkeypatch.setattr(Probe, "unsteadiness", lambda *_: 1.0)
    model.model.norm = copy.copy(model.model.norm)  # so that it is examined again
    assert "mdkern's own passes do not give what it gives" in adapted(model).description


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


def test_a_call_looks_at_no_expert_of_a_model_that_has_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be ten thousands of modules. All walks through them are by this function."""
    denoiser = adapted(sparse("llada2_moe", shared=EXPERT_WIDTH))
    walked: list[str] = []
    own = nn.Module.named_modules

    def named_modules(self: nn.Module, *args: Any, **options: Any) -> Any:
        for name, module in own(self, *args, **options):
            walked.extend([name] if ".experts." in name else [])
            yield name, module

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    for calls in range(3):
        walked.clear()
        out = mdkern.sample(denoiser, num_samples=2, length=8, steps=4, seed=calls, progress=False)
        assert out.sequences is not None
        assert out.sequences.shape == (2, 8)
        assert bool(walked) == (calls == 0)
    denoiser.model.setting = 1  # type: ignore[attr-defined]
    mdkern.sample(denoiser, num_samples=2, length=8, steps=4, progress=False)
    assert walked


def test_settings_are_read_when_a_pass_runs() -> None:
    model, ids = qwen_experts(), random_ids(2, 9)
    denoiser = adapted(model)
    before = denoiser.logits(ids)
    for block in model.model.layers:
        block.mlp.gate.top_k = 2
    want = model(ids).logits[..., KEPT]
    assert not torch.allclose(before[..., KEPT], want, **CLOSE)
    torch.testing.assert_close(denoiser.logits(ids)[..., KEPT], want, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_errors_are_no_larger_than_its_own(model: Any, dtype: torch.dtype) -> None:
    """Of the median row: a rounding gives some rows to other experts, whichever way computes them."""
    ids = random_ids(8, 20).cuda()
    denoiser = adapted(model.cuda())
    exact = denoiser.hidden(ids).double()
    model.to(dtype)
    ours = denoiser.hidden(ids).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_fused, "runs_now", lambda: False)
        theirs = denoiser.hidden(ids).double()
    assert not torch.equal(ours, theirs), "both are its own forward"
    error, own = ((states - exact).norm(dim=-1).median() for states in (ours, theirs))
    assert error <= 1.5 * own


@pytest.mark.gpu
def test_gpu_passes_are_captured() -> None:
    """They read nothing on the host, which the models' own experts do."""
    model, ids = sparse("llada2_moe", shared=EXPERT_WIDTH).cuda(), random_ids(2, 12).cuda()
    denoiser = adapted(model)
    model.to(torch.bfloat16)
    want = denoiser.hidden(ids)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = denoiser.hidden(ids)
    graph.replay()
    assert torch.equal(replayed, want)
