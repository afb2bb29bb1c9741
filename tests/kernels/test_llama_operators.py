"""`rms_norm`, `swiglu` and `place_heads` by their definitions, in float64, and as operators of `torch.library`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone import joint, place_heads, rms_norm, skinny, swiglu
from tests.problems.backbone import HeadsCase, normal

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def rms_normed(row: Tensor, weight: Tensor, eps: float) -> list[float]:
    """A row by the definition, in Python's floats."""
    numbers = [float(x) for x in row]
    spread = math.sqrt(sum(x * x for x in numbers) / len(numbers) + eps)
    return [x / spread * float(w) for x, w in zip(numbers, weight)]


def test_norm_by_definition() -> None:
    x, update, weight = normal(1, 5, 12), normal(2, 5, 12), normal(3, 12)
    stream = x.clone()
    normed = rms_norm.rms_norm(stream, weight, 0.5, update=update)
    torch.testing.assert_close(stream, x + update)
    want = torch.tensor([rms_normed(row, weight, 0.5) for row in x + update])
    torch.testing.assert_close(normed, want, **EXACT)
    index = torch.tensor([4, 0, 4, -1, 5])
    rows, normed = rms_norm.gathered_rms_norm(x, index, weight, 0.5)
    assert torch.equal(rows[:3], x[[4, 0, 4]])
    torch.testing.assert_close(normed[:3], torch.tensor([rms_normed(x[i], weight, 0.5) for i in (4, 0, 4)]), **EXACT)
    assert rows[3:].isnan().all()
    assert normed[3:].isnan().all()


def test_swiglu_by_definition() -> None:
    gate, up = normal(1, 3, 7), normal(2, 3, 7)
    want = [[float(g) / (1 + math.exp(-g)) * float(u) for g, u in zip(*rows)] for rows in zip(gate, up)]
    torch.testing.assert_close(swiglu.swiglu(gate, up), torch.tensor(want), **EXACT)
    curved = [[math.sqrt(2 / math.pi) * (float(g) + 0.044715 * float(g) ** 3) for g in row] for row in gate]
    want = 0.5 * gate * (1 + torch.tensor(curved).tanh()) * up
    torch.testing.assert_close(swiglu.swiglu(gate, up, "gelu"), want, **EXACT)
    with pytest.raises(ValueError, match="activation must be one of gelu, silu"):
        swiglu.swiglu(gate, up, "relu")


def test_norm_adds_parts_by_definition() -> None:
    x, parts, weight = normal(1, 5, 12), normal(2, 3, 5, 12), normal(3, 12)
    stream = x.clone()
    normed = rms_norm.rms_norm(stream, weight, 0.5, update=parts)
    torch.testing.assert_close(stream, x + parts[0] + parts[1] + parts[2], **EXACT)
    want = torch.tensor([rms_normed(row, weight, 0.5) for row in stream])
    torch.testing.assert_close(normed, want, **EXACT)


def product_by_definition(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    added = [0.0] * len(weight) if bias is None else bias.tolist()
    return torch.tensor(
        [
            [math.fsum(map(math.prod, zip(row, column))) + b for column, b in zip(weight.tolist(), added)]
            for row in x.tolist()
        ]
    )


def test_joint_products_by_definition() -> None:
    x, weights, bias = normal(1, 3, 8), [normal(2, 5, 8), normal(3, 7, 8), normal(4, 5, 8)], normal(5, 7)
    layers = [(weights[0], None), (weights[1], bias), (weights[2], None)]
    want = [product_by_definition(x, *layer) for layer in layers]
    for count in (1, 2, 3):
        for got, expected in zip(joint.joint_linear(x, *layers[:count]), want[:count], strict=True):
            torch.testing.assert_close(got, expected, **EXACT)
    activated = want[0] / (1 + (-want[0]).exp()) * want[2]
    torch.testing.assert_close(joint.joint_swiglu(x, layers[0], layers[2]), activated, **EXACT)
    parts = skinny.skinny_parts(x, *layers[1])
    assert parts.shape == (skinny.SPLITS, 3, 7)
    torch.testing.assert_close(parts.sum(0), want[1], **EXACT)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("where", ["in place", "kept", "kept at columns"])
@pytest.mark.parametrize("turned", [None, 2])
def test_heads_by_definition(normed: bool, where: str, turned: int | None) -> None:
    """Pair (i, i + R) of a head is a complex number, which is multiplied by cos + i sin of its position."""
    case = HeadsCase(4, 2, 6, normed, where, turned=turned)
    got = case.run(place_heads.place_heads_reference)
    given: list[Tensor | None] = []
    case.run(lambda *arguments: given.extend(x.clone() if isinstance(x, Tensor) else x for x in arguments))
    cos, sin, query, key, value, positions, _, query_norm, key_norm, _, kept, columns = given
    for heads, norm, result in ((query, query_norm, got[0]), (key, key_norm, got[1])):
        assert heads is not None
        if heads is key and kept is not None:
            continue  # in the cache, below
        for row, head in ((0, 0), (4, 1), (5, 0)):
            want = turned_by_definition(heads[row, head], norm, cos, sin, position_of(row, positions))
            torch.testing.assert_close(result[row, head], want, equal_nan=True, **EXACT)
    if kept is not None:
        assert key is not None
        assert value is not None
        assert torch.equal(got[1], key)  # not turned in place
        for row in (0, 2, 4):
            column = row % 3 if columns is None else int(columns[row])
            keys, values = got[3][:, row // 3, column, :, :6]
            want = turned_by_definition(key[row, 1], key_norm, cos, sin, position_of(row, positions))
            torch.testing.assert_close(keys[1], want, equal_nan=True, **EXACT)
            assert torch.equal(values, value[row])
        written = {(row // 3, row % 3 if columns is None else int(columns[row])) for row in range(6)}
        for sequence in range(2):
            for column in range(4):
                assert ((sequence, column) in written) == bool((got[3][:, sequence, column, :, :6] != 7.0).any())
        assert (got[3][..., 6] == 7.0).all()  # between the rows


def position_of(row: int, positions: Tensor | None) -> int:
    return row % 3 if positions is None else int(positions[row])


def turned_by_definition(
    head: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, position: int
) -> Tensor:
    assert cos is not None
    assert sin is not None
    numbers = head if norm is None else torch.tensor(rms_normed(head, norm, 1e-2))
    half = cos.shape[1]
    there = 0 <= position < len(cos)
    factor = torch.complex(cos[position], sin[position]) if there else torch.full((half,), torch.nan)
    turned = torch.complex(numbers[:half], numbers[half : 2 * half]) * factor
    return torch.cat((turned.real, turned.imag, numbers[2 * half :]))


def test_the_operators_are_well_registered() -> None:
    x, weight, index = normal(1, 6, 8), normal(2, 8), torch.tensor([3, 1, 1])
    check = torch.library.opcheck
    check(rms_norm.rms_norm_operator, (x, weight, 0.1, x.clone()))
    check(rms_norm.rms_norm_operator, (x, weight, 0.1, None))
    check(rms_norm.gathered_rms_norm_operator, (x, index, weight, 0.1))
    check(rms_norm.rms_norm_operator, (x, weight, 0.1, normal(4, 2, 6, 8)))
    check(swiglu.swiglu_operator, (x, x.clone()))
    check(joint.joint_linear_operator, (x, normal(3, 4, 8), normal(4, 2, 8), None, None, normal(5, 2), None))
    check(joint.joint_swiglu_operator, (x, normal(3, 4, 8), normal(4, 4, 8), None, normal(5, 4)))
    check(skinny.skinny_parts_operator, (x, normal(3, 4, 8), normal(5, 4)))
    check(joint.joint_parts_operator, (x, normal(3, 4, 8), normal(5, 4)))
    for where in ("in place", "kept at columns"):
        HeadsCase(2, 1, 8, True, where).run(lambda *arguments: check(place_heads.place_heads_operator, arguments))


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight, angles = normal(1, 6, 8), normal(2, 8), torch.ones(4, 2)
    heads, kept = x.view(6, 2, 4), torch.zeros(2, 2, 4, 2, 4)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm.rms_norm(normal(1, 8, 6).T, weight, 0.1, update=x)
    with pytest.raises(ValueError, match="update"):
        rms_norm.rms_norm(x, weight, 0.1, update=x[:5])
    with pytest.raises(ValueError, match="update"):
        rms_norm.rms_norm(x, weight, 0.1, update=torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match="rows of the parts of an update must be contiguous"):
        rms_norm.rms_norm(x, weight, 0.1, update=torch.zeros(2, 8, 6).mT)
    with pytest.raises(ValueError, match="weight"):
        rms_norm.rms_norm(x, weight[:7], 0.1)
    with pytest.raises(ValueError, match="one to three layers"):
        joint.joint_linear(x)
    with pytest.raises(ValueError, match="weight must be"):
        joint.joint_linear(x, (x[:, :7], None))
    with pytest.raises(ValueError, match="bias must be"):
        joint.joint_swiglu(x, (x, weight), (x, weight[:6]))
    with pytest.raises(ValueError, match="of one shape"):
        joint.joint_swiglu(x, (x, None), (x[:4], None))
    with pytest.raises(ValueError, match="7 numbers cannot be divided"):
        skinny.skinny_parts(normal(1, 6, 7), normal(2, 3, 7))
    with pytest.raises(ValueError, match="7 numbers cannot be divided"):
        joint.joint_parts(normal(1, 6, 7), normal(2, 3, 7))
    with pytest.raises(ValueError, match="row_index"):
        rms_norm.gathered_rms_norm(x, torch.rand(3), weight, 0.1)
    with pytest.raises(ValueError, match="up"):
        swiglu.swiglu(x, x[:5])
    with pytest.raises(ValueError, match="each row together"):
        swiglu.swiglu(normal(1, 8, 6).T, x)
    place = place_heads.place_heads
    for match, arguments, options in (
        ("queries or keys", (None,), {}),
        ("query must be floating", (x,), {}),
        ("key must be", (heads, heads[:5]), {}),
        ("lie together", (heads.transpose(0, 1).contiguous().transpose(0, 1),), {}),
        ("length must divide", (heads,), {"length": 4}),
        ("angles are not enough", (heads,), {"length": 6}),
        ("columns without a cache", (heads,), {"columns": torch.arange(6)}),
        ("query_norm", (heads,), {"query_norm": weight}),
        ("positions", (heads,), {"positions": torch.arange(5)}),
        ("values of one shape", (heads, heads), {"kept": kept}),
        ("kept must be", (heads, heads, heads), {"kept": kept[:, :1]}),
        ("more than 3 columns", (heads, heads, heads), {"kept": kept[:, :, :3]}),
    ):
        with pytest.raises(ValueError, match=match):
            place(angles, angles, *arguments, **({"length": 3} | options))


def relative_error(got: Tensor, exact: Tensor) -> Tensor:
    return (got.double() - exact).norm() / exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(32, 4096), (300, 3584), (3, 100)])
def test_gpu_norm_and_swiglu_round_once(dtype: torch.dtype, rows: int, width: int) -> None:
    x, update, weight = (normal(seed, rows, width, dtype=dtype, device="cuda") for seed in (1, 2, 3))
    weight = weight[0]
    stream = x.clone()
    normed = rms_norm.rms_norm(stream, weight, 1e-5, update=update)
    wide = x.double()
    exact = rms_norm.rms_norm_reference(wide, weight.double(), 1e-5, update.double())
    torch.testing.assert_close(stream, wide.to(dtype))
    assert relative_error(normed, exact) < 2 * relative_error(exact.to(dtype), exact)
    for activation in swiglu.ACTIVATIONS:
        exact = swiglu.swiglu_reference(x.double(), update.double(), activation)
        got = swiglu.swiglu(x, update, activation)
        assert relative_error(got, exact) < 1.1 * relative_error(exact.to(dtype), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 17, 32, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_gpu_skinny_products_round_once(dtype: torch.dtype, rows: int, biased: bool) -> None:
    """Grouped heads, a product of the length of an MLP, and x as columns of a wider matrix."""

    def layer(seed: int, columns: int, inner: int) -> tuple[Tensor, Tensor | None]:
        weight = normal(seed, columns, inner, device="cuda") * inner**-0.5
        return weight.to(dtype), normal(seed + 1, columns, dtype=dtype, device="cuda") if biased else None

    def exact(x: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
        return torch.nn.functional.linear(
            x.double(), layer[0].double(), None if layer[1] is None else layer[1].double()
        )

    x = normal(1, rows, 2 * 3584, dtype=dtype, device="cuda")[:, 512 : 512 + 3584]
    layers = layer(2, 3584, 3584), layer(4, 512, 3584), layer(6, 512, 3584)
    assert skinny.runs_skinny(x, *(weight for weight, _ in layers))
    assert joint.runs_joint_linear(x, *(weight for weight, _ in layers))
    for got, one in zip(joint.joint_linear(x, *layers), layers, strict=True):
        want = exact(x, one)
        assert relative_error(got, want) < 1.05 * relative_error(want.to(dtype), want)
    gate, up = layer(8, 18944, 3584), layer(10, 18944, 3584)
    want = torch.nn.functional.silu(exact(x, gate)) * exact(x, up)
    activated = joint.joint_swiglu(x, gate, up)
    assert relative_error(activated, want) < 1.05 * relative_error(want.to(dtype), want)
    down = layer(12, 3584, 18944)
    parts, want = skinny.skinny_parts(activated, *down), exact(activated, down)
    assert relative_error(parts.double().sum(0), want) < 1e-5
    stream = x.clone(memory_format=torch.contiguous_format)  # a single row is contiguous as it is
    rms_norm.rms_norm(stream, layers[0][0][0], 1e-5, update=parts)
    want = x.double() + want
    assert relative_error(stream, want) < 1.05 * relative_error(want.to(dtype), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("where", ["in place", "kept", "kept at columns"])
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(32, 32, 128), (28, 4, 128), (9, 3, 80)])
@pytest.mark.parametrize("normed", [False, True])
def test_gpu_heads_are_placed_exactly(
    dtype: torch.dtype, where: str, queries: int, keys: int, head_dim: int, normed: bool
) -> None:
    case = HeadsCase(queries, keys, head_dim, normed, where, dtype, "cuda")

    def in_float64(*arguments: object) -> None:
        """The reference on wide copies, and its results in the tensors that were given."""
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
        place_heads.place_heads_reference(*wide)
        exact.extend(wide[2:4] if where == "in place" else [wide[2], wide[10]])

    exact: list[Tensor] = []
    case.run(in_float64)
    query, key, _, *kept = case.run(place_heads.place_heads_operator)
    assert all(bool((cache[..., -1] == 7.0).all()) for cache in kept)  # beside the heads nothing is written
    for got, want in (
        (query, exact[0]),
        (kept[0][..., :-1] if kept else key, exact[1][:, :, :-1] if kept else exact[1]),
    ):
        there = ~want.isnan()
        assert torch.equal(got.isnan(), ~there)
        rounding = relative_error(want[there].to(dtype), want[there])
        assert relative_error(got[there], want[there]) <= 1.1 * rounding + 1e-6
