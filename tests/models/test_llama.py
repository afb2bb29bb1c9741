"""Models built like Llama, run by mdkern's own passes: the same as by their own forward, which else runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mdkern.models.denoiser import Denoiser
from mdkern.models.hf import llama_fused, llama_products, probe
from mdkern.models.hf.split import SplitDenoiser
from tests.problems.hf_models import (
    LONGEST,
    MASK,
    WIDTH,
    WORDS,
    adapted,
    bert,
    both_ways,
    decoder_config,
    dream,
    llada,
    llama,
    qwen,
    random_ids,
)

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, tied, biased": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, stretched positions": lambda: llama(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "rope_theta": 1e4}
    ),
    "mistral": lambda: both_ways(MistralForCausalLM(decoder_config(MistralConfig, sliding_window=None, head_dim=16))),
    "qwen 2": qwen,
    "qwen 3": lambda: both_ways(Qwen3ForCausalLM(decoder_config(Qwen3Config, head_dim=8))),
    "dream": dream,
    "llada": llada,
    "llada, tied and scaled": lambda: llada(weight_tying=True, scale_logits=True),
    "llada, grouped": lambda: llada(kv_heads=2),
}
KEPT = torch.arange(WORDS) != MASK
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


@pytest.fixture(params=["many rows", "few rows"])
def fused(model: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Denoiser:
    """The model's denoiser, whose passes fail if the model's own forward runs; also as a GPU runs few rows."""
    for name in ("runs_skinny", "runs_joint_linear", "runs_joint_swiglu"):
        monkeypatch.setattr(llama_products, name, lambda *_: request.param == "few rows")
    monkeypatch.setattr(llama_fused, "runs_window_attention", lambda *_: request.param == "few rows")
    denoiser = adapted(model, shifted=False)
    assert denoiser.description == "split at its output layer, with its backbone run by mdkern's own passes"
    monkeypatch.setattr(SplitDenoiser, "run", lambda *_, **__: pytest.fail("the model's own forward ran"))
    return denoiser


class TestPasses:
    def test_logits_are_the_models(self, model: Any, fused: Denoiser) -> None:
        ids = random_ids(3, LONGEST)
        want, got = model(ids).logits[..., :WORDS], fused.logits(ids)[..., :WORDS]
        torch.testing.assert_close(got[..., KEPT], want[..., KEPT], **CLOSE)

    def test_wanted_positions(self, fused: Denoiser) -> None:
        """Some of them, as many as there are in another order, and more."""
        ids, positions = random_ids(3, 9), torch.tensor([[8, 0, 0], [1, 2, 3], [4, 4, 7]])
        whole = fused.hidden(ids)
        for wanted in (positions, positions.repeat(1, 3), positions.repeat(1, 4)):
            rows = fused.hidden(ids, None, wanted)
            torch.testing.assert_close(rows, whole.gather(1, wanted[..., None].expand(-1, -1, WIDTH)), **CLOSE)

    @pytest.mark.parametrize("before", [0, 3])
    def test_padding_changes_nothing(self, fused: Denoiser, before: int) -> None:
        ids, mask = random_ids(2, 9), torch.zeros(2, 14, dtype=torch.bool)
        padded = random_ids(2, 14, seed=5)
        padded[:, before : before + 9], mask[:, before : before + 9] = ids, True
        got = fused.hidden(padded, None, None, mask)[:, before : before + 9]
        torch.testing.assert_close(got, fused.hidden(ids), **CLOSE)

    @pytest.mark.parametrize("padding", [0, 2])
    def test_windows_are_those_of_its_own_forward(self, model: Any, fused: Denoiser, padding: int) -> None:
        """The states of windows over caches that are out of date, and what the caches then hold."""
        own = adapted(model, shifted=False)
        ids, new, length = random_ids(2, 12), random_ids(2, 12, seed=1), 12
        mask = torch.arange(length) >= torch.tensor([[0], [padding]])
        given = mask if padding else None
        columns = torch.tensor([[3, 4, 5, 6], [9, 10, 11, 12]])  # the last is past the end
        positions = torch.tensor([[3, 0], [1, 1]])
        every = torch.arange(length).expand(2, -1)
        outcomes = []
        for denoiser in (own, fused):
            with pytest.MonkeyPatch.context() as patch:
                if denoiser is own:
                    patch.setattr(llama_fused, "runs_now", lambda: False)
                    patch.setattr(SplitDenoiser, "run", OWN_RUN)
                cache = torch.full(denoiser.cache_shape(2, length), torch.nan)
                first = denoiser.window_hidden(cache, ids, None, every, None, given)
                inside = columns.clamp(max=length - 1)
                rows = denoiser.window_hidden(cache, new.gather(1, inside), columns, positions, None, given)
                outcomes.append((first[mask], rows, cache[:, :, :, :-1]))
        for want, got in zip(*outcomes):
            torch.testing.assert_close(got, want, **CLOSE)

    def test_a_shifted_model(self, fused: Denoiser, model: Any) -> None:
        shifted = adapted(model, shifted=True)
        ids = random_ids(2, 9)
        plain, states = fused.hidden(ids), shifted.hidden(ids)
        torch.testing.assert_close(states[:, 1:], plain[:, :-1], **CLOSE)
        torch.testing.assert_close(states[:, 0], plain[:, 0], **CLOSE)


OWN_RUN = SplitDenoiser.run


class Adapter(nn.Module):
    """As LoRA's: a layer and a change to it."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inside(x)


class Quantised(nn.Linear):
    """As a quantiser's: a linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round(decimals=1)


class Subclass(Tensor):
    """As torchao's weights are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return 2 * torch.nn.functional.linear(args[0], args[1].as_subclass(Tensor))
        return super().__torch_function__(func, types, args, kwargs or {})


def layer_of(model: Any, number: int = 1) -> Any:
    return model.model.layers[number]


def with_adapter(model: Any) -> None:
    layer_of(model).mlp.up_proj = Adapter(layer_of(model).mlp.up_proj)


def with_quantised_layer(model: Any) -> None:
    layer_of(model).self_attn.v_proj = quantised = Quantised(WIDTH, WIDTH // 2, bias=False)
    nn.init.normal_(quantised.weight, generator=torch.Generator().manual_seed(1))


def with_tensors_of_a_kind_of_their_own(model: Any) -> None:
    layer = layer_of(model).mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclass), requires_grad=False)


def with_hook(model: Any) -> None:
    layer_of(model).mlp.register_forward_hook(lambda _, __, out: out * 1.1)


def with_forward_of_its_own(model: Any) -> None:
    norm = layer_of(model).input_layernorm
    forward = norm.forward
    norm.forward = lambda x: 1.1 * forward(x)


def with_parametrization(model: Any) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    torch.nn.utils.parametrize.register_parametrization(layer_of(model).mlp.gate_proj, "weight", Twice())


def with_layer_norm(model: Any) -> None:
    layer_of(model, 0).input_layernorm = nn.LayerNorm(WIDTH, bias=False)


def with_other_activation(model: Any) -> None:
    for number in (0, 1):
        layer_of(model, number).mlp.act_fn = nn.GELU()


def with_scaled_embedding(model: Any) -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 3 * super().forward(ids)

    model.model.embed_tokens = Scaled.from_pretrained(model.model.embed_tokens.weight.detach())


def with_more_parameters(model: Any) -> None:
    layer_of(model).gain = nn.Parameter(torch.ones(1))


CHANGES: list[tuple[Callable[[Any], None], str]] = [
    (with_adapter, "its mlp.up_proj is a Adapter, not a plain linear layer"),
    (with_quantised_layer, "its self_attn.v_proj is a Quantised, not a plain linear layer"),
    (with_tensors_of_a_kind_of_their_own, "holds weights of a kind of their own"),
    (with_hook, "model.layers.1.mlp has a hook or a forward of its own"),
    (with_forward_of_its_own, "model.layers.1.input_layernorm has a hook or a forward of its own"),
    (with_parametrization, "its mlp.gate_proj is a ParametrizedLinear, not a plain linear layer"),
    (with_layer_norm, "a LayerNorm of it is no RMS norm"),
    (with_other_activation, "its activation is not SiLU but a GELU"),
    (with_scaled_embedding, "mdkern's own passes do not give what it gives"),
    (with_more_parameters, "it has a parameter besides those of a Llama, model.layers.1.gain"),
]


class TestOthers:
    @pytest.mark.parametrize(("change", "reason"), CHANGES)
    def test_what_is_not_like_llama_runs_by_its_own_forward(self, change: Callable[[Any], None], reason: str) -> None:
        model, ids = llama(), random_ids(2, 9)
        change(model)
        denoiser = adapted(model)
        assert reason in denoiser.description, denoiser.description
        torch.testing.assert_close(denoiser.logits(ids)[..., KEPT], model(ids).logits[..., KEPT], **CLOSE)

    @pytest.mark.parametrize(("change", "_"), CHANGES[:6])
    def test_a_change_after_adapting_is_heeded(self, change: Callable[[Any], None], _: str) -> None:
        model, ids = llama(), random_ids(2, 9)
        denoiser = adapted(model)
        before = denoiser.logits(ids)
        change(model)
        want = model(ids).logits[..., KEPT]
        assert not torch.allclose(before[..., KEPT], want, **CLOSE)
        for kept in (denoiser, denoiser.current()):
            torch.testing.assert_close(kept.logits(ids)[..., KEPT], want, **CLOSE)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.model.rotary_emb.inv_freq.mul_(0.3),
            lambda model: model.model.rotary_emb.inv_freq.data.mul_(0.3),
            lambda model: setattr(model.model.rotary_emb, "inv_freq", 0.3 * model.model.rotary_emb.inv_freq),
            lambda model: setattr(model.model.rotary_emb, "attention_scaling", 2.0),
            lambda model: setattr(layer_of(model).self_attn, "scaling", 1.0),
            lambda model: setattr(layer_of(model).mlp.up_proj, "__class__", Quantised),
            lambda model: setattr(model.model, "layers", nn.ModuleList(reversed(model.model.layers))),
        ],
        ids=["angles", "angles, uncounted", "other angles", "scaled angles", "scale", "class", "order"],
    )
    def test_a_call_runs_the_model_as_it_is_then(self, change: Callable[[Any], Any]) -> None:
        """Also where what has changed is read when a model is adapted, and not in a pass."""
        model, ids = llama(), random_ids(2, 9)
        denoiser = adapted(model)
        before = denoiser.current().logits(ids)
        change(model)
        want = model(ids).logits[..., KEPT]
        assert not torch.allclose(before[..., KEPT], want, **CLOSE)
        for now in (denoiser.current(), adapted(model).current()):
            torch.testing.assert_close(now.logits(ids)[..., KEPT], want, **CLOSE)

    def test_a_buffer_that_begins_to_matter_is_heeded(self) -> None:
        class Scaled(type(llama().model.layers[0])):  # type: ignore[misc]
            def forward(self, *arguments: Any, **options: Any) -> Tensor:
                out: Tensor = self.gain * super().forward(*arguments, **options)
                return out

        model, ids = llama(), random_ids(2, 9)
        layer_of(model, 0).__class__ = Scaled
        layer_of(model, 0).register_buffer("gain", torch.ones(()))
        denoiser = adapted(model)
        assert "mdkern's own passes" in denoiser.description
        layer_of(model, 0).gain.fill_(3.0)
        now = denoiser.current()
        assert "mdkern's own passes do not give what it gives" in now.description
        torch.testing.assert_close(now.logits(ids)[..., KEPT], model(ids).logits[..., KEPT], **CLOSE)

    def test_buffers_of_any_kind_are_compared(self) -> None:
        model = llama()
        for number, dtype in enumerate((torch.bool, torch.int64, torch.float64, torch.complex64, torch.float8_e4m3fn)):
            model.register_buffer(f"kept_{number}", torch.zeros(3, 2).to(dtype).T)
        for number, buffer in enumerate((torch.zeros(()), torch.zeros(0), torch.zeros(2, 2).to_sparse())):
            model.register_buffer(f"odd_{number}", buffer)
        model.register_buffer("away", torch.zeros(2, device="meta"))
        anatomy = adapted(model).anatomy  # type: ignore[attr-defined]
        before = probe.small_buffers(model, anatomy)
        assert probe.same(before, probe.small_buffers(model, anatomy))
        for name in ("kept_0", "kept_2", "kept_3", "odd_0"):
            model.get_buffer(name).fill_(1)
            now = probe.small_buffers(model, anatomy)
            assert not probe.same(before, now)
            before = now

    def test_angles_that_have_not_changed_are_not_examined_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        denoiser = adapted(llama())
        monkeypatch.setattr(probe, "dissect", lambda *_: pytest.fail("it was examined again"))
        denoiser.current()

    def test_old_angles_are_given_back(self) -> None:
        model = llama()
        denoiser, angles = adapted(model), []
        for _ in range(8):
            model.model.rotary_emb.inv_freq.mul_(0.9)
            parts = denoiser.current().parts  # type: ignore[attr-defined]
            angles.append(weakref.ref(parts.cos))
            del parts
        assert sum(found() is not None for found in angles) <= 4

    def test_a_model_that_was_made_causal_is_refused(self) -> None:
        model = llama()
        denoiser = adapted(model)
        for number in (0, 1):
            layer_of(model, number).self_attn.is_causal = True
        model.config.is_causal = True
        with pytest.raises(ValueError, match="looks to the left only, unlike when it was adapted"):
            denoiser.current()

    def test_weights_that_change_are_heeded(self) -> None:
        model, ids = llama(), random_ids(2, 9)
        denoiser = adapted(model)
        for assign in (False, True):
            other = llama(seed=5 + assign)
            model.load_state_dict(other.state_dict(), assign=assign)
            for kept in (denoiser, denoiser.current()):
                torch.testing.assert_close(kept.logits(ids)[..., KEPT], other(ids).logits[..., KEPT], **CLOSE)

    def test_reasons(self) -> None:
        assert "its blocks are not built like Llama's" in adapted(bert()).description
        local = both_ways(MistralForCausalLM(decoder_config(MistralConfig, sliding_window=4)))
        assert adapted(local).description.endswith("its own forward")  # for the reason why it has no cache
        dynamic = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        assert "rotary embedding is of the kind 'dynamic'" in adapted(dynamic).description

    def test_gradients_and_autocast_need_its_own_forward(self) -> None:
        denoiser, ids = adapted(llama()), random_ids(1, 5)
        with torch.enable_grad():
            assert denoiser.hidden(ids).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert not llama_fused.runs_now()

    def test_longer_texts_than_there_are_angles_for(self) -> None:
        model, ids = llama(max_position_embeddings=12), random_ids(1, 2000)
        denoiser = adapted(model, max_length=2000)
        assert isinstance(denoiser, SplitDenoiser)
        assert denoiser.parts_for(2000, None) is not None
        assert denoiser.parts_for(2001, None) is None
        torch.testing.assert_close(denoiser.logits(ids)[..., KEPT], model(ids).logits[..., KEPT], **CLOSE)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}])
def test_products_in_parts_are_as_exact_as_its_own(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, with the parts of updates rounded, of whole passes that run some positions in the last block."""
    model = llama(hidden_size=256, intermediate_size=512, **changes)
    ids, positions = random_ids(4, 24), torch.arange(9).expand(4, -1)
    exact = adapted(model, shifted=False).hidden(ids, None, positions).double()
    model.bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(llama_fused, "runs_now", lambda: False)
        theirs = adapted(model, shifted=False).hidden(ids, None, positions).double()
    joint_parts, calls = llama_products.joint_parts, []
    monkeypatch.setattr(llama_products, "runs_joint_parts", lambda *_: True)
    monkeypatch.setattr(llama_products, "joint_parts", lambda *a: (calls.append(len(a[0])), joint_parts(*a))[1])
    denoiser = adapted(model, shifted=False)
    calls.clear()
    ours = denoiser.hidden(ids, None, positions).double()
    assert calls == [96, 96, 36, 36]
    assert (ours - exact).norm() <= (theirs - exact).norm()


def check_errors_on_gpu(
    model: Any, dtype: torch.dtype, states: Callable[[Denoiser], Tensor], most: float = 1.5
) -> None:
    """States by mdkern's passes are as close to the model in float32 as those of its own forward."""
    model.to("cuda", dtype)
    ours = states(adapted(model, shifted=False)).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_fused, "runs_now", lambda: False)
        theirs = states(adapted(model, shifted=False)).double()
        exact = states(adapted(model.float(), shifted=False)).double()
    assert (ours - exact).norm() <= most * (theirs - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [False, True])
def test_gpu_errors_are_no_larger_than_its_own(model: Any, dtype: torch.dtype, kept: bool) -> None:
    """Of whole passes, and of windows over a cache."""
    ids, new = random_ids(2, 12).cuda(), random_ids(2, 12, seed=1).cuda()
    columns, rows = torch.tensor([[3, 4, 5, 6], [8, 9, 10, 11]]).cuda(), torch.arange(4).expand(2, -1).cuda()

    def states(denoiser: Denoiser) -> Tensor:
        if not kept:
            return denoiser.hidden(ids)
        cache = torch.zeros(denoiser.cache_shape(2, 12), dtype=denoiser.dtype, device="cuda")
        denoiser.window_hidden(cache, ids, None, rows)
        return denoiser.window_hidden(cache, new.gather(1, columns), columns, rows)

    check_errors_on_gpu(model, dtype, states)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("width", "wanted"), [(32, 32), (64, 7)])
def test_gpu_errors_of_few_rows_and_many_keys(dtype: torch.dtype, biased: bool, width: int, wanted: int) -> None:
    """Skinny products, joint ones of the 1,200 rows before, grouped heads, and attention that divides its keys."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = llama(**sizes, head_dim=64, max_position_embeddings=2048, attention_bias=biased, mlp_bias=biased)
    ids, new = random_ids(1, 1200).cuda(), random_ids(1, width, seed=1).cuda()
    columns, rows = (torch.arange(n, device="cuda")[None] for n in (width, wanted))

    def states(denoiser: Denoiser) -> Tensor:
        cache = torch.zeros(denoiser.cache_shape(1, 1200), dtype=denoiser.dtype, device="cuda")
        denoiser.window_hidden(cache, ids, None, rows)
        return denoiser.window_hidden(cache, new, 1100 + columns, rows)

    check_errors_on_gpu(model, dtype, states)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("length", [256, 700])
def test_gpu_attention_of_windows_in_one_kernel(precision: str | None, length: int) -> None:
    """As close to the model in float32 as with its parts one after the other."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = llama(**sizes, head_dim=128, max_position_embeddings=2048).to("cuda", torch.bfloat16)
    ids, new = random_ids(1, length).cuda(), random_ids(1, 32, seed=1).cuda()
    rows, calls = torch.arange(32, device="cuda")[None], []

    def states(precision: str | None) -> Tensor:
        denoiser = adapted(model, shifted=False, precision=precision)
        cache = torch.zeros(denoiser.cache_shape(1, length), dtype=denoiser.dtype, device="cuda")
        denoiser.window_hidden(cache, ids, None, rows)
        return denoiser.window_hidden(cache, new, rows + 100, rows).double()

    with pytest.MonkeyPatch.context() as patch:
        one_kernel = llama_fused.window_attention
        patch.setattr(
            llama_fused, "window_attention", lambda *a, **k: (calls.append(k["rounded"]), one_kernel(*a, **k))[1]
        )
        ours = states(precision)
        assert calls[-2:] == [precision == "fp8"] * 2
        patch.setattr(llama_fused, "runs_window_attention", lambda *_: False)
        theirs = states(precision)
    model.float()
    exact = states(None)
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("texts", "width"), [(43, 3), (5, 32), (10, 25), (8, 32)])
@pytest.mark.parametrize(("biased", "key_heads"), [(False, 32), (True, 8)])
def test_gpu_windows_with_early_launches(
    texts: int, width: int, biased: bool, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As close to the model in float32 as its own forward is, and the same bits in all replays."""
    model = wide_llama(biased, key_heads)
    ids, new = random_ids(texts, 256).cuda(), random_ids(texts, width, seed=1).cuda()
    rows = torch.arange(width, device="cuda").expand(texts, -1)
    calls: list[str] = []
    for name, owner in (("joint_parts", llama_products), ("window_attention", llama_fused)):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name), name, calls))

    def states(denoiser: Denoiser) -> Tensor:
        kept = torch.zeros(denoiser.cache_shape(texts, 256), dtype=denoiser.dtype, device="cuda")
        denoiser.window_hidden(kept, ids, None, rows)
        calls.clear()
        return denoiser.window_hidden(kept, new, rows + 100, rows)

    denoiser = adapted(model.to("cuda", torch.bfloat16), shifted=False)
    want = states(denoiser).clone()
    block = ["window_attention"] * (texts <= 8 and key_heads == 32) + ["joint_parts"] * 2
    assert calls == block * 2
    kept = torch.zeros(denoiser.cache_shape(texts, 256), dtype=denoiser.dtype, device="cuda")
    denoiser.window_hidden(kept, ids, None, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = denoiser.window_hidden(kept, new, rows + 100, rows)
    for _ in range(20):
        graph.replay()
        assert torch.equal(made, want)
    check_errors_on_gpu(model, torch.bfloat16, states, most=1.0)


@cache
def wide_llama(biased: bool, key_heads: int) -> Any:
    """As wide as LLaDA's 8B."""
    sizes = {"hidden_size": 4096, "intermediate_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 256}
    return llama(**sizes, head_dim=128, num_key_value_heads=key_heads, attention_bias=biased, mlp_bias=biased)


def noted(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    return run


def test_few_queries_over_many_keys_divide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 32 heads of LLaDA do on 132 multiprocessors; eight texts, or 257 queries of each head, fill them."""
    monkeypatch.setattr(llama_fused, "num_sms", lambda _: 132)
    model = llama(hidden_size=256, num_attention_heads=32, num_key_value_heads=32, head_dim=8)
    denoiser = adapted(model)
    assert isinstance(denoiser, SplitDenoiser)
    parts = denoiser.parts
    assert parts is not None
    divides = [
        llama_fused.has_few_queries(parts, *shape, denoiser.device)
        for shape in ((1, 32, 2304), (1, 256, 2304), (1, 257, 2304), (8, 32, 2304), (1, 32, 256))
    ]
    assert divides == [True, True, False, False, False]


def test_a_llama_is_a_llama() -> None:
    """Several configurations of one class, so that nothing depends on a class's defaults."""
    model = both_ways(type(llama())(decoder_config(LlamaConfig, num_key_value_heads=1, rms_norm_eps=0.3)))
    assert "mdkern's own passes" in adapted(model).description
