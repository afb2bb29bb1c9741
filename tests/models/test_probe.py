"""What `adapt` finds out about people's models by trying, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

import mdkern
from mdkern import Denoiser, adapt
from mdkern.engine.resolve_models import not_finite
from mdkern.models.denoiser import Head
from mdkern.models.hf.adapted import LogitsDenoiser
from tests.problems.hf_models import (
    LONGEST,
    MASK,
    WORDS,
    adapted,
    bert,
    both_ways,
    decoder_config,
    dream,
    llada,
    llama,
    random_ids,
    randomize,
    starts,
)

KEPT = torch.arange(WORDS) != MASK
MakeDiT = Callable[..., mdkern.DiT]

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")


class Attending(nn.Module):
    """One layer of attention under a mask of its own, learned positions, no output embedding to be found."""

    def __init__(self, sees: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(WORDS, 16), nn.Embedding(LONGEST, 16)
        self.out = nn.Linear(16, WORDS)
        self.sees = sees

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        column = torch.arange(input_ids.shape[1])
        x = self.embed(input_ids) + self.place(column)
        seen = self.sees(column[:, None], column)
        seen = seen if attention_mask is None else seen & (1 - attention_mask == 0)[:, None]
        return self.out(x + F.scaled_dot_product_attention(x, x, x, attn_mask=seen))


SEES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": lambda query, key: (query == query) & (key == key),
    "left": lambda query, key: key <= query,
    "blocks of 4": lambda query, key: key // 4 <= query // 4,
    "near": lambda query, key: (key - query).abs() < 3,
    "itself": lambda query, key: key == query,
}


def attending(sees: str) -> Attending:
    return randomize(Attending(SEES[sees]))


class TestDirection:
    @pytest.mark.parametrize("as_function", [False, True])
    @pytest.mark.parametrize(
        ("sees", "message"), [("left", "looks to the left only"), ("blocks of 4", "does not look beyond the block")]
    )
    def test_one_sided_models_are_refused(self, sees: str, message: str, as_function: bool) -> None:
        model: Any = attending(sees)
        given = (lambda ids: model(ids)) if as_function else model
        with pytest.raises(ValueError, match=f"{message}.*needs attention to all of a text.*allow_causal=True"):
            adapt(given, vocab_size=WORDS, mask_id=MASK)
        denoiser = adapt(given, vocab_size=WORDS, mask_id=MASK, allow_causal=True)
        assert mdkern.sample(denoiser, length=8, seed=0).sequences.shape == (1, 8)

    @pytest.mark.parametrize("sees", ["all", "near", "itself"])
    def test_others_are_not(self, sees: str) -> None:
        adapt(attending(sees), vocab_size=WORDS, mask_id=MASK)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_decoders_that_can_be_split(self, dtype: torch.dtype) -> None:
        adapted(llama().to(dtype))
        model = llama(is_causal=True).to(dtype)
        for block in model.model.layers:
            block.self_attn.is_causal = True
        with pytest.raises(ValueError, match="model H: LlamaForCausalLM looks to the left only"):
            mdkern.sample(model)

    @pytest.mark.parametrize(
        ("setting", "length", "message"),
        [
            ("block_size", 4, r"blocks of 4 \(block_size in its config\)"),
            ("bd_size", 8, r"blocks of 8 \(bd_size in its config\)"),
        ],
    )
    def test_models_made_for_blocks_are_known_by_their_config(self, setting: str, length: int, message: str) -> None:
        model = llada(**{setting: length})
        with pytest.raises(
            ValueError, match=f"LLaDAModelLM was made for attention by {message}.*block_causal={length}"
        ):
            adapt(model)
        assert adapted(model, block_causal=length).block_causal == length
        assert adapted(model, allow_causal=True).hidden(random_ids(1, 5)).shape == (1, 5, 32)
        whole = llada(block_size=LONGEST)  # as some call the longest input
        adapted(whole)

    @pytest.mark.parametrize("causal_call", ["lean", "plain"])
    def test_the_call_that_is_tried_is_the_one_that_samples(self, causal_call: str) -> None:
        """Where use_cache=False changes the result, the plain call is the model."""
        model = llama()
        forward = model.forward

        def call(input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool | None = None) -> Any:
            lean = use_cache is False
            length = input_ids.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(len(input_ids), 1, -1, -1)
            mask = causal if lean == (causal_call == "lean") else torch.ones_like(causal)
            return forward(input_ids, mask, position_ids, use_cache=False)

        model.forward = call
        if causal_call == "plain":
            with pytest.raises(ValueError, match="looks to the left only"):
                adapt(model)
            return
        denoiser, ids = adapted(model), random_ids(2, 7)
        torch.testing.assert_close(denoiser.logits(ids)[..., KEPT], model(ids).logits[..., KEPT])


class TestSnapshots:
    """A denoiser that is kept samples from the weights as they are."""

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("make", [bert, llama, lambda: llada(weight_tying=True, scale_logits=True)])
    def test_of_split_models(self, make: Callable[..., Any], assign: bool) -> None:
        model, ids = make(), random_ids(2, 7)
        kept, other = adapted(model), randomize(make(), seed=5)
        model.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
        if assign:
            model.tie_weights() if hasattr(model, "tie_weights") else None
        want = other(ids).logits[..., :WORDS]
        torch.testing.assert_close(kept.logits(ids)[..., :WORDS][..., KEPT], want[..., KEPT], rtol=1e-4, atol=1e-4)
        options: dict[str, Any] = {"input_ids": starts(3), "steps": 6, "seed": 2}
        assert mdkern.sample(kept, **options).sequences.equal(mdkern.sample(adapted(other), **options).sequences)

    def test_of_our_dit(self, make_dit: MakeDiT) -> None:
        model, other = make_dit(seed=1), make_dit(seed=2)
        kept = adapt(model)
        with torch.no_grad():
            other.head_bias.normal_()
        model.load_state_dict(other.state_dict())
        options: dict[str, Any] = {"num_samples": 3, "length": 8, "seed": 0}
        assert mdkern.sample(kept, **options).sequences.equal(mdkern.sample(other, **options).sequences)
        model.double()
        assert (kept.dtype, kept.head.weight.dtype) == (torch.float64, torch.float64)

    def test_of_a_scale_that_was_switched_on(self) -> None:
        model = llada()
        kept = adapted(model)
        assert kept.head.scale == 1.0
        model.config.scale_logits = True
        assert kept.current().head.scale == model.config.d_model**-0.5

    def test_a_head_that_has_got_a_hook_is_noticed(self) -> None:
        model = llama()
        kept = adapted(model)
        model.lm_head.register_forward_hook(lambda _, __, out: out * 2)
        with pytest.raises(ValueError, match="can't be split as when it was adapted: its logits are not a linear"):
            mdkern.sample(kept, length=6)


class TestPadding:
    def sampled(self, denoiser: Denoiser, before: int, after: int) -> Tensor:
        ids = F.pad(starts(3), (before, after), value=7)
        mask = F.pad(torch.ones_like(starts(3)), (before, after))
        out = mdkern.sample(denoiser, input_ids=ids, attention_mask=mask, steps=6, seed=5, decoder="top_probability")
        return out.sequences[:, before : before + starts(3).shape[1]]

    def test_of_a_model_that_runs_by_its_logits(self) -> None:
        """Left padding too: BERT's learned positions are told."""
        model = bert()
        model.get_output_embeddings().register_forward_hook(lambda _, __, out: out * 2)
        denoiser = adapt(model)
        assert isinstance(denoiser, LogitsDenoiser)
        assert denoiser.takes_attention_mask
        assert self.sampled(denoiser, 3, 2).equal(self.sampled(denoiser, 0, 0))

    def test_before_the_text_it_is_refused_where_it_changes_it(self) -> None:
        denoiser = adapt(attending("all"), vocab_size=WORDS, mask_id=MASK, max_length=LONGEST)
        assert self.sampled(denoiser, 0, 4).equal(self.sampled(denoiser, 0, 0))  # by a mask of int64: 1 - mask
        assert "takes padding after the text" in repr(denoiser)
        with pytest.raises(ValueError, match=r"padding before text.*pad on the right"):
            self.sampled(denoiser, 3, 0)

    def test_what_leaks_from_padding_by_logits_is_noticed(self) -> None:
        """As MobileBERT, whose embedding mixes neighbours."""
        model = attending("all")
        model.embed.register_forward_hook(lambda _, __, out: out + out.roll(-1, 1))
        assert not adapt(model, vocab_size=WORDS, mask_id=MASK).takes_attention_mask

    def test_experts_that_round_differently_do_not_leak(self) -> None:
        model = both_ways(MixtralForCausalLM(decoder_config(MixtralConfig, num_local_experts=4)))
        denoiser = adapted(model)
        assert denoiser.takes_attention_mask
        model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0] + 1e-4 * args[0].mean(1, keepdim=True),)
        )
        assert not adapted(model).takes_attention_mask

    def test_rounding_that_depends_on_the_neighbours_is_no_leak(self) -> None:
        """And a leak of a size above it is one."""
        model = llama()

        def noise(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0] + 1e-7 * args[0].sum((0, 1), keepdim=True) / len(args[0]) + leak * args[0].mean(1, True),)

        model.lm_head.register_forward_pre_hook(noise)
        leak = 0.0
        assert adapted(model).takes_attention_mask
        leak = 1e-5
        model.register_buffer("changed", torch.zeros(1))  # so that it is examined anew
        assert not adapted(model).takes_attention_mask

    def test_functions_that_compute_with_the_mask(self) -> None:
        seen: list[torch.dtype] = []

        def model(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            if attention_mask is not None:
                assert ((1 - attention_mask) >= 0).all()
                seen.append(attention_mask.dtype)
            return torch.zeros(*input_ids.shape, 4)

        ids, mask = torch.tensor([[4, 4, 0], [4, 4, 4]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        denoiser = adapt(model, vocab_size=4, mask_id=4)
        for _ in range(2):
            mdkern.sample(denoiser, input_ids=ids, attention_mask=mask, steps=3, seed=0)
        assert set(seen) == {torch.int64}


class Odd(Tensor):
    """Weights of some library: products can be computed, little else is known of them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.linalg.vector_norm, Tensor.data_ptr, Tensor.isfinite):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class TestWeights:
    @pytest.mark.parametrize("everywhere", [False, True])
    def test_of_a_library_for_quantisation(self, everywhere: bool) -> None:
        model, ids = llama(), random_ids(2, 7)
        want = model(ids).logits
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and (everywhere or "lm_head" not in name):
                module.weight = nn.Parameter(module.weight.detach().as_subclass(Odd), requires_grad=False)
        denoiser = adapt(model)
        assert isinstance(denoiser, LogitsDenoiser) == everywhere
        torch.testing.assert_close(denoiser.logits(ids)[..., KEPT].as_subclass(Tensor), want[..., KEPT])
        assert mdkern.sample(model, length=6, seed=0).sequences.shape == (1, 6)

    def test_not_finite_looks_at_what_it_can(self) -> None:
        model = bert()
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[3, 0] = torch.nan
        model.other = nn.Linear(3, 3, device="meta")
        assert not_finite(adapted(bert())) == []
        found = not_finite(adapt(model))
        assert found
        assert all("embeddings" in name or "decoder" in name for name in found)

    def test_that_accelerate_brings_in(self) -> None:
        """As its hooks do: weights are on the meta device but while their module runs."""

        class Hook:
            offload, execution_device = True, "cpu"

        model, ids = llama(), random_ids(2, 7)
        want, layer = model(ids).logits, model.model.layers[0].mlp.up_proj
        weight = layer.weight
        layer._hf_hook, forward = Hook(), layer.forward

        def brought_in(x: Tensor) -> Tensor:
            layer.weight = weight
            out = forward(x)
            layer.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
            return out

        layer.forward = brought_in
        model(ids)
        with pytest.warns(UserWarning, match="because its weights are kept elsewhere and brought in by accelerate"):
            denoiser = adapt(model)
        assert denoiser.device.type == "cpu"
        torch.testing.assert_close(denoiser.logits(ids)[..., KEPT], want[..., KEPT])
        assert mdkern.sample(denoiser, length=6, seed=0).sequences.shape == (1, 6)


class Passing(nn.Module):
    """A wrapper as PEFT's: everything by ``**kwargs``, what is inside by `get_base_model`."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.base_model, self.config = inside, inside.config

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def get_output_embeddings(self) -> nn.Module:
        return self.base_model.get_output_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class Holding(nn.Module):
    """A wrapper that might do anything with what is inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.module = inside

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.module(input_ids)


@pytest.mark.parametrize("make", [bert, llama, llada])
def test_models_of_64_bits_are_split(make: Callable[[], nn.Module]) -> None:
    """Their logits are compared as mdkern gives them, with 32 bits."""
    model, ids = make().double(), starts(3)
    denoiser = adapted(model)
    assert denoiser.description.startswith("split at its output layer")
    want = model(ids).logits[..., :WORDS][..., KEPT]
    torch.testing.assert_close(denoiser.logits(ids)[..., :WORDS][..., KEPT].double(), want, rtol=1e-5, atol=1e-5)


class TestWrappers:
    def test_peft_keeps_what_its_model_can(self) -> None:
        for make in (llama, bert, dream):
            bare, wrapped = adapted(make()), adapted(Passing(make()).eval(), shifted=make is dream)
            assert (wrapped.takes_cache, wrapped.takes_attention_mask) == (bare.takes_cache, True)
            assert wrapped.logits(random_ids(2, 6)).equal(bare.logits(random_ids(2, 6)))

    @pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
    def test_a_dit_is_found(self, make_dit: MakeDiT, wrap: Callable[..., Any]) -> None:
        model, options = make_dit(), {"num_samples": 3, "length": 8, "seed": 0}
        assert mdkern.sample(wrap(model), **options).sequences.equal(mdkern.sample(model, **options).sequences)

    def test_what_to_do_about_others(self, make_dit: MakeDiT) -> None:
        model = make_dit()
        with pytest.raises(
            ValueError, match=r"Write mdkern\.adapt\(model, vocab_size=…, mask_id=….*adapt the DiT inside"
        ):
            mdkern.sample(Holding(model).eval())
        with pytest.raises(ValueError, match=r"Write mdkern\.adapt\(model, mask_id=…\) .tokenizer\.mask_token_id"):
            mdkern.sample(bert(mask_token_id=None))
        padded = adapt(lambda ids: model(ids), vocab_size=11, mask_id=10)
        with pytest.raises(ValueError, match=r"leave them off \(logits\[\.\.\., :11\]\)"):
            mdkern.sample(padded, length=4)
        right = adapt(lambda ids: model(ids)[..., :11], vocab_size=11, mask_id=10)
        assert mdkern.sample(right, length=4).sequences.shape == (1, 4)


class TestDescriptions:
    def test_ends_of_text_of_the_generation_config_too(self) -> None:
        model = llama(eos_token_id=3)
        model.generation_config = GenerationConfig(eos_token_id=[3, 9, 999])
        assert adapted(model).eos_ids == (3, 9)

    def test_a_dit_by_other_settings(self, make_dit: MakeDiT) -> None:
        denoiser = adapt(make_dit(), eos_id=[1, 2], max_length=6, num_blocks=2)
        assert (denoiser.eos_ids, denoiser.max_length, denoiser.num_blocks) == ((1, 2), 6, 2)
        assert mdkern.sample(denoiser, seed=0).sequences.shape == (1, 6)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_blocks": 3}, "num_blocks=3 contradicts the model's own 2"),
            ({"max_length": 17}, "max_length must be at most 16, the model's own, not 17"),
            ({"max_length": 0}, "max_length must be a whole number of at least 1, not 0"),
            ({"max_length": True}, "max_length must be a whole number"),
            ({"num_blocks": 1.5}, "num_blocks must be a whole number"),
            ({"eos_id": -1}, "eos_id must be an id in 0..10 other than the mask id 10"),
            ({"eos_id": [1, 99]}, "eos_id must be an id"),
            ({"eos_id": 10}, "eos_id must be an id"),
            ({"device": "meta"}, "device=meta is not where the model is, cpu: move it"),
        ],
    )
    def test_what_cannot_take_effect_is_refused(self, make_dit: MakeDiT, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            adapt(make_dit(), **options)
        with pytest.raises(ValueError, match=r"contradicts the model's own|must be an id|must be a whole|device=meta"):
            adapt(adapt(make_dit()), **options)

    def test_repr_tells_what_was_found(self, make_dit: MakeDiT) -> None:
        assert repr(adapt(make_dit(eos_id=3), name="mine")) == (
            "<mine: 11 ids, mask id 10; ends of text 3; at most 16 positions; runs by mdkern's own passes;"
            " keeps keys and values; takes padding>"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert repr(adapt(lambda ids: ids, vocab_size=4, mask_id=3)) == (
                "<<lambda>: 4 ids, mask id 3; runs by its logits; keeps no keys and values because it runs by its"
                " logits; takes no padding>"
            )
        found = "split at its output layer, with its backbone run by mdkern's own passes; keeps keys and values"
        assert f"{found}; takes padding" in repr(adapted(llama()))


class Uniform(Denoiser):
    """A denoiser of somebody's own, right or with one fault."""

    def __init__(self, fault: str = "") -> None:
        self.vocab_size, self.mask_id, self.fault = 5, 4, fault
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.head = Head(torch.randn(5, 8), torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf]))

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        whole = positions is None or self.fault == "positions"
        shape = (input_ids if whole else positions).shape
        states = torch.zeros(*shape, 7 if self.fault == "width" else 8)
        changes: dict[str, Callable[[Tensor], Any]] = {
            "dtype": Tensor.double, "device": lambda x: x.to("meta"), "flat": lambda x: x.flatten(0, 1),
            "nothing": lambda x: None,
        }  # fmt: skip
        return changes.get(self.fault, lambda x: x)(states)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
@pytest.mark.parametrize("fault", ["positions", "width", "dtype", "device", "flat", "nothing"])
def test_states_that_are_not_what_was_asked_for_are_refused(fault: str, guidance_scale: float) -> None:
    options: dict[str, Any] = {"num_samples": 2, "length": 6, "steps": 6, "seed": 0, "guidance_scale": guidance_scale}
    assert (mdkern.sample(Uniform(), **options).sequences < 4).all()
    with pytest.raises(ValueError, match=r"denoiser\.hidden gave .*expected torch\.float32 \("):
        mdkern.sample(Uniform(fault), **options)
