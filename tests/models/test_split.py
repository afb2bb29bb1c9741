"""People's own models split at their output layer: same samples, padding, shifts and caches; the model untouched."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import mdkern
from mdkern import adapt
from mdkern.engine import graphs
from mdkern.models.fingerprint import fingerprint
from mdkern.models.hf.adapted import LogitsDenoiser
from tests.problems.hf_models import (
    LONGEST,
    MASK,
    MODELS,
    WIDTH,
    WORDS,
    adapted,
    bert,
    by_logits,
    draw,
    dream,
    llada,
    llama,
    qwen,
    random_ids,
    randomize,
    starts,
)


@pytest.mark.parametrize("name", MODELS)
class TestSplit:
    def test_hidden_and_head_make_the_models_logits(self, name: str) -> None:
        model, ids = MODELS[name](), random_ids(3, 9)
        denoiser, want = adapted(model, shifted=False), model(ids).logits[..., :WORDS]
        got = denoiser.logits(ids)
        assert (got[..., WORDS:] == -torch.inf).all()  # of a padded table
        assert (got[..., MASK] == -torch.inf).all()
        kept = torch.arange(WORDS) != MASK
        torch.testing.assert_close(got[..., :WORDS][..., kept], want[..., kept], rtol=1e-5, atol=1e-5)
        positions = torch.tensor([[8, 0], [1, 1], [3, 2]])
        rows = denoiser.head.logits(denoiser.hidden(ids, None, positions))
        torch.testing.assert_close(rows, got.gather(1, positions[..., None].expand(-1, -1, got.shape[-1])))

    def test_the_samples_of_its_logits(self, name: str) -> None:
        """And its output layer computes no logits for them."""
        model, decoder = MODELS[name](), "threshold" if len(name) % 2 else "ancestral"  # half of the models each
        options: dict[str, Any] = {"input_ids": starts(6), "decoder": decoder, "seed": 3, "temperature": 0.8}
        want = mdkern.sample(by_logits(model, name == "dream"), **options)
        widths: set[int] = set()
        handle = model.get_output_embeddings().register_forward_hook(lambda _, __, out: widths.add(out.shape[-1]))
        denoiser = adapted(model)
        widths.clear()
        got = mdkern.sample(denoiser, **options)
        handle.remove()
        assert got.sequences.equal(want.sequences)
        assert got.sequences.unique(dim=0).shape[0] == 6
        assert widths <= {0, WIDTH}  # WIDTH: a tied layer as the input embedding
        assert got.nfe["H"].equal(want.nfe["H"])

    def test_the_model_is_left_as_it_was(self, name: str) -> None:
        model, ids = MODELS[name](), random_ids(2, 9)
        want = model(ids).logits.detach().clone()
        before = fingerprint(model)  # some change their config when they first run
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        denoiser = adapted(model)
        mdkern.sample(denoiser, input_ids=starts(2), seed=0)
        handle = list(model.modules())[-1].register_forward_pre_hook(fail)  # the last layer, or the norm before it
        with pytest.raises(ArithmeticError):
            denoiser.hidden(ids)
        handle.remove()
        assert fingerprint(model) == before
        assert model(ids).logits.equal(want)
        assert all(value.equal(weights[key]) for key, value in model.state_dict().items())

    def test_others_may_run_it_meanwhile(self, name: str) -> None:
        """In the midst of a split pass another thread gets logits, and a second sampler its hidden states."""
        model, ids = MODELS[name](), random_ids(2, 9)
        denoiser, want = adapted(model), model(ids).logits
        expected, seen, busy = denoiser.hidden(ids), [], []

        def look(*_: Any) -> None:
            if threading.current_thread() is main and not busy:
                busy.append(True)
                for run in (lambda: model(ids).logits, lambda: denoiser.hidden(ids)):
                    thread = threading.Thread(target=lambda run=run: seen.append(run()))
                    thread.start()
                    thread.join()

        main = threading.current_thread()
        handles = [module.register_forward_pre_hook(look) for module in list(model.modules())[1:]]
        assert denoiser.hidden(ids).equal(expected)
        for handle in handles:
            handle.remove()
        assert seen[0].equal(want)
        assert seen[1].equal(expected)


def fail(*_: Any) -> None:
    raise ArithmeticError


class TestConfiguration:
    def test_what_llada_tells(self) -> None:
        denoiser = adapted(llada())
        assert (denoiser.vocab_size, denoiser.mask_id, denoiser.eos_ids) == (WORDS, MASK, (3,))
        assert (denoiser.max_length, denoiser.num_blocks, denoiser.head.padded_vocab_size) == (LONGEST, 2, WORDS + 2)

    def test_what_dream_tells(self) -> None:
        denoiser = adapted(dream())
        assert (denoiser.vocab_size, denoiser.mask_id, denoiser.eos_ids) == (WORDS, MASK, (3, 5))
        assert denoiser.shifted
        assert not adapted(dream(), shifted=False).shifted
        assert not adapted(qwen()).shifted

    def test_a_mask_one_past_the_table(self) -> None:
        model = llama(vocab_size=MASK + 1, mask_token_id=None)
        with torch.no_grad():
            model.lm_head = nn.Linear(WIDTH, MASK, bias=False)  # none for the mask
        denoiser = adapted(model, vocab_size=MASK, mask_id=MASK)
        assert denoiser.vocab_size == MASK + 1
        out = mdkern.sample(denoiser, num_samples=4, length=6, seed=0)
        assert (out.sequences < MASK).all()

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"scale_logits": True}, (WIDTH**-0.5, 0.0)),
            ({"logit_scale": 0.3}, (0.3, 0.0)),
            ({"logits_scaling": 4.0}, (0.25, 0.0)),
            ({"final_logit_softcapping": 2.0}, (1.0, 2.0)),
            ({"final_logit_softcapping": 2.0, "logit_scale": 0.3}, (0.3, 2.0)),
        ],
    )
    def test_scales_and_caps(self, settings: dict[str, Any], expected: tuple[float, float]) -> None:
        class Shaped(type(llada())):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                output, config = super().forward(*args, **kwargs), self.config
                scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
                cap = getattr(config, "final_logit_softcapping", None)
                logits = output.logits * scale
                return output._replace(logits=logits if cap is None else cap * torch.tanh(logits / cap))

        denoiser = adapted(randomize(Shaped(**settings)))
        assert (denoiser.head.scale, denoiser.head.soft_cap) == expected


class TestShift:
    def test_a_state_serves_the_next_position(self) -> None:
        model, ids = dream(), random_ids(2, 9)
        denoiser, plain = adapted(model), adapted(model, shifted=False)
        states, shifted = plain.hidden(ids), denoiser.hidden(ids)
        assert shifted[:, 1:].equal(states[:, :-1])
        assert shifted[:, 0].equal(states[:, 0])
        positions = torch.tensor([[0, 5, 1], [8, 3, 0]])
        assert denoiser.hidden(ids, None, positions).equal(
            shifted.gather(1, positions[..., None].expand(-1, -1, WIDTH))
        )

    def test_what_follows_padding_is_served_by_itself(self) -> None:
        denoiser, ids = adapted(dream()), random_ids(2, 9)
        mask = torch.arange(9) >= torch.tensor([[3], [0]])
        alone, padded = denoiser.hidden(ids[:1, 3:]), denoiser.hidden(ids, None, None, mask)
        torch.testing.assert_close(padded[:1, 3:], alone, rtol=1e-4, atol=1e-5)

    def test_models_by_their_logits_too(self) -> None:
        model = qwen()
        with pytest.warns(UserWarning, match="runs by its logits"):
            shifted = adapt(lambda ids: model(ids).logits, vocab_size=WORDS, mask_id=MASK, shifted=True)
        ids, positions = random_ids(2, 9), torch.tensor([[0, 5], [8, 1]])
        expected = adapted(model, shifted=True)
        torch.testing.assert_close(shifted.logits(ids), expected.logits(ids))
        rows = shifted.hidden(ids, None, positions)
        want = expected.logits(ids).gather(1, positions[..., None].expand(-1, -1, WORDS))
        kept = torch.arange(WORDS) != MASK
        torch.testing.assert_close(rows[..., kept], want[..., kept])

    def test_not_for_what_is_in_its_place(self, make_dit: Callable[..., Any]) -> None:
        for model in (make_dit(), adapt(make_dit())):
            with pytest.raises(ValueError, match="shifted must not be given"):
                adapt(model, shifted=True)
            with pytest.raises(ValueError, match="allow_causal must not be given"):
                adapt(model, allow_causal=True)


class Wrapped(nn.Module):
    """A head in somebody's wrapper, as LoRA's or a quantiser's."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside = inside

    @property
    def weight(self) -> Tensor:
        return self.inside.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inside(x)


class Changed(nn.Module):
    """A llama whose logits somebody has changed."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inside, self.change = llama(), change
        self.config = self.inside.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inside.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.change(self.inside(input_ids).logits)


def without_embeddings() -> nn.Module:
    model = Changed(lambda logits: logits)
    model.get_output_embeddings = None
    return model


def wrapped_head() -> nn.Module:
    model = llama()
    model.lm_head = Wrapped(model.lm_head)
    return model


def hooked_head() -> nn.Module:
    model = llama()
    model.lm_head.register_forward_hook(lambda _, __, out: out * 2)
    return model


def head_run_twice() -> nn.Module:
    model = llama()
    model.lm_head.register_forward_pre_hook(lambda layer, args: (args[0] + 0 * layer.forward(args[0]).sum(),))
    return model


def deaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A call that takes an attention mask and does not heed it."""

    def call(input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return forward(input_ids)

    return call


def spoil(logits: Tensor) -> Tensor:
    logits[..., 5] = 1.0
    return logits


class TestFallback:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (without_embeddings, "it has no get_output_embeddings"),
            (wrapped_head, "its output embedding is a Wrapped, not a plain linear layer"),
            (hooked_head, "its logits are not a linear function"),
            (head_run_twice, "its forward runs its output embedding 2 times"),
            (lambda: Changed(lambda logits: logits.log_softmax(-1)), "its logits are not a linear function"),
            (lambda: Changed(spoil), "a pass without its output layer failed: index"),
            (lambda: Changed(lambda logits: logits.flip(1)), "its logits are not a linear function"),
        ],
    )
    def test_by_its_logits_with_the_reason(self, make: Callable[[], nn.Module], reason: str) -> None:
        model = make().eval()
        with pytest.warns(UserWarning, match=f"runs by its logits because {reason}.*: the output layer is computed"):
            denoiser = adapt(model, mask_id=MASK)
        assert isinstance(denoiser, LogitsDenoiser)
        output = model(random_ids(1, 6))
        want = output if isinstance(output, Tensor) else output.logits
        got = denoiser.logits(random_ids(1, 6))
        kept = torch.arange(WORDS) != MASK
        torch.testing.assert_close(got[..., kept], want[..., kept])
        assert (mdkern.sample(denoiser, num_samples=2, length=6, seed=0).sequences != MASK).all()

    def test_a_padded_table_by_its_logits(self) -> None:
        model = llada()
        model.model.transformer["ff_out"].register_forward_hook(lambda _, __, out: out * 2)
        with pytest.warns(UserWarning, match="because its logits"):
            denoiser = adapt(model)
        assert (mdkern.sample(denoiser, num_samples=4, length=6, seed=0).sequences < WORDS).all()

    def test_a_causal_model_has_no_cache(self) -> None:
        model = llama(is_causal=True)
        for block in model.model.layers:
            block.self_attn.is_causal = True
        denoiser = adapted(model, allow_causal=True)
        assert not denoiser.takes_cache
        assert denoiser.no_cache_reason in (
            "its attention looks to the left only",
            "its attention has a mask or a bias of its own",  # which transformers 4 makes
        )
        with pytest.raises(ValueError, match="kept keys and values"):
            mdkern.sample(denoiser, length=8, decoder="threshold", block_length=4, cache="dual")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("roberta", "windows over kept keys and values do not give"),
            ("modern bert", "some of its attention is local"),
            ("bert, eager attention", "its attention is not PyTorch's scaled_dot_product_attention"),
        ],
    )
    def test_no_cache_and_why(self, name: str, reason: str) -> None:
        assert adapted(MODELS[name]()).no_cache_reason.startswith(reason)

    @pytest.mark.parametrize("window", [LONGEST, 12])
    def test_a_mask_that_hides_what_is_far_away(self, window: int) -> None:
        """A window that is longer than the ids that everything else is tried on."""
        model = llama()
        index = torch.arange(LONGEST)
        near = (index - index[:, None]).abs() < window
        forward = model.forward

        def call(input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
            length = input_ids.shape[1]
            return forward(input_ids, near[None, None, :length, :length], position_ids)

        model.forward = call
        denoiser = adapted(model)
        assert denoiser.takes_cache == (window == LONGEST)
        assert ("a mask or a bias of its own" in denoiser.no_cache_reason) == (window < LONGEST)

    def test_a_model_that_sees_padding_takes_none(self) -> None:
        model = bert(attn_implementation="eager")
        model.forward = deaf(model.forward)
        denoiser = adapted(model)
        assert not denoiser.takes_attention_mask
        ids, mask = torch.full((1, 6), MASK), torch.tensor([[1, 1, 1, 1, 0, 0]])
        with pytest.raises(ValueError, match=r"takes none, .* so nothing may be padded"):
            mdkern.sample(denoiser, input_ids=ids, attention_mask=mask)


class SeenMasks(TorchFunctionMode):
    """The masks that attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.masks.append((kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


class TestPadding:
    def test_a_mask_that_hides_nothing_is_left_out(self) -> None:
        """Some versions of transformers make one while a graph is captured; the kernels for it are others."""
        model = llama()
        forward, capturing = model.forward, False

        def call(input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = True) -> Any:
            length = input_ids.shape[1]
            mask = torch.ones(1, 1, length, length, dtype=torch.bool) if capturing else None
            return forward(input_ids, mask, position_ids, use_cache=use_cache)

        model.forward = call
        denoiser, ids = adapted(model), random_ids(2, 9)
        eager = denoiser.hidden(ids)
        capturing = True
        with SeenMasks() as seen:
            model(ids)
            assert len(seen.masks) == 2
            assert all(mask is not None for mask in seen.masks)
            seen.masks.clear()
            assert denoiser.hidden(ids).equal(eager)
        assert seen.masks == [None, None]

    def test_padding_that_leaks_by_less_than_rounding_is_noticed(self) -> None:
        model = bert(attn_implementation="eager")
        assert adapted(model).takes_attention_mask
        model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0] + 1e-5 * args[0].mean(1, keepdim=True),)
        )
        assert not adapted(model).takes_attention_mask

    @pytest.mark.parametrize("name", MODELS)
    def test_text_is_what_it_is_alone(self, name: str) -> None:
        denoiser, alone = adapted(MODELS[name]()), starts(3)
        before = 3
        padded = torch.nn.functional.pad(alone, (before, 4 - before), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(alone), (before, 4 - before))
        options: dict[str, Any] = {"steps": 6, "seed": 5, "decoder": "top_probability"}
        want = mdkern.sample(denoiser, input_ids=alone, **options).sequences
        got = mdkern.sample(denoiser, input_ids=padded, attention_mask=mask, **options).sequences
        assert got[:, before : before + alone.shape[1]].equal(want)


class TestMarks:
    """What graphs are found by."""

    def test_the_same_model_has_the_same_mark(self) -> None:
        for name in ("llama", "dream", "llada"):
            model = MODELS[name]()
            assert graphs.mark_of(adapted(model)) == graphs.mark_of(adapted(model)) is not None

    def test_other_weights_settings_or_modules_have_another(self) -> None:
        def replace_a_parameter(model: Any) -> None:
            layer = model.model.layers[0].mlp.up_proj
            layer.weight = nn.Parameter(layer.weight.detach().clone())

        def replace_the_head(model: Any) -> None:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

        def switch_an_adapter(model: Any) -> None:
            model.model.layers[1].mlp.active_adapter = "other"

        def replace_a_module(model: Any) -> None:
            model.model.layers[0].mlp = Wrapped(nn.Linear(WIDTH, WIDTH))

        marks = set()
        for change in (None, replace_a_parameter, replace_the_head, switch_an_adapter, replace_a_module):
            model = llama()
            old = graphs.mark_of(adapted(model))
            if change is not None:
                change(model)
                assert graphs.mark_of(adapted(model)) != old
            marks.add(old)

        model = dream()
        assert graphs.mark_of(adapted(model)) != graphs.mark_of(adapted(model, shifted=False))

    def test_a_head_replaced_in_the_midst_of_a_call_is_noticed(self) -> None:
        model = llama()
        denoiser = adapted(model).current()
        model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
        with pytest.raises(RuntimeError, match="got another output layer while it was sampled from"):
            denoiser.hidden(random_ids(1, 4))
        adapted(model).hidden(random_ids(1, 4))

    def test_a_model_that_has_changed_is_examined_anew(self) -> None:
        model = llama()
        adapted(model)
        model.lm_head.register_forward_hook(lambda _, __, out: out * 2)
        with pytest.warns(UserWarning, match="runs by its logits because"):
            assert isinstance(adapt(model), LogitsDenoiser)

    def test_a_model_is_examined_once(self) -> None:
        passes: list[int] = []
        model = llama()
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        adapted(model)
        assert 3 <= len(passes) <= 20
        passes.clear()
        adapted(model)
        assert not passes


@pytest.mark.gpu
class TestGpu:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        graphs.clear()
        yield
        graphs.clear()

    @pytest.mark.parametrize("make", [llama, dream, llada])
    @pytest.mark.parametrize("cache", ["none", "dual"])
    def test_graphs_replay_what_runs_eagerly(self, make: Callable[[], nn.Module], cache: str) -> None:
        model = make().to("cuda", torch.bfloat16)
        denoiser = adapted(model)
        options: dict[str, Any] = {"input_ids": starts(5).cuda(), "decoder": "threshold", "cache": cache}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a capture that failed
            first, again, eager = (draw(denoiser, **options, cuda_graphs=graph) for graph in (True, True, False))
        assert first.sequences.equal(again.sequences)
        assert first.sequences.equal(eager.sequences)
        assert any(name == denoiser.name for name, _ in graphs.held())

    @pytest.mark.parametrize("make", [llama, llada])
    def test_split_within_rounding(self, make: Callable[[], nn.Module]) -> None:
        model, ids = make().to("cuda", torch.bfloat16), random_ids(3, 9).cuda()
        exact = model.double()(ids).logits[..., :MASK]
        model.to(torch.bfloat16)
        theirs = model(ids).logits[..., :MASK].double()
        ours = adapted(model, shifted=False).logits(ids)[..., :MASK].double()
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()

    @pytest.mark.parametrize("columns", [None, [[2, 3, 4, 5], [6, 7, 8, 9]]])
    @pytest.mark.parametrize("make", [llama, dream, llada])
    def test_no_host_synchronisation_in_a_pass(
        self, make: Callable[[], nn.Module], columns: list[list[int]] | None
    ) -> None:
        denoiser, ids = adapted(make().to("cuda", torch.bfloat16)), random_ids(2, 12).cuda()
        cache = torch.zeros(denoiser.cache_shape(2, 12), dtype=denoiser.dtype, device="cuda")
        mask = torch.ones(2, 12, dtype=torch.bool, device="cuda")
        at = None if columns is None else torch.tensor(columns, device="cuda")
        window = ids if at is None else ids[:, :4]
        positions = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
        with torch.no_grad():
            for turn in range(2):
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error" if turn else "default")
                try:
                    denoiser.hidden(ids, None, positions, mask)
                    denoiser.window_hidden(cache, window, at, positions, None, mask)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
