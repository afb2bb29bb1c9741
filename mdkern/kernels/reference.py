"""The operators in plain PyTorch: the CPU path, and what the tests hold the kernels against."""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels import noise

GROUP_SIZE = 64  # vocabulary ids that share one group draw, see `vocab_projection`
CHUNK_ELEMENTS = 1 << 25  # logits held at a time: 128 MiB of float32


def vocab_projection(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor,
    row_count: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    keys: Tensor,
    scale: float,
    soft_cap: float,
    want_top: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mdkern.kernels.vocab_projection` with the logits in memory, `CHUNK_ELEMENTS` of them at a time."""
    capacity = row_index.shape[0]
    count = capacity
    if row_count is not None and row_count.device.type == "cpu":  # on a GPU reading it would be a synchronisation
        count = min(capacity, int(row_count))
    columns = hidden.shape[1] if weight is None else weight.shape[0]
    device = hidden.device
    token = torch.full((capacity,), -1, dtype=torch.int64, device=device)
    statistics = torch.full((5, capacity), torch.nan, dtype=torch.float32, device=device)
    chunk = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        states = hidden[row_index[rows]]
        logits = finish_logits(states if weight is None else product_float32(states, weight), bias, scale, soft_cap)
        token[rows], statistics[:, rows] = row_statistics(logits, temperature[rows], seed, keys[rows])
    log_prob, top1, top2, entropy, logsumexp = (statistic.clone() for statistic in statistics)  # no shared storage
    if not want_top:
        top1, top2 = top1.new_empty(0), top2.new_empty(0)
    if not want_entropy:
        entropy = entropy.new_empty(0)
    return token, log_prob, top1, top2, entropy, logsumexp


def finish_logits(product: Tensor, bias: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    """Scale, soft cap and bias, in float32: the part of the output layer after the matrix product."""
    logits = product.float()
    if scale != 1.0:
        logits = logits * scale
    if soft_cap > 0.0:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits if bias is None else logits + bias


def product_float32(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows [M, D] @ weight.T [D, V]`` accumulated and returned in float32."""
    if rows.dtype == torch.float32:
        return rows @ weight.T
    if rows.is_cuda:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return rows.float() @ weight.float().T


def row_statistics(logits: Tensor, temperature: Tensor, seed: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Token and statistics of rows of float32 logits ``[M, V]``.

    Returns:
        token int64 ``[M]``, -1 where the logits hold a NaN, a +inf or nothing above -inf; and float32 ``[5, M]``:
        log-probability of the token, largest and second largest probability, entropy (nats), logsumexp.
    """
    logsumexp = logits.logsumexp(-1)
    log_p = logits - logsumexp[:, None]
    probability = log_p.exp()
    entropy = -(probability * log_p.masked_fill(probability == 0, 0.0)).sum(-1)
    top = probability.topk(min(2, logits.shape[1]), dim=-1).values
    greedy = lowest_argmax(logits)
    token = torch.where(temperature == 0, greedy, sample_token(logits, temperature, seed, keys))
    bad = ~logsumexp.isfinite()
    token = token.masked_fill(bad, -1)
    log_prob = log_p.gather(1, token.clamp(min=0)[:, None])[:, 0]
    second = top[:, 1] if top.shape[1] == 2 else torch.zeros_like(top[:, 0])
    return token, torch.stack((log_prob, top[:, 0], second, entropy, logsumexp))


def sample_token(logits: Tensor, temperature: Tensor, seed: Tensor, keys: Tensor) -> Tensor:
    """An exact draw from ``softmax(logits / temperature)`` per row, int64 ``[M]``.

    Gumbel-max over a partition: each group of `GROUP_SIZE` consecutive ids gets one Gumbel on top of its logsumexp,
    which picks the group; then one Gumbel per id of that group picks the token. The maximum over a group of
    ``logit + Gumbel`` is distributed as ``logsumexp + Gumbel`` and is independent of where it is attained, so this is
    Gumbel-max itself at 1/64 of its noise.
    """
    rows, columns = logits.shape
    scaled = logits / temperature.masked_fill(temperature == 0, 1.0)[:, None]
    groups = -(-columns // GROUP_SIZE)
    padded = torch.nn.functional.pad(scaled, (0, groups * GROUP_SIZE - columns), value=-torch.inf)
    grouped = padded.view(rows, groups, GROUP_SIZE)
    sample, position, step = keys[:, :, None].unbind(1)
    ids = torch.arange(groups, device=logits.device)
    group_noise = noise.gumbel(seed, sample, position, step, ids, noise.GROUP)
    group = lowest_argmax(grouped.logsumexp(-1) + group_noise)
    within = grouped[torch.arange(rows, device=logits.device), group]
    ids = group[:, None] * GROUP_SIZE + torch.arange(GROUP_SIZE, device=logits.device)
    token_noise = noise.gumbel(seed, sample, position, step, ids, noise.TOKEN)
    return group * GROUP_SIZE + lowest_argmax(within + token_noise)


def lowest_argmax(values: Tensor) -> Tensor:
    """Argmax over the last dimension, lowest index on ties (`torch.argmax` promises none)."""
    columns = torch.arange(values.shape[-1], device=values.device)
    at_maximum = values == values.amax(-1, keepdim=True)
    return torch.where(at_maximum, columns, values.shape[-1] - 1).amin(-1)
