"""Hooks of transformers that were made for writing from left to right: served where they can be right, else refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation import logits_process as theirs
from transformers.generation import stopping_criteria as their_criteria

from mdkern import Denoiser, SampleOutput, sample
from mdkern.engine import processors
from mdkern.models import Head

VOCAB, EOS, MASK, PADDED, LENGTH = 8, 6, 7, 10, 12
DECODERS = ["ancestral", "top_probability", "threshold", "edit"]


class Constant(Denoiser):
    """The same logits everywhere: 0 for id 0, a tenth less for each next one, or as told."""

    def __init__(self, **logits: float) -> None:
        self.vocab_size, self.mask_id, self.eos_ids = VOCAB, MASK, (EOS,)
        self.name, self.device, self.dtype = "constant", torch.device("cpu"), torch.float32
        bias = -0.1 * torch.arange(PADDED)
        for name, logit in logits.items():
            bias[int(name[1:])] = logit
        bias[MASK:] = -torch.inf
        self.head = Head(torch.zeros(PADDED, 4), bias)

    def hidden(
        self, input_ids: Tensor, t: Any = None, positions: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        return torch.zeros(*(input_ids if positions is None else positions).shape, 4)


def draw(denoiser: Denoiser | None = None, decoder: str = "ancestral", **options: Any) -> SampleOutput:
    defaults = {"decoder": decoder, "temperature": 0.0, "seed": 0, "steps": LENGTH, "batch_size": 2}
    if "input_ids" not in options:
        defaults |= {"num_samples": 3, "length": LENGTH}
    return sample(denoiser or Constant(), **(defaults | options))


def left_padded(padding: int) -> dict[str, Tensor]:
    """One sequence with ids 3 for padding, then two tokens, then masks."""
    ids = torch.full((1, LENGTH), MASK)
    ids[:, :padding], ids[:, padding], ids[:, padding + 1] = 3, 2, 0
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) >= padding).long()[None]}


def spell(input_ids: Tensor, scores: Tensor, positions: Tensor) -> Tensor:
    """0 1 2 3 4 0 1 2 … by column."""
    return torch.where(torch.arange(scores.shape[1]) == positions[:, None] % 5, 1.0, -torch.inf)


NOT_ALONE = {"LogitsProcessor", "SequenceBiasLogitsProcessor"}  # the base, and one that its words decide on


class TestProcessors:
    @pytest.mark.parametrize("decoder", DECODERS)
    @pytest.mark.parametrize("block_length", [None, 4])
    def test_positions_are_given_to_whom_asks(self, decoder: str, block_length: int | None) -> None:
        out = draw(decoder=decoder, logits_processor=spell, block_length=block_length, **left_padded(3))
        assert out.sequences[0, 5:].tolist() == [column % 5 for column in range(5, LENGTH)]

    def test_repetition_is_of_the_text_and_not_of_its_padding(self) -> None:
        """2 and 0 were there: their logits of 1 and 0.8 are halved; 3, the padding, keeps its 0.7."""
        model = Constant(_2=1.0, _0=0.8, _3=0.7, _1=0.1)
        given = left_padded(3)
        given["input_ids"][:, 6:] = 1
        out = draw(model, logits_processor=theirs.RepetitionPenaltyLogitsProcessor(2.0), steps=1, **given)
        assert out.sequences[0, 5] == 3

    @pytest.mark.parametrize("decoder", DECODERS)
    def test_lengths_are_counted_before_the_position(self, decoder: str) -> None:
        """The end of text is the best id; it may come from the fifth token on."""
        model = Constant(_6=5.0)
        for padding in (0, 3):
            for processor in (
                theirs.MinLengthLogitsProcessor(4, EOS),
                theirs.MinNewTokensLengthLogitsProcessor(2, 2, EOS),
            ):
                out = draw(model, decoder, logits_processor=[processor], **left_padded(padding))
                text = out.sequences[0, padding:].tolist()
                assert text == [2, 0, 0, 0] + [EOS] * (LENGTH - padding - 4)

    def test_an_end_is_forced_at_its_place(self) -> None:
        out = draw(logits_processor=theirs.ForcedEOSTokenLogitsProcessor(7, EOS))
        assert (out.sequences == torch.where(torch.arange(LENGTH) == 6, EOS, 0)).all()

    @pytest.mark.parametrize("decoder", DECODERS)
    def test_what_may_never_be_drawn_is_not_opened(self, decoder: str) -> None:
        def open_all(input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.arange(scores.shape[1]).expand(scores.shape).float()

        for hook in (open_all, [open_all, theirs.InfNanRemoveLogitsProcessor()]):
            assert (draw(decoder=decoder, logits_processor=hook).sequences == MASK - 1).all()

    @pytest.mark.parametrize(
        ("processor", "reason"),
        [
            (theirs.NoRepeatNGramLogitsProcessor(2), "reads the tokens before a position"),
            (theirs.EncoderNoRepeatNGramLogitsProcessor(2, torch.ones(1, 4).long()), "reads the tokens before"),
            (theirs.NoBadWordsLogitsProcessor([[3], [1, 2]], EOS), "with sequences of several tokens"),
            (theirs.SequenceBiasLogitsProcessor([[[1, 2], -5.0]]), "with sequences of several tokens"),
            (theirs.PrefixConstrainedLogitsProcessor(lambda *_: [1], 1), "reads the tokens before a position"),
            (theirs.EncoderRepetitionPenaltyLogitsProcessor(1.2, torch.ones(1, 4).long()), "the batch of a loop"),
            (theirs.ClassifierFreeGuidanceLogitsProcessor(1.5), "give guidance_scale"),
            (theirs.WatermarkLogitsProcessor(VOCAB, "cpu"), "reads the tokens before a position"),
        ],
    )
    def test_what_cannot_be_right_is_refused(self, processor: Any, reason: str) -> None:
        class Same(type(processor)):
            """Somebody's subclass that is called as it was."""

        for hook in (processor, [processor], theirs.LogitsProcessorList([processor])):
            with pytest.raises(ValueError, match=rf"{type(processor).__name__} cannot be right here.*{reason}"):
                draw(logits_processor=hook)
        inherited = object.__new__(Same)
        inherited.__dict__.update(vars(processor))
        with pytest.raises(ValueError, match="Same cannot be right here"):
            draw(logits_processor=inherited)

    def test_each_of_transformers_is_served_or_refused(self) -> None:
        """None slips through as a callable of one's own."""
        kinds = [kind for _, kind in inspect.getmembers(theirs, inspect.isclass) if kind.__module__ == theirs.__name__]
        assert len(kinds) > 25
        served = processors.AS_THEY_ARE | processors.BY_LENGTH | {"RepetitionPenaltyLogitsProcessor"}
        for kind in kinds:
            if "__call__" not in vars(kind) or issubclass(kind, list) or kind.__name__ in NOT_ALONE:
                continue
            hook = object.__new__(kind)
            if kind.__name__ in served:
                assert processors.way_of(hook)
            else:
                with pytest.raises(ValueError, match="cannot be right here"):
                    processors.way_of(hook)

    @pytest.mark.parametrize("made", [None, torch.zeros(3), torch.zeros(1, PADDED, dtype=torch.int64)])
    def test_what_is_no_logits_is_refused(self, made: Any) -> None:
        with pytest.raises(ValueError, match="must return logits"):
            draw(num_samples=1, logits_processor=lambda input_ids, scores: made)

    def test_what_cannot_be_called_so_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"must take \(input_ids, scores\) or \(input_ids, scores, positions\)"):
            draw(logits_processor=lambda ids, scores, more: scores)


LETTERS = Tokenizer(BPE({letter: number for number, letter in enumerate("abcdefgh")}, []))
LETTERS.decoder = Fuse()
CRITERIA = {
    "a token": their_criteria.EosTokenCriteria(3),
    "a string": their_criteria.StopStringCriteria(PreTrainedTokenizerFast(tokenizer_object=LETTERS), ["cd"]),
    "a length": their_criteria.MaxLengthCriteria(9),
}


class TestCriteria:
    @pytest.mark.parametrize("decoder", DECODERS)
    @pytest.mark.parametrize("name", CRITERIA)
    @pytest.mark.parametrize("padding", [0, 3])
    def test_a_text_ends_where_they_say(self, name: str, decoder: str, padding: int) -> None:
        """The prompt, c a, has ended before; what is written is 0 1 2 3 4 … by column."""
        out = draw(
            decoder=decoder,
            logits_processor=spell,
            stopping_criteria=[CRITERIA[name]],
            block_length=2,
            steps=(LENGTH - 2 - padding + 1) // 2 * 2,
            **left_padded(padding),
        )
        written = [column % 5 for column in range(padding + 2, LENGTH)]
        kept = {"a length": 9 - 2}.get(name, written.index(3) + 1)
        assert out.sequences[0, padding + 2 :].tolist() == written[:kept] + [EOS] * (len(written) - kept)
        assert out.stop_reason == ["end_of_text"]
        assert out.lengths.tolist() == [2 + kept]

    def test_the_clock_ends_all(self) -> None:
        out = draw(decoder="top_probability", stopping_criteria=their_criteria.MaxTimeCriteria(-1.0))
        assert out.stop_reason == ["end_of_text"] * 3
        assert out.nfe["H"].tolist() == [1] * 3

    def test_scores_are_nobodys(self) -> None:
        with pytest.raises(ValueError, match="ConfidenceCriteria cannot be right here"):
            draw(stopping_criteria=[their_criteria.ConfidenceCriteria(0.5)])

    def test_answers_fit_the_batch(self) -> None:
        with pytest.raises(ValueError, match="must return one answer or one a sequence, 2, not"):
            draw(decoder="top_probability", stopping_criteria=lambda ids, _: torch.zeros(len(ids) + 1))

    @pytest.mark.parametrize("answer", [None, "no"])
    def test_what_is_no_answer_is_refused(self, answer: Any) -> None:
        with pytest.raises(ValueError, match=f"must return one answer or .*, not {type(answer).__name__}"):
            draw(stopping_criteria=lambda ids, _: answer)
