"""All questions about a device. Importing this module does not import Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# [16, 12, 1024, 64], non-causal, H200: cuDNN 0.122 ms, flash 0.188, memory-efficient 0.417.
HOPPER_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@cache
def capability(device: torch.device) -> int:
    """Major compute capability; 9 on a CPU, so that the interpreter takes every path of the launchers."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there: Triton is installed, and the GPU has compute capability 8 or later."""
    return device.type == "cuda" and find_spec("triton") is not None and capability(device) >= 8


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels for Hopper run there; their matrix instructions exist in compute capability 9 only."""
    return has_triton(device) and capability(device) == 9


@cache
def computes_in_fp8(device: torch.device) -> bool:
    """Whether the GPU multiplies matrices in e4m3: it has compute capability 8.9 or later. True on a CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one that it depends on has ended (programmatic dependent launch)."""
    return device.type == "cuda" and capability(device) >= 9


@cache
def num_sms(device: torch.device) -> int:
    """Number of streaming multiprocessors; 4 on a CPU, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def copies_in_bulk(matrix: Tensor) -> bool:
    """Whether the bulk-copy engine (TMA) can read a matrix: compute capability 9 or later, and each row contiguous and
    aligned to 16 bytes."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return capability(matrix.device) >= 9 and matrix.stride(1) == 1 and aligned


def attention_priority(device: torch.device, divide_keys: bool = False) -> AbstractContextManager[None]:
    """A context in which SDPA tries its backends in the order of their speed on this card. On CPUs, and when compiling,
    PyTorch's order stays.

    Args:
        divide_keys: first the backend that gives parts of one query's keys to several multiprocessors.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    order = HOPPER_ATTENTION if capability(device) >= 9 else HOPPER_ATTENTION[1:]
    return sdpa_kernel(
        sorted(order, key=SDPBackend.FLASH_ATTENTION.__ne__) if divide_keys else order, set_priority=True
    )
