"""A DiffusionGemma of transformers with small random weights."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import pytest
import torch


def small_model(vocab: int = 64, canvas: int = 8, sharpness: float = 1.0, **changes: Any) -> Any:
    """Two layers, one of them with a sliding window shorter than two canvases. `sharpness` scales the logits."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        pytest.skip("this version of transformers has no DiffusionGemma")
    text = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 12,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "max_position_embeddings": 256,
        "layer_types": ["sliding_attention", "full_attention"],
    } | changes
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    config = transformers.DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=canvas,
        image_token_id=vocab + 1,
        boi_token_id=vocab + 2,
        eoi_token_id=vocab + 3,
    )
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # or the canvas would hardly matter
        model.model.decoder.norm.weight.mul_(sharpness)
    model.generation_config.eos_token_id = [1, 2]
    model.generation_config.pad_token_id = 0
    return model
