"""Fits a filter to states, and says how good it is beside the probability itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.decoders import Policy
from mdkern.decoders.policy import FEATURES, FILTER
from training.policy.states import States

HIDDEN = 32
RECALLS, PRECISIONS = (0.1, 0.2, 0.3), (0.95, 0.9, 0.8)


def split(states: States, share: float, texts: int) -> tuple[States, States]:
    """States for fitting and for testing, which are those of the last `share` of the texts."""
    last = states.text >= round(texts * (1.0 - share))
    return states.only(~last & states.counts), states.only(last & states.counts)


def network(hidden: int | None) -> nn.Sequential:
    """The layers of a policy; `hidden` None: a linear score."""
    width = len(FEATURES)
    if hidden is None:
        return nn.Sequential(nn.Linear(width, 1))
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))


def as_policy(layers: nn.Sequential, mean: Tensor, deviation: Tensor, **facts: Any) -> Policy:
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return Policy(
        tuple((layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in linear),
        mean,
        deviation,
        **facts,
    )


def spread_of(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each input; 1 where it does not vary."""
    deviation = inputs.std(0)
    return inputs.mean(0), torch.where(deviation > 1e-6, deviation, 1.0)


def fit_filter(
    states: States, hidden: int | None, seed: int, steps: int = 2000, batch: int = 4096, lr: float = 3e-3, **facts: Any
) -> Policy:
    """Fit a filter by the mean binary cross-entropy of ``states``, all of which count.

    Args:
        hidden: width of the hidden layer; None: a linear score.
        facts: `block_length`, `vocab_size` and so on of the `Policy`.
    """
    if not len(states.right):
        raise ValueError("there are no states to fit a filter to: take more texts")
    mean, deviation = spread_of(states.inputs)
    inputs, right = (states.inputs - mean) / deviation, states.right.float()
    device = inputs.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = network(hidden).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(right), (min(batch, len(right)),), generator=generator, device=device)
        loss = F.binary_cross_entropy_with_logits(layers(inputs[rows])[:, 0], right[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return as_policy(layers, mean, deviation, kind=FILTER, **facts)


def cross_entropy(scores: Tensor, right: Tensor) -> float:
    """Mean binary cross-entropy of scores, which are logits, nats."""
    return float(F.binary_cross_entropy_with_logits(scores.double(), right.double()))


def curves(scores: Tensor, right: Tensor) -> dict[str, dict[str, float]]:
    """Precision where the best-scored hold a share of what is right, and that share where a precision is kept."""
    hits = right[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1, device=hits.device)
    recall = hits / hits[-1].clamp(min=1)
    kept = {bound: recall[precision >= bound] for bound in PRECISIONS}
    return {
        "precision": {f"{level:g}": float(precision[(recall >= level).int().argmax()]) for level in RECALLS},
        "recall": {f"{bound:g}": float(found.max()) if len(found) else 0.0 for bound, found in kept.items()},
    }


def report(states: States, policies: dict[str, Policy]) -> dict[str, Any]:
    """Cross-entropies and curves of the probability itself and of filters, over states that all count."""
    scores = {"p": states.inputs[:, 0]} | {name: policy.score(states.inputs) for name, policy in policies.items()}
    return {
        name: {"bce": cross_entropy(score, states.right)} | curves(score, states.right)
        for name, score in scores.items()
    } | {"states": {"positions": len(states.right), "right": float(states.right.float().mean())}}


def table(found: dict[str, Any]) -> str:
    header = ["score", "BCE", *(f"precision at recall {level:g}" for level in RECALLS)]
    header += [f"recall at precision {bound:g}" for bound in PRECISIONS]
    rows = [
        [name, f"{row['bce']:.3f}", *(f"{x:.3f}" for part in ("precision", "recall") for x in row[part].values())]
        for name, row in found.items()
        if "bce" in row
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
