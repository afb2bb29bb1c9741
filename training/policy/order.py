"""Learns in which order a text's tokens are the most likely: a variational bound over orders (LO-ARM, 2503.05979).

For orders z of the positions of a block, drawn from q, which sees the text x,

    log p(x) >= E_q sum_i [log p(z_i | z_<i, x_<i) + log p(x_{z_i} | x_<i) - log q(z_i | z_<i, x)],

where x_<i is the block with the positions z_<i revealed. The denoiser gives log p(x_j | .) and is not trained. The
policy p(z | .) is the softmax of a network's scores over the masked positions, and is what decoding uses. The order q
is a softmax of scores, too, without replacement, from the statistics of the block when all of it is masked and how
probable its true tokens then are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.decoders import Policy, Proposal
from mdkern.decoders.policy import FEATURES, ORDER, features
from mdkern.models import Denoiser
from training.policy.fit import HIDDEN, as_policy, network, spread_of


def log_shares(scores: Tensor, left: Tensor) -> Tensor:
    """Log of the softmax of ``scores [B, R]`` over what is ``left``; 0 elsewhere, which is not to be read."""
    found = torch.where(left, scores, -torch.inf).log_softmax(-1)
    return torch.where(left, found, 0.0)


def inner_sum(order_scores: Tensor, policy_scores: Tensor, log_p: Tensor, left: Tensor) -> Tensor:
    """F, the summand of the bound in its mean over the next position: ``[B]``.

    Args:
        order_scores, policy_scores: ``[B, R]``, of q and of the policy.
        log_p: ``[B, R]``, log-probabilities of the true tokens in this state.
        left: bool ``[B, R]``, what is masked; in no row nothing.
    """
    log_q, log_policy = log_shares(order_scores, left), log_shares(policy_scores, left)
    share = torch.where(left, log_q.exp(), 0.0)
    return (share * (torch.where(left, log_p, 0.0) + log_policy - log_q)).sum(-1)


def draw_order(order_scores: Tensor, able: Tensor, generator: torch.Generator) -> Tensor:
    """Places in an order drawn without replacement from the softmax, int64 ``[B, R]``: 0 for the first position.

    Positions that are not `able` come last.
    """
    uniform = torch.rand(order_scores.shape, generator=generator, device=order_scores.device, dtype=torch.float64)
    noisy = torch.where(able, order_scores.double() - (-uniform.log()).log(), -torch.inf)
    return noisy.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def log_prefix(order_scores: Tensor, place: Tensor, count: Tensor, able: Tensor) -> Tensor:
    """Log-probability of the first ``count [B]`` positions in the order of ``place [B, R]``: ``[B]``."""
    order = place.argsort(-1)
    scores = torch.where(able, order_scores, -torch.inf).gather(-1, order)
    rest = scores.flip(-1).logcumsumexp(-1).flip(-1)  # over this position and all that come later
    inside = torch.arange(place.shape[1], device=place.device) < count[:, None]
    return torch.where(inside, scores - rest, 0.0).sum(-1)


def surrogate(
    order_scores: Tensor, sums: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor], count: Tensor, able: Tensor
) -> Tensor:
    """A function ``[B]`` whose gradient is an unbiased estimate of that of the bound.

    Two orders are drawn with one number of revealed positions, and each is the other's baseline.

    Args:
        sums: `inner_sum` after the first `count` positions of either order.
        places, count: the orders, and how many positions are revealed, uniform in 0..n - 1.
        able: bool ``[B, R]``, the n positions of a block.
    """
    first, second = (log_prefix(order_scores, place, count, able) for place in places)
    a, b = sums
    return able.sum(-1) * (0.5 * (a + b) + 0.5 * (a - b).detach() * (first - second))


class Seen(NamedTuple):
    """What a denoiser says of the blocks of some texts."""

    inputs: Tensor  # float32 [B, R, 10]
    log_p: Tensor  # float32 [B, R], of the true tokens


@torch.no_grad()
def look(denoiser: Denoiser, ids: Tensor, true: Tensor, columns: Tensor) -> Seen:
    """The features of the blocks at ``columns [B, R]`` of ``ids [B, L]``, in which some positions are masked."""
    t = torch.full((len(ids),), 0.5, device=ids.device) if denoiser.time_conditioning else None
    log_p = denoiser.head.logits(denoiser.hidden(ids, t, columns)).log_softmax(-1)
    top, token = log_p.topk(2, -1)
    p = top.exp()
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    proposal = Proposal(token[..., 0], p[..., 0], p[..., 0], p[..., 1], entropy)
    width = columns.shape[1]
    masked = ids.gather(1, columns) == denoiser.mask_id
    offset = torch.arange(width, device=ids.device).expand_as(columns)
    inputs = features(masked, offset, proposal, denoiser.vocab_size - 1, width)
    return Seen(inputs, log_p.gather(-1, true.gather(1, columns)[..., None])[..., 0])


class OrderNetworks(nn.Module):
    """The scores of the policy, and of q, which also sees log p of the true token."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation
        self.policy = network(HIDDEN)
        self.order = nn.Sequential(nn.Linear(len(FEATURES) + 1, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))

    def policy_scores(self, seen: Seen) -> Tensor:
        scores: Tensor = self.policy((seen.inputs - self.mean) / self.deviation)[..., 0]
        return scores

    def order_scores(self, seen: Seen) -> Tensor:
        inputs = (seen.inputs - self.mean) / self.deviation
        scores: Tensor = self.order(torch.cat((inputs, seen.log_p[..., None]), -1))[..., 0]
        return scores


def train_order(
    denoiser: Denoiser,
    texts: Tensor,
    block_length: int,
    seed: int,
    steps: int = 500,
    batch: int = 64,
    lr: float = 3e-3,
    **facts: Any,
) -> tuple[Policy, list[float]]:
    """Train an order for blocks of ``texts [N, L]``, with all before a block given and all from it on masked.

    Returns:
        The policy, and of each step the bound's estimate per token, nats.
    """
    device, length = denoiser.device, texts.shape[1]
    if length < block_length:
        raise ValueError(f"texts of {length} tokens hold no block of {block_length}")
    generator = torch.Generator(device).manual_seed(seed)
    texts = texts.to(device)

    def integers(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device)

    def blocks() -> tuple[Tensor, Tensor, Tensor]:
        """Some texts, the columns of a block of each, and the texts with masks from there on."""
        true = texts[integers(len(texts), batch)]
        first = block_length * integers(length // block_length, batch)[:, None]
        columns = first + torch.arange(block_length, device=device)
        blank = torch.where(torch.arange(length, device=device) < first, true, denoiser.mask_id)
        return true, columns, blank

    def revealed(true: Tensor, columns: Tensor, blank: Tensor, place: Tensor, count: Tensor) -> Seen:
        inside = torch.where(place < count[:, None], true.gather(1, columns), denoiser.mask_id)
        return look(denoiser, blank.scatter(1, columns, inside), true, columns)

    halfway = []
    for _ in range(4):
        true, columns, blank = blocks()
        count = integers(block_length, batch)
        place = draw_order(torch.zeros(columns.shape, device=device), columns >= 0, generator)
        halfway.append(revealed(true, columns, blank, place, count).inputs[place >= count[:, None]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = OrderNetworks(*spread_of(torch.cat(halfway))).to(device)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=lr)
    bounds = []
    for _ in range(steps):
        true, columns, blank = blocks()
        able = torch.ones_like(columns, dtype=torch.bool)
        order_scores = networks.order_scores(look(denoiser, blank, true, columns))
        count = integers(block_length, batch)
        places = tuple(draw_order(order_scores.detach(), able, generator) for _ in range(2))
        sums = []
        for place in places:
            seen = revealed(true, columns, blank, place, count)
            left = place >= count[:, None]
            sums.append(inner_sum(order_scores, networks.policy_scores(seen), seen.log_p, left))
        loss = -surrogate(order_scores, (sums[0], sums[1]), (places[0], places[1]), count, able).mean() / block_length
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bounds.append(float((sums[0] + sums[1]).detach().mean() / 2))
    facts |= {"kind": ORDER, "block_length": block_length}
    policy = as_policy(networks.policy, networks.mean, networks.deviation, **facts)
    return policy, bounds
