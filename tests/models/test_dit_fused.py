"""`DiT.hidden` without modules: the same function, on every path, as exact as the modules, fit for a CUDA graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mdkern
from mdkern import DiT, adapt
from mdkern.kernels.backbone import linear, modulated_norm, rotary
from mdkern.kernels.backbone.folded_norm import fold_norm
from mdkern.kernels.backbone.linear import linear_gelu, linear_residual, linear_rotary
from mdkern.models import dit_fused
from tests.own_process import run_in_the_interpreter
from tests.problems.backbone import modulation, normal

MakeDiT = Callable[..., DiT]
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_blocks": 1},
    {"num_blocks": 3, "num_heads": 1},
    {"time_conditioning": True, "cond_dim": 12},
    {"tie_head": True, "mlp_ratio": 3},
]
ON_THE_DEVICE = {"width": 512, "num_heads": 8, "num_blocks": 3, "max_length": 512}
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_backbone.py")


@pytest.mark.slow
def test_kernels_compile_for_every_gpu() -> None:
    from tests.suites import compiled_backbone

    compiled_backbone.main()


# The operators, by their definitions.


def normed_by_definition(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Row by row in float64."""
    rows = []
    for number, row in enumerate(x.double()):
        centred = row - row.mean()
        unit = centred / (centred.square().mean() + 1e-5).sqrt()
        sequence = number * len(shift) // len(x) if shift.ndim == 2 else ...
        rows.append(unit * weight.double() * (1 + scale[sequence].double()) + shift[sequence].double())
    return torch.stack(rows)


@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_norm_by_definition(sequences: int) -> None:
    x, update = normal(1, 12, 20), normal(2, 12, 20)
    weight, shift, scale, gate = modulation(20, sequences)
    stream = x.clone()
    normed = modulated_norm.modulated_norm(stream, weight, shift, scale, update=update, gate=gate)
    gates = gate.repeat_interleave(12 // sequences, 0) if sequences else gate
    torch.testing.assert_close(stream, x + gates * update)
    torch.testing.assert_close(normed.double(), normed_by_definition(stream, weight, shift, scale), **EXACT)
    index = torch.tensor([4, 0, 11, 4, 5, 6])
    rows, normed = modulated_norm.gathered_norm(x, index, weight, shift, scale)
    assert torch.equal(rows, x[index])
    torch.testing.assert_close(normed.double(), normed_by_definition(rows, weight, shift, scale), **EXACT)


def test_norm_forgets_shift_and_scale_of_its_input() -> None:
    x = normal(1, 8, 64)
    arguments = modulation(64, 0)[:3]
    plain = modulated_norm.modulated_norm(x, *arguments)
    torch.testing.assert_close(modulated_norm.modulated_norm(3 * x + 5, *arguments), plain, rtol=1e-4, atol=1e-4)


def test_rotary_makes_products_depend_on_distance_alone() -> None:
    query, key = normal(1, 2, 16), normal(2, 2, 16)
    frequency = 10_000.0 ** (-torch.arange(8) / 8)
    angle = torch.outer(torch.arange(50.0), frequency)

    def product(query_at: int, key_at: int) -> Tensor:
        rows = torch.stack((query, key)).clone()
        rotary.rotary(rows, angle.cos(), angle.sin(), positions=torch.tensor([query_at, key_at]))
        return (rows[0] * rows[1]).sum(-1)

    torch.testing.assert_close(product(7, 3), product(44, 40), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(product(7, 3), product(7, 4), atol=1e-2)
    torch.testing.assert_close(product(9, 9), (query * key).sum(-1), rtol=1e-4, atol=1e-4)


def test_gathered_qkv_are_those_of_gathered_ids() -> None:
    embedding, weight, index = normal(1, 9, 10), normal(2, 24, 10), torch.tensor([3, 8, 0, 3, 9, -1])
    angle = normal(4, 3, 4)
    x, heads = rotary.gathered_qkv(embedding, embedding @ weight.T, index, angle.cos(), angle.sin(), heads=2, length=3)
    assert torch.equal(x[:4], embedding[index[:4]])
    assert x.isnan().all(1).tolist() == heads.isnan().all(1).tolist() == [False] * 4 + [True] * 2
    want = linear_rotary(x, weight, angle.cos(), angle.sin(), heads=2, length=3)
    torch.testing.assert_close(heads, want, equal_nan=True, **EXACT)


@pytest.mark.gpu
def test_gelu_without_pytorchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = normal(1, 12, 64, device="cuda"), normal(2, 32, 64, device="cuda"), normal(3, 32, device="cuda")
    with_it = linear.linear_gelu(x, weight, bias)
    monkeypatch.delattr(torch, "_addmm_activation")
    torch.testing.assert_close(linear.linear_gelu(x, weight, bias), with_it, rtol=1e-4, atol=1e-4)


def test_products_by_definition() -> None:
    x, weight, bias = normal(1, 12, 10), normal(2, 24, 10), normal(3, 24)
    torch.testing.assert_close(linear_gelu(x, weight, bias), F.gelu(x @ weight.T + bias, approximate="tanh"), **EXACT)
    angle = normal(4, 6, 4)
    heads = (x @ weight.T).view(12, 3, 8)
    rotary.rotary(heads[:, :2], angle.cos(), angle.sin(), length=6)
    got = linear_rotary(x, weight, angle.cos(), angle.sin(), heads=2, length=6)
    torch.testing.assert_close(got, heads.flatten(1), **EXACT)
    for sequences in (0, 4):
        gate = modulation(24, sequences)[3]
        stream = normal(5, 12, 24)
        gates = gate.repeat_interleave(3, 0) if sequences else gate
        want = stream + gates * (x @ weight.T + bias)
        linear_residual(stream, x, weight, bias, gate)
        torch.testing.assert_close(stream, want, **EXACT)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, (weight, shift, scale, gate) = normal(1, 12, 20), modulation(20, 3)
    norm = modulated_norm.modulated_norm
    with pytest.raises(ValueError, match="go together"):
        norm(x, weight, shift, scale, update=x)
    with pytest.raises(ValueError, match="shared out"):
        norm(x[:10], weight, shift, scale)
    with pytest.raises(ValueError, match="contiguous"):
        norm(normal(1, 20, 12).T, weight, shift, scale)
    with pytest.raises(ValueError, match="scale"):
        norm(x, weight, shift, scale[0])
    with pytest.raises(ValueError, match="weight"):
        norm(x, weight[:7], shift, scale)
    with pytest.raises(ValueError, match="row_index"):
        modulated_norm.gathered_norm(x, torch.rand(3), weight, shift, scale)
    with pytest.raises(ValueError, match="even head_dim"):
        rotary.rotary(normal(1, 4, 2, 5), torch.ones(4, 2), torch.ones(4, 2), length=4)
    with pytest.raises(ValueError, match="length"):
        rotary.rotary(normal(1, 4, 2, 4), torch.ones(4, 2), torch.ones(4, 2), length=5)
    with pytest.raises(ValueError, match="lie together"):
        rotary.rotary(normal(1, 4, 4, 4)[:, ::2], torch.ones(4, 2), torch.ones(4, 2), length=4)
    angles = torch.ones(4, 2), torch.ones(4, 2)
    for match, table, index, heads in (
        ("row_index", normal(2, 12, 8), torch.ones(3), 1),
        ("rows", normal(2, 11, 8), torch.tensor([1]), 1),
        ("heads", normal(2, 12, 8), torch.tensor([1]), 3),
        ("heads", normal(2, 12, 6), torch.tensor([1]), 1),
        ("together", normal(2, 8, 12).T, torch.tensor([1]), 1),
    ):
        with pytest.raises(ValueError, match=match):
            rotary.gathered_qkv(x, table, index, *angles, heads=heads, length=4)
    with pytest.raises(ValueError, match="length"):
        rotary.gathered_qkv(x, normal(2, 12, 8), torch.tensor([1]), *angles, heads=1, length=5)
    with pytest.raises(ValueError, match="weight"):
        linear_gelu(x, normal(2, 24, 19), normal(3, 24))
    with pytest.raises(ValueError, match="stream"):
        linear_residual(x, x, normal(2, 24, 20), None, gate)
    with pytest.raises(ValueError, match="bias must be contiguous"):
        linear_gelu(x, normal(2, 24, 20), normal(3, 48)[::2])


def test_tensors_without_values_or_with_shared_ones_are_refused() -> None:
    """Meta tensors; and what is written in place where its rows are one and the same memory."""
    x, (weight, shift, scale, gate) = normal(1, 12, 8), modulation(8, 0)
    angles = torch.ones(4, 2), torch.ones(4, 2)
    for call in (
        lambda: modulated_norm.modulated_norm(x.to("meta"), weight, shift, scale),
        lambda: modulated_norm.modulated_norm(x, weight, shift, scale.to("meta")),
        lambda: modulated_norm.gathered_norm(x, torch.arange(3, device="meta"), weight, shift, scale),
        lambda: rotary.rotary(x.view(12, 2, 4), *angles, positions=torch.arange(12, device="meta")),
        lambda: rotary.gathered_qkv(x, x.to("meta"), torch.tensor([1]), *angles, heads=1, length=4),
        lambda: linear_gelu(x, normal(2, 24, 8).to("meta"), normal(3, 24)),
    ):
        with pytest.raises(ValueError, match="meta tensor"):
            call()
    with pytest.raises(ValueError, match="rows overlap"):
        rotary.rotary(normal(1, 1, 2, 4).expand(5, 2, 4), *angles, length=4)
    with pytest.raises(ValueError, match="contiguous"):
        modulated_norm.modulated_norm(x[:1].expand(12, 8), weight, shift, scale, update=x, gate=gate)
    with pytest.raises(ValueError, match="contiguous"):
        linear_residual(x[:1].expand(12, 8), x, normal(2, 8, 8), None, gate)
    with pytest.raises(ValueError, match="contiguous"):
        fold_norm(normal(2, 6, 8), None, weight, shift, scale, out=(normal(1, 1, 8).expand(6, 8), torch.empty(6)))


def test_positions_that_are_not_there_give_nan() -> None:
    x, angle = normal(1, 5, 2, 4), normal(2, 3, 2)
    rotary.rotary(x, angle.cos(), angle.sin(), positions=torch.tensor([0, -1, 2, 3, 1]))
    assert x.isnan().flatten(1).any(1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("match", "cos", "heads", "length"),
    [
        ("cos", torch.ones(2, 6).T, 1, 6),
        ("cos", torch.ones(6, 2, dtype=torch.bfloat16), 1, 6),
        ("cos", torch.ones(6, 3), 1, 6),
        ("heads", torch.ones(6, 2), 7, 6),
        ("heads", torch.ones(6, 2), -1, 6),
        ("length", torch.ones(6, 2), 1, 7),
    ],
)
def test_angles_that_do_not_fit_are_refused_before_any_kernel(
    match: str, cos: Tensor, heads: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hopper's reads tables by their addresses."""
    monkeypatch.setattr(linear, "linear_rotary_operator", pytest.fail)
    x, weight, sin = normal(1, 12, 20), normal(2, 24, 20), torch.ones(6, 2)
    with pytest.raises(ValueError, match=match):
        linear_rotary(x, weight, cos, sin, heads=heads, length=length)


@pytest.mark.parametrize("sequences", [0, 3])
def test_the_operators_are_well_registered(sequences: int) -> None:
    x, (weight, shift, scale, gate) = normal(1, 12, 8), modulation(8, sequences)
    matrix, bias, angle = normal(2, 8, 8), normal(3, 8), normal(4, 6, 2)
    check = torch.library.opcheck
    check(modulated_norm.modulated_norm_operator, (x, weight, shift, scale, x.clone(), gate))
    check(modulated_norm.modulated_norm_operator, (x, weight, shift, scale, None, None))
    check(modulated_norm.gathered_norm_operator, (x, torch.tensor([3, 1, 1]), weight, shift, scale))
    check(rotary.rotary_operator, (x.view(12, 2, 4), angle.cos(), angle.sin(), None, 6))
    index = torch.tensor([3, 1, 1])
    check(rotary.gathered_qkv_operator, (x, normal(5, 12, 16), index, angle.cos(), angle.sin(), 3, 6))
    check(linear.linear_rotary_operator, (x, matrix, angle.cos(), angle.sin(), 1, 6))
    check(linear.linear_gelu_operator, (x, matrix, bias))
    check(linear.linear_residual_operator, (x, x.clone(), matrix, bias, gate, None))


# The whole.


def question(
    model: DiT, batch: int, length: int, rows: int | None, masked: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """ids, t, positions and attention mask."""
    generator = torch.Generator().manual_seed(batch * length + (rows or 0))
    device = model.embedding.device
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    t = torch.rand(batch, generator=generator).clamp(min=0.05)
    positions = None if rows is None else torch.randint(length, (batch, rows), generator=generator).to(device)
    lengths = torch.randint(length // 2, length, (batch, 1), generator=generator)
    mask = (torch.arange(length) < lengths).to(device) if masked else None
    return ids.to(device), t.to(device), positions, mask


def without_modules(model: DiT, ids: Tensor, t: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
    condition = None if model.time_embedding is None else model.time_embedding(t)
    return dit_fused.hidden(model, ids, condition, positions, None if mask is None else mask[:, None, None, :])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [None, 1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_modules_function(make_dit: MakeDiT, shape: dict[str, Any], rows: int | None, masked: bool) -> None:
    model = make_dit(**shape).requires_grad_(False)
    arguments = question(model, 3, 16, rows, masked)
    torch.testing.assert_close(without_modules(model, *arguments), model.hidden(*arguments), **EXACT)


def test_the_cpu_keeps_the_modules(make_dit: MakeDiT) -> None:
    with torch.no_grad():
        assert not dit_fused.covers(make_dit().bfloat16())


def test_strangers_among_the_modules_are_noticed(make_dit: MakeDiT) -> None:
    """A replaced layer and a hook: reading the parameters would pass them over."""

    class Adapter(torch.nn.Linear):
        pass

    def plain(model: DiT) -> bool:
        return all(dit_fused.is_plain(module) for module in model.modules())

    assert plain(make_dit())
    assert plain(make_dit(time_conditioning=True))
    replaced, hooked = make_dit(), make_dit()
    replaced.blocks[1].mlp_up = Adapter(16, 64)
    assert not plain(replaced)
    handle = hooked.blocks[0].attn_out.register_forward_pre_hook(lambda *_: None)
    assert not plain(hooked)
    handle.remove()
    assert plain(hooked)
    for change in strangers():
        model = make_dit()
        change(model)
        assert not plain(model), change


def strangers() -> list[Callable[[DiT], Any]]:
    """Ways to make the second block's first layer another function without replacing its weight."""

    def forward_of_its_own(model: DiT) -> None:  # as accelerate does
        layer, forward = model.blocks[1].attn_qkv, model.blocks[1].attn_qkv.forward
        layer.forward = lambda x: 2 * forward(x)

    class Subclass(Tensor):
        """As quantised and distributed weights are."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.linear:
                return 2 * torch.nn.functional.linear(args[0], args[1].as_subclass(Tensor))
            return super().__torch_function__(func, types, args, kwargs or {})

    def subclass(model: DiT) -> None:
        layer = model.blocks[1].attn_qkv
        layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Subclass))

    class Twice(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module | None = None) -> None:
            super().__init__()
            self.layer = layer
            self.weight = None if layer is None else layer.weight  # as adapters do: there, and not the whole truth

        def forward(self, x: Tensor) -> Tensor:
            return 2 * (x if self.layer is None else self.layer(x))

    def wrapped(model: DiT) -> None:
        model.blocks[1].attn_qkv = Twice(model.blocks[1].attn_qkv)

    return [
        forward_of_its_own,
        subclass,
        wrapped,
        lambda model: torch.nn.utils.parametrize.register_parametrization(model.blocks[1].attn_qkv, "weight", Twice()),
        lambda model: model.blocks[1].attn_qkv.register_forward_hook(lambda _module, _inputs, output: 2 * output),
        lambda model: model.blocks[1].attn_qkv.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],)),
        lambda model: torch.nn.utils.weight_norm(model.blocks[1].attn_qkv).weight_g.data.mul_(2),
    ]


@pytest.mark.parametrize("change", strangers())
@pytest.mark.parametrize("window", [False, True])
def test_they_run_in_the_last_block_too(make_dit: MakeDiT, change: Callable[[DiT], Any], window: bool) -> None:
    """Whatever doubles what the layer gives is the model with doubled weights, at all rows and at some."""
    model, doubled = make_dit(), make_dit()
    change(model)
    with torch.no_grad():
        doubled.blocks[1].attn_qkv.weight *= 2
        ids, _, positions, _ = question(doubled, 2, 9, 3, False)
        assert positions is not None
        want = doubled.hidden(ids)
        rows = want.gather(1, positions[..., None].expand(-1, -1, want.shape[-1]))
        torch.testing.assert_close(model.hidden(ids), want)
        if window:
            cache = torch.zeros(adapt(model).cache_shape(2, 9))
            torch.testing.assert_close(adapt(model).window_hidden(cache, ids, None, positions), rows)
        else:
            torch.testing.assert_close(model.hidden(ids, None, positions), rows)


def test_hooks_that_sampling_would_pass_over_are_refused(make_dit: MakeDiT) -> None:
    class Other(DiT):
        def forward(self, *arguments: Any) -> Tensor:
            return -super().forward(*arguments)

    hooked = make_dit()
    hooked.register_forward_hook(lambda _module, _inputs, output: output / 2)
    for model in (hooked, Other(hooked.config).eval()):
        with pytest.raises(ValueError, match="hook or a forward of its own"):
            adapt(model)
    hooked = make_dit()
    hooked.blocks[0].register_forward_hook(lambda _module, _inputs, output: output / 2)
    with pytest.raises(ValueError, match="blocks are hooked or replaced"):
        mdkern.sample(hooked, decoder="threshold", length=8, block_length=4, cache="prefix")


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def by_modules(model: DiT, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(dit_fused, "covers", lambda _: False)
        return model.hidden(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(2, 100), (2, 500), (16, 512)])  # cuBLAS's products; on a Hopper ours
@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_as_exact_as_the_modules(
    make_dit: MakeDiT,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    conditioned: bool,
    batch: int,
    length: int,
    rows: int | None,
    masked: bool,
) -> None:
    """Error against float64 at most twice that of PyTorch's own operators in the same 16-bit format."""
    model = make_dit(**ON_THE_DEVICE, time_conditioning=conditioned).to("cuda", dtype)
    exact = make_dit(**ON_THE_DEVICE, time_conditioning=conditioned).to("cuda", torch.float64)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad():
        ids, t, positions, mask = question(model, batch, length, rows, masked)
        assert dit_fused.covers(model)
        assert not dit_fused.covers(exact)
        want = exact.hidden(ids, t.double(), positions, mask)
        theirs = by_modules(model, ids, t, positions, mask, monkeypatch=monkeypatch)
        ours = model.hidden(ids, t, positions, mask)
    assert ours.shape == want.shape
    assert ours.dtype == dtype
    assert relative_error(ours, want) < 2 * relative_error(theirs, want)


@pytest.mark.gpu
@pytest.mark.parametrize("conditioned", [False, True])
def test_it_can_be_captured_and_sees_what_changes(make_dit: MakeDiT, conditioned: bool) -> None:
    """No synchronisation with the host; the replay reads ids, positions and weights anew."""
    model = make_dit(**ON_THE_DEVICE, time_conditioning=conditioned).to("cuda", torch.bfloat16)
    with torch.no_grad():
        ids, t, positions, _ = question(model, 16, 512, 8, False)
        model.hidden(ids, t, positions)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph):
                captured = model.hidden(ids, t, positions)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ids.copy_(ids.roll(1, 0))
        positions.copy_(positions.roll(1, 0))
        model.blocks[0].mlp_down.weight *= 1.5
        model.blocks[1].modulation.bias += 0.25
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, model.hidden(ids, t, positions))


@pytest.mark.gpu
def test_training_keeps_the_modules(make_dit: MakeDiT) -> None:
    model = make_dit(**ON_THE_DEVICE).to("cuda", torch.bfloat16)
    ids, *_ = question(model, 2, 64, None, False)
    hidden = model.hidden(ids)
    assert hidden.requires_grad
    hidden.float().square().sum().backward()
    assert all(p.grad is not None for name, p in model.blocks.named_parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("hooked", ["blocks.0", "blocks.1.mlp_up", "blocks.2.attn_qkv"])
def test_hooks_are_called(make_dit: MakeDiT, hooked: str) -> None:
    model = make_dit(**ON_THE_DEVICE).to("cuda", torch.bfloat16)
    seen: list[torch.Size] = []
    model.get_submodule(hooked).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        ids, _, positions, _ = question(model, 2, 64, 3, False)
        model.hidden(ids, None, positions)
    assert len(seen) == 1


@pytest.mark.gpu
def test_an_id_that_is_not_there_gives_nan(make_dit: MakeDiT) -> None:
    """Not a neighbour's memory: the sampler refuses NaN."""
    model = make_dit(**ON_THE_DEVICE).to("cuda", torch.bfloat16)
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([[0, 1 << 20, 2]], device="cuda"))
    assert hidden.isnan().all()  # attention spreads it


# The kernels against plain PyTorch in float64, each at most twice as far off as PyTorch in 16 bits.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sequences", [0, 4])
@pytest.mark.parametrize("width", [768, 192, 100, 4096])
def test_gpu_norm_is_exact(dtype: torch.dtype, sequences: int, width: int) -> None:
    for rows in (64, 8192):
        x, update = (normal(seed, rows, width, dtype=dtype, device="cuda") for seed in (1, 2))
        parts = modulation(width, sequences, dtype, "cuda")
        stream, want_stream = x.clone(), x.double()
        weight, shift, scale, gate = (part.double() for part in parts)
        normed = modulated_norm.modulated_norm(stream, *parts[:3], update=update, gate=parts[3])
        want = modulated_norm.modulated_norm_reference(want_stream, weight, shift, scale, update.double(), gate)
        for got, exact in ((stream, want_stream), (normed, want)):
            assert relative_error(got, exact) < 2 * relative_error(exact.to(dtype), exact)
        index = torch.randint(rows, (40,), device="cuda")
        gathered, normed = modulated_norm.gathered_norm(x, index, *parts[:3])
        assert torch.equal(gathered, x[index])
        exact = modulated_norm.gathered_norm_reference(x.double(), index, weight, shift, scale)[1]
        assert relative_error(normed, exact) < 2 * relative_error(exact.to(dtype), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim"), [(24, 64), (6, 128), (5, 80), (64, 32)])
def test_gpu_rotary_is_exact(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    x, angle = normal(1, 6000, heads + 3, head_dim, dtype=dtype, device="cuda"), normal(2, 300, head_dim // 2)
    cos, sin = angle.cos().cuda(), angle.sin().cuda()
    for positions in (None, torch.randint(300, (6000,), device="cuda")):
        got, exact = x.clone(), x.double()
        rotary.rotary(got[:, :heads], cos, sin, positions=positions, length=300)
        rotary.rotary(exact[:, :heads], cos.double(), sin.double(), positions=positions, length=300)
        assert relative_error(got, exact) < 2 * relative_error(exact.to(dtype), exact)
        assert torch.equal(got[:, heads:], x[:, heads:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [6003, 100])
@pytest.mark.parametrize(("heads", "head_dim"), [(24, 64), (6, 128), (5, 80)])
def test_gpu_heads_are_gathered_and_turned_exactly(dtype: torch.dtype, rows: int, heads: int, head_dim: int) -> None:
    embedding, angle = normal(1, 500, 256, dtype=dtype, device="cuda"), normal(2, 300, head_dim // 2).cuda()
    table = normal(3, 500, (heads + 3) * head_dim, dtype=dtype, device="cuda")
    index = torch.randint(-1, 501, (rows,), generator=torch.Generator().manual_seed(4)).cuda()
    there = (index >= 0) & (index < 500)
    cos, sin = angle.cos(), angle.sin()
    for first in (0, 1):  # columns of the table may be left out
        part = table[:, first * head_dim :]
        x, got = rotary.gathered_qkv(embedding, part, index, cos, sin, heads=heads, length=300)
        exact = part[index.clamp(0, 499)].double().unflatten(1, (-1, head_dim))
        rotary.rotary(exact[:, :heads], cos.double(), sin.double(), length=300)
        assert torch.equal(x[there], embedding[index[there]])
        assert x[~there].isnan().all()
        assert got[~there].isnan().all()
        got, exact = got[there], exact.flatten(1)[there]
        assert relative_error(got, exact) < 1.1 * relative_error(exact.to(dtype), exact)
        assert torch.equal(got[:, heads * head_dim :].double(), exact[:, heads * head_dim :])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "depth"), [(16_384, 768), (4160, 128), (5000, 200), (4099, 3072), (100, 64)])
def test_gpu_products_are_exact(dtype: torch.dtype, rows: int, depth: int) -> None:
    """Also at the ends: rows that fill no tile, depths that fill no step, few rows, which cuBLAS takes."""
    x = normal(1, rows, depth, dtype=dtype, device="cuda")
    weight = (normal(2, 768, depth) * depth**-0.5).to("cuda", dtype)
    bias, stream = normal(3, 768, dtype=dtype, device="cuda"), normal(5, rows, 768, dtype=dtype, device="cuda")
    wide_x, wide_weight, wide_bias = x.double(), weight.double(), bias.double()

    def check(got: Tensor, exact: Tensor) -> None:
        assert relative_error(got, exact) < 2 * relative_error(exact.to(dtype), exact)

    check(linear_gelu(x, weight, bias), F.gelu(F.linear(wide_x, wide_weight, wide_bias), approximate="tanh"))
    for head_dim, turned in itertools.product((64, 128), (0, 320, 384, 512, 768)):
        if turned % head_dim:
            continue
        # Columns that end with a tile, and with a half of one, which is a warpgroup's; 320 is for no kernel.
        angle, heads = normal(4, 333, head_dim // 2).cuda(), turned // head_dim
        got = linear_rotary(x, weight, angle.cos(), angle.sin(), heads=heads, length=333)
        wide_angle = angle.cos().double(), angle.sin().double()
        exact = linear_rotary(wide_x, wide_weight, *wide_angle, heads=heads, length=333)
        for columns in (slice(turned), slice(turned, None)):
            if exact[:, columns].numel():
                check(got[:, columns], exact[:, columns])
    for gate in (normal(6, 768, dtype=dtype, device="cuda"), modulation(768, rows // 64, dtype, "cuda")[3]):
        if gate.ndim == 2 and rows % len(gate):
            continue
        for shift in (None, bias):
            got, exact = stream.clone(), stream.double()
            linear_residual(got, x, weight, shift, gate)
            linear_residual(exact, wide_x, wide_weight, None if shift is None else wide_bias, gate.double())
            check(got, exact)
