"""Other people's block-causal models: split, masked by blocks, and with the exact cache of finished blocks."""

from __future__ import annotations

import warnings
from copy import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import adapt, decoders
from mdkern.engine import block_cached, graphs
from mdkern.models.hf import llama_fused
from tests.problems.hf_models import BLOCK_CAUSAL, LONGEST, MASK, WORDS, BlockCausalModel, adapted, bert, llada, llama
from tests.references.slow_sampler import decode

BLOCK, LENGTH = 4, 14
MODELS = {name: make().eval() for name, make in BLOCK_CAUSAL.items()}
KINDS = {"SDAR": None, "LLaDA 2": 4, "Fast-dLLM v2": None}  # the length of the blocks, where the config does not say it
DENOISERS = {name: adapted(model, block_causal=KINDS[name]) for name, model in MODELS.items()}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KEPT = torch.arange(WORDS) != MASK


def prompts(*lengths: int, length: int = LENGTH) -> Tensor:
    ids = torch.randint(2, MASK, (len(lengths), length), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(length) < torch.tensor(lengths)[:, None], ids, MASK)


def draw(model: Any, **options: Any) -> mdkern.SampleOutput:
    defaults = {"input_ids": prompts(0, 3, 4, 9, 12), "seed": 7, "batch_size": 2, "decoder": decoders.Threshold(0.3)}
    return mdkern.sample(model, **(defaults | options))


@pytest.mark.parametrize("name", MODELS)
class TestSplit:
    @pytest.mark.parametrize("length", [1, 3, 4, 9, 14])
    def test_logits_are_the_models_own(self, name: str, length: int) -> None:
        ids = prompts(*range(5), length=length)
        own = MODELS[name].own_logits(ids)[..., :WORDS]
        torch.testing.assert_close(DENOISERS[name].logits(ids)[..., KEPT], own[..., KEPT], **CLOSE)

    def test_some_positions(self, name: str) -> None:
        denoiser, ids = DENOISERS[name], prompts(3, 6)
        positions = torch.tensor([[13, 0, 4, 4], [5, 8, 7, 12]])
        own = MODELS[name].own_logits(ids)
        expected = torch.stack([row[position] for row, position in zip(own, positions)])[..., KEPT]
        got = denoiser.head.logits(denoiser.hidden(ids, positions=positions))[..., KEPT]
        torch.testing.assert_close(got, expected, **CLOSE)

    @pytest.mark.parametrize("own_forward", [False, True])
    def test_windows_of_one_block_after_the_other(self, name: str, own_forward: bool) -> None:
        """Whatever is in the cache, and whatever lies behind; each sequence at its own block."""
        denoiser, ids = copy(DENOISERS[name]), prompts(16, 7, length=16)
        if own_forward:
            denoiser.settle(denoiser.anatomy._replace(plan=None))
        own = MODELS[name].own_logits(ids)
        cache = torch.randn(denoiser.cache_shape(2, 16), generator=torch.Generator().manual_seed(0))
        rows = torch.arange(BLOCK).expand(2, -1)
        for first in ([0, 0], [4, 0], [8, 4], [12, 8]):
            columns = torch.tensor(first)[:, None] + torch.arange(BLOCK)
            with torch.no_grad():
                states = denoiser.window_hidden(cache, ids.gather(1, columns), columns, rows)
            expected = own.gather(1, columns[..., None].expand(-1, -1, own.shape[-1]))
            torch.testing.assert_close(denoiser.head.logits(states)[..., KEPT], expected[..., KEPT], **CLOSE)

    def test_it_is_known_by_its_config(self, name: str) -> None:
        denoiser = adapted(MODELS[name])
        assert denoiser.block_causal == (32 if name == "LLaDA 2" else BLOCK)
        assert denoiser.shifted == (name == "Fast-dLLM v2")
        assert denoiser.takes_cache
        assert denoiser.anatomy.plan is not None  # mdkern's own passes agree with its forward, masks included
        assert denoiser.takes_attention_mask
        assert not denoiser.right_padding_only

    def test_its_own_attention_may_be_kept(self, name: str) -> None:
        if name == "Fast-dLLM v2":  # the others must be given a mask
            denoiser = adapted(MODELS[name], allow_causal=True)
            assert denoiser.block_causal is None
            ids = prompts(3, 6)
            own = MODELS[name].own_logits(ids)
            torch.testing.assert_close(denoiser.logits(ids)[..., KEPT], own[..., KEPT], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
class TestSample:
    @pytest.mark.parametrize("decoder", [decoders.Threshold(0.3), decoders.Edit(0.5, 0.3, 2)])
    def test_the_cache_changes_nothing(self, name: str, decoder: Any) -> None:
        options = {"decoder": decoder, "temperature": 0.7, "return_history": True}
        plain, out = (draw(DENOISERS[name], cache=cache, **options) for cache in ("none", "block"))
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.history.step, plain.history.step)
        assert torch.equal(out.nfe["H"] - out.commits["H"], plain.nfe["H"])
        assert out.commits["H"].tolist() == [3] * 5

    def test_windows_of_several_blocks(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(block_cached, "blocks_of_window", lambda segment: 2)
        plain, out = (draw(DENOISERS[name], cache=cache) for cache in ("none", "block"))
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.nfe["H"] - out.commits["H"], plain.nfe["H"])
        assert out.commits["H"].tolist() == [prompt // BLOCK // 2 for prompt in (0, 3, 4, 9, 12)]

    @pytest.mark.parametrize("cache", ["none", "block"])
    def test_the_slow_loops_sequences(self, name: str, cache: str) -> None:
        ids, decoder = prompts(0, 3, 9), decoders.Threshold(0.3)

        def own(row: Any, step: int) -> list[list[float]]:
            logits = MODELS[name].own_logits(torch.tensor([row]))[0, :, :WORDS].double()
            return logits.masked_fill(~KEPT, -1e9).tolist()

        out = draw(DENOISERS[name], input_ids=ids, decoder=decoder, cache=cache, steps_per_block=4, temperature=0.0)
        for number, row in enumerate(ids.tolist()):
            first = row.index(MASK) // BLOCK
            block = [i // BLOCK - first if token == MASK else -1 for i, token in enumerate(row)]
            steps = 4 * (max(block) + 1)
            slow = decode(own, row, decoder, steps=steps, mask_id=MASK, block=block, seed=7, sample=number)
            assert out.sequences[number].tolist() == slow.ids
            assert int(out.nfe["H"][number] - (out.commits["H"][number] if cache == "block" else 0)) == slow.passes

    def test_alone_or_padded_it_is_the_same(self, name: str) -> None:
        ids, cache = prompts(3, 9, 12), "block"
        together = draw(DENOISERS[name], input_ids=ids, cache=cache)
        for number in range(len(ids)):
            alone = draw(DENOISERS[name], input_ids=ids[number : number + 1], sample_ids=[number], cache=cache)
            assert torch.equal(alone.sequences[0], together.sequences[number])
        for before, after in ((0, 3), (4, 0), (8, 1)):
            padded = torch.nn.functional.pad(ids, (before, after), value=3)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
            out = draw(DENOISERS[name], input_ids=padded, attention_mask=mask, cache=cache)
            assert torch.equal(out.sequences[:, before : before + LENGTH], together.sequences)

    def test_its_likelihood(self, name: str) -> None:
        """Exactly, of one token after the other: blocks of which nothing but the next token is known."""
        ids = prompts(10, 10, length=10)
        log_prob = torch.zeros(2, dtype=torch.float64)
        for column in range(10):
            masked = torch.where(torch.arange(10) < column, ids, MASK)
            logits = MODELS[name].own_logits(masked[:, : (column // BLOCK + 1) * BLOCK])[:, column, :WORDS]
            logits = logits.masked_fill(~KEPT, -torch.inf).log_softmax(-1).double()
            log_prob += logits[torch.arange(2), ids[:, column]]
        out = mdkern.likelihood(DENOISERS[name], input_ids=ids, method="decoder", decoder=LeftToRight())
        torch.testing.assert_close(out.nats, -log_prob, rtol=1e-4, atol=1e-4)


class LeftToRight(decoders.Stepwise):
    """Reveals the first mask of a block."""

    scores_draw = False
    adaptive = True

    def choose(self, view: decoders.View, proposal: decoders.Proposal) -> decoders.Choice:
        return decoders.Choice(-view.offset.float(), view.masked, "top_k", quota=view.masked.any(-1).long())


class TestAnyDecoder:
    """A model made for another attention is block-causal if it is told to be."""

    @pytest.mark.parametrize("make", [llama, lambda: llada(kv_heads=2), llada])
    def test_its_attention_is_replaced(self, make: Any) -> None:
        model = make()
        denoiser = adapted(model, block_causal=BLOCK)
        ids = prompts(14, 14)
        states = denoiser.hidden(ids)
        for changed in range(LENGTH):
            other = ids.clone()
            other[:, changed] = (ids[:, changed] + 1) % MASK
            moved = (denoiser.hidden(other) - states).abs().amax((0, 2)) > 1e-4
            assert moved.tolist() == [position // BLOCK >= changed // BLOCK for position in range(LENGTH)]
        first = adapted(model).hidden(ids[:, :BLOCK])  # in a text of one block there is nothing to hide
        torch.testing.assert_close(states[:, :BLOCK], first, **CLOSE)
        out, plain = (draw(denoiser, cache=cache) for cache in ("block", "none"))
        assert torch.equal(out.sequences, plain.sequences)

    def test_where_it_cannot_be_replaced_it_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"made block-causal: its attention is not PyTorch's.*attn_implementation"):
            adapt(bert(attn_implementation="eager"), block_causal=4)
        with pytest.raises(ValueError, match="it is no module"):
            adapt(lambda ids: ids, vocab_size=WORDS, mask_id=MASK, block_causal=4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"block_causal": 0}, "block_causal must be a whole number of at least 1, not 0"),
            ({"block_causal": 4, "allow_causal": True}, "give one of them"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            adapt(BlockCausalModel("sdar").eval(), **options)

    def test_its_longest_text_is_kept(self) -> None:
        with pytest.raises(ValueError, match=f"at most {LONGEST}"):
            draw(DENOISERS["SDAR"], input_ids=prompts(3, length=LONGEST + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("own_forward", [False, True])
class TestGpu:
    def test_passes_are_captured(self, name: str, own_forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where a model makes or asks for a mask in its forward; without graphs the texts are the same."""
        if own_forward:
            monkeypatch.setattr(llama_fused, "runs_now", lambda: False)
        model = BLOCK_CAUSAL[name]().eval().to("cuda")
        denoiser = adapted(model, block_causal=KINDS[name])
        options = {"input_ids": prompts(0, 3, 4, 9, 12).cuda(), "cache": "block"}
        graphs.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that a pass cannot be captured
            looped = draw(denoiser, **options)
        assert graphs.held()
        graphs.clear()
        eager = draw(denoiser, cuda_graphs=False, **options)
        plain = draw(denoiser, **(options | {"cache": "none"}))
        assert torch.equal(looped.sequences, eager.sequences)
        assert torch.equal(looped.commits["H"], eager.commits["H"])
        assert torch.equal(looped.sequences, plain.sequences)
