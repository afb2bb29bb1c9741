"""What the tests share: small random denoisers, and the skipping of GPU tests where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mdkern import DiT, DiTConfig

VOCAB = {"vocab_size": 11, "mask_id": 10}
SHAPE: dict[str, Any] = VOCAB | {"max_length": 16, "num_blocks": 2, "width": 16, "num_heads": 2}


def pytest_configure() -> None:
    # The models here are too small to share out: on two busy cores a forward pass takes 1 ms with one thread and 65 ms
    # with two, which wait for each other.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def random_dit(seed: int = 0, **changes: Any) -> DiT:
    """A small `DiT` with random parameters, none of them at its initial 0 or 1, whose logits have a spread of about 1.

    Args:
        seed: of the parameters.
        changes: fields of `DiTConfig` that differ from `SHAPE`.
    """
    generator = torch.Generator().manual_seed(seed)
    model = DiT(DiTConfig(**(SHAPE | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 and name != "embedding" else 1
            parameter.normal_(0.0, (0.5 if parameter.ndim == 1 else 1.0) / fan_in**0.5, generator=generator)
            if "norm" in name:
                parameter += 1.0
    return model


@pytest.fixture(scope="session")
def make_dit() -> Callable[..., DiT]:
    """`random_dit`, for tests that want a denoiser."""
    return random_dit
