"""Models built like Llama with products in e4m3: the same passes with rounded operands, of the weights as they are."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mdkern
from mdkern.kernels.backbone import fp8_skinny
from mdkern.kernels.backbone.quantise import quantise_rows
from mdkern.models.denoiser import PREPARED
from mdkern.models.hf import llama_fp8, llama_fused
from mdkern.models.hf.split import SplitDenoiser
from tests.models.test_llama import FAMILIES
from tests.problems.hf_models import MASK, WORDS, adapted, bert, llama, random_ids

SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
KEPT = torch.arange(WORDS) != MASK


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def in_fp8(model: Any, **options: Any) -> SplitDenoiser:
    denoiser = adapted(model, precision="fp8", **options)
    assert isinstance(denoiser, SplitDenoiser)
    return denoiser


class Rounded(torch.overrides.TorchFunctionMode):
    """Products of the model's own forward with operands that were rounded to e4m3, all but the output layer's."""

    def __init__(self, head: Tensor, tile: int | None = None) -> None:
        super().__init__()
        self.head, self.tile = head, tile

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or args[1] is self.head:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        return func(rounded(x), rounded(weight), *bias, **(kwargs or {}))


def rounded(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        values, scales = quantise_rows(x.flatten(0, -2).float())
        return (values.double() * scales.double()[:, None]).view(x.shape).to(x.dtype)


class TestPasses:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_they_are_the_models_with_rounded_operands(self, family: str) -> None:
        """Up to numbers that are beside the middle between two of the format, of which each moves its row."""
        model, ids = FAMILIES[family](), random_ids(3, 12)
        denoiser = in_fp8(model, shifted=False)
        assert "mdkern's own passes in fp8" in repr(denoiser)
        plain = model(ids).logits[..., :WORDS]
        with Rounded(model.get_output_embeddings().weight):
            want = model(ids).logits[..., :WORDS]
        got = denoiser.logits(ids)[..., :WORDS]
        of_rounding = (want - plain)[..., KEPT].norm()
        assert of_rounding > 1e-3 * plain[..., KEPT].norm()
        assert (got - want)[..., KEPT].norm() < 0.35 * of_rounding

    @pytest.mark.parametrize("few", [False, True])
    def test_windows_and_wanted_positions(self, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A window of all columns is a whole pass; so are the states at some positions, whatever kernel runs them."""
        monkeypatch.setattr(llama_fp8, "runs_fp8_skinny", lambda *_: few)
        monkeypatch.setattr(llama_fused, "runs_window_attention", lambda *_: few)
        model, ids = llama(**SIZES, attention_bias=True, mlp_bias=True), random_ids(2, 10)
        denoiser = in_fp8(model, shifted=False)
        whole = denoiser.hidden(ids)
        positions = torch.tensor([[8, 0, 0], [1, 2, 3]])
        cache = torch.zeros(denoiser.cache_shape(2, 10))
        every = torch.arange(10).expand(2, -1)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(denoiser.hidden(ids, None, positions), rows_of(whole, positions), **close)
        torch.testing.assert_close(denoiser.window_hidden(cache, ids, None, every), whole, **close)
        columns = torch.tensor([[3, 4, 5], [7, 8, 9]])
        rows = torch.arange(3).expand(2, -1)
        window = denoiser.window_hidden(cache, ids.gather(1, columns), columns, rows)
        torch.testing.assert_close(window, rows_of(whole, columns), **close)

    def test_attention_of_windows_is_rounded_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By `out` or by attention itself, whose heads are what shares a scale: the same numbers."""
        monkeypatch.setattr(llama_fp8, "runs_fp8_skinny", lambda *_: True)
        model, ids = llama(**SIZES, head_dim=128), random_ids(2, 10)
        denoiser, rows = in_fp8(model, shifted=False), torch.arange(3).expand(2, -1)
        columns, given, states = rows + 4, [], []
        update = llama_fp8.Fp8Products.attention_update
        monkeypatch.setattr(
            llama_fp8.Fp8Products, "attention_update", lambda self, x: (given.append(type(x)), update(self, x))[1]
        )
        for windows in (False, True):
            monkeypatch.setattr(llama_fused, "runs_window_attention", lambda *_, windows=windows: windows)
            cache = torch.zeros(denoiser.cache_shape(2, 10))
            denoiser.window_hidden(cache, ids, None, rows)
            given.clear()
            states.append(denoiser.window_hidden(cache, ids[:, 4:7], columns, rows))
            assert given == [fp8_skinny.Tiled if windows else Tensor] * 2
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)

    def test_few_rows_and_many_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They round in other places, which may cost a third more than rounding does at all."""
        model, ids = llama(**SIZES), random_ids(2, 10)
        denoiser, exact = in_fp8(model), adapted(model).hidden(ids)
        many = denoiser.hidden(ids)
        monkeypatch.setattr(llama_fp8, "runs_fp8_skinny", lambda *_: True)
        few = denoiser.hidden(ids)
        assert not torch.equal(few, many)
        assert (few - exact).norm() < 1.35 * (many - exact).norm() < 0.35 * exact.norm()


def rows_of(states: Tensor, positions: Tensor) -> Tensor:
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[2]))


def replaced(model: Any, seed: int) -> None:
    model.load_state_dict(llama(seed, **SIZES).state_dict())


def assigned(model: Any, seed: int) -> None:
    gc.collect()  # so that memory is used again
    model.load_state_dict(llama(seed, **SIZES).state_dict(), assign=True)


def scaled(model: Any, seed: int) -> None:
    model.model.layers[1].mlp.down_proj.weight.mul_(1.0 + seed)


def put_in_its_place(model: Any, seed: int) -> None:
    """Another parameter at the same address, of which PyTorch has counted no change either."""
    layer = model.model.layers[0].self_attn.o_proj
    numbers = layer.weight.detach().numpy()
    numbers *= 1.0 + seed
    layer.weight = nn.Parameter(torch.from_numpy(numbers), requires_grad=False)


def merged(model: Any, seed: int) -> None:
    """As adapters are: PyTorch counts no change of the weight, which stays where it is."""
    weight = model.model.layers[1].self_attn.q_proj.weight
    version = weight._version
    weight.data[0, 1] += 0.5 * seed
    assert weight._version == version


class TestCopies:
    def test_changes_that_pytorch_does_not_count_are_heeded_by_a_call(self) -> None:
        model, ids = llama(**SIZES), random_ids(2, 9)
        denoiser = in_fp8(model)
        for seed in range(3):
            merged(model, seed)
            fresh = llama(**SIZES)
            fresh.load_state_dict(model.state_dict())
            now = denoiser.current()
            assert torch.equal(now.hidden(ids), in_fp8(fresh).hidden(ids))
            assert denoiser.current().copies is now.copies, "they are made once"

    @pytest.mark.parametrize("change", [replaced, assigned, scaled, put_in_its_place])
    def test_weights_that_change_are_heeded(self, change: Callable[[Any, int], None]) -> None:
        model, ids = llama(**SIZES), random_ids(2, 9)
        denoiser = in_fp8(model)
        for seed in range(3):
            if seed:
                change(model, seed)
            fresh = llama(**SIZES)
            fresh.load_state_dict(model.state_dict())
            want = in_fp8(fresh).hidden(ids)
            for kept in (denoiser, denoiser.current()):
                assert torch.equal(kept.hidden(ids), want)

    def test_a_bias_that_is_taken_away_beside_others(self) -> None:
        model, ids = llama(**SIZES, attention_bias=True), random_ids(2, 9)
        layers = [block.self_attn.v_proj for block in model.model.layers]
        for layer in layers:
            layer.bias.fill_(3.0)
        denoiser = in_fp8(model)
        biased = denoiser.hidden(ids)
        for layer in layers:
            layer.bias.zero_()
        want = denoiser.hidden(ids)
        for layer in layers:
            layer.bias.fill_(3.0)
        assert torch.equal(denoiser.hidden(ids), biased)
        for layer in layers:
            layer.bias = None
        assert torch.equal(denoiser.hidden(ids), want)
        assert not torch.equal(biased, want)

    def test_addresses_stay(self) -> None:
        model = llama(**SIZES)
        denoiser = in_fp8(model)
        before = addresses(denoiser)
        replaced(model, 3)
        assert addresses(denoiser) == before == addresses(denoiser.current())

    def test_they_are_made_once_and_can_be_let_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = llama(**SIZES)
        denoiser = in_fp8(model)
        denoiser.current()
        assert model in PREPARED
        with monkeypatch.context() as patch:
            patch.setattr(llama_fp8, "fill", lambda *_: pytest.fail("weights were rounded again"))
            denoiser.current().hidden(random_ids(1, 5))
        mdkern.graphs.clear()
        assert model not in PREPARED
        denoiser.hidden(random_ids(1, 5))

    def test_their_size_is_told(self) -> None:
        model = llama(**SIZES, layers=3)
        denoiser = in_fp8(model)
        parts = denoiser.parts
        assert parts is not None
        numbers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
        channels = sum(len(p) for p in model.model.layers.parameters() if p.ndim == 2)
        assert llama_fp8.size_of_copies(parts) == numbers + 4 * channels
        tensors = llama_fp8.tensors_of(denoiser.copies)
        assert sum(tensor.nbytes for tensor in tensors) == numbers + 4 * channels
        assert f"with copies of its weights of {(numbers + 4 * channels) / 2**20:.1f} MiB" in repr(denoiser)


def addresses(denoiser: SplitDenoiser) -> list[int]:
    return [tensor.data_ptr() for tensor in llama_fp8.tensors_of(denoiser.copies)]


class Adapter(nn.Module):
    """As LoRA's."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inside(x)


class TestRefused:
    def check(self, model: Any, reason: str) -> None:
        with pytest.raises(ValueError, match=f"precision='fp8' is not for {type(model).__name__}.*{reason}"):
            mdkern.adapt(model, precision="fp8")

    def test_what_cannot_be_rounded(self) -> None:
        model = llama()
        layer = model.model.layers[1].mlp
        layer.up_proj = Adapter(layer.up_proj)
        self.check(model, "its mlp.up_proj is a Adapter, not a plain linear layer")
        self.check(llama(intermediate_size=40), "a layer of it has a side of 40, which 16 does not divide")
        model = llama(**SIZES)
        for name in ("gate_proj", "up_proj", "down_proj"):  # as of a model whose last block is pruned
            layer = getattr(model.model.layers[1].mlp, name)
            kept = layer.weight[:, :40] if name == "down_proj" else layer.weight[:40]
            layer.weight = nn.Parameter(kept.detach().clone())
        self.check(model, "a layer of it has a side of 40")
        self.check(bert(), "its blocks are not built like Llama's")
        self.check(llama(**SIZES).double(), "it is of torch.float64")

    def test_what_runs_by_its_logits(self) -> None:
        with pytest.raises(ValueError, match=r"precision='fp8' is not for OptimizedModule.*adapt the model itself"):
            mdkern.adapt(torch.compile(llama(**SIZES), backend="eager"), mask_id=MASK, precision="fp8")

    def test_autocast(self) -> None:
        denoiser, ids = in_fp8(llama(**SIZES)), random_ids(2, 9)
        assert "not in fp8" not in repr(denoiser)
        with torch.autocast("cpu", torch.bfloat16):
            assert "not in fp8 any more, because torch.autocast is on" in repr(denoiser)
            for run in (lambda: denoiser.hidden(ids), lambda: mdkern.sample(denoiser, length=8, steps=2)):
                with pytest.raises(ValueError, match=r"precision='fp8' is not for .*: torch\.autocast is on"):
                    run()

    def test_an_adapter_that_is_put_in_later(self) -> None:
        model, ids = llama(**SIZES), random_ids(2, 9)
        denoiser = in_fp8(model)
        held = denoiser.current()
        denoiser.hidden(ids)
        layer = model.model.layers[1].mlp
        layer.up_proj = Adapter(layer.up_proj)
        assert "not in fp8 any more, because" in repr(denoiser)
        with pytest.raises(ValueError, match="its modules are not what they were"):
            denoiser.hidden(ids)
        with pytest.raises(ValueError, match=r"its mlp\.up_proj is a Adapter"):
            mdkern.sample(denoiser, length=8, steps=2)
        held.hidden(ids)  # of a call that has begun: the weights as they were

    def test_texts_that_are_longer_than_the_model_takes(self) -> None:
        """Whose passes would be the model's own, in its own dtype."""
        denoiser = in_fp8(llama(**SIZES, max_position_embeddings=8))
        with pytest.raises(ValueError, match="is over 9 positions, of which there are 8"):
            denoiser.hidden(random_ids(2, 9))

    def test_passes_with_gradients_are_in_fp8_too(self) -> None:
        denoiser, ids = in_fp8(llama(**SIZES)), random_ids(2, 9)
        want = denoiser.hidden(ids)
        with torch.enable_grad():
            got = denoiser.hidden(ids)
        assert torch.equal(got, want)
        assert not got.requires_grad

    def test_it_is_not_batch_invariant(self) -> None:
        assert "fp8" in in_fp8(llama(**SIZES)).why_not_invariant(8, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_of_bits_tell_one_changed_number(dtype: torch.dtype) -> None:
    whole = torch.randn(6, 8, dtype=dtype)
    odd = torch.randn(7, dtype=dtype)
    tensors = {"words": whole, "a slice": whole[:, 1:5], "an odd place": odd[1:6], "odd": odd, "turned": whole.t()}
    for name, tensor in tensors.items():
        before = llama_fp8.sums_of([tensor])
        for place in range(tensor.numel()):
            plain = tensor.clone()
            tensor[divmod(place, tensor.shape[-1])[2 - tensor.ndim :]] *= 1.01
            assert not torch.equal(llama_fp8.sums_of([tensor]), before), (name, place)
            tensor.copy_(plain)
        assert torch.equal(llama_fp8.sums_of([tensor]), before)
    assert llama_fp8.integers_of(whole).dtype == torch.int64  # few to add up


def test_texts_are_sampled() -> None:
    """With caches and without, and in the same way twice."""
    denoiser = in_fp8(llama(**SIZES))
    for cache in ("none", "dual"):
        runs = [
            mdkern.sample(
                denoiser, num_samples=2, length=16, steps=8, block_length=8, decoder="top_probability", cache=cache,
                seed=3, progress=False,
            ).sequences
            for _ in range(2)
        ]  # fmt: skip
        assert torch.equal(*runs)
        assert not (runs[0] == MASK).any()


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [32, 64, 300])
def test_gpu_errors_are_those_of_rounding(kept: bool, biased: bool, width: int) -> None:
    """As large as those of the same passes on a CPU, in float32 but for the operands: by few rows, and by many."""
    model = llama(**SIZES, head_dim=64, max_position_embeddings=2048, attention_bias=biased, mlp_bias=biased)
    ids, new = random_ids(1, 400), random_ids(1, width, seed=1)
    columns, rows = torch.arange(width)[None], torch.arange(width)[None]

    def states(denoiser: SplitDenoiser) -> Tensor:
        device = denoiser.device
        if not kept:
            return denoiser.hidden(new.to(device)).cpu()
        cache = torch.zeros(denoiser.cache_shape(1, 400), dtype=denoiser.dtype, device=device)
        denoiser.window_hidden(cache, ids.to(device), None, rows.to(device))
        return denoiser.window_hidden(cache, new.to(device), columns.to(device) + 50, rows.to(device)).cpu()

    plain, want = (states(one(model)).double() for one in (lambda m: adapted(m), in_fp8))  # type: ignore[arg-type]
    model.to("cuda", torch.bfloat16)
    denoiser = in_fp8(model)
    assert "mdkern's own passes in fp8" in repr(denoiser)
    assert fp8_skinny.runs_fp8_skinny(torch.empty(width, 512, dtype=torch.bfloat16, device="cuda")) == (width <= 64)
    got = states(denoiser).double()
    assert (got - plain).norm() <= 1.35 * (want - plain).norm()


@pytest.mark.gpu
def test_gpu_passes_are_captured_and_follow_the_weights() -> None:
    model = llama(**SIZES, head_dim=64, max_position_embeddings=64).to("cuda", torch.bfloat16)
    denoiser, ids = in_fp8(model), random_ids(2, 64).cuda()
    now = denoiser.current()
    now.hidden(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = now.hidden(ids)
    graph.replay()
    assert torch.equal(states, now.hidden(ids))
    model.model.layers[0].mlp.gate_proj.weight.mul_(-1)
    want = denoiser.current().hidden(ids)
    assert not torch.equal(states, want)
    graph.replay()
    assert torch.equal(states, want)
