"""Statistics of text, by hand; the judge against a plain loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mdkern.evaluation.text import distinct, judge, judge_texts, self_bleu, token_entropy, unigram_entropy

VOCAB = 13


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=9, n_embd=8, n_layer=1, n_head=2, initializer_range=1.0)
    return GPT2LMHeadModel(config).eval()


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def plain_nats(model: GPT2LMHeadModel, ids: list[int]) -> float:
    log_p = model(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
    return -sum(float(log_p[i, token]) for i, token in enumerate(ids[1:]))


class TestJudge:
    def test_nats_are_those_of_a_plain_loop(self, gpt2: GPT2LMHeadModel) -> None:
        ids = torch.randint(VOCAB, (5, 7), generator=torch.Generator().manual_seed(1))
        lengths = torch.tensor([7, 2, 5, 3, 7])
        found = judge(gpt2, ids, lengths, batch_size=2)
        right = [plain_nats(gpt2, row[:length]) for row, length in zip(ids.tolist(), lengths.tolist())]
        assert found.nats.tolist() == pytest.approx(right, rel=1e-5)
        assert found.tokens.tolist() == [6, 1, 4, 2, 6]
        assert found.perplexity() == pytest.approx(math.exp(sum(right) / 19), rel=1e-5)
        whole = judge(gpt2, ids)
        assert whole.nats_per_token().tolist() == pytest.approx([plain_nats(gpt2, row) / 6 for row in ids.tolist()])

    def test_texts_are_tokenised_by_the_judges_own(self, gpt2: GPT2LMHeadModel) -> None:
        found = judge_texts(gpt2, Letters(), ["abc", "hedge" + "a" * 50])
        assert found.tokens.tolist() == [2, 8]  # the second is cut to nine
        assert float(found.nats[0]) == pytest.approx(plain_nats(gpt2, [0, 1, 2]), rel=1e-5)
        with pytest.raises(ValueError, match="text 1"):
            judge_texts(gpt2, Letters(), ["abc", "a"])
        with pytest.raises(ValueError, match="at least one text"):
            judge_texts(gpt2, Letters(), [])
        with pytest.raises(ValueError, match="batch_size must be"):
            judge_texts(gpt2, Letters(), ["abc"], batch_size=0)

    @pytest.mark.parametrize(
        ("ids", "lengths"),
        [
            (torch.zeros(2, 10), None),
            (torch.zeros(3), None),
            (torch.full((1, 3), VOCAB), None),
            (torch.zeros(1, 3), [1]),
            (torch.zeros(0, 3), None),
        ],
    )
    def test_other_input_is_refused(self, gpt2: GPT2LMHeadModel, ids: torch.Tensor, lengths: list[int] | None) -> None:
        with pytest.raises(ValueError, match="must"):
            judge(gpt2, ids.long(), None if lengths is None else torch.tensor(lengths))


class TestVariety:
    def test_entropies_by_hand(self) -> None:
        ids = torch.tensor([[1, 1, 1, 1], [1, 2, 1, 2]])
        assert token_entropy(ids).tolist() == pytest.approx([0.0, math.log(2)])
        assert unigram_entropy(ids) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))

    def test_distinct_n_by_hand(self) -> None:
        """Bigrams 1 1, 1 1, 1 2 and 2 1: three different of four."""
        assert distinct([[1, 1, 1, 2], [2, 1], [1]], 2) == 3 / 4
        assert distinct(torch.tensor([[1, 2, 3]]), 1) == 1.0
        with pytest.raises(ValueError, match="2 tokens"):
            distinct([[1]], 2)
        with pytest.raises(ValueError, match="n must be"):
            distinct([[1]], 0)

    @pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
    def test_of_no_tokens_there_is_no_entropy(self, shape: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="at least one token"):
            unigram_entropy(torch.zeros(shape, dtype=torch.int64))
        with pytest.raises(ValueError, match="at least one token"):
            token_entropy(torch.zeros(2, 0, dtype=torch.int64))

    def test_texts_that_agree_have_the_largest_self_bleu(self) -> None:
        pytest.importorskip("sacrebleu")
        same, other = "the cat sat on the mat today", "nobody ever heard what those people said"
        assert self_bleu([same, same, same]) == pytest.approx(100.0)
        assert self_bleu([same, other]) < 5.0
        with pytest.raises(ValueError, match="two"):
            self_bleu([same])
