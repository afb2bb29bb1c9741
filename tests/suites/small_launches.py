"""One small launch of kernels with shared memory, asynchronous copies or programs that wait for each other.

    python -m tests.suites.small_launches                  # all of them, on the GPU
    python -m tests.suites.small_launches skinny experts   # some of them
    compute-sanitizer --tool racecheck python -m tests.suites.small_launches

It is short enough for CUDA's compute-sanitizer, under which `make memcheck` runs it. Results are compared with those of
the operators' references on the CPU, loosely: other tests say how exact they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mdkern.kernels.backbone import attention_fp8, fp8_skinny, joint, linear, linear_fp8, skinny
from mdkern.kernels.backbone.attention import attention_operator, tiles_of
from mdkern.kernels.backbone.experts import gated_experts, listed_experts, places_of
from mdkern.kernels.backbone.quantise import (
    FP8,
    quantise_columns,
    quantise_layer,
    quantise_rows,
    quantised_norm,
)
from mdkern.kernels.backbone.rms_norm import gathered_scaled_rms_norm, scaled_rms_norm
from mdkern.kernels.backbone.scaled_linear import Scaled, scaled_linear
from mdkern.kernels.backbone.swiglu import scaled_swiglu
from mdkern.kernels.backbone.window_attention import window_attention_operator
from tests.problems.backbone import WindowCase, normal
from tests.problems.experts import experts_problem, listed
from tests.problems.projection import Problem
from tests.problems.soft import SoftProblem

HALF = torch.bfloat16


def weight(seed: int, columns: int, inner: int, device: str) -> Tensor:
    return (normal(seed, columns, inner) * inner**-0.5).to(HALF).to(device)


def scaled(matrix: Tensor) -> Scaled:
    """Rounded on the CPU, so that both devices have the same numbers."""
    return Scaled(*(part.to(matrix.device) for part in quantise_rows(matrix.cpu())))


def skinny_products(device: str) -> Iterator[Tensor]:
    for rows in (3, 40):
        x, bias = normal(1, rows, 1024, dtype=HALF, device=device), normal(2, 256, dtype=HALF, device=device)
        layers = [(weight(seed, columns, 1024, device), None) for seed, columns in ((3, 512), (4, 128), (5, 128))]
        yield from joint.joint_linear(x, *layers)
        yield joint.joint_swiglu(x, (weight(6, 256, 1024, device), bias), (weight(7, 256, 1024, device), bias))
        yield skinny.skinny_parts(x, weight(8, 256, 1024, device), bias).sum(0)


def fp8_skinny_products(device: str) -> Iterator[Tensor]:
    for rows in (3, 40):
        x = normal(1, rows, 1024, dtype=HALF, device=device)
        first, both = scaled(weight(3, 512, 1024, device)), scaled(weight(4, 512, 1024, device))
        yield fp8_skinny.fp8_skinny_linear(scaled(x), first, None, dtype=HALF)
        yield fp8_skinny.fp8_skinny_swiglu(scaled(x), both, None).wide()
        yield fp8_skinny.fp8_skinny_parts(x, first, None).sum(0)


def scaled_rows(device: str) -> Iterator[Tensor]:
    """Rounded by the norm or the activation that computes them, and their product."""
    stream, update = (normal(seed, 100, 512, dtype=HALF, device=device) for seed in (1, 2))
    normed = scaled_rms_norm(stream, normal(3, 512, dtype=HALF, device=device), 1e-5, update=update)
    yield from (stream, normed.wide())
    yield gathered_scaled_rms_norm(stream, torch.arange(0, 100, 3, device=device), stream[0], 1e-5)[1].wide()
    yield scaled_swiglu(*(normal(seed, 100, 512, dtype=HALF, device=device) for seed in (4, 5))).wide()
    yield scaled_linear(scaled(update), scaled(weight(6, 384, 512, device)), stream[0, :384], dtype=HALF)


def windows(device: str) -> Iterator[Tensor]:
    """Attention of windows to columns that are divided among programs, and that are not."""
    for sequences, rounded in ((1, False), (3, True)):
        case = WindowCase(64, 16, 128, 8, 300, masked="rows", dtype=HALF, device=device)
        given = case.arguments(rounded, sequences)
        out, scales = window_attention_operator(*given.values())
        yield out.float() * scales.repeat_interleave(128, 1) if rounded else out
        yield given["kept"][:, :, :-1]


def products_in_fp8(device: str) -> Iterator[Tensor]:
    """Of a DiT: around attention and with it, with rows that stay in shared memory, and added to the stream."""
    rows, width = linear.FEWEST_ROWS + 64, 256
    x = quantise_rows(normal(1, rows, width))[0].to(device)
    y = quantise_rows(normal(2, width, width))[0].to(device)
    scale, bias = torch.full((width,), width**-0.5 / 1e4, device=device), normal(3, width, device=device)
    angle, level = normal(4, 64, 32, device=device), torch.full((width,), 50.0, device=device)
    yield linear_fp8.scaled_rotary(x, y, scale, bias, angle.cos(), angle.sin(), heads=3, length=64, dtype=HALF)
    whole, turned = (rows // 128 * 128, angle.repeat(2, 1))
    layer = y.repeat(3, 1), (50 * scale).repeat(3), (50 * bias).repeat(3)
    heads, values = linear_fp8.scaled_heads(x[:whole], *layer, turned.cos(), turned.sin(), length=128)
    yield from (heads, values)
    yield attention_fp8.attention_fp8(heads, values, torch.full((width // 64,), 1e-4, device=device))
    yield linear_fp8.scaled_gelu(x, y, scale, bias, level)
    stream = normal(5, rows, width, dtype=HALF, device=device)
    linear_fp8.scaled_residual(stream, x, y, scale, bias)
    yield stream


def products_of_narrow_models(device: str) -> Iterator[Tensor]:
    width, rows = 192, linear.NARROW_ROWS + 64
    stream, x = (normal(seed, rows, width, dtype=HALF, device=device) for seed in (1, 2))
    gate, angle = normal(3, width, dtype=HALF, device=device), normal(4, 64, 32, device=device)
    sums = linear.sums_of_stream(stream)
    linear.linear_residual(stream, x, weight(5, width, width, device), None, gate, sums=sums)
    yield from (stream, sums)
    heads, up = weight(6, 3 * width, width, device), weight(7, 4 * width, width, device)
    yield linear.linear_rotary(stream, heads, angle.cos(), angle.sin(), heads=6, length=64, sums=sums)
    yield linear.linear_gelu(stream, up, normal(8, 4 * width, dtype=HALF, device=device), sums=sums)


def few_sequences(device: str) -> Iterator[Tensor]:
    """Whole tiles of keys and one in part, keys that two programs share out, and keys that are not seen."""
    for length, divided, masked in ((128, False, False), (200, True, False), (200, False, True)):
        query, key, value = normal(1, 2, length, 3, 2, 64, dtype=HALF, device=device).unbind(2)
        counters = torch.zeros(tiles_of(2, length, 2) if divided else 0, dtype=torch.int32, device=device)
        mask = (normal(2, 2, length) > 0).to(device) if masked else None
        yield attention_operator(query, key, value, counters, mask)


def many_sequences(device: str) -> Iterator[Tensor]:
    """Two tiles for each multiprocessor of an H100 or H200, which lack some queries and keys."""
    query, key, value = normal(1, 264, 250, 3, 1, 64, dtype=HALF, device=device).unbind(2)
    yield attention_operator(query, key, value, torch.zeros(0, dtype=torch.int32, device=device), None)


def rounding(device: str) -> Iterator[Tensor]:
    x = normal(1, 70, 200, dtype=HALF, device=device)
    yield Scaled(*quantise_rows(x)).wide()
    yield quantised_norm(x)
    yield quantise_columns(x, torch.linspace(1.0, 90.0, 200, device=device))
    out = torch.empty(70, 200, dtype=FP8, device=device), *(torch.empty(70, device=device) for _ in range(2))
    factor, added = (normal(seed, 200, device=device).abs() + 0.1 for seed in (2, 3))
    quantise_layer(x, normal(4, 70, dtype=HALF, device=device), factor, added, out=out)
    yield Scaled(*out[:2]).wide()
    yield out[2]


def mixtures_of_experts(device: str) -> Iterator[Tensor]:
    for rows in (5, 150):
        x, index, shares, gate_up, down = experts_problem(rows, 2, 8, 128, 64, HALF, device)
        yield gated_experts(x, index, shares, gate_up, down)
        apart = listed(gate_up, down)
        yield listed_experts(x, index, shares, *apart, places_of(*apart))


def output_layer_in_float8(device: str) -> Iterator[Tensor]:
    """With its rows in shared memory, with rows from the ring, and with few rows."""
    for rows, depth in ((8, 256), (40, 256), (300, 512)):
        yield Problem(rows, 1000, depth, HALF, device, biased=True, float8=True).run().logsumexp


def soft_embedding(device: str) -> Iterator[Tensor]:
    for float8 in (False, True):
        yield SoftProblem(70, 1000, 256, 128, HALF, device, float8=float8).run()


LAUNCHES: dict[str, Callable[[str], Iterator[Tensor]]] = {
    "skinny": skinny_products,
    "fp8_skinny": fp8_skinny_products,
    "scaled": scaled_rows,
    "windows": windows,
    "fp8": products_in_fp8,
    "narrow": products_of_narrow_models,
    "attention": few_sequences,
    "many_sequences": many_sequences,
    "quantise": rounding,
    "experts": mixtures_of_experts,
    "head_fp8": output_layer_in_float8,
    "soft": soft_embedding,
}


def main(names: list[str], device: str) -> int:
    """Launch, compare, and tell how far the results are from the references'; how many were too far."""
    wrong = 0
    for name in names or LAUNCHES:
        began = time.perf_counter()
        apart = []
        for got, want in zip(LAUNCHES[name](device), LAUNCHES[name]("cpu"), strict=True):
            got, want = got.cpu().double(), want.double()
            apart.append(float((got - want).norm() / want.norm()))
        wrong += sum(not error < 0.05 for error in apart)
        print(f"{name}: {max(apart):.4f} apart at most, {time.perf_counter() - began:.1f} s", flush=True)
    return wrong


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], "cuda"))
