"""Statistics of generated text: its likelihood under a judge, its variety, and its repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.engine.checks import check_count

__all__ = ["JudgedTexts", "distinct", "judge", "judge_texts", "self_bleu", "token_entropy", "unigram_entropy"]

MOST_LOGITS = 1 << 28  # entries of a judge's logits at a time: 1 GiB of float32


@dataclass(frozen=True)
class JudgedTexts:
    """Log-likelihood of texts under a judge, without the first token of each."""

    nats: Tensor  # float64 [N], -log p of all tokens that were judged
    tokens: Tensor  # int64 [N], number of tokens that were judged

    def nats_per_token(self) -> Tensor:
        """float64 ``[N]``."""
        return self.nats / self.tokens

    def perplexity(self) -> float:
        """``exp`` of the nats a token over all texts: generative perplexity, if the texts were generated."""
        return float((self.nats.sum() / self.tokens.sum()).exp())


def judge(model: Any, sequences: Tensor, lengths: Tensor | None = None, batch_size: int = 64) -> JudgedTexts:
    """Score token sequences by a causal language model with the same tokenizer.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        sequences: integer ``[N, L]``, N >= 1 and 2 <= L <= the model's positions.
        lengths: int64 ``[N]``: number of tokens of each that are judged, from the first on. Default: all.
        batch_size: sequences in a forward pass, fewer where the vocabulary is large.

    Raises:
        ValueError: another shape, ids outside of the vocabulary, a length below 2.
    """
    vocab_size = int(model.config.vocab_size)
    most = int(getattr(model.config, "max_position_embeddings", None) or sequences.shape[-1])
    check_count("batch_size", batch_size)
    if sequences.ndim != 2 or not len(sequences) or not 2 <= sequences.shape[1] <= most:
        raise ValueError(f"sequences must be [N, L] with N >= 1 and 2 <= L <= {most}, not {tuple(sequences.shape)}")
    if not (int(sequences.min()) >= 0 and int(sequences.max()) < vocab_size):
        raise ValueError(f"sequences must hold ids in 0..{vocab_size - 1}, the judge's vocabulary")
    if lengths is None:
        lengths = torch.full((len(sequences),), sequences.shape[1])
    elif lengths.shape != (len(sequences),) or int(lengths.min()) < 2:
        raise ValueError(f"lengths must be {len(sequences)} numbers of at least 2: one token alone has no likelihood")
    size = max(1, min(batch_size, MOST_LOGITS // (sequences.shape[1] * vocab_size)))
    nats = []
    with torch.inference_mode():
        for ids, length in zip(sequences.split(size), lengths.split(size)):
            ids = ids.to(model.device, torch.int64)
            losses = next_token_losses(model, ids)
            inside = torch.arange(1, ids.shape[1], device=ids.device) < length.to(ids.device)[:, None]
            nats.append((losses.double() * inside).sum(-1).cpu())
    return JudgedTexts(torch.cat(nats), lengths.cpu() - 1)


def next_token_losses(model: Any, ids: Tensor) -> Tensor:
    """-log p of every token but the first given those before it, nats: ``[B, L]`` int64 -> ``[B, L - 1]`` float32."""
    logits = model(ids).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def judge_texts(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64) -> JudgedTexts:
    """Score texts by a causal language model with a tokenizer of its own, as GPT-2 scores other models' samples.

    Texts longer than the model's positions are cut. The first token is not counted.

    Raises:
        ValueError: no text, or one that the tokenizer makes fewer than two tokens of.
    """
    if not len(texts):
        raise ValueError("texts must hold at least one text to be judged")
    most = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:most] for text in texts]
    short = next((index for index, row in enumerate(rows) if len(row) < 2), None)
    if short is not None:
        raise ValueError(f"text {short} has fewer than two tokens for the judge: {texts[short]!r}")
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros((len(rows), int(lengths.max())), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return judge(model, ids, lengths, batch_size)  # a causal model does not see what is to the right


def token_entropy(sequences: Tensor) -> Tensor:
    """Entropy of the tokens of each sequence ``[N, L]``, nats, float64 ``[N]``. It is low for repetitive text.

    Raises:
        ValueError: sequences without tokens.
    """
    return torch.tensor([unigram_entropy(row) for row in sequences], dtype=torch.float64)


def unigram_entropy(sequences: Tensor) -> float:
    """Entropy of all tokens of all sequences together, nats.

    Raises:
        ValueError: there is no token.
    """
    if not sequences.numel():
        raise ValueError(f"sequences must hold at least one token, not be {tuple(sequences.shape)}")
    share = torch.unique(sequences, return_counts=True)[1].double() / sequences.numel()
    return float(-(share * share.log()).sum())


def distinct(sequences: Sequence[Sequence[int]] | Tensor, n: int) -> float:
    """Number of different n-grams over the number of all n-grams in all sequences (Li et al., 1510.03055), 0 to 1.

    Raises:
        ValueError: no sequence has n tokens, or n is below 1.
    """
    check_count("n", n)
    rows = sequences.tolist() if isinstance(sequences, Tensor) else sequences
    seen = Counter(tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1))
    if not seen:
        raise ValueError(f"no sequence has {n} tokens")
    return len(seen) / seen.total()


def self_bleu(texts: Sequence[str], most: int = 100) -> float:
    """Mean BLEU of each text with all others as references (Zhu et al., 1802.01886), 0 to 100: high where texts agree.

    Args:
        texts: at least two; the first `most` of them are compared, as the cost is quadratic.

    Raises:
        ImportError: `sacrebleu` is not installed.
        ValueError: fewer than two texts.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError("self-BLEU needs sacrebleu: pip install 'mdkern[evaluate]'") from error
    texts = list(texts[:most])
    if len(texts) < 2:
        raise ValueError("self-BLEU compares texts with each other: give at least two")
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores)
