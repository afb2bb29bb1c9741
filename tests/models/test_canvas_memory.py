"""How many bytes a pass of DiffusionGemma needs beside its weights, at its true size: counted, with fake tensors."""

# mypy: ignore-errors

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bench_diffusion_gemma import CANVAS, PROMPT, TRUE_SIZES
from mdkern.models.hf import lean
from mdkern.models.hf.block_diffusion import BlockDiffusion
from tests.problems.canvas_models import small_model
from tests.problems.live_bytes import LiveBytes, Skipped

WORKSPACES = 64 << 20  # of cuBLAS; what is not counted otherwise took 57 MiB with 32 texts, 21 with 8
LAYERS = ["sliding_attention", "full_attention"]  # of 25 and 5 in the model


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("texts", "most"), [(8, 0.45), (32, 1.25)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_pass_fits(texts: int, most: float, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """GiB above the weights: the cache, soft embeddings, and all that a layer has at a time."""
    pytest.importorskip("triton")
    from mdkern.kernels.backbone import triton_combine, triton_experts, triton_swiglu

    for module, kernel in (
        (triton_experts, "sort_pairs_kernel"),
        (triton_experts, "expert_product_kernel"),
        (triton_combine, "combine_kernel"),
        (triton_swiglu, "swiglu_kernel"),
    ):
        monkeypatch.setattr(module, kernel, Skipped())
    monkeypatch.setattr(triton_experts, "copies_in_bulk", lambda matrix: True)
    monkeypatch.setattr(lean, "gated_experts", lambda *given: triton_experts.gated_experts(*given, "gelu"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad(), FakeTensorMode(), LiveBytes() as live:
            needed = bytes_of_a_pass(live, texts, padded)
    finally:
        torch.set_default_dtype(before)
    assert needed + WORKSPACES < most * 2**30


def bytes_of_a_pass(live: LiveBytes, texts: int, padded: bool) -> int:
    sizes = TRUE_SIZES | {"num_hidden_layers": 4, "layer_types": LAYERS * 2, "max_position_embeddings": 2048}
    model = small_model(canvas=CANVAS, **sizes)
    network = BlockDiffusion(model)
    network.encoder, network.decoder = (lean.lean_copy(part) for part in (network.encoder, network.decoder))
    cache, ids = network.new_cache(PROMPT), torch.zeros(texts, PROMPT, dtype=torch.int64)
    network.encode(ids, network.encoder_masks(ids, None, cache, {}), cache, {})
    canvas = torch.zeros(texts, CANVAS, dtype=torch.int64)
    soft = torch.zeros(texts, CANVAS, sizes["hidden_size"])
    mask = torch.ones(texts, 1, CANVAS, PROMPT + CANVAS, dtype=torch.bool) if padded else None
    positions = torch.arange(PROMPT, PROMPT + CANVAS, dtype=torch.int32)[None]
    for _ in range(2):  # the first makes room for the canvas's keys, which stays
        before = live.peak = live.now
        network.hidden(canvas, soft, positions, dict.fromkeys(LAYERS, mask), cache)
    sliding, whole = cache.layers[:2]
    kept = sum(part.nbytes for part in (soft, *sliding.beside.values()))
    return 25 * sliding.held.nbytes + 5 * whole.held.nbytes + kept + live.peak - before
