"""Guidance, logits processors, stopping criteria and streamers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import mdkern
from mdkern import decoders
from mdkern.engine import hooks
from mdkern.engine.processors import Processors
from mdkern.kernels import vocab_projection
from tests.conftest import random_dit
from tests.references.slow_sampler import PairModel

LENGTH, VOCAB = 10, 7
MODEL = PairModel(LENGTH, VOCAB)
MASK = VOCAB
pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")
DECODERS = ["ancestral", "top_probability", "threshold"]


def prompts(count: int = 5) -> Tensor:
    ids = torch.full((count, LENGTH), MASK)
    ids[:, :3] = torch.randint(VOCAB, (count, 3), generator=torch.Generator().manual_seed(0))
    return ids


def draw(denoiser: Any, decoder: Any, **options: Any) -> mdkern.SampleOutput:
    defaults = {"input_ids": prompts(), "decoder": decoder, "steps": 10, "seed": 4, "batch_size": 2}
    return mdkern.sample(denoiser, **(defaults | options))


class TestGuidance:
    @pytest.mark.parametrize("decoder", DECODERS)
    def test_it_is_the_sampler_of_the_guided_logits(self, decoder: str) -> None:
        given = prompts() != MASK

        def guided(input_ids: Tensor) -> Tensor:
            conditional = MODEL.logits(input_ids)
            blank = torch.where(torch.arange(LENGTH) < 3, MASK, input_ids)
            unconditional = MODEL.logits(blank)
            return (unconditional + 2.5 * (conditional - unconditional)).float()

        expected = draw(mdkern.adapt(guided, vocab_size=VOCAB, mask_id=MASK), decoder)
        out = draw(MODEL.denoiser(), decoder, guidance_scale=1.5)
        assert torch.equal(out.sequences, expected.sequences)
        assert not torch.equal(out.sequences, draw(MODEL.denoiser(), decoder).sequences)
        assert torch.equal(out.sequences[given], prompts()[given])

    def test_hidden_states_combine_as_logits_do(self) -> None:
        model = random_dit().double()
        denoiser = mdkern.adapt(model)
        ids = torch.randint(10, (3, 12))
        ids[:, 5:] = 10
        given = ids != 10
        hidden = hooks.guided_hidden(denoiser, 0.7, ids, given, None, None, None)
        conditional, unconditional = (denoiser.logits(x) for x in (ids, torch.where(given, 10, ids)))
        wanted = unconditional + 1.7 * (conditional - unconditional)
        finite = wanted.isfinite()
        torch.testing.assert_close(denoiser.head.logits(hidden)[finite], wanted[finite], atol=1e-5, rtol=1e-5)

    def test_a_soft_cap_is_refused(self) -> None:
        denoiser = MODEL.denoiser()
        object.__setattr__(denoiser.head, "soft_cap", 30.0)
        with pytest.raises(ValueError, match="without a soft cap"):
            draw(denoiser, "ancestral", guidance_scale=1.0)

    def test_impossible_ids_stay_impossible(self) -> None:
        """A model that gives -inf to the mask itself, as MDLM's do, can be guided."""

        def logits(input_ids: Tensor) -> Tensor:
            return torch.nn.functional.pad(MODEL.logits(input_ids).float(), (0, 1), value=-torch.inf)

        out = draw(mdkern.adapt(logits, vocab_size=VOCAB + 1, mask_id=MASK), "ancestral", guidance_scale=1.5)
        assert torch.equal(out.sequences, draw(MODEL.denoiser(), "ancestral", guidance_scale=1.5).sequences)


class TestProcessor:
    @pytest.mark.parametrize("decoder", DECODERS)
    def test_banned_words_are_the_sampler_of_a_model_without_them(self, decoder: str) -> None:
        def without(input_ids: Tensor) -> Tensor:
            logits = MODEL.logits(input_ids).float()
            logits[..., 3] = -torch.inf
            return logits

        ban = NoBadWordsLogitsProcessor([[3]], eos_token_id=None)
        out = draw(MODEL.denoiser(), decoder, logits_processor=ban)
        expected = draw(mdkern.adapt(without, vocab_size=VOCAB, mask_id=MASK), decoder)
        assert torch.equal(out.sequences, expected.sequences)
        assert (draw(MODEL.denoiser(), decoder).sequences[:, 3:] == 3).any()

    def test_a_list_of_transformers(self) -> None:
        warpers = LogitsProcessorList([MinPLogitsWarper(0.4)])
        out = draw(MODEL.denoiser(), "ancestral", logits_processor=warpers)
        assert torch.equal(out.sequences, draw(MODEL.denoiser(), "ancestral", min_p=0.4).sequences)

    def test_it_sees_the_rows_own_sequences(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In chunks of a few rows, too."""
        monkeypatch.setattr(hooks, "CHUNK_ELEMENTS", 3 * 16)
        hidden, ids = torch.randn(4, 6, 8), torch.randint(16, (4, 9))
        bias = torch.zeros(16).index_fill(0, torch.tensor(15), -torch.inf)
        head = mdkern.models.denoiser.Head(torch.randn(16, 8), bias)
        row, count = torch.tensor([1, 5, 7, 12, 23, 0, 0]), torch.tensor(5)
        keys = torch.arange(21).view(7, 3)

        def toward(input_ids: Tensor, logits: Tensor) -> Tensor:
            return logits + 5.0 * torch.nn.functional.one_hot(input_ids[:, 0], 16)

        found = hooks.row_statistics(
            Processors.of(toward), head, hidden, hooks.Texts(ids, None, None, 15), row, count, torch.ones(7),
            torch.tensor(3), keys, want_entropy=True,
        )  # fmt: skip
        logits = toward(ids[row // 6], head.logits(hidden.flatten(0, 1)[row]))
        logits[:, 15] = -torch.inf  # the mask
        wanted = vocab_projection(
            logits, None, None, torch.arange(7), 1.0, torch.tensor(3), keys, row_count=count, want_entropy=True
        )
        for ours, theirs in zip(found, wanted):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, equal_nan=True)


class Ends(StoppingCriteria):
    """Ends sequences whose first id is even once their fifth position is written."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids[:, 0] % 2 == 0) & (input_ids[:, 4] != MASK)


@pytest.mark.parametrize("decoder", DECODERS)
def test_stopping_criteria_end_single_sequences(decoder: str) -> None:
    ids = prompts()
    ids[:, 0] = torch.tensor([0, 1, 2, 3, 4])
    denoiser = mdkern.adapt(lambda x: MODEL.logits(x).float(), vocab_size=VOCAB, mask_id=MASK, eos_id=6)
    options = {"input_ids": ids, "block_length": 2, "steps": 8}
    out = draw(denoiser, decoder, stopping_criteria=StoppingCriteriaList([Ends()]), **options)
    assert torch.equal(out.sequences, draw(denoiser, decoder, stopping_criteria=[Ends()], **options).sequences)
    numbers = draw(denoiser, decoder, stopping_criteria=lambda ids, _: Ends()(ids, None).int().tolist(), **options)
    assert torch.equal(out.sequences, numbers.sequences)
    whole = draw(denoiser, decoder, **options)
    assert out.stop_reason == ["end_of_text", "all_revealed"] * 2 + ["end_of_text"]
    assert (out.sequences[::2, 5:] == 6).all()
    assert torch.equal(out.sequences[1::2], whole.sequences[1::2])
    assert (out.nfe["H"][::2] < whole.nfe["H"][::2]).all()


def test_what_is_filled_in_is_no_models() -> None:
    """Also where a model's token had been before, and was put back to mask."""
    never = torch.zeros(VOCAB).index_fill(0, torch.tensor(6), -torch.inf)  # the end of text, which only filling gives
    denoiser = mdkern.adapt(lambda x: (MODEL.logits(x) + never).float(), vocab_size=VOCAB, mask_id=MASK, eos_id=6)
    ids, passes = prompts(20), 0

    def ends(ids: Tensor, _: Any) -> bool:
        nonlocal passes
        passes += 1
        return passes == 8

    options = {"input_ids": ids, "batch_size": 20, "return_history": True, "stopping_criteria": ends}
    out = draw(denoiser, decoders.ReMDM("cap", eta=0.5), **options)
    filled = (out.sequences == 6) & (ids == MASK)
    assert 20 < int(filled.sum()) < int((ids == MASK).sum())
    assert torch.equal(out.history.model == -1, filled | (ids != MASK))
    assert torch.equal(out.history.step == -1, ids != MASK)


class Recorder:
    def __init__(self) -> None:
        self.drafts: list[Tensor] = []
        self.texts: list[list[int]] = [[]]

    def put_draft(self, ids: Tensor) -> None:
        self.drafts.append(ids)

    def put(self, ids: Tensor) -> None:
        self.texts[-1] += ids.tolist()

    def end(self) -> None:
        self.texts.append([])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_streamer_gets_drafts_and_the_final_text(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "SECONDS_BETWEEN_DRAFTS", 0.0)
    recorder = Recorder()
    out = draw(MODEL.denoiser(), decoder, streamer=recorder)
    assert recorder.texts == [*out.sequences.tolist(), []]
    masks = [int((draft == MASK).sum()) for draft in recorder.drafts]
    assert masks == sorted(masks, reverse=True)
    assert len(set(masks)) > 3
    for draft in recorder.drafts:
        assert torch.equal(draft[draft != MASK], out.sequences[draft != MASK])


def test_a_streamer_gets_no_padding() -> None:
    ids, mask = prompts(2), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :2] = 0
    recorder = Recorder()
    model = random_dit()
    ids[ids == MASK] = model.config.mask_id
    out = mdkern.sample(model, input_ids=ids, attention_mask=mask, seed=0, streamer=recorder)
    assert recorder.texts == [out.sequences[0].tolist(), out.sequences[1, 2:].tolist(), []]


def test_a_streamer_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(chr(97 + int(i)) for i in ids)

    out = draw(MODEL.denoiser(), "ancestral", streamer=TextStreamer(Tokenizer(), skip_prompt=True))
    printed = capsys.readouterr().out.split()
    assert printed == ["".join(chr(97 + i) for i in row[3:]) for row in out.sequences.tolist()]
