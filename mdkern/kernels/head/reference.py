"""The operators of the output layer in plain PyTorch. They run on CPUs, and the tests compare the kernels with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mdkern.kernels import noise
from mdkern.kernels.head.arguments import NO_FILTERS, Filters, Head, Outputs, Rows, Wanted

GROUP_SIZE = 64  # ids of a group, see `sample_token`
CHUNK_ELEMENTS = 1 << 25  # logits in memory at a time: 128 MiB of float32
LOWEST = -(2.0**100)  # in place of -inf in the records of shards, so that neither differences nor products are NaN
NOWHERE = 2**31 - 1  # larger than every id


def vocab_projection(hidden: Tensor, head: Head, rows: Rows, wanted: Wanted, filters: Filters) -> Outputs:
    """`mdkern.kernels.vocab_projection` with the logits in memory, `CHUNK_ELEMENTS` of them at a time.

    Raises:
        ValueError: values out of range; on the CPU only, as reading them on a GPU would synchronise.
    """
    row_index, row_count, temperature, uniform, seed, keys = rows
    capacity, device = row_index.shape[0], hidden.device
    count = capacity
    if device.type == "cpu":  # on a GPU, reading it would synchronise
        count = capacity if row_count is None else min(capacity, int(row_count))
        check_values(row_index[:count], None if temperature is None else temperature[:count], hidden.shape[0])
    if temperature is None:
        temperature = torch.full((capacity,), uniform, dtype=torch.float32, device=device)
    token = torch.full((capacity,), -1, dtype=torch.int64, device=device)
    argmax = torch.full((capacity if wanted.want_argmax else 0,), -1, dtype=torch.int64, device=device)
    statistics = torch.full((5, capacity), torch.nan, dtype=torch.float32, device=device)
    chunk = max(1, CHUNK_ELEMENTS // max(1, head.vocab(hidden)))
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        logits = row_logits(hidden[row_index[part]], head)
        token[part], statistics[:, part] = row_statistics(
            logits, temperature[part], seed, keys[part], filters, wanted.of
        )
        if wanted.want_argmax:
            argmax[part] = lowest_argmax(logits).masked_fill(token[part] < 0, -1)
    if row_count is not None and count == capacity:
        past = torch.arange(capacity, device=device) >= row_count
        token, statistics = token.masked_fill(past, -1), statistics.masked_fill(past, torch.nan)
        argmax = argmax.masked_fill(past, -1) if wanted.want_argmax else argmax
    log_prob, top1, top2, entropy, logsumexp = (statistic.clone() for statistic in statistics)  # outputs must not alias
    if not wanted.want_top:
        top1, top2 = top1.new_empty(0), top2.new_empty(0)
    if not wanted.want_entropy:
        entropy = entropy.new_empty(0)
    return token, log_prob, top1, top2, entropy, logsumexp, argmax


def divergence(
    hidden: Tensor, head: Head, other_hidden: Tensor, other: Head, row_index: Tensor
) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.divergence` with the log-probabilities in memory, `CHUNK_ELEMENTS` of each head's at a time."""
    if hidden.device.type == "cpu":
        check_values(row_index, None, hidden.shape[0])
    chunk = max(1, CHUNK_ELEMENTS // max(1, head.vocab(hidden)))
    kl = torch.empty(row_index.shape[0], dtype=torch.float32, device=hidden.device)
    cross_entropy = torch.empty_like(kl)
    for start in range(0, len(kl), chunk):
        rows = slice(start, start + chunk)
        log_p = row_logits(hidden[row_index[rows]], head).log_softmax(-1)
        log_q = row_logits(other_hidden[row_index[rows]], other).log_softmax(-1)
        p = log_p.exp()
        impossible = p == 0  # 0 * -inf is 0 here
        kl[rows] = (p * (log_p - log_q).masked_fill(impossible, 0.0)).sum(-1)
        cross_entropy[rows] = -(p * log_q.masked_fill(impossible, 0.0)).sum(-1)
    return kl, cross_entropy


def soft_embedding(
    hidden: Tensor,
    head: Head,
    table: Tensor | None,
    logsumexp: Tensor,
    temperature: Tensor | None,
    uniform_temperature: float,
) -> Tensor:
    """`mdkern.kernels.soft_embedding` for `CHUNK_ELEMENTS` logits at a time, in float32."""
    embedding = head.weight if table is None else table
    assert embedding is not None
    if temperature is None:
        temperature = torch.full_like(logsumexp, uniform_temperature)
    divisor = temperature.masked_fill(temperature == 0, 1.0)[:, None]
    soft = hidden.new_zeros(hidden.shape[0], embedding.shape[1], dtype=torch.float32)
    ids = max(1, CHUNK_ELEMENTS // max(1, hidden.shape[0], embedding.shape[1]))
    for start in range(0, head.vocab(hidden), ids):
        part = slice(start, start + ids)
        if head.weight is None:
            bias = None if head.bias is None else head.bias[part]
            logits = row_logits(hidden[:, part], head._replace(bias=bias))
        else:
            logits = row_logits(hidden, head.part(part))
        soft += (logits / divisor - logsumexp[:, None]).exp() @ embedding[part].float()
    return soft.to(embedding.dtype)


def project_shard(hidden: Tensor, head: Head, rows: Rows, wanted: Wanted, first: int) -> Tensor:
    """The records ``[M, 8]`` of `mdkern.kernels.head.sharded`, `CHUNK_ELEMENTS` logits at a time."""
    row_index, row_count, temperature, uniform, seed, keys = rows
    capacity, device, vocab = row_index.shape[0], hidden.device, head.vocab(hidden)
    count = capacity
    if device.type == "cpu":
        count = capacity if row_count is None else min(capacity, int(row_count))
        check_values(row_index[:count], None if temperature is None else temperature[:count], hidden.shape[0])
    if temperature is None:
        temperature = torch.full((capacity,), uniform, dtype=torch.float32, device=device)
    records = nothing_found(torch.empty((capacity, 8), dtype=torch.float32, device=device))
    chunk = max(1, CHUNK_ELEMENTS // max(1, vocab))
    for start in range(0, count if vocab else 0, chunk):
        part = slice(start, min(start + chunk, count))
        logits = row_logits(hidden[row_index[part]], head)
        records[part] = shard_records(logits, temperature[part], seed, keys[part], first, wanted.of)
    return records


def nothing_found(records: Tensor) -> Tensor:
    """Fill with the records of a shard without ids, and return them."""
    for number, value in enumerate((LOWEST, 0.0, 0.0, -torch.inf, LOWEST, 0.0, 0.0, -torch.inf)):
        records[:, number].fill_(value)
    records.view(torch.int32)[:, 5:7].fill_(NOWHERE)
    return records


def shard_records(
    logits: Tensor, temperature: Tensor, seed: Tensor, keys: Tensor, first: int, of: str = "model"
) -> Tensor:
    """The records of a shard's float32 logits ``[M, V]``, whose first id is `first`."""
    greedy, divisor = temperature == 0, temperature.masked_fill(temperature == 0, 1.0)
    scaled, largest = logits / divisor[:, None], lowest_argmax(logits)
    drawn, score = best_token(scaled, seed, keys, first)
    token = torch.where(greedy, largest, drawn)
    raised = (scaled if of == "sampler" else logits).clamp(min=LOWEST)
    divisor = torch.ones_like(divisor) if of == "sampler" else divisor
    top = raised.topk(min(2, logits.shape[1]), dim=-1).values
    second = top[:, 1] if top.shape[1] == 2 else torch.full_like(top[:, 0], -torch.inf)
    below = raised - top[:, :1]
    weight = below.exp()
    moment = (weight * below).sum(-1) / math.log(2.0)
    race = torch.where(greedy, top[:, 0], (score - top[:, 0] / divisor).exp())
    logit = raised.gather(1, token[:, None])[:, 0]
    token, largest = ((ids + first).to(torch.int32).view(torch.float32) for ids in (token, largest))
    return torch.stack((top[:, 0], weight.sum(-1), moment, second, race, token, largest, logit), 1)


def merge_shards(records: Tensor, rows: Rows, wanted: Wanted) -> Outputs:
    """The outputs of `mdkern.kernels.vocab_projection` from the records of all shards, ``[R, M, 8]``."""
    top, total, moment, second, race, ids, largest, logit = records.unbind(-1)
    capacity = records.shape[1]
    temperature = rows.temperature
    if temperature is None:
        temperature = records.new_full((capacity,), rows.uniform_temperature)
    greedy, divisor = temperature == 0, temperature.masked_fill(temperature == 0, 1.0)
    peak = top.amax(0)
    below = top - peak
    divisor = torch.ones_like(divisor) if wanted.of == "sampler" else divisor
    candidate = torch.where(greedy, race, race * (below / divisor).exp())
    best = candidate.amax(0)
    ids, largest = (bits.contiguous().view(torch.int32).long() for bits in (ids, largest))
    token, shard = ids.masked_fill(candidate != best, NOWHERE).min(0)
    argmax = largest.masked_fill(top != peak, NOWHERE).amin(0)
    sums = (total * below.exp()).sum(0)
    moments = ((moment * math.log(2.0) + total * below) * below.exp()).sum(0)
    logsumexp = peak + sums.log()
    held = lowest_argmax(top.T)  # of equal maxima only one is the largest
    others = top.scatter(0, held[None], second.gather(0, held[None]))
    log_prob = logit.gather(0, shard[None])[0] - logsumexp
    bad = (peak < LOWEST / 2) | ~logsumexp.isfinite()
    if rows.row_count is not None:
        bad |= torch.arange(capacity, device=records.device) >= rows.row_count
    statistics = (
        log_prob,
        (peak - logsumexp).exp(),
        (others.amax(0) - logsumexp).exp(),
        sums.log() - moments / sums,
        logsumexp,
    )
    log_prob, top1, top2, entropy, logsumexp = (value.masked_fill(bad, torch.nan) for value in statistics)
    if not wanted.want_top:
        top1, top2 = top1.new_empty(0), top2.new_empty(0)
    if not wanted.want_entropy:
        entropy = entropy.new_empty(0)
    argmax = argmax.masked_fill(bad, -1) if wanted.want_argmax else argmax.new_empty(0)
    return token.masked_fill(bad, -1), log_prob, top1, top2, entropy, logsumexp, argmax


def check_values(row_index: Tensor, temperature: Tensor | None, hidden_rows: int) -> None:
    """Refuse rows outside of `hidden`, and temperatures that are negative or NaN."""
    outside = (row_index < 0) | (row_index >= hidden_rows)
    if bool(outside.any()):
        raise ValueError(
            f"row_index must lie in 0..{hidden_rows - 1}, rows of hidden, not {int(row_index[outside][0])}"
        )
    if temperature is not None and not bool((temperature >= 0).all()):
        raise ValueError(f"temperature must be at least 0, not {float(temperature[~(temperature >= 0)][0])}")


def row_logits(states: Tensor, head: Head) -> Tensor:
    """float32 logits ``[M, V]`` of hidden rows ``[M, D]``."""
    product = states if head.weight is None else product_float32(states, head.weight, head.weight_scale)
    return finish_logits(product, head.bias, head.scale, head.soft_cap)


def finish_logits(product: Tensor, bias: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    """Scale, soft cap and bias, in float32: the part of the output layer after the matrix product."""
    logits = product.float()
    if scale != 1.0:
        logits = logits * scale
    if soft_cap > 0.0:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits if bias is None else logits + bias


def product_float32(rows: Tensor, weight: Tensor, weight_scale: Tensor | None = None) -> Tensor:
    """``rows [M, D] @ weight.T [D, V]``, times ``weight_scale [V]`` if the weight has one, accumulated and returned in
    float32."""
    if weight_scale is not None:
        return product_float32(rows, weight.to(rows.dtype)) * weight_scale
    if rows.dtype == torch.float32:
        return rows @ weight.T
    if rows.is_cuda:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return rows.float() @ weight.float().T


def row_statistics(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    keys: Tensor,
    filters: Filters = NO_FILTERS,
    of: str = "model",
) -> tuple[Tensor, Tensor]:
    """Token and statistics of rows of float32 logits ``[M, V]``.

    Returns:
        token int64 ``[M]``, which is -1 if the logits hold a NaN or +inf, or are all -inf; and float32 ``[5, M]``,
        which is NaN then: log-probability of the token, largest and second largest probability, entropy (nats),
        logsumexp.
    """
    bad = ~logits.logsumexp(-1).isfinite()
    greedy = lowest_argmax(logits)
    scaled = logits / temperature.masked_fill(temperature == 0, 1.0)[:, None]
    scaled = keep_most_probable(scaled, *filters)
    token = torch.where(temperature == 0, greedy, sample_token(scaled, seed, keys)).masked_fill(bad, -1)
    shown = scaled if of == "sampler" else logits
    logsumexp = shown.logsumexp(-1)
    log_p = shown - logsumexp[:, None]
    probability = log_p.exp()
    entropy = -(probability * log_p.masked_fill(probability == 0, 0.0)).sum(-1)
    top = probability.topk(min(2, shown.shape[1]), dim=-1).values
    log_prob = log_p.gather(1, token.clamp(min=0)[:, None])[:, 0]
    second = top[:, 1] if top.shape[1] == 2 else torch.zeros_like(top[:, 0])
    statistics = torch.stack((log_prob, top[:, 0], second, entropy, logsumexp))
    return token, statistics.masked_fill(bad, torch.nan)


def keep_most_probable(logits: Tensor, top_k: int, top_p: float, min_p: float, top_p_rule: str = "reach") -> Tensor:
    """The logits with -inf at the ids that `top_k`, then `top_p`, then `min_p` leave out, see `vocab_projection`."""
    if top_k < logits.shape[1] and top_k > 0:
        logits = keep_first(logits, logits.topk(top_k).values[:, -1:], lambda above, equal: top_k - above.sum(-1))
    if top_p < 1.0:
        weight = (logits - logits.amax(-1, keepdim=True)).exp()
        goal = top_p * weight.sum(-1)
        ordered = logits.sort(dim=-1, descending=True).values
        before = (ordered - ordered[:, :1]).exp().cumsum(-1).roll(1, -1)
        before[:, 0] = 0.0
        place = (before < goal[:, None]).sum(-1, keepdim=True).clamp(min=1) - 1

        def fewest(above: Tensor, equal: Tensor) -> Tensor:
            """How many of the equal logits are kept: the mass that is missing to the goal, in units of one of them."""
            left = goal - weight.masked_fill(~above, 0.0).sum(-1)
            number = left / weight.masked_fill(~equal, 0.0).amax(-1)
            return number.floor() if top_p_rule == "within" else number.ceil().clamp(min=1)

        logits = keep_first(logits, ordered.gather(-1, place), fewest)
    if min_p > 0.0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def keep_first(logits: Tensor, least: Tensor, fewest: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Keep the logits above ``least [M, 1]`` and the first few that are equal to it, at least one in all; others are
    -inf.

    Args:
        fewest: gives the number of equal logits that are kept, ``[M]``, from which are above and which are equal, bool
            ``[M, V]`` each.
    """
    above, equal = logits > least, logits == least
    number = fewest(above, equal)
    number = torch.where(above.any(-1), number, number.clamp(min=1))
    kept = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= number[:, None]))
    return logits.masked_fill(~kept, -torch.inf)


def sample_token(scaled: Tensor, seed: Tensor, keys: Tensor) -> Tensor:
    """An exact draw from ``softmax(scaled)`` for each row, int64 ``[M]``."""
    return best_token(scaled, seed, keys)[0]


def best_token(scaled: Tensor, seed: Tensor, keys: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """An exact draw from ``softmax(scaled)`` for each row, int64 ``[M]``, and the score with which it won.

    `first` is the id of the first column. The best of draws from parts of the vocabulary is a draw from all of it.

    Gumbel-max in two stages: each group of `GROUP_SIZE` consecutive ids gets one Gumbel number added to its logsumexp,
    and the largest sum picks the group; then a Gumbel number for each id of that group picks the token. The maximum of
    ``logit + Gumbel`` over a group has the distribution of ``logsumexp + Gumbel`` and is independent of the id that
    attains it. So the token has the distribution of Gumbel-max, with 1/64 of its random numbers.
    """
    rows, columns = scaled.shape
    size = min(GROUP_SIZE, columns)  # a vocabulary smaller than a group is one group
    groups = -(-columns // size)
    padded = torch.nn.functional.pad(scaled, (0, groups * size - columns), value=-torch.inf)
    grouped = padded.view(rows, groups, size)
    sample, position, step = keys[:, :, None].unbind(1)
    ids = first // GROUP_SIZE + torch.arange(groups, device=scaled.device)
    scores = grouped.logsumexp(-1) + noise.gumbel(seed, sample, position, step, ids, noise.GROUP)
    group = lowest_argmax(scores)
    within = grouped[torch.arange(rows, device=scaled.device), group]
    ids = first + group[:, None] * size + torch.arange(size, device=scaled.device)
    token_noise = noise.gumbel(seed, sample, position, step, ids, noise.TOKEN)
    return group * size + lowest_argmax(within + token_noise), scores.amax(-1)


def lowest_argmax(values: Tensor) -> Tensor:
    """Argmax over the last dimension, with the lowest index on ties, which `torch.argmax` does not promise."""
    columns = torch.arange(values.shape[-1], device=values.device)
    at_maximum = values == values.amax(-1, keepdim=True)
    return torch.where(at_maximum, columns, values.shape[-1] - 1).amin(-1)
