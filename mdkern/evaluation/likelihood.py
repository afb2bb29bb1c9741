"""The likelihood of texts: the any-order bound of a denoiser or a schedule, or the exact likelihood of a sampler.

A masked diffusion model's negative log-likelihood of a text with n wanted tokens is at most ``E_k E_{S, |S| = k} (n /
k) sum_{i in S} -log p(x_i | x without S)`` with k uniform on 1..n. This is the bound of Nie et al. (LLaDA, 2502.09992,
eq. 6). Its estimates vary less than with masking each token with probability t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.engine.checks import check_count, check_flag
from mdkern.engine.resolve import check_ids, check_length, check_mask, resolve_sample_ids, resolve_seed
from mdkern.engine.resolve_blocks import resolve_blocks
from mdkern.engine.resolve_models import resolve_models
from mdkern.evaluation.exact import exact_nats
from mdkern.evaluation.scores import masked_hidden, rounded_once, sum_by_text, target_log_prob
from mdkern.kernels import noise
from mdkern.models import Denoiser
from mdkern.plan import positions_in_text
from mdkern.schedule import Schedule

__all__ = ["Likelihood", "likelihood"]

DEFAULT_BATCH_SIZE = 64
DEFAULT_SAMPLES = 128
FEW = 62  # tokens whose masks are numbers of 64 bits
COMPARED_ENTRIES = 1 << 23  # of masks that are compared at a time: texts x samples x L
METHODS = "fixed_count", "decoder"


@dataclass(frozen=True)
class Likelihood:
    """What `likelihood` returns, one entry for each text."""

    nats: Tensor  # float64 [N], -log p(wanted tokens | given tokens), or an estimate of a bound on it
    standard_error: Tensor  # float64 [N], of the estimate; 0 where it is exact
    tokens: Tensor  # int64 [N], wanted tokens
    nfe: dict[str, Tensor]  # int64 [N] each, forward passes by model

    def perplexity_bound(self) -> float:
        """``exp`` of the nats per token over all texts. It is the perplexity itself if the nats are exact."""
        return float((self.nats.sum() / self.tokens.sum()).exp())


@dataclass(frozen=True)
class Texts:
    """The checked input."""

    input_ids: Tensor  # int64 [N, L]
    attention_mask: Tensor | None  # bool [N, L]
    wanted: Tensor  # bool [N, L], whose likelihood is asked for
    position: Tensor  # int64 [N, L], counted over attended tokens: keys the masks
    sample_ids: Tensor  # int64 [N], key them too
    seed: Tensor  # int64 []


def likelihood(
    heavy: Any,
    light: Any = None,
    schedule: str | Schedule | None = None,
    *,
    input_ids: Tensor,
    wanted: Tensor | None = None,
    attention_mask: Tensor | None = None,
    method: str = "fixed_count",
    samples: int | None = None,
    decoder: Any = None,
    by: str | None = None,
    block_length: int | None = None,
    steps: int | None = None,
    steps_per_block: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int | None = 0,
    sample_ids: Any = None,
    progress: bool | None = None,
) -> Likelihood:
    """The negative log-likelihood of texts: a bound for a denoiser or a schedule, or the exact one of a sampler.

    ``method="fixed_count"`` is the bound. For each text `samples` masks are drawn. Their sizes lie on an even grid over
    1..n with a random start (LLaDA's estimator); their places are keyed by (seed, sample id, mask, position), so that a
    result does not depend on the batch. Masks of a text that coincide, as most do in texts of few tokens, are run once.
    Under a schedule, a mask of k of n tokens is evaluated by the model that runs
    when a share ``1 - k / n`` of the steps is done.

    ``method="decoder"`` is exact (DUEL, 2603.01367). It is the likelihood under ``sample(..., decoder=decoder,
    temperature=1.0)`` with the same steps, blocks and schedule, for decoders whose reveals are a function of the text
    before them. Decoders that draw their order, or change what they have revealed, are refused. `TopProbability`,
    `Threshold`, `Factor` and `PositionAware` score the token that was drawn. With ``by="top1"`` they are given the most
    probable token and its probability instead, as at temperature 0; their order is then that of temperature 0, while
    the tokens are drawn at temperature 1. A decoder of your own must not draw anything itself. If it reads neither the
    drawn token nor its probability, it should say so by ``scores_draw = False``.

    Args:
        heavy, light, schedule: as for `mdkern.sample`.
        input_ids: int64 ``[N, L]``, whole texts.
        wanted: bool ``[N, L]``: the tokens whose likelihood is asked for, given all others. Default: all that are
            attended to.
        attention_mask: ``[N, L]`` of 0 and 1, 0 at padding.
        method: ``"fixed_count"`` or ``"decoder"``.
        samples: number of masks for each text, default 128. A text of one wanted token needs only one, which is exact.
        decoder, block_length, steps, steps_per_block: as for `mdkern.sample`; for ``method="decoder"``.
        by: None or ``"top1"``, see above.
        batch_size: texts in a forward pass, masked or partly revealed.
        seed: seed of the masks; None takes one from PyTorch's default generator.
        sample_ids: N numbers that key the masks. Default 0..N-1.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError, TypeError: arguments that do not fit or that the method does not read, before any forward pass; a
            wanted token that the models can never produce.
        FloatingPointError: NaN or infinite logits.
        RuntimeError: a decoder that leaves masks for good.
    """
    of_decoder: dict[str, Any] = {"block_length": block_length, "steps": steps, "steps_per_block": steps_per_block}
    of_counts = {"samples": samples, "seed": seed or None, "sample_ids": sample_ids}
    check_method(method, of_counts, {"decoder": decoder, "by": by} | of_decoder)
    batch_size = check_count("batch_size", batch_size)
    disable = None if progress is None else not check_flag("progress", progress)
    denoisers, schedule = resolve_models(heavy, light, schedule)
    texts = resolve_texts(denoisers, input_ids, wanted, attention_mask, seed, sample_ids)
    tokens = texts.wanted.sum(-1)
    if method == "decoder":
        whole: dict[str, Any] = {
            "input_ids": texts.input_ids,
            "wanted": texts.wanted,
            "attention_mask": texts.attention_mask,
        }
        nats, nfe = exact_nats(denoisers, schedule, decoder, by, disable, **whole, batch_size=batch_size, **of_decoder)
        return Likelihood(nats, torch.zeros_like(nats), tokens, nfe)
    samples = check_count("samples", DEFAULT_SAMPLES if samples is None else samples)
    return fixed_count(denoisers, schedule, texts, samples, batch_size, disable)


def fixed_count(
    denoisers: dict[str, Denoiser],
    schedule: Schedule,
    texts: Texts,
    samples: int,
    batch_size: int,
    disable: bool | None,
) -> Likelihood:
    """The bound, from `samples` masks for each text. `disable` is tqdm's, for the progress bar."""
    tokens = texts.wanted.sum(-1)
    counts = mask_sizes(texts, tokens, samples)
    first = first_of_equal(texts, counts)
    run = first == torch.arange(samples, device=first.device)
    model = model_by_share(schedule, list(denoisers), 1.0 - counts.double() / tokens[:, None])
    nats = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
    nfe = {}
    bar = tqdm(total=int(run.sum()), desc="likelihood", unit="mask", leave=False, disable=disable)
    rows = batch_size * texts.input_ids.shape[1]
    with torch.no_grad(), bar:
        for number, (name, denoiser) in enumerate(rounded_once(denoisers, rows).items()):
            mine = run & (model == number)
            nfe[name] = mine.sum(-1)
            for text, sample in batches(mine, batch_size):
                masked = choose_masked(texts, text, sample, counts[text, sample])
                loss = masked_nats(denoiser, texts, text, masked, counts[text, sample] / tokens[text])
                nats[text, sample] = loss * tokens[text] / counts[text, sample]
                bar.update(len(text))
    nats = nats.gather(1, first)
    if bool(nats.isnan().any()):
        raise FloatingPointError("a model gave NaN or infinite logits, so the texts have no likelihood")
    error = nats.std(-1) / samples**0.5 if samples > 1 else torch.full_like(nats[:, 0], torch.nan)
    return Likelihood(nats.mean(-1), torch.where(tokens == 1, 0.0, error), tokens, nfe)


def check_method(method: str, of_counts: Mapping[str, Any], of_decoder: Mapping[str, Any]) -> None:
    """Refuse an unknown method, a missing decoder, and arguments of the other method."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    unread = of_counts if method == "decoder" else of_decoder
    given = [name for name, value in unread.items() if value is not None]
    if given:
        other = next(name for name in METHODS if name != method)
        raise ValueError(f"{given[0]} is for method={other!r} and not read by {method!r}: leave it out")
    if method == "decoder" and of_decoder["decoder"] is None:
        raise ValueError("method='decoder' needs a decoder, such as 'margin'")


def resolve_texts(
    denoisers: dict[str, Denoiser],
    input_ids: Any,
    wanted: Any,
    attention_mask: Any,
    seed: int | None,
    sample_ids: Any,
) -> Texts:
    """Check the texts against the models."""
    first = next(iter(denoisers.values()))
    check_ids("input_ids", input_ids, first)
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [N, L] with N and L at least 1, not {tuple(input_ids.shape)}")
    for denoiser in denoisers.values():
        check_length("input_ids' second dimension", input_ids.shape[1], denoiser)
        if attention_mask is not None and not denoiser.takes_attention_mask:
            raise ValueError(f"attention_mask must be None: {denoiser.name} takes none, so nothing may be padded")
    input_ids = input_ids.long()
    mask = None if attention_mask is None else check_mask(attention_mask, input_ids)
    resolve_blocks(None, denoisers, mask)  # refuses padding that does not fit the blocks
    attended = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    if wanted is None:
        wanted = attended
    elif not isinstance(wanted, Tensor) or wanted.dtype != torch.bool or wanted.shape != input_ids.shape:
        raise ValueError(f"wanted must be a bool tensor of input_ids' shape {tuple(input_ids.shape)}")
    elif bool((wanted & ~attended).any()):
        raise ValueError("wanted must be False at padding")
    empty = (~wanted.any(-1)).nonzero()[:, 0]
    if len(empty):
        raise ValueError(f"wanted names no token in row {int(empty[0])}")
    low, high = int(input_ids[attended].min()), int(input_ids[attended].max())
    if low < 0 or high >= first.vocab_size:
        raise ValueError(f"input_ids must lie in 0..{first.vocab_size - 1}, but run from {low} to {high}")
    check_possible(denoisers, input_ids, wanted)
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return Texts(
        input_ids,
        mask,
        wanted,
        position if mask is None else positions_in_text(mask),
        resolve_sample_ids(sample_ids, len(input_ids), input_ids.device),
        torch.tensor(resolve_seed(seed, None), device=input_ids.device),
    )


def check_possible(denoisers: dict[str, Denoiser], input_ids: Tensor, wanted: Tensor) -> None:
    """Refuse wanted tokens that a model never draws, such as the mask, as the text would be impossible."""
    for name, denoiser in denoisers.items():
        bias = denoiser.head.bias
        known = input_ids.clamp(max=len(bias) - 1)
        impossible = wanted & ((bias[known] == -torch.inf) | (known != input_ids))
        if bool(impossible.any()):
            row, column = impossible.nonzero()[0].tolist()
            raise ValueError(
                f"input_ids[{row}, {column}] is {int(input_ids[row, column])}, which model {name} never produces "
                f"(the mask id is {denoiser.mask_id}): texts must be complete where they are wanted"
            )


def mask_sizes(texts: Texts, tokens: Tensor, samples: int) -> Tensor:
    """Sizes of the masks, int64 ``[N, samples]`` in 1..n, by LLaDA's even grid.

    ``k`` is uniform on 1..n; the sizes are ``k + j n / samples``, rounded (half to even) and taken modulo n.
    """
    zero = torch.zeros_like(texts.sample_ids)
    bits = noise.random_bits(texts.seed, texts.sample_ids, zero, zero, zero, noise.MASK_SIZE)
    first = (noise.uniform(*bits) * tokens).floor().clamp(max=tokens - 1) + 1
    grid = torch.arange(samples, dtype=torch.float64, device=tokens.device) / samples
    size = (first[:, None] + grid * tokens[:, None]).round().long()
    return (size - 1) % tokens[:, None] + 1


def model_by_share(schedule: Schedule, names: list[str], done: Tensor) -> Tensor:
    """Index in `names` of the model that runs when a share `done` of the steps, in [0, 1), has been run."""
    edges, owner, total = [], [], sum(share for _, share in schedule.parts)
    reached = total * 0
    for name, share in schedule.parts:
        reached += share
        edges.append(float(reached / total))
        owner.append(names.index(name))
    part = torch.searchsorted(torch.tensor(edges[:-1], dtype=torch.float64, device=done.device), done, right=True)
    return torch.tensor(owner, device=done.device)[part]


def batches(mine: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the True entries of ``mine [N, samples]``: number of the text and of the mask, int64 ``[B]`` each."""
    text, sample = mine.nonzero(as_tuple=True)
    yield from zip(text.split(batch_size), sample.split(batch_size))


def choose_masked(texts: Texts, text: Tensor, sample: Tensor, count: Tensor) -> Tensor:
    """bool ``[B, L]``: `count` wanted positions of each text, uniformly chosen."""
    zero = torch.zeros_like(texts.position[text])
    bits = noise.random_bits(
        texts.seed, texts.sample_ids[text, None], texts.position[text], sample[:, None] + zero, zero, noise.MASK_PLACE
    )
    draw = torch.where(texts.wanted[text], noise.uniform(*bits), torch.inf)
    rank = draw.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < count[:, None]


def first_of_equal(texts: Texts, counts: Tensor) -> Tensor:
    """The first mask of a text that is the same as each of its masks, int64 ``[N, samples]``: it alone needs a pass.

    A text of n tokens has no more than ``2^n - 1`` masks. Those of more than `FEW` tokens are not compared.

    Args:
        counts: int64 ``[N, samples]``, sizes of the masks.
    """
    number = torch.arange(counts.shape[1], device=counts.device)
    first = number.repeat(len(counts), 1)
    few = (texts.wanted.sum(-1) <= FEW).nonzero()[:, 0]
    for text in few.split(max(1, COMPARED_ENTRIES // (counts.shape[1] * texts.input_ids.shape[1]))):
        pairs = text.repeat_interleave(len(number)), number.repeat(len(text))
        masked = choose_masked(texts, *pairs, counts[pairs])
        bit = (texts.wanted[pairs[0]].cumsum(-1) - 1).clamp(min=0)  # of a wanted token, its place among them
        code = (masked.long() << bit).sum(-1).view(len(text), len(number))
        ranked, order = code.sort(dim=-1, stable=True)
        new = torch.ones_like(ranked, dtype=torch.bool)
        new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
        start = torch.where(new, number, 0).cummax(-1)[0]
        first[text] = torch.empty_like(order).scatter_(1, order, order.gather(1, start))
    return first


def masked_nats(denoiser: Denoiser, texts: Texts, text: Tensor, masked: Tensor, t: Tensor) -> Tensor:
    """Sum of -log p of the true tokens at the masked positions, float64 ``[B]``, from one forward pass."""
    ids = texts.input_ids[text]
    attended = None if texts.attention_mask is None else texts.attention_mask[text]
    hidden = masked_hidden(denoiser, ids, masked, t, attended)
    row = masked.flatten().nonzero()[:, 0]
    return sum_by_text(-target_log_prob(denoiser.head, hidden, row, ids.flatten()[row]), row, ids)
